"""The generator's recipe: a tokenizer, a VAR on its tokens, parallel streams on the frozen VAR.

A run's folder::

    RUN/recipe.json                     what was asked for
    RUN/STAGE/                          checkpoint, log.jsonl, pictures
    RUN/tokenizer.safetensors           the tokenizer in a VAR without training
    RUN/var.safetensors                 the VAR, averaged weights
    RUN/streamsP.safetensors            P trained streams
    RUN/streams.json                    what the streams are worth on the validation pictures

Pictures are held in memory, at the side that is trained on: 1 GB holds 80,000 of 64×64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parscale_ear import checkpoint
from parscale_ear.data.images import class_names, list_digest
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.generator.var import VAR
from parscale_ear.generator.vqvae import VQVAE
from parscale_ear.profiling.origin import origin
from parscale_ear.training.distributed import World
from parscale_ear.training.folder import Claim, load_labelled, split_pictures, told_of
from parscale_ear.training.generator_recipe import VARRecipe
from parscale_ear.training.generator_tasks import (
    StreamsTask,
    TokenizerTask,
    TokenStore,
    VARTask,
    token_losses,
)
from parscale_ear.training.loop import Run, Task, TrainingError, computed_in
from parscale_ear.training.stream_worth import summarise

MOST_VALIDATED = 2048


def train_var(recipe: VARRecipe, out: Path, *, resume: bool = False) -> bool:
    """Runs all stages, or what is left of them.

    Args:
        recipe: what to do.
        out: the run's folder, the same for all processes.
        resume: go on with the run in ``out``.

    Returns:
        True when all is done, False when a signal stopped it.

    Raises:
        TrainingError: ``out`` holds a run and ``resume`` is false, or it holds another recipe's;
            or some pictures have no class.
        ImageError: there are no usable pictures.
        CheckpointError: the weights of an earlier stage cannot be used.
    """
    refs, named = split_pictures(
        recipe.images, recipe.validation, held_out=MOST_VALIDATED, most_validated=MOST_VALIDATED
    )
    lists = {"pictures": list_digest(refs), "validated": list_digest(named)}
    claim = Claim(recipe, out, resume=resume, **lists)
    world = claim.world
    classes = class_names(refs)
    if "" in classes:
        loose = next(ref for ref in refs if not ref.label)
        raise TrainingError(
            f"{loose.name} has no class; give a folder of class folders, or a tar of them"
        )
    pictures, labels = load_labelled(refs, recipe.side, classes)
    validation, validation_labels = load_labelled(named, recipe.side, classes)
    recipe.var_config(len(classes))  # all mistakes show before anything is written
    facts = {
        "classes": classes,
        "pictures": len(pictures),
        "validation_pictures": len(validation),
        "images": [Path(path).name for path in recipe.images],
    }

    def tokens_of(var: VAR) -> list[TokenStore]:
        both = ((pictures, labels), (validation, validation_labels))
        return [TokenStore(var.vqvae, x, y, world.device) for x, y in both]

    with claim.taken():
        stores: list[TokenStore] = []
        for stage in recipe.stages():
            if (out / f"{stage}.safetensors").exists():
                continue
            torch.manual_seed(recipe.seed)
            task: Task
            if stage == "tokenizer":
                var = VAR(recipe.var_config(len(classes))).to(world.device)
                task = TokenizerTask(
                    var.vqvae.train(), pictures, validation, recipe, out / stage, world
                )
            else:
                before = "tokenizer" if stage == "var" else "var"
                var = VAR.from_pretrained(out / f"{before}.safetensors", device=world.device)
                stores = stores or tokens_of(var)
                task = _token_task(stage, var, stores, recipe, out / stage, world)
            if not _run(stage, task, var, recipe, out, resume, world, facts):
                return False
        if world.rank == 0 and len(set(recipe.streams)) > 1:
            var = VAR.from_pretrained(out / "var.safetensors", device=world.device)
            result = compare_streams(var, recipe, out, (stores or tokens_of(var))[1], world)
            checkpoint.write_text(out / "streams.json", json.dumps(result, indent=1) + "\n")
        world.wait()
        return True


def _token_task(
    stage: str, var: VAR, stores: Sequence[TokenStore], recipe: VARRecipe, folder: Path,
    world: World,
) -> Task:  # fmt: skip
    training, validation = stores
    if stage == "var":
        var.vqvae.requires_grad_(False)
        return VARTask(var.train(), training, validation, recipe, folder, world)
    var.requires_grad_(False).eval()
    count = int(stage.removeprefix("streams"))
    streams = ParallelStreams.fitting(
        var.config.transformer, count, prefix_tokens=recipe.prefix_tokens
    )
    streams = streams.to(world.device)
    return StreamsTask(streams, var, training, validation, recipe, folder, world)


def _run(
    stage: str, task: Task, var: VAR, recipe: VARRecipe, out: Path, resume: bool, world: World,
    facts: Mapping[str, Any],
) -> bool:  # fmt: skip
    """One stage; writes its averaged weights."""
    if isinstance(task, StreamsTask) and task.streams.count == 1:  # nothing to train
        if world.rank == 0:
            task.streams.save_pretrained(out / f"{stage}.safetensors", backbone=var.fingerprint())
        return True
    run = Run(task, recipe.loop(stage), out / stage, resume=resume, world=world)
    if not run.train():
        return False
    if world.rank == 0:
        told = {**facts, "stage": stage, **told_of(run, recipe)}
        path, average = out / f"{stage}.safetensors", run.average
        if isinstance(average, ParallelStreams):
            average.save_pretrained(path, backbone=var.fingerprint(), training=told)
        elif isinstance(average, VQVAE):
            var.vqvae.load_state_dict(average.state_dict())
            var.save_pretrained(path, training=told)
        elif isinstance(average, VAR):
            average.save_pretrained(path, training=told)
    world.wait()
    return True


def compare_streams(
    var: VAR, recipe: VARRecipe, out: Path, validation: TokenStore, world: World
) -> dict[str, Any]:
    """What P streams are worth: validation loss by P, and its slope against log₂ P.

    Intervals are percentiles under resampling of the pictures, the same draws for all P.
    """
    backbone = var.fingerprint()
    counts = sorted(set(recipe.streams))
    losses = np.stack(
        [
            token_losses(
                var,
                validation,
                ParallelStreams.from_pretrained(
                    out / f"streams{count}.safetensors", backbone=backbone, device=world.device
                ),
                world.device,
            ).numpy()
            for count in counts
        ]
    )  # (counts, N)
    return {
        "counts": counts,
        "pictures": losses.shape[1],
        # One stream has nothing to train, so the step to the first trained prefixes is in the
        # slope over all counts; the other slope leaves it out.
        "steps": [0 if count == 1 else recipe.stream_steps for count in counts],
        "batch": recipe.batch,
        "prefix_tokens": recipe.prefix_tokens,
        "side": recipe.side,
        "model": f"VAR, depth {recipe.depth}, width {recipe.width}",
        "parameters": var.parameter_count(),
        "seed": recipe.seed,
        "images": [Path(path).name for path in recipe.images],
        "validation": [Path(path).name for path in recipe.validation],
        **origin(world.device, "float32"),
        "trained_in": computed_in(recipe.precision, world.device),
        **summarise(counts, losses, recipe.seed),
    }

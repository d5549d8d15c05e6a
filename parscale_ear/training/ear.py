"""The EnergyAR's recipe: a generator on cached latents, then parallel streams on it.

The generator's first stage scores tokens, each given the truth before it; the second draws freely
and scores whole pictures, too.

A run's folder::

    RUN/recipe.json                     what was asked for
    RUN/STAGE/                          checkpoint, log.jsonl, drawn pictures
    RUN/ear.safetensors                 the generator, averaged weights
    RUN/pictures.safetensors            the same after the stage that scores whole pictures
    RUN/streamsP.safetensors            P trained streams
    RUN/earP.safetensors                the generator, if it was trained with them
    RUN/streams.json                    what the streams are worth on the validation latents

Latents are held in memory: 1 GB holds 120,000 of 32×8×8, mirror images counted. The stage that scores
whole pictures holds six times as much on the training's device, and twice that while it begins.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parscale_ear import checkpoint
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.data.latents import LatentDataset
from parscale_ear.device import exact_fp32
from parscale_ear.generator.ear import DEFAULT_DECODER, RECOMMENDED, EnergyAR
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.profiling.origin import origin
from parscale_ear.training.distributed import World
from parscale_ear.training.ear_recipe import EARRecipe
from parscale_ear.training.ear_tasks import (
    EARTask,
    LatentStore,
    PicturesTask,
    StreamedGenerator,
    picture_scores,
)
from parscale_ear.training.folder import HELD_OUT, Claim, told_of
from parscale_ear.training.loop import Run, TrainingError, computed_in
from parscale_ear.training.perceptual import FeatureLoss
from parscale_ear.training.stream_worth import summarise

log = logging.getLogger(__name__)
REFINED = ("latent_refinements", "refined_by")  # what a header says of refined latents


def train_ear(recipe: EARRecipe, out: Path, *, resume: bool = False) -> bool:
    """Runs all stages, or what is left of them.

    Args:
        recipe: what to do.
        out: the run's folder, the same for all processes.
        resume: go on with the run in ``out``.

    Returns:
        True when all is done, False when a signal stopped it.

    Raises:
        TrainingError: ``out`` holds a run and ``resume`` is false, or it holds another recipe's;
            or the latents have no classes, or others than the names given.
        CheckpointError: the latents, or weights to start from, cannot be used.
    """
    folders = {"pictures": recipe.latents, "validated": recipe.validation}
    lists = {
        name: checkpoint.digest({}, LatentDataset(folder).index["shards"])
        for name, folder in folders.items()
        if folder is not None
    }
    autoencoder = ParScaleEAR.from_pretrained(decoder=DEFAULT_DECODER, dtype=torch.float32)
    # Other weights under the same names must not go on with a run, either.
    lists["decoder"] = checkpoint.digest(autoencoder.decoder.state_dict())
    if recipe.start is not None:
        lists["start_weights"] = str(checkpoint.load(recipe.start)[1].get("sha256"))
    claim = Claim(recipe, out, resume=resume, **lists)
    world = claim.world
    if "pictures" in recipe.stages():
        FeatureLoss()  # and now if Lite0 is
    autoencoder = autoencoder.to(world.device)
    fingerprint = autoencoder.latent_fingerprint()
    training, validation, classes = load_latents(recipe, fingerprint)
    model = _fresh(recipe, training, classes, fingerprint)
    scales = len(model.pyramid.scales)
    if recipe.picture_known >= scales:
        raise TrainingError(
            f"picture_known must leave one of the {scales} scales of these latents to be drawn, "
            f"got {recipe.picture_known}"
        )
    with claim.taken():
        facts = {
            "latents": len(training), "validation_latents": len(validation), **refined(recipe.latents)
        }  # fmt: skip
        for stage in recipe.stages():
            if (out / f"{stage}.safetensors").exists():
                continue
            torch.manual_seed(recipe.seed)
            if stage == "pictures" and "ear" in recipe.stages():
                model = EnergyAR.load(out / "ear.safetensors").train()
            elif stage.startswith("streams"):
                model = EnergyAR.load(_generator(recipe, out)).train(recipe.train_backbone)
                model.requires_grad_(recipe.train_backbone)
                if recipe.train_backbone:
                    model.recommended = dict(RECOMMENDED)  # as in _fresh
            model = model.to(world.device).attach(autoencoder)
            task = _task(stage, model, training, validation, recipe, out / stage, world)
            if not _run(stage, task, recipe, out, resume, world, facts):
                return False
        if world.rank == 0 and len(set(recipe.streams)) > 1:
            result = compare_streams(recipe, out, validation, world)
            checkpoint.write_text(out / "streams.json", json.dumps(result, indent=1) + "\n")
        world.wait()
        return True


def load_latents(
    recipe: EARRecipe, fingerprint: str
) -> tuple[LatentStore, LatentStore, tuple[str, ...]]:
    """Latents to train on and to measure on, and the names of their classes.

    Raises:
        TrainingError: there are no classes, or others than the names given; or latents were refined
            otherwise in one folder than in the other.
        CheckpointError: they cannot be read, or are of another latent space.
    """
    training, classes = _read(recipe.latents, fingerprint)
    names = recipe.class_names or classes
    if len(names) != len(classes):
        raise TrainingError(
            f"{len(names)} class names for the {len(classes)} classes {', '.join(classes)}"
        )
    counts = training.labels.bincount(minlength=len(classes))
    if int(counts.min()) < 2:
        few = classes[int(counts.argmin())]
        raise TrainingError(f"{recipe.latents}: class {few} has fewer than two latents")
    if recipe.validation is not None:
        validation, found = _read(recipe.validation, fingerprint)
        ours, theirs = refined(recipe.latents), refined(recipe.validation)
        if ours != theirs:
            times = [int(told.get("latent_refinements", 0)) for told in (theirs, ours)]
            how = "" if times[0] != times[1] else ", by another autoencoder"
            raise TrainingError(
                f"{recipe.validation}: latents refined {times[0]} times, those of {recipe.latents} "
                f"{times[1]} times{how}; encode both alike"
            )
        if found != classes:
            raise TrainingError(f"{recipe.validation}: other classes than {recipe.latents}")
        if validation.latents.shape[2:] != training.latents.shape[2:]:
            raise TrainingError(f"{recipe.validation}: latents of another size")
        return training, validation, names
    # Evenly spread over every class, never the first of one.
    order = training.labels.argsort(stable=True)
    every = max(10, -(-len(training) // HELD_OUT))
    held = torch.zeros(len(training), dtype=torch.bool)
    held[order[1::every]] = True
    held[[int((training.labels == k).nonzero()[0]) for k in range(len(classes))]] = False
    parts = [LatentStore(training.latents[k], training.labels[k]) for k in (~held, held)]
    return parts[0], parts[1], names


def refined(folder: str) -> dict[str, Any]:
    """How a folder's latents were refined, for a header; empty where they were not.

    Returns:
        ``latent_refinements``, how often, and ``refined_by``, a digest of the autoencoder.
    """
    job = LatentDataset(folder).index["job"]
    count = int(job.get("refinements", 0))
    return {"latent_refinements": count, "refined_by": job.get("weights")} if count else {}


def _read(folder: str, fingerprint: str) -> tuple[LatentStore, tuple[str, ...]]:
    """A folder's latents and its classes."""
    data = LatentDataset(folder, fingerprint=fingerprint)
    if not data.classes or not len(data):
        raise TrainingError(
            f"{folder}: latents without classes; encode a folder of class folders, or a tar of them"
        )
    data.verify()  # nothing is learnt from damaged ones
    parts = [data]
    if data.index["mirrored"]:
        parts.append(LatentDataset(folder, mirrored=True, fingerprint=fingerprint))
    count = len(data)
    sides = [
        torch.stack([part[k * count + i]["latent"] for i in range(count)])
        for k, part in enumerate(parts)
    ]
    labels = torch.tensor([data[i]["label"] for i in range(count)])
    if int(labels.min()) < 0:
        raise TrainingError(f"{folder}: some latents have no class")
    latents = torch.stack(sides, dim=1).float()  # (N, 1 or 2, Z, S, S), however they are stored
    if latents.shape[3] != latents.shape[4]:
        raise TrainingError(f"{folder}: latents must be square, got {tuple(latents.shape[3:])}")
    return LatentStore(latents, labels), tuple(data.classes)


def _fresh(
    recipe: EARRecipe, training: LatentStore, classes: tuple[str, ...], fingerprint: str
) -> EnergyAR:
    """The generator that the training starts from."""
    torch.manual_seed(recipe.seed)
    try:
        config = recipe.config(
            classes, channels=training.latents.shape[2], side=training.latents.shape[3]
        )
    except ValueError as error:
        raise TrainingError(f"{recipe.latents}: {error}") from error
    if recipe.start is None:
        model = EnergyAR(config)
        model.pyramid.fit(training.latents.flatten(0, 1))
        model.latent_fingerprint = fingerprint
        return model
    model = EnergyAR.load(recipe.start)
    told = checkpoint.load(recipe.start)[1].get("training") or {}
    has, asked = asdict(model.config), asdict(config)
    others = [
        f"{name} is {has[name]}, not {asked[name]}" for name in has if has[name] != asked[name]
    ]
    if others:
        raise TrainingError(
            f"{recipe.start}: another model than the one to train ({'; '.join(others)}); give the "
            "options that say so"
        )
    ours = refined(recipe.latents)
    other = "of another autoencoder" if model.latent_fingerprint != fingerprint else ""
    if not other and {k: told[k] for k in REFINED if k in told} != ours:
        other = "that were refined otherwise"
    if other:
        if recipe.stages()[0].startswith("streams"):
            raise TrainingError(
                f"{recipe.start}: trained on latents {other}; train the generator on these "
                "first, by minutes or picture_minutes"
            )
        log.warning(
            "%s was trained on latents %s, and keeps normalising by their statistics",
            recipe.start,
            other,
        )
        model.latent_fingerprint = fingerprint
    model.recommended = dict(RECOMMENDED)  # the old ones were chosen for the old weights
    return model.train()


def _generator(recipe: EARRecipe, out: Path) -> str | Path:
    """Weights of the finished generator."""
    done = [stage for stage in recipe.stages() if not stage.startswith("streams")]
    if done:
        return out / f"{done[-1]}.safetensors"
    assert recipe.start is not None
    return recipe.start


def _trained_with(count: int, recipe: EARRecipe, out: Path) -> str | Path:
    """Weights of the generator that P streams are for."""
    return out / f"ear{count}.safetensors" if recipe.train_backbone else _generator(recipe, out)


def _task(
    stage: str, model: EnergyAR, training: LatentStore, validation: LatentStore,
    recipe: EARRecipe, folder: Path, world: World,
) -> EARTask:  # fmt: skip
    if stage == "pictures":
        return PicturesTask(model, training, validation, recipe, folder, world)
    streams = None
    if stage.startswith("streams"):
        streams = ParallelStreams.fitting(
            model.config.transformer,
            int(stage.removeprefix("streams")),
            prefix_tokens=recipe.prefix_tokens,
        ).to(world.device)
    return EARTask(model, training, validation, recipe, folder, world, streams)


def _run(
    stage: str, task: EARTask, recipe: EARRecipe, out: Path, resume: bool, world: World,
    facts: Mapping[str, Any],
) -> bool:  # fmt: skip
    """One stage; writes its averaged weights."""
    path, backbone = out / f"{stage}.safetensors", None
    if task.streams is not None:
        backbone = task.generator.fingerprint()
        if task.model is task.streams and task.streams.count == 1:  # nothing to train
            if world.rank == 0:
                task.streams.save_pretrained(path, backbone=backbone)
            return True
    run = Run(task, recipe.loop(stage), out / stage, resume=resume, world=world)
    if not run.train():
        return False
    if world.rank == 0:
        told = {**facts, **told_of(run, recipe)}
        average = run.average
        if isinstance(average, StreamedGenerator):
            average.generator.save_pretrained(
                _trained_with(average.streams.count, recipe, out), training=told
            )
            backbone, average = average.generator.fingerprint(), average.streams
        if isinstance(average, ParallelStreams):
            average.save_pretrained(path, backbone=backbone, training=told)
        else:
            assert isinstance(average, EnergyAR)
            average.save_pretrained(path, training=told)
    world.wait()
    return True


def load_streamed(
    recipe: EARRecipe, out: Path, count: int, device: torch.device
) -> tuple[EnergyAR, ParallelStreams]:
    """P trained streams of a finished run and the generator they are for.

    Raises:
        CheckpointError: one of them is missing, damaged or foreign.
    """
    model = EnergyAR.load(_trained_with(count, recipe, out), device=device)
    streams = ParallelStreams.from_pretrained(
        out / f"streams{count}.safetensors", backbone=model.fingerprint(), device=device
    )
    return model, streams


def compare_streams(
    recipe: EARRecipe, out: Path, validation: LatentStore, world: World
) -> dict[str, Any]:
    """What P streams are worth: validation energy score by P, and its slope against log₂ P."""
    counts = sorted(set(recipe.streams))
    scores = []
    for count in counts:
        model, streams = load_streamed(recipe, out, count, world.device)
        with exact_fp32(), torch.autocast(world.device.type, enabled=False):
            scores.append(picture_scores(model, validation, streams).numpy())
    return {
        "counts": counts,
        "pictures": len(validation),
        # On a frozen generator one stream has nothing to train, so the step to the first trained
        # prefixes is in the slope over all counts; the other slope leaves it out.
        "steps": [
            recipe.stream_steps if count > 1 or recipe.train_backbone else 0 for count in counts
        ],
        "backbone": "trained with its streams" if recipe.train_backbone else "frozen",
        "batch": recipe.batch,
        "prefix_tokens": recipe.prefix_tokens,
        "model": f"EnergyAR, depth {recipe.depth}, width {recipe.width}",
        "parameters": model.parameter_count(),
        "seed": recipe.seed,
        **origin(world.device, "float32"),
        "trained_in": computed_in(recipe.precision, world.device),
        **refined(recipe.latents),
        **summarise(counts, np.stack(scores), recipe.seed),
    }

"""The autoencoder's recipe: everything together, then decoders for one latent space.

Stage ``vae`` trains encoder, hybrid and decoder together on small crops, ``hybrid`` goes on with
all three on large ones. Then the encoder is frozen, and with it the latent space: ``baseline``
trains the decoder to do without the hybrid, ``sharp`` a second decoder for looks, whose colours are
centred at the end. The latent is normalised by running statistics from the first step on, so that
the hybrid always sees about zero mean and unit variance.

A run's folder::

    RUN/recipe.json                     what was asked for
    RUN/STAGE/                          checkpoint, log.jsonl, validation pictures
    RUN/STAGE.safetensors               averaged weights (FP32), when the stage is done
    RUN/curves.png
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parscale_ear import checkpoint
from parscale_ear.autoencoder.blocks import ResidualBlock
from parscale_ear.autoencoder.config import ParScaleEARConfig
from parscale_ear.autoencoder.litevae import PACKET_LEVELS
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.data.crops import RandomCrops, scan_sizes
from parscale_ear.data.images import list_digest, load_squares
from parscale_ear.training.autoencoder_task import AutoencoderTask
from parscale_ear.training.folder import Claim, split_pictures
from parscale_ear.training.loop import Run, read_log, resolve_precision
from parscale_ear.training.perceptual import FeatureLoss
from parscale_ear.training.recipe import (
    FROZEN_ENCODER,
    LOSSES,
    SHARP_KEEPS,
    STAGES,
    START,
    TRAINED,
    Recipe,
    named_release,
)

log = logging.getLogger(__name__)
CENTRE_STEPS, CENTRE_BATCH = 32, 16  # of crops over which the sharp decoder's colours are centred
CACHE_GIB = 4.0  # memory for decoded pictures, of all processes together


def train_autoencoder(recipe: Recipe, out: Path, *, resume: bool = False) -> bool:
    """Runs all stages, or what is left of them.

    Under ``accelerate launch`` all processes call this; they must see the same ``out``.

    Args:
        recipe: what to do.
        out: the run's folder.
        resume: go on with the run in ``out``.

    Returns:
        True when all is done, False when a signal stopped it.

    Raises:
        TrainingError: ``out`` holds a run and ``resume`` is false, or it holds another recipe's.
        ImageError: there are no usable pictures.
        CheckpointError: the weights to start from cannot be used.
    """
    training, validation = split_pictures(recipe.images, recipe.validation)
    lists = {"pictures": list_digest(training), "validated": list_digest(validation)}
    if recipe.start is not None:  # other weights under the same name must not go on with a run
        lists["start_weights"] = str(checkpoint.load(recipe.start)[1].get("sha256"))
    claim = Claim(recipe, out, resume=resume, **lists)
    world = claim.world
    pictures = load_squares(validation)
    stages = [stage for stage in recipe.stages if not (out / f"{stage}.safetensors").exists()]
    # All mistakes in weights, pictures and packages show now, before anything is written.
    for stage in stages:
        if _source(stage, out, recipe) in (None, recipe.start):
            _prepare(stage, out, recipe)
    sides = {recipe.crops(stage)[0] for stage in stages}
    cache_gib = CACHE_GIB / world.size / max(1, len(sides))
    sizes = scan_sizes(training) if sides else []
    sources = {
        side: RandomCrops(
            training,
            side=side,
            seed=recipe.seed,
            grey_share=recipe.grey_share,
            cache_gib=cache_gib,
            sizes=sizes,
        )
        for side in sorted(sides)
    }
    if "sharp" in stages:
        FeatureLoss()
    with claim.taken():
        for stage in stages:
            side, _ = recipe.crops(stage)
            crops = sources[side]
            for unused in set(sources) - {
                recipe.crops(s)[0] for s in stages[stages.index(stage) :]
            }:
                del sources[unused]  # and the pictures in its cache
            torch.manual_seed(recipe.seed)
            model = _prepare(stage, out, recipe).to(world.device).train()
            folder = out / stage
            history = _history(stage, out, recipe)
            task = AutoencoderTask(stage, model, crops, recipe, pictures, folder, world)
            run = Run(task, recipe.loop(stage), folder, resume=resume, world=world)
            if not run.train():
                return False
            damaged = world.union(crops.damaged)  # every process draws other pictures
            if damaged and world.rank == 0:
                names = ", ".join(sorted(damaged)[:5])
                log.warning("%d damaged pictures were left out: %s", len(damaged), names)
            if world.rank == 0:
                plot_curves(out)
                averaged = run.average
                assert isinstance(averaged, ParScaleEAR)
                quality = read_log(folder)[-1]
                if stage == "sharp":
                    centre_colours(averaged, crops)
                    quality = task.validate(averaged, run.progress.step)
                used = {"pictures": len(crops.refs), "damaged": len(damaged)}
                facts = _facts(stage, recipe, run, used, len(pictures), quality, history)
                averaged.save_pretrained(out / f"{stage}.safetensors", training=facts)
            world.wait()
        return True


@torch.no_grad()
def centre_colours(model: ParScaleEAR, crops: RandomCrops) -> None:
    """Takes the mean error of each colour over training crops off the decoder's output.

    Losses of features and of a critic hardly see that a whole picture is a little too warm.
    """
    mean = torch.zeros(3, dtype=torch.float64)
    for step in range(CENTRE_STEPS):
        images = crops.batch(step, CENTRE_BATCH).to(model.device)
        mean += (model(images) - images).double().mean((0, 2, 3)).cpu() / CENTRE_STEPS
    bias = model.decoder.bands2.bias
    assert bias is not None
    # A pixel is its packet's low band over 2 a level of the transform.
    bias[:3] -= (2**PACKET_LEVELS * mean).to(bias)


def _source(stage: str, out: Path, recipe: Recipe) -> str | Path | None:
    """Weights that a stage starts from: an earlier one's of this run, or those given."""
    if START.get(stage) in recipe.stages:
        return out / f"{START[stage]}.safetensors"
    return recipe.start


def _prepare(stage: str, out: Path, recipe: Recipe) -> ParScaleEAR:
    """The model that a stage starts from; what it does not train is frozen."""
    source = _source(stage, out, recipe)
    if source is None:
        return ParScaleEAR(ParScaleEARConfig())
    before = ParScaleEAR.from_pretrained(source, dtype=torch.float32)
    if source == recipe.start:
        before = grown(before, ParScaleEARConfig())
    if stage in ("vae", "hybrid"):
        return before
    if stage == "baseline":
        model = ParScaleEAR(replace(before.config, hybrid=None))
        model.load_state_dict(
            {k: v for k, v in before.state_dict().items() if not k.startswith("hybrid.")}
        )
    else:
        model = before
        for part in SHARP_KEEPS:
            model.get_submodule(part).requires_grad_(False)
    model.encoder.requires_grad_(False)
    return model


def grown(model: ParScaleEAR, config: ParScaleEARConfig) -> ParScaleEAR:
    """``model`` with the blocks that ``config`` has more of; these start as the identity.

    After Chen et al., "Net2Net" (ICLR 2016).

    Raises:
        CheckpointError: it differs in more than the number of blocks.
    """
    larger = ParScaleEAR(config)
    given = model.state_dict()
    own = larger.state_dict()
    new = own.keys() - given.keys()
    if (
        not given.keys() <= own.keys()
        or any(value.shape != own[key].shape for key, value in given.items())
        or any(".features" not in key for key in new)
    ):
        raise checkpoint.CheckpointError(
            "the weights to start from are of another shape than the model to train"
        )
    larger.load_state_dict(given, strict=False)
    for name, module in larger.named_modules():
        if f"{name}.conv1.weight" in new or f"{name}.reduce.weight" in new:
            last = module.conv2 if isinstance(module, ResidualBlock) else module.expand
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
    return larger


def _history(stage: str, out: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """The stages before this one, as the weights that it goes on from tell them."""
    source = _source(stage, out, recipe)
    if source is None:
        return []
    told = checkpoint.load(source)[1].get("training") or {}
    if "history" not in told:
        log.warning("%s does not say how it was trained: the new weights' history lacks it", source)
    stages = list(told.get("history", []))
    if "data" in told.get("validation", {}):  # weights that were shipped: none of this release's
        stages = [{**stage, "release": named_release(stage)[1]} for stage in stages]
    return stages


def _facts(
    stage: str,
    recipe: Recipe,
    run: Run,
    used: Mapping[str, int],
    validation_pictures: int,
    quality: Mapping[str, float],
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """What the header of a weight file says about its training; ``used``: how many pictures."""
    side, batch = recipe.crops(stage)
    precision = resolve_precision(recipe.precision, run.world.device)
    ours = {
        "stage": stage,
        "trains": TRAINED[stage],
        "steps": run.progress.step,
        "minutes": round(run.progress.seconds / 60, 1),
        "crops": batch * run.world.size,
        "side": side,
        "rate": recipe.loop(stage).learning_rate,
        "loss_weights": {
            name: getattr(recipe, f"{name}_weight")
            for name in LOSSES[stage]
            if getattr(recipe, f"{name}_weight")
        },
        "grey_share": recipe.grey_share,
        "latent_noise": recipe.latent_noise,
        "refinements": 0 if stage in FROZEN_ENCODER else recipe.refinements,
        "precision": precision,
        "seed": recipe.seed,
        **used,
        "images": [Path(path).name for path in recipe.images],
        "torch": torch.__version__,
    }
    return {
        "history": [*history, ours],
        "validation": {
            "pictures": validation_pictures,
            "precision": precision,
            "psnr_db": quality.get("psnr_db"),
            "ssim": quality.get("ssim"),
        },
    }


def plot_curves(out: Path) -> None:
    """Draws loss and PSNR of every stage to ``out/curves.png``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    ends: dict[str, float] = {}
    for stage in STAGES:
        lines = read_log(out / stage)
        start = ends.get(START.get(stage, ""), 0.0)  # later stages may start side by side
        for axis, key in zip(axes, ("loss", "psnr_db"), strict=True):
            points = [(start + line["minutes"], line[key]) for line in lines if key in line]
            if points:
                axis.plot(*zip(*points, strict=True), marker="." if key == "psnr_db" else "")
                axis.lines[-1].set_label(stage)
        ends[stage] = start + (lines[-1]["minutes"] if lines else 0.0)
    for axis, label in zip(axes, ("training loss", "validation PSNR, dB"), strict=True):
        axis.set_xlabel("minutes")
        axis.set_ylabel(label)
        if axis.lines:
            axis.legend()
    with checkpoint.atomic_path(out / "curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=100)

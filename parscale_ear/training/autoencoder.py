"""The autoencoder's recipe: LiteVAE, then baseline and hybrid from the same encoder.

Stage ``vae`` trains encoder and decoder. Its encoder is then frozen and the latent normalised; from
there, for equal time and with the same crops, ``baseline`` goes on with the decoder alone and
``hybrid`` with decoder and Lite-Hybrid. So both share one latent space and the comparison between
them is fair.

A run's folder::

    RUN/recipe.json                     what was asked for
    RUN/latent.json                     normalisation of the latent, shared by the later stages
    RUN/{vae,baseline,hybrid}/          checkpoint, log.jsonl, validation pictures
    RUN/{vae,baseline,hybrid}.safetensors   averaged weights (FP32), when the stage is done
    RUN/curves.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parscale_ear import checkpoint
from parscale_ear.autoencoder.hybrid import HybridConfig
from parscale_ear.autoencoder.model import ParScaleEAR, ParScaleEARConfig
from parscale_ear.autoencoder.reconstruct import reconstruct_pictures
from parscale_ear.data.crops import RandomCrops
from parscale_ear.data.images import (
    ImageRef,
    find_images,
    grid,
    load_squares,
    save_png,
)
from parscale_ear.metrics.reconstruction import mean_quality
from parscale_ear.training.loop import LoopConfig, Precision, Run, TrainingError, read_log
from parscale_ear.training.losses import log_mse_loss, ssim_loss
from parscale_ear.training.optimizer import build_optimizer

STAGES = ("vae", "baseline", "hybrid")
SHARES = {"vae": 0.7, "baseline": 0.15, "hybrid": 0.15}  # of the whole time
NORMALISATION_BATCHES = 64
HELD_OUT = 64  # at most so many pictures are held out when none are named for validation
PICTURES_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a training was asked for; written to ``RUN/recipe.json`` and into the weights."""

    images: tuple[str, ...]  # files, folders and tar archives to train on
    validation: tuple[
        str, ...
    ] = ()  # the same to measure on; none: some of the images are held out
    minutes: float | None = 120.0  # length of all stages together, or ...
    steps: int | None = None  # ... in steps
    batch: int = 32  # crops a step in stage vae
    crop: int = 128  # side of a crop in stage vae, pixels
    final_crop: int = 256  # side of a crop in the other stages; a step holds as many pixels
    learning_rate: float = 1e-3  # peak in stage vae
    decoder_rate: float = 7e-4  # peak in the other stages
    kl_weight: float = 1e-4  # of the mean KL an element, in nats
    ssim_weight: float = 0.1  # of 1 − SSIM in the stages after vae
    seed: int = 0  # of weights, crops and noise
    precision: Precision = "bf16"  # autocast dtype
    device: str = "cpu"  # torch device

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        for name in ("crop", "final_crop"):
            value = getattr(self, name)
            if value < 16 or value % 16:
                raise ValueError(f"{name} must be a multiple of 16, got {value}")
        for name, least in (("batch", 1), ("seed", 0), ("steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("learning_rate", "decoder_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        self.loop("vae")  # checks the length

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of ``dataclasses.asdict``, also after a trip through JSON."""
        values = {"ssim_weight": 0.0, **values}  # recipes of before there was that term
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**fields)

    def loop(self, stage: str) -> LoopConfig:
        """The loop of one stage."""
        share = SHARES[stage]
        return LoopConfig(
            minutes=None if self.minutes is None else self.minutes * share,
            steps=None if self.steps is None else max(1, round(self.steps * share)),
            learning_rate=self.learning_rate if stage == "vae" else self.decoder_rate,
            precision=self.precision,
        )

    def crops(self, stage: str) -> tuple[int, int]:
        """Side of a crop and crops a step in one stage."""
        if stage == "vae":
            return self.crop, self.batch
        return self.final_crop, max(1, self.batch * self.crop**2 // self.final_crop**2)


class AutoencoderTask:
    """Reconstruction loss and KL of one stage."""

    def __init__(
        self,
        model: ParScaleEAR,
        crops: RandomCrops,
        batch: int,
        recipe: Recipe,
        validation: Tensor,
        folder: Path,
    ) -> None:
        """Sets up one stage; ``validation`` is (N, 3, 256, 256), 8-bit."""
        self.model, self.crops, self.batch, self.recipe = model, crops, batch, recipe
        self.validation, self.folder = validation, folder
        self.frozen = not any(p.requires_grad for p in model.encoder.parameters())

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step's batch, and its parts."""
        device = torch.device(self.recipe.device)
        images = self.crops.batch(step, self.batch)
        images = images.to(device, memory_format=torch.channels_last)
        if self.frozen:
            with torch.no_grad():
                latent = self.model.encode(images).mode()
            restored = self.model.decode(self.model.enhance(latent))
            reconstruction = log_mse_loss(restored, images)
            structure = ssim_loss(restored[::2], images[::2])  # half of them: it is slow
            loss = reconstruction + self.recipe.ssim_weight * structure
            return loss, {"reconstruction": reconstruction.detach(), "ssim": 1 - structure.detach()}
        posterior = self.model.encode(images)
        noise = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        restored = self.model.decode(posterior.sample(noise))
        reconstruction = log_mse_loss(restored, images)
        kl = posterior.kl().mean()
        loss = reconstruction + self.recipe.kl_weight * kl
        return loss, {"reconstruction": reconstruction.detach(), "kl_nats": kl.detach()}

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """PSNR and SSIM on the validation pictures; writes some of them beside their originals."""
        assert isinstance(model, ParScaleEAR)
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}
        restored = reconstruct_pictures(
            model, self.validation, autocast=dtype[self.recipe.precision]
        )
        shown = [self.validation[:PICTURES_SHOWN], restored[:PICTURES_SHOWN]]
        save_png(grid([list(row) for row in shown]), self.folder / f"validation_{step:07d}.png")
        return mean_quality(restored, self.validation)


def train_autoencoder(recipe: Recipe, out: Path, *, resume: bool = False) -> bool:
    """Runs all stages, or what is left of them.

    Args:
        recipe: what to do.
        out: the run's folder.
        resume: go on with the run in ``out``.

    Returns:
        True when all is done, False when a signal stopped it.

    Raises:
        TrainingError: ``out`` holds a run and ``resume`` is false, or it holds another recipe's.
        ImageError: there are no usable pictures.
    """
    _check_claim(recipe, out, resume)
    build_optimizer([nn.Parameter(torch.zeros(1))], 1.0)  # fails now if timm is missing
    training, validation = _split(recipe)
    pictures = load_squares(validation)
    stages = [stage for stage in STAGES if not (out / f"{stage}.safetensors").exists()]
    # All mistakes in the pictures show now, before anything is written.
    sides = {recipe.crops(stage)[0] for stage in stages}
    sources = {side: RandomCrops(training, side=side, seed=recipe.seed) for side in sorted(sides)}
    checkpoint.write_text(out / "recipe.json", json.dumps(asdict(recipe), indent=1) + "\n")
    for stage in stages:
        weights = out / f"{stage}.safetensors"
        side, batch = recipe.crops(stage)
        crops = sources[side]
        for unused in set(sources) - {recipe.crops(s)[0] for s in stages[stages.index(stage) :]}:
            del sources[unused]  # and the pictures in its cache
        torch.manual_seed(recipe.seed)
        model = _prepare(stage, out, crops, batch, recipe)
        folder = out / stage
        task = AutoencoderTask(model, crops, batch, recipe, pictures, folder)
        run = Run(task, recipe.loop(stage), folder, resume=resume)
        if not run.train():
            return False
        plot_curves(out)
        facts = _facts(stage, recipe, run, len(crops.refs), len(pictures))
        averaged = run.average
        assert isinstance(averaged, ParScaleEAR)
        averaged.save_pretrained(weights, training=facts)
    return True


def _check_claim(recipe: Recipe, out: Path, resume: bool) -> None:
    """Checks that the folder is free, or holds a run of the same recipe."""
    path = out / "recipe.json"
    if not path.exists():
        return
    asked = json.loads(json.dumps(asdict(recipe)))
    if not resume:
        raise TrainingError(f"{out} already holds a run; add --resume, or name a new folder")
    found = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(k for k in asked if asked[k] != found.get(k))
    if changed:
        raise TrainingError(
            f"{out} holds a run with another {', '.join(changed)}; give the same options to "
            "resume it, or name a new folder"
        )


def _split(recipe: Recipe) -> tuple[list[ImageRef], list[ImageRef]]:
    images = find_images(recipe.images)
    if recipe.validation:
        return images, find_images(recipe.validation)
    every = max(10, -(-len(images) // HELD_OUT))
    training = [ref for index, ref in enumerate(images) if index % every]
    return training or images, images[::every]


def _prepare(stage: str, out: Path, crops: RandomCrops, batch: int, recipe: Recipe) -> ParScaleEAR:
    """The model that a stage starts from."""
    device = torch.device(recipe.device)
    if stage == "vae":
        model = ParScaleEAR(ParScaleEARConfig(hybrid=None))
        return model.to(device).train()
    vae = ParScaleEAR.from_pretrained(out / "vae.safetensors", device=device, dtype=torch.float32)
    mean, std = _normalisation(vae, out, crops, batch)
    config = replace(
        vae.config,
        latent_mean=mean,
        latent_std=std,
        hybrid=HybridConfig(latent_channels=len(mean)) if stage == "hybrid" else None,
    )
    model = ParScaleEAR(config)
    model.encoder.load_state_dict(vae.encoder.state_dict())
    model.decoder.load_state_dict(vae.decoder.state_dict())
    model.encoder.requires_grad_(False)
    return model.to(device).train()


def _normalisation(
    vae: ParScaleEAR, out: Path, crops: RandomCrops, batch: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of every latent channel: measured once a run, then read from its folder."""
    path = out / "latent.json"
    if not path.exists():
        mean, std = latent_statistics(vae, crops, batch)
        checkpoint.write_text(path, json.dumps({"mean": mean, "std": std}, indent=1) + "\n")
    found = json.loads(path.read_text(encoding="utf-8"))
    return tuple(found["mean"]), tuple(found["std"])


@torch.inference_mode()
def latent_statistics(
    model: ParScaleEAR, crops: RandomCrops, batch: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every latent channel over training crops."""
    latents = [
        model.encode(crops.batch(step, batch).to(model.latent_mean.device)).mode().double().cpu()
        for step in range(NORMALISATION_BATCHES)
    ]
    values = torch.cat(latents).transpose(0, 1).flatten(1)  # (Z, positions)
    mean = tuple(round(v, 6) for v in values.mean(dim=1).tolist())
    std = tuple(round(v, 6) for v in values.std(dim=1).clamp_min(1e-3).tolist())
    return mean, std


def _facts(
    stage: str, recipe: Recipe, run: Run, pictures: int, validation_pictures: int
) -> dict[str, Any]:
    last = read_log(run.out)[-1]
    asked = asdict(recipe)
    for name in ("images", "validation"):
        asked[name] = [Path(path).name for path in asked[name]]
    return {
        "stage": stage,
        "recipe": asked,
        "steps": run.progress.step,
        "minutes": round(run.progress.seconds / 60, 1),
        "pictures": pictures,
        "torch": torch.__version__,
        "validation": {
            "pictures": validation_pictures,
            "precision": recipe.precision,
            "psnr_db": last.get("psnr_db"),
            "ssim": last.get("ssim"),
        },
    }


def plot_curves(out: Path) -> None:
    """Draws loss and PSNR of every stage to ``out/curves.png``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    start = 0.0
    for stage in STAGES:
        lines = read_log(out / stage)
        for axis, key in zip(axes, ("loss", "psnr_db"), strict=True):
            points = [(start + line["minutes"], line[key]) for line in lines if key in line]
            if points:
                axis.plot(*zip(*points, strict=True), marker="." if key == "psnr_db" else "")
                axis.lines[-1].set_label(stage)
        if stage == "vae" and lines:
            start = lines[-1]["minutes"]  # the two later stages start from here, side by side
    for axis, label in zip(axes, ("training loss", "validation PSNR, dB"), strict=True):
        axis.set_xlabel("minutes")
        axis.set_ylabel(label)
        if axis.lines:
            axis.legend()
    with checkpoint.atomic_path(out / "curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=100)

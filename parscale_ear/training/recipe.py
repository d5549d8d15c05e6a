"""What an autoencoder's training is asked for, and what each of its stages does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parscale_ear.checks import check_whole
from parscale_ear.training.loop import LoopConfig, Precision, check_seed

STAGES = ("vae", "hybrid", "baseline", "sharp")
SHARES = {"vae": 0.6, "hybrid": 0.2, "baseline": 0.08, "sharp": 0.12}  # of the whole time
START = {"hybrid": "vae", "baseline": "hybrid", "sharp": "hybrid"}  # the stage that it goes on from
FROZEN_ENCODER = ("baseline", "sharp")
TRAINED = {
    "vae": "encoder, hybrid and decoder",
    "hybrid": "encoder, hybrid and decoder",
    "baseline": "decoder",
    "sharp": "decoder from 1/8 on",
}
SHARP_KEEPS = ("hybrid", "decoder.latent4", "decoder.features4")  # what sharp leaves as it is
LAST_UNNAMED = "0.5"  # the last release whose weights do not say of which release they are
LOSSES = {  # weighted terms beside the log MSE
    "vae": ("kl", "ssim"),
    "hybrid": ("kl", "ssim"),
    "baseline": ("ssim",),
    "sharp": ("feature", "adversarial", "pattern", "chroma"),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a training was asked for; written to ``RUN/recipe.json`` and into the weights."""

    images: tuple[str, ...]  # files, folders, tar archives and hf: datasets to train on
    validation: tuple[
        str, ...
    ] = ()  # the same to measure on; none: some of the images are held out
    start: str | None = None  # weights that the first stage starts from; None: fresh ones
    stages: tuple[str, ...] = STAGES  # which to run, of STAGES and in their order
    minutes: float | None = 120.0  # length of all these stages together, or ...
    steps: int | None = None  # ... in steps
    batch: int = 32  # crops a step and process in stage vae
    crop: int = 128  # side of a crop in stage vae, pixels
    final_crop: int = 256  # side of a crop in the other stages; a step holds as many pixels
    learning_rate: float = 1e-3  # peak in stage vae
    final_rate: float = 5e-4  # last in stage vae, peak in the other stages
    kl_weight: float = 1e-4  # of the mean KL an element, in nats
    grey_share: float = 0.0  # of the crops, which are turned to grey
    latent_noise: float = 0.0  # largest σ of noise on the normalised latent, drawn a picture
    refinements: int = 0  # of latents that are decoded beside plain ones in stages vae, hybrid
    ssim_weight: float = 0.05  # of 1 − SSIM in all stages but sharp
    feature_weight: float = 0.3  # of the feature loss in stage sharp
    adversarial_weight: float = 0.01  # of the critic's verdict in stage sharp
    pattern_weight: float = 5000.0  # of the error that all 8×8 cells share, in stage sharp
    chroma_weight: float = 0.0  # of the squared error of colours less their grey, in stage sharp
    seed: int = 0  # of weights, crops and noise
    workers: int = 0  # threads that prepare crops ahead; 0: none
    precision: Precision = "auto"  # autocast dtype; auto: bf16 where the device has kernels for it
    device: str = "cpu"  # torch device

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        if not self.stages or self.stages != tuple(s for s in STAGES if s in self.stages):
            raise ValueError(
                f"stages must be some of {', '.join(STAGES)}, in this order, got "
                f"{' '.join(self.stages) or 'none'}"
            )
        for stage in self.stages[1 if self.stages[0] == "vae" else 0 :]:
            if START[stage] in self.stages:
                continue
            if "vae" in self.stages:
                raise ValueError(f"stages must have {START[stage]}, which {stage} goes on from")
            if self.start is None:
                raise ValueError(f"stage {stage} needs weights to start from; give start")
        for name in ("crop", "final_crop"):
            value = getattr(self, name)
            if value < 16 or value % 16:
                raise ValueError(f"{name} must be a multiple of 16, got {value}")
        for name, least in (("batch", 1), ("steps", 1), ("workers", 0), ("refinements", 0)):
            if (value := getattr(self, name)) is not None:
                check_whole(least, **{name: value})
        for name in ("learning_rate", "final_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in (
            *("kl_weight", "ssim_weight", "feature_weight", "adversarial_weight"),
            *("pattern_weight", "chroma_weight", "latent_noise"),
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.grey_share <= 1:
            raise ValueError(f"grey_share must be in [0, 1], got {self.grey_share}")
        if self.refinements and self.latent_noise:
            raise ValueError("refinements and latent_noise do not go together; leave one out")
        check_seed(self.seed)
        self.loop(self.stages[0])  # checks the length

    def loop(self, stage: str) -> LoopConfig:
        """The loop of one stage."""
        share = SHARES[stage] / sum(SHARES[other] for other in self.stages)
        return LoopConfig(
            minutes=None if self.minutes is None else self.minutes * share,
            steps=None if self.steps is None else max(1, round(self.steps * share)),
            learning_rate=self.learning_rate if stage == "vae" else self.final_rate,
            # Stage vae ends at the rate that the next one starts from.
            final_rate=min(1.0, self.final_rate / self.learning_rate) if stage == "vae" else 0.01,
            precision=self.precision,
        )

    def crops(self, stage: str) -> tuple[int, int]:
        """Side of a crop and crops a step and process in one stage."""
        if stage == "vae":
            return self.crop, self.batch
        return self.final_crop, max(1, self.batch * self.crop**2 // self.final_crop**2)


def named_release(stage: Mapping[str, Any]) -> tuple[str, str]:
    """A stage's name, and the release (0.5) whose weights it was trained for."""
    name, _, earlier = str(stage["stage"]).partition(" (")  # up to 0.5 the name said it
    release = earlier.rstrip(")") or str(stage.get("release", LAST_UNNAMED))
    return name, ".".join(release.split(".")[:2])

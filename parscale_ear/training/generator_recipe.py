"""What a VAR's training is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from parscale_ear.checks import check_whole
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.generator.var import VARConfig
from parscale_ear.generator.vqvae import VQVAEConfig
from parscale_ear.training.loop import LoopConfig, Precision, check_seed

SSIM_WINDOW = 11  # pixels, of the SSIM that a tokenizer's pictures are measured by
TOKENIZER_SHARE = 0.35  # of the time of tokenizer and VAR together


@dataclass(frozen=True, kw_only=True)
class VARRecipe:
    """What a training was asked for; written to ``RUN/recipe.json`` and into the weights."""

    images: tuple[str, ...]  # folders of class folders, tars or hf: datasets
    validation: tuple[str, ...] = ()  # the same to measure on; none: some are held out
    minutes: float | None = 60.0  # of tokenizer and VAR together, or ...
    steps: int | None = None  # ... in steps
    stream_steps: int = 1000  # of each number of streams
    streams: tuple[int, ...] = (1, 2, 4, 8)  # numbers of streams to train on the frozen backbone
    side: int = 64  # of the pictures, pixels
    sides: tuple[int, ...] = (1, 2, 3, 4, 6, 8)  # of the token maps
    vocabulary: int = 512  # vectors in the codebook
    latent_channels: int = 16  # of a vector
    tokenizer_width: int = 32  # channels at full resolution
    depth: int = 6  # blocks of the transformer
    width: int = 192  # channels of the transformer
    heads: int = 3  # its attention heads
    prefix_tokens: int = 48  # of a stream
    batch: int = 64  # pictures a step and process
    learning_rate: float = 1e-3  # peak
    feature_weight: float = 0.3  # of the feature loss in the tokenizer
    label_dropout: float = 0.1  # share of labels left out, for guidance
    seed: int = 0  # of weights, order and noise
    precision: Precision = "auto"  # autocast dtype; auto: bf16 where the device has kernels for it
    device: str = "cpu"  # torch device

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        for name, least in (("batch", 1), ("steps", 1), ("stream_steps", 1), ("side", SSIM_WINDOW)):
            if (value := getattr(self, name)) is not None:
                check_whole(least, **{name: value})
        check_seed(self.seed)
        if not self.sides or min(self.sides) < 1:
            raise ValueError(f"sides must be positive and grow, got {self.sides}")
        for count in self.streams:
            check_whole(1, streams=count)
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must be in [0, 1), got {self.label_dropout}")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.feature_weight < math.inf:
            raise ValueError(
                "learning_rate must be above 0, feature_weight at least 0, both finite"
            )
        ratio = self.side / self.sides[-1]
        if ratio < 2 or ratio != 2 ** round(ratio).bit_length() // 2:
            raise ValueError(
                f"side must be 2, 4, 8, 16 ... times the last token map's side {self.sides[-1]}, "
                f"got {self.side}"
            )
        self.loop("var")  # checks the length
        config = self.var_config(1).transformer  # and this all other sizes
        for count in self.streams:
            ParallelStreams.check(config, count, self.prefix_tokens)

    def stages(self) -> tuple[str, ...]:
        """Names of the stages, in order."""
        return ("tokenizer", "var", *(f"streams{count}" for count in sorted(set(self.streams))))

    def var_config(self, classes: int) -> VARConfig:
        """The model."""
        levels = (self.side // self.sides[-1]).bit_length()
        multipliers = tuple(min(4, 2 ** (k // 2)) if k else 1 for k in range(levels))
        return VARConfig(
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            classes=classes,
            vqvae=VQVAEConfig(
                vocabulary=self.vocabulary,
                latent_channels=self.latent_channels,
                width=self.tokenizer_width,
                multipliers=multipliers,
                blocks=1,
                groups=min(8, self.tokenizer_width),
                sides=self.sides,
            ),
        )

    def loop(self, stage: str) -> LoopConfig:
        """The loop of one stage."""
        minutes: float | None = None
        steps: int | None = self.stream_steps
        if not stage.startswith("streams"):
            share = TOKENIZER_SHARE if stage == "tokenizer" else 1 - TOKENIZER_SHARE
            minutes = None if self.minutes is None else self.minutes * share
            steps = None if self.steps is None else max(1, round(self.steps * share))
        return LoopConfig(
            minutes=minutes,
            steps=steps,
            learning_rate=self.learning_rate,
            precision=self.precision,
            weight_average=0.999 if stage != "tokenizer" else 0.995,
        )

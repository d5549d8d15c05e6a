"""What an EnergyAR's training is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from parscale_ear.checks import check_whole
from parscale_ear.generator.ear_config import EARConfig
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.training.loop import LoopConfig, Optimizer, Precision, check_seed


@dataclass(frozen=True, kw_only=True)
class EARRecipe:
    """What a training was asked for; written to ``RUN/recipe.json`` and into the weights."""

    latents: str  # folder that ``parscale-ear encode`` wrote, with classes
    validation: str | None = None  # the same to measure on; None: some are held out
    class_names: tuple[str, ...] = ()  # of the sorted classes; none: their folders' names
    start: str | None = None  # weights to go on from; None: fresh ones
    minutes: float | None = 120.0  # of the generator's first stage, or ...
    steps: int | None = None  # ... in steps
    picture_minutes: float = 0.0  # of its second one, with scores of whole pictures, or ...
    picture_steps: int = 0  # ... in steps; both 0: no such stage
    stream_steps: int = 1000  # of each number of streams
    streams: tuple[int, ...] = (1, 2, 4)  # numbers of streams to train on the generator
    train_backbone: bool = False  # train the generator with its streams; else it is frozen
    depth: int = 8  # blocks of the trunk
    width: int = 256  # its channels
    heads: int = 4  # its attention heads
    head_width: int = 256  # channels of the energy head
    head_blocks: int = 3  # its residual blocks
    noise_channels: int = 64  # its noise
    phases: int = 4  # passes of the finest level
    prefix_tokens: int = 16  # of a stream
    batch: int = 96  # latents a step and process
    learning_rate: float = 2e-3  # peak in the first stage
    picture_classes: int = 4  # classes a step and process in the second stage
    picture_draws: int = 8  # pictures drawn of each
    picture_known: int = 0  # most first scales that these take from real ones; 0: all is drawn
    picture_pairs: int = (
        8  # real pictures continued twice from their first scales, a step and process
    )
    picture_batch: int = 16  # latents a step and process whose tokens are scored, all scales alike
    picture_rate: float = 3e-4  # peak there
    adversarial_weight: float = 0.5  # of the critic's verdict there; 0: no critic
    critic_rate: float = 2e-4  # the critic's own
    class_weight: float = 0.2  # of a classifier's verdict whether a picture is of its class
    alpha: float = 1.0  # exponent of the energy score
    samples: int = 2  # draws of every token
    train_temperature: float = 1.0  # weight of the draws' distance from each other
    latent_noise: float = 0.0  # deviation of noise on the latents whose tokens are scored
    input_noise: float = 0.0  # largest deviation of noise on what is known
    label_dropout: float = 0.1  # share of labels left out, for guidance
    seed: int = 0  # of weights, order and noise
    precision: Precision = "auto"  # autocast dtype; auto: bf16 where the device has kernels for it
    device: str = "cpu"  # torch device

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        check_whole(1, batch=self.batch, stream_steps=self.stream_steps)
        check_whole(2, samples=self.samples, picture_draws=self.picture_draws)
        check_whole(1, picture_classes=self.picture_classes, picture_batch=self.picture_batch)
        check_seed(self.seed)
        for count in self.streams:
            check_whole(1, streams=count)
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must be in [0, 1), got {self.label_dropout}")
        if not 0 < self.alpha <= 2:
            raise ValueError(f"alpha must be in (0, 2], got {self.alpha}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 < self.train_temperature <= 1:
            raise ValueError(f"train_temperature must be in (0, 1], got {self.train_temperature}")
        if self.picture_minutes < 0 or self.picture_steps < 0:
            raise ValueError("picture_minutes and picture_steps must be at least 0")
        for name in ("picture_rate", "critic_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in (
            *("adversarial_weight", "class_weight", "picture_known", "picture_pairs"),
            *("latent_noise", "input_noise"),
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if self.minutes == 0 and self.start is None:
            raise ValueError("without a first stage (minutes = 0) there must be weights to start")
        if self.picture_minutes and self.picture_steps:
            raise ValueError("give either picture_minutes or picture_steps")
        if self.minutes == 0 and self.steps is not None:
            raise ValueError(
                "minutes = 0 leaves the first stage out, and its steps; give one of them"
            )
        if not self.stages():
            raise ValueError("there is nothing to train; give minutes, picture_minutes or streams")
        for stage in self.stages():
            self.loop(stage)  # checks the lengths
        config = self.config(("any",), channels=1, side=2)  # and this all other sizes
        for count in self.streams:
            ParallelStreams.check(config.transformer, count, self.prefix_tokens)

    def stages(self) -> tuple[str, ...]:
        """Names of the stages, in order."""
        return (
            *(("ear",) if self.minutes != 0 else ()),
            *(("pictures",) if self.picture_minutes or self.picture_steps else ()),
            *(f"streams{count}" for count in sorted(set(self.streams))),
        )

    def config(self, class_names: tuple[str, ...], *, channels: int, side: int) -> EARConfig:
        """The model, for latents of (channels, side, side)."""
        sizes = (
            *("depth", "width", "heads", "head_width", "head_blocks", "noise_channels"),
            "phases",
        )
        return EARConfig(
            class_names=class_names,
            channels=channels,
            side=side,
            **{name: getattr(self, name) for name in sizes},
        )

    def loop(self, stage: str) -> LoopConfig:
        """The loop of one stage."""
        minutes: float | None = None
        steps: int | None = self.stream_steps
        rate, average = self.learning_rate / 2, 0.99
        optimizer: Optimizer = "muon"
        clip_norm = 1.0
        if stage == "ear":
            minutes, steps = self.minutes, self.steps
            rate, average = self.learning_rate, 0.999
        elif stage == "pictures":
            minutes = None if self.picture_steps else self.picture_minutes
            steps = self.picture_steps or None
            rate, average = self.picture_rate, 0.998
            optimizer, clip_norm = "adam", 5.0
        return LoopConfig(
            minutes=minutes,
            steps=steps,
            learning_rate=rate,
            precision=self.precision,
            weight_average=average,
            optimizer=optimizer,
            clip_norm=clip_norm,
        )

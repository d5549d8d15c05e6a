"""One training loop for every model: resumable, averaged, logged.

A :class:`Task` says what is trained, what a step's loss is and how to validate. The loop knows
about time, optimizer, precision, weight averaging, checkpoints and logs. Everything random in a
step is a function of the seed and the step's number, so that a run killed at any moment goes on
from its last checkpoint as if nothing had happened (with several threads some CPUs sum in an order
that changes from run to run, and so do some of CUDA's gradients: equal trainings then differ in their
last bits, resumed or not).
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from tqdm import tqdm

from parscale_ear import checkpoint
from parscale_ear.device import multiplies_bf16
from parscale_ear.training.distributed import OneProcess, World
from parscale_ear.training.optimizer import (
    build_adversarial_optimizer,
    build_optimizer,
    pack_optimizer,
    unpack_optimizer,
)

Precision = Literal["auto", "bf16", "fp16", "fp32"]
Optimizer = Literal["muon", "adam"]  # adam: without momentum, to train against a critic
LEAST_SCALE = 1.0  # of the loss in FP16; below it gradients overflow that were made no larger
CHECKPOINT_FILE = "checkpoint.safetensors"
LOG_FILE = "log.jsonl"


class TrainingError(Exception):
    """A training that cannot start or go on; the message is one line."""


class DivergedError(TrainingError):
    """A training whose loss or gradient is no number any more."""


class Task(Protocol):
    """What the loop trains."""

    @property
    def model(self) -> nn.Module:
        """What is trained and averaged; frozen parameters do not require a gradient."""

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step (a scalar) and further scalars to log; runs under autocast."""

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Figures of the averaged weights; may write pictures."""

    def elementwise(self) -> list[nn.Parameter]:
        """Parameters that are not maps from vectors to vectors: embeddings, heads, prefixes."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-serialisable scalars that a checkpoint must hold besides the model."""

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Takes up what ``state`` gave."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length, optimizer and bookkeeping of one run."""

    minutes: float | None = None  # length in minutes of wall clock without validation, or ...
    steps: int | None = None  # ... in steps; exactly one of the two
    learning_rate: float = 2e-3  # peak
    warmup_steps: int = 100  # linear rise from 0
    final_rate: float = 0.01  # the last rate as a fraction of the peak (cosine between)
    weight_average: float = 0.999  # decay of the exponential moving average, a step
    clip_norm: float = 1.0  # limit of the gradient's norm
    precision: Precision = "auto"  # autocast dtype; see :func:`resolve_precision`
    optimizer: Optimizer = "muon"
    log_steps: int = 50  # steps between lines of the log
    checkpoint_minutes: float = 4.0  # between checkpoints
    validate_minutes: float = 10.0  # between validations

    def __post_init__(self) -> None:
        """Checks the length.

        Raises:
            ValueError: not exactly one of ``minutes`` and ``steps``, one not above 0, or an
                unknown ``precision`` or ``optimizer``.
        """
        for name, known in (("precision", get_args(Precision)), ("optimizer", get_args(Optimizer))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("give either minutes or steps")
        length = self.minutes if self.steps is None else self.steps
        if length is None or not 0 < length < math.inf:
            raise ValueError(f"the length of a training must be above 0, got {length}")


@dataclass
class Progress:
    """Where a run stands; stored in its checkpoint."""

    step: int = 0  # steps done
    seconds: float = 0.0  # wall clock spent, over all sessions, without validation

    def fraction(self, config: LoopConfig) -> float:
        """0 at the start, 1 at the end."""
        if config.steps is not None:
            return min(1.0, self.step / config.steps)
        assert config.minutes is not None
        return min(1.0, self.seconds / (60 * config.minutes))


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """``auto`` → bf16 where the device has kernels for it, else fp32; others stay.

    fp32 means no autocast.
    """
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bf16(device) else "fp32"


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """What autocast computes in on a device; None: no autocast."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return dtypes.get(resolve_precision(precision, device))


def computed_in(precision: Precision, device: torch.device) -> str:
    """The same for a reader: ``bfloat16 autocast``, or ``float32``."""
    dtype = autocast_dtype(precision, device)
    return "float32" if dtype is None else f"{str(dtype).removeprefix('torch.')} autocast"


def autocast_for(precision: Precision, device: torch.device) -> torch.autocast:
    """The context in which a training computes on a device."""
    dtype = autocast_dtype(precision, device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def check_seed(seed: int) -> None:
    """What PyTorch's generators tell apart on every device: on the CPU 32 bits.

    Raises:
        ValueError: ``seed`` is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be at least 0 and below 2^32, got {seed}")


def derived_seed(seed: int, step: int, purpose: int, number: int) -> int:
    """Seed of 32 bits for one of a step's generators.

    Args:
        seed: of the training.
        step: number of the step.
        purpose: what the numbers are for; no two uses of one task have the same.
        number: of the picture or of the process.
    """
    return int(np.random.SeedSequence([seed, step, purpose, number]).generate_state(1)[0])


def learning_rate(config: LoopConfig, progress: Progress) -> float:
    """Linear warm-up, then a cosine from the peak to ``final_rate`` of it."""
    warmup = min(1.0, (progress.step + 1) / config.warmup_steps)
    cosine = 0.5 + 0.5 * math.cos(math.pi * progress.fraction(config))
    return config.learning_rate * warmup * (config.final_rate + (1 - config.final_rate) * cosine)


class Run:
    """One training run and its folder."""

    def __init__(
        self,
        task: Task,
        config: LoopConfig,
        out: Path,
        *,
        resume: bool = False,
        world: World | None = None,
    ) -> None:
        """Prepares a run, or takes up an earlier one.

        Args:
            task: what to train.
            config: how.
            out: the run's folder, the same for all processes; gets checkpoint and log.
            resume: go on from the checkpoint in ``out`` if there is one.
            world: the processes that train together; None: this one alone. The first writes.

        Raises:
            TrainingError: ``out`` holds a run and ``resume`` is false, or its checkpoint is
                another model's.
            CheckpointError: the checkpoint is damaged.
        """
        self.task, self.config, self.out = task, config, out
        self.progress = Progress()
        self.device = next(task.model.parameters()).device
        self.world: World = world or OneProcess(self.device)
        self.world.share_(task.model.state_dict().values())
        self.average = copy.deepcopy(task.model).eval()
        trained = [p for p in task.model.parameters() if p.requires_grad]
        if config.optimizer == "adam":
            self.optimizer = build_adversarial_optimizer(trained, config.learning_rate)
        else:
            tables = {id(p): p for p in task.elementwise() if p.requires_grad}
            self.optimizer = build_optimizer(
                [p for p in trained if id(p) not in tables], config.learning_rate, tables.values()
            )
        self.scaler = GradScaler(self.device.type, enabled=config.precision == "fp16")
        self._clock = time.monotonic()
        path = out / CHECKPOINT_FILE
        if path.exists() and not resume:
            raise TrainingError(f"{out} already holds a run; add --resume, or name a new folder")
        if path.exists():
            self._restore(path)
        self.world.wait()  # before the first process writes
        if self.first:
            out.mkdir(parents=True, exist_ok=True)
            for part in out.glob(f".{CHECKPOINT_FILE}.*.part"):  # of a save that a kill cut off
                part.unlink()
            _truncate_log(out / LOG_FILE, self.progress.step)

    @property
    def first(self) -> bool:
        """Whether this process writes, shows and validates."""
        return self.world.rank == 0

    # --- training ---

    def train(self) -> bool:
        """Trains to the end.

        Returns:
            True when the end was reached, False when SIGINT or SIGTERM stopped it (a checkpoint
            is written either way).
        """
        config, progress = self.config, self.progress
        self._clock = time.monotonic() - progress.seconds
        saved = validated = progress.seconds
        figures: dict[str, Tensor | float] | None = None
        length = config.steps or int(60 * (config.minutes or 0)) or 1
        with _stop_signal() as signalled, self._bar(length) as bar:
            stop = signalled.is_set()
            while progress.fraction(config) < 1 and not stop:
                figures = self._step()
                progress.step += 1
                stop, progress.seconds = self.world.agree(
                    signalled.is_set(), time.monotonic() - self._clock
                )
                done = progress.step if config.steps else int(progress.seconds)
                bar.n = min(length, done)
                bar.set_postfix(step=progress.step, refresh=False)
                bar.update(0)
                if progress.step % config.log_steps == 0:
                    self._log_step(figures)
                if progress.seconds - validated >= 60 * config.validate_minutes:
                    validated = progress.seconds
                    self._check(figures)
                    if self.first:
                        began = time.monotonic()
                        self._log(self.task.validate(self.average, progress.step))
                        self._clock += time.monotonic() - began  # it is no training
                if progress.seconds - saved >= 60 * config.checkpoint_minutes:
                    saved = progress.seconds
                    self._check(figures)
                    self.save()
            if figures is not None:
                self._check(figures)
            self.save()
        finished = progress.fraction(config) >= 1
        if finished and self.first:
            self._log({"finished": True, **self.task.validate(self.average, progress.step)})
        self.world.wait()
        return finished

    def _step(self) -> dict[str, Tensor | float]:
        rate = learning_rate(self.config, self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with autocast_for(self.config.precision, self.device):
            loss, figures = self.task.loss(self.progress.step)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self.scaler.scale(loss))
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.world.size > 1:
            self.world.mean_(p.grad for p in trained if p.grad is not None)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(trained, self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        step = self.progress.step
        decay = min(self.config.weight_average, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.task.model.parameters()), 1 - decay
            )
            for ours, theirs in zip(self.average.buffers(), self.task.model.buffers(), strict=True):
                ours.copy_(theirs)
        return {"loss": loss.detach(), "gradient_norm": norm, "learning_rate": rate, **figures}

    def _bar(self, length: int) -> tqdm[NoReturn]:
        initial = self.progress.step if self.config.steps else int(self.progress.seconds)
        unit = "step" if self.config.steps else "s"
        return tqdm(
            total=length,
            initial=min(initial, length),
            unit=unit,
            desc=self.out.name,
            mininterval=2,
            disable=not self.first,
        )

    def _log_step(self, figures: dict[str, Tensor | float]) -> None:
        """Logs a step: means over all processes."""
        self._check(figures)
        values = {k: torch.as_tensor(v, dtype=torch.float64).cpu() for k, v in figures.items()}
        stacked = torch.stack(list(values.values()))
        self.world.mean_([stacked])
        means = dict(zip(values, stacked.tolist(), strict=True))
        if self.first:
            self._log(means)

    def _log(self, figures: dict[str, Any]) -> None:
        line = {
            "step": self.progress.step,
            "minutes": round(self.progress.seconds / 60, 3),
            **figures,
        }
        for name, value in line.items():  # JSON has no infinity
            line[name] = value if math.isfinite(value) else None
        with open(self.out / LOG_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _check(self, figures: Mapping[str, Tensor | float]) -> None:
        """Stops all processes before weights that are spoilt are saved."""
        names = ["loss"] if self.scaler.is_enabled() else ["loss", "gradient_norm"]
        values = torch.tensor([float(figures[name]) for name in names])
        self.world.mean_([values])
        for name, value in zip(names, values.tolist(), strict=True):
            if not math.isfinite(value):
                raise DivergedError(
                    f"the {name.replace('_', ' ')} became {value} at step {self.progress.step}; "
                    "start again in a new folder with a lower --learning-rate"
                )
        if self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE:
            raise DivergedError(
                f"the gradient was not finite in FP16, however the loss was scaled, up to step "
                f"{self.progress.step}; start again in a new folder with --precision bf16 or fp32"
            )

    # --- checkpoints ---

    def save(self) -> None:
        """Writes the whole state, atomically (the first process does)."""
        if not self.first:
            return
        tensors = {f"model.{k}": v for k, v in self.task.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        optimizer_tensors, optimizer_scalars = pack_optimizer(self.optimizer)
        task_tensors, task_scalars = self.task.state()
        checkpoint.save(
            self.out / CHECKPOINT_FILE,
            {
                **tensors,
                **optimizer_tensors,
                **{f"task.{k}": v for k, v in task_tensors.items()},
            },
            kind="TrainingRun",
            config=asdict(self.config),
            progress=asdict(self.progress),
            optimizer_scalars=optimizer_scalars,
            task_scalars=task_scalars,
            scaler=self.scaler.state_dict(),
        )

    def _restore(self, path: Path) -> None:
        tensors, header = checkpoint.load(path, kind="TrainingRun")
        try:
            for prefix, model in (("model.", self.task.model), ("average.", self.average)):
                model.load_state_dict(_under(prefix, tensors))
        except RuntimeError as error:
            raise TrainingError(
                f"{path}: holds the run of another model; name a new folder"
            ) from error
        unpack_optimizer(self.optimizer, tensors, header["optimizer_scalars"])
        self.task.load_state(_under("task.", tensors), header["task_scalars"])
        self.scaler.load_state_dict(header["scaler"])
        self.progress = Progress(**header["progress"])


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def read_log(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that was cut off is left out."""
    path = Path(folder) / LOG_FILE
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _truncate_log(path: Path, step: int) -> None:
    """Drops what was logged after the checkpoint that a run goes on from."""
    lines = [line for line in read_log(path.parent) if line["step"] <= step]
    checkpoint.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that a step is never cut in half."""
    event = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parscale_ear.training.distributed import OneProcess, find_world
from parscale_ear.training.loop import (
    CHECKPOINT_FILE,
    DivergedError,
    LoopConfig,
    Precision,
    Progress,
    Run,
    TrainingError,
    derived_seed,
    learning_rate,
    read_log,
)

pytest.importorskip("timm", reason="training needs the extra 'train'")


class Toy:
    """A small regression, every step's data a function of its number."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6))
        self.stop_at: int | None = None

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        loss = (self.model(x) - x.flip(1)).square().mean()
        return loss, {"double": 2 * loss.detach()}

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(-1))
        with torch.no_grad():
            return {"error": float((model(x) - x.flip(1)).square().mean())}

    def elementwise(self) -> list[nn.Parameter]:
        return []

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        assert not tensors
        assert not scalars


class SlowToValidate(Toy):
    """Every step takes a second of a clock of its own, a validation an hour."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.now += 1
        return super().loss(step)

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        self.now += 3600
        return super().validate(model, step)


def test_validation_takes_nothing_off_the_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = SlowToValidate()
    monkeypatch.setattr("parscale_ear.training.loop.time.monotonic", lambda: task.now)
    length = LoopConfig(minutes=2, precision="fp32", validate_minutes=0.5)
    run = Run(task, length, tmp_path / "run")
    assert run.train()
    assert run.progress.step == 120
    assert sum("error" in line for line in read_log(tmp_path / "run")) == 5  # the end's, too


class Watched(Toy):
    """Notes what a matrix product gives under the loop's autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.dtypes.add((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return super().loss(step)


@pytest.mark.parametrize(
    ("kernels", "precision", "computed"),
    [
        (True, "auto", torch.bfloat16),
        (False, "auto", torch.float32),
        (False, "bf16", torch.bfloat16),
        (True, "fp16", torch.float16),
        (True, "fp32", torch.float32),
    ],
)
def test_bf16_by_itself_only_where_there_are_kernels_for_it(
    kernels: bool, precision: Precision, computed: torch.dtype, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("parscale_ear.training.loop.multiplies_bf16", lambda device: kernels)
    task = Watched()
    assert Run(task, LoopConfig(steps=2, precision=precision), tmp_path / "run").train()
    assert task.dtypes == {computed}


def test_gradients_are_scaled_in_fp16_on_the_cpu_too(tmp_path: Path) -> None:
    class Faint(Toy):
        def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            loss, figures = super().loss(step)
            return loss * 1e-8, figures  # of which FP16 has nothing left

    loop = LoopConfig(steps=3, precision="fp16", log_steps=1)
    assert Run(Faint(), loop, tmp_path / "run").train()
    norms = [line["gradient_norm"] for line in read_log(tmp_path / "run") if "loss" in line]
    assert len(norms) == 3
    assert min(norms) > 1e-9


def config(steps: int = 40) -> LoopConfig:
    return LoopConfig(
        steps=steps, precision="fp32", log_steps=5, warmup_steps=5, learning_rate=0.03
    )


def weights(run: Run) -> list[Tensor]:
    return [*run.task.model.state_dict().values(), *run.average.state_dict().values()]


def test_learns_and_logs(tmp_path: Path) -> None:
    run = Run(Toy(), config(300), tmp_path / "run")
    assert run.train()
    log = read_log(tmp_path / "run")
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 60
    assert losses[-1] < 0.2 * losses[0]
    assert log[-1]["finished"]
    assert log[-1]["error"] < 0.2 * losses[0]


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = Run(Toy(), config(), tmp_path / "whole")
    assert whole.train()
    toy = Toy()
    toy.stop_at = 17
    assert not Run(toy, config(), tmp_path / "parts").train()
    second = Run(Toy(), config(), tmp_path / "parts", resume=True)
    assert second.progress.step == 18
    assert second.train()
    for a, b in zip(weights(whole), weights(second), strict=True):
        assert torch.equal(a, b)
    strip = [
        [{k: v for k, v in line.items() if k != "minutes"} for line in read_log(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert strip[0] == strip[1]


def test_the_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    Run(Toy(), config(3), tmp_path / "run").train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    Run(Toy(), config(3), tmp_path / "run").train()
    with pytest.raises(TrainingError, match="--resume"):
        Run(Toy(), config(3), tmp_path / "run")


def test_another_models_run_is_refused(tmp_path: Path) -> None:
    Run(Toy(), config(3), tmp_path / "run").train()
    other = Toy()
    other.model = nn.Linear(6, 6)
    with pytest.raises(TrainingError, match="another model"):
        Run(other, config(3), tmp_path / "run", resume=True)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    class Broken(Toy):
        def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            loss, figures = super().loss(step)
            return loss * float("nan"), figures

    for steps in (40, 3):  # seen at a line of the log, and at the end
        with pytest.raises(DivergedError, match="became nan"):
            Run(Broken(), config(steps), tmp_path / str(steps)).train()
        assert not (tmp_path / str(steps) / CHECKPOINT_FILE).exists()


def test_weights_that_are_no_numbers_are_not_validated(tmp_path: Path) -> None:
    class Broken(Toy):
        validated = 0

        def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            loss, figures = super().loss(step)
            return loss * float("nan"), figures

        def validate(self, model: nn.Module, step: int) -> dict[str, float]:
            self.validated += 1
            return super().validate(model, step)

    task = Broken()
    loop = LoopConfig(steps=9, validate_minutes=1e-9, log_steps=50)
    with pytest.raises(DivergedError, match="became nan"):
        Run(task, loop, tmp_path / "run").train()
    assert task.validated == 0


def test_fp16_whose_steps_are_all_left_out_stops_the_run(tmp_path: Path) -> None:
    """A loss that is finite and a gradient that is not: the scaler would skip every step."""

    class Cliff(Toy):
        def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            loss, figures = super().loss(step)
            return loss + (0 * loss).sqrt(), figures  # √ has no finite derivative at 0

    loop = LoopConfig(steps=60, precision="fp16", log_steps=5)
    with pytest.raises(DivergedError, match="--precision bf16 or fp32"):
        Run(Cliff(), loop, tmp_path / "run").train()
    assert not (tmp_path / "run" / CHECKPOINT_FILE).exists()


class Second(OneProcess):
    """The second of two processes; what the first has is all ones."""

    rank, size = 1, 2

    def share_(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            tensor.fill_(1)


def test_all_processes_begin_with_the_weights_of_the_first(tmp_path: Path) -> None:
    run = Run(Toy(), config(), tmp_path / "run", world=Second(torch.device("cpu")))
    assert all(bool((value == 1).all()) for value in weights(run))


SHARED = """
import torch
from parscale_ear.training.distributed import find_world, leave_world

world = find_world(torch.device("cpu"))
mine = [torch.full((2, 3, 4, 5), world.rank + 1.0).to(memory_format=torch.channels_last),
        torch.full((), world.rank + 7), torch.arange(6.0).view(2, 3).T * (world.rank + 1)]
world.share_(mine)
assert bool((mine[0] == 1).all()) and int(mine[1]) == 7, mine
assert torch.equal(mine[2], torch.arange(6.0).view(2, 3).T)
assert mine[0].is_contiguous(memory_format=torch.channels_last)
leave_world()
"""


def test_tensors_of_the_first_process_reach_the_others(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="several processes need the extra 'train'")
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [sys.executable, "-m", *launch],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_derived_seeds_are_all_different() -> None:
    seeds = [
        derived_seed(seed, step, purpose, number)
        for seed in (0, 1, 2**32 - 1) for step in (0, 1, 16384, 65535)
        for purpose in range(4) for number in range(40)
    ]  # fmt: skip
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert derived_seed(3, 5, 1, 2) == derived_seed(3, 5, 1, 2)


def test_learning_rate() -> None:
    loop = LoopConfig(steps=1000, learning_rate=1.0, warmup_steps=10, final_rate=0.1)
    rates = [learning_rate(loop, Progress(step=step)) for step in (0, 9, 500, 1000)]
    assert rates == pytest.approx([0.1, 1.0, 0.55, 0.1], rel=1e-3)
    minutes = LoopConfig(minutes=1, learning_rate=1.0, final_rate=0.0)
    assert learning_rate(minutes, Progress(step=500, seconds=30)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "length",
    [{}, {"minutes": 1, "steps": 1}, {"steps": 0}, {"minutes": -1}, {"minutes": float("nan")}],
)
def test_length(length: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"minutes|length"):
        LoopConfig(**length)  # type: ignore[arg-type]


# --- the autoencoder's recipe ---


def test_processes_wait_for_the_first_one_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may validate or compare for longer than PyTorch's 10 or 30 minutes."""
    accelerate = pytest.importorskip("accelerate", reason="several processes need it")
    seen: dict[str, Any] = {}

    def accelerator(**options: Any) -> SimpleNamespace:
        seen.update(options)
        return SimpleNamespace(process_index=1, num_processes=2, device=torch.device("cpu"))

    monkeypatch.setattr(accelerate, "Accelerator", accelerator)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_world(torch.device("cpu")).size == 2
    (handler,) = seen["kwargs_handlers"]
    assert handler.timeout >= timedelta(hours=2)

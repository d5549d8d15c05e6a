from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.profiling import memory, roofline
from parscale_ear.profiling.latency import (
    Timings,
    benchmark_model_precise,
    time_alternately,
    time_runs,
)
from parscale_ear.profiling.memory import peak_memory_mib
from parscale_ear.profiling.roofline import Roof, least_bytes, measure_roof


def test_counts_every_run_and_the_warm_up() -> None:
    calls = []
    timings = time_runs(lambda: calls.append(1), device="cpu", runs=7, warmup=2)
    assert len(calls) == 9
    assert timings.milliseconds.shape == (7,)


def test_alternates() -> None:
    calls: list[str] = []
    functions = [lambda: calls.append("a"), lambda: calls.append("b")]
    time_alternately(functions, device="cpu", runs=3, warmup=1)
    assert "".join(calls) == "ab" + "ab" * 3


def test_a_sleep_is_seen() -> None:
    timings = time_runs(lambda: time.sleep(0.02), device="cpu", runs=3, warmup=0)
    assert timings.milliseconds.min() >= 20


def test_summary_is_per_image() -> None:
    summary = Timings(np.arange(1.0, 102.0)).summary(per=2)
    assert summary == pytest.approx(
        {"mean_ms": 25.5, "p50_ms": 25.5, "p95_ms": 48.0, "p99_ms": 50.0}
    )


def test_runs_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        time_runs(lambda: None, device="cpu", runs=0)


def test_what_would_not_be_waited_for_is_not_timed() -> None:
    with pytest.raises(ValueError, match="only cpu and cuda can be timed"):
        time_runs(lambda: None, device="mps", runs=1)


@pytest.mark.parametrize("counts", [{"batch_size": 0}, {"warmup": 0}, {"num_runs": 0}])
def test_benchmark_refuses_counts_below_1(tiny: ParScaleEAR, counts: dict[str, int]) -> None:
    name = "runs" if "num_runs" in counts else next(iter(counts))
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        benchmark_model_precise(tiny, "cpu", **{"height": 32, "width": 32, **counts})


def test_benchmark_of_a_model(tiny: ParScaleEAR) -> None:
    result = benchmark_model_precise(tiny, "cpu", 2, 5, warmup=1, height=64, width=64)
    assert (result["batch_size"], result["num_runs"], result["dtype"]) == (2, 5, "float32")
    assert 0 < result["p50_ms_per_image"] <= result["p95_ms_per_image"]
    assert result["p95_ms_per_image"] <= result["p99_ms_per_image"]
    assert result["images_per_s"] == pytest.approx(1000 / result["mean_ms_per_image"])
    assert result["peak_memory_mib"] is None


def test_benchmark_runs_as_often_and_with_what_it_says() -> None:
    class Eye(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.seen: list[torch.Size] = []

        def forward(self, images: Tensor) -> None:
            self.seen.append(images.shape)

    model = Eye()
    benchmark_model_precise(model, "cpu", 2, 5, warmup=3, height=32, width=48)
    assert model.seen == [(2, 3, 32, 48)] * (3 + 5)


def test_benchmark_is_in_milliseconds_an_image(
    tiny: ParScaleEAR, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        # A clock on which every run takes 8 ms.
        patch.setattr(time, "perf_counter_ns", itertools.count(step=8_000_000).__next__)
        result = benchmark_model_precise(tiny, "cpu", 2, 3, warmup=1, height=32, width=32)
    assert {result[f"{name}_ms_per_image"] for name in ("mean", "p50", "p95", "p99")} == {4}
    assert result["images_per_s"] == 250


def test_benchmark_refuses_another_device(tiny: ParScaleEAR) -> None:
    with pytest.raises(ValueError, match=r'model\.to\("cuda"\)'):
        benchmark_model_precise(tiny, "cuda")


def test_least_bytes(tiny: ParScaleEAR) -> None:
    one, two = (least_bytes(tiny, batch, 64, 64) for batch in (1, 2))
    weights = 4 * sum(p.numel() for p in tiny.parameters())
    assert one > weights
    assert two - one == one - weights
    doubled = ParScaleEAR(tiny.config).double()
    assert least_bytes(doubled, 1, 64, 64) == 2 * one
    reduction = nn.Conv2d(3, 5, kernel_size=2, stride=2, bias=False)
    assert least_bytes(reduction, 7, 8, 6) == 4 * (7 * (3 * 8 * 6 + 5 * 4 * 3) + 3 * 5 * 2 * 2)


def test_roof() -> None:
    roof = measure_roof("cpu", torch.float32, runs=1)
    assert roof.flops_per_s == max(roof.gemm_flops_per_s, roof.convolution_flops_per_s)
    assert min(roof.gemm_flops_per_s, roof.convolution_flops_per_s) > 1e8
    assert roof.bytes_per_s > 1e8


def test_a_roof_is_the_work_over_the_fastest_run(monkeypatch: pytest.MonkeyPatch) -> None:
    work: list[int] = []
    moved: list[int] = []

    def run(function: Callable[[], Tensor], *, device: torch.device, runs: int) -> Timings:
        with FlopCounterMode(display=False) as counter:
            moved.append(2 * function().nbytes)  # as much is read as is written, in a copy
        work.append(counter.get_total_flops())
        return Timings(np.linspace(4.0, 1.0, runs))

    monkeypatch.setattr(roofline, "time_runs", run)
    roof = measure_roof("cpu", torch.float32, runs=4)
    assert roof.gemm_flops_per_s == pytest.approx(1000 * work[0])
    assert roof.convolution_flops_per_s == pytest.approx(1000 * work[1])
    assert roof.bytes_per_s == pytest.approx(1000 * moved[2])


def test_the_better_of_two_roofs_counts() -> None:
    first = Roof(9.0, 1.0, 9.0, 4.0, "float32")
    second = Roof(5.0, 2.0, 3.0, 5.0, "float32")
    best = Roof(9.0, 2.0, 9.0, 5.0, "float32")
    assert first.or_better(second) == second.or_better(first) == best
    with pytest.raises(ValueError, match="float32 and float16"):
        first.or_better(Roof(5.0, 2.0, 3.0, 5.0, "float16"))


def test_no_peak_memory_on_the_cpu() -> None:
    with peak_memory_mib("cpu") as peak:
        pass
    assert peak == [None]


def test_where_the_system_does_not_tell_resident_memory_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "nothing" / "clear_refs")
    with memory.peak_resident_memory() as found:
        torch.ones(2**20)
    assert (found.before, found.peak) == (None, None)


RESIDENT = """
import torch
from parscale_ear.profiling.memory import peak_resident_memory

with peak_resident_memory() as first:
    torch.ones(50 * 2**20)
with peak_resident_memory() as second:
    pass
print(first.before, first.peak, second.before, second.peak)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_resident_memory_sees_what_is_allocated_and_freed() -> None:
    # In a process of its own: what other tests leave behind may be freed inside the block.
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True
    )
    before, peak, _, peak_afterwards = map(int, done.stdout.split())
    size = 200 * 2**20
    assert peak - before == pytest.approx(size, rel=0.1)
    assert peak_afterwards < peak - size // 2

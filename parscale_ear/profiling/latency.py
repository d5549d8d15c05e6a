"""Latency, measured so that it can be believed.

CUDA: events around every run and one synchronisation at the end. CPU: wall clock around every
run, after the practice of ``torch.utils.benchmark``: warm-up apart, all runs kept, the thread
count reported (PyTorch's own, which the caller may set). Percentiles are over single runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from parscale_ear.checks import check_whole
from parscale_ear.profiling.memory import peak_memory_mib


@dataclass(frozen=True)
class Timings:
    """Durations of single runs."""

    milliseconds: NDArray[np.float64]  # (runs,), in the order they were made

    def summary(self, per: int = 1) -> dict[str, float]:
        """Mean and percentiles in milliseconds, divided by ``per`` (images a run)."""
        values = self.milliseconds / per
        p50, p95, p99 = np.percentile(values, [50, 95, 99])
        return {
            "mean_ms": float(values.mean()),
            "p50_ms": float(p50),
            "p95_ms": float(p95),
            "p99_ms": float(p99),
        }


def time_runs(
    function: Callable[[], Any],
    *,
    device: torch.device | str,
    runs: int,
    warmup: int = 3,
    progress: Callable[[], object] | None = None,
) -> Timings:
    """Times ``runs`` calls of ``function``.

    Args:
        function: what to time; on CUDA it must use the current stream.
        device: where it computes.
        runs: timed calls.
        warmup: calls before them that are not counted.
        progress: called after each timed run on the CPU, and once a run is queued on CUDA.

    Raises:
        ValueError: ``runs`` is below 1, or the device is neither a CPU nor CUDA.
    """
    return time_alternately([function], device=device, runs=runs, warmup=warmup, progress=progress)[
        0
    ]


def time_alternately(
    functions: Sequence[Callable[[], Any]],
    *,
    device: torch.device | str,
    runs: int,
    warmup: int = 3,
    progress: Callable[[], object] | None = None,
) -> list[Timings]:
    """Times several functions in turn (a b a b ...), so that drift of the machine hits all alike.

    Arguments and errors as for :func:`time_runs`; returns one :class:`Timings` a function.
    """
    check_whole(1, runs=runs)
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"only cpu and cuda can be timed, as others are not waited for; got {device}"
        )
    with torch.inference_mode():
        for function in functions:
            for _ in range(warmup):
                function()
        if device.type == "cuda":
            return _time_cuda(functions, device, runs, progress)
        durations: list[list[float]] = [[] for _ in functions]
        for _ in range(runs):
            for function, times in zip(functions, durations, strict=True):
                start = time.perf_counter_ns()
                function()
                times.append((time.perf_counter_ns() - start) / 1e6)
            if progress is not None:
                progress()
    return [Timings(np.asarray(times)) for times in durations]


def _time_cuda(
    functions: Sequence[Callable[[], Any]],
    device: torch.device,
    runs: int,
    progress: Callable[[], object] | None,
) -> list[Timings]:
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        events = []
        for _ in range(runs):
            row = []
            for function in functions:
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                start.record()
                function()
                end.record()
                row.append((start, end))
            events.append(row)
            if progress is not None:
                progress()
        torch.cuda.synchronize()
    return [
        Timings(np.asarray([row[k][0].elapsed_time(row[k][1]) for row in events]))
        for k in range(len(functions))
    ]


def benchmark_model_precise(
    model: nn.Module,
    device: torch.device | str = "cuda",
    batch_size: int = 16,
    num_runs: int = 100,
    *,
    warmup: int = 10,
    height: int = 256,
    width: int = 256,
    progress: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Latency of ``model(images)`` for one batch size, per image.

    Args:
        model: takes (B, 3, H, W) in its parameters' dtype; is not moved.
        device: must be the model's; named so that nothing is measured where it was not meant.
        batch_size: images a run.
        num_runs: timed runs.
        warmup: runs before them that are not counted, at least 1.
        height: of an image, pixels.
        width: of an image, pixels.
        progress: called after each timed run.

    Returns:
        ``mean_ms_per_image``, ``p50_``, ``p95_`` and ``p99_ms_per_image``, ``images_per_s``,
        ``peak_memory_mib`` (CUDA allocator's peak, weights and images included; None on the CPU),
        ``warmup_s``, ``batch_size``, ``num_runs``, ``device``, ``dtype`` and ``threads``.

    Raises:
        ValueError: the model is on another device or on one that cannot be timed, or a count is
            below 1.
    """
    weight = next(model.parameters())
    wanted = torch.device(device)
    if weight.device.type != wanted.type or wanted.index not in (None, weight.device.index):
        raise ValueError(
            f"the model is on {weight.device} but device is {wanted}; move it first: "
            f'model.to("{wanted}")'
        )
    check_whole(1, batch_size=batch_size, warmup=warmup)
    images = _noise(batch_size, height, width, weight)
    start = time.perf_counter()
    time_runs(lambda: model(images), device=weight.device, runs=1, warmup=warmup - 1)
    warmup_seconds = time.perf_counter() - start
    with peak_memory_mib(weight.device) as peak:
        timings = time_runs(
            lambda: model(images), device=weight.device, runs=num_runs, warmup=0, progress=progress
        )
    per_image = {f"{k}_per_image": v for k, v in timings.summary(batch_size).items()}
    return {
        **per_image,
        "images_per_s": 1000 / per_image["mean_ms_per_image"],
        "peak_memory_mib": peak[0],
        "warmup_s": warmup_seconds,
        "batch_size": batch_size,
        "num_runs": num_runs,
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _noise(batch: int, height: int, width: int, like: Tensor) -> Tensor:
    """Images to time with; their content does not matter. Channels-last, as the shipped model."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, height, width, generator=generator).mul_(2).sub_(1)
    return images.to(like.device, like.dtype, memory_format=torch.channels_last)

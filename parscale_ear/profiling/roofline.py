"""The hardware's roof, measured in the same run as what stands under it.

Source: Williams, Waterman, Patterson, "Roofline" (2009). The compute roof is the best of a large
matrix product and a large 3×3 convolution; the memory roof a large copy (read and write counted).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parscale_ear.profiling.latency import time_runs


@dataclass(frozen=True)
class Roof:
    """What the hardware reached."""

    flops_per_s: float  # best of GEMM and convolution
    bytes_per_s: float  # of a copy, read and write
    gemm_flops_per_s: float
    convolution_flops_per_s: float
    dtype: str

    def as_dict(self) -> dict[str, float | str]:
        """For a JSON report."""
        return asdict(self)

    def or_better(self, other: Roof) -> Roof:
        """The better of two measurements of the same hardware and dtype, figure by figure.

        Whatever else runs can only lower a roof, so the better one is nearer to the truth.

        Raises:
            ValueError: they are of different dtypes.
        """
        if other.dtype != self.dtype:
            raise ValueError(f"roofs of different dtypes, {self.dtype} and {other.dtype}")
        ours, theirs = asdict(self), asdict(other)
        best = {name: max(ours[name], theirs[name]) for name in ours if name != "dtype"}
        return Roof(**best, dtype=self.dtype)


def measure_roof(device: torch.device | str, dtype: torch.dtype, runs: int = 10) -> Roof:
    """Measures the roof of a device in one dtype.

    Args:
        device: where.
        dtype: of the operands.
        runs: of each of the three; the fastest counts.
    """
    device = torch.device(device)
    big = device.type == "cuda"
    side = 8192 if big else 1536
    a = torch.ones(side, side, device=device, dtype=dtype)
    gemm = 2 * side**3 / _fastest(lambda: a @ a, device, runs)
    batch, channels, size = (64, 256, 64) if big else (4, 128, 64)
    x = torch.ones(batch, channels, size, size, device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    w = torch.ones(channels, channels, 3, 3, device=device, dtype=dtype)
    w = w.to(memory_format=torch.channels_last)
    operations = 2 * 9 * channels**2 * batch * size**2
    convolution = operations / _fastest(lambda: F.conv2d(x, w, padding=1), device, runs)
    source = torch.ones((2**30 if big else 2**28) // 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    copy = moved / _fastest(lambda: target.copy_(source), device, runs)
    return Roof(max(gemm, convolution), copy, gemm, convolution, str(dtype).removeprefix("torch."))


def _fastest(function: Callable[[], Tensor], device: torch.device, runs: int) -> float:
    """Seconds of the fastest run."""
    return float(time_runs(function, device=device, runs=runs).milliseconds.min()) / 1000


def least_bytes(model: nn.Module, batch: int, height: int = 256, width: int = 256) -> int:
    """Bytes that one run must move if every weight and every layer's output is touched once.

    Counts each parameter once a run, and for every convolution its input and its output once an
    image: what a perfect fusion of activations and additions would leave.

    Args:
        model: takes (B, 3, H, W).
        batch: images a run.
        height: of an image, pixels.
        width: of an image, pixels.
    """
    weight = next(model.parameters())
    moved = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        moved += (inputs[0].numel() + output.numel()) * output.element_size()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, height, width, device=weight.device, dtype=weight.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return moved * batch + sum(p.numel() * p.element_size() for p in model.parameters())

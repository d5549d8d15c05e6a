"""Peak memory of a stretch of work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def peak_memory_mib(device: torch.device | str) -> Iterator[list[float | None]]:
    """Measures the CUDA allocator's peak inside the block.

    Yields:
        A list that holds the peak in MiB (everything allocated, weights included) once the block
        is left; None on the CPU, where no allocator counts.
    """
    device = torch.device(device)
    result: list[float | None] = [None]
    if device.type != "cuda":
        yield result
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield result
    torch.cuda.synchronize(device)
    result[0] = torch.cuda.max_memory_allocated(device) / 2**20

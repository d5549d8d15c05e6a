"""Where, with what and when a figure was measured; every figure on record says so."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

from parscale_ear import __version__


def device_name(device: torch.device) -> str:
    """The name a person knows the device by."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} cores)"
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def origin(device: torch.device, dtype: str) -> dict[str, Any]:
    """What a report says of where its figures are from.

    Args:
        device: that computed.
        dtype: in which, as a reader should see it: ``float32``, ``bfloat16 autocast``.

    Returns:
        ``device`` (its name), ``threads`` (of PyTorch in this process), ``dtype``, ``torch`` and
        ``version`` (of this package), ``date`` (now, UTC, ISO 8601 to the second).
    """
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "torch": torch.__version__,
        "version": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }

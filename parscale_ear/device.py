"""Devices and dtypes as a user names them."""

from __future__ import annotations

import torch

DTYPES: dict[str | None, torch.dtype | None] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    None: None,  # the device's default
}


class UsageError(Exception):
    """Wrong use; the message is one line with the remedy."""


def resolve_device(name: str) -> torch.device:
    """``auto`` → CUDA where there is one, else CPU; other names as PyTorch reads them.

    Raises:
        UsageError: the device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has no such GPU; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: only cpu and cuda are supported")
    return device


def default_dtype(device: torch.device) -> str:
    """Name of the dtype that the autoencoder takes by default: FP16 on CUDA, FP32 elsewhere."""
    return "fp16" if device.type == "cuda" else "fp32"

"""Devices and dtypes as a user names them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

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
    number = int(name.partition(":")[2] or 0)  # device.index holds 8 bits of it
    if device.type == "cuda" and number >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has no such GPU; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: only cpu and cuda are supported")
    return device


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Within it FP32 is FP32.

    PyTorch lets cuDNN's convolutions round to TF32 otherwise, and matrix products where it was told to
    (``torch.set_float32_matmul_precision``; on some CPUs those are then in BF16). The settings are the
    whole process's, so threads that enter and leave it in turn disturb each other.
    """
    backends: Any = torch.backends  # its stubs do not know all of these
    before: dict[
        Any, str
    ] = {}  # place of ``fp32_precision``, which PyTorch has from 2.9 on → setting
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        cuda = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
        cpu = (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)
        for above, places in ((backends.cudnn, cuda), (backends.mkldnn, cpu)):
            for place in places:  # what a place inherits reads as if it were its own
                own = place.fp32_precision != above.fp32_precision
                before[place] = place.fp32_precision if own else "none"
    # The older settings, too: where they can be read, CUDA's products look whether both agree. What a
    # program said by place alone cannot be read in the older way.
    products = convolutions = None
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    with suppress(RuntimeError):
        convolutions = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
    for place in before:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
        for place, precision in before.items():
            place.fp32_precision = precision


def out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch's or Python's allocator gave up."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "DefaultCPUAllocator" in str(error)  # on the CPU it is a plain RuntimeError
    )


def check_finite(x: Tensor, name: str) -> None:
    """Looks for NaN and infinity in what a model made (waits for the device).

    Args:
        x: of any shape.
        name: what they are, in the plural.

    Raises:
        ValueError: there are some.
    """
    if not bool(torch.isfinite(x).all()):
        raise ValueError(
            f"the {name} were not finite (NaN or infinity); the weights are damaged, or the dtype "
            "is too narrow for them: try bfloat16 or float32"
        )


@cache
def _cpu_multiplies_bf16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN
        return False


def multiplies_bf16(device: torch.device) -> bool:
    """Whether PyTorch multiplies BF16 on a device by kernels made for it.

    Without them (CPUs with neither AVX-512 nor Arm's BF16; GPUs before Ampere) every number is
    converted one by one or emulated: on two cores of an AMD EPYC that has AVX2 alone, a product of 256×256
    matrices in BF16 takes 61 times as long as in FP32, and the autoencoder three times.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return _cpu_multiplies_bf16()


def check_dtype(dtype: torch.dtype | None) -> None:
    """Looks whether a dtype is one of PyTorch's, rather than the name of one.

    Raises:
        ValueError: it is neither that nor None.
    """
    if not isinstance(dtype, torch.dtype | None):
        raise ValueError(
            f"dtype must be a torch.dtype, such as torch.float16, or None, got {dtype!r}"
        )


def default_dtype(device: torch.device) -> str:
    """Name of the dtype that the autoencoder takes by default: FP16 on CUDA, FP32 elsewhere."""
    return "fp16" if device.type == "cuda" else "fp32"

"""One process or many: what the training loop needs to know of the others.

``accelerate launch`` starts the processes, on one machine or several, and Hugging Face Accelerate
connects them. Every process holds the whole model; gradients are averaged after each step. The
models are so small that one message a step, not overlapped with the backward pass, costs little.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

PATIENCE = timedelta(hours=6)  # of a process for the others


class World(Protocol):
    """The processes that train one model together."""

    rank: int  # of this process
    size: int  # number of processes
    device: torch.device  # of this process

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces tensors by their mean over all processes."""

    def share_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces tensors by those of the first process: other CPUs may draw other weights."""

    def agree(self, stop: bool, seconds: float) -> tuple[bool, float]:
        """Whether any process wants to stop, and the clock of the first."""

    def union(self, names: Iterable[str]) -> set[str]:
        """What any process names."""

    def wait(self) -> None:
        """Goes on when all processes are here."""


class OneProcess:
    """A world of one."""

    rank, size = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Nothing to do."""

    def share_(self, tensors: Iterable[Tensor]) -> None:
        """Nothing to do."""

    def agree(self, stop: bool, seconds: float) -> tuple[bool, float]:
        """What this process says."""
        return stop, seconds

    def union(self, names: Iterable[str]) -> set[str]:
        """What this process names."""
        return set(names)

    def wait(self) -> None:
        """Nothing to do."""


class AcceleratedWorld:
    """Processes that ``accelerate launch`` started."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """One message for all tensors, in FP32."""
        parts = list(tensors)
        flat = torch.cat([part.detach().float().reshape(-1) for part in parts])
        flat = self.accelerator.reduce(flat.to(self.device), reduction="mean")
        offset = 0
        for part in parts:
            values = flat[offset : offset + part.numel()].reshape(part.shape)
            part.data.copy_(values)
            offset += part.numel()

    def share_(self, tensors: Iterable[Tensor]) -> None:
        """One message a tensor."""
        from accelerate.utils import broadcast

        for tensor in tensors:
            values = tensor.detach().to(self.device).contiguous()
            tensor.data.copy_(broadcast(values))

    def agree(self, stop: bool, seconds: float) -> tuple[bool, float]:
        """Sums a flag and the first process's clock over all processes."""
        said = torch.tensor(
            [float(stop), seconds if self.rank == 0 else 0.0],
            dtype=torch.float64,
            device=self.device,
        )
        said = self.accelerator.reduce(said, reduction="sum")
        return bool(said[0] > 0), float(said[1])

    def union(self, names: Iterable[str]) -> set[str]:
        """Gathers the names of all processes."""
        from accelerate.utils import gather_object

        return set(gather_object(sorted(names)))

    def wait(self) -> None:
        """Goes on when all processes are here."""
        self.accelerator.wait_for_everyone()


def find_world(device: torch.device) -> World:
    """The world that this process was started in.

    Args:
        device: where a single process trains; of several, each gets its own of that type.

    Raises:
        ModuleNotFoundError: there are several processes and Accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return OneProcess(device)
    try:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError as error:
        raise ModuleNotFoundError(
            "training in several processes needs: pip install accelerate (the extra 'train')"
        ) from error
    # The others wait while the first one validates or compares, which may take long.
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    return AcceleratedWorld(Accelerator(cpu=device.type == "cpu", kwargs_handlers=[patience]))


def leave_world() -> None:
    """Closes the connections to the other processes, where there are any.

    Else a process may be aborted at its exit, when another one has gone first.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

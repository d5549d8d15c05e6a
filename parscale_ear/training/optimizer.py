"""The optimizer: Muon for convolutions and matrices, NAdamW for biases and other vectors.

Muon (Jordan et al., 2024) orthogonalises the momentum of every matrix; timm's version flattens a
convolution to (out, in · kernel) and hands vectors to NAdamW. ``match_rms_adamw`` scales its steps
so that learning rates known from AdamW carry over (Liu et al., "Muon is Scalable for LLM
Training", 2025).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    rate: float,
    elementwise: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Muon with Nesterov momentum and a NAdamW fallback, no weight decay.

    Args:
        parameters: what is trained.
        rate: learning rate, of the order of AdamW's.
        elementwise: further parameters, which NAdamW trains whatever their shape (embeddings and
            heads are tables of vectors, not maps that an orthogonal step would suit).

    Raises:
        ModuleNotFoundError: timm is not installed; the message says what to install.
    """
    try:
        from timm.optim.muon import Muon
    except ImportError as error:
        raise ModuleNotFoundError(
            "training needs timm >= 1.0.21: pip install 'timm>=1.0.21' (the extra 'train')"
        ) from error
    groups = [{"params": list(parameters)}]
    if tables := list(elementwise):
        groups.append({"params": tables, "use_fallback": True})  # type: ignore[dict-item]
    return Muon(groups, lr=rate, weight_decay=0.0, nesterov=True)


def build_adversarial_optimizer(
    parameters: Iterable[nn.Parameter], rate: float
) -> torch.optim.Optimizer:
    """Adam without momentum, as is usual against a critic, whose verdict changes by the step.

    As in Karras et al., "A Style-Based Generator Architecture for GANs" (CVPR 2019).

    Args:
        parameters: what is trained.
        rate: learning rate.
    """
    return torch.optim.Adam(parameters, lr=rate, betas=(0.0, 0.99))


def pack_optimizer(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and scalars: ``optimizer.INDEX.NAME``."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            key = f"optimizer.{index}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value
            else:
                scalars[key] = value
    return tensors, scalars


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Takes up what :func:`pack_optimizer` gave; other names are passed over."""
    entries: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **scalars}.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            entries.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})

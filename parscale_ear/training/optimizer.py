"""The optimizer: Muon for convolutions and matrices, NAdamW for biases and other vectors.

Muon (Jordan et al., 2024) orthogonalises the momentum of every matrix; timm's version flattens a
convolution to (out, in · kernel) and hands vectors to NAdamW. ``match_rms_adamw`` scales its steps
so that learning rates known from AdamW carry over (Liu et al., "Muon is Scalable for LLM
Training", 2025). timm orthogonalises in BF16; where the device has no kernels for that, it is made to do so in
FP32 (0.06 to 0.07 s instead of 2.2 for a matrix of 384×1536 on a core that has AVX2 alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parscale_ear.device import multiplies_bf16


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
        from timm.optim import muon
    except ImportError as error:
        raise ModuleNotFoundError(
            "training needs timm >= 1.0.21: pip install 'timm>=1.0.21' (the extra 'train')"
        ) from error
    groups = [{"params": list(parameters)}]
    if tables := list(elementwise):
        groups.append({"params": tables, "use_fallback": True})  # type: ignore[dict-item]
    narrow = all(multiplies_bf16(p.device) for group in groups for p in group["params"])
    kind = muon.Muon if narrow else _in_fp32(muon)
    optimizer: torch.optim.Optimizer = kind(groups, lr=rate, weight_decay=0.0, nesterov=True)
    return optimizer


def _in_fp32(muon: Any) -> Any:
    """Muon that orthogonalises in FP32; ``muon``: timm's module of it.

    Its function for that takes a dtype, but the class does not hand one on.
    """
    exact = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)

    class MuonInFP32(muon.Muon):  # type: ignore[misc]
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            narrow = muon.zeropower_via_newtonschulz
            muon.zeropower_via_newtonschulz = exact
            try:
                return super().step(closure)
            finally:
                muon.zeropower_via_newtonschulz = narrow

    return MuonInFP32


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

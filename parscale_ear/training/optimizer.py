"""The optimizer: Muon for convolutions and matrices, AdamW for biases and other vectors.

Muon (Jordan et al., 2024) orthogonalises the momentum of every matrix; timm's version flattens a
convolution to (out, in · kernel) and hands vectors to AdamW. ``match_rms_adamw`` scales its steps
so that learning rates known from AdamW carry over (Liu et al., "Muon is Scalable for LLM
Training", 2025).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def build_optimizer(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Muon with an AdamW fallback, no weight decay.

    Args:
        parameters: what is trained.
        rate: learning rate, of the order of AdamW's.

    Raises:
        ModuleNotFoundError: timm is not installed; the message says what to install.
    """
    try:
        from timm.optim.muon import Muon
    except ImportError as error:
        raise ModuleNotFoundError(
            "training needs timm >= 1.0.21: pip install 'timm>=1.0.21' (the extra 'train')"
        ) from error
    return Muon(list(parameters), lr=rate, weight_decay=0.0)

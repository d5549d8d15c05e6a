"""From logits to tokens: guidance, top-k, top-p and the draw.

Shapes: R rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor


def check_sampling(top_k: int | None, top_p: float, guidance: float) -> None:
    """Checks what a user may ask for.

    Raises:
        ValueError: ``top_k`` is below 0 or no integer, ``top_p`` not in (0, 1], ``guidance`` below
            0 or not finite.
    """
    if top_k is not None and (not isinstance(top_k, Integral) or top_k < 0):
        raise ValueError(f"top_k must be at least 1, a whole number, or 0 for all, got {top_k!r}")
    if not isinstance(top_p, Real) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p!r}")
    check_guidance(guidance)


def check_guidance(guidance: float) -> None:
    """Checks the weight of guidance.

    Raises:
        ValueError: it is below 0, not finite or no number.
    """
    if not isinstance(guidance, Real) or not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance must be at least 0 and finite, got {guidance!r}")


def check_temperature(temperature: float) -> None:
    """Checks the temperature of a draw.

    Raises:
        ValueError: it is no number in [0, 1].
    """
    if not isinstance(temperature, Real) or not 0 <= temperature <= 1:
        raise ValueError(f"temperature must be in [0, 1], got {temperature!r}")


def guided(conditional: Tensor, unconditional: Tensor, weight: float | Tensor) -> Tensor:
    """``(1 + weight) · conditional − weight · unconditional``.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022), equation 6.
    """
    return (1 + weight) * conditional - weight * unconditional


def sample_tokens(
    logits: Tensor,
    *,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws a token for every position.

    Top-k first, then top-p (the fewest likely tokens that together have at least that
    probability), then one draw. The draw is the arg max of probabilities over exponential noise,
    which needs no wait for the device and cannot fail on the way.

    Args:
        logits: (R, T, V), FP32.
        top_k: keep as many of the likeliest tokens; None or 0: all.
        top_p: keep the likeliest tokens up to this probability; 1: all.
        generator: of the draw, on any device (on the CPU: the same noise everywhere); None: PyTorch's own.

    Returns:
        (R, T), int64.
    """
    vocabulary = logits.shape[-1]
    kept = min(top_k or vocabulary, vocabulary)
    if kept == 1:
        return logits.argmax(dim=-1)
    names: Tensor | None = None
    if kept < vocabulary or top_p < 1:
        logits, names = logits.topk(kept, dim=-1)  # (R, T, kept), likeliest first
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities  # what is likelier than a token
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    device = probabilities.device if generator is None else generator.device
    noise = torch.empty(probabilities.shape, dtype=probabilities.dtype, device=device)
    noise = noise.exponential_(generator=generator).to(probabilities.device)
    drawn = (probabilities / noise).argmax(dim=-1)  # (R, T)
    if names is None:
        return drawn
    return names.gather(-1, drawn[..., None]).squeeze(-1)

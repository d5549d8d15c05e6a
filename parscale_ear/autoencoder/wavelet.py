"""Orthonormal Haar wavelet analysis and synthesis.

Shapes: B batch, C channels, H W pixels.

Bands lie band-major in the channel axis: all C channels of LL, then LH, HL, HH, so that the first
C channels are half-resolution images (times 2 for one level of an orthonormal transform).
LH, HL, HH are PyWavelets' ``cH``, ``cV``, ``cD``, with the same signs. Source: Haar (1910);
Mallat, "A theory for multiresolution signal decomposition" (1989).
"""

from __future__ import annotations

import torch
from torch import Tensor


def haar_dwt(x: Tensor, levels: int = 1) -> Tensor:
    """Haar packet analysis: every band is split again at every level.

    Args:
        x: (B, C, H, W), any floating dtype; H and W multiples of ``2 ** levels``.
        levels: number of transforms; 0 returns ``x``.

    Returns:
        (B, 4**levels * C, H / 2**levels, W / 2**levels) in the dtype of ``x``. The transform is
        orthonormal: the sum of squares is kept.

    Raises:
        ValueError: H or W is not a multiple of ``2 ** levels``.
    """
    if x.shape[-2] % 2**levels or x.shape[-1] % 2**levels:
        raise ValueError(
            f"haar_dwt: height and width must be multiples of {2**levels} for {levels} level(s), "
            f"got {tuple(x.shape)}"
        )
    for _ in range(levels):
        top, bottom = x[..., 0::2, :], x[..., 1::2, :]  # (B, C, H/2, W) each
        low, high = top + bottom, top - bottom
        bands = (
            low[..., 0::2] + low[..., 1::2],  # LL
            high[..., 0::2] + high[..., 1::2],  # LH: detail across rows
            low[..., 0::2] - low[..., 1::2],  # HL: detail across columns
            high[..., 0::2] - high[..., 1::2],  # HH
        )
        x = torch.cat(bands, dim=1) * 0.5  # (B, 4C, H/2, W/2)
    return x


def haar_idwt(bands: Tensor, levels: int = 1) -> Tensor:
    """Inverse of :func:`haar_dwt`.

    Args:
        bands: (B, 4**levels * C, h, w), any floating dtype.
        levels: number of inverse transforms.

    Returns:
        (B, C, h * 2**levels, w * 2**levels) in the dtype of ``bands``.

    Raises:
        ValueError: the channel count is not a multiple of ``4 ** levels``.
    """
    if bands.shape[1] % 4**levels:
        raise ValueError(
            f"haar_idwt: channels must be a multiple of {4**levels} for {levels} level(s), "
            f"got {tuple(bands.shape)}"
        )
    for _ in range(levels):
        ll, lh, hl, hh = (bands * 0.5).chunk(4, dim=1)  # (B, C, h, w) each
        left_low, left_high = ll + hl, lh + hh  # even columns: sum and difference of the rows
        right_low, right_high = ll - hl, lh - hh  # odd columns
        top = torch.stack((left_low + left_high, right_low + right_high), dim=-1)
        bottom = torch.stack((left_low - left_high, right_low - right_high), dim=-1)
        rows = torch.stack((top.flatten(-2), bottom.flatten(-2)), dim=-2)  # (B, C, h, 2, 2w)
        bands = rows.flatten(-3, -2)  # (B, C, 2h, 2w)
    return bands

"""PSNR, SSIM, MS-SSIM and HaarPSI between 8-bit pictures, a figure a picture.

Shapes: N pictures, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import piq
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor

SIMILARITIES = ("psnr_db", "ssim", "ms_ssim", "haarpsi")
STRIP = 2**22  # numbers of all pictures together that are compared at a time
HIGHEST_PSNR = 100.0  # dB, of one picture: one that comes back exactly has no finite PSNR
BLOCK = 16  # side of the blocks that are flat or not, pixels
SSIM_SIDE = 11  # its window
MS_SSIM_SIDE = 161  # five scales and a window of 11 need more than 160 pixels


def psnr(pictures: Tensor, references: Tensor) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB, peak 255, over all channels and pixels.

    Args:
        pictures: (N, 3, H, W), 8-bit.
        references: (N, 3, H, W), 8-bit.

    Returns:
        (N,); infinity where the two are equal.

    Raises:
        ValueError: shape or dtype differ from that.
    """
    _check(pictures, references)
    total = torch.zeros(len(pictures), dtype=torch.int64)
    rows = max(1, STRIP // max(1, pictures[..., :1, :].numel()))
    for ours, theirs in zip(pictures.split(rows, 2), references.split(rows, 2), strict=True):
        total += (ours.int() - theirs.int()).square_().sum(dim=(1, 2, 3)).cpu()
    squares = (total.double() / pictures[0].numel()).numpy() if len(pictures) else np.empty(0)
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(255.0**2 / squares), dtype=np.float64)


def ssim(pictures: Tensor, references: Tensor) -> NDArray[np.float64]:
    """Structural similarity (Wang et al., 2004) by scikit-image, mean over channels.

    Gaussian weights with σ 1.5, population covariance, data range 255.

    Args:
        pictures: (N, 3, H, W), 8-bit, H and W at least 11.
        references: (N, 3, H, W), 8-bit.

    Returns:
        (N,), at most 1.

    Raises:
        ValueError: shape or dtype differ from that.
    """
    _check(pictures, references)
    _check_side(pictures, "SSIM", SSIM_SIDE)
    values = [
        structural_similarity(
            picture.numpy(),
            reference.numpy(),
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        for picture, reference in zip(pictures, references, strict=True)
    ]
    return np.asarray(values, dtype=np.float64)


def ms_ssim(pictures: Tensor, references: Tensor) -> NDArray[np.float64]:
    """Multi-scale structural similarity (Wang et al., 2003) by piq: five scales.

    Args:
        pictures: (N, 3, H, W), 8-bit, H and W above 160.
        references: (N, 3, H, W), 8-bit.

    Returns:
        (N,), at most 1.

    Raises:
        ValueError: shape or dtype differ from that.
    """
    _check(pictures, references)
    _check_side(pictures, "MS-SSIM", MS_SSIM_SIDE)
    return _by_piq(piq.multi_scale_ssim, pictures, references)


def haarpsi(pictures: Tensor, references: Tensor) -> NDArray[np.float64]:
    """Haar wavelet-based perceptual similarity (Reisenhofer et al., 2018) by piq.

    Args:
        pictures: (N, 3, H, W), 8-bit, H and W at least 16.
        references: (N, 3, H, W), 8-bit.

    Returns:
        (N,), in [0, 1]; 1 where the two are equal.

    Raises:
        ValueError: shape or dtype differ from that.
    """
    _check(pictures, references)
    _check_side(pictures, "HaarPSI", BLOCK)
    values = _by_piq(piq.haarpsi, pictures, references)
    return np.clip(np.where(np.isfinite(values), values, 1.0), 0.0, 1.0)  # black on black: 0/0


def _by_piq(
    metric: Callable[..., Tensor], pictures: Tensor, references: Tensor
) -> NDArray[np.float64]:
    """A metric of piq on pictures in [0, 1], a few at a time."""
    with torch.inference_mode():
        values = [
            metric(a.float() / 255, b.float() / 255, data_range=1.0, reduction="none")
            for a, b in zip(pictures.split(8), references.split(8), strict=True)
            if len(a)
        ]
    return torch.cat(values).double().numpy() if values else np.empty(0)


def cell_pattern(
    pictures: Tensor, references: Tensor, *, side: int = 4, most_varied: float | None = None
) -> NDArray[np.float64]:
    """The checkerboard in the error: its mean at every position of cells of ``side``² pixels.

    A decoder whose last layer turns a position into such a cell may lay one pattern over all of them.
    It is seen where a picture is flat, hardly in its texture.

    Args:
        pictures: (N, 3, H, W), 8-bit.
        references: (N, 3, H, W), 8-bit.
        side: of a cell, a divisor of 16.
        most_varied: count only blocks of 16×16 pixels in which the reference's deviation, mean over
            channels, is below this, levels of 255; None: all blocks.

    Returns:
        (3, side, side), levels of 255, positive where ``pictures`` are too bright; NaN where no block
        counts. What is left of a picture beyond whole blocks is not looked at.

    Raises:
        ValueError: shape or dtype differ from that, or ``side`` is no divisor of 16.
    """
    _check(pictures, references)
    if side < 1 or BLOCK % side:
        raise ValueError(f"side must be a divisor of {BLOCK}, got {side}")
    height, width = (size // BLOCK * BLOCK for size in pictures.shape[-2:])

    def blocks(values: Tensor) -> Tensor:  # (M, 3, 16, 16)
        cut: Tensor = values[..., :height, :width].double()
        cut = cut.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

    originals = blocks(references)
    error = blocks(pictures) - originals
    if most_varied is not None:
        error = error[originals.std((2, 3), correction=0).mean(1) < most_varied]
    cells = error.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (M, 3, Y, side, X, side)
    return np.asarray(cells.mean((0, 2, 4)).numpy())


def chroma(pictures: Tensor) -> NDArray[np.float64]:
    """How much colour is in a picture: its highest less its lowest channel, mean over pixels.

    The chroma of HSV (Smith, "Color Gamut Transform Pairs", 1978). Of the reconstruction of a grey
    picture it is false colour.

    Args:
        pictures: (N, 3, H, W), 8-bit.

    Returns:
        (N,), levels of 255; 0 for a grey picture.

    Raises:
        ValueError: shape or dtype differ from that.
    """
    _check(pictures, pictures)
    spread = pictures.amax(1) - pictures.amin(1)  # (N, H, W), at most 255: no wrap
    return np.asarray(spread.double().mean((1, 2)).numpy())


def similarities(pictures: Tensor, references: Tensor) -> dict[str, NDArray[np.float64]]:
    """All of them by name, a figure a picture; PSNR at most 100 dB, MS-SSIM NaN where too small."""
    large = min(pictures.shape[-2:]) >= MS_SSIM_SIDE
    return {
        "psnr_db": np.minimum(psnr(pictures, references), HIGHEST_PSNR),
        "ssim": ssim(pictures, references),
        "ms_ssim": ms_ssim(pictures, references) if large else np.full(len(pictures), np.nan),
        "haarpsi": haarpsi(pictures, references),
    }


def mean_quality(pictures: Tensor, references: Tensor) -> dict[str, float]:
    """Means over pictures: ``psnr_db`` (at most 100 for a picture) and ``ssim``.

    Args:
        pictures: (N, 3, H, W), 8-bit.
        references: (N, 3, H, W), 8-bit.
    """
    return {
        "psnr_db": float(np.minimum(psnr(pictures, references), HIGHEST_PSNR).mean()),
        "ssim": float(ssim(pictures, references).mean()),
    }


def _check(pictures: Tensor, references: Tensor) -> None:
    if pictures.shape != references.shape or pictures.ndim != 4:
        raise ValueError(
            "expected two (N, 3, H, W) tensors of one shape, "
            f"got {tuple(pictures.shape)} and {tuple(references.shape)}"
        )
    for tensor in (pictures, references):
        if str(tensor.dtype) != "torch.uint8" or tensor.device.type != "cpu":
            raise ValueError(
                f"expected 8-bit pictures on the CPU, got {tensor.dtype} on {tensor.device}"
            )


def _check_side(pictures: Tensor, metric: str, least: int) -> None:
    if min(pictures.shape[-2:]) < least:
        raise ValueError(
            f"{metric} needs pictures of at least {least} pixels each way, "
            f"got {tuple(pictures.shape[-2:])}"
        )

"""PSNR and SSIM between 8-bit pictures, a figure a picture.

Shapes: N pictures, H W pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor


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
    squares = (pictures.double() - references.double()).square().mean(dim=(1, 2, 3)).numpy()
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(255.0**2 / squares), dtype=np.float64)


def ssim(pictures: Tensor, references: Tensor) -> NDArray[np.float64]:
    """Structural similarity (Wang et al., 2004) by scikit-image, mean over channels.

    Gaussian weights with σ 1.5, population covariance, data range 255.

    Args:
        pictures: (N, 3, H, W), 8-bit.
        references: (N, 3, H, W), 8-bit.

    Returns:
        (N,), at most 1.

    Raises:
        ValueError: shape or dtype differ from that.
    """
    _check(pictures, references)
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


def mean_quality(pictures: Tensor, references: Tensor) -> dict[str, float]:
    """Means over pictures: ``psnr_db`` and ``ssim``."""
    return {
        "psnr_db": float(psnr(pictures, references).mean()),
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
            raise ValueError(f"expected 8-bit pictures on the CPU, got {tensor.dtype}")

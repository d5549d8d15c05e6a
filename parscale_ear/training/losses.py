"""Losses of the autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 1e-4  # squared error below which a picture counts as good enough (46 dB)
_SCALE = 0.1  # brings the gradient to the size of a mean absolute error's
_BLOCK, _CELL = 16, 8  # pixels: where variation is measured; what may carry a pattern
_PATTERN_GROUPS = 4  # of blocks, from flat to varied
_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5  # of the Gaussian window, pixels
_SSIM_STRIP = 32  # pixels that are blurred at a time


def log_mse_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean over pictures of the logarithm of a picture's mean squared error; a scalar, in FP32.

    PSNR is a logarithm of the squared error, so this is what a mean PSNR over pictures asks for;
    a plain squared error would spend itself on the few busiest pictures.

    Args:
        output: (B, 3, H, W), not clamped.
        target: (B, 3, H, W) in [−1, 1].
    """
    squares = (output.float() - target.float()).square().mean(dim=(1, 2, 3))  # (B,)
    return _SCALE * (squares + _FLOOR).log().mean()


def _blur_matrix(count: int, device: torch.device) -> Tensor:
    """The Gaussian window at ``count`` places, a pixel apart, as a matrix: (count, count + 10)."""
    centres = torch.arange(_SSIM_RADIUS, count + _SSIM_RADIUS, device=device)[:, None]
    offsets = torch.arange(count + 2 * _SSIM_RADIUS, device=device) - centres
    window = torch.exp(-offsets.float().square() / (2 * _SSIM_SIGMA**2))
    window = window * (offsets.abs() <= _SSIM_RADIUS)
    return window / window.sum(dim=1, keepdim=True)


def _blur(x: Tensor) -> Tensor:
    """(..., H, W) → (..., H − 10, W − 10), where the window lies whole inside.

    By matrix products, which on a CPU are ten times faster here than a convolution with one channel; by
    strips, as the matrix for a whole side is mostly zeros.
    """
    for dim in (-2, -1):
        strips = []
        inside = x.shape[dim] - 2 * _SSIM_RADIUS
        for first in range(0, inside, _SSIM_STRIP):
            count = min(_SSIM_STRIP, inside - first)
            matrix = _blur_matrix(count, x.device)
            strip = x.narrow(dim, first, count + 2 * _SSIM_RADIUS)
            strips.append(matrix @ strip if dim == -2 else strip @ matrix.T)
        x = torch.cat(strips, dim)
    return x


def ssim_loss(output: Tensor, target: Tensor) -> Tensor:
    """``1 − SSIM`` with gradients, mean over channels and pictures; a scalar, in FP32.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity"
    (2004); a Gaussian window of σ 1.5, only where it lies whole inside the picture, as the figure
    in ``metrics.reconstruction.ssim`` has it.

    Args:
        output: (B, 3, H, W), H and W at least 11.
        target: (B, 3, H, W) in [−1, 1].
    """
    with torch.autocast(output.device.type, enabled=False):
        # Means count in SSIM, so pixels must start at 0: [0, 1].
        x, y = (0.5 + 0.5 * side.float().contiguous() for side in (output, target))
        # Of the two variances only the sum counts; the target's mean needs no gradient.
        mean_x, squares, products = _blur(torch.cat((x, x * x + y * y, x * y))).chunk(3)
        mean_y = _blur(y)  # (B, 3, H − 10, W − 10), like the others
        variances = squares - mean_x.square() - mean_y.square()
        covariance = products - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
        return 1 - (luminance * (2 * covariance + c2) / (variances + c2)).mean()


def pattern_loss(output: Tensor, target: Tensor) -> Tensor:
    """The error that the 8×8 cells of a picture have in common: a checkerboard, or a tint; a scalar.

    A decoder's last layer turns a position into a cell of 4×4 pixels, the one before into 8×8.

    Losses of features and of a critic hardly see it, and in texture nobody does; but it must not go
    from there into flat parts. So a picture's blocks of 16×16 pixels are put into groups by how varied
    the target is, and each group's mean error at each of a cell's positions must vanish for itself.

    Args:
        output: (B, 3, H, W), H and W multiples of 16.
        target: (B, 3, H, W) in [−1, 1].

    Returns:
        Mean over pictures, groups, colours and positions of the squared mean error, in FP32.
    """

    def blocks(values: Tensor) -> Tensor:  # (B, M, 3, 16, 16)
        values = values.float().unflatten(3, (-1, _BLOCK)).unflatten(2, (-1, _BLOCK))
        return values.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)

    original = blocks(target)
    error = blocks(output) - original
    cells = (
        error.unflatten(4, (-1, _CELL)).unflatten(3, (-1, _CELL)).mean((3, 5))
    )  # (B, M, 3, 8, 8)
    order = original.std((3, 4), correction=0).mean(2).argsort(1)  # (B, M), flat ones first
    cells = torch.take_along_dim(cells, order[:, :, None, None, None], dim=1)
    groups = cells.chunk(_PATTERN_GROUPS, dim=1)
    return torch.stack([group.mean(1).square().mean() for group in groups]).mean()


def chroma_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of colours less their grey; a scalar, in FP32.

    Losses of features and of a critic let a decoder tint grey texture; the eye does not.

    Args:
        output: (B, 3, H, W), not clamped.
        target: (B, 3, H, W) in [−1, 1].
    """
    error = output.float() - target.float()
    return (error - error.mean(1, keepdim=True)).square().mean()

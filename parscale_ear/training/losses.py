"""Losses of the autoencoder."""

from __future__ import annotations

from torch import Tensor

_FLOOR = 1e-4  # squared error below which a picture counts as good enough (46 dB)
_SCALE = 0.1  # brings the gradient to the size of a mean absolute error's


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

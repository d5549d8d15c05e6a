"""Convolutional bricks shared by the encoder, the hybrid and the decoder.

Shapes: B batch, C channels, H W height and width of the feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available
from torch.nn import functional as F

# Asked once, as torch.compile cannot trace the question.
_AUTOCASTING = {kind for kind in ("cpu", "cuda", "mps", "xpu") if is_autocast_available(kind)}


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """3×3 convolution with bias that keeps height and width."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


class ResidualBlock(nn.Module):
    """``x + conv(silu(conv(x)))``: two 3×3 convolutions and one activation, no normalisation.

    The second convolution starts at a tenth of its usual scale, which keeps a deep stack of
    blocks near the identity at the start and lets it train without a norm layer.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.conv2 = conv3x3(channels, channels)
        self.conv2.weight.data.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        hidden = F.silu(self.conv1(x), inplace=True)
        return x + self.conv2(hidden)  # type: ignore[no-any-return]


class BottleneckBlock(nn.Module):
    """``x + expand(silu(conv(silu(reduce(x)))))``: a 3×3 convolution at half the channels.

    Depth for less than a fifth of a ``ResidualBlock``'s parameters. Source: He et al., "Deep
    Residual Learning for Image Recognition" (CVPR 2016), figure 5.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 2)
        self.reduce = nn.Conv2d(channels, inner, kernel_size=1)
        self.conv = conv3x3(inner, inner)
        self.expand = nn.Conv2d(inner, channels, kernel_size=1)
        self.expand.weight.data.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        hidden = F.silu(self.reduce(x), inplace=True)
        hidden = F.silu(self.conv(hidden), inplace=True)
        return x + self.expand(hidden)  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Doubles height and width: a 1×1 convolution, then pixel shuffle (sub-pixel convolution).

    Source: Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient
    Sub-Pixel Convolutional Neural Network" (CVPR 2016).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, 4 * outputs, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, 2H, 2W)."""
        return F.pixel_shuffle(self.conv(x), 2)


def downsample(inputs: int, outputs: int) -> nn.Conv2d:
    """Halves height and width: a 2×2 convolution with stride 2."""
    return nn.Conv2d(inputs, outputs, kernel_size=2, stride=2)


def convolution_radius(module: nn.Module) -> int:
    """How far the stride-1 convolutions of ``module`` reach when one follows the other.

    In positions of their own resolution. The branches of a residual block follow each other only
    through its longest path, which is the one with convolutions.
    """
    return sum(
        part.kernel_size[0] // 2
        for part in module.modules()
        if isinstance(part, nn.Conv2d) and part.stride[0] == 1
    )


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x`` (devices without autocast: never)."""
    return x.device.type in _AUTOCASTING and torch.is_autocast_enabled(x.device.type)


def conv_flops(module: nn.Module, height: int, width: int) -> int:
    """FLOPs of every convolution in ``module``, each giving a ``height`` × ``width`` output.

    A multiply-add counts two; bias and activations are left out, as in
    ``torch.utils.flop_counter``.
    """
    weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))
    return 2 * weights * height * width

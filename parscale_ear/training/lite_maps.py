"""EfficientNet-Lite0 as a loss sees it: frozen, and quick to differentiate by its input.

A frozen network needs no batch norms of its own (they are folded into the convolutions) and no
gradients of weights. Of what is left, the gradient of depthwise convolutions by their input takes
the longest on a CPU; it is a depthwise convolution itself, and PyTorch's forward kernel is several
times faster than its backward one.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parscale_ear.metrics.features import EfficientNetLite


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution with frozen weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int
    ) -> Tensor:
        """(B, C, H, W) with (C, 1, k, k) → (B, C, (H + 2 · padding − k) // stride + 1, ...)."""
        ctx.save_for_backward(weight)
        ctx.stride, ctx.padding, ctx.shape = stride, padding, x.shape
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The flipped kernel over the gradient, spread out to the input's grid."""
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        kernel, stride = weight.shape[-1], ctx.stride
        edge = kernel - 1 - ctx.padding
        height, width = (size + 2 * ctx.padding - kernel + 1 for size in ctx.shape[-2:])
        if stride > 1 or gradient.shape[-2:] != (height, width):
            spread = gradient.new_zeros(*gradient.shape[:2], height, width)
            spread = spread.to(memory_format=torch.channels_last)
            spread[:, :, ::stride, ::stride] = gradient
            gradient = spread
        flipped = weight.flip(2, 3).to(gradient.dtype)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        found = F.conv2d(gradient, flipped, padding=edge, groups=len(weight))
        return found, None, None, None, None


class _Convolution(nn.Module):
    """A convolution of the network and the batch norm behind it, as one."""

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_var is not None
        assert norm.running_mean is not None
        gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = (convolution.weight * gain[:, None, None, None]).detach()
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", (norm.bias - norm.running_mean * gain).detach())
        self.stride = int(convolution.stride[0])
        self.depthwise = convolution.groups > 1
        padding = getattr(convolution, "static_padding", None)  # TensorFlow's: lopsided at stride 2
        sides = tuple(padding.padding) if isinstance(padding, nn.ZeroPad2d) else (0, 0, 0, 0)
        even = len(set(sides)) == 1
        self.padding = sides[0] if even else 0  # the convolution's own
        self.sides = (0, 0, 0, 0) if even else sides  # in front of it

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.get_buffer("weight"), self.get_buffer("bias")
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        if any(self.sides):
            x = F.pad(x, self.sides)
        if self.depthwise:
            return _Depthwise.apply(x, weight, bias, self.stride, self.padding)  # type: ignore[no-any-return, no-untyped-call]
        return F.conv2d(x, weight, bias, self.stride, self.padding)


class _Block(nn.Module):
    """An inverted bottleneck (Sandler et al., "MobileNetV2", 2018) without squeeze-excitation."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        expand = [_Convolution(block._expand_conv, block._bn0)] if hasattr(block, "_expand_conv") else []  # fmt: skip
        self.wide = nn.ModuleList([*expand, _Convolution(block._depthwise_conv, block._bn1)])
        self.project = _Convolution(block._project_conv, block._bn2)
        told = block._block_args
        self.stride = self.wide[-1].stride
        self.skips = bool(
            block.id_skip and self.stride == 1 and told.input_filters == told.output_filters
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for convolution in self.wide:
            y = F.relu6(convolution(y))
        y = self.project(y)
        return x + y if self.skips else y  # type: ignore[no-any-return]


class LiteMaps(nn.Module):
    """Feature maps of EfficientNet-Lite0; nothing in it is trained."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Loads Lite0.

        Raises:
            FeatureError: its packages are missing.
        """
        super().__init__()
        extractor = EfficientNetLite(0)
        net: Any = extractor.model
        self.mean, self.std = extractor.mean, extractor.std
        self.stem = _Convolution(net._conv_stem, net._bn0)
        self.blocks = nn.ModuleList(_Block(block) for block in net._blocks)
        self.head = _Convolution(net._conv_head, net._bn1)
        strides = [block.stride for block in self.blocks]
        # A feature map is taken where the next block halves the resolution, and at the end.
        last = len(strides) - 1
        self.taken = [k for k in range(last + 1) if k == last or strides[k + 1] != 1]
        self.to(device)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of (B, 3, H, W) in [−1, 1], from fine to coarse, and the last one's head."""
        images = images.contiguous(memory_format=torch.channels_last)
        x = F.relu6(self.stem((images * 0.5 + (0.5 - self.mean)) / self.std))
        maps = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.taken:
                maps.append(x)
        return [*maps, F.relu6(self.head(x))]

"""The tokenizer of VAR: a convolutional autoencoder around a multi-scale residual quantiser.

Source: Tian et al., "Visual Autoregressive Modeling" (NeurIPS 2024); the convolutional part is
that of latent diffusion (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion
Models", CVPR 2022; Esser et al., "Taming Transformers", CVPR 2021).

Shapes: B batch, C channels, H W pixels, h w latent height and width, Z latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parscale_ear.checks import check_whole
from parscale_ear.device import check_finite
from parscale_ear.generator.quantizer import MultiScaleQuantizer


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """Sizes of the tokenizer; the defaults are those of the published checkpoint."""

    vocabulary: int = 4096  # vectors in the codebook
    latent_channels: int = 32  # of a vector
    width: int = 160  # channels at full resolution
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # of the width, a level; each halves the side
    blocks: int = 2  # residual blocks a level in the encoder; the decoder has one more
    groups: int = 32  # of the group norms
    sides: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # of the token maps, coarse to fine
    phis: int = 4  # smoothing convolutions that the scales share

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        for name in ("vocabulary", "latent_channels", "width", "blocks", "groups", "phis"):
            check_whole(1, **{name: getattr(self, name)})
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers must be positive, got {self.multipliers}")
        if self.width % self.groups:
            raise ValueError(
                f"width must be a multiple of groups = {self.groups}, got {self.width}"
            )
        grows = all(a < b for a, b in zip(self.sides, self.sides[1:], strict=False))
        if not self.sides or self.sides[0] < 1 or not grows:
            raise ValueError(f"sides must be positive and grow, got {self.sides}")

    @property
    def stride(self) -> int:
        """Pixels that a latent position stands for, each way."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def image_side(self) -> int:
        """Pixels, each way, of a picture of all scales."""
        return self.stride * self.sides[-1]


class ResnetBlock(nn.Module):
    """``shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))``."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H, W)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.shortcut(x) + hidden  # type: ignore[no-any-return]


class SpatialAttention(nn.Module):
    """Single-head attention over all positions of a feature map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        size = x.shape[-2:]
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, HW, 3C)
        query, key, value = (part[:, None] for part in qkv.chunk(3, dim=-1))  # (B, 1, HW, C)
        mixed = F.scaled_dot_product_attention(query, key, value)[:, 0]  # (B, HW, C)
        return x + self.out(mixed.transpose(1, 2).unflatten(2, size))  # type: ignore[no-any-return]


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where asked."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, groups: int, *, attention: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResnetBlock(outputs if k else inputs, outputs, groups) for k in range(blocks)
        )
        self.attention = nn.ModuleList(
            SpatialAttention(outputs, groups) for _ in range(blocks if attention else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H, W)."""
        for k, block in enumerate(self.blocks):
            x = block(x)
            if self.attention:
                x = self.attention[k](x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block1 = ResnetBlock(channels, channels, groups)
        self.attention = SpatialAttention(channels, groups)
        self.block2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return self.block2(self.attention(self.block1(x)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Image → features at the lowest resolution."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                widths[max(0, k - 1)] if k else config.width,
                widths[k],
                config.blocks,
                config.groups,
                attention=k == last,
            )
            for k in range(len(widths))
        )
        self.downs = nn.ModuleList(nn.Conv2d(n, n, 3, stride=2) for n in widths[:-1])
        self.middle = Middle(widths[-1], config.groups)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, Z, h, w)."""
        x = self.conv_in(images)
        for k, level in enumerate(self.levels):
            x = level(x)
            if k < len(self.downs):
                x = self.downs[k](F.pad(x, (0, 1, 0, 1)))  # zeros right and below
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Features at the lowest resolution → image."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in reversed(config.multipliers)]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = Middle(widths[0], config.groups)
        self.levels = nn.ModuleList(
            Level(
                widths[max(0, k - 1)],
                widths[k],
                config.blocks + 1,
                config.groups,
                attention=k == 0,
            )
            for k in range(len(widths))
        )
        self.ups = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1) for n in widths[:-1])
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, Z, h, w) → (B, 3, H, W), not clamped."""
        x = self.middle(self.conv_in(latent))
        for k, level in enumerate(self.levels):
            x = level(x)
            if k < len(self.ups):
                x = self.ups[k](F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))  # type: ignore[no-any-return]


class VQVAE(nn.Module):
    """Pictures to tokens of all scales and back."""

    def __init__(self, config: VQVAEConfig | None = None) -> None:
        """Builds the tokenizer with fresh weights, convolutions channels-last.

        Args:
            config: sizes; the default is the published checkpoint's.
        """
        super().__init__()
        self.config = config = config or VQVAEConfig()
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.pre_quantizer = nn.Conv2d(channels, channels, 3, padding=1)
        self.quantizer = MultiScaleQuantizer(config.vocabulary, channels, config.sides, config.phis)
        self.post_quantizer = nn.Conv2d(channels, channels, 3, padding=1)
        self.decoder = Decoder(config)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def latent(self, images: Tensor) -> Tensor:
        """What is quantised: (B, 3, H, W) in [−1, 1] → (B, Z, h, w)."""
        side = self.config.image_side
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2:] != (side, side):
            raise ValueError(
                f"images must have shape (B, 3, {side}, {side}), got {tuple(images.shape)}"
            )
        return self.pre_quantizer(self.encoder(images))  # type: ignore[no-any-return]

    def encode(self, images: Tensor) -> list[Tensor]:
        """Tokens of all scales.

        Args:
            images: (B, 3, H, W) in [−1, 1], in the dtype of the convolutions.

        Returns:
            (B, side²) int64 a scale.

        Raises:
            ValueError: the shape is wrong.
        """
        return self.quantizer.encode(self.latent(images))

    def decode_latent(self, latent: Tensor) -> Tensor:
        """A sum of contributions to a picture: (B, Z, h, w) → (B, 3, H, W) in [−1, 1].

        On the CPU a picture at a time: one fills the cores, and many would fill the memory.

        Raises:
            ValueError: a picture has NaN or infinity in it.
        """
        weight = self.post_quantizer.weight
        latent = latent.to(weight.dtype, memory_format=torch.channels_last)
        parts = latent.split(1) if latent.device.type == "cpu" else (latent,)
        pictures = torch.cat([self.decoder(self.post_quantizer(part)) for part in parts])
        check_finite(pictures, "decoded pictures")  # before infinity becomes white
        return pictures.clamp_(-1, 1)

    def decode(self, tokens: Sequence[Tensor]) -> Tensor:
        """Tokens of all scales to a picture: (B, side²) a scale → (B, 3, H, W) in [−1, 1]."""
        return self.decode_latent(self.quantizer.decode(tokens))

    def forward(self, images: Tensor) -> Tensor:
        """There and back: (B, 3, H, W) → (B, 3, H, W) in [−1, 1]."""
        return self.decode(self.encode(images))

"""LiteVAE: a wavelet variational autoencoder, 256×256 RGB → 32×16×16 → 256×256.

No attention and no norm layers. Tried: GroupNorm (8 groups) in front of every block, 170 steps of
Muon at 1e-3, one seed. It trained 124 crops/s instead of 154, led by 0.5 dB at that early point
(20.3 against 19.8 dB) and did not change FP32 inference measurably (11.0 against 11.2 ms an image
at batch 4). It is left out for the training speed and because its statistics over the whole picture
would tie a tile's result to its surroundings; a long trial of it is open (docs/experiments.md).

Shapes: B batch, H W pixels, h w latent height and width (H/16, W/16), Z latent channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from parscale_ear.autoencoder.blocks import (
    BottleneckBlock,
    ResidualBlock,
    Upsample,
    autocasts,
    conv3x3,
    conv_flops,
    convolution_radius,
    downsample,
)
from parscale_ear.autoencoder.wavelet import haar_dwt, haar_idwt
from parscale_ear.checks import check_whole

STRIDE = 16  # pixels a latent position stands for, each way
PACKET_LEVELS = 2  # Haar levels between the pixels and the first (and last) convolution
PACKET_CHANNELS = 3 * 4**PACKET_LEVELS


@dataclass(frozen=True, kw_only=True)
class LiteVAEConfig:
    """Widths and depths; the three stages work at 1/4, 1/8 and 1/16 of the image's side."""

    latent_channels: int = 32  # channels of the Gaussian posterior
    encoder_widths: tuple[int, int, int] = (64, 96, 128)  # channels at 1/4, 1/8, 1/16
    encoder_blocks: tuple[int, int, int] = (1, 1, 1)  # residual blocks at 1/4, 1/8, 1/16
    encoder_bottlenecks: tuple[int, int, int] = (0, 0, 2)  # bottleneck blocks after these
    decoder_widths: tuple[int, int, int] = (64, 96, 128)  # channels at 1/4, 1/8, 1/16
    decoder_blocks: tuple[int, int, int] = (3, 1, 1)  # residual blocks at 1/4, 1/8, 1/16
    decoder_bottlenecks: tuple[int, int, int] = (0, 1, 0)  # bottleneck blocks after these

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        check_whole(1, latent_channels=self.latent_channels)
        for name, least in (
            ("encoder_widths", 1),
            ("encoder_blocks", 0),
            ("encoder_bottlenecks", 0),
            ("decoder_widths", 1),
            ("decoder_blocks", 0),
            ("decoder_bottlenecks", 0),
        ):
            value = getattr(self, name)
            if len(value) != 3 or any(not isinstance(n, int) or n < least for n in value):
                raise ValueError(f"{name} must be three integers of at least {least}, got {value}")


class LiteVAEEncoder(nn.Module):
    """Haar sub-bands → features a level → aggregated Gaussian moments.

    After Sadat et al., "LiteVAE" (NeurIPS 2024), section 3: the wavelet transform does what the
    first stages of a convolutional encoder would do at full resolution, so no convolution runs
    above 1/4 of the image's side. The sub-bands enter a level at a time: the two finest levels as
    one packet (all bands, nothing lost), those of the third and fourth at their own resolution.
    """

    def __init__(self, config: LiteVAEConfig) -> None:
        super().__init__()
        fine, middle, coarse = config.encoder_widths
        blocks = tuple(zip(config.encoder_blocks, config.encoder_bottlenecks, strict=True))
        self.level2 = conv3x3(PACKET_CHANNELS, fine)
        self.features2 = _blocks(fine, *blocks[0])
        self.level3 = nn.Conv2d(12, middle, kernel_size=1, bias=False)
        self.down3 = downsample(fine, middle)
        self.features3 = _blocks(middle, *blocks[1])
        self.level4 = nn.Conv2d(12, coarse, kernel_size=1, bias=False)
        self.down4 = downsample(middle, coarse)
        self.features4 = _blocks(coarse, *blocks[2])
        self.moments = conv3x3(coarse, 2 * config.latent_channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [−1, 1] → mean and log-variance, (B, Z, h, w) each."""
        packet = haar_dwt(images, PACKET_LEVELS)  # (B, 48, H/4, W/4)
        bands3 = haar_dwt(packet[:, :3])  # (B, 12, H/8, W/8)
        bands4 = haar_dwt(bands3[:, :3])  # (B, 12, h, w)
        x = self.features2(self.level2(packet))  # (B, fine, H/4, W/4)
        x = self.features3(self.down3(x) + self.level3(bands3))  # (B, middle, H/8, W/8)
        x = self.features4(self.down4(x) + self.level4(bands4))  # (B, coarse, h, w)
        mean, log_variance = self.moments(x).chunk(2, dim=1)  # (B, Z, h, w) each
        return mean, log_variance

    def flops(self, height: int, width: int) -> int:
        """FLOPs for one ``height`` × ``width`` image (a multiply-add counts two)."""
        return _level_flops(self, height, width)

    def radius(self) -> int:
        """Latent positions, each way, beyond which pixels do not change a latent."""
        return _level_radius(self)


class LiteVAEDecoder(nn.Module):
    """Latent → features at 1/16, 1/8, 1/4 → Haar sub-bands → inverse transform.

    Source: Sadat et al., "LiteVAE" (NeurIPS 2024), with the last upsampling stages of its decoder
    replaced by the inverse Haar transform.
    """

    def __init__(self, config: LiteVAEConfig) -> None:
        super().__init__()
        fine, middle, coarse = config.decoder_widths
        blocks = tuple(zip(config.decoder_blocks, config.decoder_bottlenecks, strict=True))
        self.latent4 = conv3x3(config.latent_channels, coarse)
        self.features4 = _blocks(coarse, *blocks[2])
        self.up4 = Upsample(coarse, middle)
        self.features3 = _blocks(middle, *blocks[1])
        self.up3 = Upsample(middle, fine)
        self.features2 = _blocks(fine, *blocks[0])
        self.bands2 = conv3x3(fine, PACKET_CHANNELS)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, Z, h, w) → (B, 3, 16h, 16w), not clamped."""
        x = self.up4(self.features4(self.latent4(latent)))  # (B, middle, 2h, 2w)
        x = self.up3(self.features3(x))  # (B, fine, 4h, 4w)
        packet = self.bands2(self.features2(x))  # (B, 48, 4h, 4w)
        if autocasts(packet):
            packet = packet.float()  # the pixels' last bits are not worth losing
        return haar_idwt(packet, PACKET_LEVELS)  # (B, 3, 16h, 16w)

    def flops(self, height: int, width: int) -> int:
        """FLOPs for one ``height`` × ``width`` image (a multiply-add counts two)."""
        return _level_flops(self, height, width)

    def radius(self) -> int:
        """Latent positions, each way, beyond which a latent does not change the pixels."""
        return _level_radius(self)


class LiteVAE(nn.Module):
    """Encoder and decoder with nothing between them, on the latent as the encoder gives it.

    ``ParScaleEAR`` adds normalisation, the hybrid, checks and files.
    """

    def __init__(self, config: LiteVAEConfig | None = None) -> None:
        super().__init__()
        config = config or LiteVAEConfig()
        self.encoder = LiteVAEEncoder(config)
        self.decoder = LiteVAEDecoder(config)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [−1, 1] → (B, 3, H, W), from the posterior's mean, not clamped."""
        mean, _ = self.encoder(images)  # (B, Z, h, w)
        return self.decoder(mean)  # type: ignore[no-any-return]

    def flops(self, height: int = 256, width: int = 256) -> int:
        """FLOPs of ``forward`` for one image (a multiply-add counts two; convolutions only)."""
        return self.encoder.flops(height, width) + self.decoder.flops(height, width)


def _level_flops(module: nn.Module, height: int, width: int) -> int:
    """FLOPs of parts whose names end in their Haar level, n working at 1/2ⁿ; others at 1/16."""
    count = 0
    for name, part in module.named_children():
        level = int(name[-1]) if name[-1].isdigit() else 4
        count += conv_flops(part, height >> level, width >> level)
    return count


def _level_radius(module: nn.Module) -> int:
    """Latent positions, rounded up, that the parts reach; levels as in :func:`_level_flops`."""
    pixels = 0
    for name, part in module.named_children():
        level = int(name[-1]) if name[-1].isdigit() else 4
        pixels += convolution_radius(part) << level
    return math.ceil(pixels / STRIDE)


def _blocks(channels: int, residual: int, bottleneck: int) -> nn.Sequential:
    return nn.Sequential(
        *(ResidualBlock(channels) for _ in range(residual)),
        *(BottleneckBlock(channels) for _ in range(bottleneck)),
    )

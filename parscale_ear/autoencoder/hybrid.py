"""Lite-Hybrid: a coarse and a fine residual branch over the latent.

Inspired by the hybrid tokenizer of HART (Tang et al., "HART: Efficient Visual Generation with
Hybrid Autoregressive Transformer", 2024), which splits a latent into a part that carries the big
picture and a residual that carries the detail. Here both parts are continuous.

Shapes: B batch, Z latent channels, h w latent height and width.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from parscale_ear.autoencoder.blocks import ResidualBlock, conv3x3, conv_flops
from parscale_ear.checks import check_whole

BRANCHES = frozenset({"coarse", "fine"})
POOL = 4  # latent positions, each way, that one coarse position stands for


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """Widths of the two branches; a width of 0 leaves a branch out (for controlled ablations)."""

    latent_channels: int = 32  # channels of the latent that both branches read and write
    coarse_width: int = 48  # channels at h/4 × w/4; 0: no coarse branch
    fine_width: int = 64  # channels at h × w; 0: no fine branch

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        for name, least in (("latent_channels", 1), ("coarse_width", 0), ("fine_width", 0)):
            check_whole(least, **{name: getattr(self, name)})


class CoarseBranch(nn.Module):
    """Wide context: 16×16 → 4×4 → 16×16 (elsewhere h/4 × w/4, rounded up).

    Two 3×3 convolutions at 4×4: a position sees 5×5 of these cells, 20×20 of the latent's.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.pool = nn.Conv2d(config.latent_channels, config.coarse_width, POOL, stride=POOL)
        self.context = ResidualBlock(config.coarse_width)
        self.spread = nn.Conv2d(config.coarse_width, POOL * POOL * config.latent_channels, 1)
        self.spread.weight.data.mul_(0.1)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, Z, h, w) → (B, Z, h, w)."""
        height, width = latent.shape[-2:]
        padding = (0, -width % POOL, 0, -height % POOL)
        if any(padding):
            latent = F.pad(latent, padding, mode="replicate")
        x = self.context(F.silu(self.pool(latent)))  # (B, coarse, ceil(h/4), ceil(w/4))
        x = F.pixel_shuffle(self.spread(F.silu(x)), POOL)  # (B, Z, 4·ceil(h/4), 4·ceil(w/4))
        return x[..., :height, :width]


class FineBranch(nn.Module):
    """Local residuals at latent resolution."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.expand = conv3x3(config.latent_channels, config.fine_width)
        self.detail = ResidualBlock(config.fine_width)
        self.project = conv3x3(config.fine_width, config.latent_channels)
        self.project.weight.data.mul_(0.1)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, Z, h, w) → (B, Z, h, w)."""
        x = self.detail(F.silu(self.expand(latent)))  # (B, fine, h, w)
        return self.project(F.silu(x))  # type: ignore[no-any-return]


def check_branches(branches: Collection[str]) -> None:
    """Checks which branches are asked for.

    Raises:
        ValueError: they are not a set or list of :data:`BRANCHES`.
    """
    if (
        isinstance(branches, str)
        or not isinstance(branches, Collection)
        or set(branches) - BRANCHES
    ):
        raise ValueError(
            f"branches must be a set or list out of {sorted(BRANCHES)}, got {branches!r}"
        )


class HybridLatent(nn.Module):
    """``z + coarse(z) + fine(z)``; either branch can be left out without touching weights."""

    def __init__(self, config: HybridConfig | None = None) -> None:
        super().__init__()
        self.config = config or HybridConfig()
        self.coarse = CoarseBranch(self.config) if self.config.coarse_width else None
        self.fine = FineBranch(self.config) if self.config.fine_width else None

    def forward(self, latent: Tensor, branches: Collection[str] = BRANCHES) -> Tensor:
        """Enhances a latent.

        Args:
            latent: (B, Z, h, w), normalised.
            branches: which branches run: any subset of ``{"coarse", "fine"}``; with none the
                latent comes back as it is.

        Returns:
            (B, Z, h, w).

        Raises:
            ValueError: ``branches`` names something else.
        """
        check_branches(branches)
        enhanced = latent
        if "coarse" in branches and self.coarse is not None:
            enhanced = enhanced + self.coarse(latent)
        if "fine" in branches and self.fine is not None:
            enhanced = enhanced + self.fine(latent)
        return enhanced  # (B, Z, h, w)

    def flops(self, height: int, width: int, branches: Collection[str] = BRANCHES) -> int:
        """FLOPs for one latent of ``height`` × ``width`` positions (a multiply-add counts two)."""
        count = 0
        if "coarse" in branches and self.coarse is not None:
            count += conv_flops(self.coarse, -(-height // POOL), -(-width // POOL))
        if "fine" in branches and self.fine is not None:
            count += conv_flops(self.fine, height, width)
        return count

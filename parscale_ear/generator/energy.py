"""The energy score, and a head that draws a band of a continuous token in one pass.

Source: Shao et al., "Continuous Visual Autoregressive Generation via Score Maximization" (ICML
2025); the score: Székely and Rizzo (2005), Gneiting and Raftery, "Strictly Proper Scoring Rules,
Prediction, and Estimation" (2007), section 4.3.

Shapes: M samples, T tokens, C width of the trunk, W width of the head, N noise channels, Z latent
channels, D numbers in a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parscale_ear.generator.pyramid import BANDS

NORM_EPS = 1e-6
MODULATION_STD = 0.02  # of the noise's modulation at the start, so that samples differ at once


def energy_score(
    samples: Tensor, target: Tensor, *, alpha: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Energy score: how far samples lie from what came, less half of how far they lie apart.

    ``mean |xᵢ − y|^α − ½ · mean over i ≠ j of |xᵢ − xⱼ|^α``: for two samples half of
    ``|x₁ − y|^α + |x₂ − y|^α − |x₁ − x₂|^α``. Its expectation over the samples is smallest for
    the law that ``y`` comes from, and for no other if 0 < α < 2; for α = 2 any law with the right
    mean is as good.

    Args:
        samples: (M, ..., D), M ≥ 2, independent draws.
        target: (..., D).
        alpha: exponent, in (0, 2].
        temperature: weight of the second term; below 1 the best law is narrower than the truth.

    Returns:
        (...,), lower is better.

    Raises:
        ValueError: fewer than two samples, shapes that do not fit, or ``alpha`` out of range.
    """
    count = len(samples)
    if count < 2 or samples.shape[1:] != target.shape:
        raise ValueError(
            f"the energy score needs (M ≥ 2, *target.shape) samples, got {tuple(samples.shape)} "
            f"for {tuple(target.shape)}"
        )
    if not 0 < alpha <= 2:
        raise ValueError(f"alpha must be in (0, 2], got {alpha}")
    near = torch.stack([_distance(sample, target, alpha) for sample in samples]).mean(0)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    apart = torch.stack([_distance(samples[i], samples[j], alpha) for i, j in pairs]).mean(0)
    return near - 0.5 * temperature * apart


def _distance(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """|first − second|^α; the gradient at 0 is 0, where the norm itself has none."""
    squares = (first - second).square().sum(-1)
    return squares.clamp_min(1e-12) ** (alpha / 2)


def uniform_noise(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Noise that is uniform in [−½, ½], in the dtype and on the device of ``like``.

    A generator may be on any device; one on the CPU gives the same noise everywhere.
    """
    device = like.device if generator is None else generator.device
    return (torch.rand(*shape, generator=generator, device=device) - 0.5).to(like)


def split_bands(
    tokens: Tensor, channels: int, level: int
) -> list[tuple[int, Tensor | None, Tensor]]:
    """A token's bands: number, what a head is told before it, and the band itself.

    Args:
        tokens: (..., T, Z or 3Z).
        channels: Z.
        level: of the pyramid; 0: the mean, which is one band.

    Returns:
        A band: number; (..., T, 3Z), zero from this band on, None for the mean; (..., T, Z).
    """
    found: list[tuple[int, Tensor | None, Tensor]] = []
    for band in range(BANDS if level else 1):
        first = band * channels
        known = torch.arange(tokens.shape[-1], device=tokens.device) < first
        before = torch.where(known, tokens, 0.0) if level else None
        found.append((band, before, tokens[..., first : first + channels].float()))
    return found


class HeadBlock(nn.Module):
    """Residual MLP whose norm and gain the noise sets."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp_in = nn.Linear(width, width)
        self.mlp_out = nn.Linear(width, width)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """(..., W) and the embedded noise (..., W) → (..., W)."""
        shift, scale, gain = self.modulation(noise).chunk(3, dim=-1)
        normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
        hidden = F.silu(self.mlp_in(normed * (1 + scale) + shift))
        return x + gain * self.mlp_out(hidden)  # type: ignore[no-any-return]


class EnergyHead(nn.Module):
    """Hidden state and noise in, a token out, in one pass a band.

    A detail's three bands are drawn one after the other, each told what the others before it are:
    vectors of Z numbers, as the mean is.
    """

    def __init__(
        self, width: int, *, channels: int, levels: int, head_width: int, blocks: int, noise: int
    ) -> None:
        """Fresh weights.

        Args:
            width: C, of the hidden states.
            channels: Z, numbers in a band.
            levels: of the pyramid.
            head_width: W.
            blocks: residual blocks.
            noise: N, uniform in [−½, ½] each.
        """
        super().__init__()
        self.channels, self.noise_channels = channels, noise
        self.hidden = nn.Linear(width, head_width)
        self.before = nn.Linear(BANDS * channels, head_width, bias=False)
        self.bands = nn.Embedding(1 + BANDS, head_width)  # the mean's own, then one a band
        self.noise = nn.Linear(noise, head_width)
        self.blocks = nn.ModuleList(HeadBlock(head_width) for _ in range(blocks))
        self.out = nn.ModuleList(
            nn.Linear(head_width, channels) for _ in range(1 + BANDS * (levels - 1))
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.bands.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, HeadBlock)
            nn.init.normal_(block.modulation.weight, std=MODULATION_STD)

    def draw_noise(
        self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """(*shape, N), in the dtype and on the device of ``like``."""
        return uniform_noise((*shape, self.noise_channels), like, generator)

    def band(
        self,
        hidden: Tensor,
        before: Tensor | None,
        noise: Tensor,
        *,
        level: int,
        band: int,
        temperature: float = 1.0,
    ) -> Tensor:
        """Draws one band, or the mean.

        Args:
            hidden: (..., T, C).
            before: (..., T, 3Z), bands drawn before, zero from this one on; None for the mean.
            noise: (..., T, N), or with more dimensions in front: as many draws.
            level: of the pyramid.
            band: 0..2; 0 for the mean.
            temperature: factor of the noise; 0: one and the same for every noise.

        Returns:
            (..., T, Z) with the leading dimensions of ``noise``, in the dtype of ``hidden``.
        """
        x = self.hidden(hidden) + self.bands.weight[1 + band if level else 0]
        if before is not None:
            x = x + self.before(before.to(hidden.dtype))
        modulator = F.silu(self.noise(temperature * noise))
        for block in self.blocks:
            x = block(x, modulator)
        x = F.silu(F.layer_norm(x, x.shape[-1:], eps=NORM_EPS))
        return self.out[1 + BANDS * (level - 1) + band if level else 0](x)  # type: ignore[no-any-return]

    def draw(
        self,
        hidden: Tensor,
        *,
        level: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws tokens: (B, T, C) → (B, T, Z) for the mean, (B, T, 3Z) for details; FP32."""
        shape = tuple(hidden.shape[:-1])
        if level == 0:
            noise = self.draw_noise(shape, hidden, generator)
            return self.band(hidden, None, noise, level=0, band=0, temperature=temperature).float()
        blank = hidden.new_zeros(*shape, self.channels, dtype=torch.float32)
        bands: list[Tensor] = []
        for band in range(BANDS):
            noise = self.draw_noise(shape, hidden, generator)
            before = torch.cat([*bands, *[blank] * (BANDS - band)], dim=-1)
            drawn = self.band(
                hidden, before, noise, level=level, band=band, temperature=temperature
            )
            bands.append(drawn.float())
        return torch.cat(bands, dim=-1)

    def flops(self, level: int) -> int:
        """FLOPs of drawing one token (a multiply-add counts two; matrix products only)."""
        hidden, out = self.hidden, self.out[0]
        assert isinstance(out, nn.Linear)
        width = hidden.out_features
        band = hidden.in_features * width + self.noise_channels * width
        band += len(self.blocks) * 5 * width * width + width * out.out_features
        if level:
            band += BANDS * self.channels * width
        return 2 * band * (BANDS if level else 1)

    def elementwise(self) -> list[nn.Parameter]:
        """Parameters that stand between tokens and the blocks (training)."""
        tables: tuple[nn.Module, ...] = (self.bands, self.before, self.noise, self.out)
        return [p for table in tables for p in table.parameters()]

    def scores(
        self,
        hidden: Tensor,
        tokens: Tensor,
        *,
        level: int,
        samples: int = 2,
        alpha: float = 1.0,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Energy score of every band, each after the true ones before it.

        Args:
            hidden: (B, T, C).
            tokens: (B, T, Z or 3Z), the truth.
            level: of the pyramid.
            samples: M, drawn for each.
            alpha: exponent of the score.
            temperature: weight of the samples' distance from each other.
            generator: of the noise.

        Returns:
            (B, T, 1 or 3), FP32.
        """
        shape = (samples, *hidden.shape[:-1])
        found = []
        for band, before, target in split_bands(tokens, self.channels, level):
            noise = self.draw_noise(shape, hidden, generator)
            drawn = self.band(hidden, before, noise, level=level, band=band).float()
            found.append(energy_score(drawn, target, alpha=alpha, temperature=temperature))
        return torch.stack(found, dim=-1)

"""Heads to compare the energy head with: squared error, a Gaussian, a diffusion.

They take the energy head's place in an :class:`~parscale_ear.generator.ear.EnergyAR`: the same
trunk, the same residual blocks, tokens and bands, other losses. Not for use; for
comparisons.

Shapes: B batch, T tokens, C width of the trunk, Z latent channels, D numbers in a token.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parscale_ear.generator.energy import NORM_EPS, EnergyHead, HeadBlock, split_bands
from parscale_ear.generator.pyramid import BANDS

LOG_DEVIATION_RANGE = (-7.0, 2.0)  # of the Gaussian head
TRAIN_STEPS = 1000  # of the diffusion's noise schedule


class SquaredErrorHead(EnergyHead):
    """Says the mean of what may come: no noise, squared error."""

    def draw_noise(
        self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Zeros."""
        return like.new_zeros(*shape, self.noise_channels)

    def scores(self, hidden: Tensor, tokens: Tensor, *, level: int, **_: object) -> Tensor:
        """Mean squared error of every band, each after the true ones before it: (B, T, 1 or 3)."""
        found = []
        for band, before, target in split_bands(tokens, self.channels, level):
            noise = self.draw_noise(tuple(hidden.shape[:-1]), hidden)
            said = self.band(hidden, before, noise, level=level, band=band).float()
            found.append((said - target).square().mean(-1))
        return torch.stack(found, dim=-1)


class GaussianHead(EnergyHead):
    """Says mean and deviation of every number; likelihood."""

    def __init__(self, *arguments: int, **named: int) -> None:
        """As :class:`EnergyHead`."""
        super().__init__(*arguments, **named)
        self.out = nn.ModuleList(
            nn.Linear(layer.in_features, 2 * layer.out_features)
            for layer in self.out
            if isinstance(layer, nn.Linear)
        )

    def _law(self, hidden: Tensor, before: Tensor | None, level: int, band: int) -> list[Tensor]:
        noise = hidden.new_zeros(*hidden.shape[:-1], self.noise_channels)
        said = super().band(hidden, before, noise, level=level, band=band).float()
        mean, log_deviation = said.chunk(2, dim=-1)
        return [mean, log_deviation.clamp(*LOG_DEVIATION_RANGE)]

    def band(
        self, hidden: Tensor, before: Tensor | None, noise: Tensor, *, level: int, band: int,
        temperature: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Draws one band; ``noise`` is (..., Z), standard Gaussian."""
        mean, log_deviation = self._law(hidden, before, level, band)
        return mean + temperature * log_deviation.exp() * noise.float()

    def draw_noise(
        self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """(*shape, Z), standard Gaussian."""
        return torch.randn(*shape, self.channels, generator=generator, device=like.device)

    def scores(self, hidden: Tensor, tokens: Tensor, *, level: int, **_: object) -> Tensor:
        """Negative log-likelihood a number of every band: (B, T, 1 or 3)."""
        found = []
        for band, before, target in split_bands(tokens, self.channels, level):
            mean, log_deviation = self._law(hidden, before, level, band)
            error = (target - mean) * (-log_deviation).exp()
            nats = 0.5 * error.square() + log_deviation + 0.5 * math.log(2 * math.pi)
            found.append(nats.mean(-1))
        return torch.stack(found, dim=-1)


class DiffusionHead(nn.Module):
    """Removes noise from a whole token step by step.

    After Li et al., "Autoregressive Image Generation without Vector Quantization" (NeurIPS 2024):
    a residual MLP that hidden state and time modulate, a cosine schedule (Nichol and Dhariwal,
    2021), the noise as target, ancestral sampling in ``steps`` steps.
    """

    def __init__(
        self, width: int, *, channels: int, levels: int, head_width: int, blocks: int, noise: int,
        steps: int = 32,
    ) -> None:  # fmt: skip
        """As :class:`EnergyHead`; ``noise`` channels embed the time.

        Args:
            width: C.
            channels: Z.
            levels: of the pyramid.
            head_width: width of the blocks.
            blocks: residual blocks.
            noise: channels of the embedding of time.
            steps: of sampling.
        """
        super().__init__()
        self.channels, self.steps, self.time_channels = channels, steps, noise
        self.hidden = nn.Linear(width, head_width)
        self.time = nn.Sequential(nn.Linear(noise, head_width), nn.SiLU(), nn.Linear(head_width, head_width))  # fmt: skip
        sizes = [channels * (BANDS if level else 1) for level in range(levels)]
        self.input = nn.ModuleList(nn.Linear(size, head_width) for size in sizes)
        self.blocks = nn.ModuleList(HeadBlock(head_width) for _ in range(blocks))
        self.out = nn.ModuleList(nn.Linear(head_width, size) for size in sizes)
        for block in self.blocks:
            assert isinstance(block, HeadBlock)
            nn.init.normal_(block.modulation.weight, std=0.02)
            nn.init.zeros_(block.modulation.bias)
        ticks = torch.arange(TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
        cosine = torch.cos((ticks + 0.008) / 1.008 * math.pi / 2).square()
        # A plain attribute, so that casting the head leaves it as it is.
        self.kept = (cosine / cosine[0]).clamp(1e-5, 1).float()

    def elementwise(self) -> list[nn.Parameter]:
        """Parameters that stand between tokens and the blocks (training)."""
        tables: tuple[nn.Module, ...] = (self.time, self.input, self.out)
        return [p for table in tables for p in table.parameters()]

    def _noise(self, x: Tensor, time: Tensor, hidden: Tensor, level: int) -> Tensor:
        """The noise in ``x``: (..., D), (...,) in 0..TRAIN_STEPS, (..., C) → (..., D)."""
        half = self.time_channels // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, device=x.device) / half)
        angles = time[..., None].float() * rates
        embedded = torch.cat((angles.cos(), angles.sin()), dim=-1).to(hidden.dtype)
        modulator = F.silu(self.time(embedded) + self.hidden(hidden))
        y = self.input[level](x.to(hidden.dtype))
        for block in self.blocks:
            y = block(y, modulator)
        y = F.silu(F.layer_norm(y, y.shape[-1:], eps=NORM_EPS))
        return self.out[level](y).float()  # type: ignore[no-any-return]

    def scores(
        self, hidden: Tensor, tokens: Tensor, *, level: int, samples: int = 2,
        generator: torch.Generator | None = None, **_: object,
    ) -> Tensor:  # fmt: skip
        """Squared error of the noise at ``samples`` times a token, for every band: (B, T, 1 or 3).

        All bands of a token are denoised together, so they have one error.
        """
        shape = (samples, *tokens.shape)
        time = torch.randint(
            1, TRAIN_STEPS + 1, shape[:-1], generator=generator, device=tokens.device
        )
        kept = self.kept.to(tokens.device)[time][..., None]
        noise = torch.randn(shape, generator=generator, device=tokens.device)
        x = kept.sqrt() * tokens + (1 - kept).sqrt() * noise
        said = self._noise(x, time, hidden, level)
        error = (said - noise).square().mean(-1).mean(0)[..., None]
        return error.expand(-1, -1, BANDS if level else 1)  # tokens weigh as with the other heads

    def draw(
        self, hidden: Tensor, *, level: int, temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Draws tokens: (B, T, C) → (B, T, D), FP32."""
        shape, device = hidden.shape[:-1], hidden.device
        size = self.out[level].out_features
        assert isinstance(size, int)
        x = torch.randn(*shape, size, generator=generator, device=device)
        # Plain numbers: a number on the GPU would be waited for at every step.
        times = torch.linspace(TRAIN_STEPS, 0, self.steps + 1).round().long()
        schedule = self.kept[times].double().tolist()
        for (now, kept), (_, kept_then) in pairwise(zip(times.tolist(), schedule, strict=True)):
            noise = self._noise(x, torch.full(shape, now, device=device), hidden, level)
            clean = (x - (1 - kept) ** 0.5 * noise) / kept**0.5
            clean = clean.clamp(-6, 6)  # tokens have unit variance
            ratio = kept / kept_then
            towards = kept_then**0.5 * (1 - ratio) / (1 - kept)
            mean = towards * clean + ratio**0.5 * (1 - kept_then) / (1 - kept) * x
            deviation = max(0.0, (1 - kept_then) / (1 - kept) * (1 - ratio)) ** 0.5
            fresh = torch.randn(*shape, size, generator=generator, device=device)
            x = mean + temperature * deviation * fresh  # the last step has no deviation
        return x

"""Multi-scale residual vector quantisation of a feature map.

Source: Tian et al., "Visual Autoregressive Modeling" (NeurIPS 2024), algorithms 1 and 2.

Shapes: B batch, Z channels, h w latent height and width, K scales, T tokens of a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parscale_ear.device import exact_fp32
from parscale_ear.generator.precision import KeepsFloat32

COMMITMENT = 0.25  # weight of the latent's move towards its quantised form
PHI_SHARE = 0.5  # of the convolution's output in φ; the rest is its input


class MultiScaleQuantizer(KeepsFloat32):
    """Tokens of growing side whose looked-up vectors, resized and smoothed, sum up to a latent.

    Works in FP32 whatever the dtype of its input, under autocast too: the nearest vector must not
    hang on rounding.
    """

    def __init__(self, vocabulary: int, channels: int, sides: Sequence[int], phis: int) -> None:
        """Fresh weights.

        Args:
            vocabulary: vectors in the codebook.
            channels: of a vector.
            sides: of the token maps, coarse to fine; the last is the latent's.
            phis: smoothing convolutions that the scales share.
        """
        super().__init__()
        self.sides = tuple(sides)
        self.codebook = nn.Embedding(vocabulary, channels)
        self.phi = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in range(phis)
        )
        edge = 1 / 3 / phis if phis == 4 else 1 / 2 / phis  # as the authors place the ticks
        self._ticks = np.linspace(edge, 1 - edge, phis)

    @property
    def channels(self) -> int:
        """Z."""
        return self.codebook.embedding_dim

    @contextmanager
    def _exactly(self) -> Iterator[None]:
        """Keeps autocast and TF32 out."""
        with torch.autocast(self.codebook.weight.device.type, enabled=False), exact_fp32():
            yield

    def _smooth(self, scale: int, features: Tensor) -> Tensor:
        """φ of a scale: the convolution whose tick is nearest to the scale's place in 0..1."""
        place = scale / max(1, len(self.sides) - 1)
        phi = self.phi[int(np.argmin(np.abs(self._ticks - place)))]
        assert isinstance(phi, nn.Conv2d)
        assert phi.bias is not None
        smoothed = F.conv2d(features, phi.weight.float(), phi.bias.float(), padding=1)
        return features * (1 - PHI_SHARE) + smoothed * PHI_SHARE

    def contribution(self, scale: int, tokens: Tensor) -> Tensor:
        """What the tokens of one scale add to the latent: (B, T) → (B, Z, h, w), FP32."""
        side, full = self.sides[scale], self.sides[-1]
        with self._exactly():
            vectors = self.codebook(tokens).float()  # (B, T, Z)
            features = vectors.transpose(1, 2).unflatten(2, (side, side))  # (B, Z, side, side)
            if side != full:
                features = F.interpolate(features.contiguous(), size=(full, full), mode="bicubic")
            return self._smooth(scale, features)

    def resized(self, scale: int, latent: Tensor) -> Tensor:
        """The latent so far at the side of a scale, as tokens: (B, Z, h, w) → (B, T, Z)."""
        side = self.sides[scale]
        small = F.interpolate(latent, size=(side, side), mode="area")
        return small.flatten(2).transpose(1, 2)

    def _nearest(self, vectors: Tensor) -> Tensor:
        """Numbers of the nearest codebook vectors: (n, Z) → (n,)."""
        codebook = self.codebook.weight.float()
        with self._exactly():
            distances = (
                vectors.square().sum(1, keepdim=True)
                + codebook.square().sum(1)
                - 2 * vectors @ codebook.T
            )  # (n, V)
        return distances.argmin(dim=1)

    def encode(
        self, latent: Tensor, observe: Callable[[Tensor, Tensor], object] | None = None
    ) -> list[Tensor]:
        """Quantises a latent.

        Args:
            latent: (B, Z, h, w).
            observe: called a scale with the vectors that were looked up, (B · side², Z), and
                their tokens, (B · side²,).

        Returns:
            Tokens a scale, (B, side²) int64 each.
        """
        rest = latent.float()
        tokens = []
        for scale in range(len(self.sides)):
            vectors = self.resized(scale, rest)  # (B, T, Z)
            flat = vectors.flatten(0, 1)
            nearest = self._nearest(flat)
            if observe is not None:
                observe(flat, nearest)
            nearest = nearest.view(vectors.shape[:2])
            tokens.append(nearest)
            rest = rest - self.contribution(scale, nearest)
        return tokens

    def quantise(
        self, latent: Tensor, observe: Callable[[Tensor, Tensor], object] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Quantises with gradients, for training.

        Args:
            latent: (B, Z, h, w).
            observe: as for :meth:`encode`.

        Returns:
            The sum of all scales' contributions, (B, Z, h, w), whose gradient passes to ``latent``
            as it is (straight through); and the loss that draws the sums towards the latent and,
            with a quarter of the weight, the latent towards the sums, mean over scales (van den
            Oord et al., "Neural Discrete Representation Learning", 2017, equation 3).
        """
        latent = latent.float()
        total = torch.zeros_like(latent)
        losses = []
        for scale, tokens in enumerate(self.encode(latent.detach(), observe)):
            total = total + self.contribution(scale, tokens)
            codebook = F.mse_loss(total, latent.detach())
            losses.append(codebook + COMMITMENT * F.mse_loss(total.detach(), latent))
        return latent + (total - latent).detach(), torch.stack(losses).mean()

    def decode(self, tokens: Sequence[Tensor]) -> Tensor:
        """The latent that tokens of all scales, or of the first few, stand for: (B, Z, h, w)."""
        return torch.stack([self.contribution(k, t) for k, t in enumerate(tokens)]).sum(0)

    def teacher_input(self, tokens: Sequence[Tensor]) -> Tensor:
        """What the scales behind the first see when all tokens are known.

        Args:
            tokens: of all scales; the last is not looked at.

        Returns:
            (B, L − T₀, Z), FP32: for every scale the sum of the coarser ones at its side.
        """
        full = self.sides[-1]
        latent = torch.zeros(tokens[0].shape[0], self.channels, full, full, device=tokens[0].device)
        inputs = []
        for scale in range(len(self.sides) - 1):
            latent = latent + self.contribution(scale, tokens[scale])
            inputs.append(self.resized(scale + 1, latent))
        if not inputs:
            return latent.new_zeros(tokens[0].shape[0], 0, self.channels)
        return torch.cat(inputs, dim=1)

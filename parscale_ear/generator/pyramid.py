"""A latent as a sequence of continuous tokens, coarse to fine, and back without loss.

The Haar transform of a latent is its mean and, level by level, the details that the coarser ones do
not explain: three bands (across rows, across columns, both) for every cell that splits in four.
A token is one cell's three bands together, so a token is a vector of 3Z numbers and none is
redundant: an 8×8 latent has 1 + 1 + 4 + 16 tokens instead of the 1 + 4 + 16 + 64 of a pyramid of
upsampled sums (Tian et al., "Visual Autoregressive Modeling", 2024), and a draw of independent
tokens cannot contradict what the coarser scales have said.

A scale is what is drawn in one pass. The finest level may be drawn in several: first the cells at
even rows and columns, then those diagonally between, then the rest, so that a cell knows its
neighbours.

Shapes: B batch, Z latent channels, S side of the latent, s side of a level's cells, T tokens of a
scale, I input channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from parscale_ear.autoencoder.wavelet import haar_dwt, haar_idwt
from parscale_ear.checks import check_whole
from parscale_ear.generator.precision import KeepsFloat32

BANDS = 3  # of a detail
PHASES = {  # rows and columns (modulo 2) of the cells that are drawn together
    1: (((0, 0), (0, 1), (1, 0), (1, 1)),),
    2: (((0, 0), (1, 1)), ((0, 1), (1, 0))),
    4: (((0, 0),), ((1, 1),), ((0, 1),), ((1, 0),)),
}


@dataclass(frozen=True)
class Scale:
    """What is drawn in one pass."""

    level: int  # 0: the mean; 1, 2 ...: details of cells of growing number
    side: int  # cells of the level, a side
    cells: tuple[int, ...]  # which of them, row by row


@dataclass
class Canvas:
    """What is known so far in a generation."""

    coarse: Tensor  # (B, Z, s, s): the latent in orthonormal coefficients, down to this level
    details: Tensor  # (B, 3Z, s, s), normalised, zero where not yet drawn
    drawn: Tensor  # (s · s,), whether a cell is drawn


class LatentPyramid(KeepsFloat32):
    """The transform and its normalisation: every coefficient has about unit variance."""

    def __init__(self, channels: int, side: int, phases: int = 4) -> None:
        """Sets up the scales.

        Args:
            channels: Z.
            side: S, a power of two from 2 on.
            phases: passes of the finest level: 1, 2 or 4.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__()
        check_whole(1, channels=channels, side=side)
        if side < 2 or side & (side - 1):
            raise ValueError(f"side must be a power of two from 2 on, got {side}")
        if phases not in PHASES:
            raise ValueError(f"phases must be 1, 2 or 4, got {phases}")
        self.channels, self.side = channels, side
        self.levels = side.bit_length()  # the mean, then a level a doubling
        self.scales = [Scale(0, 1, (0,))]
        for level in range(1, self.levels):
            cells = 2 ** (level - 1)
            finest = level == self.levels - 1 and cells > 1
            for phase in PHASES[phases if finest else 1]:
                chosen = [
                    row * cells + column
                    for row in range(cells)
                    for column in range(cells)
                    if (row % 2, column % 2) in phase
                ]
                self.scales.append(Scale(level, cells, tuple(chosen)))
        for level in range(self.levels):
            wide = self.width(level)
            self.register_buffer(f"mean{level}", torch.zeros(wide, 1, 1, dtype=torch.float32))
            self.register_buffer(f"std{level}", torch.ones(wide, 1, 1, dtype=torch.float32))

    def width(self, level: int) -> int:
        """Numbers in a token of a level."""
        return self.channels * (BANDS if level else 1)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of every scale."""
        return tuple(len(scale.cells) for scale in self.scales)

    @property
    def input_channels(self) -> int:
        """I: what a token is told of its 3×3 neighbourhood: coarse, details, and what is drawn."""
        return 9 * (self.channels * (1 + BANDS) + 1)

    def _statistics(self, level: int) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"mean{level}"), self.get_buffer(f"std{level}")

    def _levels(self, latent: Tensor) -> list[Tensor]:
        """Orthonormal coefficients: the mean (B, Z, 1, 1), then details (B, 3Z, s, s)."""
        found: list[Tensor] = []
        for _ in range(self.levels - 1):
            bands = haar_dwt(latent)
            latent, details = bands.split((self.channels, BANDS * self.channels), dim=1)
            found.append(details)
        return [latent, *reversed(found)]

    def fit(self, latents: Tensor) -> None:
        """Takes mean and deviation of every coefficient from (N, Z, S, S) latents.

        Raises:
            ValueError: latents of another shape, or fewer than two, which have no deviation.
        """
        self._check(latents)
        if len(latents) < 2:
            raise ValueError(f"at least two latents are needed, got {len(latents)}")
        for level, values in enumerate(self._levels(latents.float())):
            mean, std = self._statistics(level)
            mean.copy_(values.mean((0, 2, 3))[:, None, None])
            std.copy_(values.std((0, 2, 3))[:, None, None].clamp_min(1e-6))

    def _check(self, latent: Tensor) -> None:
        expected = (self.channels, self.side, self.side)
        if latent.ndim != 4 or tuple(latent.shape[1:]) != expected:
            raise ValueError(f"latents must be (B, {expected}), got {tuple(latent.shape)}")

    def encode(self, latent: Tensor) -> list[Tensor]:
        """Tokens of all scales.

        Args:
            latent: (B, Z, S, S).

        Returns:
            (B, T, Z or 3Z) a scale, FP32, of about zero mean and unit variance.

        Raises:
            ValueError: another shape.
        """
        self._check(latent)
        levels = self._normalised(latent)
        return [
            levels[scale.level].flatten(2)[:, :, list(scale.cells)].transpose(1, 2)
            for scale in self.scales
        ]

    def _normalised(self, latent: Tensor) -> list[Tensor]:
        found = []
        for level, values in enumerate(self._levels(latent.float())):
            mean, std = self._statistics(level)
            found.append((values - mean) / std)
        return found

    def decode(self, tokens: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`encode`: (B, Z, S, S), FP32."""
        canvas = self.start(tokens[0])
        for number, part in enumerate(tokens[1:], start=1):
            canvas = self.put(canvas, number, part)
        return self.finish(canvas)

    # --- the inputs of a scale: what is known before it ---

    def teacher_input(
        self, latent: Tensor, noise: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Inputs of all scales but the first, when the latent is known.

        Args:
            latent: (B, Z, S, S).
            noise: largest deviation of Gaussian noise on what is known, drawn a picture and
                scale, so that a model learns to go on from draws that are a little off.
            generator: of that noise.

        Returns:
            (B, L − 1, I).
        """
        tokens = self.encode(latent)
        canvas = self.start(tokens[0])
        parts = []
        for number, scale in enumerate(self.scales[1:], start=1):
            canvas = self._at(canvas, scale)
            seen = canvas
            if noise:
                gain, drawn = self._gain(scale), canvas.drawn.view(scale.side, scale.side)
                seen = Canvas(
                    _noisy(canvas.coarse * gain, noise, generator) / gain,
                    _noisy(canvas.details, noise, generator) * drawn,
                    canvas.drawn,
                )
            parts.append(self._neighbourhoods(seen, scale))
            canvas = self.put(canvas, number, tokens[number])
        return torch.cat(parts, dim=1)

    def _gain(self, scale: Scale) -> float:
        """From orthonormal coefficients to means of the latent."""
        return scale.side / self.side

    def _neighbourhoods(self, canvas: Canvas, scale: Scale) -> Tensor:
        """(B, T, I): the 3×3 cells around each that is to be drawn, zero beyond the border."""
        rows, side = len(canvas.coarse), scale.side
        drawn = canvas.drawn.to(canvas.coarse.dtype).view(1, 1, side, side).expand(rows, -1, -1, -1)
        known = torch.cat((canvas.coarse * self._gain(scale), canvas.details, drawn), dim=1)
        around = F.unfold(known, 3, padding=1)  # (B, I, s · s)
        return around[:, :, list(scale.cells)].transpose(1, 2)

    def start(self, token: Tensor) -> Canvas:
        """The canvas behind the first scale's token (B, 1, Z)."""
        mean, std = self._statistics(0)
        coarse = token.float().transpose(1, 2).unsqueeze(-1) * std + mean  # (B, Z, 1, 1)
        return self._blank(coarse)

    def _blank(self, coarse: Tensor) -> Canvas:
        rows, _, side, _ = coarse.shape
        return Canvas(
            coarse,
            coarse.new_zeros(rows, BANDS * self.channels, side, side),
            torch.zeros(side * side, dtype=torch.bool, device=coarse.device),
        )

    def _at(self, canvas: Canvas, scale: Scale) -> Canvas:
        """The canvas at the level of a scale: the next one if its own is full."""
        if canvas.coarse.shape[-1] == scale.side:
            return canvas
        return self._blank(self.finish(canvas))

    def inputs(self, canvas: Canvas, scale: int) -> Tensor:
        """Inputs of a scale, (B, T, I)."""
        step = self.scales[scale]
        return self._neighbourhoods(self._at(canvas, step), step)

    def put(self, canvas: Canvas, scale: int, tokens: Tensor) -> Canvas:
        """The canvas with a scale's tokens (B, T, 3Z) in it."""
        step = self.scales[scale]
        canvas = self._at(canvas, step)
        details, drawn = canvas.details.flatten(2).clone(), canvas.drawn.clone()
        cells = list(step.cells)
        details[:, :, cells] = tokens.transpose(1, 2).to(details.dtype)
        drawn[cells] = True
        return Canvas(canvas.coarse, details.view_as(canvas.details), drawn)

    def finish(self, canvas: Canvas) -> Tensor:
        """One level finer: what is not drawn is taken at its mean. (B, Z, 2s, 2s)."""
        level = canvas.coarse.shape[-1].bit_length()
        mean, std = self._statistics(level)
        return haar_idwt(torch.cat((canvas.coarse, canvas.details * std + mean), dim=1))

    def preview(self, canvas: Canvas) -> Tensor:
        """The whole latent as it is known so far, finer details at their mean: (B, Z, S, S)."""
        latent = self.finish(canvas)
        while latent.shape[-1] < self.side:
            latent = self.finish(self._blank(latent))
        return latent


def _noisy(values: Tensor, largest: float, generator: torch.Generator | None) -> Tensor:
    """Adds Gaussian noise of a deviation that is drawn a picture, 0..``largest``."""
    device = values.device if generator is None else generator.device
    strength = torch.rand(len(values), 1, 1, 1, generator=generator, device=device)
    noise = strength * torch.randn(values.shape, generator=generator, device=device)
    return values + largest * noise.to(values)

"""The Gaussian posterior that the encoder gives.

Shapes: B batch, Z latent channels, h w latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentPosterior:
    """A diagonal Gaussian over the normalised latent.

    ``mean`` is (B, Z, h, w) and normalised: about zero mean and unit variance per channel.
    """

    mean: Tensor  # normalised
    log_variance: Tensor  # of the normalised latent
    _shift: Tensor  # (Z, 1, 1): a channel's mean before normalising
    _scale: Tensor  # (Z, 1, 1): a channel's deviation before normalising

    def mode(self) -> Tensor:
        """The likeliest latent, (B, Z, h, w): the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws a latent, (B, Z, h, w).

        Args:
            generator: source of randomness. One on the CPU works with a model on any device and
                then gives the same noise everywhere.

        Raises:
            TypeError: ``generator`` is neither a generator nor None.
        """
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(
            self.mean.shape, generator=generator, device=device, dtype=torch.float32
        ).to(self.mean)
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        """KL divergence to N(0, 1) in nats, (B, Z, h, w), taken before normalising, in FP32."""
        mean = self.mean.float() * self._scale.float() + self._shift.float()
        log_variance = self.log_variance.float() + 2 * self._scale.float().log()
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)

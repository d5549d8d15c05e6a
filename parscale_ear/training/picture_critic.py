"""A critic of drawn pictures that looks through a pretrained network.

Small networks on the feature maps of a frozen one tell real pictures from drawn ones, and are
trained as these change: after Sauer et al., "Projected GANs Converge Faster" (NeurIPS 2021), here
for a class-conditional generator by projection (Miyato and Koyama, "cGANs with Projection
Discriminator", ICLR 2018), with spectral norms (Miyato et al., 2018) and one more head that looks
at the latent itself. Every head is also told how much the pictures of a class in a batch differ,
after Karras et al., "Progressive Growing of GANs" (ICLR 2018), there for a whole batch: pictures of
a class that are all alike give themselves away.

Shapes: B batch, C channels, H W positions of a map, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

LEAK = 0.2
MAPS = (
    (24, 48, 2),
    (40, 64, 1),
    (112, 96, 0),
    (320, 128, 0),
)  # of Lite0: channels, width, halvings
LATENT_WIDTH = 128
FLOOR = 1e-2  # of a channel's deviation


class CriticHead(nn.Module):
    """Tells real from drawn at every position of one map."""

    deviation: Tensor

    def __init__(self, channels: int, width: int, halvings: int, classes: int) -> None:
        """Fresh weights.

        Args:
            channels: C.
            width: of its layers.
            halvings: strided layers.
            classes: labels are 0..classes − 1.
        """
        super().__init__()
        layers: list[nn.Module] = [spectral_norm(nn.Conv2d(channels, width, 1))]
        for _ in range(halvings):
            layers += [nn.LeakyReLU(LEAK), spectral_norm(nn.Conv2d(width, width, 4, 2, 1))]
        self.layers = nn.Sequential(*layers, nn.LeakyReLU(LEAK))
        last = spectral_norm(nn.Conv2d(width + 1, width, 3, padding=1))
        self.last = nn.Sequential(last, nn.LeakyReLU(LEAK))
        self.out = spectral_norm(nn.Conv2d(width, 1, 1))
        self.classes = spectral_norm(nn.Embedding(classes, width))
        self.register_buffer("deviation", torch.ones(1, channels, 1, 1))

    def forward(self, values: Tensor, labels: Tensor, group: int) -> Tensor:
        """(B, C, H, W) and (B,) → (B, positions), FP32, above 0 for a real picture.

        Args:
            values: pictures of a class behind one another.
            labels: their classes.
            group: pictures of a class.
        """
        scaled = (values / self.deviation).contiguous(memory_format=torch.channels_last)
        hidden = self.layers(scaled)
        hidden = self.last(torch.cat((hidden, _differences(hidden, group)), dim=1))
        of_class = (hidden * self.classes(labels)[:, :, None, None]).sum(1, keepdim=True)
        scores: Tensor = (self.out(hidden) + of_class).float().flatten(1)
        return scores


def _differences(values: Tensor, group: int) -> Tensor:
    """Deviation within each group, mean over channels: (B, W, H, W) → (B, 1, H, W)."""
    groups = values.float().unflatten(0, (-1, group))  # (B / group, group, W, H, W)
    deviation = (groups.var(1, correction=0) + FLOOR**2).sqrt().mean(1, keepdim=True)
    spread: Tensor = deviation.repeat_interleave(group, dim=0).to(values)
    return spread


class PictureCritic(nn.Module):
    """Heads on four of Lite0's feature maps, and one on the latent."""

    def __init__(self, channels: int, classes: int) -> None:
        """Fresh weights.

        Args:
            channels: of the latent.
            classes: labels are 0..classes − 1.
        """
        super().__init__()
        sizes = (*MAPS, (channels, LATENT_WIDTH, 0))
        self.heads = nn.ModuleList(CriticHead(*size, classes) for size in sizes)
        for head in self.heads:
            head.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def fit(self, maps: Sequence[Tensor]) -> None:
        """Takes the scale of every channel from maps of real pictures, as for :meth:`forward`."""
        for head, values in zip(self.heads, maps, strict=True):
            assert isinstance(head, CriticHead)
            head.deviation.copy_(values.float().std((0, 2, 3))[None, :, None, None] + FLOOR)

    def forward(self, maps: Sequence[Tensor], labels: Tensor, group: int) -> list[Tensor]:
        """Scores of four maps and the latent.

        Args:
            maps: (B, C, H, W) each; pictures of a class behind one another.
            labels: (B,), their classes.
            group: pictures of a class.

        Returns:
            A head (B, positions).
        """
        return [head(values, labels, group) for head, values in zip(self.heads, maps, strict=True)]

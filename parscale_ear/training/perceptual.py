"""What the sharp decoder is trained with: a feature loss and a small critic.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parscale_ear.autoencoder.wavelet import haar_dwt
from parscale_ear.training.lite_maps import LiteMaps

_EPSILON = 1e-6


class FeatureLoss(nn.Module):
    """Distance between two pictures in the feature maps of EfficientNet-Lite0.

    After Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
    (CVPR 2018), without their learned weights: at every resolution the feature vectors are brought
    to unit length, and their squared differences averaged over positions. The last term compares
    the pooled features, which a Fréchet distance is made of. Lite0 takes part in training, so it
    must not judge the result.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Loads Lite0.

        Raises:
            FeatureError: its packages are missing.
        """
        super().__init__()
        self.maps = LiteMaps(device)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """How far two batches of pictures look from each other.

        Args:
            output: (B, 3, H, W) in about [−1, 1]; the gradient goes through it.
            target: the same shape, in [−1, 1].

        Returns:
            A scalar, in FP32; 0 for equal pictures.
        """
        ours = self.maps(output)
        with torch.no_grad():
            theirs = self.maps(target)
        loss = torch.zeros((), device=output.device)
        for a, b in zip(ours[:-1], theirs[:-1], strict=True):
            a, b = a.float(), b.float()
            scale_a = torch.rsqrt(a.square().sum(dim=1, keepdim=True) + _EPSILON)
            scale_b = torch.rsqrt(b.square().sum(dim=1, keepdim=True) + _EPSILON)
            loss = loss + (a * scale_a - b * scale_b).square().sum(dim=1).mean()
        pooled_a, pooled_b = (m[-1].float().mean(dim=(2, 3)) for m in (ours, theirs))
        relative = (pooled_a - pooled_b).square().sum(1) / (pooled_b.square().sum(1) + _EPSILON)
        total: Tensor = loss + relative.mean()
        return total


class Critic(nn.Module):
    """Tells photographs from reconstructions, patch by patch, on Haar sub-bands.

    A patch critic after Isola et al., "Image-to-Image Translation with Conditional Adversarial
    Networks" (CVPR 2017); it sees two levels of Haar packets, so it is cheap and looks at fine
    texture first.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(48, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [−1, 1] → (B, 1, H/8, W/8), above 0 for a photograph."""
        return self.layers(haar_dwt(images, 2))  # type: ignore[no-any-return]

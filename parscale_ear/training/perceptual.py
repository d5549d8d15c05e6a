"""What the sharp decoder is trained with: a feature loss and a small adversary.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parscale_ear.autoencoder.wavelet import haar_dwt
from parscale_ear.metrics.features import EfficientNetLite
from parscale_ear.training.distributed import World
from parscale_ear.training.optimizer import pack_optimizer, unpack_optimizer

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
        network = EfficientNetLite(0, device)
        self.mean, self.std = network.mean, network.std
        self.network = network.model.requires_grad_(False)
        blocks = list(self.network._blocks)  # type: ignore[arg-type]
        strides = [b._block_args.stride for b in blocks]
        # A feature map is taken where the next block halves the resolution, and at the end.
        self.taken = [
            k for k in range(len(blocks)) if k + 1 == len(blocks) or _halves(strides[k + 1])
        ]
        self.blocks = blocks

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps of (B, 3, H, W) in [−1, 1], from fine to coarse, and the last one's head."""
        net = self.network
        x = (images * 0.5 + (0.5 - self.mean)) / self.std
        x = net._swish(net._bn0(net._conv_stem(x)))  # type: ignore[operator]
        maps = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.taken:
                maps.append(x)
        x = net._swish(net._bn1(net._conv_head(x)))  # type: ignore[operator]
        return [*maps, x]

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """A scalar, in FP32."""
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
        return loss + relative.mean()


def _halves(stride: int | Sequence[int]) -> bool:
    return (stride if isinstance(stride, int) else stride[0]) > 1


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


def critic_loss(critic: Critic, real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the critic; a scalar, in FP32."""
    scores = critic(torch.cat((real, fake.detach()))).float()
    on_real, on_fake = scores.chunk(2)
    return 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())


def adversarial_loss(critic: Critic, fake: Tensor) -> Tensor:
    """What a reconstruction is charged for being recognised; a scalar, in FP32."""
    scores: Tensor = critic(fake)
    return -scores.float().mean()


class Adversary:
    """The critic with its optimizer; trained a step for every step of the decoder."""

    WARMUP_STEPS = 200  # before its verdict counts

    def __init__(self, rate: float, world: World, width: int = 64) -> None:
        self.world = world
        self.critic = Critic(width).to(world.device)
        self.optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr=rate, betas=(0.5, 0.95), weight_decay=0.0
        )
        self.last_loss = torch.zeros(())

    def step(self, step: int, real: Tensor, fake: Tensor) -> Tensor:
        """Trains the critic, then gives what the reconstruction is charged; a scalar."""
        self.critic.requires_grad_(True)
        with self._precision(fake):
            loss = critic_loss(self.critic, real, fake)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if self.world.size > 1:
            self.world.mean_(p.grad for p in self.critic.parameters() if p.grad is not None)
        self.optimizer.step()
        self.last_loss = loss.detach()
        self.critic.requires_grad_(False)
        with self._precision(fake):
            verdict = adversarial_loss(self.critic, fake)
        return verdict * min(1.0, step / self.WARMUP_STEPS)

    def _precision(self, x: Tensor) -> torch.autocast:
        """FP16 becomes FP32: the critic's losses are not scaled."""
        kind = x.device.type
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        dtype = torch.get_autocast_dtype(kind)
        enabled = torch.is_autocast_enabled(kind) and not half
        return torch.autocast(kind, torch.bfloat16 if half else dtype, enabled=enabled)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and scalars for a checkpoint."""
        tensors, scalars = pack_optimizer(self.optimizer)
        critic = {f"critic.{k}": v for k, v in self.critic.state_dict().items()}
        return {**critic, **tensors}, scalars

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Takes up what ``state`` gave."""
        self.critic.load_state_dict(
            {k.removeprefix("critic."): v for k, v in tensors.items() if k.startswith("critic.")}
        )
        unpack_optimizer(self.optimizer, tensors, scalars)

"""Training against a critic: the hinge losses of both sides, and the critic's own steps.

Source: Lim and Ye, "Geometric GAN" (2017), for the hinge.

Shapes: B real and B made pictures; a critic's scores are above 0 for what it takes for real.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parscale_ear.training.distributed import World
from parscale_ear.training.optimizer import pack_optimizer, unpack_optimizer

Scores = Callable[[], Sequence[Tensor]]  # of every head of a critic


def critic_loss(scores: Sequence[Tensor]) -> Tensor:
    """Hinge loss of a critic, mean over its heads; a scalar, in FP32.

    Args:
        scores: (2B, ...) a head; the first half of real pictures, the second of made ones.
    """
    losses = []
    for part in scores:
        real, made = part.float().chunk(2)
        losses.append(0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean()))
    return torch.stack(losses).mean()


def adversarial_loss(scores: Sequence[Tensor]) -> Tensor:
    """What made pictures are charged for being recognised; a scalar, in FP32.

    Args:
        scores: (B, ...) a head, of made pictures.
    """
    return -torch.stack([part.float().mean() for part in scores]).mean()


def told_apart(scores: Sequence[Tensor]) -> Tensor:
    """Share of scores on the right side of 0, mean over heads; shapes as :func:`critic_loss`."""
    halves = [part.detach().float().chunk(2) for part in scores]
    shares = [(real > 0).float().mean() + (made < 0).float().mean() for real, made in halves]
    return 0.5 * torch.stack(shares).mean()


class Adversary:
    """A critic with its optimizer; trained a step for every step of what it judges."""

    def __init__(
        self,
        critic: nn.Module,
        rate: float,
        world: World,
        *,
        betas: tuple[float, float],
        warmup_steps: int,
    ) -> None:
        """Takes a fresh critic; all processes get the first one's.

        Args:
            critic: on the world's device.
            rate: learning rate of Adam.
            world: the processes that train together.
            betas: of Adam.
            warmup_steps: in which the weight of its verdict rises from 0 to 1.
        """
        self.critic, self.world, self.warmup_steps = critic, world, warmup_steps
        world.share_(critic.state_dict().values())
        self.optimizer = torch.optim.AdamW(
            critic.parameters(), lr=rate, betas=betas, weight_decay=0.0
        )
        self.last_loss = self.told_apart = torch.zeros(())  # of the last step

    def step(self, step: int, both: Scores, made: Scores) -> Tensor:
        """Trains the critic, then gives what the made pictures are charged.

        Args:
            step: number of the step.
            both: scores real pictures and made ones without their gradients, (2B, ...) a head;
                what they are must be FP32, or have autocast's dtype.
            made: the same for made pictures, (B, ...) a head.

        Returns:
            A scalar that has a gradient in the pictures and none in the critic.
        """
        self.critic.requires_grad_(True)
        with self._precision():
            scores = both()
        loss = critic_loss(scores)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if self.world.size > 1:
            self.world.mean_(p.grad for p in self.critic.parameters() if p.grad is not None)
        self.optimizer.step()
        self.last_loss, self.told_apart = loss.detach(), told_apart(scores)
        self.critic.requires_grad_(False)
        with self._precision():
            verdict = adversarial_loss(made())
        return verdict * min(1.0, step / self.warmup_steps)

    def _precision(self) -> torch.autocast:
        """FP16 becomes FP32: the critic's losses are not scaled."""
        kind = self.world.device.type
        dtype = torch.get_autocast_dtype(kind)
        enabled = torch.is_autocast_enabled(kind) and dtype != torch.float16
        return torch.autocast(kind, dtype if enabled else None, enabled=enabled)

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


class WithAdversary:
    """A task that stores nothing but its model and, if it has one, its critic."""

    adversary: Adversary | None = None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The critic's."""
        return self.adversary.state() if self.adversary is not None else ({}, {})

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Takes up what ``state`` gave."""
        if self.adversary is not None:
            self.adversary.load_state(tensors, scalars)

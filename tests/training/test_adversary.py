from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import Tensor, nn

from parscale_ear.data.images import from_uint8
from parscale_ear.training.adversary import Adversary, adversarial_loss, critic_loss, told_apart
from parscale_ear.training.distributed import OneProcess
from parscale_ear.training.perceptual import Critic
from parscale_ear.training.picture_critic import MAPS, PictureCritic


def against(critic: nn.Module) -> Adversary:
    world = OneProcess(torch.device("cpu"))
    return Adversary(critic, 1e-3, world, betas=(0.5, 0.95), warmup_steps=10)


def blurred(x: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=False)


def test_losses_follow_the_hinge() -> None:
    scores = [
        torch.tensor([[2.0], [0.5], [-2.0], [0.0]]),
        torch.tensor([[1.0], [1.0], [1.0], [-1.0]]),
    ]
    first = 0.5 * (0.25 + 0.5)
    second = 0.5 * (0.0 + 1.0)
    assert float(critic_loss(scores)) == pytest.approx((first + second) / 2)
    assert float(adversarial_loss(scores)) == pytest.approx(-(0.125 + 0.5) / 2)
    assert float(told_apart(scores)) == pytest.approx((0.75 + 0.75) / 2)


def test_the_critic_learns_to_tell_and_its_verdict_has_a_gradient(photographs: Tensor) -> None:
    torch.manual_seed(0)
    critic = Critic(8)
    adversary = against(critic)
    real = from_uint8(photographs[:4, :, :64, :64])
    made = blurred(real)

    def both() -> list[Tensor]:
        return [critic(torch.cat((real, made)))]

    first = critic_loss(both()).item()
    for step in range(30):
        adversary.step(step, both, lambda: [critic(made)])
    assert critic_loss(both()).item() < 0.7 * first
    output = made.clone().requires_grad_()
    adversary.step(500, both, lambda: [critic(output)]).backward()
    assert output.grad is not None
    assert output.grad.abs().sum() > 0
    assert all(p.requires_grad is False for p in critic.parameters())
    # A critic that has learnt nothing is not heard.
    assert float(adversary.step(0, both, lambda: [critic(made)])) == 0


@pytest.mark.parametrize("kind", ["patches", "pictures"])
def test_the_adversary_goes_on_where_it_stopped(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(24, 16), (40, 8), (112, 4), (320, 2), (32, 4)]
    maps = [torch.randn(4, c, s, s, generator=generator) for c, s in sizes]
    images, labels = torch.rand(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 0, 1])

    def scores(critic: nn.Module, rows: slice) -> Sequence[Tensor]:
        if kind == "patches":
            return [critic(images[rows])]
        return critic([part[rows] for part in maps], labels[rows], 2)  # type: ignore[no-any-return]

    pair = [against(Critic(8) if kind == "patches" else PictureCritic(32, 2)) for _ in range(2)]
    first, second = pair
    step = first.step(0, lambda: scores(first.critic, slice(None)), lambda: scores(first.critic, slice(2, 4)))  # fmt: skip
    assert step.ndim == 0
    second.load_state(*copy.deepcopy(first.state()))
    for adversary in pair:
        critic = adversary.critic
        adversary.step(1, lambda c=critic: scores(c, slice(None)), lambda c=critic: scores(c, slice(2, 4)))  # type: ignore[misc]  # fmt: skip
    for a, b in zip(first.critic.state_dict().values(), second.critic.state_dict().values(), strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_the_picture_critic_looks_at_every_map_and_at_the_class() -> None:
    torch.manual_seed(0)
    critic = PictureCritic(8, classes=3).eval()  # in training the spectral norms move a little
    sizes = [*((c, 16 >> k) for k, (c, _, _) in enumerate(MAPS)), (8, 4)]
    maps = [3 + 2 * torch.randn(6, c, s, s) for c, s in sizes]
    critic.fit(maps)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    scores = critic(maps, labels, 2)
    assert [part.shape[0] for part in scores] == [6] * 5
    other = critic(maps, labels.roll(2), 2)
    for number, (a, b) in enumerate(zip(scores, other, strict=True)):
        assert not torch.allclose(a, b), f"head {number} does not see the class"
    for number in range(5):
        changed = [part + float(k == number) for k, part in enumerate(maps)]
        found = critic(changed, labels, 2)
        same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(found, scores, strict=True)]
        assert same == [k != number for k in range(5)]


def test_the_picture_critic_does_not_mind_the_scale_of_its_maps() -> None:
    torch.manual_seed(0)
    critic = PictureCritic(8, classes=2).eval()
    maps = [torch.randn(4, c, 8, 8) for c in (24, 40, 112, 320, 8)]
    labels = torch.tensor([0, 0, 1, 1])
    critic.fit(maps)
    expected = critic(maps, labels, 2)
    critic.fit([50 * part for part in maps])
    for a, b in zip(critic([50 * part for part in maps], labels, 2), expected, strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)  # up to the floor of deviations


def test_the_picture_critic_sees_pictures_that_are_all_alike() -> None:
    """The same picture is judged otherwise beside copies of itself than beside others."""
    torch.manual_seed(0)
    critic = PictureCritic(8, classes=2).eval()
    maps = [torch.randn(4, c, 8, 8) for c in (24, 40, 112, 320, 8)]
    labels = torch.tensor([0, 0, 1, 1])
    alike = [part[[0, 0, 2, 3]] for part in maps]
    for a, b in zip(critic(maps, labels, 2), critic(alike, labels, 2), strict=True):
        assert not torch.allclose(a[0], b[0])
        torch.testing.assert_close(a[2:], b[2:])  # other groups do not matter


class Pair(OneProcess):
    """Two processes, of which the other one's gradients are the negative of these."""

    size = 2

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            tensor.zero_()


def test_all_processes_begin_with_the_critic_of_the_first() -> None:
    class Second(Pair):
        def share_(self, tensors: Iterable[Tensor]) -> None:
            for tensor in tensors:
                tensor.fill_(1)

    critic = Critic()
    Adversary(critic, 1e-3, Second(torch.device("cpu")), betas=(0.0, 0.99), warmup_steps=1)
    assert all(bool((value == 1).all()) for value in critic.state_dict().values())


def test_the_critics_of_all_processes_learn_alike() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64)
    for world, moves in (
        (OneProcess(torch.device("cpu")), True),
        (Pair(torch.device("cpu")), False),  # the mean of both gradients is zero
    ):
        critic = Critic(8)
        before = copy.deepcopy(critic.state_dict())
        adversary = Adversary(critic, 1e-3, world, betas=(0.5, 0.95), warmup_steps=10)
        adversary.step(5, lambda c=critic: [c(x)], lambda c=critic: [c(x[:2])])  # type: ignore[misc]
        assert any(not torch.equal(before[k], v) for k, v in critic.state_dict().items()) == moves

from __future__ import annotations

import copy

import pytest
import torch

from parscale_ear.data.images import from_uint8
from parscale_ear.training.distributed import OneProcess
from parscale_ear.training.perceptual import Adversary, FeatureLoss, critic_loss


@pytest.fixture(scope="module")
def features() -> FeatureLoss:
    return FeatureLoss()


def blurred(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=False)


def test_feature_loss_sees_blur_more_than_noise_of_the_same_energy(
    features: FeatureLoss, photographs: torch.Tensor
) -> None:
    x = from_uint8(photographs[:2])
    soft = blurred(x)
    shifted = x + (soft - x).square().mean().sqrt()  # a brightness as wrong as the blur
    with torch.no_grad():
        assert features(x, x).item() == pytest.approx(0, abs=1e-5)
        assert features(soft, x) > 2 * features(shifted, x)


def test_gradients_reach_the_picture_and_not_the_network(
    features: FeatureLoss, photographs: torch.Tensor
) -> None:
    x = from_uint8(photographs[:1, :, :64, :64])
    output = blurred(x).requires_grad_()
    features(output, x).backward()
    assert output.grad is not None
    assert output.grad.abs().sum() > 0
    assert all(p.grad is None for p in features.parameters())
    improved = output.detach() - 0.05 * output.grad / output.grad.abs().max()
    with torch.no_grad():
        assert features(improved, x) < features(output.detach(), x)


def test_the_critic_learns_to_tell_and_its_verdict_has_a_gradient(
    photographs: torch.Tensor,
) -> None:
    torch.manual_seed(0)
    adversary = Adversary(1e-3, OneProcess(torch.device("cpu")), width=8)
    real = from_uint8(photographs[:4, :, :64, :64])
    fake = blurred(real)
    first = critic_loss(adversary.critic, real, fake).item()
    for step in range(30):
        adversary.step(step, real, fake)
    assert critic_loss(adversary.critic, real, fake).item() < 0.7 * first
    output = fake.clone().requires_grad_()
    adversary.step(500, real, output).backward()
    assert output.grad is not None
    assert output.grad.abs().sum() > 0
    assert (
        adversary.step(0, real, fake).item() == 0
    )  # a critic that has learnt nothing is not heard


def test_the_adversary_goes_on_where_it_stopped() -> None:
    world = OneProcess(torch.device("cpu"))
    real, fake = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    first, second = Adversary(1e-3, world, width=8), Adversary(1e-3, world, width=8)
    first.step(0, real, fake)
    second.load_state(*copy.deepcopy(first.state()))
    for adversary in (first, second):
        adversary.step(1, real, fake)
    for a, b in zip(first.critic.parameters(), second.critic.parameters(), strict=True):
        assert torch.equal(a, b)

from __future__ import annotations

import pytest
import torch

from parscale_ear.data.images import from_uint8
from parscale_ear.training.perceptual import FeatureLoss


@pytest.fixture(scope="module")
def features() -> FeatureLoss:
    return FeatureLoss()


def blurred(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=False)


def test_feature_loss_sees_blur_more_than_brightness_of_the_same_error(
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

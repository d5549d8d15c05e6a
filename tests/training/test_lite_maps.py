from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from parscale_ear.data.images import from_uint8
from parscale_ear.metrics.features import EfficientNetLite
from parscale_ear.training.lite_maps import LiteMaps, _Depthwise


@pytest.fixture(scope="module")
def lite() -> LiteMaps:
    return LiteMaps()


def plain_maps(images: Tensor) -> list[Tensor]:
    """What the network's own modules give, block by block."""
    extractor = EfficientNetLite(0)
    net: Any = extractor.model
    x = net._swish(net._bn0(net._conv_stem((images * 0.5 + 0.5 - extractor.mean) / extractor.std)))
    maps = []
    for block in net._blocks:
        y = block(x)
        if y.shape[-1] < x.shape[-1]:
            maps.append(x)
        x = y
    return [*maps[:], x, net._swish(net._bn1(net._conv_head(x)))]


def test_maps_and_their_gradients_are_the_networks_own(lite: LiteMaps, photographs: Tensor) -> None:
    images = from_uint8(photographs[:2, :, :96, :64])
    found = []
    for function in (lite, plain_maps):
        x = images.clone().requires_grad_()
        maps = function(x)
        torch.stack([part.square().mean() for part in maps]).sum().backward()
        assert x.grad is not None
        found.append((maps, x.grad))
    (ours, gradient), (theirs, expected) = found
    assert [part.shape[1] for part in ours] == [16, 24, 40, 112, 320, 1280]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    # A unit at the corner of ReLU6 may fall on either side of it.
    assert float((gradient - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (5, 1, 2), (3, 2, 0), (5, 2, 0), (3, 1, 0)])  # fmt: skip
@pytest.mark.parametrize("side", [8, 9])
def test_depthwise_gradients(kernel: int, stride: int, padding: int, side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, side, side + 1, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 1, kernel, kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(3, generator=generator, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = _Depthwise.apply(ours, weight, bias, stride, padding)
    expected = F.conv2d(theirs, weight, bias, stride, padding, groups=3)
    torch.testing.assert_close(out, expected)
    pull = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    out.backward(pull)
    expected.backward(pull)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_nothing_in_it_is_trained(lite: LiteMaps) -> None:
    assert not list(lite.parameters())

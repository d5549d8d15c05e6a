from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parscale_ear.generator.pyramid import LatentPyramid
from parscale_ear.generator.var import VAR

CASTS: list[Callable[[nn.Module], nn.Module]] = [
    lambda model: model.bfloat16(),
    lambda model: model.half(),
    lambda model: model.to(torch.bfloat16),
    lambda model: model.to("cpu", torch.float16),
]


@pytest.mark.parametrize("cast", CASTS)
def test_plain_casts_leave_the_quantiser_exact(
    var: VAR, cast: Callable[[nn.Module], nn.Module]
) -> None:
    exact = copy.deepcopy(var.vqvae.quantizer.state_dict())
    cast(var)
    assert next(var.transformer.parameters()).dtype.itemsize == 2
    assert next(var.vqvae.decoder.parameters()).dtype.itemsize == 2
    for name, tensor in var.vqvae.quantizer.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, exact[name])


@pytest.mark.parametrize("cast", CASTS)
def test_plain_casts_leave_the_pyramid_exact(cast: Callable[[nn.Module], nn.Module]) -> None:
    pyramid = LatentPyramid(channels=4, side=4)
    latents = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    pyramid.fit(latents)
    exact = pyramid.encode(latents)
    holder = nn.Sequential(pyramid, nn.Linear(2, 2))
    cast(holder)
    assert holder[1].weight.dtype.itemsize == 2
    for ours, before in zip(pyramid.encode(latents), exact, strict=True):
        assert torch.equal(ours, before)


def test_other_casts_are_made() -> None:
    pyramid = LatentPyramid(channels=4, side=4)
    assert pyramid.double().mean0.dtype == torch.float64
    assert pyramid.float().mean0.dtype == torch.float32
    assert pyramid.to("meta").mean0.device.type == "meta"


def test_the_quantiser_keeps_tf32_out(var: VAR, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    smooth = type(var.vqvae.quantizer)._smooth

    def watched(*arguments: Any) -> Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return smooth(*arguments)

    monkeypatch.setattr(type(var.vqvae.quantizer), "_smooth", watched)
    tokens = var.vqvae.quantizer.encode(torch.zeros(1, var.vqvae.quantizer.channels, 4, 4))
    var.vqvae.quantizer.contribution(0, tokens[0])
    assert seen
    assert not any(seen)

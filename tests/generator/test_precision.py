from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

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


class Watching(TorchFunctionMode):
    """Notes in which precision matrix products and convolutions are made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[tuple[bool, str]]] = {"matmul": set(), "conv2d": set()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.strip("_")
        if name in self.seen:
            self.seen[name].add(
                (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
            )
        return func(*args, **(kwargs or {}))


def test_the_quantiser_keeps_tf32_out(var: VAR) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with Watching() as watching:
            tokens = var.vqvae.quantizer.encode(torch.zeros(1, var.vqvae.quantizer.channels, 4, 4))
            var.vqvae.quantizer.contribution(0, tokens[0])
    finally:
        torch.set_float32_matmul_precision(before)
    assert watching.seen == {"matmul": {(False, "highest")}, "conv2d": {(False, "highest")}}

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from parscale_ear.training.optimizer import build_optimizer

muon = pytest.importorskip("timm.optim.muon", reason="training needs the extra 'train'")


def step(gradient: Tensor, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What a step adds to a matrix of zeros."""
    monkeypatch.setattr("parscale_ear.training.optimizer.multiplies_bf16", lambda device: kernels)
    weight = nn.Parameter(torch.zeros_like(gradient))
    optimizer = build_optimizer([weight], 1.0)
    weight.grad = gradient
    optimizer.step()
    return weight.detach()


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_without_kernels_for_bf16_it_orthogonalises_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timms = muon.zeropower_via_newtonschulz
    torch.manual_seed(0)
    gradient = torch.randn(16, 64)
    rotation = torch.linalg.qr(torch.randn(16, 16))[0]
    off = {}  # by how much a turned gradient's step is not the turned step
    for kernels in (True, False):
        found = step(gradient, kernels, monkeypatch)
        off[kernels] = difference(step(rotation @ gradient, kernels, monkeypatch), rotation @ found)
        assert muon.zeropower_via_newtonschulz is timms
    assert off[False] < 1e-5
    assert 1e-3 < off[True] < 0.1  # BF16's roundings: the test can tell both apart


def test_a_step_that_fails_leaves_timm_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parscale_ear.training.optimizer.multiplies_bf16", lambda device: False)
    timms = muon.zeropower_via_newtonschulz
    weight = nn.Parameter(torch.zeros(16, 64))
    optimizer = build_optimizer([weight], 1.0)

    def fails() -> float:
        raise ValueError("no loss")

    with pytest.raises(ValueError, match="no loss"):
        optimizer.step(fails)
    assert muon.zeropower_via_newtonschulz is timms

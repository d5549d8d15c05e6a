from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parscale_ear.training.control_heads import DiffusionHead, GaussianHead, SquaredErrorHead

SIZES = {"channels": 2, "levels": 2, "head_width": 32, "blocks": 2, "noise": 16}


def law(count: int, generator: torch.Generator) -> Tensor:
    """Correlated pairs, in two clouds."""
    side = torch.where(torch.rand(count, 1, generator=generator) < 0.5, 1.0, -1.0)
    noise = 0.3 * torch.randn(count, 2, generator=generator)
    return torch.cat((side, side), dim=1) + noise


def trained(kind: type, steps: int = 500) -> Tensor:
    """4,000 draws of the mean's token from a head trained on :func:`law`."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    head = kind(4, **SIZES)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    hidden = torch.ones(256, 1, 4)
    for _ in range(steps):
        loss = head.scores(
            hidden, law(256, generator)[:, None], level=0, samples=2, generator=generator
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return head.draw(torch.ones(4000, 1, 4), level=0, generator=generator)[:, 0]


def test_squared_error_says_the_mean() -> None:
    drawn = trained(SquaredErrorHead)
    assert float(drawn.std(0).max()) < 1e-5
    torch.testing.assert_close(drawn.mean(0), torch.zeros(2), atol=0.2, rtol=0)


def test_gaussian_has_mean_and_deviation_but_not_the_modes() -> None:
    drawn = trained(GaussianHead)
    torch.testing.assert_close(drawn.std(0), torch.full((2,), 1.044), atol=0.12, rtol=0)
    assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 0.15  # the truth's is 0.9
    assert float((drawn.abs().min(1).values < 0.3).float().mean()) > 0.25  # between the clouds


def test_diffusion_finds_the_clouds() -> None:
    drawn = trained(DiffusionHead, 1200)
    assert float(torch.corrcoef(drawn.T)[0, 1]) > 0.7
    assert float((drawn.abs().min(1).values < 0.3).float().mean()) < 0.12
    assert float((drawn[:, 0] > 0).float().mean()) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("kind", [SquaredErrorHead, GaussianHead, DiffusionHead])
def test_details_have_three_bands(kind: type) -> None:
    torch.manual_seed(0)
    head = kind(4, **SIZES)
    hidden, tokens = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    assert head.draw(hidden, level=1).shape == (3, 5, 6)
    scores = head.scores(hidden, tokens, level=1, samples=2)
    assert scores.shape[:2] == (3, 5)
    scores.mean().backward()
    assert all(
        p.grad is not None for n, p in head.named_parameters() if not n.startswith(("out.0", "input.0", "bands"))
    )  # fmt: skip


@pytest.mark.parametrize("kind", [SquaredErrorHead, GaussianHead, DiffusionHead])
def test_every_head_weighs_tokens_alike(kind: type) -> None:
    """A figure for each of three bands, as the energy head has: their mean is what is trained."""
    head = kind(4, **SIZES)
    for level, bands in ((0, 1), (1, 3)):
        tokens = torch.randn(2, 5, SIZES["channels"] * bands)
        assert head.scores(torch.randn(2, 5, 4), tokens, level=level).shape == (2, 5, bands)

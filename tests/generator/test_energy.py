from __future__ import annotations

import numpy as np
import pytest
import scoringrules
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parscale_ear.generator.energy import EnergyHead, energy_score, split_bands


@pytest.mark.parametrize("count", [2, 3, 7])
def test_score_is_that_of_scoringrules(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(count, 5, 4, generator=generator, dtype=torch.float64)
    target = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    expected = scoringrules.es_ensemble(
        target.numpy(), samples.numpy(), m_axis=0, v_axis=-1, estimator="fair"
    )
    np.testing.assert_allclose(energy_score(samples, target).numpy(), expected, rtol=1e-10)


def test_score_of_two_samples_is_half_of_the_papers_loss() -> None:
    x1, x2, y = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    for alpha in (0.5, 1.0, 1.7):
        loss = (x1 - y).norm() ** alpha + (x2 - y).norm() ** alpha - (x1 - x2).norm() ** alpha
        score = energy_score(torch.stack((x1, x2)), y, alpha=alpha)
        torch.testing.assert_close(score, loss / 2)


def test_temperature_weighs_the_second_term() -> None:
    samples, target = torch.randn(2, 3), torch.zeros(3)
    apart = (samples[0] - samples[1]).norm()
    cool, plain = (energy_score(samples, target, temperature=t) for t in (0.5, 1.0))
    torch.testing.assert_close(cool - plain, 0.25 * apart)


def test_gradients() -> None:
    samples = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 5, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: energy_score(x, target, alpha=1.3), (samples,))


def test_gradient_is_finite_where_samples_meet() -> None:
    samples = torch.zeros(2, 1, 3, requires_grad=True)
    energy_score(samples, torch.zeros(1, 3)).sum().backward()
    assert samples.grad is not None
    assert torch.isfinite(samples.grad).all()


@pytest.mark.parametrize("alpha", [0.0, -1.0, 2.5])
def test_bad_exponent(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        energy_score(torch.zeros(2, 3), torch.zeros(3), alpha=alpha)


def test_too_few_samples() -> None:
    with pytest.raises(ValueError, match="M ≥ 2"):
        energy_score(torch.zeros(1, 3), torch.zeros(3))


def mixture(count: int, generator: torch.Generator) -> Tensor:
    """Two narrow clouds, at (2, 0) and (−2, 0); the second has a quarter of the mass."""
    first = torch.rand(count, 1, generator=generator) < 0.75
    centres = torch.where(first, torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.0]))
    return centres + 0.2 * torch.randn(count, 2, generator=generator)


def trained_head(alpha: float | None) -> Tensor:
    """4,000 draws of a head trained on the mixture; ``alpha`` None: by squared error."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    head = EnergyHead(4, channels=2, levels=2, head_width=32, blocks=2, noise=8)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    hidden = torch.ones(256, 1, 4)
    for _ in range(600):
        target = mixture(256, generator)[:, None]
        if alpha is None:
            noise = head.draw_noise((256, 1), hidden, generator)
            loss = F.mse_loss(head.band(hidden, None, noise, level=0, band=0), target)
        else:
            loss = head.scores(hidden, target, level=0, alpha=alpha, generator=generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return head.draw(torch.ones(4000, 1, 4), level=0, generator=generator)[:, 0]


def test_head_recovers_a_law_of_two_modes() -> None:
    drawn = trained_head(1.0)
    right = (drawn - torch.tensor([2.0, 0.0])).norm(dim=1) < 1
    left = (drawn + torch.tensor([2.0, 0.0])).norm(dim=1) < 1
    assert float((right | left).float().mean()) > 0.85
    assert float(left.float().mean()) == pytest.approx(0.25, abs=0.08)
    torch.testing.assert_close(drawn.mean(0), torch.tensor([1.0, 0.0]), atol=0.25, rtol=0)


def test_squared_error_finds_only_the_mean() -> None:
    drawn = trained_head(None)
    assert float(drawn.std(0).max()) < 0.3  # the mixture's own is 1.7
    torch.testing.assert_close(drawn.mean(0), torch.tensor([1.0, 0.0]), atol=0.3, rtol=0)


def test_an_exponent_of_2_does_not_find_the_modes() -> None:
    drawn = trained_head(2.0)  # any law with this mean scores as well
    left = (drawn + torch.tensor([2.0, 0.0])).norm(dim=1) < 1
    assert float(left.float().mean()) < 0.05  # of the mixture: a quarter
    torch.testing.assert_close(drawn.mean(0), torch.tensor([1.0, 0.0]), atol=0.4, rtol=0)


def small_head() -> EnergyHead:
    torch.manual_seed(0)
    head = EnergyHead(8, channels=4, levels=3, head_width=16, blocks=2, noise=6)
    with torch.no_grad():
        for block in head.blocks:
            assert isinstance(block.modulation, nn.Linear)
            block.modulation.weight.normal_(std=0.5)
    return head


def test_bands_are_drawn_with_those_before_them() -> None:
    head = small_head()
    hidden = torch.randn(2, 5, 8)
    noise = head.draw_noise((2, 5), hidden, torch.Generator().manual_seed(0))
    one, two = torch.zeros(2, 5, 12), torch.zeros(2, 5, 12)
    two[..., :4] = 1
    first, second = (head.band(hidden, before, noise, level=1, band=1) for before in (one, two))
    assert not torch.allclose(first, second, atol=1e-3)


def test_a_draw_is_what_teaching_says_of_it() -> None:
    """Band by band, each from noise of its own and told the drawn ones before it."""
    head = small_head()
    hidden = torch.randn(2, 5, 8)
    tokens = head.draw(hidden, level=2, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    for band, before, drawn in split_bands(tokens, 4, level=2):
        noise = head.draw_noise((2, 5), hidden, generator)
        torch.testing.assert_close(head.band(hidden, before, noise, level=2, band=band), drawn)


@pytest.mark.parametrize("level", [0, 1])
def test_a_head_in_half_precision_draws_in_fp32(level: int) -> None:
    head = small_head().bfloat16()
    assert head.draw(torch.zeros(1, 2, 8).bfloat16(), level=level).dtype == torch.float32


def test_noise_is_uniform_about_zero() -> None:
    noise = small_head().draw_noise((5000,), torch.zeros(1), torch.Generator().manual_seed(0))
    assert noise.shape == (5000, 6)
    assert float(noise.min()) == pytest.approx(-0.5, abs=0.01)
    assert float(noise.max()) == pytest.approx(0.5, abs=0.01)
    assert float(noise.std()) == pytest.approx(12**-0.5, abs=0.01)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_mean_and_every_band_have_weights_of_their_own(level: int) -> None:
    """In the order that files have: the mean's, then level by level, band by band."""
    for band in range(3 if level else 1):
        head = small_head()
        noise = head.draw_noise((1, 2), torch.zeros(1))
        head.band(torch.randn(1, 2, 8), None, noise, level=level, band=band).sum().backward()
        used = [k for k, layer in enumerate(head.out) if layer.weight.grad is not None]
        assert used == [3 * (level - 1) + 1 + band if level else 0]
        told = head.bands.weight.grad
        assert told is not None
        assert told.any(1).nonzero().flatten().tolist() == [1 + band if level else 0]


def test_draws_follow_their_generator_and_temperature() -> None:
    head = small_head()
    hidden = torch.randn(1, 3, 8).expand(50, 3, 8)
    with torch.no_grad():
        draws = [
            head.draw(hidden, level=2, temperature=t, generator=torch.Generator().manual_seed(0))
            for t in (1.0, 1.0, 0.5, 0.0)
        ]
    assert draws[0].shape == (50, 3, 12)
    assert torch.equal(draws[0], draws[1])
    assert float(draws[2].std(0).mean()) < 0.8 * float(draws[0].std(0).mean())
    torch.testing.assert_close(draws[3], draws[3][:1].expand(50, 3, 12))  # no noise at all


def test_scores_are_those_of_the_heads_own_draws() -> None:
    head = small_head()
    hidden, tokens = torch.randn(2, 3, 8), torch.randn(2, 3, 12)
    scores = head.scores(
        hidden, tokens, level=1, samples=3, generator=torch.Generator().manual_seed(5)
    )
    assert scores.shape == (2, 3, 3)
    generator = torch.Generator().manual_seed(5)
    before = torch.zeros_like(tokens)
    for band in range(3):
        span = slice(4 * band, 4 * band + 4)
        noise = head.draw_noise((3, 2, 3), hidden, generator)
        drawn = torch.stack(
            [head.band(hidden, before, noise[m], level=1, band=band) for m in range(3)]
        )
        expected = energy_score(drawn, tokens[..., span])
        torch.testing.assert_close(scores[..., band], expected)
        before = before.clone()
        before[..., span] = tokens[..., span]


def test_a_target_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target\.shape\) samples, got \(2, 3, 4\) for \(4,\)"):
        energy_score(torch.zeros(2, 3, 4), torch.zeros(4))

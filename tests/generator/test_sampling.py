from __future__ import annotations

from typing import Any

import pytest
import torch

from parscale_ear.generator.energy import uniform_noise
from parscale_ear.generator.sampling import check_sampling, guided, sample_tokens

LOGITS = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()


def frequencies(draws: int = 20_000, **options: float) -> torch.Tensor:
    """How often each of the five tokens is drawn."""
    logits = LOGITS.expand(1, draws, 5)
    generator = torch.Generator().manual_seed(0)
    tokens = sample_tokens(logits, generator=generator, **options)  # type: ignore[arg-type]
    assert tokens.shape == (1, draws)
    return tokens.flatten().bincount(minlength=5) / draws


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.2, 0.15, 0.1, 0.05]),
        ({"top_k": 0}, [0.5, 0.2, 0.15, 0.1, 0.05]),
        ({"top_k": 1}, [1, 0, 0, 0, 0]),
        ({"top_k": 2}, [5 / 7, 2 / 7, 0, 0, 0]),
        ({"top_k": 99}, [0.5, 0.2, 0.15, 0.1, 0.05]),
        ({"top_p": 0.4}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.6}, [5 / 7, 2 / 7, 0, 0, 0]),
        ({"top_p": 0.86}, [50 / 95, 20 / 95, 15 / 95, 10 / 95, 0]),
        # Top-p looks at what top-k has left: 5/8.5 = 0.59 of it is the first token.
        ({"top_k": 3, "top_p": 0.58}, [1, 0, 0, 0, 0]),
    ],
)
def test_draws_follow_the_probabilities(options: dict[str, float], expected: list[float]) -> None:
    found = frequencies(**options)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float), atol=0.015, rtol=0)
    assert bool((found[torch.tensor(expected) == 0] == 0).all())


def test_top_p_keeps_no_token_more_than_it_needs() -> None:
    logits = torch.zeros(1, 100, 2)  # the first of two has the half that is asked for, exactly
    first, second = (
        sample_tokens(logits, top_p=0.5, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    assert torch.equal(first, second)


def test_draws_follow_the_generator() -> None:
    logits = torch.randn(2, 50, 30)

    def tokens(seed: int) -> torch.Tensor:
        return sample_tokens(logits, top_k=20, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(tokens(0), tokens(0))
    assert not torch.equal(tokens(0), tokens(1))


def test_guidance_moves_away_from_the_unconditional() -> None:
    conditional, unconditional = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    assert torch.equal(guided(conditional, unconditional, 0.0), conditional)
    assert torch.equal(guided(conditional, unconditional, 2.0), torch.tensor([2.0, 0.0]))


@pytest.mark.parametrize(
    "values", [(-1, 1.0, 0.0), (1, 0.0, 0.0), (1, 1.5, 0.0), (1, 1.0, -1.0), (1, 1.0, float("inf"))]
)
def test_impossible_settings_are_refused(values: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        check_sampling(*values)


def test_a_generator_serves_whatever_the_models_device_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn_on: list[object] = []
    rand = torch.rand

    def spy(*shape: int, **options: Any) -> torch.Tensor:
        drawn_on.append(options["device"].type)
        return rand(*shape, **options)

    monkeypatch.setattr(torch, "rand", spy)
    generator = torch.Generator().manual_seed(0)
    elsewhere = LOGITS.expand(1, 3, 5).to("meta")
    assert sample_tokens(elsewhere, generator=generator).device.type == "meta"
    noise = uniform_noise((2, 3), elsewhere.half(), generator)
    assert (noise.device.type, noise.dtype) == ("meta", torch.float16)
    assert drawn_on == ["cpu"]

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from parscale_ear.generator.pyramid import LatentPyramid


def fitted(side: int, phases: int = 4, channels: int = 3) -> tuple[LatentPyramid, torch.Tensor]:
    torch.manual_seed(0)
    latents = 2 * torch.randn(50, channels, side, side) + 0.7
    pyramid = LatentPyramid(channels, side, phases)
    pyramid.fit(latents)
    return pyramid, latents


@pytest.mark.parametrize("side", [2, 4, 8, 16])
@pytest.mark.parametrize("phases", [1, 2, 4])
def test_there_and_back_without_loss(side: int, phases: int) -> None:
    pyramid, latents = fitted(side, phases)
    tokens = pyramid.encode(latents)
    assert [part.shape[1] for part in tokens] == list(pyramid.counts)
    torch.testing.assert_close(pyramid.decode(tokens), latents, atol=1e-5, rtol=1e-5)
    # No number too many: as many in the tokens as in the latent.
    assert sum(part[0].numel() for part in tokens) == latents[0].numel()


def test_scales_of_256_pixels_are_at_most_eight() -> None:
    assert LatentPyramid(32, 16, 4).counts == (1, 1, 4, 16, 16, 16, 16, 16)
    assert LatentPyramid(32, 8, 4).counts == (1, 1, 4, 4, 4, 4, 4)
    assert LatentPyramid(32, 8, 1).counts == (1, 1, 4, 16)


def test_tokens_have_zero_mean_and_unit_variance() -> None:
    pyramid, latents = fitted(8, phases=1)
    for part in pyramid.encode(latents)[2:]:
        torch.testing.assert_close(part.mean((0, 1)), torch.zeros(9), atol=1e-4, rtol=0)
        torch.testing.assert_close(part.std((0, 1)), torch.ones(9), atol=1e-3, rtol=0)


def test_the_mean_is_the_first_token() -> None:
    pyramid, latents = fitted(8)
    canvas = pyramid.start(pyramid.encode(latents)[0])
    flat = pyramid.preview(canvas).mean((2, 3))
    expected = latents.mean((2, 3))
    # Finer details stand at their mean, which is about zero and has no part in this mean at all.
    torch.testing.assert_close(flat, expected, atol=1e-4, rtol=1e-4)


def test_a_number_that_never_differs_is_no_division_by_zero() -> None:
    latents = torch.randn(8, 3, 4, 4)
    latents[:, 1] = 0.5
    pyramid = LatentPyramid(3, 4)
    pyramid.fit(latents)
    tokens = pyramid.encode(latents)
    assert all(bool(part.isfinite().all()) for part in tokens)
    torch.testing.assert_close(pyramid.decode(tokens), latents, atol=1e-5, rtol=1e-5)


def centres(pyramid: LatentPyramid, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Of every scale's tokens, the coarse part of the inputs at their own cell, (B, T, Z)."""
    own = inputs.unflatten(-1, (-1, 9))[:, :, : pyramid.channels, 4]
    return list(own.split(pyramid.counts[1:], dim=1))


def test_inputs_say_the_mean_of_every_cell() -> None:
    pyramid, latents = fitted(8, phases=1)
    found = centres(pyramid, pyramid.teacher_input(latents))
    for scale, part in zip(pyramid.scales[1:], found, strict=True):
        means = F.adaptive_avg_pool2d(latents, scale.side).flatten(2).transpose(1, 2)
        torch.testing.assert_close(part, means, atol=1e-4, rtol=1e-4)


def test_taught_inputs_are_those_of_a_generation() -> None:
    pyramid, latents = fitted(8)
    taught = pyramid.teacher_input(latents)
    tokens = pyramid.encode(latents)
    canvas, parts = pyramid.start(tokens[0]), []
    for number in range(1, len(pyramid.scales)):
        parts.append(pyramid.inputs(canvas, number))
        canvas = pyramid.put(canvas, number, tokens[number])
    torch.testing.assert_close(torch.cat(parts, dim=1), taught, atol=1e-5, rtol=1e-5)


def test_inputs_tell_nothing_of_what_is_still_to_come() -> None:
    pyramid, latents = fitted(8)
    taught = pyramid.teacher_input(latents)
    scale = 4  # the second phase of the finest level
    start = sum(pyramid.counts[1:scale])
    tokens = pyramid.encode(latents)
    for number in range(scale, len(tokens)):
        tokens[number] = torch.randn_like(tokens[number])
    other = pyramid.teacher_input(pyramid.decode(tokens))
    same = start + pyramid.counts[scale]
    torch.testing.assert_close(other[:, :same], taught[:, :same], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(other[:, same:], taught[:, same:], atol=0.1)


def test_phases_know_their_neighbours() -> None:
    pyramid, latents = fitted(8)
    tokens = pyramid.encode(latents)
    taught = pyramid.teacher_input(latents)
    tokens[3] = tokens[3] + 1  # the first phase of the finest level
    other = pyramid.teacher_input(pyramid.decode(tokens))
    start = sum(pyramid.counts[1:4])
    assert not torch.allclose(other[:, start:], taught[:, start:], atol=0.1)


def test_noise_on_the_inputs_spares_what_is_not_drawn() -> None:
    pyramid, latents = fitted(8)
    noisy = pyramid.teacher_input(latents, 0.5, torch.Generator().manual_seed(0))
    plain = pyramid.teacher_input(latents)
    assert not torch.allclose(noisy, plain, atol=0.05)
    known = plain.unflatten(-1, (-1, 9))  # (B, L − 1, 4Z + 1, 9)
    details = slice(pyramid.channels, -1)
    blank = noisy.unflatten(-1, (-1, 9))[:, :, details][known[:, :, details] == 0]
    assert not blank.any()
    again = pyramid.teacher_input(latents, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(noisy, again)


def test_noise_on_the_inputs_has_any_deviation_up_to_the_largest() -> None:
    """Of the cells' means, and drawn anew for every picture."""
    pyramid, latents = fitted(16, phases=1, channels=8)
    noisy = pyramid.teacher_input(latents, 0.5, torch.Generator().manual_seed(0))
    noise = centres(pyramid, noisy - pyramid.teacher_input(latents))[-1]  # 64 cells of 8 channels
    deviations = noise.flatten(1).std(1)
    assert float(deviations.min()) < 0.1
    assert 0.4 < float(deviations.max()) < 0.56
    assert 0.2 < float(deviations.mean()) < 0.3
    assert float(noise.mean((1, 2)).abs().max()) < 0.1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((3, 6, 1), "power of two"), ((3, 1, 1), "power of two"), ((3, 8, 3), "phases"),
     ((0, 8, 1), "channels")],
)  # fmt: skip
def test_bad_sizes(arguments: tuple[int, int, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LatentPyramid(*arguments)


def test_bad_latents() -> None:
    pyramid, _ = fitted(8)
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        pyramid.encode(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(("phases", "drawn"), [(1, [0]), (2, [0, 4]), (4, [0, 4, 4, 8])])
def test_inputs_say_which_neighbours_are_drawn(phases: int, drawn: list[int]) -> None:
    """In the middle; of four phases none in the first, four in the next two, eight in the last."""
    pyramid, latents = fitted(8, phases)
    flags = pyramid.teacher_input(latents).unflatten(-1, (-1, 9))[0, :, -1]  # (L − 1, 9)
    parts = flags[sum(pyramid.counts[1:3]) :].split(16 // phases)
    assert [int(part.sum(1).max()) for part in parts] == drawn
    assert not any(part[:, 4].any() for part in parts)


def test_one_latent_has_no_deviation() -> None:
    pyramid = LatentPyramid(4, 8, 4)
    with pytest.raises(ValueError, match="at least two latents are needed, got 1"):
        pyramid.fit(torch.zeros(1, 4, 8, 8))

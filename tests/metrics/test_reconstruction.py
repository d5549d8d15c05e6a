from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from parscale_ear.metrics import reconstruction
from parscale_ear.metrics.reconstruction import (
    cell_pattern,
    chroma,
    haarpsi,
    mean_quality,
    ms_ssim,
    psnr,
    similarities,
    ssim,
)


@pytest.fixture
def pair(photographs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.randint(-9, 10, photographs[:3].shape)
    return (photographs[:3].int() + noise).clamp(0, 255).to(torch.uint8), photographs[:3]


def test_psnr_equals_scikit_image(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    expected = [
        peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=255)
        for a, b in zip(*pair, strict=True)
    ]
    np.testing.assert_allclose(psnr(*pair), expected, rtol=1e-9)


def test_ssim_is_the_mean_over_channels(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    options = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 255,
    }
    expected = [
        np.mean([structural_similarity(a[k].numpy(), b[k].numpy(), **options) for k in range(3)])
        for a, b in zip(*pair, strict=True)
    ]
    np.testing.assert_allclose(ssim(*pair), expected, rtol=1e-9)


@pytest.mark.parametrize("strip", [1, 3 * 2 * 256 * 7, 2**30])
def test_psnr_by_strips_is_that_of_the_whole(
    pair: tuple[torch.Tensor, torch.Tensor], strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pair
    squares = (first.double() - second.double()).square().mean(dim=(1, 2, 3)).numpy()
    monkeypatch.setattr(reconstruction, "STRIP", strip)
    np.testing.assert_allclose(psnr(first, second), 10 * np.log10(255**2 / squares), rtol=1e-13)
    assert psnr(first[:0], second[:0]).shape == (0,)


def test_equal_pictures(photographs: torch.Tensor) -> None:
    assert np.isinf(psnr(photographs[:1], photographs[:1])).all()
    np.testing.assert_allclose(ssim(photographs[:1], photographs[:1]), 1.0)


def test_a_picture_that_comes_back_exactly_counts_as_100_db(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    damaged, originals = pair[0].clone(), pair[1]
    damaged[0] = originals[0]
    expected = [100, *psnr(damaged[1:], originals[1:])]
    np.testing.assert_array_equal(similarities(damaged, originals)["psnr_db"], expected)
    means = mean_quality(damaged, originals)
    assert means == pytest.approx(
        {"psnr_db": np.mean(expected), "ssim": ssim(damaged, originals).mean()}
    )


def test_every_similarity_is_under_its_own_name(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    found = similarities(*pair)
    for metric in (ssim, ms_ssim, haarpsi):
        np.testing.assert_array_equal(found.pop(metric.__name__), metric(*pair))
    assert list(found) == ["psnr_db"]
    small = similarities(*(pictures[..., :160] for pictures in pair))
    assert np.isnan(small["ms_ssim"]).all()


def test_similarities_differ_in_what_they_make_of_brightness(photographs: torch.Tensor) -> None:
    """SSIM counts it in full, MS-SSIM at the last of its five scales alone, HaarPSI at edges."""
    dark, bright = (torch.full((1, 3, 256, 256), k, dtype=torch.uint8) for k in (50, 100))
    offset = (0.01 * 255) ** 2  # C₁ of Wang et al. (2004)
    luminance = (2 * 50 * 100 + offset) / (50**2 + 100**2 + offset)
    assert ssim(dark, bright) == pytest.approx(luminance, rel=1e-4)
    assert ms_ssim(dark, bright) == pytest.approx(luminance**0.1333, rel=1e-3)
    window = torch.hann_window(256, periodic=False)
    photograph, light = photographs[:1] // 2, 60 * window[:, None] * window  # none at the edges
    lit = (photograph + light).round().to(torch.uint8)
    assert ssim(lit, photograph) < 0.9
    assert haarpsi(lit, photograph) > 0.95


def test_black_is_like_black() -> None:
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert haarpsi(black, black) == 1


@pytest.mark.parametrize("function", [psnr, ssim])
def test_refuses_anything_but_8_bits(function: object) -> None:
    good = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    for first, second in ((good.float(), good), (good, good[0]), (good, good[..., :8])):
        with pytest.raises(ValueError, match="expected"):
            function(first, second)  # type: ignore[operator]


def test_similarities_fall_with_damage(photographs: torch.Tensor) -> None:
    originals = photographs[:3]
    noise = torch.randn(originals.shape)
    for metric in (ms_ssim, haarpsi):
        means = []
        for strength in (0, 5, 20):
            damaged = (originals + strength * noise).round().clamp(0, 255).to(torch.uint8)
            values = metric(damaged, originals)
            assert values.shape == (3,)
            means.append(values.mean())
        assert means[0] == pytest.approx(1, abs=1e-5)
        assert means[0] > means[1] > means[2] > 0


def test_a_pattern_of_cells_is_found(photographs: torch.Tensor) -> None:
    originals = photographs[:2, :, :37, :42] // 2 + 40
    originals[1, :, :16] = 100
    damaged = originals + 3
    damaged[0, 1, 2::4, 3::4] += 5
    damaged[1, 2, :16:4, ::4] += 8
    found = cell_pattern(damaged, originals)
    expected = np.full((3, 4, 4), 3.0)
    expected[1, 2, 3] += 2.5  # in one of two pictures
    expected[2, 0, 0] += 2  # in a quarter of all blocks
    np.testing.assert_allclose(found, expected)
    flat = cell_pattern(damaged, originals, most_varied=1)
    expected = np.full((3, 4, 4), 3.0)
    expected[2, 0, 0] += 8
    np.testing.assert_allclose(flat, expected)
    assert cell_pattern(damaged, originals, side=2).shape == (3, 2, 2)
    assert np.isnan(cell_pattern(damaged, originals, most_varied=0)).all()
    with pytest.raises(ValueError, match="divisor of 16"):
        cell_pattern(damaged, originals, side=3)


def test_chroma_is_the_spread_of_the_channels() -> None:
    pictures = torch.full((2, 3, 4, 5), 250, dtype=torch.uint8)
    pictures[1, 0, :2] = 240
    pictures[1, 2, 2:] = 0  # beyond what 8 bits with a sign can tell
    np.testing.assert_array_equal(chroma(pictures), [0, (10 + 250) / 2])
    with pytest.raises(ValueError, match="8-bit"):
        chroma(pictures.float())


def test_ms_ssim_needs_room_for_five_scales(photographs: torch.Tensor) -> None:
    small = photographs[:1, :, :160, :160]
    with pytest.raises(ValueError, match="at least 161 pixels"):
        ms_ssim(small, small)


@pytest.mark.parametrize(("metric", "least"), [(ssim, 11), (haarpsi, 16)])
def test_similarities_say_how_large_pictures_must_be(metric: Any, least: int) -> None:
    few = torch.zeros(1, 3, least, least, dtype=torch.uint8)
    assert metric(few, few) == pytest.approx(1)
    few = few[..., :-1]
    with pytest.raises(ValueError, match=f"at least {least} pixels"):
        metric(few, few)


@pytest.mark.parametrize("metric", [psnr, ssim, ms_ssim, haarpsi])
def test_no_pictures_have_no_figures(metric: Any) -> None:
    none = torch.zeros(0, 3, 176, 176, dtype=torch.uint8)
    assert metric(none, none).shape == (0,)

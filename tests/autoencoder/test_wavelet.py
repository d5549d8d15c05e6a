from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch

from parscale_ear.autoencoder.wavelet import haar_dwt, haar_idwt


def test_equals_pywavelets() -> None:
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    approximation, (horizontal, vertical, diagonal) = pywt.dwt2(x.numpy(), "haar")
    ours = haar_dwt(x)
    for band, theirs in zip(
        ours.chunk(4, dim=1), (approximation, horizontal, vertical, diagonal), strict=True
    ):
        np.testing.assert_allclose(band.numpy(), theirs, atol=1e-12)


def test_two_levels_split_every_band() -> None:
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    first = haar_dwt(x)
    approximation, details = pywt.dwt2(first.numpy(), "haar")
    expected = np.concatenate((approximation, *details), axis=1)
    np.testing.assert_allclose(haar_dwt(x, 2).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse(levels: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 32, 48, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(haar_idwt(haar_dwt(x, levels), levels), x, atol=tolerance, rtol=0)


def test_inverse_is_exact_on_8_bit_pixels() -> None:
    x = torch.randint(0, 256, (1, 3, 64, 64)).float()
    assert torch.equal(haar_idwt(haar_dwt(x, 2), 2), x)


def test_keeps_the_sum_of_squares() -> None:
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert haar_dwt(x, 3).square().sum().item() == pytest.approx(x.square().sum().item())


def test_refuses_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        haar_dwt(torch.zeros(1, 3, 16, 18), 2)
    with pytest.raises(ValueError, match="multiple of 4"):
        haar_idwt(torch.zeros(1, 6, 4, 4))

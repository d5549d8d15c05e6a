"""The autoencoder's losses."""

from __future__ import annotations

import pytest
import torch

from parscale_ear.data.images import from_uint8
from parscale_ear.metrics.reconstruction import ssim
from parscale_ear.training.losses import chroma_loss, log_mse_loss, pattern_loss, ssim_loss


def test_log_mse_follows_psnr() -> None:
    target = torch.zeros(2, 3, 8, 8)
    output = torch.stack((torch.full((3, 8, 8), 0.1), torch.full((3, 8, 8), 0.5)))
    ten_times_better = output / 10**0.5
    gain = log_mse_loss(output, target) - log_mse_loss(ten_times_better, target)
    assert gain.item() == pytest.approx(0.1 * 2.3026, rel=0.05)


def test_ssim_loss_equals_the_metric(photographs: torch.Tensor) -> None:
    noise = torch.randint(-20, 21, photographs[:3].shape)
    damaged = (photographs[:3].int() + noise).clamp(0, 255).to(torch.uint8)
    ours = ssim_loss(from_uint8(damaged), from_uint8(photographs[:3]))
    assert 1 - ours.item() == pytest.approx(ssim(damaged, photographs[:3]).mean(), abs=1e-4)
    assert ssim_loss(from_uint8(damaged), from_uint8(damaged)).item() == pytest.approx(0, abs=1e-6)


def test_pattern_loss_is_of_what_all_cells_share() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, 64, 64, generator=generator) - 0.5
    flat = torch.zeros(64, 64, dtype=torch.bool)
    flat[:, :16] = True  # a quarter of the blocks, which are the flattest
    target[:, :, flat] *= 0.01
    cell = torch.tensor([[0.1, -0.1, 0.1, -0.1], [-0.1, 0.1, -0.1, 0.1]]).repeat(2, 1)
    board = cell.repeat(16, 16)
    assert pattern_loss(target, target).item() == 0
    assert pattern_loss(target + board, target).item() == pytest.approx(0.01, rel=1e-4)
    # It does not vanish where it is taken from flat parts and put into the others, or the reverse.
    moved = torch.where(flat, 3 * board, -board)
    expected = 0.01 * (9 + 3) / 4
    assert pattern_loss(target + moved, target).item() == pytest.approx(expected, rel=1e-4)
    other = board.roll(1, 0) * (1 - 2 * ((torch.arange(64) // 8) % 2))  # its sign turns by cells
    assert pattern_loss(target + other, target).item() < 1e-12
    coarse = board * (1 - 2 * ((torch.arange(64) // 4) % 2))  # and here twice a cell of 8×8
    assert pattern_loss(target + coarse, target).item() == pytest.approx(0.01, rel=1e-4)
    one, two = (
        pattern_loss(target[k : k + 1] + board * (k + 1), target[k : k + 1]) for k in (0, 1)
    )
    both = pattern_loss(target + board * torch.tensor([1.0, 2.0])[:, None, None, None], target)
    torch.testing.assert_close(both, (one + two) / 2)  # as many processes would have it


def test_chroma_loss_is_of_colour_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, 16, 16, generator=generator) - 0.5
    lighter = target + torch.rand(2, 1, 16, 16, generator=generator)
    assert chroma_loss(lighter, target).item() < 1e-12
    signs = torch.randint(2, (2, 1, 16, 16), generator=generator) * 2 - 1  # it must not average out
    tint = signs * torch.tensor([0.2, 0.0, -0.1])[:, None, None]
    expected = ((0.2 - 0.1 / 3) ** 2 + (0.1 / 3) ** 2 + (0.1 + 0.1 / 3) ** 2) / 3
    assert chroma_loss(lighter + tint, target).item() == pytest.approx(expected, rel=1e-4)

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.tiling import run_tiled, spans


def test_cores_cover_every_position_once() -> None:
    for length, tile, overlap in ((10, 3, 2), (7, 7, 1), (5, 9, 4), (1, 1, 0)):
        seen = []
        for start, stop, core_start, core_stop in spans(length, tile, overlap):
            assert 0 <= start <= core_start < core_stop <= stop <= length
            assert core_start - start in (overlap, core_start)
            assert stop - core_stop in (overlap, length - core_stop)
            seen += range(core_start, core_stop)
        assert seen == list(range(length))


def test_a_convolution_in_tiles_is_the_convolution() -> None:
    convolution = nn.Conv2d(3, 5, 5, padding=2).double()
    x = torch.randn(2, 3, 33, 47, dtype=torch.float64)

    def function(part: Tensor) -> tuple[Tensor, ...]:
        return (convolution(part),)

    (tiled,) = run_tiled(function, x, tile=8, overlap=2)
    torch.testing.assert_close(tiled, convolution(x), atol=1e-12, rtol=0)
    (short,) = run_tiled(function, x, tile=8, overlap=1)
    assert (short - convolution(x)).abs().max() > 1e-3  # the overlap matters


@pytest.mark.parametrize("tile", [16, 64, 96, 1024])
@pytest.mark.parametrize("size", [(160, 256), (256, 176)])
def test_the_model_in_tiles(shipped: ParScaleEAR, tile: int, size: tuple[int, int]) -> None:
    model = ParScaleEAR(shipped.config).double().eval()
    model.load_state_dict(shipped.state_dict())
    x = torch.rand(1, 3, *size, dtype=torch.float64) * 2 - 1
    with torch.inference_mode():
        whole = model.encode(x)
        tiled = model.encode(x, tile=tile)
        torch.testing.assert_close(tiled.mean, whole.mean, atol=1e-9, rtol=0)
        torch.testing.assert_close(tiled.log_variance, whole.log_variance, atol=1e-9, rtol=0)
        latent = model.enhance(whole.mode())
        torch.testing.assert_close(
            model.decode(latent, tile=tile), model.decode(latent), atol=1e-9, rtol=0
        )
        torch.testing.assert_close(model(x, tile=tile), model(x), atol=1e-9, rtol=0)
        torch.testing.assert_close(
            model(x, refinements=1, tile=tile), model(x, refinements=1), atol=1e-9, rtol=0
        )


def reach(x: Tensor, y: Tensor, dim: int) -> int:
    """The largest index along ``dim`` of ``x`` that ``y`` depends on."""
    (gradient,) = torch.autograd.grad(y, x)
    others = [d for d in range(x.ndim) if d != dim]
    return int(gradient.abs().amax(dim=others).nonzero().max())


def test_the_radius_is_what_the_convolutions_see(shipped: ParScaleEAR) -> None:
    """Neither less, or tiles would differ, nor more, or they would cost too much."""
    model = ParScaleEAR(shipped.config).double().eval()
    model.load_state_dict(shipped.state_dict())
    latent = torch.randn(1, 32, 20, 20, dtype=torch.float64, requires_grad=True)
    core = model.decoder(latent)[..., : 2 * 16, : 2 * 16]  # of the latent positions 0 and 1
    assert reach(latent, core.sum(), 3) == 1 + model.decoder.radius()
    images = torch.rand(1, 3, 16 * 20, 16 * 20, dtype=torch.float64, requires_grad=True)
    mean, _ = model.encoder(images)
    farthest = reach(images, mean[..., :2, :2].sum(), 3) // 16
    assert farthest == 1 + model.encoder.radius()


def test_tiles_with_padding_and_in_half_precision(shipped: ParScaleEAR) -> None:
    x = torch.rand(1, 3, 150, 201) * 2 - 1
    with torch.inference_mode():
        whole = shipped(x, pad=True)
        torch.testing.assert_close(shipped(x, pad=True, tile=64), whole, atol=1e-4, rtol=0)
        half = ParScaleEAR.from_pretrained(dtype=torch.bfloat16)
        tiled = half(x.bfloat16(), pad=True, tile=64)
        assert tiled.dtype == torch.bfloat16
        torch.testing.assert_close(tiled, half(x.bfloat16(), pad=True), atol=0.05, rtol=0)
        torch.testing.assert_close(tiled.float(), whole, atol=0.15, rtol=0)


def test_numpys_integers_are_as_good(tiny: ParScaleEAR) -> None:
    latent = torch.randn(1, 4, 6, 6)
    with torch.inference_mode():
        expected = tiny.decode(latent, size=(90, 80), tile=32)
        found = tiny.decode(latent, size=(np.int64(90), np.int32(80)), tile=np.int64(32))  # type: ignore[arg-type]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tile", [0, -16, 8, 100, 1.5, True])
def test_a_bad_tile_is_named(tiny: ParScaleEAR, tile: int) -> None:
    with pytest.raises(ValueError, match="tile must be a multiple of 16"):
        tiny.encode(torch.zeros(1, 3, 32, 32), tile=tile)


PEAK = """
import sys
import torch
from parscale_ear import ParScaleEAR
from parscale_ear.profiling.memory import peak_resident_memory

torch.set_num_threads(1)
model = ParScaleEAR.from_pretrained(device="cpu")
images = torch.rand(1, 3, 2048, 2048) * 2 - 1
with peak_resident_memory() as memory, torch.inference_mode():
    model(images, tile=int(sys.argv[1]) or None)
print(memory.peak - memory.before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_tiles_bound_the_memory() -> None:
    """What is taken above the loaded model, in fresh processes."""
    whole, tiled = (
        int(
            subprocess.run(
                [sys.executable, "-c", PEAK, tile], capture_output=True, text=True, check=True
            ).stdout
        )
        for tile in ("0", "256")
    )
    assert 0 < tiled < 0.5 * whole

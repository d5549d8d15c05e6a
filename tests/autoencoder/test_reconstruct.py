from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parscale_ear.autoencoder.latent_cache import encode_pictures
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.reconstruct import reconstruct_image, reconstruct_pictures
from parscale_ear.data.images import from_uint8, to_uint8


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 32, 48), dtype=torch.uint8)


@torch.inference_mode()
def test_pictures_in_batches_are_the_models(tiny: ParScaleEAR, pictures: torch.Tensor) -> None:
    done: list[int] = []
    found = reconstruct_pictures(tiny, pictures, batch_size=2, progress=done.append)
    assert torch.equal(found, to_uint8(tiny(from_uint8(pictures))))
    assert done == [2, 2, 1]
    bare = reconstruct_pictures(tiny, pictures, branches=())
    assert torch.equal(bare, to_uint8(tiny(from_uint8(pictures), branches=())))
    assert not torch.equal(bare, found)


def test_autocast_computes_in_the_dtype_that_is_asked_for(
    tiny: ParScaleEAR, pictures: torch.Tensor
) -> None:
    seen: list[torch.dtype] = []
    tiny.decoder.bands2.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    reconstruct_pictures(tiny, pictures, autocast=torch.bfloat16)
    reconstruct_pictures(tiny, pictures)
    assert set(seen[:1]) == {torch.bfloat16}
    assert set(seen[1:]) == {torch.float32}


@torch.inference_mode()
def test_one_picture_of_any_size(tiny: ParScaleEAR) -> None:
    image = torch.rand(3, 37, 90) * 2 - 1
    assert tiny.decoder.bands2.bias is not None
    tiny.decoder.bands2.bias[:3] += 3
    expected = tiny(image[None], pad=True)[0]
    assert expected.abs().max() > 1  # so that the limit shows
    found = reconstruct_image(tiny, image)
    assert torch.equal(found, expected.clamp(-1, 1))
    sides: list[tuple[int, ...]] = []
    tiny.encoder.register_forward_hook(lambda _, inputs, __: sides.append(inputs[0].shape[2:]))
    reconstruct_image(tiny, image, tile=16)
    assert len(sides) > 1  # as many as there are tiles
    half = reconstruct_image(tiny.bfloat16(), image)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, found, atol=0.1, rtol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_no_picture(tiny: ParScaleEAR, value: float) -> None:
    assert tiny.decoder.bands2.bias is not None
    tiny.decoder.bands2.bias.data[:3] = value
    with pytest.raises(ValueError, match="reconstructions were not finite"):
        reconstruct_image(tiny, torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="reconstructions were not finite"):
        reconstruct_pictures(tiny, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_fp32_is_fp32_on_the_way(tiny: ParScaleEAR, pictures: torch.Tensor, tmp_path: Path) -> None:
    """TF32 is what PyTorch's convolutions take on CUDA, unless it is told not to."""
    seen: list[bool] = []
    for layer in (tiny.encoder.level2, tiny.decoder.bands2):
        layer.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    assert torch.backends.cudnn.allow_tf32
    reconstruct_pictures(tiny, pictures[:1])
    reconstruct_image(tiny, from_uint8(pictures)[0])
    encode_pictures(tiny, pictures[:1])
    assert seen == [False] * 5
    assert torch.backends.cudnn.allow_tf32

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from parscale_ear.data.crops import RandomCrops, scan_sizes
from parscale_ear.data.images import ImageError, ImageRef, find_images, to_uint8


def test_a_batch_is_a_function_of_seed_and_step(folder_of_pictures: Path) -> None:
    refs = find_images([folder_of_pictures])
    first = RandomCrops(refs, side=64, seed=1)
    second = RandomCrops(refs, side=64, seed=1, cache_gib=0)
    first.batch(0, 4)  # what was drawn before does not matter, nor does the cache
    assert torch.equal(first.batch(5, 4), second.batch(5, 4))
    assert not torch.equal(first.batch(5, 4), first.batch(6, 4))
    assert not torch.equal(first.batch(5, 4), RandomCrops(refs, side=64, seed=2).batch(5, 4))


def test_processes_share_the_crops_of_a_step(folder_of_pictures: Path) -> None:
    crops = RandomCrops(find_images([folder_of_pictures]), side=32)
    assert torch.equal(crops.batch(3, 4, first=2), crops.batch(3, 6)[2:])


def ramp(folder: Path, width: int, height: int) -> list[ImageRef]:
    """A picture whose pixels tell their column and row, two levels each."""
    x, y = np.meshgrid(2 * np.arange(width), 2 * np.arange(height))
    pixels = np.stack((x, y, np.zeros_like(x)), axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "ramp.png")
    return find_images([folder / "ramp.png"])


def test_every_place_of_a_picture_is_drawn_and_its_mirror_image(tmp_path: Path) -> None:
    crops = RandomCrops(ramp(tmp_path, 10, 9), side=8, max_reduction=1.0)
    pixels = to_uint8(crops.batch(0, 200))[:, :2] // 2  # (200, column and row, 8, 8)
    first, last, top = (pixels[:, c, 0, k].tolist() for c, k in ((0, 0), (0, -1), (1, 0)))
    found = set(zip(first, last, top, strict=True))
    plain = {(left, left + 7, top) for left in range(3) for top in range(2)}
    assert found == plain | {(right, left, top) for left, right, top in plain}
    assert 70 <= sum(f > e for f, e in zip(first, last, strict=True)) <= 130  # half, 4 deviations


@pytest.mark.parametrize(("height", "most"), [(120, 3.0), (32, 2.0)])
def test_half_of_the_crops_are_reduced_as_far_as_allowed_and_as_there_is_room(
    height: int, most: float, tmp_path: Path
) -> None:
    crops = RandomCrops(ramp(tmp_path, 120, height), side=16, max_reduction=3.0)
    columns = to_uint8(crops.batch(0, 200))[:, 0, 8].int()  # (200, 16)
    scales = (columns[:, 12] - columns[:, 4]).abs() / (2 * 8)  # away from the edges a line
    assert 70 <= (scales == 1).sum() <= 130  # half, and what is reduced by less than a pixel
    assert most - 0.2 < scales.max() <= most + 0.1


def test_range_and_shape(folder_of_pictures: Path) -> None:
    batch = RandomCrops(find_images([folder_of_pictures]), side=96).batch(0, 8)
    assert batch.shape == (8, 3, 96, 96)
    assert -1 <= batch.min() < -0.9
    assert 0.9 < batch.max() <= 1


def test_grey_crops_are_the_same_crops_without_colour(folder_of_pictures: Path) -> None:
    refs = find_images([folder_of_pictures])
    coloured = RandomCrops(refs, side=32).batch(0, 64)
    some = RandomCrops(refs, side=32, grey_share=0.25).batch(0, 64)
    grey = RandomCrops(refs, side=32, grey_share=1.0).batch(0, 64)
    luma = (coloured * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    assert (grey - luma).abs().max() <= 1.01 / 127.5  # a level, for rounding
    turned = [torch.equal(s, g) for s, g in zip(some, grey, strict=True)]
    kept = [torch.equal(s, c) for s, c in zip(some, coloured, strict=True)]
    assert all(t != k for t, k in zip(turned, kept, strict=True))
    assert 6 <= sum(turned) <= 26  # 16 expected, deviation 3.5


def test_large_pictures_are_drawn_more_often(folder_of_pictures: Path) -> None:
    refs = find_images([folder_of_pictures])
    cumulative = RandomCrops(refs, side=96)._cumulative
    shares = [cumulative[0], *np.diff(cumulative)]
    assert shares == sorted(shares)
    assert shares[-1] > 1.1 * shares[0]


def test_it_is_the_area_of_a_picture_that_counts(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "black").save(tmp_path / "small.png")
    Image.new("RGB", (80, 80), "white").save(tmp_path / "large.png")
    crops = RandomCrops(find_images([tmp_path]), side=16).batch(0, 400)
    small = int((crops.amax((1, 2, 3)) < 0).sum())
    assert 0 < small < 400 / 10  # of 25 times the area and 5 times the width


def test_sizes_that_are_known_are_not_read_again(
    folder_of_pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder_of_pictures / "broken.png").write_text("hello")
    refs = find_images([folder_of_pictures])
    sizes = scan_sizes(refs)
    expected = {side: RandomCrops(refs, side=side) for side in (64, 112)}

    def refuse(self: ImageRef) -> None:
        raise AssertionError("opened again")

    with monkeypatch.context() as patch:
        patch.setattr(ImageRef, "open", refuse)
        again = {side: RandomCrops(refs, side=side, sizes=sizes) for side in expected}
    for side, crops in expected.items():
        assert again[side].skipped == crops.skipped
        assert torch.equal(again[side].batch(3, 4), crops.batch(3, 4))


def test_unusable_pictures_are_named(
    folder_of_pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder_of_pictures / "broken.png").write_text("hello")
    crops = RandomCrops(find_images([folder_of_pictures]), side=112)
    assert [Path(name).name for name in crops.skipped] == ["0.png", "broken.png"]
    assert "broken.png" in caplog.text
    assert "1 of 7 pictures are smaller" in caplog.text


def test_a_picture_that_cannot_be_decoded_is_replaced(
    folder_of_pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder_of_pictures / "3.png"
    path.write_bytes(path.read_bytes()[:-2000])
    crops = RandomCrops(find_images([folder_of_pictures]), side=96)
    for step in range(4):
        assert crops.batch(step, 8).shape == (8, 3, 96, 96)
    assert caplog.text.count("3.png") == 1


def test_decoded_pictures_are_kept_as_far_as_the_memory_goes(
    folder_of_pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = find_images([folder_of_pictures])
    sizes = scan_sizes(refs)
    decoded: list[str] = []
    load = ImageRef.load
    monkeypatch.setattr(ImageRef, "load", lambda ref: (decoded.append(ref.name), load(ref))[1])

    def drawn(gib: float) -> list[str]:
        decoded.clear()
        crops = RandomCrops(refs, side=96, cache_gib=gib, sizes=sizes)
        crops.batch(0, 64)
        return list(decoded)

    whole = sum(3 * width * height for width, height in sizes)  # type: ignore[misc]
    none, all_, half = drawn(0), drawn(whole / 2**30), drawn(whole / 2 / 2**30)
    assert len(none) == 64
    assert sorted(all_) == sorted(set(none))
    kept = {name for name in half if half.count(name) == 1}
    assert 1 <= len(kept) < len(set(none))  # once decoded, once for all
    assert all(none.count(name) == half.count(name) for name in set(none) - kept)


def test_nothing_usable(folder_of_pictures: Path) -> None:
    with pytest.raises(ImageError, match="none of the 6 pictures"):
        RandomCrops(find_images([folder_of_pictures]), side=256)

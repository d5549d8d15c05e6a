from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from parscale_ear.data import reference
from parscale_ear.data.images import ImageError
from parscale_ear.data.reference import (
    load_reference,
    wheel_photographs,
    wheel_reference,
    wheel_squares,
)


def test_the_default_is_200_crops_and_more_of_many_scenes() -> None:
    found = wheel_reference(210)
    assert found.pictures.shape == (210, 3, 256, 256)
    assert found.pictures.dtype == torch.uint8
    assert len(set(found.clusters)) == 13
    assert "compares models" in found.warning
    assert len({picture.numpy().tobytes() for picture in found.pictures}) == 210
    short = {scene: min(photograph.size) for scene, photograph in wheel_photographs()}
    for name in found.names:  # no photograph is enlarged
        scene, resized, _ = name.split()
        assert int(resized.removesuffix("px")) <= short[scene]


def test_the_same_everywhere_and_a_prefix_of_more() -> None:
    few, many = wheel_reference(16), wheel_reference(30)
    assert torch.equal(few.pictures, many.pictures[:16])
    assert few.digest() != many.digest()
    # As every supported Pillow and NumPy must make it: figures of two machines are of the same pictures.
    assert few.digest().startswith("b37964c3c6e5")


def test_both_motorcycles_are_one_scene() -> None:
    found = wheel_reference(14)
    scenes = [name.split()[0] for name in found.names]
    cluster = {c for c, s in zip(found.clusters, scenes, strict=True) if s == "motorcycle"}
    assert scenes.count("motorcycle") == 2
    assert len(cluster) == 1


def test_pictures_of_a_directory_are_scenes_of_their_own(folder_of_pictures: Path) -> None:
    found = load_reference(5, directory=folder_of_pictures)
    assert found.clusters == (0, 1, 2, 3, 4)
    assert found.as_dict()["scenes"] == 5
    assert torch.equal(
        load_reference(5, directory=str(folder_of_pictures)).pictures, found.pictures
    )


def test_a_changed_photograph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package, name, scene, _ = reference.WHEEL_PHOTOGRAPHS[0]
    monkeypatch.setattr(reference, "WHEEL_PHOTOGRAPHS", ((package, name, scene, "0" * 16),))
    with pytest.raises(ImageError, match="another version"):
        wheel_reference(4)


def test_a_directory(folder_of_pictures: Path) -> None:
    (folder_of_pictures / "broken.png").write_text("hello")
    found = load_reference(10, directory=folder_of_pictures)
    assert found.pictures.shape == (6, 3, 256, 256)
    assert "6 of the 10" in found.warning
    assert "broken" in found.warning
    (folder_of_pictures / "broken.png").unlink()
    four = load_reference(4, directory=folder_of_pictures)
    assert four.warning == ""
    assert list(four.names) != sorted(found.names)[:4]  # mixed
    assert four.names == load_reference(4, directory=folder_of_pictures).names


def test_a_directory_with_too_little(tmp_path: Path) -> None:
    Image.new("RGB", (300, 300)).save(tmp_path / "only.png")
    with pytest.raises(ImageError, match="at least 4"):
        load_reference(10, directory=tmp_path)


def test_no_network_for_imagenette(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "Imagenette", no_network)
    with pytest.raises(ImageError, match="--ref-dir"):
        load_reference(10, name="imagenette", cache=tmp_path)


def test_a_part_of_imagenette_is_not_measured(tmp_path: Path) -> None:
    folder = tmp_path / "imagenette2-320" / "val" / "n01440764"
    folder.mkdir(parents=True)
    for index in range(5):
        Image.new("RGB", (64, 64)).save(folder / f"{index}.png")
    with pytest.raises(ImageError, match=r"holds 5 of Imagenette's 3,925 .*delete it"):
        load_reference(5, name="imagenette", cache=tmp_path)


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        load_reference(1)
    with pytest.raises(ValueError, match="wheels or imagenette"):
        load_reference(5, name="coco")


def test_squares_of_several_sizes() -> None:
    small, source = wheel_squares(128)
    assert small.shape == (14, 3, 128, 128)
    assert source == "14 photographs"
    large, _ = wheel_squares(512)
    assert 4 <= len(large) < 14  # none is enlarged
    mosaics, source = wheel_squares(1024)
    assert mosaics.shape[1:] == (3, 1024, 1024)
    assert "mosaics" in source
    assert torch.equal(mosaics[0, :, 512:, :512], large[2])
    for side, message in ((8191, "no photographs"), (2048, "too few photographs")):
        with pytest.raises(ValueError, match=message):
            wheel_squares(side)

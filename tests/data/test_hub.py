from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from parscale_ear.data.images import ImageError, find_images

datasets = pytest.importorskip("datasets", reason="needs Hugging Face datasets")


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((20, 24, 3), value, dtype=np.uint8))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two pictures in two classes, a damaged one and none, as save_to_disk writes them."""
    encoded = []
    for value in (10, 20):
        buffer = io.BytesIO()
        picture(value).save(buffer, format="PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    encoded += [{"bytes": b"no picture", "path": None}, None]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    data = datasets.Dataset.from_dict(
        {"image": encoded, "label": [1, 0, 1, None]}, features=features
    )
    folder = tmp_path / "saved"
    data.save_to_disk(str(folder))
    return folder


def test_a_saved_dataset(saved: Path) -> None:
    refs = find_images([f"hf:{saved}"])
    assert [ref.label for ref in refs] == ["dog", "cat", "dog", ""]
    assert [ref.relative for ref in refs] == [f"0000000{k}" for k in range(4)]
    assert [np.array(ref.load())[0, 0, 0] for ref in refs[:2]] == [10, 20]
    assert {ref.origin for ref in refs} == {"saved"}  # no machine path
    with pytest.raises(ImageError, match="not a readable picture"):
        refs[2].load()
    with pytest.raises(ImageError, match="no picture in this row"):
        refs[3].load()


def test_a_split_does_not_give_the_folder_away(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": b"x", "path": None}]}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "saved"))
    (ref,) = find_images([f"hf:{tmp_path}/saved:test"])
    assert ref.origin == "saved:test"


def test_a_split_of_a_single_dataset_must_be_its_own(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="leave out :test"):
        find_images([f"hf:{saved}:test"])
    rows = {"image": [{"bytes": b"x", "path": None}]}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    data = datasets.Dataset.from_dict(rows, features=features, split="test")
    data.save_to_disk(str(tmp_path / "part"))
    assert len(find_images([f"hf:{tmp_path}/part:test"])) == 1


def test_a_dataset_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="could not be opened"):
        find_images([f"hf:{tmp_path}/nothing"])


def test_a_dataset_without_pictures(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "texts"))
    with pytest.raises(ImageError, match=r"no column of pictures.*found text"):
        find_images([f"hf:{tmp_path}/texts"])


def test_without_a_split_it_is_the_training_pictures(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "cls": datasets.Value("int64")}
    )
    splits = {
        split: datasets.Dataset.from_dict(
            {"image": [{"bytes": b"x", "path": None}], "cls": [number]}, features=features
        )
        for split, number in (("test", 3), ("train", 7))
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    (ref,) = find_images([f"hf:{tmp_path}/saved"])
    assert ref.label == "7"  # its number, as there are no names


def test_a_test_sets_missing_labels_are_none(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"image": [{"bytes": b"x", "path": None}] * 2, "label": [-1, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    assert [ref.label for ref in find_images([f"hf:{tmp_path}/saved"])] == ["", "dog"]


def test_pictures_that_lie_beside_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, value in (("cat", 10), ("dog", 20)):
        (tmp_path / "data" / name).mkdir(parents=True)
        picture(value).save(tmp_path / "data" / name / "0.png")
    refs = find_images([f"hf:{tmp_path}/data"])
    assert [ref.label for ref in refs] == ["cat", "dog"]
    assert [np.array(ref.load())[0, 0, 0] for ref in refs] == [10, 20]


def test_other_columns_are_not_looked_at(saved: Path, tmp_path: Path) -> None:
    data = datasets.load_from_disk(str(saved)).select([0])
    data = data.add_column("mask", [{"bytes": b"no picture", "path": None}])
    data.cast_column("mask", datasets.Image()).save_to_disk(str(tmp_path / "masks"))
    (ref,) = find_images([f"hf:{tmp_path}/masks"])
    assert np.array(ref.load())[0, 0, 0] == 10

"""Pictures out of datasets of Hugging Face's ``datasets`` (needs that package)."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from parscale_ear.data.images import ImageError, ImageRef

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")


@dataclass(frozen=True)
class HubRef(ImageRef):
    """One row of a dataset; ``path`` is the dataset, ``member`` the row."""

    row: int = 0

    @property
    def origin(self) -> str:
        """Name of the dataset; of a local one without its folder."""
        name, colon, split = self.path.as_posix().partition(":")
        return (Path(name).name if Path(name).exists() else name) + colon + split

    def open(self) -> Image.Image:
        """The picture as Pillow opens it (pixels not yet decoded)."""
        dataset, column = _open(str(self.path))
        with self._telling("not a readable row"):
            # The column alone: others (masks, sound) would be decoded, too.
            value = dataset.select_columns([column])[self.row][column]
        if value is None:
            reason = "no picture in this row"
            raise ImageError(f"{self.name}: {reason}", reason)
        with self._telling("not a readable picture"):
            if value["bytes"] is None:
                return Image.open(value["path"])
            return Image.open(io.BytesIO(value["bytes"]))


@lru_cache(maxsize=8)
def _open(text: str) -> tuple[Any, str]:
    """A dataset, memory-mapped, with pictures left encoded; and the name of their column."""
    try:
        import datasets
    except ImportError as error:
        raise ImageError(f"hf:{text} needs Hugging Face datasets: pip install datasets") from error
    name, _, split = text.partition(":")
    try:
        if Path(name).is_dir() and any(
            (Path(name) / f).exists() for f in ("state.json", "dataset_dict.json")
        ):
            dataset = datasets.load_from_disk(name)
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset[split or "train"]
            elif split and split != str(dataset.split):
                raise ValueError(f"it is one dataset, not several splits; leave out :{split}")
        else:
            dataset = datasets.load_dataset(name, split=split or "train")
        column = next((c for c in IMAGE_COLUMNS if c in dataset.column_names), None)
        if column is not None:
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # of many kinds: network, names, formats
        reason = " ".join(str(error).split())[:160]
        raise ImageError(f"hf:{text} could not be opened ({reason})") from error
    if column is None:
        raise ImageError(
            f"hf:{text} has no column of pictures: looked for {', '.join(IMAGE_COLUMNS)}, "
            f"found {', '.join(dataset.column_names)}"
        )
    return dataset, column


def _label(value: Any, names: Any) -> str:
    """A class by name; empty: none."""
    if value is None or (isinstance(value, int) and value < 0):
        return ""
    return str(names[value]) if names else str(value)


def hub_images(text: str) -> list[ImageRef]:
    """Every picture of the dataset ``PATH_OR_NAME[:SPLIT]``; the split is ``train`` if not named.

    Raises:
        ImageError: it cannot be had, is empty, or has no column of pictures.
    """
    dataset, _ = _open(text)
    labels: list[str | None] = [None] * len(dataset)
    for column in LABEL_COLUMNS:
        if column in dataset.column_names:
            names = getattr(dataset.features[column], "names", None)
            labels = [_label(value, names) for value in dataset[column]]
            break
    if not labels:
        raise ImageError(f"hf:{text} is empty")
    return [
        HubRef(Path(text), member=f"{row:08d}", cls=label, row=row)
        for row, label in enumerate(labels)
    ]

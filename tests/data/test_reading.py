from __future__ import annotations

import threading
from collections.abc import Callable
from typing import cast

import pytest
from PIL import Image

from parscale_ear.data.images import ImageError, ImageRef
from parscale_ear.data.reading import read_batches, read_squares


class Ref:
    """A picture of one grey level."""

    def __init__(self, level: int, then: Callable[[], object] = lambda: None) -> None:
        self.level, self.then, self.key = level, then, f"{level}.png"

    def load(self) -> Image.Image:
        self.then()
        if self.level < 0:
            raise ImageError(f"{self.key}: damaged", "damaged")
        return Image.new("RGB", (16, 16), (self.level,) * 3)


def groups(*levels: list[int]) -> list[list[ImageRef]]:
    return [[cast(ImageRef, Ref(level)) for level in group] for group in levels]


def test_no_batch_has_pictures_of_two_groups() -> None:
    found = [
        (number, [int(pixels[0, 0, 0]) for pixels in batch.pixels], sorted(batch.skipped))
        for number, batch in read_batches(
            groups([1, 2, 3], [], [4, -1, 5], [-2]), 16, 2, readers=2, ahead=3
        )
    ]
    assert found == [
        (0, [1, 2], []),
        (0, [3], []),
        (2, [4, 5], ["-1.png"]),
        (3, [], ["-2.png"]),
    ]


def test_pictures_of_the_next_group_are_read_meanwhile() -> None:
    begun = threading.Event()
    first = [cast(ImageRef, Ref(k)) for k in range(2)]
    batches = read_batches([first, [cast(ImageRef, Ref(7, begun.set))]], 16, 2, readers=1, ahead=2)
    number, _ = next(batches)
    assert number == 0
    assert begun.wait(60)  # though nobody has asked for the second group
    assert next(batches)[0] == 1
    with pytest.raises(StopIteration):
        next(batches)


def test_whoever_stops_early_leaves_the_rest_unread() -> None:
    begun, go_on = [], threading.Event()

    def wait() -> None:
        begun.append(1)
        assert go_on.wait(60)

    refs = [cast(ImageRef, Ref(0)), *(cast(ImageRef, Ref(k, wait)) for k in range(1, 40))]
    squares = read_squares(refs, 16, readers=0, ahead=30)  # fewer than one thread is one
    ref, _ = next(squares)
    assert ref is refs[0]
    threading.Timer(0.2, go_on.set).start()
    squares.close()  # type: ignore[attr-defined]
    assert len(begun) <= 1  # what was being read, and none of the 29 behind it

"""Reads pictures ahead of whoever uses them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from torch import Tensor

from parscale_ear.data.images import ImageError, ImageRef, resize_and_crop, to_pixels


def read_squares(
    refs: Sequence[ImageRef], side: int, readers: int, ahead: int
) -> Iterator[tuple[ImageRef, Tensor | str]]:
    """Pictures by the protocol, in order, read ahead by threads.

    Yields:
        A picture and its pixels, (3, side, side), 8-bit, or why it cannot be read.
    """

    def load(ref: ImageRef) -> Tensor | str:
        try:
            return to_pixels(resize_and_crop(ref.load(), side))
        except ImageError as error:
            return error.reason

    with ThreadPoolExecutor(max_workers=max(1, readers)) as pool:
        pending: deque[tuple[ImageRef, Future[Tensor | str]]] = deque()
        try:
            for ref in refs:
                pending.append((ref, pool.submit(load, ref)))
                if len(pending) > ahead:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            for _, future in pending:
                future.cancel()


@dataclass
class Batch:
    """Consecutive pictures, and those among them that cannot be read."""

    refs: list[ImageRef] = field(default_factory=list)  # of the pixels
    pixels: list[Tensor] = field(default_factory=list)  # (3, side, side) each, 8-bit
    skipped: dict[str, str] = field(default_factory=dict)  # key of a picture → why

    def __len__(self) -> int:
        """How many pictures were passed over, read or not."""
        return len(self.refs) + len(self.skipped)


def add_skipped(skipped: dict[str, str], more: Mapping[str, str]) -> None:
    """Adds pictures to those skipped; namesakes get a number, so that none goes uncounted."""
    for key, reason in more.items():
        name, number = key, 1
        while name in skipped:
            number += 1
            name = f"{key} ({number})"
        skipped[name] = reason


def read_batches(
    groups: Sequence[Sequence[ImageRef]], side: int, size: int, *, readers: int, ahead: int
) -> Iterator[tuple[int, Batch]]:
    """Batches of ``size`` readable pictures, in order; a group's last one may have fewer, or none.

    No batch has pictures of two groups, but those of the next one are read meanwhile.

    Yields:
        The number of a group and a batch of its pictures; one at least of every group that is not
        empty.
    """
    refs = [ref for group in groups for ref in group]
    squares = read_squares(refs, side, readers, ahead)
    for number, group in enumerate(groups):
        batch = Batch()
        for ref, pixels in islice(squares, len(group)):
            if isinstance(pixels, str):
                add_skipped(batch.skipped, {ref.key: pixels})
                continue
            batch.refs.append(ref)
            batch.pixels.append(pixels)
            if len(batch.refs) == size:
                yield number, batch
                batch = Batch()
        if len(batch):
            yield number, batch

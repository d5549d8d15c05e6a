"""Random training crops: the batch of step n is a function of the seed and n alone.

That makes an interrupted training resume exactly, with no state of its own to store.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from parscale_ear.data.images import ImageError, ImageRef, from_uint8, to_grey

MAX_TRIES = 1000
SCANNERS = 8  # threads that open pictures for their sizes; they mostly wait for the disk
log = logging.getLogger(__name__)
Sizes = Sequence[
    tuple[int, int] | ImageError
]  # width and height of a picture, or why there is none


def scan_sizes(refs: Sequence[ImageRef]) -> Sizes:
    """Width and height of every picture, in pixels as stored; of a damaged one what is wrong.

    Once for all :class:`RandomCrops` of the same pictures.
    """

    def scan(ref: ImageRef) -> tuple[int, int] | ImageError:
        try:
            return ref.dimensions()
        except ImageError as error:
            return error

    with ThreadPoolExecutor(SCANNERS) as pool:
        return list(pool.map(scan, refs))


class RandomCrops:
    """Square crops of a set of pictures; a picture is drawn the more often the larger it is.

    Half of the crops are taken at the pictures' own scale; the other half is up to
    ``max_reduction`` times larger and reduced by Lanczos. Half are mirrored; ``grey_share`` of them
    are turned to grey, as colour photographs alone teach nothing about those without.
    """

    def __init__(
        self,
        refs: Sequence[ImageRef],
        *,
        side: int,
        seed: int = 0,
        max_reduction: float = 1.4,
        grey_share: float = 0.0,
        cache_gib: float = 2.0,
        sizes: Sizes | None = None,
    ) -> None:
        """Takes the pictures that are large enough; a damaged or too small one is logged.

        Args:
            refs: the pictures.
            side: of the crops, in pixels.
            seed: of every random choice.
            max_reduction: the largest factor by which a crop is reduced.
            grey_share: probability that a crop is turned to grey.
            cache_gib: memory for decoded pictures, GiB; those beyond it are decoded every time.
            sizes: of ``refs``, by :func:`scan_sizes`; None: they are read now.

        Raises:
            ImageError: no picture is left.
        """
        self.side, self.seed, self.max_reduction = side, seed, max_reduction
        self.grey_share = grey_share
        self.refs: list[ImageRef] = []
        self.skipped: dict[str, str] = {}  # name of a picture → why it is not used
        self.damaged: set[str] = set()  # names of pictures that cannot be read
        self._lock = threading.Lock()  # batches may be prepared by several threads
        areas = []
        for ref, size in zip(refs, scan_sizes(refs) if sizes is None else sizes, strict=True):
            if isinstance(size, ImageError):
                self._skip(ref, str(size))
                continue
            width, height = size
            if min(width, height) < side:
                self.skipped[ref.name] = f"{width}×{height} is smaller than a crop of {side}"
                continue
            self.refs.append(ref)
            areas.append((width - side + 1.0) * (height - side + 1.0) + side * side)
        small = len(refs) - len(self.refs) - len(self.damaged)
        if small:
            log.warning("%d of %d pictures are smaller than a crop of %d", small, len(refs), side)
        if not self.refs:
            raise ImageError(f"none of the {len(refs)} pictures can give a crop of {side}×{side}")
        cumulative = np.cumsum(areas)
        self._cumulative = cumulative / cumulative[-1]  # ends at 1 exactly
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._cache_bytes_left = int(cache_gib * 2**30)

    def _skip(self, ref: ImageRef, reason: str) -> None:
        with self._lock:
            if ref.name in self.skipped:
                return
            self.damaged.add(ref.name)
            self.skipped[ref.name] = reason
        log.warning("skipped %s", reason)

    def _pixels(self, index: int) -> NDArray[np.uint8]:
        """A decoded picture, (H, W, 3)."""
        if index in self._cache:
            return self._cache[index]
        pixels = np.asarray(self.refs[index].load())
        with self._lock:
            if index not in self._cache and pixels.nbytes <= self._cache_bytes_left:
                self._cache_bytes_left -= pixels.nbytes
                self._cache[index] = pixels
        return pixels

    def batch(self, step: int, size: int, first: int = 0) -> Tensor:
        """Crops of one step: (size, 3, side, side), FP32 in [−1, 1].

        Args:
            step: number of the step.
            size: how many crops.
            first: number of the first of them among the step's crops, of which every process of a
                distributed training takes a stretch.

        Raises:
            ImageError: hardly any picture can be decoded.
        """
        crops = np.stack([self._draw(step, first + k) for k in range(size)])
        images = torch.from_numpy(crops).permute(0, 3, 1, 2)  # (B, 3, side, side)
        return from_uint8(images)

    def _draw(self, step: int, number: int) -> NDArray[np.uint8]:
        """One crop, (side, side, 3); a damaged picture is replaced by another."""
        rng = np.random.default_rng([self.seed, step, number])
        for _ in range(MAX_TRIES):
            index = int(np.searchsorted(self._cumulative, rng.random()))
            try:
                pixels = self._pixels(index)
            except ImageError as error:
                self._skip(self.refs[index], str(error))
                continue
            return self._crop(pixels, rng)
        raise ImageError("hardly any of the pictures can be decoded; check the images")

    def _crop(self, pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        height, width = pixels.shape[:2]
        reduce, factor, across, down, mirror, grey = rng.random(6)
        window = self.side
        if reduce < 0.5:
            largest = min(self.max_reduction, min(height, width) / self.side)
            window = int(self.side * (1 + (largest - 1) * factor))
        top, left = int(down * (height - window + 1)), int(across * (width - window + 1))
        crop = pixels[top : top + window, left : left + window]
        if window != self.side:
            resized = Image.fromarray(crop).resize((self.side, self.side), Image.Resampling.LANCZOS)
            crop = np.asarray(resized)
        if grey < self.grey_share:
            crop = to_grey(crop)
        return crop[:, ::-1] if mirror < 0.5 else crop

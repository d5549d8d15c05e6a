"""Reference pictures: a directory of the user's, Imagenette, or photographs out of wheels.

By default a fixed list of real photographs that the wheels of scikit-image and matplotlib carry,
checked by SHA-256 and cut into deterministic 256×256 crops at several scales, so that every
machine measures on the same pixels with no network. So few photographs give a distance for
comparison only; a report says so.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from parscale_ear.data.images import (
    ImageError,
    ImageRef,
    find_images,
    resize_and_crop,
    to_pixels,
    to_rgb,
)

SIDE = 256
WHEELS = "the wheels of scikit-image and matplotlib"  # in the source of their crops
IMAGENETTE_PICTURES = 3_925  # of its validation part
LEAST = 4  # pictures that a distance between two halves needs
SHORT_SIDES = (256, 320, 400, 512)  # a crop's photograph is resized to one of these, never up

# (package, file inside it, scene, first 16 digits of the SHA-256)
WHEEL_PHOTOGRAPHS: tuple[tuple[str, str, str, str], ...] = (
    ("skimage", "data/astronaut.png", "astronaut", "88431cd9653ccd53"),
    ("skimage", "data/chelsea.png", "chelsea", "596aa1e7cb875eb7"),
    ("skimage", "data/coffee.png", "coffee", "cc02f8ca188b167c"),
    ("skimage", "data/rocket.jpg", "rocket", "c2dd0de7c538df8d"),
    ("skimage", "data/motorcycle_left.png", "motorcycle", "db18e9c415761740"),
    ("skimage", "data/motorcycle_right.png", "motorcycle", "5fc913ae870e42a4"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "grace_hopper", "a8ca6d734765703b"),
    ("skimage", "data/hubble_deep_field.jpg", "hubble_deep_field", "3a19c5dd8a927a93"),
    ("skimage", "data/camera.png", "camera", "b0793d2adda0fa6a"),
    ("skimage", "data/coins.png", "coins", "f8d773fc9cfa6f4d"),
    ("skimage", "data/brick.png", "brick", "7966caf324f6ba84"),
    ("skimage", "data/grass.png", "grass", "b6b6022426b38936"),
    ("skimage", "data/gravel.png", "gravel", "c48615b451bf1e60"),
    ("skimage", "data/moon.png", "moon", "78739619d11f7eb9"),
)


@dataclass(frozen=True)
class ReferenceSet:
    """Pictures to measure on."""

    pictures: Tensor  # (N, 3, 256, 256), 8-bit
    clusters: tuple[int, ...]  # the photograph that each picture was cut from
    names: tuple[str, ...]  # of each picture
    source: str  # where they come from, for a report
    warning: str  # what to keep in mind, for a report; empty: nothing

    def digest(self) -> str:
        """SHA-256 of the pixels: two reports with the same one measured on the same pictures."""
        return hashlib.sha256(self.pictures.numpy().tobytes()).hexdigest()

    def as_dict(self) -> dict[str, object]:
        """For a JSON report."""
        return {
            "source": self.source,
            "pictures": len(self.pictures),
            "scenes": len(set(self.clusters)),
            "sha256": self.digest(),
            "warning": self.warning,
        }


def wheel_photographs() -> list[tuple[str, Image.Image]]:
    """Scene and picture of every photograph in :data:`WHEEL_PHOTOGRAPHS`.

    Raises:
        ImageError: one is missing from the installed wheel or has other bytes.
    """
    photographs = []
    for package, name, scene, expected in WHEEL_PHOTOGRAPHS:
        path = Path(str(resources.files(package) / name))
        if not path.is_file():
            raise ImageError(f"{path}: missing; reinstall {package}, or use --ref-dir")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if not found.startswith(expected):
            raise ImageError(
                f"{path}: another version of the photograph (SHA-256 {found[:16]}, expected "
                f"{expected}); install what poetry.lock says, or use --ref-dir"
            )
        photographs.append((scene, to_rgb(Image.open(path))))
    return photographs


def wheel_reference(count: int = 256) -> ReferenceSet:
    """Crops of the photographs out of wheels, dealt in turn: the same for every user.

    Args:
        count: number of 256×256 crops.

    Raises:
        ImageError: a photograph is missing or changed.
        ValueError: ``count`` is below 4.
    """
    if count < LEAST:
        raise ValueError(f"at least {LEAST} crops are needed, got {count}")
    photographs = wheel_photographs()
    scenes = sorted({scene for scene, _ in photographs})
    generators = [np.random.default_rng([0, which]) for which in range(len(photographs))]
    pictures: list[Tensor] = []
    clusters: list[int] = []
    names: list[str] = []
    taken: set[tuple[int, str]] = set()
    for index in range(count):
        which = index % len(photographs)
        scene, photograph = photographs[which]
        crop, position = _crop(photograph, generators[which])
        while (which, position) in taken:  # a square photograph has one crop at the smallest scale
            crop, position = _crop(photograph, generators[which])
        taken.add((which, position))
        pictures.append(to_pixels(crop))
        clusters.append(scenes.index(scene))
        names.append(f"{scene} {position}")
    return ReferenceSet(
        pictures=torch.stack(pictures),
        clusters=tuple(clusters),
        names=tuple(names),
        source=f"{count} crops of {len(photographs)} photographs ({len(scenes)} scenes) in "
        f"{WHEELS}: {', '.join(scenes)}",
        warning=f"only {len(scenes)} scenes: the distance compares models, it is not a benchmark",
    )


def wheel_squares(side: int) -> tuple[Tensor, str]:
    """One square of every photograph out of wheels that is large enough, by the usual protocol.

    None is enlarged. Beyond the photographs' sizes four squares are laid together to one, which
    shows that large pictures work, and nothing about photographs of that resolution.

    Args:
        side: of the squares, in pixels.

    Returns:
        (N, 3, side, side), 8-bit, and where they come from.

    Raises:
        ImageError: a photograph is missing or changed.
        ValueError: there is nothing of that size.
    """
    photographs = [p for _, p in wheel_photographs() if min(p.size) >= side]
    if len(photographs) >= LEAST:
        squares = [to_pixels(resize_and_crop(p, side)) for p in photographs]
        return torch.stack(squares), f"{len(squares)} photographs"
    if side % 2 or side < 2 * LEAST:
        raise ValueError(f"no photographs of {side} pixels, nor squares of half of it")
    quarters, _ = wheel_squares(side // 2)
    if len(quarters) < 4:
        raise ValueError(f"too few photographs for squares of {side} pixels")
    mosaics = [
        torch.cat([torch.cat(tuple(four[:2]), dim=2), torch.cat(tuple(four[2:]), dim=2)], dim=1)
        for four in quarters[: len(quarters) // 4 * 4].split(4)
    ]
    return torch.stack(mosaics), f"{len(mosaics)} mosaics of 4 squares of {side // 2}"


def _crop(photograph: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, str]:
    native = min(photograph.size)
    short = min(native, int(rng.choice(SHORT_SIDES)))
    scale = short / native
    width, height = (max(SIDE, round(n * scale)) for n in photograph.size)
    resized = photograph.resize((width, height), Image.Resampling.LANCZOS)
    left, top = int(rng.integers(width - SIDE + 1)), int(rng.integers(height - SIDE + 1))
    return resized.crop((left, top, left + SIDE, top + SIDE)), f"{short}px +{left}+{top}"


def directory_reference(folder: str | Path, count: int) -> ReferenceSet:
    """``count`` pictures under a folder (or in a tar), centre crops by the protocol.

    They are taken in a fixed, mixed order, as files are often sorted by class.

    Raises:
        ImageError: no such folder, no pictures in it, or fewer than four usable ones.
    """
    name = Path(folder).name
    return _from_refs(_mixed(find_images([folder])), count, f"the folder {name}")


def imagenette_reference(count: int, root: Path) -> ReferenceSet:
    """Imagenette's validation pictures, downloaded through torchvision into ``root``.

    Raises:
        ImageError: they cannot be downloaded.
    """
    from torchvision.datasets import Imagenette

    folder = root / "imagenette2-320" / "val"
    if not folder.is_dir():
        try:
            Imagenette(str(root), split="val", size="320px", download=True)
        except (OSError, RuntimeError) as error:
            raise ImageError(
                f"Imagenette could not be downloaded ({type(error).__name__}); use --ref-dir with "
                "a folder of photographs, or leave --reference out"
            ) from error
    refs = find_images([folder])
    if len(refs) != IMAGENETTE_PICTURES:
        raise ImageError(
            f"{folder} holds {len(refs):,} of Imagenette's {IMAGENETTE_PICTURES:,} validation pictures; "
            "delete it, to download them anew"
        )
    return _from_refs(_mixed(refs), count, "Imagenette validation pictures")


def _mixed(refs: list[ImageRef]) -> list[ImageRef]:
    """In an order that is the same for as many pictures everywhere."""
    return [refs[i] for i in np.random.default_rng(0).permutation(len(refs))]


def _from_refs(refs: list[ImageRef], count: int, source: str) -> ReferenceSet:
    pictures: list[Tensor] = []
    names: list[str] = []
    damaged: list[str] = []
    for ref in refs:
        if len(pictures) == count:
            break
        try:
            crop = resize_and_crop(ref.load(), SIDE)
        except ImageError:
            damaged.append(ref.stem)
            continue
        pictures.append(to_pixels(crop))
        names.append(ref.stem)
    if len(pictures) < LEAST:
        raise ImageError(f"{source}: at least {LEAST} readable pictures are needed")
    warnings = []
    if len(pictures) < count:
        warnings.append(f"only {len(pictures)} of the {count} pictures asked for")
    if damaged:
        warnings.append(f"{len(damaged)} damaged pictures left out: {', '.join(damaged[:5])}")
    return ReferenceSet(
        pictures=torch.stack(pictures),
        clusters=tuple(range(len(pictures))),
        names=tuple(names),
        source=f"{len(pictures)} pictures of {source}",
        warning="; ".join(warnings),
    )


def load_reference(
    count: int,
    *,
    directory: str | Path | None = None,
    name: str = "wheels",
    cache: str | Path | None = None,
) -> ReferenceSet:
    """Reference pictures: ``directory`` if given, else by name.

    Args:
        count: how many.
        directory: a folder or tar of photographs.
        name: ``wheels`` or ``imagenette``.
        cache: where Imagenette is kept.

    Raises:
        ImageError: they cannot be had.
        ValueError: ``name`` is unknown or ``count`` is below 4.
    """
    if count < LEAST:
        raise ValueError(f"at least {LEAST} pictures are needed, got {count}")
    if directory is not None:
        return directory_reference(directory, count)
    if name == "imagenette":
        default = Path.home() / ".cache" / "parscale_ear"
        return imagenette_reference(count, Path(cache or default))
    if name != "wheels":
        raise ValueError(f"reference must be wheels or imagenette, got {name!r}")
    return wheel_reference(count)

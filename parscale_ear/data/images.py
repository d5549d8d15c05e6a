"""Pictures in and out: files, folders, tar shards and datasets; 8-bit pixels and model tensors.

Shapes: B batch, H W pixels.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from parscale_ear.checkpoint import atomic_path

log = logging.getLogger(__name__)
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpf"}
)
# Files in folders and archives that may hold pictures too: they are passed over, with a warning.
UNREAD = frozenset({".gz", ".tgz", ".zip", ".7z", ".gif", ".avif", ".heic", ".jxl"})
LONGEST = 8  # times its short side, up to which a picture is resized as a whole
MOST_OF_ONE = 1.5  # highest level up to which floats are taken as of 0 to 1, and so of 0 to 255
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue; ITU-R BT.601
HEADER_BYTES = 2**16  # of a file in an archive: enough for most formats to tell the size


class ImageError(Exception):
    """A picture or a folder of pictures that cannot be used; the message is one line.

    ``reason`` is the message without the path of the picture.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        """Keeps both; ``reason`` is the whole message where none is given."""
        super().__init__(message, reason)
        self.reason = reason or message

    def __str__(self) -> str:
        """The message."""
        return str(self.args[0])


@dataclass(frozen=True)
class ImageRef:
    """Where one picture lies: a file, or a stretch of bytes in a tar archive."""

    path: Path  # the file or the archive
    member: str | None = None  # name inside the archive
    offset: int = 0  # first byte inside the archive
    size: int = 0  # bytes inside the archive
    root: Path | None = None  # the folder that was searched
    cls: str | None = None  # class by name or number, where a sidecar or a dataset says it

    @property
    def relative(self) -> str:
        """Its name inside what was searched, the same on every machine."""
        if self.member is not None:
            return self.member
        if self.root is None:
            return self.path.name
        return self.path.relative_to(self.root).as_posix()

    @property
    def origin(self) -> str:
        """Name of the folder that was searched, or of the archive, below the folder that was.

        The same on every machine.
        """
        if self.member is None:
            return "" if self.root is None else self.root.resolve().name
        if self.root is None:
            return self.path.name
        return self.path.relative_to(self.root).as_posix()

    @property
    def key(self) -> str:
        """Its origin and name: tells it from a namesake elsewhere, and names no other folder."""
        return "/".join(part for part in (self.origin, self.relative) if part)

    @property
    def label(self) -> str:
        """Its class: as stated, else the folder that it lies in; empty: none."""
        if self.cls is not None:
            return self.cls
        return Path(self.relative).parent.name

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return str(self.path) if self.member is None else f"{self.path}:{self.member}"

    @property
    def stem(self) -> str:
        """File name without folder and extension."""
        return Path(self.member or self.path).stem

    def open(self) -> Image.Image:
        """The picture as Pillow opens it (pixels not yet decoded).

        Raises:
            ImageError: it is not a picture, or cannot be read.
        """
        with self._telling("not a readable picture"):
            if self.member is None:
                return Image.open(self.path)
            with open(self.path, "rb") as archive:
                archive.seek(self.offset)
                return Image.open(io.BytesIO(archive.read(self.size)))

    def dimensions(self) -> tuple[int, int]:
        """Width and height as stored, from as few bytes as tell it.

        Raises:
            ImageError: it is not a picture, or cannot be read.
        """
        if self.member is not None and self.size > HEADER_BYTES:
            try:
                with replace(self, size=HEADER_BYTES).open() as picture:
                    return picture.size
            except ImageError:
                log.debug("%s: the size is not near the beginning", self.name)
        with self.open() as picture:
            return picture.size

    def load(self) -> Image.Image:
        """The picture as upright RGB: EXIF rotation applied, transparency laid over white.

        Raises:
            ImageError: it is not a picture, or is damaged.
        """
        picture = self.open()
        with self._telling("damaged picture"):
            return to_rgb(picture)

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Turns whatever a decoder throws at damaged bytes into an ImageError."""
        try:
            yield
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # struct.error, TypeError ...: Pillow's decoders keep no list
            reason = f"{what} ({_reason(error)})"
            raise ImageError(f"{self.name}: {reason}", reason) from error


def _reason(error: Exception) -> str:
    """The first line of an error, without paths."""
    if isinstance(error, UnidentifiedImageError):
        return "of no known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        return f"of more than {most} million pixels; cut or reduce it first"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text[:120]


def to_rgb(picture: Image.Image) -> Image.Image:
    """Upright 8-bit RGB: EXIF rotation applied, transparency over white, 16 bits and floats scaled."""
    kind = picture.format  # which a turned copy does not know
    picture.load()  # outside of the try: after a decoder's error Pillow gives what it has as the whole
    try:
        picture = ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception:  # rotten EXIF: as it lies, if its pixels can be read
        log.debug("the EXIF data cannot be read; the picture stays as it lies", exc_info=True)
    if picture.mode == "F" or picture.mode.startswith("I"):  # Pillow would clip these to 255
        grey = np.asarray(picture, dtype=np.float64)
        if (
            picture.mode == "F"
        ):  # as floats are mostly stored: up to 1 (some more after resampling), or
            highest = grey.max(initial=0)  # as many as 8 or 16 bits hold
            if not np.isfinite(grey).all():
                raise ValueError("it holds NaN or infinity")
            if highest <= MOST_OF_ONE:
                scale = 255.0
            else:
                scale = 1.0 if highest <= 255 * MOST_OF_ONE else 255 / 65535
        else:  # modes "I;16..." and PGM: 16 bits; "I": 32 bits that may hold 8 or 16
            deep = picture.mode != "I" or kind == "PPM" or grey.max(initial=0) > 255
            scale = 255 / 65535 if deep else 1.0
        return Image.fromarray((grey * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def find_images(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[ImageRef]:
    """Every picture under the given files, folders, tar archives and datasets (or one), sorted.

    A folder is searched deeply, for pictures and for tar archives (webdataset shards). In a tar,
    ``NAME.cls`` beside ``NAME.jpg`` gives its class. ``hf:PATH_OR_NAME[:SPLIT]`` is a dataset of
    Hugging Face's ``datasets`` (see ``data.hub``). Only names are read; pictures stay on disk.

    Raises:
        ImageError: a path does not exist, or holds no picture. Of a damaged archive the pictures in
            front of the damage are taken, and a warning is logged.
    """
    refs: list[ImageRef] = []
    for text in [paths] if isinstance(paths, str | os.PathLike) else paths:
        if str(text).startswith("hf:"):
            from parscale_ear.data.hub import hub_images

            refs.extend(hub_images(str(text)[3:]))
            continue
        if not str(text):
            raise ImageError("a name of pictures is empty; name files, folders or tars")
        path = Path(text)
        if path.is_dir():
            found = _folder_members(path)
        elif not path.exists():
            raise ImageError(f"{path}: no such file or folder")
        elif not path.is_file():
            raise ImageError(
                f"{path}: a pipe or a device; write what it gives to a file, and name that"
            )
        elif _is_tar(path):
            found = _tar_members(path)
        else:
            found = [ImageRef(path)]
        if not found:
            raise ImageError(f"{path}: no picture in it ({', '.join(sorted(EXTENSIONS))})")
        refs.extend(found)
    return refs


def _walk(folder: Path) -> Iterator[Path]:
    """Every path below a folder; what cannot be listed is logged, the folder itself an error.

    Raises:
        ImageError: ``folder`` cannot be listed.
    """

    def tell(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise ImageError(f"{folder}: {error.strerror}") from error
        log.warning("%s: %s; what is in it is left out", error.filename, error.strerror)

    for place, folders, names in os.walk(folder, onerror=tell, followlinks=True):
        here = Path(place)
        folders[:] = [name for name in folders if not _leads_back(here / name, folder)]
        yield from (here / name for name in names)


def _leads_back(path: Path, folder: Path) -> bool:
    """Whether it is a link to a folder that it lies in, up to ``folder``; that is logged."""
    if not path.is_symlink():
        return False
    above = [place for place in path.parents if place == folder or folder in place.parents]
    if not any(path.samefile(place) for place in above):
        return False
    log.warning("%s: links to a folder that it lies in; left out", path)
    return True


def _folder_members(folder: Path) -> list[ImageRef]:
    files = sorted(f for f in _walk(folder) if f.is_file())
    refs = [ImageRef(f, root=folder) for f in files if f.suffix.lower() in EXTENSIONS]
    for shard in (f for f in files if f.suffix.lower() == ".tar"):
        try:
            refs.extend(_tar_members(shard, folder))
        except ImageError as error:
            log.warning("skipped %s", error)
    _tell_unread(folder, [f.suffix.lower() for f in files])
    return refs


def _tell_unread(place: Path, extensions: Sequence[str]) -> None:
    """Logs which files of a folder or an archive may hold pictures but are not read."""
    unread = [extension for extension in extensions if extension in UNREAD]
    if unread:
        log.warning(
            "%s: %d files are passed over (%s); unpack archives, and convert pictures to PNG",
            place, len(unread), ", ".join(sorted(set(unread))),
        )  # fmt: skip


def _is_tar(path: Path) -> bool:
    """Whether it is a tar archive; what cannot be read is none, and says so when it is."""
    try:
        return tarfile.is_tarfile(path)
    except OSError:
        return False


def _tar_members(path: Path, root: Path | None = None) -> list[ImageRef]:
    refs: list[ImageRef] = []
    classes: dict[str, str] = {}  # name without extension → class
    links = 0
    others: list[str] = []  # extensions of files that are neither
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                stem, extension = os.path.splitext(member.name)
                extension = extension.lower()
                if not member.isfile():
                    links += (member.islnk() or member.issym()) and extension in EXTENSIONS
                    continue
                if extension in EXTENSIONS:
                    refs.append(ImageRef(path, member.name, member.offset_data, member.size, root))
                elif extension == ".cls":
                    content = archive.extractfile(member)
                    assert content is not None  # it is a file
                    classes[stem] = content.read(256).decode("utf-8", "replace").strip()
                else:
                    others.append(extension)
        _check_end(path, archive.offset)
    except (tarfile.TarError, OSError) as error:
        damage = f"{path}: not a whole, uncompressed tar archive ({_reason(error)})"
        if not refs:
            raise ImageError(damage) from error
        log.warning("%s; the %d pictures in front of the damage are used", damage, len(refs))
    _tell_unread(path, others)
    if links:
        log.warning("%s: %d links to pictures are passed over; unpack the archive", path, links)
    refs = [replace(r, cls=classes.get(os.path.splitext(r.member or "")[0])) for r in refs]
    return sorted(refs, key=lambda ref: ref.name)


def _check_end(path: Path, offset: int) -> None:
    """Looks whether an archive ends where its reader stopped, as that stops at damage, too.

    Raises:
        TarError: there is no end mark (a block of zeros), or something behind it.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it is cut off: its end mark is missing")
        if any(block):
            raise tarfile.ReadError("a member's header is damaged")
        while block := file.read(2**20):
            if any(block):
                raise tarfile.ReadError("more follows behind its end mark")


def list_digest(refs: Sequence[ImageRef]) -> str:
    """SHA-256 of a list of pictures by their names and classes, in their order."""
    names = [f"{ref.origin}\t{ref.relative}\t{ref.label}" for ref in refs]
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def class_names(refs: Sequence[ImageRef]) -> list[str]:
    """Classes of pictures by name, numbers in the order of numbers; "" for those of none."""
    labels = {ref.label for ref in refs}
    return sorted(labels, key=lambda s: (0, int(s), s) if s.isdecimal() else (1, 0, s))


def output_names(refs: Sequence[ImageRef]) -> list[str]:
    """A file name without extension for every picture; namesakes get a number."""
    namer = Namer()
    return [namer(ref.stem) for ref in refs]


class Namer:
    """Gives out names, none twice whatever the case of letters; namesakes get a number, from 2."""

    def __init__(self) -> None:
        """Has given none yet."""
        self._last: dict[str, int] = {}  # name in lower case → its namesakes' last number

    def __call__(self, name: str) -> str:
        """The name itself, or with the next number that is free."""
        given, key = name, name.lower()
        while given.lower() in self._last:
            self._last[key] += 1
            given = f"{name}_{self._last[key]}"
        self._last[given.lower()] = 1
        return given


def to_pixels(picture: Image.Image | NDArray[np.uint8]) -> Tensor:
    """8-bit RGB, (H, W, 3) → (3, H, W), 8-bit."""
    return torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def to_tensor(picture: Image.Image | NDArray[np.uint8]) -> Tensor:
    """8-bit RGB, (H, W, 3) → (3, H, W), FP32 in [−1, 1]."""
    return from_uint8(to_pixels(picture))


def to_uint8(images: Tensor) -> Tensor:
    """[−1, 1] → 8 bits, clamped and rounded, as a PNG would hold it. Any shape and dtype."""
    return images.float().clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8)


def from_uint8(pictures: Tensor) -> Tensor:
    """8 bits → [−1, 1], FP32. Any shape.

    Raises:
        ValueError: they are not 8-bit.
    """
    if pictures.dtype != torch.uint8:
        raise ValueError(f"8-bit pictures (torch.uint8) are needed, got {pictures.dtype}")
    return (pictures.float() / 127.5).sub_(1.0)


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W), in [−1, 1] or 8-bit → Pillow RGB."""
    pixels = image if image.dtype == torch.uint8 else to_uint8(image)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def to_grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """8-bit RGB, (..., 3) → the same shape, with the luma (ITU-R BT.601) in every channel."""
    luma = (pixels @ LUMA).round().astype(np.uint8)
    return np.repeat(luma[..., None], 3, axis=-1)


def save_png(image: Tensor | Image.Image, path: str | os.PathLike[str]) -> None:
    """Writes a PNG atomically; a tensor is (3, H, W) in [−1, 1] or 8-bit."""
    picture = to_picture(image) if isinstance(image, Tensor) else image
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def resize_and_crop(picture: Image.Image, side: int = 256) -> Image.Image:
    """Short side to ``side`` by Lanczos (other side rounded), then the centre square.

    The protocol that tokenizers are compared by; offsets are floored. Of a very long picture only
    the part that is kept is resized: the whole of 1×20000 would be five million pixels wide.
    """
    scale = side / min(picture.size)
    size = tuple(side if n == min(picture.size) else round(n * scale) for n in picture.size)
    if max(picture.size) > LONGEST * min(picture.size):

        def kept(length: int, resized: int) -> tuple[float, float]:  # of the picture as it is
            first = (resized - side) // 2
            return length * first / resized, length * (first + side) / resized

        left, right = kept(picture.width, size[0])
        top, bottom = kept(picture.height, size[1])
        box = (left, top, right, bottom)
        return picture.resize((side, side), Image.Resampling.LANCZOS, box=box)
    picture = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def load_squares(refs: Iterable[ImageRef], side: int = 256) -> Tensor:
    """Pictures by the protocol of :func:`resize_and_crop`: (N, 3, side, side), 8-bit.

    Damaged pictures are left out, and logged.

    Raises:
        ImageError: none is left.
    """
    squares = []
    for ref in refs:
        try:
            squares.append(to_pixels(resize_and_crop(ref.load(), side)))
        except ImageError as error:
            log.warning("skipped %s", error)
    if not squares:
        raise ImageError("none of the pictures can be read")
    return torch.stack(squares)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Repeats the last row and column until both sides are multiples; (B, 3, H, W)."""
    height, width = images.shape[-2:]
    padding = (0, -width % multiple, 0, -height % multiple)
    if not any(padding):
        return images
    return torch.nn.functional.pad(images, padding, mode="replicate")


def grid(rows: Sequence[Sequence[Tensor]], gap: int = 4) -> Image.Image:
    """Lays out equally sized (3, H, W) pictures in rows, on white."""
    cells = [
        [to_uint8(cell) if cell.dtype != torch.uint8 else cell for cell in row] for row in rows
    ]
    height, width = cells[0][0].shape[-2:]
    across = max(map(len, cells))
    sheet = Image.new(
        "RGB", (across * (width + gap) - gap, len(cells) * (height + gap) - gap), "white"
    )
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            sheet.paste(to_picture(cell), (x * (width + gap), y * (height + gap)))
    return sheet

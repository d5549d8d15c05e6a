from __future__ import annotations

import io
import os
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from parscale_ear.data import images
from parscale_ear.data.images import ImageError, ImageRef, find_images


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack((x * 4, y * 4, x + y), axis=-1).astype(np.uint8))


def test_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° to the right
    gradient().save(tmp_path / "x.png", exif=exif)
    loaded = ImageRef(tmp_path / "x.png").load()
    assert loaded.size == (24, 40)
    assert loaded.tobytes() == gradient().transpose(Image.Transpose.ROTATE_270).tobytes()


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    picture = gradient().convert("RGBA")
    picture.putalpha(0)
    picture.save(tmp_path / "x.png")
    assert np.asarray(ImageRef(tmp_path / "x.png").load()).min() == 255


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_is_laid_over_white(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGB", (8, 8), "black").convert(mode)
    transparent = (0, 0, 0) if mode == "RGB" else picture.getpixel((0, 0))
    picture.save(tmp_path / "x.png", transparency=transparent)
    assert np.asarray(ImageRef(tmp_path / "x.png").load()).min() == 255


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    gradient().convert(mode).save(path)
    loaded = ImageRef(path).load()
    assert (loaded.mode, loaded.size) == ("RGB", (40, 24))


def test_16_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "x.png")
    loaded = np.asarray(ImageRef(tmp_path / "x.png").load())[..., 0]
    np.testing.assert_allclose(loaded.astype(float), grey / 257, atol=0.51)


@pytest.mark.parametrize(("most", "per_level"), [(255, 1), (65535, 257)])
def test_32_bit_grey_may_hold_8_or_16_bits(tmp_path: Path, most: int, per_level: int) -> None:
    grey = np.linspace(0, most, 256).astype(np.int32).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "x.tif")
    loaded = np.asarray(ImageRef(tmp_path / "x.tif").load())[..., 0]
    np.testing.assert_allclose(loaded.astype(float), grey / per_level, atol=0.51)


def test_8_bits_survive_the_way_to_a_tensor_and_back(tmp_path: Path) -> None:
    picture = Image.fromarray(
        np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8)
    )
    tensor = images.to_tensor(picture)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    images.save_png(tensor, tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").tobytes() == picture.tobytes()


def test_resize_and_crop_by_the_protocol() -> None:
    wide = images.resize_and_crop(gradient(300, 200), 100)
    assert wide.size == (100, 100)
    expected = gradient(300, 200).resize((150, 100), Image.Resampling.LANCZOS)
    assert wide.tobytes() == expected.crop((25, 0, 125, 100)).tobytes()
    assert images.resize_and_crop(gradient(100, 103), 100).size == (100, 100)
    expected = gradient(61, 41).resize((30, 20), Image.Resampling.LANCZOS)  # 29.76: rounded
    found = images.resize_and_crop(gradient(61, 41), 20)
    assert found.tobytes() == expected.crop((5, 0, 25, 20)).tobytes()


@pytest.mark.parametrize("size", [(430, 47), (47, 431), (300, 9), (1, 40)])
def test_of_a_very_long_picture_only_what_is_kept_is_resized(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = gradient(*size)
    cut = np.asarray(images.resize_and_crop(picture, 64), dtype=int)
    monkeypatch.setattr(images, "LONGEST", 1000)
    whole = np.asarray(images.resize_and_crop(picture, 64), dtype=int)
    assert cut.shape == (64, 64, 3)
    assert np.abs(cut - whole).max() <= 1  # positions are the same but for rounding


def test_a_line_of_pixels_does_not_become_a_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = Image.Image.resize

    def resize(self: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        made.append(size[0] * size[1])
        return plain(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", resize)
    assert images.resize_and_crop(Image.new("RGB", (1, 20_000)), 256).size == (256, 256)
    assert made == [256 * 256]


def test_from_8_bits() -> None:
    found = images.from_uint8(torch.tensor([0, 51, 255], dtype=torch.uint8))
    torch.testing.assert_close(found, torch.tensor([-1.0, -0.6, 1.0]))


def test_to_8_bits_what_is_out_of_range_becomes_black_or_white() -> None:
    assert images.to_uint8(torch.tensor([-3.0, -1.01, 1.01, 3.0])).tolist() == [0, 0, 255, 255]


def test_a_grid_has_its_rows_below_one_another_with_white_between() -> None:
    cells = [
        [torch.full((3, 2, 5), 10 * y + x, dtype=torch.uint8) for x in range(3)] for y in (0, 1)
    ]
    cells[1].pop()  # a shorter row
    sheet = np.asarray(images.grid(cells, gap=1))
    assert sheet.shape == (5, 17, 3)
    assert sheet[:, ::3, 1].tolist() == [
        [0, 0, 1, 1, 2, 2],
        [0, 0, 1, 1, 2, 2],
        [255] * 6,
        [10, 10, 11, 11, 255, 255],
        [10, 10, 11, 11, 255, 255],
    ]
    assert sheet[0, :, 1].tolist() == [0] * 5 + [255] + [1] * 5 + [255] + [2] * 5


def test_padding_repeats_the_edge() -> None:
    x = torch.rand(1, 3, 17, 16)
    padded = images.pad_to_multiple(x, 16)
    assert padded.shape == (1, 3, 32, 16)
    assert torch.equal(padded[:, :, 17:], x[:, :, 16:].expand(-1, -1, 15, -1))
    assert images.pad_to_multiple(x[:, :, :16], 16).shape == (1, 3, 16, 16)


class TestFinding:
    def test_folders_tars_and_files(self, tmp_path: Path) -> None:
        (tmp_path / "d" / "e").mkdir(parents=True)
        gradient().save(tmp_path / "d" / "b.png")
        gradient().save(tmp_path / "d" / "e" / "a.JPG", format="JPEG")
        (tmp_path / "d" / "notes.txt").write_text("no picture")
        with tarfile.open(tmp_path / "t.tar", "w") as archive:
            archive.add(tmp_path / "d" / "b.png", "inside/b.png")
            archive.add(tmp_path / "d" / "notes.txt", "notes.txt")
        refs = find_images([tmp_path / "d", tmp_path / "t.tar", tmp_path / "d" / "b.png"])
        assert [ref.stem for ref in refs] == ["b", "a", "b", "b"]
        assert refs[2].load().tobytes() == gradient().tobytes()
        assert images.output_names(refs) == ["b", "a", "b_2", "b_3"]

    def test_what_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="no such file"):
            find_images([tmp_path / "nothing"])
        with pytest.raises(ImageError, match="no picture in it"):
            find_images([tmp_path])

    def test_a_compressed_tar_is_refused(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("x.png"))
        with pytest.raises(ImageError, match="uncompressed"):
            find_images([tmp_path / "t.tar.gz"])

    def test_what_decoders_throw_is_an_image_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bomb = PngInfo()
        bomb.add_text("x", "x" * 2_000_000, zip=True)
        gradient().save(tmp_path / "bomb.png", pnginfo=bomb)
        with pytest.raises(ImageError, match=r"bomb\.png: not a readable picture") as caught:
            ImageRef(tmp_path / "bomb.png").open()
        assert str(tmp_path) not in caught.value.reason

        def rotten(*_: object) -> None:
            raise struct.error("unpack requires a buffer of 4 bytes")

        gradient().save(tmp_path / "x.png")
        monkeypatch.setattr(ImageOps, "exif_transpose", rotten)
        assert ImageRef(tmp_path / "x.png").load().tobytes() == gradient().tobytes()
        monkeypatch.setattr(Image.Image, "convert", rotten)
        with pytest.raises(ImageError, match=r"x\.png: damaged picture \(unpack requires"):
            ImageRef(tmp_path / "x.png").load()

    def test_namesakes_of_two_archives_have_keys_of_their_own(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            gradient().save(tmp_path / name / "1.png")
            with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
                archive.add(tmp_path / name / "1.png", "1.png")
        paths = [tmp_path / name for name in ("a", "b", "a.tar", "b.tar")]
        keys = [ref.key for ref in find_images(paths)]
        assert keys == ["a/1.png", "b/1.png", "a.tar/1.png", "b.tar/1.png"]
        for name in ("a", "b"):
            (tmp_path / f"{name}.tar").rename(tmp_path / name / "000.tar")
        keys = [ref.key for ref in find_images([tmp_path])]
        assert keys[2:] == ["a/000.tar/1.png", "b/000.tar/1.png"]

    @pytest.mark.parametrize(("kind", "opened"), [("PNG", 1), ("JPEG", 2)])
    def test_of_an_archive_only_headers_are_read_for_sizes(
        self, kind: str, opened: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
        name = f"1.{kind.lower()}"
        # A JPEG says how large it is behind its colour profile, however long that is.
        profile = None if kind == "PNG" else bytes(2 * images.HEADER_BYTES)
        Image.fromarray(noise).save(tmp_path / name, format=kind, icc_profile=profile)
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.add(tmp_path / name, name)
        (ref,) = find_images([tmp_path / "a.tar"])
        assert ref.size > images.HEADER_BYTES
        read: list[int] = []
        plain = ImageRef.open

        def spy(self: ImageRef) -> Image.Image:
            read.append(self.size)
            return plain(self)

        monkeypatch.setattr(ImageRef, "open", spy)
        assert ref.dimensions() == (300, 200)
        assert read == [images.HEADER_BYTES, ref.size][:opened]

    def test_links_in_a_tar_are_told(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        gradient().save(tmp_path / "a.png")
        os.link(tmp_path / "a.png", tmp_path / "b.png")
        os.symlink("a.png", tmp_path / "c.png")
        with tarfile.open(tmp_path / "t.tar", "w") as archive:
            for name in ("a.png", "b.png", "c.png"):
                archive.add(tmp_path / name, name)
        assert [ref.stem for ref in find_images([tmp_path / "t.tar"])] == ["a"]
        assert "t.tar: 2 links to pictures are passed over" in caplog.text

    def test_a_cut_off_shard_gives_what_it_has(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "a.png")
        folder = tmp_path / "shards"
        folder.mkdir()
        for name in ("0.tar", "1.tar", "2.tar"):
            with tarfile.open(folder / name, "w") as archive:
                for number in range(3):
                    archive.add(tmp_path / "a.png", arcname=f"{name}{number}.png")
        whole = (folder / "0.tar").read_bytes()
        each = len(whole) // 4
        (folder / "1.tar").write_bytes(whole[: 2 * each + each // 2])
        (folder / "2.tar").write_bytes(b"no archive" * 100)
        (folder / "3.tar.gz").touch()
        (folder / "4.gif").touch()
        refs = find_images([folder])
        assert 5 <= len(refs) <= 6  # the last one of the second shard may be named, and be damaged
        assert [ref.load().size for ref in refs[:5]] == [(64, 64)] * 5
        told = caplog.text
        assert "1.tar: not a whole" in told
        assert "pictures in front of the damage are used" in told
        assert "skipped" in told
        assert "2.tar: not a whole" in told
        assert "2 files are passed over (.gif, .gz)" in told

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            ("flip", "a member's header is damaged"),
            ("cut", "it is cut off: its end mark is missing"),
            ("cut within", "it is cut off: its end mark is missing"),
            ("hole", "more follows behind its end mark"),
            ("two", "more follows behind its end mark"),
        ],
    )
    def test_what_lies_behind_damage_is_told(
        self, tmp_path: Path, damage: str, reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Where Python's reader of archives just stops."""
        gradient().save(tmp_path / "a.png")
        with tarfile.open(tmp_path / "t.tar", "w") as archive:
            for number in range(6):
                archive.add(tmp_path / "a.png", arcname=f"{number}.png")
        assert len(find_images([tmp_path / "t.tar"])) == 6
        assert not caplog.text
        with tarfile.open(tmp_path / "t.tar") as archive:
            third = archive.getmembers()[3].offset
        content = bytearray((tmp_path / "t.tar").read_bytes())
        if damage == "flip":
            content[third + 20] ^= 1
        elif damage == "hole":
            content[third : third + 1024] = bytes(1024)
        elif damage == "two":
            content = content + content
        else:
            content = content[: third + (100 if damage == "cut within" else 0)]
        (tmp_path / "t.tar").write_bytes(content)
        assert len(find_images([tmp_path / "t.tar"])) == (6 if damage == "two" else 3)
        assert f"t.tar: not a whole, uncompressed tar archive ({reason})" in caplog.text

    def test_other_names_of_known_formats(self, tmp_path: Path) -> None:
        kinds = {"pgm": "PPM", "pnm": "PPM", "jp2": "JPEG2000", "j2k": "JPEG2000"}
        for name in ("a.jfif", "b.jpe", "c.pgm", "d.pnm", "e.JPG", "f.jp2", "g.j2k"):
            kind = kinds.get(name[2:], "JPEG")
            gradient().convert("L").save(tmp_path / name, format=kind)
        refs = find_images([tmp_path])
        assert [ref.stem for ref in refs] == list("abcdefg")
        assert {ref.load().size for ref in refs} == {(40, 24)}

    def test_what_is_not_read_in_a_tar_is_told(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        gradient().save(tmp_path / "a.png")
        with tarfile.open(tmp_path / "t.tar", "w") as archive:
            for name in ("a.png", "b.heic", "c.json"):
                archive.add(tmp_path / "a.png", name)
        assert [ref.stem for ref in find_images([tmp_path / "t.tar"])] == ["a"]
        assert "t.tar: 1 files are passed over (.heic)" in caplog.text

    def test_damaged_pictures(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        gradient(200, 200).save(buffer, format="PNG")
        (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:-300])
        (tmp_path / "text.png").write_text("hello")
        with pytest.raises(ImageError, match=r"cut\.png: damaged"):
            ImageRef(tmp_path / "cut.png").load()
        with pytest.raises(ImageError, match=r"text\.png: not a readable picture"):
            ImageRef(tmp_path / "text.png").load()

    @pytest.mark.parametrize(
        ("name", "options"), [("a.png", {}), ("a.tif", {"compression": "tiff_adobe_deflate"})]
    )
    def test_pictures_that_are_damaged_within(
        self, tmp_path: Path, name: str, options: dict[str, str]
    ) -> None:
        """Pillow hands the part that it decoded out as the whole when it is asked once more."""
        noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name, **options)
        content = bytearray((tmp_path / name).read_bytes())
        middle = len(content) // 2
        content[middle : middle + 4000] = bytes(4000)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match="damaged"):
            ImageRef(tmp_path / name).load()

    def test_an_archive_that_cannot_be_read_is_passed_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        gradient(20, 20).save(tmp_path / "a.png")
        (tmp_path / "b.tar").write_bytes(b"")

        def closed(*_: object) -> object:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(images.tarfile, "open", closed)
        monkeypatch.setattr(images.tarfile, "is_tarfile", closed)
        assert [ref.stem for ref in find_images(tmp_path)] == ["a"]
        assert "b.tar" in caplog.text
        assert "Permission denied" in caplog.text
        assert [ref.stem for ref in find_images([tmp_path / "a.png"])] == ["a"]


def test_eight_bits_are_what_they_are_taken_for() -> None:
    with pytest.raises(ValueError, match=r"8-bit pictures .* got torch.float32"):
        images.from_uint8(torch.zeros(3, 4, 4))


def test_webdataset_shards_with_classes(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as archive:
            for sample in range(2):
                buffer = io.BytesIO()
                gradient(width=20 + 2 * shard + sample).save(buffer, format="JPEG")
                files = {"jpg": buffer.getvalue(), "cls": f"{10 * shard + sample}\n".encode()}
                for extension, content in files.items():
                    info = tarfile.TarInfo(f"{shard}{sample}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    refs = find_images([folder])
    assert [ref.relative for ref in refs] == ["00.jpg", "01.jpg", "10.jpg", "11.jpg"]
    assert [ref.label for ref in refs] == ["0", "1", "10", "11"]
    assert [ref.load().width for ref in refs] == [20, 21, 22, 23]


def test_names_and_classes_of_a_folder(tmp_path: Path) -> None:
    for name in ("top.png", "cat/a.png", "dog/deep/b.png"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        gradient().save(path)
    refs = find_images([tmp_path / "set"])
    assert {r.relative: r.label for r in refs} == {
        "top.png": "",
        "cat/a.png": "cat",
        "dog/deep/b.png": "deep",
    }


@pytest.mark.parametrize(
    ("most", "scale"),
    [(1.0, 255.0), (1.02, 255.0), (200.0, 1.0), (283.0, 1.0), (65535.0, 255 / 65535)],
)
def test_float_grey_is_scaled_and_not_cut_off(tmp_path: Path, most: float, scale: float) -> None:
    grey = np.linspace(0, most, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "x.tif")
    loaded = np.asarray(ImageRef(tmp_path / "x.tif").load())[..., 0]
    np.testing.assert_allclose(loaded, np.minimum(grey * scale, 255), atol=0.51)


def test_floats_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    grey = np.full((8, 8), 0.5, dtype=np.float32)
    grey[3, 3] = np.nan
    Image.fromarray(grey).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match=r"x\.tif: damaged picture \(it holds NaN or infinity\)"):
        ImageRef(tmp_path / "x.tif").load()


@pytest.mark.parametrize("name", ["x.png", "x.pgm"])
def test_dark_16_bit_grey_stays_dark(tmp_path: Path, name: str) -> None:
    grey = np.full((8, 8), 200, dtype=np.uint16)
    if name == "x.pgm":
        (tmp_path / name).write_bytes(b"P5 8 8 65535\n" + grey.astype(">u2").tobytes())
    else:
        Image.fromarray(grey).save(tmp_path / name)
    assert np.asarray(ImageRef(tmp_path / name).load()).max() == 1


def test_a_picture_too_large_to_be_safe_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient(3000, 2000).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)
    with pytest.raises(ImageError, match="more than 4 million pixels; cut or reduce it first"):
        ImageRef(tmp_path / "x.png").load()


def test_folders_that_cannot_be_listed_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("open", "shut"):
        (tmp_path / name).mkdir()
        gradient().save(tmp_path / name / "1.png")
    plain = os.scandir

    def scandir(path: Any) -> Any:  # root may list what others may not
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [ref.relative for ref in find_images([tmp_path])] == ["open/1.png"]
    assert "shut: Permission denied; what is in it is left out" in caplog.text
    with pytest.raises(ImageError, match="shut: Permission denied"):
        find_images([tmp_path / "shut"])


def test_linked_class_folders_are_searched_and_loops_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("data/cat", "elsewhere/dog"):
        (tmp_path / folder).mkdir(parents=True)
        gradient().save(tmp_path / folder / "0.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "elsewhere" / "dog" / "back").symlink_to(tmp_path / "data")
    with caplog.at_level("WARNING"):
        refs = find_images([tmp_path / "data"])
    assert [ref.label for ref in refs] == ["cat", "dog"]
    assert "back: links to a folder that it lies in" in caplog.text


def test_an_empty_name_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient().save(tmp_path / "0.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match="empty"):
        find_images([""])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="SKIPPED: no named pipes here")
def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="pipe or a device"):
        find_images([tmp_path / "pipe"])


def test_squares_without_the_damaged_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("0", "2"):
        gradient().save(tmp_path / f"{name}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    squares = images.load_squares(find_images([tmp_path]), 16)
    assert squares.shape == (2, 3, 16, 16)
    assert squares.dtype == torch.uint8
    assert "1.png" in caplog.text
    (tmp_path / "0.png").unlink()
    (tmp_path / "2.png").unlink()
    with pytest.raises(ImageError, match="none of the pictures can be read"):
        images.load_squares(find_images([tmp_path]), 16)


def test_namesakes_get_the_next_free_number() -> None:
    namer = images.Namer()
    given = [namer(name) for name in ("a", "a_2", "A", "a", "b", "a_2", "a")]
    assert given == ["a", "a_2", "A_3", "a_4", "b", "a_2_2", "a_5"]


def test_classes_by_number_are_in_the_order_of_numbers() -> None:
    refs = [ImageRef(Path("x.png"), cls=name) for name in ("10", "2", "cat", "2", "0")]
    assert images.class_names(refs) == ["0", "2", "10", "cat"]


def test_one_name_is_as_good_as_a_list(folder_of_pictures: Path) -> None:
    expected = find_images([folder_of_pictures])
    assert find_images(folder_of_pictures) == expected
    assert find_images(str(folder_of_pictures)) == expected

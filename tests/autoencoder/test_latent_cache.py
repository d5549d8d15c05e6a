from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from parscale_ear.autoencoder import latent_cache
from parscale_ear.autoencoder.files import shipped_weights
from parscale_ear.autoencoder.latent_cache import (
    CacheOptions,
    CacheResult,
    encode_folder,
    encode_pictures,
)
from parscale_ear.autoencoder.latent_decoding import decode_folder
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.checkpoint import CheckpointError
from parscale_ear.data.images import ImageError, ImageRef, find_images, load_squares
from parscale_ear.data.latents import INDEX_FILE, LatentDataset, shard_name

OPTIONS = CacheOptions(side=64, batch=4, shard=5)


def test_latents_equal_those_in_memory(classes: Path, tmp_path: Path, shipped: ParScaleEAR) -> None:
    refs = find_images([classes])
    done: list[int] = []
    result = encode_folder(
        refs, tmp_path / "out", CacheOptions(**{**vars(OPTIONS), "mirror": True}),
        progress=done.append,
    )  # fmt: skip
    assert (result.pictures, result.encoded, sum(done)) == (12, 12, 14)
    name = classes.name  # of the folder, and no more of its path
    assert sorted(result.skipped) == [f"{name}/cat/07.png", f"{name}/dog/03.png"]
    for file in (tmp_path / "out").iterdir():
        assert str(classes.parent).encode() not in file.read_bytes()
    data = LatentDataset(tmp_path / "out", fingerprint=shipped.latent_fingerprint())
    assert data.classes == ["cat", "dog"]
    assert len(data) == 12
    good = [ref for ref in refs if ref.key not in result.skipped]
    pictures = load_squares(good, 64)
    # Bit for bit what the model gives for such a batch: of the readable pictures of each shard.
    expected = torch.cat([encode_pictures(shipped, part) for part in batches_of(pictures, refs)])
    for index, ref in enumerate(good):
        item = data[index]
        assert item["name"] == ref.relative
        assert data.classes[item["label"]] == ref.label
        assert torch.equal(item["latent"], expected[index])
    both = LatentDataset(tmp_path / "out", mirrored=True)
    flipped = torch.cat(
        [encode_pictures(shipped, part.flip(-1)) for part in batches_of(pictures, refs)]
    )
    assert len(both) == 24
    assert torch.equal(both[12 + 3]["latent"], flipped[3])
    assert torch.equal(both[-1]["latent"], flipped[-1])
    with pytest.raises(IndexError):
        both[24]
    with pytest.raises(TypeError, match="one latent at a time"):
        both[:8]  # type: ignore[index]
    data.verify()


def test_refined_latents_are_cached_as_the_model_gives_them(
    classes: Path, tmp_path: Path, shipped: ParScaleEAR
) -> None:
    out, refs = tmp_path / "out", find_images([classes / "dog"])
    asked = replace(OPTIONS, refinements=1, mirror=True)
    assert encode_folder(refs, out, asked).pictures == 4
    data = LatentDataset(out, mirrored=True)
    refs = [ref for ref in refs if "03" not in ref.relative]
    pictures = load_squares(refs, 64).float() / 127.5 - 1
    with torch.inference_mode():
        for index, picture in enumerate((*pictures, *pictures.flip(-1))):
            expected = shipped.encode(picture[None], refinements=1).mode()[0]
            torch.testing.assert_close(data[index]["latent"], expected, atol=1e-5, rtol=1e-5)
            plain = shipped.encode(picture[None]).mode()[0]
            assert not torch.allclose(data[index]["latent"], plain, atol=1e-2)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (1, 2)])
def test_a_folder_holds_latents_that_are_refined_alike(
    classes: Path, tmp_path: Path, first: int, second: int
) -> None:
    refs = find_images([classes / "dog"])
    encode_folder(refs, tmp_path / "out", replace(OPTIONS, refinements=first))
    with pytest.raises(CheckpointError, match="holds latents with another refinements"):
        encode_folder(refs, tmp_path / "out", replace(OPTIONS, refinements=second))


def test_latents_that_another_decoder_refined_do_not_mix(classes: Path, tmp_path: Path) -> None:
    refs = find_images([classes / "dog"])
    sharp = shipped_weights(decoder="sharp")
    encode_folder(refs, tmp_path / "plain", OPTIONS)
    assert encode_folder(refs, tmp_path / "plain", OPTIONS, weights=sharp).encoded == 0  # equal
    asked = replace(OPTIONS, refinements=1)
    encode_folder(refs, tmp_path / "out", asked)
    with pytest.raises(CheckpointError, match="holds latents with another weights"):
        encode_folder(refs, tmp_path / "out", asked, weights=sharp)


def test_folders_of_releases_without_refinements_are_gone_on_with(
    classes: Path, tmp_path: Path
) -> None:
    encode_folder(find_images([classes / "dog"]), tmp_path / "out", OPTIONS)
    job = json.loads((tmp_path / "out" / INDEX_FILE).read_text())["job"]
    assert "refinements" not in job  # so that these are equal


def batches_of(pictures: torch.Tensor, refs: list[ImageRef]) -> list[torch.Tensor]:
    """How the readable pictures of ``classes`` are dealt to shards of 5 and batches of 4."""
    readable = [ref.relative not in ("cat/07.png", "dog/03.png") for ref in refs]
    ends = np.cumsum([0] + [sum(readable[k : k + 5]) for k in range(0, len(refs), 5)])
    shards = [pictures[a:b] for a, b in itertools.pairwise(ends)]
    return [batch for shard in shards for batch in shard.split(4)]


def test_one_at_a_time_the_neighbours_do_not_matter(
    classes: Path, tmp_path: Path, shipped: ParScaleEAR
) -> None:
    refs = find_images([classes])
    encode_folder(refs, tmp_path / "out", CacheOptions(side=64, shard=5))
    data = LatentDataset(tmp_path / "out")
    for index in range(len(data)):
        (ref,) = (r for r in refs if r.relative == data[index]["name"])
        alone = encode_pictures(shipped, load_squares([ref], 64))[0]
        assert torch.equal(data[index]["latent"], alone)


def test_a_data_loader_reads_it(classes: Path, tmp_path: Path) -> None:
    encode_folder(find_images([classes]), tmp_path / "out", OPTIONS)
    data = LatentDataset(tmp_path / "out")
    loader = DataLoader(data, batch_size=5, num_workers=1)  # type: ignore[var-annotated]
    batches = list(loader)
    assert [len(b["latent"]) for b in batches] == [5, 5, 2]
    assert torch.equal(torch.cat([b["latent"] for b in batches])[7], data[7]["latent"])


@pytest.mark.usefixtures("one_thread")  # which each of the processes here has, too
def test_several_processes_give_the_same(classes: Path, tmp_path: Path) -> None:
    refs = find_images([classes])
    encode_folder(refs, tmp_path / "one", OPTIONS)
    result = encode_folder(refs, tmp_path / "two", OPTIONS, devices=("cpu", "cpu"))
    assert result.encoded == 12
    for rank in (1, 0):
        encode_folder(refs, tmp_path / "jobs", OPTIONS, rank=rank, world=2)
    for name in ("two", "jobs"):
        for number in range(3):
            shards = [(tmp_path / n / shard_name(number)).read_bytes() for n in ("one", name)]
            assert shards[0] == shards[1]
        assert (tmp_path / name / INDEX_FILE).read_text() == (
            tmp_path / "one" / INDEX_FILE
        ).read_text()


def test_a_killed_job_goes_on(tmp_path: Path) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    command = [
        *(sys.executable, "-m", "parscale_ear.cli", "encode", str(folder), str(out)),
        *("--side", "64", "--shard", "2", "--batch", "2", "--device", "cpu"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / shard_name(2)).exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    before = sorted(out.glob("shard-*"))
    assert 3 <= len(before) < 20
    with pytest.raises(CheckpointError, match="not finished"):
        LatentDataset(out)
    times = {path: path.stat().st_mtime_ns for path in before}
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["encoded"] == 40 - 2 * len(before)
    assert {path: path.stat().st_mtime_ns for path in before} == times
    data = LatentDataset(out)
    names = [data[k]["name"] for k in range(len(data))]
    assert names == [f"{index:02d}.png" for index in range(40)]  # none lost, none twice
    again = subprocess.run(command, capture_output=True, text=True)
    assert json.loads(again.stdout.splitlines()[-1])["encoded"] == 0


@pytest.mark.parametrize("fails", ["pictures", "memory"])
def test_a_folder_in_which_nothing_was_finished_is_free(
    fails: str, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, refs = tmp_path / "out", find_images([classes / "cat"])
    if fails == "pictures":
        (tmp_path / "a.png").write_bytes(b"no picture")
        with pytest.raises(ImageError, match="none of the pictures"):
            encode_folder(find_images([tmp_path / "a.png"]), out, OPTIONS)
    else:

        def full(*_: Any) -> None:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(latent_cache, "encode_pictures", full)
            with pytest.raises(MemoryError):
                encode_folder(refs, out, OPTIONS)
    assert not out.exists()
    assert encode_folder(refs, out, CacheOptions(side=32)).pictures == 8  # with other options


def test_what_ends_the_next_shard_leaves_the_finished_one(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = find_images([classes])
    second, load = refs[OPTIONS.shard].key, ImageRef.load

    def fails(ref: ImageRef) -> Image.Image:
        if ref.key == second:
            raise MemoryError
        return load(ref)

    monkeypatch.setattr(ImageRef, "load", fails)
    with pytest.raises(MemoryError):
        encode_folder(refs, tmp_path / "out", OPTIONS)
    assert [path.name for path in (tmp_path / "out").glob("shard-*")] == [shard_name(0)]
    monkeypatch.undo()
    assert encode_folder(refs, tmp_path / "out", OPTIONS).pictures == 12


def test_other_options_do_not_mix(classes: Path, tmp_path: Path) -> None:
    refs = find_images([classes])
    encode_folder(refs, tmp_path / "out", OPTIONS)
    with pytest.raises(CheckpointError, match="another side"):
        encode_folder(refs, tmp_path / "out", CacheOptions(**{**vars(OPTIONS), "side": 96}))
    with pytest.raises(CheckpointError, match="another list_sha256, pictures"):
        encode_folder(refs[1:], tmp_path / "out", OPTIONS)
    with pytest.raises(CheckpointError, match="is not empty"):
        encode_folder(refs, classes, OPTIONS)
    with pytest.raises(ValueError, match="--mirror"):
        LatentDataset(tmp_path / "out", mirrored=True)
    with pytest.raises(CheckpointError, match="another latent space"):
        LatentDataset(tmp_path / "out", fingerprint="0" * 64)


def test_damage_is_noticed(
    classes: Path, tmp_path: Path, flip_a_bit: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    encode_folder(find_images([classes]), out, OPTIONS)
    shard = out / shard_name(1)
    flip_a_bit(shard)
    with pytest.raises(CheckpointError, match="shard-00001"):
        LatentDataset(out).verify()
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"shard-00001\.safetensors: missing"):
        LatentDataset(out)
    (out / INDEX_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="not an index"):
        LatentDataset(out)


@pytest.mark.parametrize("damage", ["cut off", "fewer"])
def test_a_shard_that_does_not_fit_the_index_is_told(
    damage: str, classes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    encode_folder(find_images([classes]), out, OPTIONS)
    shard = out / shard_name(0)
    if damage == "cut off":
        shard.write_bytes(shard.read_bytes()[:2000])
    else:
        shard.write_bytes((out / shard_name(2)).read_bytes())
    with pytest.raises(CheckpointError, match=r"shard-00000.*delete it and run the same"):
        LatentDataset(out)[0]


def test_skipped_namesakes_are_all_counted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64), "red" if name == "a" else "blue").save(tmp_path / name / "1.png")
        (tmp_path / name / "0.png").write_bytes(b"no picture")
        with tarfile.open(tmp_path / name / "000.tar", "w") as archive:
            for file in ("0.png", "1.png"):
                archive.add(tmp_path / name / file, file)
    refs = find_images([tmp_path / "a" / "000.tar", tmp_path / "b" / "000.tar"])
    for shard in (1, 5):
        result = encode_folder(refs, tmp_path / f"out{shard}", CacheOptions(side=64, shard=shard))
        assert result.pictures == 2
        assert sorted(result.skipped) == ["000.tar/0.png", "000.tar/0.png (2)"]


def test_no_readable_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="none of the pictures"):
        encode_folder(find_images([tmp_path / "a.png"]), tmp_path / "out", OPTIONS)


@pytest.mark.parametrize(
    "changes", [{"side": 40}, {"side": 0}, {"batch": 0}, {"shard": 0}, {"dtype": "int8"}]
)
def test_options_name_the_bad_field(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        CacheOptions(**changes)  # type: ignore[arg-type]


def test_a_latent_is_the_readers_own(classes: Path, tmp_path: Path) -> None:
    encode_folder(find_images([classes]), tmp_path / "out", OPTIONS)
    data = LatentDataset(tmp_path / "out")
    latent = data[1]["latent"]
    as_it_was = latent.clone()
    latent.add_(1)
    assert torch.equal(data[1]["latent"], as_it_was)
    assert latent.untyped_storage().nbytes() == latent.numel() * latent.element_size()


def test_latents_that_are_not_finite_are_not_written(
    classes: Path, tmp_path: Path, broken_weights: Path
) -> None:
    with pytest.raises(ValueError, match="latents were not finite"):
        encode_folder(find_images([classes]), tmp_path / "out", OPTIONS, weights=broken_weights)
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.skipif(sys.platform != "linux", reason="SKIPPED: such names are Linux's")
def test_names_that_are_not_utf8(classes: Path, tmp_path: Path) -> None:
    os.rename(classes / "cat" / "01.png", os.fsencode(classes / "cat") + b"/caf\xe9.png")
    encode_folder(find_images([classes]), tmp_path / "out", OPTIONS)
    data = LatentDataset(tmp_path / "out")
    names = {data[k]["name"] for k in range(len(data))}
    assert os.fsdecode(b"caf\xe9.png") in {name.rpartition("/")[2] for name in names}
    assert decode_folder(tmp_path / "out", tmp_path / "png") == 12


def test_no_pictures_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no pictures to encode"):
        encode_folder([], tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


def test_an_index_that_lacks_something_is_told(classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode_folder(find_images([classes]), out, OPTIONS)
    index = json.loads((out / INDEX_FILE).read_text())
    for key in ("job", "complete", "format"):
        changed = {name: value for name, value in index.items() if name != key}
        (out / INDEX_FILE).write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=f"not an index of latents .*{key}"):
            LatentDataset(out)


def test_stores_in_the_dtype_that_is_asked_for(classes: Path, tmp_path: Path) -> None:
    refs = find_images([classes])
    encode_folder(refs, tmp_path / "out", CacheOptions(**{**vars(OPTIONS), "dtype": "bf16"}))
    half = LatentDataset(tmp_path / "out")[0]["latent"]
    encode_folder(refs, tmp_path / "whole", OPTIONS)
    whole = LatentDataset(tmp_path / "whole")[0]["latent"]
    assert (half.dtype, whole.dtype) == (torch.bfloat16, torch.float32)
    assert 0 < (half.float() - whole).abs().max() < 0.1


def test_what_was_done_before_counts_as_done(classes: Path, tmp_path: Path) -> None:
    refs = find_images([classes])
    encode_folder(refs, tmp_path / "out", OPTIONS)
    (tmp_path / "out" / shard_name(1)).unlink()
    done: list[int] = []
    result = encode_folder(refs, tmp_path / "out", OPTIONS, progress=done.append)
    assert sum(done) == len(refs)
    assert 0 < result.encoded < result.pictures == 12


def test_waiting_for_pictures_is_told_from_the_models_work(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands still but for 3 s a batch of pictures, 1 s a batch of latents."""
    now = [0.0]
    read, encode, write = (
        latent_cache.read_batches, latent_cache.encode_pictures, latent_cache.store.write_shard,
    )  # fmt: skip

    def later(seconds: float) -> None:
        now[0] += seconds

    def slowly(*arguments: Any, **options: Any) -> Any:
        for found in read(*arguments, **options):
            later(3)
            yield found

    monkeypatch.setattr(latent_cache, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(latent_cache, "read_batches", slowly)
    monkeypatch.setattr(latent_cache, "encode_pictures", lambda *a: (later(1), encode(*a))[1])
    monkeypatch.setattr(
        latent_cache.store, "write_shard", lambda *a, **o: (later(100), write(*a, **o))[1]
    )  # which is neither
    (classes / "cat" / "07.png").unlink()  # a damaged one
    batches = 2 + 1  # 8 pictures in shards of 5, in batches of 4
    result = encode_folder(find_images([classes / "cat"]), tmp_path / "out", OPTIONS)
    assert result.encoded == 8
    assert result.reading == pytest.approx(3 / 4)
    assert result.seconds == pytest.approx(batches * 4 + 2 * 100)


def test_unfinished_files_of_killed_jobs_go_and_keep_nobody_out(
    classes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    part = out / f".{shard_name(0)}.123.part"
    part.write_bytes(b"half")
    refs = find_images([classes])
    encode_folder(refs, out, OPTIONS, rank=0, world=2)
    assert part.exists()  # the other job may be writing it
    encode_folder(refs, out, OPTIONS, rank=1, world=2)
    assert sorted(p.name for p in out.iterdir()) == [INDEX_FILE, *map(shard_name, range(3))]


@pytest.mark.parametrize(("reading", "bound_by"), [(0.9, "reading pictures"), (0.1, "the model")])
def test_says_what_bounds_the_speed(reading: float, bound_by: str) -> None:
    assert CacheResult(1, 1, {}, 1.0, reading).bound_by == bound_by


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_job_beyond_the_last_is_refused(rank: int, classes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\)"):
        encode_folder(find_images([classes]), tmp_path / "out", OPTIONS, rank=rank, world=2)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_shard_of_another_job_does_not_get_in(
    when: str, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs, out, other = find_images([classes]), tmp_path / "out", tmp_path / "other"
    encode_folder(refs, other, replace(OPTIONS, dtype="bf16"))
    write = latent_cache.store.write_shard

    def comes_in(*arguments: Any, **options: Any) -> str:
        shutil.copy(other / shard_name(1), out)
        return write(*arguments, **options)

    if when == "before":
        encode_folder(refs, out, OPTIONS, rank=0, world=2)
        shutil.copy(other / shard_name(1), out)
    else:
        monkeypatch.setattr(latent_cache.store, "write_shard", comes_in)
    with pytest.raises(CheckpointError, match=r"shard-00001\.safetensors: of another job"):
        encode_folder(refs, out, OPTIONS, rank=0, world=2)
    with pytest.raises(CheckpointError, match="not finished"):
        LatentDataset(out)


def test_an_index_that_appears_meanwhile_is_looked_at(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs, out = find_images([classes]), tmp_path / "out"
    encode_folder(refs, tmp_path / "other", replace(OPTIONS, side=96))
    out.mkdir()
    listed = Path.iterdir

    def claims_meanwhile(folder: Path) -> Any:
        if folder == out and not (out / INDEX_FILE).exists():
            shutil.copy(tmp_path / "other" / INDEX_FILE, out)
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", claims_meanwhile)
    with pytest.raises(CheckpointError, match="another side"):
        encode_folder(refs, out, OPTIONS)


def test_arguments_that_make_no_sense_are_told(classes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="devices must name at least one"):
        encode_folder(find_images([classes / "cat"]), tmp_path / "out", OPTIONS, devices=())
    with pytest.raises(ValueError, match="refs must be ImageRefs"):
        encode_folder(str(classes), tmp_path / "out", OPTIONS)  # type: ignore[arg-type]


def test_a_job_that_fails_leaves_the_folder_to_the_others(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs, out = find_images([classes]), tmp_path / "out"

    def fails(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(latent_cache, "encode_pictures", fails)
        with pytest.raises(MemoryError):
            encode_folder(refs, out, OPTIONS, rank=0, world=2)
    assert (out / INDEX_FILE).exists()  # by which another job that began meanwhile goes on
    assert not encode_folder(refs, out, OPTIONS, rank=1, world=2).complete
    assert encode_folder(refs, out, OPTIONS).complete
    assert len(LatentDataset(out)) == 12


def test_a_name_that_safetensors_cannot_open_is_refused(classes: Path, tmp_path: Path) -> None:
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    with pytest.raises(CheckpointError, match="not valid UTF-8"):
        encode_folder(find_images([classes]), out, OPTIONS)
    assert not out.exists()


@pytest.mark.parametrize("key", ["classes", "shards", "count", "latent_fingerprint", "job"])
def test_an_index_that_lacks_something(key: str, classes: Path, tmp_path: Path) -> None:
    encode_folder(find_images([classes / "cat"]), tmp_path / "out", OPTIONS)
    path = tmp_path / "out" / INDEX_FILE
    index = json.loads(path.read_text())
    del index[key]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"it lacks {key}"):
        LatentDataset(tmp_path / "out")

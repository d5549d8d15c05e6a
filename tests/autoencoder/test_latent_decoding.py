from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from parscale_ear.autoencoder.files import shipped_weights
from parscale_ear.autoencoder.latent_cache import CacheOptions, encode_folder
from parscale_ear.autoencoder.latent_decoding import decode_folder
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.checkpoint import CheckpointError
from parscale_ear.data.images import find_images
from parscale_ear.data.latents import INDEX_FILE, LatentDataset, shard_name, write_shard

OPTIONS = CacheOptions(side=64, batch=4, shard=5)


def test_decoding_gives_the_pictures_back(
    classes: Path, tmp_path: Path, shipped: ParScaleEAR
) -> None:
    encode_folder(find_images([classes]), tmp_path / "out", OPTIONS)
    written = decode_folder(tmp_path / "out", tmp_path / "png", devices=("cpu", "cpu"))
    assert written == 12
    data = LatentDataset(tmp_path / "out")
    latent = torch.stack([data[k]["latent"] for k in range(4)])
    with torch.inference_mode():
        expected = shipped.decode(shipped.enhance(latent), clamp=True)
    for row in range(4):
        path = (tmp_path / "png" / data[row]["name"]).with_suffix(".png")
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        difference = (pixels.float() / 127.5 - 1 - expected[row]).abs().max()
        assert difference < 0.6 / 127.5
    (tmp_path / "png" / "cat" / "01.png").unlink()
    assert decode_folder(tmp_path / "out", tmp_path / "png") == 1  # the rest stays
    sharp = shipped_weights(decoder="sharp")
    for changes, said in (
        ({"dtype": "bf16"}, "other dtype"),
        ({"weights": sharp}, "other weights"),
    ):
        with pytest.raises(CheckpointError, match=said):
            decode_folder(tmp_path / "out", tmp_path / "png", **changes)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="holds no decoded pictures"):
        decode_folder(tmp_path / "out", classes)


def test_damaged_latents_become_no_pictures(
    classes: Path, tmp_path: Path, flip_a_bit: Callable[[Path], None]
) -> None:
    out, pictures = tmp_path / "out", tmp_path / "png"
    encode_folder(find_images([classes]), out, OPTIONS)
    flip_a_bit(out / shard_name(2))
    with pytest.raises(CheckpointError, match="shard-00002"):
        decode_folder(out, pictures)
    counts = [entry["count"] for entry in LatentDataset(out).index["shards"]]
    assert len(list(pictures.rglob("*.png"))) == sum(counts[:2])  # those of whole shards


def test_a_folder_for_pictures_of_which_none_was_written_is_free(
    classes: Path, tmp_path: Path, flip_a_bit: Callable[[Path], None]
) -> None:
    for name in ("damaged", "whole"):
        encode_folder(find_images([classes / "cat"]), tmp_path / name, OPTIONS)
    flip_a_bit(tmp_path / "damaged" / shard_name(0))
    with pytest.raises(CheckpointError, match="SHA-256"):
        decode_folder(tmp_path / "damaged", tmp_path / "png")
    assert not list((tmp_path / "png").iterdir())
    assert decode_folder(tmp_path / "whole", tmp_path / "png") == 8


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_a_decoder_makes_of_nothing_is_no_black_or_white_picture(
    classes: Path, tmp_path: Path, shipped: ParScaleEAR, value: float
) -> None:
    encode_folder(find_images([classes]), tmp_path / "out", OPTIONS)
    broken = copy.deepcopy(shipped)
    assert broken.decoder.bands2.bias is not None
    broken.decoder.bands2.bias.data[:3] = value
    weights = broken.save_pretrained(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="decoded pictures were not finite"):
        decode_folder(tmp_path / "out", tmp_path / "png", weights=weights)
    assert not list((tmp_path / "png").rglob("*.png"))
    # What a killed call left half-written does not keep the next one from the folder.
    for file in (tmp_path / "png").iterdir():
        file.rename(tmp_path / "png" / ".decoded.json.123.part")
    assert decode_folder(tmp_path / "out", tmp_path / "png") == 12


def test_decodes_in_the_dtype_that_is_asked_for(classes: Path, tmp_path: Path) -> None:
    encode_folder(find_images([classes]), tmp_path / "out", OPTIONS)
    pixels = []
    for dtype in ("fp32", "bf16"):
        decode_folder(tmp_path / "out", tmp_path / dtype, dtype=dtype)
        pixels.append(np.array(Image.open(tmp_path / dtype / "cat" / "01.png")).astype(int))
    assert 0 < np.abs(pixels[0] - pixels[1]).max() < 12


def test_decoded_pictures_have_names_of_their_own_inside_the_folder(
    tmp_path: Path, shipped: ParScaleEAR
) -> None:
    names = ["a.png", "a.jpg", "../../b.png", "/c.png", "d/../../e.png", ".."]
    job = {"latent_fingerprint": shipped.latent_fingerprint(), "mirror": False}
    digest = write_shard(
        tmp_path / "out", 0, torch.zeros(6, 32, 1, 1), [-1] * 6, names, skipped={}, job=job
    )
    shard = {"file": shard_name(0), "count": 6, "sha256": digest}
    index = {
        "format": 1, "complete": True, "count": 6, "mirrored": False, "classes": [], "job": job,
        "latent_fingerprint": job["latent_fingerprint"], "shards": [shard], "skipped": {},
    }  # fmt: skip
    (tmp_path / "out" / INDEX_FILE).write_text(json.dumps(index))
    assert decode_folder(tmp_path / "out", tmp_path / "png") == 6
    assert len(list((tmp_path / "png").rglob("*.png"))) == 6
    assert len(list(tmp_path.rglob("*.png"))) == 6


def test_arguments_that_make_no_sense_are_told(classes: Path, tmp_path: Path) -> None:
    out, png = tmp_path / "out", tmp_path / "png"
    encode_folder(find_images([classes / "cat"]), str(out), OPTIONS)
    for wrong, message in (
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"batch": -1}, "batch must be at least 1"),
        ({"dtype": "float16"}, "dtype must be fp32, fp16 or bf16, got 'float16'"),
        ({"devices": ()}, "devices must name at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_folder(out, png, **wrong)  # type: ignore[arg-type]
    assert not png.exists()
    png.mkdir()
    (png / ".00.png.12345.part").write_bytes(b"half")  # of a job that was killed
    assert decode_folder(str(out), str(png)) == 8
    assert not list(png.rglob(".*"))


def test_decodes_in_fp32_where_it_says_so(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_folder(find_images([classes / "cat"]), tmp_path / "out", OPTIONS)
    decode, seen = ParScaleEAR.decode, []

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return decode(*arguments, **options)

    monkeypatch.setattr(ParScaleEAR, "decode", watched)
    decode_folder(tmp_path / "out", tmp_path / "png")
    assert set(seen) == {False}

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from parscale_ear import checkpoint
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.checkpoint import CheckpointError, atomic_path

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.safetensors"
    sha256 = checkpoint.save(path, TENSORS, kind="K", config={"n": (1, 2)}, note="hello")
    tensors, header = checkpoint.load(path, kind="K")
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in TENSORS.items()
    )
    assert header["config"] == {"n": [1, 2]}
    assert (header["note"], header["sha256"]) == ("hello", sha256)


def test_mutated_files_are_refused_or_equal(tiny: ParScaleEAR, tmp_path: Path) -> None:
    good = tiny.save_pretrained(tmp_path / "good.safetensors").read_bytes()
    expected = tiny.state_dict()
    bad = tmp_path / "bad.safetensors"
    rng = np.random.default_rng(0)
    header_length = 8 + int.from_bytes(good[:8], "little")
    refused = 0
    for trial in range(100):
        data = bytearray(good)
        kind = trial % 4
        if kind == 0:  # a bit anywhere
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        elif kind == 1:  # a byte in the header
            data[rng.integers(header_length)] = rng.integers(256)
        elif kind == 2:  # cut off
            del data[rng.integers(len(data)) :]
        else:  # a stretch repeated
            start = int(rng.integers(len(data) - 64))
            data[start:start] = data[start : start + int(rng.integers(1, 64))]
        bad.write_bytes(data)
        try:
            loaded = ParScaleEAR.from_pretrained(bad)
        except CheckpointError as error:
            refused += "\n" not in str(error)
            continue
        assert loaded.config == tiny.config
        assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())
    assert refused >= 95


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b""), "not a whole safetensors file"),
        (lambda p: torch.save({"a": torch.zeros(1)}, p), "not a whole safetensors file"),
        (lambda p: save_file({"a": torch.zeros(1)}, p), "not one of parscale_ear's"),
        (lambda p: save_file({}, p, {"parscale_ear": "{"}), "not JSON"),
        (lambda p: save_file({}, p, {"parscale_ear": '{"format": 9}'}), "format 9"),
        (lambda p: save_file({}, p, {"parscale_ear": '{"format": 1}'}), "lacks 'kind'"),
        (lambda p: checkpoint.save(p, {}, kind="Other", config={}), "of kind Other, expected"),
        (lambda p: None, "no such weight file"),
    ],
)
def test_foreign_files(tmp_path: Path, write: object, message: str) -> None:
    path = tmp_path / "x.safetensors"
    write(path)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(path, kind="K")
    assert str(path) in str(caught.value)


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path / "x.safetensors", {}, kind="K", config={})
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read anything
    with pytest.raises(CheckpointError, match="may not be read; change its permissions"):
        checkpoint.load(tmp_path / "x.safetensors")


def test_a_changed_header_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, TENSORS, kind="K", config={}, latent_fingerprint="abc")
    _, header = checkpoint.load(path)
    header["latent_fingerprint"] = "abd"
    save_file(TENSORS, path, {"parscale_ear": json.dumps(header)})
    with pytest.raises(CheckpointError, match="SHA-256"):
        checkpoint.load(path)


def test_a_config_that_makes_no_model(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for config in ({}, {"litevae": {"unknown": 1}, "hybrid": None}, {"litevae": 3, "hybrid": None}):
        checkpoint.save(path, TENSORS, kind="ParScaleEAR", config=config)
        with pytest.raises(CheckpointError, match="not a ParScaleEAR config"):
            ParScaleEAR.from_pretrained(path)


@pytest.mark.parametrize(
    "name", ["sha256", "format", "kind", "config", "shared", "latent_fingerprint"]
)
def test_facts_do_not_take_the_place_of_the_headers_own_entries(
    name: str, tiny: ParScaleEAR, tmp_path: Path
) -> None:
    facts: dict[str, Any] = {name: "1", "note": "mine"}
    with pytest.raises(ValueError, match=f"other names than {name}"):
        tiny.save_pretrained(tmp_path / "x.safetensors", **facts)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_as_good_as_a_file(tiny: ParScaleEAR, tmp_path: Path) -> None:
    (tmp_path / "odd.safetensors").mkdir()
    for place in (tmp_path / "new", tmp_path, tmp_path / "odd.safetensors"):
        path = tiny.save_pretrained(place)
        assert path == place / "model.safetensors"
        assert checkpoint.read_kind(place) == "ParScaleEAR"
        for name, tensor in checkpoint.load(place)[0].items():
            assert torch.equal(tensor, tiny.state_dict()[name])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty/model\.safetensors: no such weight file"):
        checkpoint.load(tmp_path / "empty")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64])
def test_weights_are_stored_in_floating_point(
    dtype: torch.dtype, tiny: ParScaleEAR, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="float32 or float64, got"):
        tiny.save_pretrained(tmp_path / "x.safetensors", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("before")

    def fail_halfway() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_longest_name_of_a_file_can_be_written(tmp_path: Path) -> None:
    for name in ("a" * 250 + ".png", "\N{HIRAGANA LETTER A}" * 83 + ".txt"):
        with atomic_path(tmp_path / name) as temporary:
            temporary.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"


def test_a_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(OSError, match=r"x\.safetensors: could not be written .*No space left"):
        checkpoint.save(tmp_path / "x.safetensors", {}, kind="Other", config={})
    assert list(tmp_path.iterdir()) == []

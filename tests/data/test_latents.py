from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from parscale_ear import checkpoint
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.checkpoint import CheckpointError
from parscale_ear.data.latents import INDEX_FILE, LatentDataset, shard_name, write_shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of a latent each."""
    digests = [
        write_shard(tmp_path, k, torch.full((1, 4, 2, 2), float(k)), [0], [f"{k}.png"], job={})
        for k in range(2)
    ]
    shards = [
        {"file": shard_name(k), "count": 1, "sha256": digest} for k, digest in enumerate(digests)
    ]
    index = {"format": 1, "job": {}, "complete": True, "latent_fingerprint": "f"}
    index |= {"mirrored": False, "classes": ["cat"], "count": 2, "shards": shards}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    return tmp_path


def test_a_whole_shard_in_the_place_of_another_is_noticed(folder: Path) -> None:
    data = LatentDataset(folder, fingerprint="f")
    data.verify()
    assert [(item["name"], float(item["latent"].max())) for item in (data[0], data[1])] == [
        ("0.png", 0.0),
        ("1.png", 1.0),
    ]
    (folder / shard_name(0)).write_bytes((folder / shard_name(1)).read_bytes())
    with pytest.raises(CheckpointError, match=r"00000.*not the shard that the index names"):
        LatentDataset(folder).verify()


def test_a_file_of_another_kind_is_not_read_as_latents(folder: Path) -> None:
    tensors = {"latents": torch.zeros(1, 4, 2, 2), "labels": torch.zeros(1, dtype=torch.int64)}
    checkpoint.save(folder / shard_name(1), tensors, kind="Other", config={}, names=["1.png"])
    data = LatentDataset(folder)
    assert data[0]["name"] == "0.png"
    with pytest.raises(CheckpointError, match=r"00001.*not a shard of latents"):
        data[1]


def test_an_index_of_another_format_is_refused(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    (folder / INDEX_FILE).write_text(json.dumps({**index, "format": 2}))
    with pytest.raises(CheckpointError, match="format 2, expected 1"):
        LatentDataset(folder)


def test_a_relative_folder_is_found_from_elsewhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    data = LatentDataset(folder.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(data[0]["latent"], LatentDataset(folder)[0]["latent"])


def test_an_opened_dataset_travels_to_other_processes(folder: Path) -> None:
    data = LatentDataset(folder)
    first = data[0]  # its file is open now
    copy = pickle.loads(pickle.dumps(data))
    assert copy[0]["name"] == first["name"]
    assert torch.equal(copy[0]["latent"], first["latent"])


def test_a_fingerprint_that_is_none_is_told(tmp_path: Path, tiny: ParScaleEAR) -> None:
    with pytest.raises(ValueError, match="fingerprint must be a string, got <bound method"):
        LatentDataset(tmp_path, fingerprint=tiny.latent_fingerprint)  # type: ignore[arg-type]

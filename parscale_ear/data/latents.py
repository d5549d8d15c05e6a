"""A data set's latents on disk: safetensors shards and an index.

A folder::

    index.json            what it holds: sizes, classes, shards, the latent space's fingerprint
    shard-00000.safetensors
        latents           (N, Z, h, w)
        mirrored          (N, Z, h, w), where asked for: of the mirrored pictures
        labels            (N,), int64: index into the classes; −1: none
        (header)          names of the N pictures, and of those skipped with the reason

Shards are written whole or not at all, and which picture belongs to which shard depends on the list
of pictures alone. So a job that was killed goes on with the shards that are missing.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from parscale_ear import checkpoint

INDEX_FILE = "index.json"
KIND = "LatentShard"
FORMAT = 1
INDEX_KEYS = (
    *("format", "complete", "count", "latent_fingerprint", "mirrored"),
    *("classes", "job", "shards"),
)
REMEDY = "delete it and run the same parscale-ear encode again"


class LatentItem(TypedDict):
    """One entry of a :class:`LatentDataset`."""

    latent: Tensor  # (Z, h, w), normalised
    label: int  # index into ``classes``; −1: none
    name: str  # of the picture


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def write_shard(
    folder: Path,
    number: int,
    latents: Tensor,
    labels: Sequence[int],
    names: Sequence[str],
    *,
    mirrored: Tensor | None = None,
    skipped: Mapping[str, str] | None = None,
    job: Mapping[str, Any],
) -> str:
    """Writes one shard, atomically; returns its SHA-256."""
    tensors = {"latents": latents, "labels": torch.tensor(labels, dtype=torch.int64)}
    if mirrored is not None:
        tensors["mirrored"] = mirrored
    return checkpoint.save(
        folder / shard_name(number),
        tensors,
        kind=KIND,
        config=dict(job),
        names=list(names),
        skipped=dict(skipped or {}),
    )


def shard_header(path: Path) -> dict[str, Any]:
    """Header of a shard, without reading its tensors.

    Raises:
        CheckpointError: not a shard, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[checkpoint.HEADER])
    except Exception as error:  # safetensors raises several kinds
        reason = " ".join(str(error).split())[:120]
        raise checkpoint.CheckpointError(
            f"{path}: not a shard of latents ({reason}); {REMEDY}"
        ) from error
    if header.get("kind") != KIND:
        raise checkpoint.CheckpointError(f"{path}: not a shard of latents; {REMEDY}")
    return dict(header)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of latents, finished or not.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']}, expected {FORMAT}")
        if missing := [key for key in INDEX_KEYS if key not in index]:
            raise ValueError(f"it lacks {' and '.join(missing)}")
    except FileNotFoundError as error:
        raise checkpoint.CheckpointError(
            f"{path}: missing; make it with parscale-ear encode"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{path}: not an index of latents ({error})") from error
    return dict(index)


class LatentDataset(Dataset[LatentItem]):
    """Latents that ``parscale-ear encode`` wrote; memory-mapped, for a ``DataLoader``.

    Example:
        >>> data = LatentDataset("latents/", fingerprint=model.latent_fingerprint())
        >>> data[0]["latent"].shape
        torch.Size([32, 16, 16])
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        mirrored: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        """Opens a finished folder.

        Args:
            folder: with ``index.json`` and its shards.
            mirrored: also the latents of the mirrored pictures, after all others.
            fingerprint: of the latent space that is expected
                (``ParScaleEAR.latent_fingerprint()``); None: any.

        Raises:
            CheckpointError: the folder is not finished, a shard is missing, or it is another
                latent space.
            ValueError: ``mirrored`` is asked for but not there, or ``fingerprint`` is no string.
        """
        if not isinstance(fingerprint, str | None):
            raise ValueError(f"fingerprint must be a string, got {fingerprint!r:.60}")
        self.folder = Path(folder).absolute()  # wherever the process goes
        self.index = read_index(self.folder)
        if not self.index["complete"]:
            raise checkpoint.CheckpointError(
                f"{self.folder}: not finished; run the same parscale-ear encode again to go on"
            )
        if fingerprint is not None and fingerprint != self.index["latent_fingerprint"]:
            raise checkpoint.CheckpointError(
                f"{self.folder}: latents of another latent space than the model's; encode again"
            )
        if mirrored and not self.index["mirrored"]:
            raise ValueError(f"{self.folder} holds no mirrored latents; encode with --mirror")
        self.classes: list[str] = self.index["classes"]
        self._pictures = int(self.index["count"])
        self._mirrored = mirrored
        self._ends: list[int] = []  # running count of pictures at the end of every shard
        for shard in self.index["shards"]:
            if not (self.folder / shard["file"]).is_file():
                raise checkpoint.CheckpointError(f"{self.folder / shard['file']}: missing")
            self._ends.append((self._ends[-1] if self._ends else 0) + shard["count"])
        self._open: dict[int, tuple[Any, Tensor, list[str]]] = {}  # file, labels, names

    def __len__(self) -> int:
        return self._pictures * (2 if self._mirrored else 1)

    def __getstate__(self) -> dict[str, Any]:
        """Open files do not travel to a DataLoader's workers."""
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, index: int) -> LatentItem:
        """One latent: first all pictures as they are, then (``mirrored``) all of them mirrored.

        Raises:
            IndexError: ``index`` is out of range.
            TypeError: it is no whole number: for several take a ``DataLoader``, or
                ``torch.utils.data.Subset``.
        """
        if not hasattr(index, "__index__"):
            raise TypeError(
                f"one latent at a time, by its number, got {index!r}; for several take a DataLoader "
                "or torch.utils.data.Subset"
            )
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} latents")
        index %= len(self)
        name = "mirrored" if index >= self._pictures else "latents"
        index %= self._pictures
        number = bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        file, labels, names = self._shard(number)
        # The slice is a view of the whole shard, which nobody is to change, send or save.
        latent = file.get_slice(name)[row : row + 1][0].clone()
        return {"latent": latent, "label": int(labels[row]), "name": names[row]}

    def _shard(self, number: int) -> tuple[Any, Tensor, list[str]]:
        if number not in self._open:
            shard = self.index["shards"][number]
            path = self.folder / shard["file"]
            names = shard_header(path)["names"]
            if len(names) != shard["count"]:
                raise checkpoint.CheckpointError(
                    f"{path}: {len(names)} pictures, but {shard['count']} by the index; {REMEDY}"
                )
            file: Any = safe_open(path, framework="pt")
            self._open[number] = (file, file.get_tensor("labels"), names)
        return self._open[number]

    def verify(self) -> None:
        """Reads everything and checks every SHA-256.

        Raises:
            CheckpointError: a shard is damaged, or not the one of the index.
        """
        for number in range(len(self.index["shards"])):
            self.verify_shard(number)

    def verify_shard(self, number: int) -> None:
        """Reads one shard and checks its SHA-256.

        Raises:
            CheckpointError: it is damaged, or not the one of the index.
        """
        shard = self.index["shards"][number]
        path = self.folder / shard["file"]
        _, header = checkpoint.load(path, kind=KIND)
        if header["sha256"] != shard["sha256"]:
            raise checkpoint.CheckpointError(
                f"{path}: not the shard that the index names; {REMEDY}"
            )

"""Safetensors in and out: config in the header, SHA-256 checked, written atomically, no pickles.

A file is an ordinary safetensors file. Its metadata holds one JSON object under the key
``parscale_ear``::

    {"format": 1, "kind": "ParScaleEAR", "config": {...}, "sha256": "...", ...}

``sha256`` is taken over the rest of the header and every tensor (name, dtype, shape, bytes; sorted
by name), so that a changed header or a changed weight is noticed. A damaged or foreign file raises
:class:`CheckpointError` with one line.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parscale_ear.device import check_dtype

FORMAT = 1
RESERVED = {
    "format",
    "kind",
    "config",
    "sha256",
    "shared",
}  # entries of headers that say how to read
WEIGHTS_FILE = "model.safetensors"  # in a folder
HEADER = "parscale_ear"
KEPT = 24  # characters of a file's name that its temporary file has, at most four bytes each


class CheckpointError(Exception):
    """A weight file that cannot be used; the message is one line and names the file."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that takes its place when the block succeeds.

    The file appears whole or not at all: an exception removes the temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random, as processes of several machines may write to one folder.
    # The beginning of the name says what it is; the whole and more might be too long a name.
    temporary = path.with_name(f".{path.name[:KEPT]}.{uuid.uuid4().hex}.part")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's umask has it; some writers narrow it
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file atomically (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def tensor_bytes(tensor: Tensor) -> bytes:
    """The raw bytes of a tensor, row-major, on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def digest(tensors: Mapping[str, Tensor], *facts: Any) -> str:
    """SHA-256 over ``facts`` (as JSON) and every tensor's name, dtype, shape and bytes."""
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor_bytes(tensor))
    return sha.hexdigest()


def check_stored_dtype(dtype: torch.dtype | None) -> None:
    """Looks whether weights can be stored in a dtype, and computed in.

    Raises:
        ValueError: it is no dtype, or not of floating-point numbers of 16 bits or more.
    """
    check_dtype(dtype)
    if dtype is not None and not (dtype.is_floating_point and dtype.itemsize >= 2):
        raise ValueError(f"dtype must be torch.float16, bfloat16, float32 or float64, got {dtype}")


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    config: Mapping[str, Any],
    **facts: Any,
) -> str:
    """Writes tensors and config as one safetensors file, atomically.

    Args:
        path: the file; missing folders are made.
        tensors: what to store, any dtype.
        kind: the class that can read the file.
        config: its JSON-serialisable config.
        facts: further JSON-serialisable header entries (recipe, figures, fingerprint ...).

    Returns:
        The SHA-256 that the header carries.

    Raises:
        OSError: it could not be written (a full disk, say).
    """
    header = {**facts, "format": FORMAT, "kind": kind, "config": config}
    header = json.loads(json.dumps(header))
    header["sha256"] = digest(tensors, header)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(plain, temporary, metadata={HEADER: json.dumps(header)})
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from error
    return str(header["sha256"])


def resolve(path: str | os.PathLike[str]) -> Path:
    """A weight file, or the one in a folder."""
    path = Path(path)
    return path / WEIGHTS_FILE if path.is_dir() else path


def target(path: str | os.PathLike[str]) -> Path:
    """The weight file that :func:`save_model` writes: the one named, or one in the folder named."""
    path = Path(path)
    return path / WEIGHTS_FILE if path.suffix != ".safetensors" or path.is_dir() else path


def save_model(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    kind: str,
    config: Mapping[str, Any],
    **own: Any,
) -> Path:
    """What every model's ``save_pretrained`` does.

    Args:
        path: a ``.safetensors`` file, or a folder that gets a ``model.safetensors``.
        tensors: the model's.
        facts: the caller's header entries.
        kind: the class that can read the file.
        config: its JSON-serialisable config.
        own: the model's header entries.

    Returns:
        The file written.

    Raises:
        OSError: it could not be written; what was there stays.
        ValueError: a fact has the name of an entry that the header has already.
    """
    if taken := (RESERVED | own.keys()) & facts.keys():
        raise ValueError(f"facts must have other names than {', '.join(sorted(taken))}")
    path = target(path)
    save(path, tensors, kind=kind, config=config, **own, **facts)
    return path


def load(
    path: str | os.PathLike[str], *, kind: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file that :func:`save` wrote.

    Args:
        path: the file, or a folder with ``model.safetensors``.
        kind: the kind it must be of; None takes any.

    Returns:
        The tensors, on the CPU in their stored dtype, and the header.

    Raises:
        CheckpointError: missing, truncated, foreign, of another kind or format, or changed
            since it was written.
    """
    path = resolve(path)
    with _opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = _header(path, metadata)
    if kind is not None and header["kind"] != kind:
        raise CheckpointError(f"{path}: is of kind {header['kind']}, expected {kind}")
    content = {key: value for key, value in header.items() if key != "sha256"}
    if digest(tensors, content) != header["sha256"]:
        raise CheckpointError(
            f"{path}: its SHA-256 does not match its content, so it was changed after it was "
            "written; download it again"
        )
    return tensors, header


def read_kind(path: str | os.PathLike[str]) -> str:
    """The class that can read a file, from its header alone.

    Raises:
        CheckpointError: missing, truncated, foreign or of another format.
    """
    path = resolve(path)
    with _opened(path) as file:
        metadata = file.metadata() or {}
    return str(_header(path, metadata)["kind"])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what goes wrong with it becomes a :class:`CheckpointError`."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weight file")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: may not be read; change its permissions")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({reason}); download it again"
        ) from error


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if HEADER not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not one of parscale_ear's")
    try:
        header = json.loads(metadata[HEADER])
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is not JSON; download it again") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise CheckpointError(
            f"{path}: format {found}, this version reads format {FORMAT}; update parscale_ear"
        )
    for key, expected in (("kind", str), ("config", dict), ("sha256", str)):
        if not isinstance(header.get(key), expected):
            raise CheckpointError(f"{path}: its header lacks {key!r}; download it again")
    return header

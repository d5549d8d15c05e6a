"""Weight files of the autoencoder: which are shipped, and how several share their parts.

All shipped decoders read one latent space. ``hybrid.safetensors`` is whole; the others leave out
what they share with it, and say so in their header::

    {"shared": {"file": "hybrid.safetensors", "parts": ["encoder", "hybrid"]}, ...}
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from parscale_ear import checkpoint

Variant = Literal["hybrid", "baseline"]
Decoder = Literal["faithful", "sharp"]
DEFAULT_DECODER: Decoder = "faithful"
SHIPPED: dict[tuple[str, str], str] = {
    ("hybrid", "faithful"): "hybrid.safetensors",
    ("hybrid", "sharp"): "sharp.safetensors",
    ("baseline", "faithful"): "baseline.safetensors",
}


def shipped_weights(variant: Variant = "hybrid", decoder: Decoder | None = None) -> Path:
    """Path of a weight file inside the package.

    Raises:
        ValueError: there is no such variant, decoder, or combination of the two.
    """
    decoder = decoder or DEFAULT_DECODER
    for name, value, choices in (
        ("variant", variant, get_args(Variant)),
        ("decoder", decoder, get_args(Decoder)),
    ):
        if value not in choices:
            expected = " or ".join(map(repr, choices))
            raise ValueError(f"{name} must be {expected}, got {value!r}")
    if (variant, decoder) not in SHIPPED:
        raise ValueError(f"there is no {decoder} decoder for the {variant}; use variant='hybrid'")
    return Path(str(resources.files("parscale_ear") / "weights" / SHIPPED[variant, decoder]))


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a weight file, with what it shares with its neighbour.

    Raises:
        CheckpointError: the file or its neighbour is missing or damaged, or the neighbour is of
            another release.
    """
    path = checkpoint.resolve(path)
    tensors, header = checkpoint.load(path, kind=kind)
    shared: Mapping[str, Any] | None = header.get("shared")
    if shared is None:
        return tensors, header
    neighbour = path.with_name(Path(str(shared["file"])).name)
    if not neighbour.exists():
        raise checkpoint.CheckpointError(
            f"{path}: shares {' and '.join(shared['parts'])} with {neighbour.name}, which is not beside "
            "it; put both into one folder"
        )
    others, other = checkpoint.load(neighbour, kind=kind)
    if other.get("latent_fingerprint") != header.get("latent_fingerprint"):
        raise checkpoint.CheckpointError(
            f"{path}: decodes another latent space than the encoder in {neighbour} makes; "
            "both files must come from one release"
        )
    prefixes = tuple(f"{part}." for part in shared["parts"])
    shared_tensors = {k: v for k, v in others.items() if k.startswith(prefixes)}
    if checkpoint.digest(shared_tensors) != shared["sha256"]:
        raise checkpoint.CheckpointError(
            f"{path}: shares {' and '.join(shared['parts'])} with another {neighbour.name}; both "
            "files must come from one release"
        )
    return tensors | shared_tensors, header


def check_shared(
    path: str | os.PathLike[str], tensors: Collection[str], parts: tuple[str, ...], file: str
) -> None:
    """Looks whether a weight file at ``path`` can leave ``parts`` to ``file`` beside it.

    Args:
        path: of the weights.
        tensors: names of all tensors.
        parts: names of modules.
        file: name of the other file.

    Raises:
        ValueError: it cannot; or only one of the two is given.
    """
    if bool(parts) != bool(file):
        raise ValueError("shared_parts and shared_file go together; give both or neither")
    if not parts:
        return
    if isinstance(parts, str):
        raise ValueError(f"shared_parts must be several names, as a tuple, got {parts!r}")
    for part in parts:
        if not any(name.startswith(f"{part}.") for name in tensors):
            raise ValueError(f"shared_parts names {part!r}, of which the model has no weights")
    if Path(file).name != file or file == checkpoint.target(path).name:
        raise ValueError(
            f"shared_file must be the name of another file in the same folder, got {file!r}"
        )


def leave_out(
    tensors: Mapping[str, Tensor], parts: tuple[str, ...], file: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors without those of ``parts``, and the header entry that says where these are."""
    prefixes = tuple(f"{part}." for part in parts)
    left_out = {k: v for k, v in tensors.items() if k.startswith(prefixes)}
    kept = {k: v for k, v in tensors.items() if not k.startswith(prefixes)}
    return kept, {"file": file, "parts": list(parts), "sha256": checkpoint.digest(left_out)}

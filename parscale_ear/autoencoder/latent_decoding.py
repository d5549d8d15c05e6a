"""Decodes a folder of latents to pictures.

Shapes: B batch, Z latent channels, h w latent height and width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from parscale_ear import checkpoint
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.checks import check_whole
from parscale_ear.data import latents as store
from parscale_ear.data.images import Namer, save_png
from parscale_ear.device import DTYPES, check_finite, exact_fp32
from parscale_ear.parallel import Progress, run_shares

JOB_FILE = "decoded.json"  # what the pictures of a folder were decoded from


def decode_folder(
    folder: str | Path,
    out: str | Path,
    *,
    weights: Path | None = None,
    dtype: str = "fp32",
    devices: Sequence[str] = ("cpu",),
    batch: int = 16,
    progress: Progress = lambda count: None,
) -> int:
    """Decodes every latent of a folder to a PNG; goes on where an earlier call stopped.

    Args:
        folder: that ``encode_folder`` wrote.
        out: gets a PNG a latent, named as the picture was, and ``decoded.json``; a new or empty
            folder, or that of an earlier call with the same latents, weights and dtype.
        weights: of the autoencoder; None: the shipped ones.
        dtype: of the computation: fp32, fp16 or bf16.
        devices: one a process.
        batch: latents at a time.
        progress: called with the number of latents done.

    Returns:
        The number of pictures written by this call.

    Raises:
        CheckpointError: the latents are of another latent space than the model's, or damaged;
            or ``out`` holds something else.
        ValueError: ``batch`` is below 1, ``dtype`` is unknown, or there are no devices.
        WorkerError: a process failed.
    """
    folder, out = Path(folder), Path(out)
    check_whole(1, batch=batch)
    if dtype not in ("fp32", "fp16", "bf16"):
        raise ValueError(f"dtype must be fp32, fp16 or bf16, got {dtype!r}")
    if not devices:
        raise ValueError("devices must name at least one")
    model = ParScaleEAR.from_pretrained(weights)
    data = store.LatentDataset(folder, fingerprint=model.latent_fingerprint())
    numbers = range(len(data.index["shards"]))
    shares = [
        (folder, out, weights, dtype, device, batch, list(numbers[k :: len(devices)]))
        for k, device in enumerate(devices)
        if numbers[k :: len(devices)]
    ]
    fresh = _claim(
        out,
        {
            "latents": [shard["sha256"] for shard in data.index["shards"]],
            "weights": checkpoint.digest(model.state_dict()),
            "dtype": dtype,
        },
    )
    try:
        written = int(sum(run_shares(_decode_share, shares, progress)))
    except BaseException:
        if fresh and not any(out.rglob("*.png")):  # free for other latents
            (out / JOB_FILE).unlink(missing_ok=True)
        raise
    for part in out.rglob(".*.part"):  # of jobs that were killed while writing
        part.unlink(missing_ok=True)
    return written


def _claim(out: Path, job: dict[str, Any]) -> bool:
    """Takes a new folder, or checks that the pictures there are of the same job; whether it is new."""
    path = out / JOB_FILE
    if out.exists() and not out.is_dir():
        raise checkpoint.CheckpointError(f"{out} is a file; name a folder")
    if path.exists():
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise checkpoint.CheckpointError(
                f"{path}: damaged ({error}); name a new folder"
            ) from error
        changed = sorted(key for key in job if found.get(key) != job[key])
        if changed:
            raise checkpoint.CheckpointError(
                f"{out} holds pictures decoded with other {', '.join(changed)}; name a new folder"
            )
    elif out.exists() and any(entry.suffix != ".part" for entry in out.iterdir()):
        raise checkpoint.CheckpointError(
            f"{out} is not empty and holds no decoded pictures; name a new folder"
        )
    else:
        checkpoint.write_text(path, json.dumps(job, indent=1) + "\n")
        return True
    return False


@exact_fp32()
def _decode_share(share: Any, progress: Progress) -> int:
    """Decodes the shards of one process."""
    folder, out, weights, dtype, device, batch, shards = share
    model = ParScaleEAR.from_pretrained(weights, device=device, dtype=DTYPES[dtype])
    data = store.LatentDataset(folder)
    sizes = [shard["count"] for shard in data.index["shards"]]
    paths = _picture_paths(data, out)
    written = 0
    for number in shards:
        start = sum(sizes[:number])
        rows = [k for k in range(start, start + sizes[number]) if not paths[k].exists()]
        progress(sizes[number] - len(rows))
        if rows:
            data.verify_shard(number)  # what is damaged becomes no picture
        for first in range(0, len(rows), batch):
            part = rows[first : first + batch]
            stacked = torch.stack([data[k]["latent"] for k in part])
            with torch.inference_mode():
                latent = stacked.to(model.device, model.dtype)
                images = model.decode(model.enhance(latent)).float().cpu()
                check_finite(images, "decoded pictures")
            for row, image in zip(part, images, strict=True):
                save_png(image, paths[row])
            written += len(part)
            progress(len(part))
    return written


def _picture_paths(data: store.LatentDataset, out: Path) -> list[Path]:
    """Where every picture goes; namesakes get a number, and nothing leaves ``out``."""
    paths: list[Path] = []
    namer = Namer()
    for shard in data.index["shards"]:
        for name in store.shard_header(data.folder / shard["file"])["names"]:
            parts = [p for p in PurePosixPath(name).parts if p not in ("..", "/", os.sep)]
            stem = PurePosixPath(*parts).with_suffix("") if parts else PurePosixPath("picture")
            paths.append(out / f"{namer(str(stem))}.png")
    return paths

"""Encodes a data set once, for those who train generators.

Work is dealt out in shards; several processes, on several machines too, can share one folder. What
a killed job had finished stays, and the same call does the rest.

Shapes: B batch, Z latent channels, h w latent height and width.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parscale_ear import checkpoint
from parscale_ear.autoencoder.litevae import STRIDE
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.checks import check_whole
from parscale_ear.data import latents as store
from parscale_ear.data.images import (
    ImageError,
    ImageRef,
    class_names,
    from_uint8,
    list_digest,
)
from parscale_ear.data.reading import add_skipped, read_batches
from parscale_ear.device import DTYPES, check_finite, exact_fp32
from parscale_ear.parallel import Progress, run_shares

LOOKAHEAD = 4  # batches that are read ahead of the model


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What decides the latents of a job; stored in its index."""

    side: int = 256  # pictures become squares of this side: short side resized, centre cut out
    mirror: bool = False  # also encode every picture mirrored
    dtype: str = "fp32"  # of the computation and of what is stored: fp32, fp16 or bf16
    batch: int = 1  # pictures at a time; kernels may round differently for another number
    shard: int = 512  # pictures in a shard
    refinements: int = 0  # of the latents, as for ParScaleEAR.encode

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        check_whole(1, side=self.side, batch=self.batch, shard=self.shard)
        check_whole(0, refinements=self.refinements)
        if self.side < STRIDE or self.side % STRIDE:
            raise ValueError(f"side must be a multiple of {STRIDE}, got {self.side}")
        if self.dtype not in ("fp32", "fp16", "bf16"):
            raise ValueError(f"dtype must be fp32, fp16 or bf16, got {self.dtype!r}")


@dataclass(frozen=True)
class CacheResult:
    """What a job did."""

    pictures: int  # in the finished folder
    encoded: int  # by this call
    skipped: dict[str, str]  # name → why
    seconds: float  # of this call
    reading: float  # fraction of the time that the model waited for pictures
    complete: bool = True  # False: other jobs of ``world`` have shards left

    @property
    def bound_by(self) -> str:
        """What more speed would have to come from."""
        return "reading pictures" if self.reading > 0.5 else "the model"


def encode_folder(
    refs: Sequence[ImageRef],
    out: str | Path,
    options: CacheOptions,
    *,
    weights: Path | None = None,
    devices: Sequence[str] = ("cpu",),
    readers: int = 2,
    rank: int = 0,
    world: int = 1,
    progress: Progress = lambda count: None,
) -> CacheResult:
    """Encodes pictures into ``out``, or what is left to do there.

    Args:
        refs: the pictures, in the order in which they are stored.
        out: a new folder, or one that an earlier call with the same pictures and options began.
        options: what to store.
        weights: of the autoencoder; None: the shipped ones.
        devices: one a process.
        readers: threads that read pictures, a process.
        rank: number of this job among ``world`` jobs that share the folder.
        world: how many jobs share it.
        progress: called with the number of pictures done, those of an earlier call too.

    Returns:
        What was done. With ``world`` above 1 the last job to end finishes the index.

    Raises:
        CheckpointError: ``out`` holds other latents, or the weights cannot be used.
        ImageError: there are no pictures, or none can be read.
        ValueError: ``refs`` are no ImageRefs, ``rank`` is out of range, there are no devices, or
            latents are not finite.
        WorkerError: a process failed.
    """
    out = Path(out)
    if not all(isinstance(ref, ImageRef) for ref in refs):
        raise ValueError("refs must be ImageRefs, such as find_images gives, not paths")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in [0, {world}), got {rank}")
    if not devices:
        raise ValueError("devices must name at least one")
    if not refs:
        raise ImageError("there are no pictures to encode")
    model = ParScaleEAR.from_pretrained(weights)
    classes = [name for name in class_names(refs) if name]
    job = {
        **asdict(options),
        "latent_fingerprint": model.latent_fingerprint(),
        "pictures": len(refs),
        "list_sha256": list_digest(refs),
    }
    if options.refinements:  # by this decoder, of which the fingerprint says nothing
        job["weights"] = checkpoint.digest(model.state_dict())
    else:
        del job["refinements"]  # as in folders of 0.14 and before
    with _claimed(out, job, classes, alone=world == 1):
        starts = range(0, len(refs), options.shard)
        missing: list[int] = []
        for number, start in enumerate(starts):
            path = out / store.shard_name(number)
            if path.is_file() and _shard_header(path, job):
                progress(min(options.shard, len(refs) - start))
            else:
                missing.append(number)
        began = time.monotonic()
        mine = [number for number in missing if number % world == rank]  # whoever starts first
        shares = [mine[k :: len(devices)] for k in range(len(devices))]
        work = [
            _Share(
                {n: list(refs[n * options.shard : (n + 1) * options.shard]) for n in share},
                out,
                options,
                weights,
                device,
                readers,
                classes,
                job,
            )
            for share, device in zip(shares, devices, strict=True)
            if share
        ]
        results = run_shares(_encode_share, work, progress) if work else []
        seconds = time.monotonic() - began
        waited = sum(r["waited"] for r in results)
        busy = sum(r["busy"] for r in results)
        index = _finish(out, job, classes, len(starts))
        return CacheResult(
            pictures=index["count"],
            encoded=sum(r["encoded"] for r in results),
            skipped=index["skipped"],
            complete=index["complete"],
            seconds=seconds,
            reading=waited / max(waited + busy, 1e-9),
        )


@dataclass(frozen=True)
class _Share:
    refs: dict[int, list[ImageRef]]  # number of a shard → its pictures
    out: Path
    options: CacheOptions
    weights: Path | None
    device: str
    readers: int
    classes: list[str]
    job: dict[str, Any]


@contextmanager
def _claimed(out: Path, job: dict[str, Any], classes: list[str], *, alone: bool) -> Iterator[None]:
    """Takes a new folder, or checks that the one there is of the same job.

    A new one in which nothing was finished when it failed is free again, for other options, too;
    not where other jobs may be at work in it.
    """
    fresh = _claim(out, job, classes)
    try:
        yield
    except BaseException:
        if fresh and alone:
            _leave(out)
        raise


def _leave(out: Path) -> None:
    """Frees a folder in which nothing was finished, so that other options may have it."""
    if not any(out.glob("shard-*.safetensors")):
        (out / store.INDEX_FILE).unlink(missing_ok=True)
        with suppress(OSError):  # something else may lie there
            out.rmdir()


def _claim(out: Path, job: dict[str, Any], classes: list[str]) -> bool:
    """Whether the folder is new; one of another job is refused."""
    path = out / store.INDEX_FILE
    try:
        os.fspath(out).encode()
    except UnicodeEncodeError as error:  # safetensors would not open what was written there
        raise checkpoint.CheckpointError(
            f"{os.fspath(out)!r}: not valid UTF-8; name another folder"
        ) from error
    if out.exists() and not out.is_dir():
        raise checkpoint.CheckpointError(f"{out} is a file; name a folder")
    # Another job may be about to write the index; its unfinished file counts for nothing.
    strangers = out.exists() and any(not p.name.endswith(".part") for p in out.iterdir())
    if path.exists():
        found = store.read_index(out)
        there = found["job"]
        changed = sorted(k for k in job.keys() | there.keys() if there.get(k) != job.get(k))
        if changed:
            raise checkpoint.CheckpointError(
                f"{out} holds latents with another {', '.join(changed)}; give the same pictures "
                "and options to go on, or name a new folder"
            )
        return False
    if strangers:
        raise checkpoint.CheckpointError(
            f"{out} is not empty and holds no latents; name a new folder"
        )
    _write_index(out, job, classes, [], {}, complete=False)
    return True


def _write_index(
    out: Path,
    job: dict[str, Any],
    classes: list[str],
    shards: list[dict[str, Any]],
    skipped: dict[str, str],
    *,
    complete: bool,
) -> dict[str, Any]:
    index = {
        "format": store.FORMAT,
        "complete": complete,
        "count": sum(shard["count"] for shard in shards),
        "latent_fingerprint": job["latent_fingerprint"],
        "mirrored": job["mirror"],
        "classes": classes,
        "job": job,
        "skipped": skipped,
        "shards": shards,
    }
    checkpoint.write_text(out / store.INDEX_FILE, json.dumps(index, indent=1) + "\n")
    return index


def _shard_header(path: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The header of a shard of this job.

    Raises:
        CheckpointError: it is damaged, or another job's.
    """
    header = store.shard_header(path)
    if header["config"] != job:
        raise checkpoint.CheckpointError(f"{path}: of another job; delete it, or name a new folder")
    return header


def _finish(out: Path, job: dict[str, Any], classes: list[str], count: int) -> dict[str, Any]:
    """Writes the index from the shards that are there; complete when all are."""
    shards: list[dict[str, Any]]
    skipped: dict[str, str]
    paths = [out / store.shard_name(number) for number in range(count)]
    while True:
        there = [path for path in paths if path.is_file()]
        shards, skipped = [], {}
        for path in there:
            header = _shard_header(path, job)
            shards.append(
                {"file": path.name, "count": len(header["names"]), "sha256": header["sha256"]}
            )
            add_skipped(skipped, header["skipped"])
        complete = len(there) == count
        index = _write_index(out, job, classes, shards, skipped, complete=complete)
        # Another job may have ended meanwhile: no index may be older than the shards.
        if complete or there == [path for path in paths if path.is_file()]:
            break
    if complete:
        for part in out.glob(".shard-*.part"):  # of jobs that were killed while writing
            part.unlink(missing_ok=True)
    if complete and not index["count"]:
        for path in paths:  # of no latents
            path.unlink(missing_ok=True)
        _leave(out)
        raise ImageError("none of the pictures can be read")
    return index


@dataclass
class _Shard:
    """What is there of the shard that is being encoded."""

    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    latents: list[Tensor] = field(default_factory=list)  # of batches, (B, Z, h, w) each
    mirrored: list[Tensor] = field(default_factory=list)


def _encode_share(share: _Share, progress: Progress) -> dict[str, float]:
    """Encodes the shards of one process."""
    options = share.options
    dtype = DTYPES[options.dtype]
    model = ParScaleEAR.from_pretrained(share.weights, device=share.device, dtype=dtype)
    channels = model.config.litevae.latent_channels
    side = options.side // STRIDE
    empty = torch.empty(0, channels, side, side, dtype=dtype)
    waited = busy = 0.0
    encoded = 0
    numbers = list(share.refs)
    batches = read_batches(
        list(share.refs.values()),
        options.side,
        options.batch,
        readers=share.readers,
        ahead=LOOKAHEAD * options.batch,
    )
    began = time.monotonic()
    shard = _Shard()
    for place, batch in batches:
        read = time.monotonic()
        waited += read - began
        add_skipped(shard.skipped, batch.skipped)
        shard.names += [ref.relative for ref in batch.refs]
        shard.labels += [share.classes.index(ref.label) if ref.label else -1 for ref in batch.refs]
        if batch.refs:
            images = torch.stack(batch.pixels)
            shard.latents.append(encode_pictures(model, images, options.refinements))
            if options.mirror:
                mirrored = encode_pictures(model, images.flip(-1), options.refinements)
                shard.mirrored.append(mirrored)
        encoded += len(batch.refs)
        began = time.monotonic()
        busy += began - read
        progress(len(batch))
        number = numbers[place]
        if len(shard.names) + len(shard.skipped) < len(share.refs[number]):
            continue
        # At once: nothing that happens to the next shard may cost this one.
        store.write_shard(
            share.out,
            number,
            torch.cat([empty, *shard.latents]),
            shard.labels,
            shard.names,
            mirrored=torch.cat([empty, *shard.mirrored]) if options.mirror else None,
            skipped=shard.skipped,
            job=share.job,
        )
        shard = _Shard()
        began = time.monotonic()  # writing is no waiting for pictures
    return {"waited": waited, "busy": busy, "encoded": encoded}


@exact_fp32()
@torch.inference_mode()
def encode_pictures(model: ParScaleEAR, pictures: Tensor, refinements: int = 0) -> Tensor:
    """8-bit pictures (B, 3, H, W) → the posterior's mode (B, Z, h, w), on the CPU.

    Refined as often as ``ParScaleEAR.encode`` is asked to.

    Raises:
        ValueError: it has NaN or infinity in it, or the pictures are not 8-bit.
    """
    images = from_uint8(pictures.to(model.device))
    images = images.to(model.dtype, memory_format=torch.channels_last)
    latents = model.encode(images, refinements=refinements).mode().contiguous().cpu()
    check_finite(latents, "latents")
    return latents

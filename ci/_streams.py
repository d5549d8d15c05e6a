"""Measuring parallel streams: time by scale, memory in fresh processes, pixels."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from ci import _common as ci
from parscale_ear.checkpoint import resolve, tensor_bytes
from parscale_ear.data.images import to_uint8
from parscale_ear.generator.attention import spare_pages
from parscale_ear.generator.ear import EnergyAR
from parscale_ear.generator.packing import can_pack
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.generator.var import VAR, Mode, VARConfig
from parscale_ear.profiling.memory import peak_memory_mib, peak_resident_memory
from parscale_ear.profiling.redflags import StreamMeasurement
from parscale_ear.training.ear_recipe import EARRecipe
from parscale_ear.training.loop import autocast_dtype

# Of an H100 SXM, from its data sheet: dense BF16 and HBM3.
H100_FLOPS_PER_S, H100_BYTES_PER_S = 989e12, 3.35e12


@dataclass(frozen=True)
class Source:
    """Where the model comes from."""

    depth: int = 16  # of a model with random weights
    checkpoint: str | None = None  # ours
    official: tuple[str, str] | None = None  # the authors': tokenizer, transformer
    streams: str | None = None  # trained streams

    @property
    def trained(self) -> bool:
        """Whether pictures mean anything."""
        return self.checkpoint is not None or self.official is not None

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it is read from."""
        named = (self.checkpoint, *(self.official or ()), self.streams)
        return tuple(name for name in named if name is not None)

    def digest(self, seed: int) -> str:
        """SHA-256 of the files, or what the random weights follow from."""
        if not self.trained:
            return f"random, depth {self.depth}, seed {seed}"
        sha = hashlib.sha256()
        for name in self.files:
            with open(resolve(name), "rb") as file:
                while block := file.read(2**24):
                    sha.update(block)
        return sha.hexdigest()


@dataclass
class Case:
    """One number of streams in one mode, and what was measured of it."""

    streams: int
    mode: Mode
    seconds: list[float] = field(default_factory=list)  # whole generations
    token_seconds: list[float] = field(default_factory=list)  # without the decoder
    scale_seconds: list[list[float]] = field(default_factory=list)
    block_calls: tuple[int, ...] = ()  # of the last run, of every block
    synchronised: bool = True  # the device was idle at every look at the clock, in all runs
    pictures: Tensor | None = None  # (1, P, 3, H, W), 8-bit, of the last run

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"P = {self.streams}" + (", aggregate" if self.mode == "aggregate" else "")


def load_fp32(source: Source, device: torch.device, seed: int) -> VAR:
    """The model in FP32: from files, or with random weights."""
    if source.official is not None:
        return VAR.from_official(*source.official, device=device)
    if source.checkpoint is not None:
        return VAR.from_pretrained(source.checkpoint, device=device, dtype=torch.float32)
    torch.manual_seed(seed)
    return VAR(VARConfig(depth=source.depth)).to(device).eval()


def timed_dtype(device: torch.device) -> torch.dtype:
    """BF16, or FP32 where the device has no kernels for BF16 and would be slower by it."""
    return autocast_dtype("auto", device) or torch.float32


def as_timed(var: VAR) -> tuple[VAR, bool]:
    """The model as it is timed: in its dtype, packed on the CPU where that is possible."""
    device = var.device
    dtype = timed_dtype(device)
    var.set_dtype(dtype)
    packs = device.type == "cpu" and can_pack(dtype)
    return (var.pack() if packs else var), packs


def streams_for(
    var: VAR, source: Source, case: Case, seed: int
) -> tuple[ParallelStreams | int, str]:
    """Streams of a case, and what they are.

    Trained ones where they were named and have this number. Else the streams of a diverse
    generation with trained weights are plain ones, so that its pictures mean something; all others
    get fresh prefixes and weights, so that time and memory are those of trained ones.
    """
    config = var.config.transformer
    device, dtype = var.device, var.dtype
    if source.streams is not None and case.streams > 1:
        trained = ParallelStreams.from_pretrained(source.streams)
        if trained.count == case.streams:
            return trained.to(device, dtype), "trained streams"
    if source.trained and case.mode == "diverse":
        return case.streams, "plain streams"
    torch.manual_seed(seed)
    fresh = ParallelStreams.fitting(config, case.streams).to(device, dtype).eval()
    return fresh, "untrained prefixes" if case.streams > 1 else "plain streams"


def ear_streams(model: EnergyAR, case: Case, seed: int) -> ParallelStreams | int:
    """Streams of a case for the shipped EnergyAR.

    Plain ones in diverse mode. One picture from all streams needs prefixes: fresh ones, as long as
    those that ``parscale-ear train ear`` trains, take as much time and memory.
    """
    if case.mode == "diverse":
        return case.streams
    torch.manual_seed(seed)
    fresh = ParallelStreams.fitting(
        model.config.transformer, case.streams, prefix_tokens=EARRecipe.prefix_tokens
    )
    return fresh.to(model.device).eval()


def prefix_tokens(streams: ParallelStreams | int) -> int:
    """Slots of the cache that a stream's prefix takes."""
    return 0 if isinstance(streams, int) else streams.prefix_tokens


def now(device: torch.device) -> float:
    """The clock, seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def idle(device: torch.device) -> bool:
    """Whether the device has nothing left to do."""
    return device.type != "cuda" or bool(torch.cuda.current_stream(device).query())


def run_case(
    var: VAR | EnergyAR,
    streams: ParallelStreams | int,
    case: Case,
    *,
    label: int,
    guidance: float,
    seed: int,
) -> None:
    """One timed generation; adds to what the case holds."""
    device = var.device
    generator = torch.Generator(device).manual_seed(seed)
    stamps: list[float] = []
    calls = [0] * var.config.depth

    def count(layer: int, *_: object) -> None:
        calls[layer] += 1

    def look() -> float:
        time_now = now(device)
        case.synchronised &= idle(device)
        return time_now

    hooks = [
        block.register_forward_pre_hook(partial(count, layer))
        for layer, block in enumerate(var.transformer.layers())
    ]
    try:
        start = look()
        images = var.generate(
            [label],
            guidance=guidance,
            generator=generator,
            streams=streams,
            mode=case.mode,
            callback=lambda _: stamps.append(look()),
        )
        end = look()
    finally:
        for hook in hooks:
            hook.remove()
    case.seconds.append(end - start)
    case.token_seconds.append(stamps[-1] - start)
    case.scale_seconds.append(np.diff([start, *stamps]).tolist())
    case.block_calls = tuple(calls)
    case.pictures = to_uint8(images.flatten(0, -4).float())[None].cpu()  # (1, P, 3, H, W)


def run_alternately(
    functions: Sequence[Callable[[], object]], runs: int, progress: Callable[[], object]
) -> None:
    """Calls every function once to warm up, then all in turn; the first calls do not count."""
    for _ in range(runs + 1):
        for function in functions:
            function()
            progress()


def pixel_digests(case: Case) -> tuple[str, ...]:
    """SHA-256 of every picture."""
    assert case.pictures is not None
    return tuple(hashlib.sha256(tensor_bytes(picture)).hexdigest() for picture in case.pictures[0])


def measurement_of(row: Mapping[str, Any], origin: Mapping[str, Any]) -> StreamMeasurement:
    """A row of a report's cases, as the red flags look at it."""
    return StreamMeasurement(
        streams=row["streams"],
        mode=row["mode"],
        seconds=row["median_s"],
        token_seconds=row["tokens_s"],
        scale_seconds=tuple(row["scale_s"]),
        flops_by_scale=tuple(row["flops_by_scale"]),
        peak_bytes=row["peak_bytes"],
        cache_bytes=row["cache_bytes"],
        block_calls=tuple(row["block_calls"]),
        diversity=row["diversity"],
        pixel_digests=tuple(row["pixel_sha256"]),
        synchronised=row["synchronised"],
        origin=dict(origin),
    )


# --- memory ---


def measure_memory(
    source: Source | None,
    case: Case,
    device: torch.device,
    *,
    label: int,
    guidance: float,
    seed: int,
) -> dict[str, int | None]:
    """Peak memory of one generation: resident in a fresh process on the CPU, allocated on CUDA.

    Args:
        source: of a VAR; None: the shipped EnergyAR.
        case: the streams.
        device: where.
        label: of the pictures.
        guidance: of the generation.
        seed: of the noise.

    Returns:
        Bytes when the model is ``loaded``, and at the ``peak``; a peak of None: not to be had.
    """
    request = {
        "source": None if source is None else asdict(source),
        "streams": case.streams,
        "mode": case.mode,
        "device": str(device),
        "label": label,
        "guidance": guidance,
        "seed": seed,
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), json.dumps(request)],
        # What was freed goes back to the system at once, so that the high-water mark tells what
        # is in use; the C library would keep some 200 MiB of the loading for later.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ci.UsageError(f"measuring the memory of {case.name} failed: {last}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _measure_here(request: dict[str, Any]) -> dict[str, int | None]:
    device, seed = torch.device(request["device"]), request["seed"]
    case = Case(request["streams"], request["mode"])
    model: VAR | EnergyAR
    streams: ParallelStreams | int
    if request["source"] is None:
        model = ci.load_generator(None, device)
        streams = ear_streams(model, case, seed)
    else:
        source = dict(request["source"])
        official = source.pop("official")
        where = Source(**source, official=None if official is None else tuple(official))
        model, _ = as_timed(load_fp32(where, device, seed))
        streams, _ = streams_for(model, where, case, seed)
    options = {name: request[name] for name in ("label", "guidance", "seed")}
    small = Case(1, "diverse")  # threads, kernels and their caches, before anything is measured
    run_case(model, 1, small, **options)
    spare_pages.clear()  # a cache is part of what is measured, not of what was there
    if device.type == "cuda":
        loaded = torch.cuda.memory_allocated(device)
        with peak_memory_mib(device) as peak:
            run_case(model, streams, case, **options)
        return {"loaded": loaded, "peak": None if peak[0] is None else int(peak[0] * 2**20)}
    with peak_resident_memory() as resident:
        run_case(model, streams, case, **options)
    return {"loaded": resident.before, "peak": resident.peak}


# --- the roof ---


def roof_seconds(
    var: VAR, flops: Sequence[float], flops_per_s: float, bytes_per_s: float, dtype: torch.dtype
) -> float:
    """What a generation takes at least: a scale computes, or reads all weights, at the roof.

    Args:
        var: the model; weights of blocks and head are read once a scale.
        flops: of every scale.
        flops_per_s: the compute roof.
        bytes_per_s: the memory roof.
        dtype: of the weights.
    """
    config = var.config.transformer
    per_block = (4 + 2 * config.mlp_ratio) * config.width**2
    weights = dtype.itemsize * (
        config.depth * per_block + config.width * var.config.vqvae.vocabulary
    )
    return sum(max(count / flops_per_s, weights / bytes_per_s) for count in flops)


if __name__ == "__main__":
    print(json.dumps(_measure_here(json.loads(sys.argv[1]))))

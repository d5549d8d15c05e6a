"""How well an autoencoder reconstructs a folder of pictures, by the usual protocol."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parscale_ear.autoencoder.litevae import STRIDE
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.reconstruct import reconstruct_pictures
from parscale_ear.checks import check_whole
from parscale_ear.data.images import ImageError, ImageRef
from parscale_ear.data.reading import add_skipped, read_batches
from parscale_ear.device import DTYPES, exact_fp32
from parscale_ear.metrics.features import FeatureChoice, load_extractor
from parscale_ear.metrics.frechet import FeatureMoments
from parscale_ear.metrics.reconstruction import SIMILARITIES, similarities
from parscale_ear.parallel import Progress, run_shares


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is measured, and with what."""

    weights: Path | None = None  # None: the shipped ones
    side: int = 256  # pictures become squares of this side by the protocol
    dtype: str = "fp32"  # of the computation
    batch: int = 8  # pictures at a time
    refinements: int = 0  # of the latents, as for ParScaleEAR.encode
    features: FeatureChoice = "auto"  # what the distance is measured in
    inception_weights: str | Path | None = None  # pytorch-fid's file

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        check_whole(1, side=self.side, batch=self.batch)
        check_whole(0, refinements=self.refinements)
        if self.side < STRIDE or self.side % STRIDE:
            raise ValueError(f"side must be a multiple of {STRIDE}, got {self.side}")
        if self.dtype not in ("fp32", "fp16", "bf16"):
            raise ValueError(f"dtype must be fp32, fp16 or bf16, got {self.dtype!r}")


@dataclass(frozen=True)
class _Share:
    refs: list[ImageRef]
    options: EvaluationOptions
    device: str


def evaluate(
    refs: Sequence[ImageRef],
    options: EvaluationOptions,
    *,
    devices: Sequence[str] = ("cpu",),
    progress: Progress = lambda count: None,
) -> dict[str, Any]:
    """Means over pictures, and the distance between reconstructions and originals.

    Args:
        refs: the pictures.
        options: what to measure.
        devices: one a process.
        progress: called with the number of pictures done.

    Returns:
        ``psnr_db``, ``ssim``, ``ms_ssim`` (None below 161 pixels), ``haarpsi``,
        ``frechet_distance`` with ``distance_name`` (None for fewer than two pictures),
        ``images_per_s`` of the model after its first batch (None where there is one only; the
        next pictures are read beside it), ``pictures``, ``skipped`` (name → why).

    Raises:
        CheckpointError: the weights cannot be used.
        ImageError: there are no pictures, or none can be read.
        FeatureError: the extractor cannot be had.
        ValueError: ``refs`` are no ImageRefs, there are no devices, or what comes back is not finite.
        WorkerError: a process failed.
    """
    if not all(isinstance(ref, ImageRef) for ref in refs):
        raise ValueError("refs must be ImageRefs, such as find_images gives, not paths")
    if not refs:
        raise ImageError("there are no pictures to evaluate")
    if not devices:
        raise ValueError("devices must name at least one")
    # The extractor is found (and fetched) once, before processes start.
    extractor, note = load_extractor(options.features, weights=options.inception_weights)
    options = replace(options, features=extractor.name)  # type: ignore[arg-type]
    del extractor  # every process has its own
    shares = [
        _Share(list(refs[k :: len(devices)]), options, device)
        for k, device in enumerate(devices)
        if refs[k :: len(devices)]
    ]
    results = run_shares(_evaluate_share, shares, progress)
    values = {
        key: np.concatenate([r["values"][key] for r in results]) for key in results[0]["values"]
    }
    count = len(values["psnr_db"])
    skipped: dict[str, str] = {}
    for result in results:
        add_skipped(skipped, result["skipped"])
    if not count:
        raise ImageError("none of the pictures can be read")
    timed = sum(r["timed"] for r in results)
    distance = None
    if count > 1:
        restored, originals = (_merged([r[k] for r in results]) for k in ("restored", "originals"))
        distance = restored.gaussian().distance(originals.gaussian())
    return {
        "pictures": count,
        "side": options.side,
        "dtype": options.dtype,
        "refinements": options.refinements,
        **{k: float(v.mean()) if not np.isnan(v).any() else None for k, v in values.items()},
        "frechet_distance": distance,
        "distance_name": results[0]["distance"],
        "features_note": note,
        "images_per_s": timed / max(r["seconds"] for r in results) if timed else None,
        "processes": len(shares),
        "skipped": skipped,
    }


def _merged(parts: Sequence[FeatureMoments]) -> FeatureMoments:
    for part in parts[1:]:
        parts[0].merge(part)
    return parts[0]


@exact_fp32()
def _evaluate_share(share: _Share, progress: Progress) -> dict[str, Any]:
    """The figures of one process's pictures."""
    options = share.options
    model = ParScaleEAR.from_pretrained(
        options.weights, device=share.device, dtype=DTYPES[options.dtype]
    )
    extractor, _ = load_extractor(
        options.features, device=share.device, weights=options.inception_weights
    )
    values: dict[str, list[NDArray[np.float64]]] = {key: [] for key in SIMILARITIES}
    moments = {name: FeatureMoments(extractor.dimensions) for name in ("restored", "originals")}
    skipped: dict[str, str] = {}
    seconds, timed, first = 0.0, 0, True
    batches = read_batches(
        [share.refs], options.side, options.batch, readers=1, ahead=2 * options.batch
    )
    for _, batch in batches:
        add_skipped(skipped, batch.skipped)
        if batch.refs:
            originals = torch.stack(batch.pixels)
            began = time.perf_counter()
            restored = reconstruct_pictures(
                model, originals, refinements=options.refinements, batch_size=options.batch
            )
            if not first:  # the first batch warms up
                seconds += time.perf_counter() - began
                timed += len(originals)
            first = False
            for key, found in similarities(restored, originals).items():
                values[key].append(found)
            moments["restored"].add(extractor(restored).numpy())
            moments["originals"].add(extractor(originals).numpy())
        progress(len(batch))
    return {
        "values": {k: np.concatenate([np.empty(0), *v]) for k, v in values.items()},
        **moments,
        "skipped": skipped,
        "seconds": max(seconds, 1e-9),
        "timed": timed,
        "distance": extractor.distance,
    }

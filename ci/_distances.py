"""Distances of several reconstructions to their originals, paired and with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ci import _common as ci
from parscale_ear.data.reference import ReferenceSet
from parscale_ear.metrics.features import FeatureExtractor
from parscale_ear.metrics.frechet import clustered_bootstrap, frechet_distance
from parscale_ear.metrics.reconstruction import psnr, ssim

BATCH_SIZE = 16
METRICS = ("distance", "psnr_db", "ssim")
HIGHEST_PSNR = 100.0  # dB, of one picture


def extract(extractor: FeatureExtractor, pictures: Tensor, name: str) -> NDArray[np.float64]:
    """Features of 8-bit pictures, (N, D)."""
    with ci.progress(len(pictures), f"features of {name}") as advance:
        parts = []
        for part in pictures.split(BATCH_SIZE):
            parts.append(extractor(part))
            advance(len(part))
    return torch.cat(parts).double().numpy()


def compare(
    reference: ReferenceSet,
    variants: Mapping[str, Tensor],
    extractor: FeatureExtractor,
    *,
    against: str,
    repeats: int,
    seed: int,
) -> dict[str, Any]:
    """Distance, PSNR and SSIM of each variant, and its paired difference to ``against``.

    Args:
        reference: the originals.
        variants: name → reconstructions, (N, 3, H, W), 8-bit.
        extractor: for the distance.
        against: the variant that the others are compared with.
        repeats: bootstrap draws.
        seed: of the draws.

    Returns:
        ``{"variants": {name: {metric: interval}}, "differences": {name: {metric: interval}}}``,
        and ``reference_distance``: between two halves of the originals (of every photograph
        every other crop), as a yardstick.
    """
    originals = extract(extractor, reference.pictures, "originals")
    features = {name: extract(extractor, p, name) for name, p in variants.items()}
    values: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, pictures in variants.items():
        with ci.progress(1, f"PSNR and SSIM of {name}"):
            values[name] = {
                # A picture that comes back exactly has no finite PSNR.
                "psnr_db": np.minimum(psnr(pictures, reference.pictures), HIGHEST_PSNR),
                "ssim": ssim(pictures, reference.pictures),
            }
    names = list(variants)

    def statistics(indices: NDArray[np.intp]) -> list[float]:
        figures = [
            [
                frechet_distance(features[name][indices], originals[indices]),
                float(values[name]["psnr_db"][indices].mean()),
                float(values[name]["ssim"][indices].mean()),
            ]
            for name in names
        ]
        base = figures[names.index(against)]
        differences = [[a - b for a, b in zip(row, base, strict=True)] for row in figures]
        relative = [row[0] / base[0] - 1 if base[0] > 0 else float("nan") for row in figures]
        return [*chain(*figures, *differences, relative)]

    with ci.progress(repeats, "bootstrap") as advance:
        intervals = clustered_bootstrap(
            statistics, reference.clusters, repeats=repeats, seed=seed, progress=advance
        )
    flat = [interval.as_dict() for interval in intervals]
    width = len(METRICS)
    rows = [flat[k * width : (k + 1) * width] for k in range(2 * len(names))]
    relative = flat[2 * len(names) * width :]
    half = np.zeros(len(originals), dtype=bool)
    half[np.argsort(reference.clusters, kind="stable")[::2]] = True  # of every photograph
    return {
        "distance_name": extractor.distance,
        "against": against,
        "variants": {
            name: dict(zip(METRICS, rows[k], strict=True)) for k, name in enumerate(names)
        },
        "differences": {
            name: {
                **dict(zip(METRICS, rows[len(names) + k], strict=True)),
                "relative_distance": relative[k],
            }
            for k, name in enumerate(names)
            if name != against
        },
        "reference_distance": frechet_distance(originals[half], originals[~half]),
    }


def print_comparison(result: Mapping[str, Any]) -> None:
    """Prints variants and differences as a table."""
    rows = []
    for kind in ("variants", "differences"):
        for name, metrics in result[kind].items():
            label = name if kind == "variants" else f"{name} − {result['against']}"
            rows.append((label, *(interval_text(metrics[metric]) for metric in METRICS)))
    ci.table(("", result["distance_name"], "PSNR, dB", "SSIM"), rows)


def interval_text(interval: Mapping[str, float]) -> str:
    """``value [low, high]``."""
    return f"{interval['value']:.4g} [{interval['low']:.4g}, {interval['high']:.4g}]"

"""Distances of several reconstructions to their originals, paired and with intervals."""

from __future__ import annotations

import math
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
from parscale_ear.metrics.frechet import GROUPS, clustered_jackknife, frechet_distance
from parscale_ear.metrics.reconstruction import SIMILARITIES, similarities

BATCH_SIZE = 16
METRICS = ("distance", *SIMILARITIES)
LABELS = {"psnr_db": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "haarpsi": "HaarPSI"}
DIGITS = {"distance": 2, "psnr_db": 2, "ssim": 4, "ms_ssim": 4, "haarpsi": 4}


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
    against: Mapping[str, str],
    seed: int,
) -> dict[str, Any]:
    """Distance and similarities of each variant, and paired differences.

    Args:
        reference: the originals.
        variants: name → reconstructions, (N, 3, H, W), 8-bit.
        extractor: for the distance.
        against: name → the variant that it is compared with.
        seed: of the intervals' groups.

    Returns:
        ``{"variants": {name: {metric: interval}}, "differences": {name: {metric: interval}}}``,
        and ``reference_distance``: between two halves of the originals (of every photograph
        every other crop), as a yardstick.
    """
    originals = extract(extractor, reference.pictures, "originals")
    features = {name: extract(extractor, p, name) for name, p in variants.items()}
    values: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, pictures in variants.items():
        with ci.progress(1, f"similarity of {name}"):
            values[name] = similarities(pictures, reference.pictures)
    names = list(variants)

    def statistics(indices: NDArray[np.intp]) -> list[float]:
        figures = [
            [
                frechet_distance(features[name][indices], originals[indices]),
                *(float(values[name][metric][indices].mean()) for metric in METRICS[1:]),
            ]
            for name in names
        ]
        pairs = [(figures[names.index(a)], figures[names.index(b)]) for a, b in against.items()]
        differences = [[a - b for a, b in zip(row, base, strict=True)] for row, base in pairs]
        relative = [row[0] / base[0] - 1 if base[0] > 0 else float("nan") for row, base in pairs]
        return [*chain(*figures, *differences, relative)]

    with ci.progress(min(GROUPS, len(set(reference.clusters))), "intervals") as advance:
        intervals = clustered_jackknife(statistics, reference.clusters, seed=seed, progress=advance)
    flat = [interval.as_dict() for interval in intervals]
    width = len(METRICS)
    count = len(names) + len(against)
    rows = [flat[k * width : (k + 1) * width] for k in range(count)]
    relative = flat[count * width :]
    half = np.zeros(len(originals), dtype=bool)
    half[np.argsort(reference.clusters, kind="stable")[::2]] = True  # of every photograph
    return {
        "distance_name": extractor.distance,
        "variants": {
            name: dict(zip(METRICS, rows[k], strict=True)) for k, name in enumerate(names)
        },
        "differences": {
            name: {
                "against": base,
                **dict(zip(METRICS, rows[len(names) + k], strict=True)),
                "relative_distance": relative[k],
            }
            for k, (name, base) in enumerate(against.items())
        },
        "reference_distance": frechet_distance(originals[half], originals[~half]),
    }


def distance_head(result: Mapping[str, Any]) -> tuple[str, ...]:
    """The head of a table of ``distance_rows``."""
    return ("", result["distance_name"], *LABELS.values())


def interval_note(reference: Mapping[str, Any]) -> str:
    """How intervals over the reference pictures were made, and how far to trust them."""
    scenes = reference["scenes"]
    note = f"intervals meant for 95 %, by jackknife over {scenes} scenes"
    if scenes > GROUPS:
        note += f" in {GROUPS} groups"
    if scenes < GROUPS:
        note += " (of 13 scenes those of distances hold 85 to 91 % in simulations)"
    return note


def distance_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Variants, then differences, each with its interval."""

    def text(interval: Mapping[str, Any], digits: int, sign: str = "") -> str:
        if not all(v is not None and math.isfinite(v) for v in interval.values()):
            return "—"
        return ci.interval(interval, digits, sign=sign)

    rows = []
    for kind, sign in (("variants", ""), ("differences", "+")):
        for name, metrics in result[kind].items():
            label = name if kind == "variants" else f"{name} − {metrics['against']}"
            rows.append((label, *(text(metrics[m], DIGITS[m], sign) for m in METRICS)))
    return rows


def print_comparison(result: Mapping[str, Any]) -> None:
    """Prints variants and differences as a table."""
    ci.table(distance_head(result), distance_rows(result))

"""Parallel streams of the shipped EnergyAR: trained weights, so that diversity means something."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ci import _common as ci
from ci._streams import (
    Case,
    ear_streams,
    measure_memory,
    prefix_tokens,
    run_alternately,
    run_case,
)
from parscale_ear.data.images import to_uint8
from parscale_ear.generator.ear import EnergyAR
from parscale_ear.metrics.diversity import feature_diversity, pixel_cosine
from parscale_ear.metrics.features import FeatureExtractor

GUIDANCE = (0.0, 1.0, 2.0, 4.0)  # that diversity is measured at, beside the recommended one


def measure_ear_streams(
    counts: Sequence[int], runs: int, device: torch.device, extractor: FeatureExtractor, seed: int
) -> dict[str, Any]:
    """Time and diversity of P plain streams in one pass, beside P calls of one picture.

    And time and memory of one picture that P streams draw together.

    Args:
        counts: numbers of streams; 1 among them.
        runs: timed rounds.
        device: where.
        extractor: of the features that diversity is measured in.
        seed: of the noise.
    """
    model = ci.load_generator(None, device)
    classes = len(model.config.class_names)
    guidance = model.recommended["guidance"]
    cases = [Case(count, "diverse") for count in counts]
    joined = [Case(count, "aggregate") for count in counts]
    streams = [ear_streams(model, case, seed) for case in (*cases, *joined)]
    calls = [Case(1, "diverse") for _ in cases]  # timings of P calls of one picture, by P

    def one_by_one(times: int, single: Case) -> None:
        for _ in range(times):
            run_case(model, 1, single, label=0, guidance=guidance, seed=seed)

    functions = [
        *(
            partial(run_case, model, those, case, label=0, guidance=guidance, seed=seed)
            for case, those in zip((*cases, *joined), streams, strict=True)
        ),
        *(
            partial(one_by_one, case.streams, single)
            for case, single in zip(cases, calls, strict=True)
        ),
    ]
    with ci.progress(len(functions) * (runs + 1), "EnergyAR") as advance:
        run_alternately(functions, runs, advance)
    with ci.progress(len(joined), "memory in fresh processes") as advance:
        memory = []
        for case in joined:
            memory.append(measure_memory(None, case, device, label=0, guidance=guidance, seed=seed))
            advance()
    first = float(np.median(cases[0].seconds[1:]))
    rows = []
    for case, single in zip(cases, calls, strict=True):
        together = _pictures(model, classes, case.streams, seed)
        apart = torch.cat([_pictures(model, classes, 1, seed + k) for k in range(case.streams)], 1)
        median = float(np.median(case.seconds[1:]))
        rounds = np.reshape(single.seconds, (-1, case.streams)).sum(1)  # of P calls each
        rows.append(
            {
                "streams": case.streams,
                "median_s": median,
                "sequential_s": float(np.median(rounds[1:])),
                "efficiency": case.streams * first / median,
                "block_calls": list(case.block_calls),
                "scales": len(model.pyramid.scales),
                "cache_bytes": model.kv_cache_bytes(streams=case.streams, guidance=guidance > 0),
                "diversity": feature_diversity(together, extractor),
                "diversity_of_calls": feature_diversity(apart, extractor),
                "pixel_cosine": pixel_cosine(together),
            }
        )
    return {
        "model": f"EnergyAR, {model.parameter_count()['total'] / 1e6:.1f} M parameters",
        "side": model.config.image_side,
        "classes": classes,
        "settings": dict(model.recommended),
        "cases": rows,
        "aggregate": [
            {
                "streams": case.streams,
                "median_s": float(np.median(case.seconds[1:])),
                "cache_bytes": model.kv_cache_bytes(
                    streams=case.streams,
                    guidance=guidance > 0,
                    prefix=prefix_tokens(those),
                    mode="aggregate",
                ),
                "loaded_bytes": peak["loaded"],
                "peak_bytes": peak["peak"],
            }
            for case, those, peak in zip(joined, streams[len(cases) :], memory, strict=True)
        ],
        "diversity_by_guidance": {
            f"{value:g}": feature_diversity(
                _pictures(model, classes, counts[-1], seed, value), extractor
            )
            for value in sorted({*GUIDANCE, guidance})
        },
    }


def _pictures(
    model: EnergyAR, classes: int, streams: int, seed: int, guidance: float | None = None
) -> Tensor:
    """P pictures of every class in one call: (classes, P, 3, H, W), 8-bit."""
    generator = torch.Generator(model.device).manual_seed(seed)
    images = model.generate(
        torch.arange(classes), guidance=guidance, streams=streams, generator=generator
    )
    return to_uint8(images).cpu()

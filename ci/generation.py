"""M3-2: pictures drawn by the shipped EnergyAR: are they what they are named, how far from real."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from ci import _common as ci
from ci import _evidence
from ci._generation_tables import CLASS_HEAD, HEAD, class_rows, generation_notes, rows
from parscale_ear import checkpoint
from parscale_ear.autoencoder.files import shipped_weights
from parscale_ear.generator.ear import DEFAULT_DECODER, EnergyAR, shipped_generator
from parscale_ear.metrics.frechet import Gaussian
from parscale_ear.metrics.generation import (
    STATISTICS_FILE,
    FeatureStatistics,
    class_diversity,
    share,
    shipped_statistics,
)
from parscale_ear.training.control_heads import DiffusionHead
from parscale_ear.training.judging import BATCH, Judge, draw

FULL_SAMPLES = ci.FULL["generation"]["num_samples"]
MOST_PASSES = 8  # of the trunk, a picture
MOST_HEAD_TIME = 0.2  # of a diffusion head's of the same width
SINGLE_CALLS = 20  # of one picture alone
LEAST_DIVERSITY = 0.8  # of real pictures'
DIFFUSION_STEPS = 32
HEAD_TOKENS = (32, 16)  # pictures and tokens that the heads are timed on


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = ci.parser(__doc__ or "", "generation.json")
    parser.add_argument("--checkpoint", type=Path, help="an EnergyAR (default: the shipped one)")
    parser.add_argument(
        "--num-samples",
        type=ci.positive_int,
        default=os.environ.get("CI_GENERATION_SAMPLES") or None,
        help=f"pictures (or CI_GENERATION_SAMPLES; default {FULL_SAMPLES}, quick 64)",
    )
    parser.add_argument("--guidance", type=float, help="default: what the weights recommend")
    parser.add_argument("--temperature", type=float, help="likewise")
    arguments = parser.parse_args(argv)
    device = ci.resolve_device(arguments.device)
    count = int(arguments.num_samples or (64 if arguments.quick else FULL_SAMPLES))
    model = ci.load_generator(arguments.checkpoint, device)
    statistics = FeatureStatistics.load(shipped_statistics())
    decoder = checkpoint.load(shipped_weights("hybrid", DEFAULT_DECODER))[1]["sha256"]
    if statistics.facts.get("decoder_sha256") != decoder:
        raise ci.UsageError(
            f"{STATISTICS_FILE} tells what real pictures are through another decoder than the one that "
            "ships; judge anew by parscale_ear.training.ear_release"
        )
    names = model.config.class_names
    if names != (judged := EnergyAR.load(shipped_generator()).config.class_names):
        raise ci.UsageError(
            f"{arguments.checkpoint}: its classes are {', '.join(names)[:100]}; the judge knows "
            f"{', '.join(judged)}, in this order (train ear --class-names)"
        )
    if count < 2 * len(names):
        raise ci.UsageError(f"--num-samples {count}: at least {2 * len(names)} are needed")
    asked = {"guidance": arguments.guidance, "temperature": arguments.temperature}
    settings = {k: model.recommended[k] if v is None else v for k, v in asked.items()}
    labels = torch.arange(count) % len(names)
    judge = Judge(statistics.classes, device)
    extractor = judge.network
    if extractor.name != statistics.extractor:
        raise ci.UsageError(f"{STATISTICS_FILE} is of {statistics.extractor}, not {extractor.name}")
    # One batch first, which also warms up what the clock shall not see.
    again, _, passes = _draw(model, min(count, BATCH), settings, arguments.seed)
    pictures, seconds, _ = _draw(model, count, settings, arguments.seed)
    features = judge.look(pictures, "judging")
    hits = judge.hits(features, labels)
    figures: dict[str, Any] = {
        "pictures": count,
        "side": model.config.image_side,
        "parameters": model.parameter_count(),
        "settings": settings,
        "class_accuracy": share(hits).as_dict(),
        "class_accuracy_by_class": {
            name: float(hits[labels == k].float().mean()) for k, name in enumerate(names)
        },
        "distance_name": extractor.distance,
        "distance": Gaussian.fit(features.numpy()).distance(statistics.law),
        "diversity": class_diversity(features, labels),
        "reference": dict(statistics.facts),
        "passes": passes,
        "picture_s": seconds / count,
        "batch_size": BATCH,
        "single_picture_calls": SINGLE_CALLS,
        "single_picture_s": _single(model, settings, arguments.seed),
        "same_again": bool(torch.equal(again, pictures[: len(again)])),
        "heads": _heads(model, 2 if arguments.quick else 7),
    }
    ci.table(HEAD, rows(figures, statistics.facts["ceiling"]))
    print()
    ci.table(CLASS_HEAD, class_rows(figures))
    for note in generation_notes(figures):
        print(note)
    fields = ci.common_fields(device, torch.float32, arguments.seed)
    weights = checkpoint.load(arguments.checkpoint or shipped_generator())[1]["sha256"]
    said = {"num_samples": count, "batch_size": BATCH, "generator_sha256": weights, **settings}
    targets = [
        *_targets(figures, quick=arguments.quick),
        *_evidence.judged_targets(
            _evidence.read(_evidence.JUDGED),
            weights,
            decoder,
            quick=arguments.quick,
        ),
        *_evidence.head_targets(
            _evidence.head_comparisons(_evidence.HEADS),
            _evidence.head_comparisons(_evidence.HEADS_PICTURES),
            quick=arguments.quick,
        ),
    ]
    return ci.finish("M3-2", "generation", arguments, fields, said, figures, targets)


def _draw(
    model: EnergyAR, count: int, settings: Mapping[str, float], seed: int
) -> tuple[Tensor, float, int]:
    """Pictures, 8-bit, the classes in turn; seconds; calls of the trunk's last block."""
    calls = [0]

    def add(*_: object) -> None:
        calls[0] += 1

    hook = model.transformer.layers()[-1].register_forward_hook(add)
    start = time.perf_counter()
    try:
        pictures = draw(model, count, seed, settings, "drawing")
    finally:
        hook.remove()
    return pictures, time.perf_counter() - start, calls[0]


def _single(model: EnergyAR, settings: Mapping[str, float], seed: int) -> float:
    """Median seconds of one picture alone, of ``SINGLE_CALLS``."""
    times = [_draw(model, 1, settings, seed)[1] for _ in range(1 + SINGLE_CALLS)]
    return float(np.median(times[1:]))  # the first one warms up


@torch.no_grad()
def _heads(model: EnergyAR, rounds: int) -> dict[str, float]:
    """Seconds a token of the energy head, and of a diffusion head of its width, taking turns."""
    config, device = model.config, model.device
    diffusion = DiffusionHead(**config.head, steps=DIFFUSION_STEPS).to(device)
    level = model.pyramid.levels - 1
    hidden = torch.randn(*HEAD_TOKENS, config.width, device=device)
    times: dict[str, list[float]] = {"energy": [], "diffusion": []}
    with ci.progress(rounds + 1, "heads") as advance:
        for _ in range(rounds + 1):
            for name, head in (("energy", model.head), ("diffusion", diffusion)):
                start = time.perf_counter()
                head.draw(hidden, level=level).sum().item()  # .item() waits for the device
                times[name].append(time.perf_counter() - start)
            advance()
    tokens = HEAD_TOKENS[0] * HEAD_TOKENS[1]
    seconds = {f"{name}_token_s": float(np.median(t[1:])) / tokens for name, t in times.items()}
    return {**seconds, "tokens": tokens, "rounds": rounds, "diffusion_steps": DIFFUSION_STEPS}


def _targets(figures: Mapping[str, Any], *, quick: bool) -> list[ci.Target]:
    accuracy = figures["class_accuracy"]
    heads = figures["heads"]
    ratio = heads["energy_token_s"] / heads["diffusion_token_s"]
    head = f"time of a token, energy head over a diffusion head of {DIFFUSION_STEPS} steps"
    why = (
        f"95 % interval {accuracy['low']:.2f} to {accuracy['high']:.2f}; "
        f"real pictures through the autoencoder: "
        f"{figures['reference']['ceiling']['class_accuracy']['value']:.2f}"
    )
    return [
        ci.at_least("pictures put into their own class", accuracy["value"], _evidence.LEAST_ACCURACY, why=why),
        ci.at_most("passes of the trunk a picture", figures["passes"], MOST_PASSES),
        ci.holds("the same seed gives the same pictures", figures["same_again"]),
        ci.at_least(
            "diversity within a class over that of real pictures",
            figures["diversity"] / figures["reference"]["ceiling"]["diversity"],
            LEAST_DIVERSITY,
        ),
        ci.skipped(head, "--quick gives no verdict on timings", f"≤ {MOST_HEAD_TIME}")
        if quick
        else ci.at_most(head, ratio, MOST_HEAD_TIME),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(ci.run(main))

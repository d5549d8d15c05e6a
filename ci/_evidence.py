"""Committed evidence that a validation run cannot make again: trainings and trials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ci import _common as ci

FOLDER = ci.ROOT / "docs" / "results"
TRAINING = FOLDER / "hybrid_training.json"  # of parscale_ear.training.comparison
STREAMS = FOLDER / "streams_training.json"  # of parscale-ear train var, RUN/streams.json
EAR_STREAMS = FOLDER / "streams_judged.json"  # of parscale_ear.training.stream_judging
TRIALS = FOLDER / "trials.json"
HEADS = FOLDER / "heads.json"  # of parscale_ear.training.head_comparison, tokens alone
HEADS_PICTURES = FOLDER / "heads_pictures.json"  # of the same with --picture-minutes
JUDGED = FOLDER / "generation_judged.json"  # of parscale_ear.training.ear_release
HEAD_COMPARISONS = {
    "The energy head beside others, trained alike on tokens alone": HEADS,
    "The same heads, trained alike on tokens and then on whole pictures": HEADS_PICTURES,
}
LEAST_ACCURACY = 0.4  # of drawn pictures in their own class among the ten
LEAST_APART = 0.9  # of held-out real pictures' distance to the nearest training picture
VERDICTS = {  # variant → what its difference to the hybrid tells
    "LiteVAE": "LiteVAE alone − hybrid, trained alike",
    "LiteVAE, wider": "as many parameters in wider layers − hybrid, trained alike",
    "fine only": "trained without the coarse branch − hybrid",
    "coarse only": "trained without the fine branch − hybrid",
}


def read(path: Path) -> dict[str, Any] | None:
    """A committed file of evidence; None: there is none.

    Raises:
        UsageError: it cannot be read.
    """
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ci.UsageError(f"{path.name}: not JSON ({error}); git checkout {path.name}") from error


def training_targets(evidence: Mapping[str, Any] | None) -> list[ci.Target]:
    """Whether the hybrid and each branch earn their place: PSNR below the hybrid's without it."""
    targets = []
    for variant, name in VERDICTS.items():
        name = f"{name}: PSNR, upper end of the interval"
        if evidence is None:
            targets.append(ci.skipped(name, "no controlled training on record", "< 0 dB"))
            continue
        row = evidence["variants"][variant]["clean"]["minus_hybrid"]
        status = "PASS" if row["high"] < 0 else "MISSED"
        why = (
            f"mean {row['value']:+.3f} dB, {len(evidence['seeds'])} seeds of "
            f"{evidence['steps']:,} steps"
        )
        targets.append(ci.Target(name, status, row["high"], "< 0 dB", why))
    return targets


def judged_targets(
    evidence: Mapping[str, Any] | None, weights: str, decoder: str
) -> list[ci.Target]:
    """Whether the shipped generator met its bars when it was judged on the validation pictures.

    Args:
        evidence: what ``ear_release`` wrote.
        weights: SHA-256 of the weights that ship.
        decoder: SHA-256 of the decoder that ships for what they draw.
    """
    accuracy = "judged pictures put into their own class"
    apart = "nearest 1 % to a training picture: drawn over held-out real pictures, distance"
    limits = {accuracy: f"≥ {LEAST_ACCURACY}", apart: f"≥ {LEAST_APART}"}
    why = ""
    if evidence is None:
        why = "no judgement on record"
    elif evidence["weights_sha256"] != weights:
        why = "the judgement on record is of other weights"
    elif evidence.get("decoder_sha256") != decoder:
        why = "the judgement on record is of another decoder"
    if why or evidence is None:
        return [ci.skipped(name, why, limit) for name, limit in limits.items()]
    row, ceiling = evidence["class_accuracy"], evidence["ceiling"]["class_accuracy"]["value"]
    near = {k: v["q0.01"] for k, v in evidence["nearest_training_picture"].items()}
    said = (
        f"{evidence['pictures']:,} pictures, 95 % interval {row['low']:.3f} to {row['high']:.3f}; "
        f"real ones through the autoencoder {ceiling:.3f}"
    )
    return [
        ci.at_least(accuracy, row["value"], LEAST_ACCURACY, why=said),
        ci.at_least(apart, near["drawn"] / near["held_out"], LEAST_APART),
    ]


def head_targets(
    evidence: Mapping[str, Any] | None, pictures: Mapping[str, Any] | None, *, quick: bool
) -> list[ci.Target]:
    """Whether the energy head's pictures are nearer to real ones than those of other heads.

    A quick run gives no verdict: these trainings are on record, and it measures none of them.

    Args:
        evidence: heads trained alike on tokens alone.
        pictures: heads trained alike on tokens and then on whole pictures.
        quick: whether this is a quick run.
    """
    others = ("squared-error", "gaussian", "diffusion")
    targets = [_head_target(evidence, kind, "on tokens alone", quick) for kind in others]
    # A squared error's draws of a class are all alike, so their energy score says nothing.
    others = ("gaussian", "diffusion")
    targets += [_head_target(pictures, kind, "on tokens, then pictures", quick) for kind in others]
    return targets


def _head_target(evidence: Mapping[str, Any] | None, kind: str, how: str, quick: bool) -> ci.Target:
    name = f"distance, upper end of the energy head's over {kind} head's lower end, trained alike {how}"
    if quick:
        return ci.skipped(name, "judged in a full run only", "< 1")
    if evidence is None or {"energy", kind} - set(evidence["heads"]):
        return ci.skipped(name, "no controlled training on record", "< 1")
    ours, theirs = (evidence["heads"][k]["distance"] for k in ("energy", kind))
    ratio = ours["high"] / theirs["low"]
    why = (
        f"{ci.interval(ours, 1, sign='')} and {ci.interval(theirs, 1, sign='')}, by release "
        f"{evidence['version']} and its decoder"
    )
    return ci.Target(name, "PASS" if ratio < 1 else "MISSED", ratio, "< 1", why)

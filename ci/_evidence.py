"""Committed evidence that a validation run cannot make again: trainings and trials."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from ci import _common as ci
from parscale_ear import checkpoint
from parscale_ear.autoencoder.files import shipped_weights
from parscale_ear.generator.ear import DEFAULT_DECODER, shipped_generator

FOLDER = ci.EVIDENCE
TRAINING = FOLDER / "hybrid_training.json"  # of parscale_ear.training.comparison
STREAMS = FOLDER / "streams_training.json"  # of parscale-ear train var, RUN/streams.json
EAR_STREAMS = FOLDER / "streams_judged.json"  # of parscale_ear.training.stream_judging
TRIALS = FOLDER / "trials.json"
# Of parscale_ear.training.head_comparison, a file a seed: on tokens alone, and with --picture-minutes.
HEADS, HEADS_PICTURES = "heads.json", "heads_pictures*.json"
JUDGED = FOLDER / "generation_judged.json"  # of parscale_ear.training.ear_release
HEAD_COMPARISONS = {
    "The energy head beside others, trained alike on tokens alone": HEADS,
    "The same heads, trained alike on tokens and then on whole pictures": HEADS_PICTURES,
}
LEVEL = 0.95  # of the interval over seeds
SAME_TIME = 0.02  # part by which trainings of the same time may differ: a last step's length
LEAST_ACCURACY = 0.4  # of drawn pictures in their own class among the ten
LEAST_APART = 0.9  # of held-out real pictures' distance to the nearest training picture
MOST_COPIED = 1.05  # times as often as chance would have it; a generator that copies: 1.21
LEAST_MANY_SIDED = 0.8  # of what real pictures of a class have
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


def head_comparisons(pattern: str) -> list[dict[str, Any]]:
    """Committed comparisons of heads whose files match, in the order of their seeds.

    Raises:
        UsageError: a file cannot be read, two are of other settings or of one seed, or heads were
            not trained for equally long.
    """
    files = [read(path) for path in sorted(FOLDER.glob(pattern))]
    runs = sorted((run for run in files if run is not None), key=lambda run: run["seed"])
    if len({run["seed"] for run in runs}) < len(runs):
        raise ci.UsageError(f"{pattern}: two files are of one seed; keep one of them")
    for key in ("batch", "learning_rate", "picture_draws", "picture_pairs", "pictures", "threads"):
        if len({run.get(key) for run in runs}) > 1:
            raise ci.UsageError(
                f"{pattern}: the files are of different {key}; compare like with like"
            )
    for key in ("minutes", "picture_minutes"):
        lengths = [head.get(key, 0) for run in runs for head in run["heads"].values()]
        if lengths and min(lengths) < (1 - SAME_TIME) * max(lengths):
            raise ci.UsageError(
                f"{pattern}: heads were trained for different {key}; compare like with like"
            )
    return runs


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
            f"{evidence['steps']:,} steps by release {evidence['version']}, SSIM's weight in the loss "
            f"{evidence.get('ssim_weight', 0):g}"
        )
        targets.append(ci.Target(name, status, row["high"], "< 0 dB", why))
    return targets


def foreign(evidence: Mapping[str, Any] | None, weights: str, decoder: str) -> str:
    """Why a judgement is not of these weights and this decoder (SHA-256); empty: it is."""
    if evidence is None:
        return "no judgement on record"
    if evidence["weights_sha256"] != weights:
        return "the judgement on record is of other weights"
    if evidence.get("decoder_sha256") != decoder:
        return "the judgement on record is of another decoder"
    return ""


def shipped_judgement(path: Path | None = None) -> tuple[dict[str, Any] | None, str]:
    """What ``ear_release`` wrote of the shipped generator and decoder, or why there is none.

    Args:
        path: the file; None: the one on record.
    """
    evidence = read(JUDGED if path is None else path)
    files = shipped_generator(), shipped_weights("hybrid", DEFAULT_DECODER)
    why = foreign(evidence, *(checkpoint.load(file)[1]["sha256"] for file in files))
    return (None if why else evidence), why


def judged_targets(
    evidence: Mapping[str, Any] | None, weights: str, decoder: str, *, quick: bool
) -> list[ci.Target]:
    """Whether the shipped generator met its bars when it was judged on the validation pictures.

    Args:
        evidence: what ``ear_release`` wrote.
        weights: SHA-256 of the weights that ship.
        decoder: SHA-256 of the decoder that ships for what they draw.
        quick: whether this is a quick run, which measures none of it and gives no verdict.
    """
    accuracy = "judged pictures put into their own class"
    apart = "nearest 1 % to a training picture: drawn over held-out real pictures, distance"
    other = "nearest other picture of the class: drawn over held-out real pictures, distance"
    dimensions = "effective dimensions of a class: drawn over held-out real pictures"
    copied = "nearest of all real pictures is a training one: share of the drawn over chance's"
    limits = {
        accuracy: f"≥ {LEAST_ACCURACY}",
        apart: f"≥ {LEAST_APART}",
        other: f"≥ {LEAST_MANY_SIDED}",
        dimensions: f"≥ {LEAST_MANY_SIDED}",
        copied: f"≤ {MOST_COPIED}",
    }
    why = "judged in a full run only" if quick else foreign(evidence, weights, decoder)
    if why or evidence is None:
        return [ci.skipped(name, why, limit) for name, limit in limits.items()]
    row, ceiling = evidence["class_accuracy"], evidence["ceiling"]["class_accuracy"]["value"]
    near = {k: v["q0.01"] for k, v in evidence["nearest_training_picture"].items()}
    said = (
        f"{evidence['pictures']:,} pictures, 95 % interval {row['low']:.3f} to {row['high']:.3f}; "
        f"real ones through the autoencoder {ceiling:.3f}"
    )
    alike, sides = evidence["nearest_of_its_class"], evidence["effective_dimensions"]
    nearest = evidence["nearest_is_from_training"]
    ratio = alike["drawn"]["q0.5"] / alike["held_out"]["q0.5"]
    return [
        ci.at_least(accuracy, row["value"], LEAST_ACCURACY, why=said),
        ci.at_least(apart, near["drawn"] / near["held_out"], LEAST_APART),
        ci.at_least(other, ratio, LEAST_MANY_SIDED, why="medians; lower: it repeats itself"),
        ci.at_least(dimensions, sides["drawn"] / sides["held_out"], LEAST_MANY_SIDED),
        ci.at_most(
            copied,
            nearest["value"] / nearest["by_chance"],
            MOST_COPIED,
            why=f"{nearest['value']:.1%}, by chance {nearest['by_chance']:.1%}",
        ),
    ]


def interval_method(evidence: Mapping[str, Any]) -> str:
    """How intervals over pictures were made, for a reader."""
    if evidence.get("intervals") == "jackknife":
        return "jackknife over pictures"
    return (
        "bootstrap over pictures, which in simulations is 0.8 to 2 times as wide as it ought to be"
    )


def head_targets(
    tokens: Sequence[Mapping[str, Any]], pictures: Sequence[Mapping[str, Any]], *, quick: bool
) -> list[ci.Target]:
    """Whether the energy head's pictures are nearer to real ones than those of other heads.

    A quick run gives no verdict: these trainings are on record, and it measures none of them.

    Args:
        tokens: heads trained alike on tokens alone, a comparison a seed.
        pictures: heads trained alike on tokens and then on whole pictures, likewise.
        quick: whether this is a quick run.
    """
    others = ("squared-error", "gaussian", "diffusion")
    targets = [_head_target(tokens, kind, "on tokens alone", quick) for kind in others]
    # A squared error's draws of a class are all alike, so their energy score says nothing.
    others = ("gaussian", "diffusion")
    targets += [_head_target(pictures, kind, "on tokens, then pictures", quick) for kind in others]
    return targets


def _head_target(
    evidence: Sequence[Mapping[str, Any]], kind: str, how: str, quick: bool
) -> ci.Target:
    """Of one seed by the intervals over its pictures; of more by that of their mean difference."""
    name = f"distance, energy head − {kind} head, trained alike {how}: upper end"
    if quick:
        return ci.skipped(name, "judged in a full run only", "< 0")
    both = [run for run in evidence if {"energy", kind} <= set(run["heads"])]
    if not both:
        return ci.skipped(name, "no controlled training on record", "< 0")
    pairs = [[run["heads"][k]["distance"] for k in ("energy", kind)] for run in both]
    if len(pairs) == 1:
        ((ours, theirs),) = pairs
        high = ours["high"] - theirs["low"]
        why = (
            f"one seed: {ci.interval(ours, 1, sign='')} and {ci.interval(theirs, 1, sign='')}, "
            "intervals over pictures only (trainings differ by more than that); the value is the upper end of "
            f"ours less the lower end of theirs; by release {both[0]['version']} and its decoder"
        )
    else:
        found = head_difference(evidence, kind)
        assert found is not None
        high = found["high"]
        each = ", ".join(f"{a['value']:.1f} and {b['value']:.1f}" for a, b in pairs)
        why = f"{ci.interval(found, 1)} over {len(pairs)} seeds: {each}"
    return ci.Target(name, "PASS" if high < 0 else "MISSED", high, "< 0", why)


def head_difference(evidence: Sequence[Mapping[str, Any]], kind: str) -> dict[str, float] | None:
    """Mean over seeds of the energy head's distance less another's, with Student's interval.

    The two heads of a seed have the same trunk at first, the same latents and the same decoder.
    None: fewer than two seeds have both.
    """
    found = np.array(
        [
            run["heads"]["energy"]["distance"]["value"] - run["heads"][kind]["distance"]["value"]
            for run in evidence
            if {"energy", kind} <= set(run["heads"])
        ]
    )
    if len(found) < 2:
        return None
    mean, error = found.mean(), found.std(ddof=1) / len(found) ** 0.5
    half = student.ppf((1 + LEVEL) / 2, len(found) - 1) * error
    return {"value": float(mean), "low": float(mean - half), "high": float(mean + half)}

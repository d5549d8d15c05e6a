"""Tables of drawn pictures, for the terminal, the report and docs/figures.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ci import _common as ci
from ci import _evidence
from ci._markdown import told

HEAD = ("", "drawn", "real, through the autoencoder")
CLASS_HEAD = ("class", "put into it")
NEIGHBOUR_HEAD = ("judge's distance to the nearest", "drawn", "held-out real pictures")
NEIGHBOUR_NOTE = (
    "Real pictures, and the training pictures (mirrored ones too), as the autoencoder restores "
    "them. A generator that copies its training pictures would be far nearer to them than held-out "
    "real pictures are; one that repeats itself would be nearer to its own. How often a training picture is "
    "the nearest is counted without mirrored ones."
)


def judged_note(judged: Mapping[str, Any]) -> str:
    """Who judged, what was chosen how, and where it was measured."""
    plain = next(
        row["accuracy"]
        for row in judged["tried_on_training"]
        if (row["guidance"], row["temperature"]) == (0, 1)
    )
    return (
        "Judged by EfficientNet-Lite1, which takes no part in any training here (a larger sibling of Lite0, "
        "which does, trained on the same classes: not an unrelated judge); the class is the "
        "likeliest of the ten. Guidance and temperature are those of the least distance to the training "
        "pictures, by the same judge. Without guidance, at temperature 1, "
        f"{plain:.1%} of the pictures were put into their own class. What was tried on the way to "
        "this recipe was compared on the validation pictures by other networks, trials of "
        "its last three parts, and decoders, by this one (docs/experiments.md). The distance of real "
        "pictures is that of training pictures that the autoencoder restored, whose sharp decoder "
        "was trained on them, too; as many as were drawn: it falls with their number, so only "
        f"distances of equally many compare. The drawn pictures' interval: "
        f"{_evidence.interval_method(judged)}, those drawn alone; those of shares are Wilson's. Data: "
        f"{', '.join(judged['data'])}. On record: {told(judged)}."
    )


def class_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Accuracy a class."""
    return [(name, f"{value:.0%}") for name, value in figures["class_accuracy_by_class"].items()]


def rows(figures: Mapping[str, Any], ceiling: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Drawn pictures beside real ones; ``figures`` of a run or of the judged evidence."""
    count = figures["pictures"]
    distance = figures["distance"]
    few = ceiling["distance_of_few"].get(str(count))
    real = (
        f"{few:.1f} ({count:,})"
        if few is not None
        else f"{ceiling['distance']:.1f} ({ceiling['distance_pictures']:,})"
    )
    said = ci.interval(distance, 1, sign="") if isinstance(distance, Mapping) else f"{distance:.1f}"
    dimensions = figures.get("effective_dimensions")  # where it was judged
    return [
        (
            "put into their own class of ten (chance 10 %)",
            _share(figures["class_accuracy"]),
            _share(ceiling["class_accuracy"]),
        ),
        ("distance to the validation pictures", f"{said} ({count:,})", real),
        (
            "mean distance of two pictures of a class",
            f"{figures['diversity']:.2f}",
            f"{ceiling['diversity']:.2f}",
        ),
        *(
            [
                (
                    f"effective dimensions of a class (of {dimensions['pictures']:,} pictures)",
                    f"{dimensions['drawn']:.1f}",
                    f"{dimensions['held_out']:.1f}",
                )
            ]
            if dimensions
            else []
        ),
    ]


def neighbour_rows(judged: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """How near the nearest training picture and the nearest other one of a class are."""
    names = {"q0.01": "nearest 1 %", "q0.25": "first quarter", "q0.5": "median"}
    kinds = {
        "nearest_training_picture": "training picture",
        "nearest_of_its_class": f"other of its kind and class (of {judged['nearest_of_its_class']['pictures']:,})",
    }
    rows = [
        (
            f"{kind}: {name}",
            f"{judged[part]['drawn'][key]:.2f}",
            f"{judged[part]['held_out'][key]:.2f}",
        )
        for part, kind in kinds.items()
        for key, name in names.items()
    ]
    if nearest := judged.get("nearest_is_from_training"):
        by_chance = f"{nearest['by_chance']:.1%} of these pictures are"
        rows.append(("nearest of all real pictures is a training one", _share(nearest), by_chance))
    return rows


HEADS_HEAD = (
    *("head", "seed", "distance", "in their class", "diversity", "steps on tokens", "on pictures"),
    "head parameters",
)


def head_rows(evidence: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Heads of the controlled trainings, seed by seed."""
    return [
        (
            kind,
            f"{run['seed']}",
            ci.interval(row["distance"], 1, sign=""),
            _share(row["class_accuracy"]),
            f"{row['diversity']:.2f}",
            f"{row['steps']:,}",
            f"{row.get('picture_steps', 0):,}",
            f"{row['parameters']['head']:,}",
        )
        for run in evidence
        for kind, row in run["heads"].items()
    ]


def head_text(evidence: Sequence[Mapping[str, Any]]) -> str:
    """How the heads were compared, and the energy head's differences over seeds."""
    first = evidence[0]
    row = next(iter(first["heads"].values()))
    length = f"tokens alone, {row['minutes']:.0f} minutes"
    if row.get("picture_minutes"):
        length = (
            f"{row['minutes']:.0f} minutes on tokens and {row['picture_minutes']:.0f} on whole "
            f"pictures drawn with their gradient ({first['picture_draws']} drawn freely and "
            f"{first['picture_pairs']} pairs that go on from real beginnings a step; "
            "their energy scores beside the head's own loss of tokens, no critic and no classifier; "
            "the scores look through EfficientNet-Lite0, which was trained on ImageNet)"
        )
    differences = [
        f"Energy head − {kind} head: {ci.interval(found, 1)} (mean and Student's interval over seeds). "
        for kind in ("squared-error", "gaussian", "diffusion")
        if (found := _evidence.head_difference(evidence, kind)) is not None
    ]
    weighing = ""
    if "diffusion" in first["heads"] and not row.get("picture_minutes") and _before_018(first):
        weighing = (
            "The diffusion head has one error for the three bands of a token, and this release counted it "
            "once: its first token, of one band, weighed 1/22 of the loss instead of 1/64. "
        )
    each = "; ".join(
        f"seed {run['seed']}: "
        + ", ".join(f"{kind} {_curve(row)}" for kind, row in run["heads"].items())
        for run in evidence
    )
    origins = "; ".join(f"seed {run['seed']}: {told(run)}" for run in evidence)
    return (
        f"The same trunk from the same fresh weights, {length} each, batches of {first['batch']}; guidance and temperature chosen for "
        f"each on the training pictures; {first['pictures']:,} pictures through the sharp decoder of "
        f"the release named, {first['distance_name']} to the validation pictures, its interval by "
        f"{_evidence.interval_method(first)}, those of shares are Wilson's. One learning rate for all. "
        f"{weighing}{''.join(differences)}Own loss on the validation "
        f"latents after so many minutes on tokens: {each}. On record, {origins}; judged in float32."
    )


def _before_018(run: Mapping[str, Any]) -> bool:
    return tuple(map(int, run["version"].split(".")[:2])) < (0, 18)


def _curve(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{value:.3f} ({minutes:.0f})" for minutes, value in row["validation"])


def _share(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"


def generation_notes(figures: Mapping[str, Any]) -> list[str]:
    """What else a run found, a line each."""
    heads, settings = figures["heads"], figures["settings"]
    parameters = figures["parameters"]
    return [
        f"EnergyAR, {parameters['total']:,} parameters ({parameters['head']:,} in the head), "
        f"{figures['side']}×{figures['side']}, guidance {settings['guidance']:g}, temperature "
        f"{settings['temperature']:g}: {figures['passes']} passes a picture, "
        f"{1000 * figures['picture_s']:.1f} ms a picture in batches of {figures['batch_size']}, "
        f"{1000 * figures['single_picture_s']:.0f} ms alone (median of "
        f"{figures['single_picture_calls']} calls).",
        f"A token costs {1e6 * heads['energy_token_s']:.1f} µs in the energy head and "
        f"{1e6 * heads['diffusion_token_s']:.1f} µs in a diffusion head of the same width in "
        f"{heads['diffusion_steps']} steps ({ci.number(heads['diffusion_token_s'] / heads['energy_token_s'])} times as much), "
        f"timed in turn over {heads['rounds']} rounds of {heads['tokens']} tokens.",
    ]

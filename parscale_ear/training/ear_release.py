r"""Turns a finished EnergyAR into weights to ship: FP16, its settings chosen, judged on real pictures.

    python -m parscale_ear.training.ear_release RUN/pictures.safetensors \\
        --training TRAIN_DIR_OR_TAR --validation VAL_DIR_OR_TAR --evidence FOLDER

Guidance and temperature are those of the least Fréchet distance to the training pictures, as the
autoencoder restores them. The same judge, which took no part in training, then judges
that one setting, on other draws and on the validation pictures. What the pictures of the
validation set are to that judge is written as statistics, so that distances can be measured where
no pictures are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parscale_ear import checkpoint
from parscale_ear.autoencoder.files import shipped_weights
from parscale_ear.data.images import grid, save_png
from parscale_ear.generator.ear import DEFAULT_DECODER, SHIPPED_FILE, EnergyAR
from parscale_ear.metrics.frechet import Gaussian
from parscale_ear.metrics.generation import (
    STATISTICS_FILE,
    FeatureStatistics,
    class_diversity,
    effective_dimensions,
    nearest,
    nearest_other,
    quantiles,
    share,
)
from parscale_ear.places import check_folder
from parscale_ear.profiling.origin import origin
from parscale_ear.training.judging import (
    IMAGENET,
    INTERVALS,
    JUDGED_SEED,
    NO_REFINED,
    Drawn,
    Judge,
    Real,
    choose,
    distance_interval,
    evenly,
    judge_drawn,
    load_real,
    save_classes,
)
from parscale_ear.training.marks import between_marks
from parscale_ear.training.program import FAILED, add_pictures, attempt, new_parser

FEW = (64, 256)  # real pictures, whose distance tells how far so few must seem to be
SHOWN = 3  # pictures of a class beside their nearest training pictures
EVIDENCE_FILE = "generation_judged.json"
NEIGHBOURS_FILE = "neighbours.png"
CARD = "ear.md"
BEGIN, END = "<!-- figures: written by parscale_ear.training.ear_release -->", "<!-- /figures -->"


def judge_model(
    model: EnergyAR, judge: Judge, training: Real, validation: Real, settings: Mapping[str, float]
) -> tuple[dict[str, Any], Gaussian, Drawn, Tensor]:
    """Figures of one setting on the validation pictures.

    Returns:
        The figures; what the validation pictures are to the judge; the drawn pictures; and which
        training picture is the nearest to each, as they are or, from N on, mirrored.
    """
    drawn = judge_drawn(model, judge, settings, "pictures to judge")
    originals = judge.look(validation.pictures, "validation, as they are")
    law, restored = Gaussian.fit(originals.numpy()), validation.restored
    known = torch.cat([part for part in (training.restored, training.mirrored) if part is not None])
    apart, which = nearest(drawn.features, known)
    held_out, _ = nearest(restored, known)
    # Of all real pictures together: one that copies nothing is as often nearest to a training picture
    # as there are more of these.
    _, of_all = nearest(drawn.features, torch.cat((training.restored, restored)))
    from_training = of_all < len(training.restored)
    each = min(int(labels.bincount().min()) for labels in (drawn.labels, validation.labels))
    per_class = [
        float(drawn.hits[drawn.labels == k].float().mean()) for k in range(len(judge.classes))
    ]
    figures = {
        "pictures": len(drawn.labels),
        "seed": JUDGED_SEED,
        "settings": dict(settings),
        **drawn.figures(),
        "class_accuracy_by_class": dict(zip(model.config.class_names, per_class, strict=True)),
        "distance": distance_interval(drawn.features, law).as_dict(),
        "ceiling": ceiling_figures(judge, training, validation, originals, law, len(drawn.labels)),
        "nearest_training_picture": {"drawn": quantiles(apart), "held_out": quantiles(held_out)},
        "nearest_is_from_training": {
            **share(from_training).as_dict(),
            "by_chance": len(training.restored) / (len(training.restored) + len(restored)),
        },
        "nearest_of_its_class": {
            "pictures": each,
            "drawn": quantiles(nearest_other(drawn.features, drawn.labels, each)),
            "held_out": quantiles(nearest_other(restored, validation.labels, each)),
        },
        "effective_dimensions": {
            "pictures": each,
            "drawn": effective_dimensions(drawn.features, drawn.labels, each),
            "held_out": effective_dimensions(restored, validation.labels, each),
        },
    }
    return figures, law, drawn, which


def ceiling_figures(
    judge: Judge, training: Real, validation: Real, originals: Tensor, law: Gaussian, count: int
) -> dict[str, Any]:
    """What real pictures would reach that went through the autoencoder.

    Distances are those of training pictures, as many as are drawn: other pictures than those that
    the distance is to, as drawn ones are.
    """

    def distance(of: int) -> float:
        return Gaussian.fit(training.restored[evenly(training.labels, of)].numpy()).distance(law)

    restored = validation.restored
    return {
        "pictures": len(validation.labels),
        "class_accuracy": share(judge.hits(restored, validation.labels)).as_dict(),
        "class_accuracy_originals": share(judge.hits(originals, validation.labels)).as_dict(),
        "distance": distance(count),
        "distance_pictures": len(evenly(training.labels, count)),
        "distance_of_few": {str(few): distance(few) for few in FEW},
        "distance_of_the_same_pictures": Gaussian.fit(restored.numpy()).distance(law),
        "diversity": class_diversity(restored, validation.labels),
    }


def release(
    weights: Path,
    training_paths: Sequence[str],
    validation_paths: Sequence[str],
    out: Path,
    evidence: Path,
) -> dict[str, Any]:
    """Writes weights and statistics to ``out``, figures and pictures to ``evidence``.

    Args:
        weights: an EnergyAR of Imagenette's classes.
        training_paths: the pictures that it was trained on.
        validation_paths: others.
        out: folder for the weights.
        evidence: folder for ``generation_judged.json``, and for the pictures beside their nearest
            training pictures, which must not be published where those may not be.

    Raises:
        CheckpointError: the weights are missing, damaged or foreign.
        ImageError: no pictures, or of other classes.
        FeatureError: Lite1's packages are missing.
        UsageError: nothing can be written to ``out`` or ``evidence``.
        ValueError: the generator has other classes than ten or was trained on refined latents, or the
            card lacks its marks.
    """
    header = checkpoint.load(weights, kind="EnergyAR")[1]
    if (header.get("training") or {}).get("latent_refinements"):
        raise ValueError(f"{weights}: {NO_REFINED}")
    for folder in (out, evidence):
        check_folder(folder)
    decoder = _decoder_digest()
    card = (out / CARD).read_text(encoding="utf-8")
    with_figures(card, None)  # fails now rather than at the end
    model = EnergyAR.from_pretrained(weights)
    model.transformer.half().float()
    model.head.half().float()
    judge = Judge()
    validation = load_real(validation_paths, model, judge, "validation")
    least = validation.restored.shape[1] + 1
    if len(validation.labels) < least:
        raise ValueError(
            f"statistics of {least - 1} features need at least {least} validation pictures, got "
            f"{len(validation.labels)}"
        )
    counts = validation.labels.bincount(minlength=len(judge.classes))
    if int(counts.min()) < 2:
        few = model.config.class_names[int(counts.argmin())]
        raise ValueError(f"at least two validation pictures of every class are needed: {few}")
    training = load_real(training_paths, model, judge, "training", mirrored=True)
    settings, tried = choose(model, judge, training)
    figures, law, drawn, which = judge_model(model, judge, training, validation, settings)
    facts = {
        "data": [Path(path).name for path in validation_paths],
        "pictures": len(validation.labels),
        "side": model.config.image_side,
        "ceiling": figures["ceiling"],
        "decoder_sha256": decoder,  # through which the ceiling is
    }
    if decoder != _decoder_digest():
        raise ValueError("the shipped decoder changed while pictures were judged; begin anew")
    statistics = FeatureStatistics(law, judge.network.name, judge.classes, facts)
    measured = origin(torch.device("cpu"), "float32")
    report: dict[str, Any] = {
        "judge": judge.network.name,
        "distance_name": judge.network.distance,
        "data": facts["data"],
        "decoder": DEFAULT_DECODER,
        **measured,
        **figures,
        "intervals": INTERVALS,
        "tried_on_training": tried,
        "latent_fingerprint": model.latent_fingerprint,
    }
    _show(drawn.pictures, training, which, evidence)
    model.recommended = settings
    model.save_pretrained(
        out / SHIPPED_FILE,
        dtype=torch.float16,
        training=header.get("training"),
        judged={**measured, **figures},
    )
    statistics.save(out / STATISTICS_FILE)
    checkpoint.write_text(out / CARD, with_figures(card, report))
    report["statistics_error"] = FeatureStatistics.load(out / STATISTICS_FILE).law.distance(law)
    report["weights_sha256"] = checkpoint.load(out / SHIPPED_FILE)[1]["sha256"]
    report["decoder_sha256"] = decoder
    checkpoint.write_text(evidence / EVIDENCE_FILE, json.dumps(report, indent=1) + "\n")
    return report


def _decoder_digest() -> str:
    """Of the decoder that ships for what is drawn."""
    return str(checkpoint.load(shipped_weights("hybrid", DEFAULT_DECODER))[1]["sha256"])


def with_figures(card: str, report: Mapping[str, Any] | None) -> str:
    """The card's text with its figures replaced.

    Raises:
        ValueError: the card lacks its marks.
    """
    lines = []
    if report is not None:
        ceiling, settings = report["ceiling"], report["settings"]
        distance, apart = report["distance"], report["nearest_of_its_class"]
        dimensions = report["effective_dimensions"]
        lines = [
            f"| {report['pictures']:,} pictures against {ceiling['pictures']:,} of "
            f"{', '.join(report['data'])} | drawn | real, through the autoencoder |",
            "|---|---|---|",
            f"| put into their own class of ten | {report['class_accuracy']['value']:.1%} "
            f"| {ceiling['class_accuracy']['value']:.1%} |",
            f"| {report['distance_name']}, interval over the drawn pictures | {distance['value']:.1f} [{distance['low']:.1f}, "
            f"{distance['high']:.1f}] | {ceiling['distance']:.1f} |",
            f"| mean distance of two pictures of a class | {report['diversity']:.2f} "
            f"| {ceiling['diversity']:.2f} |",
            f"| distance to the nearest other of its class (of {apart['pictures']}), median "
            f"| {apart['drawn']['q0.5']:.2f} | {apart['held_out']['q0.5']:.2f} |",
            f"| effective dimensions of a class (of {dimensions['pictures']}) "
            f"| {dimensions['drawn']:.1f} "
            f"| {dimensions['held_out']:.1f} |",
            "",
            f"Guidance {settings['guidance']:g}, temperature {settings['temperature']:g}, "
            f"{report['decoder']} decoder, {report['dtype']}, weights rounded to FP16, torch "
            f"{report['torch']}; measured on {report['device']}, {report['threads']} threads, by release "
            f"{report['version']}, {report['date'][:10]}.",
        ]
    return between_marks(card, BEGIN, END, "\n".join(lines), "the model card")


def _show(pictures: Tensor, training: Real, which: Tensor, folder: Path) -> None:
    """A row a class: drawn pictures, each beside its nearest training picture."""
    classes, known = len(IMAGENET), len(training.pictures)
    rows = []
    for label in range(classes):
        row = []
        for number in range(label, SHOWN * classes, classes):
            nearest_one = int(which[number])
            neighbour = training.pictures[nearest_one % known]
            row += [pictures[number], neighbour.flip(-1) if nearest_one >= known else neighbour]
        rows.append(row)
    save_png(grid(rows), folder / NEIGHBOURS_FILE)
    save_classes(pictures, classes, folder / "drawn.png", 10)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = new_parser(__doc__)
    parser.add_argument("weights", type=Path, help="RUN/pictures.safetensors")
    add_pictures(parser, "--training", "--validation")
    parser.add_argument("--out", type=Path, default=Path("parscale_ear/weights"))
    parser.add_argument("--evidence", type=Path, required=True, help="folder for the figures")
    arguments = parser.parse_args(argv)
    report = attempt(
        "ear_release",
        lambda: release(
            arguments.weights,
            arguments.training,
            arguments.validation,
            arguments.out,
            arguments.evidence,
        ),
    )
    if report is None:
        return FAILED
    print(json.dumps({k: report[k] for k in ("settings", "class_accuracy", "distance", "ceiling")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

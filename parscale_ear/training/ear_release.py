r"""Turns a finished EnergyAR into weights to ship: FP16, its settings chosen, judged on real pictures.

    python -m parscale_ear.training.ear_release RUN/pictures.safetensors \\
        --training TRAIN_DIR_OR_TAR --validation VAL_DIR_OR_TAR --evidence FOLDER

Guidance and temperature are chosen on the training pictures, as the autoencoder restores them: of
all settings whose Fréchet distance to them is within ``NEAR`` of the least, the one whose pictures are put into their classes most
often. The validation pictures then judge that one setting once, by an extractor that took no part
in training. What the pictures of the validation set are to that judge is written as statistics, so
that distances can be measured where no pictures are.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from parscale_ear import __version__, checkpoint
from parscale_ear.data.images import (
    ImageError,
    find_images,
    from_uint8,
    grid,
    load_squares,
    save_png,
    to_uint8,
)
from parscale_ear.generator.ear import DEFAULT_DECODER, SHIPPED_FILE, EnergyAR
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.metrics.features import EfficientNetLite
from parscale_ear.metrics.frechet import Gaussian, clustered_bootstrap
from parscale_ear.metrics.generation import (
    STATISTICS_FILE,
    FeatureStatistics,
    class_diversity,
    class_hits,
    nearest,
    quantiles,
    share,
)
from parscale_ear.training.marks import between_marks
from parscale_ear.training.program import FAILED, add_pictures, attempt, new_parser

GUIDANCE = (0.0, 1.0, 2.0, 3.0, 4.0)
TEMPERATURES = (1.0, 0.9, 0.8)
NEAR = 1.1  # times the least distance
TRIED, JUDGED = 500, 2000  # pictures of every setting, and of the chosen one
TRIED_SEED, JUDGED_SEED = 1, 2
BATCH = 50
REPEATS = 50  # of the bootstrap
FEW = (64, 256)  # real pictures, whose distance tells how far so few must seem to be
SHOWN = 3  # pictures of a class beside their nearest training pictures
EVIDENCE_FILE = "generation_judged.json"
NEIGHBOURS_FILE = "neighbours.png"
CARD = "ear.md"
BEGIN, END = "<!-- figures: written by parscale_ear.training.ear_release -->", "<!-- /figures -->"
# Imagenette's classes by folder name, and their numbers among ImageNet's.
IMAGENET = {
    "n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497,
    "n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701,
}  # fmt: skip


@dataclass(frozen=True)
class Real:
    """Real pictures, and what the judge sees of them once the autoencoder has restored them."""

    pictures: Tensor  # (N, 3, H, W), 8-bit, as they are
    labels: Tensor  # (N,)
    restored: Tensor  # (N, D), features


class Judge:
    """EfficientNet-Lite1, which takes no part in any training here."""

    def __init__(self, classes: Sequence[int], device: torch.device | str = "cpu") -> None:
        """Loads Lite1.

        Args:
            classes: of ImageNet, in the order of the labels.
            device: where it looks.

        Raises:
            FeatureError: its packages are missing.
        """
        self.network, self.classes = EfficientNetLite(1, device), tuple(classes)

    def look(self, pictures: Tensor, name: str = "") -> Tensor:
        """(N, 3, H, W), 8-bit → (N, D)."""
        with tqdm(total=len(pictures), desc=name, leave=False, disable=not name) as bar:
            parts = []
            for batch in pictures.split(BATCH):
                parts.append(self.network(batch))
                bar.update(len(batch))
        return torch.cat(parts)

    def hits(self, features: Tensor, labels: Tensor) -> Tensor:
        """Whether each is put into its own class: (N,), bool."""
        return class_hits(self.network.logits(features), labels, self.classes)


def load_real(paths: Sequence[str], model: EnergyAR, judge: Judge, name: str) -> Real:
    """Reads labelled pictures, restores them by the generator's autoencoder and looks at those.

    Raises:
        ImageError: there are none, or some have no class folder of Imagenette.
    """
    refs = find_images(paths)
    folders = sorted({ref.label for ref in refs})
    if unknown := [folder for folder in folders if folder not in IMAGENET]:
        raise ImageError(f"{name}: {unknown[0]!r} is not a class folder of Imagenette")
    numbers = {folder: k for k, folder in enumerate(sorted(IMAGENET))}
    pictures = load_squares(refs, model.config.image_side)
    labels = torch.tensor([numbers[ref.label] for ref in refs])
    return Real(pictures, labels, judge.look(restore(model, pictures), name))


@torch.no_grad()
def restore(model: EnergyAR, pictures: Tensor) -> Tensor:
    """What the autoencoder makes of real pictures, with the generator's decoder: 8-bit."""
    parts = []
    for batch in pictures.split(BATCH):
        latents = model.autoencoder.encode(from_uint8(batch)).mode()
        parts.append(to_uint8(model.decode(latents)))
    return torch.cat(parts)


def draw(
    model: EnergyAR, count: int, seed: int, settings: Mapping[str, float], name: str = "",
    streams: ParallelStreams | None = None,
) -> Tensor:  # fmt: skip
    """(count, 3, H, W), 8-bit; the classes in turn; one picture from all streams."""
    classes = len(model.config.class_names)
    device = model.transformer.positions.device
    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    with tqdm(total=count, desc=name, leave=False, disable=not name) as bar:
        for batch in (torch.arange(count) % classes).split(BATCH):
            images = model.generate(
                batch,
                guidance=settings["guidance"],
                temperature=settings["temperature"],
                generator=generator,
                streams=streams,
                mode="diverse" if streams is None else "aggregate",
            )
            parts.append(to_uint8(images).cpu())
            bar.update(len(batch))
    return torch.cat(parts)


def save_classes(pictures: Tensor, classes: int, path: Path, shown: int = 8) -> None:
    """Writes the first pictures of :func:`draw` as a grid: a class a row, ``shown`` of each."""
    save_png(grid([list(pictures[k : shown * classes : classes]) for k in range(classes)]), path)


def choose(
    model: EnergyAR, judge: Judge, training: Real, near: float = NEAR
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Guidance and temperature by the training pictures, and all that were tried.

    Args:
        model: the generator.
        judge: of distance and classes.
        training: the pictures it was trained on.
        near: how many times the least distance is allowed for better classes.
    """
    law = Gaussian.fit(training.restored.numpy())
    labels = torch.arange(TRIED) % len(judge.classes)
    tried = []
    settings = list(itertools.product(GUIDANCE, TEMPERATURES))
    for guidance, temperature in tqdm(settings, desc="settings"):
        setting = {"guidance": guidance, "temperature": temperature}
        pictures = draw(model, TRIED, TRIED_SEED, setting)
        features = judge.look(pictures)
        tried.append(
            {
                **setting,
                "distance": Gaussian.fit(features.numpy()).distance(law),
                "accuracy": float(judge.hits(features, labels).float().mean()),
            }
        )
    limit = near * min(row["distance"] for row in tried)
    best = max((row for row in tried if row["distance"] <= limit), key=lambda row: row["accuracy"])
    return {key: best[key] for key in ("guidance", "temperature")}, tried


def judge_model(
    model: EnergyAR, judge: Judge, training: Real, validation: Real, settings: dict[str, float]
) -> tuple[dict[str, Any], Gaussian, Tensor, Tensor]:
    """Figures of one setting on the validation pictures.

    Returns:
        The figures; what the validation pictures are to the judge; the drawn pictures; and which
        training picture is the nearest to each.
    """
    pictures = draw(model, JUDGED, JUDGED_SEED, settings, "pictures to judge")
    labels = torch.arange(JUDGED) % len(judge.classes)
    features = judge.look(pictures, "judging")
    hits = judge.hits(features, labels)
    originals = judge.look(validation.pictures, "validation, as they are")
    law, seen, ceiling = Gaussian.fit(originals.numpy()), features.numpy(), validation.restored
    distance = clustered_bootstrap(
        lambda rows: [Gaussian.fit(seen[rows]).distance(law)], range(len(seen)), repeats=REPEATS
    )[0]
    apart, which = nearest(features, training.restored)
    held_out, _ = nearest(ceiling, training.restored)
    drawn_pairs, _ = nearest(features[::2], features[1::2])
    real_pairs, _ = nearest(ceiling[::2], ceiling[1::2])
    shuffled = torch.randperm(len(ceiling), generator=torch.Generator().manual_seed(JUDGED_SEED))
    per_class = [float(hits[labels == k].float().mean()) for k in range(len(judge.classes))]
    figures = {
        "pictures": JUDGED,
        "seed": JUDGED_SEED,
        "settings": settings,
        "class_accuracy": share(hits).as_dict(),
        "class_accuracy_by_class": dict(zip(model.config.class_names, per_class, strict=True)),
        "distance": distance.as_dict(),
        "ceiling": {
            "pictures": len(validation.labels),
            "class_accuracy": share(judge.hits(ceiling, validation.labels)).as_dict(),
            "class_accuracy_originals": share(judge.hits(originals, validation.labels)).as_dict(),
            "distance": Gaussian.fit(ceiling.numpy()).distance(law),
            "distance_of_few": {
                str(few): Gaussian.fit(ceiling[shuffled[:few]].numpy()).distance(law) for few in FEW
            },
            "diversity": class_diversity(ceiling, validation.labels),
        },
        "diversity": class_diversity(features, labels),
        "nearest_training_picture": {
            "drawn": quantiles(apart),
            "held_out": quantiles(held_out),
        },
        "nearest_of_its_kind": {"drawn": quantiles(drawn_pairs), "real": quantiles(real_pairs)},
    }
    return figures, law, pictures, which


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
        ValueError: the generator has other classes than ten, or the card lacks its marks.
    """
    header = checkpoint.load(weights, kind="EnergyAR")[1]
    card = (out / CARD).read_text(encoding="utf-8")
    with_figures(card, None)  # fails now rather than at the end
    model = EnergyAR.from_pretrained(weights)
    if len(model.config.class_names) != len(IMAGENET):
        raise ValueError(f"{weights}: a generator of Imagenette's ten classes is needed")
    model.transformer.half().float()
    model.head.half().float()
    judge = Judge([IMAGENET[folder] for folder in sorted(IMAGENET)])
    training = load_real(training_paths, model, judge, "training")
    validation = load_real(validation_paths, model, judge, "validation")
    settings, tried = choose(model, judge, training)
    figures, law, pictures, which = judge_model(model, judge, training, validation, settings)
    facts = {
        "data": [Path(path).name for path in validation_paths],
        "pictures": len(validation.labels),
        "side": model.config.image_side,
        "ceiling": figures["ceiling"],
    }
    statistics = FeatureStatistics(law, judge.network.name, judge.classes, facts)
    statistics.save(out / STATISTICS_FILE)
    report = {
        "judge": judge.network.name,
        "distance_name": judge.network.distance,
        "data": facts["data"],
        "decoder": DEFAULT_DECODER,
        "dtype": "float32",
        "version": __version__,
        "torch": torch.__version__,
        **figures,
        "tried_on_training": tried,
        "statistics_error": FeatureStatistics.load(out / STATISTICS_FILE).law.distance(law),
        "latent_fingerprint": model.latent_fingerprint,
    }
    model.recommended = settings
    model.save_pretrained(
        out / SHIPPED_FILE, dtype=torch.float16, training=header.get("training"), judged=figures
    )
    report["weights_sha256"] = checkpoint.load(out / SHIPPED_FILE)[1]["sha256"]
    checkpoint.write_text(evidence / EVIDENCE_FILE, json.dumps(report, indent=1) + "\n")
    checkpoint.write_text(out / CARD, with_figures(card, report))
    _show(pictures, training.pictures[which], len(judge.classes), evidence)
    return report


def with_figures(card: str, report: Mapping[str, Any] | None) -> str:
    """The card's text with its figures replaced.

    Raises:
        ValueError: the card lacks its marks.
    """
    lines = []
    if report is not None:
        ceiling, settings = report["ceiling"], report["settings"]
        distance = report["distance"]
        lines = [
            f"| {report['pictures']:,} pictures against {ceiling['pictures']:,} of "
            f"{', '.join(report['data'])} | drawn | real, through the autoencoder |",
            "|---|---|---|",
            f"| put into their own class of ten | {report['class_accuracy']['value']:.1%} "
            f"| {ceiling['class_accuracy']['value']:.1%} |",
            f"| {report['distance_name']} | {distance['value']:.1f} [{distance['low']:.1f}, "
            f"{distance['high']:.1f}] | {ceiling['distance']:.1f} |",
            f"| mean distance of two pictures of a class | {report['diversity']:.2f} "
            f"| {ceiling['diversity']:.2f} |",
            "",
            f"Guidance {settings['guidance']:g}, temperature {settings['temperature']:g}, "
            f"{report['decoder']} decoder, {report['dtype']}, weights rounded to FP16, torch "
            f"{report['torch']}.",
        ]
    return between_marks(card, BEGIN, END, "\n".join(lines), "the model card")


def _show(pictures: Tensor, neighbours: Tensor, classes: int, folder: Path) -> None:
    """A row a class: drawn pictures, each beside its nearest training picture."""
    rows = []
    for label in range(classes):
        numbers = [label + classes * k for k in range(SHOWN)]
        rows.append([part[n] for n in numbers for part in (pictures, neighbours)])
    save_png(grid(rows), folder / NEIGHBOURS_FILE)
    drawn = [[pictures[label + classes * k] for k in range(10)] for label in range(classes)]
    save_png(grid(drawn), folder / "drawn.png")


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

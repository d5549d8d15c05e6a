"""Judging drawn pictures of Imagenette's classes by a network that takes no part in any training.

Shapes: N pictures, D features, C classes, S side.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from parscale_ear.data.images import (
    ImageError,
    find_images,
    from_uint8,
    grid,
    save_png,
    to_uint8,
)
from parscale_ear.generator.ear import EnergyAR
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.metrics.features import EfficientNetLite
from parscale_ear.metrics.frechet import Gaussian, Interval, clustered_jackknife
from parscale_ear.metrics.generation import class_diversity, class_hits, share
from parscale_ear.training.folder import load_labelled

GUIDANCE = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
TEMPERATURES = (1.0, 0.9, 0.8)
TRIED, JUDGED = 500, 2000  # pictures of every setting, and of the chosen one
TRIED_SEED, JUDGED_SEED = 1, 2
BATCH = 50
NO_REFINED = (
    "trained on refined latents, and real pictures are judged as they are restored without that; "
    "train on latents that were not refined"
)
INTERVALS = "jackknife"  # how intervals of distances are made, for a report
# Imagenette's classes by folder name, and their numbers among ImageNet's.
IMAGENET = {
    "n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497,
    "n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701,
}  # fmt: skip


@dataclass(frozen=True)
class Real:
    """Real pictures, and what the judge sees of them once the autoencoder has restored them."""

    pictures: Tensor  # (N, 3, S, S), 8-bit, as they are
    labels: Tensor  # (N,)
    restored: Tensor  # (N, D), features
    mirrored: Tensor | None = None  # (N, D), features of their mirror images


@dataclass(frozen=True)
class Drawn:
    """Drawn pictures, and what the judge says of them."""

    pictures: Tensor  # (N, 3, S, S), 8-bit
    labels: Tensor  # (N,), the classes in turn
    features: Tensor  # (N, D)
    hits: Tensor  # (N,), whether each is put into its own class

    def figures(self) -> dict[str, Any]:
        """Class accuracy with its interval, and mean distance of two pictures of a class."""
        return {
            "class_accuracy": share(self.hits).as_dict(),
            "diversity": class_diversity(self.features, self.labels),
        }


class Judge:
    """EfficientNet-Lite1, which takes no part in any training here."""

    def __init__(
        self, classes: Sequence[int] = tuple(IMAGENET.values()), device: torch.device | str = "cpu"
    ) -> None:
        """Loads Lite1.

        Args:
            classes: of ImageNet, in the order of the labels.
            device: where it looks.

        Raises:
            FeatureError: its packages are missing.
        """
        self.network, self.classes = EfficientNetLite(1, device), tuple(classes)

    def look(self, pictures: Tensor, name: str = "") -> Tensor:
        """(N, 3, S, S), 8-bit → (N, D)."""
        with tqdm(total=len(pictures), desc=name, leave=False, disable=not name) as bar:
            parts = []
            for batch in pictures.split(BATCH):
                parts.append(self.network(batch))
                bar.update(len(batch))
        return torch.cat(parts)

    def hits(self, features: Tensor, labels: Tensor) -> Tensor:
        """Whether each is put into its own class: (N,), bool."""
        return class_hits(self.network.logits(features), labels, self.classes)


def load_real(
    paths: Sequence[str], model: EnergyAR, judge: Judge, name: str, *, mirrored: bool = False
) -> Real:
    """Reads labelled pictures, restores them by the generator's autoencoder and looks at those.

    Args:
        paths: files, folders or tars; damaged pictures are left out, and logged.
        model: whose autoencoder, and whose side.
        judge: who looks.
        name: for messages.
        mirrored: whether to look at the mirror images, too.

    Raises:
        ImageError: there are none, or some have no class folder of Imagenette.
        ValueError: the generator has another number of classes than the judge.
    """
    if len(model.config.class_names) != len(judge.classes):
        raise ValueError(
            f"the generator has {len(model.config.class_names)} classes, the judge knows "
            f"Imagenette's {len(judge.classes)}; give one of these classes"
        )
    found = find_images(paths)
    folders = sorted({ref.label for ref in found})
    if unknown := [folder for folder in folders if folder not in IMAGENET]:
        raise ImageError(f"{name}: {unknown[0]!r} is not a class folder of Imagenette")
    pictures, labels = load_labelled(found, model.config.image_side, tuple(IMAGENET))
    return Real(
        pictures,
        labels,
        judge.look(restore(model, pictures), name),
        judge.look(restore(model, pictures.flip(-1)), f"{name}, mirrored") if mirrored else None,
    )


@torch.no_grad()
def restore(model: EnergyAR, pictures: Tensor) -> Tensor:
    """What the autoencoder makes of real pictures, with the generator's decoder: 8-bit."""
    device = model.autoencoder.device
    parts = []
    for batch in pictures.split(BATCH):
        latents = model.autoencoder.encode(from_uint8(batch).to(device)).mode()
        parts.append(to_uint8(model.decode(latents)).cpu())
    return torch.cat(parts)


def draw(
    model: EnergyAR, count: int, seed: int, settings: Mapping[str, float], name: str = "",
    streams: ParallelStreams | None = None,
) -> Tensor:  # fmt: skip
    """(count, 3, S, S), 8-bit; the classes in turn; one picture from all streams."""
    classes = len(model.config.class_names)
    device = model.device
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


def judge_drawn(
    model: EnergyAR, judge: Judge, settings: Mapping[str, float], name: str = "",
    streams: ParallelStreams | None = None, *, count: int | None = None, seed: int | None = None,
) -> Drawn:  # fmt: skip
    """Draws pictures by :func:`draw` and judges them; ``JUDGED`` of ``JUDGED_SEED`` if not told."""
    seed = JUDGED_SEED if seed is None else seed
    pictures = draw(model, count or JUDGED, seed, settings, name, streams)
    labels = torch.arange(len(pictures)) % len(judge.classes)
    features = judge.look(pictures, name)
    return Drawn(pictures, labels, features, judge.hits(features, labels))


def distance_interval(features: Tensor, law: Gaussian) -> Interval:
    """Fréchet distance of (N, D) features to a law, with its interval over pictures."""
    seen = features.numpy()
    return clustered_jackknife(
        lambda rows: [Gaussian.fit(seen[rows]).distance(law)], range(len(seen))
    )[0]


def choose(
    model: EnergyAR, judge: Judge, training: Real
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Guidance and temperature of the least distance to the training pictures, and all tried ones.

    Args:
        model: the generator.
        judge: of distance and classes.
        training: the pictures it was trained on.
    """
    law = Gaussian.fit(training.restored.numpy())
    tried = []
    pairs = list(itertools.product(GUIDANCE, TEMPERATURES))
    for guidance, temperature in tqdm(pairs, desc="settings"):
        setting = {"guidance": guidance, "temperature": temperature}
        drawn = judge_drawn(model, judge, setting, count=TRIED, seed=TRIED_SEED)
        tried.append(
            {
                **setting,
                "distance": Gaussian.fit(drawn.features.numpy()).distance(law),
                "accuracy": float(drawn.hits.float().mean()),
            }
        )
    best = min(tried, key=lambda row: row["distance"])
    return {key: best[key] for key in ("guidance", "temperature")}, tried


def evenly(labels: Tensor, count: int) -> Tensor:
    """Numbers of ``count`` pictures, the classes in turn, spread over each: (count or N,), int64.

    Args:
        labels: (N,).
        count: how many; of a class at most all that there are.
    """
    classes = labels.unique()
    chosen = []
    for place, label in enumerate(classes):
        members = torch.nonzero(labels == label)[:, 0]
        wanted = len(range(place, count, len(classes)))
        spread = np.linspace(0, len(members) - 1, min(wanted, len(members))).round()
        chosen.append(members[torch.from_numpy(spread).long()])
    return torch.cat(chosen)


def save_classes(pictures: Tensor, classes: int, path: Path, shown: int = 8) -> None:
    """Writes the first pictures of :func:`draw` as a grid: a class a row, ``shown`` of each."""
    save_png(grid([list(pictures[k : shown * classes : classes]) for k in range(classes)]), path)

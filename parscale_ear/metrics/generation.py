"""What drawn pictures are measured by: class accuracy, distances, nearest neighbours.

Shapes: N pictures, M references, D features, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from parscale_ear import checkpoint
from parscale_ear.metrics.diversity import mean_pairwise_distance
from parscale_ear.metrics.frechet import Gaussian, Interval

KIND = "FeatureStatistics"
STATISTICS_FILE = "imagenette128.safetensors"  # of the shipped generator's validation pictures
NEIGHBOUR_BATCH = 256


@dataclass(frozen=True)
class FeatureStatistics:
    """Real pictures as a judge sees them: enough for distances without the pictures."""

    law: Gaussian  # of their features
    extractor: str  # whose features
    classes: tuple[int, ...]  # of ImageNet, in the order of the generator's labels
    facts: Mapping[str, Any] = field(default_factory=dict)  # where from, how many, ceilings

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a safetensors file: the mean in FP32, the triangular root in FP16.

        Raises:
            ValueError: the root is not square (fewer pictures than features).
        """
        path = Path(path)
        root = torch.from_numpy(np.linalg.qr(self.law.root, mode="r"))  # any root may be given
        if root.shape[0] != root.shape[1]:
            raise ValueError(
                f"statistics need more pictures than features, got a root of {tuple(root.shape)}"
            )
        rows, columns = torch.triu_indices(*root.shape)
        tensors = {
            "mean": torch.from_numpy(self.law.mean).float(),
            "root": root[rows, columns].half(),
        }
        config = {"extractor": self.extractor, "classes": list(self.classes)}
        checkpoint.save(path, tensors, kind=KIND, config=config, facts=dict(self.facts))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureStatistics:
        """Reads what :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged or foreign.
        """
        tensors, header = checkpoint.load(path, kind=KIND)
        try:
            mean = tensors["mean"].double().numpy()
            root = torch.zeros(len(mean), len(mean), dtype=torch.float64)
            rows, columns = torch.triu_indices(*root.shape)
            root[rows, columns] = tensors["root"].double()
            config = header["config"]
            classes = tuple(int(number) for number in config["classes"])
            return cls(Gaussian(mean, root.numpy()), config["extractor"], classes, header["facts"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise checkpoint.CheckpointError(f"{path}: not whole ({reason})") from error


def shipped_statistics() -> Path:
    """Path of what the shipped generator is judged by."""
    return Path(str(resources.files("parscale_ear") / "weights" / STATISTICS_FILE))


def class_hits(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Whether a picture is put into its own class when only these classes stand to choice.

    Args:
        logits: (N, 1000), of an ImageNet classifier.
        labels: (N,), numbers 0..C − 1 of the pictures' classes.
        classes: C numbers of ImageNet's classes.

    Returns:
        (N,), bool.
    """
    return logits[:, list(classes)].argmax(dim=1) == labels


def share(hits: Tensor) -> Interval:
    """Share of what is true, with its 95 % interval (Wilson, 1927)."""
    count, total = int(hits.sum()), len(hits)
    ends = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return Interval(count / total, float(ends.low), float(ends.high))


def class_diversity(features: Tensor, labels: Tensor) -> float:
    """Mean distance between two pictures of a class, mean over classes of two or more.

    Args:
        features: (N, D).
        labels: (N,).

    Raises:
        ValueError: no class has two pictures.
    """
    several = [k for k, count in zip(*labels.unique(return_counts=True), strict=True) if count > 1]
    if not several:
        raise ValueError("no class has two pictures")
    return float(np.mean([mean_pairwise_distance(features[None, labels == k]) for k in several]))


def nearest(features: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest reference, and which it is.

    Args:
        features: (N, D).
        references: (M, D).

    Returns:
        (N,) and (N,), int64.
    """
    parts = [
        torch.cdist(batch.double(), references.double()).min(dim=1)
        for batch in features.split(NEIGHBOUR_BATCH)
    ]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def nearest_other(features: Tensor, labels: Tensor, each: int) -> Tensor:
    """Distance of pictures to the nearest other one of their class.

    Args:
        features: (N, D).
        labels: (N,).
        each: the first so many of a class are looked at.

    Returns:
        (C · each,), class by class.

    Raises:
        ValueError: of some class fewer than two pictures are looked at.
    """
    found = []
    for label in labels.unique():
        members = features[labels == label][:each].double()
        if len(members) < 2:
            raise ValueError(f"class {int(label)}: at least two pictures are needed")
        distances = torch.cdist(members, members)
        found.append(distances.fill_diagonal_(torch.inf).min(dim=1).values)
    return torch.cat(found)


def effective_dimensions(features: Tensor, labels: Tensor, each: int) -> float:
    """In how many directions a class's pictures differ: its participation ratio, mean over classes.

    ``(Σλ)² / Σλ²`` over the eigenvalues of the covariance (Gao et al., "A theory of multineuronal
    dimensionality, dynamics and measurement", 2017): D where all directions vary alike, 1 where
    there is one, 0 where all are the same; at most ``each`` − 1. A few pictures that come again and
    again give a small one.

    Args:
        features: (N, D).
        labels: (N,).
        each: the first so many of a class are looked at.
    """
    found = []
    for label in labels.unique():
        members = features[labels == label][:each].double()
        centred = members - members.mean(0)
        squares = torch.linalg.svdvals(centred).square()  # the covariance's, but for a factor
        alike = not bool(squares.any())
        found.append(0.0 if alike else float(squares.sum().square() / squares.square().sum()))
    return float(np.mean(found))


def quantiles(values: Tensor) -> dict[str, float]:
    """Low end, quartiles and median of distances, for a report."""
    levels = (0.01, 0.25, 0.5, 0.75)
    found = np.quantile(values.numpy(), levels)
    return {f"q{level:g}": float(value) for level, value in zip(levels, found, strict=True)}

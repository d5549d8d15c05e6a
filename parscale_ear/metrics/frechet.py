"""Fréchet distance between two sets of features, and intervals clustered by photograph.

Shapes: N samples, D features, K clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Array = NDArray[np.float64]
GROUPS = 40  # of the jackknife


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian fitted to features, with a root of its covariance instead of the matrix itself."""

    mean: Array  # (D,)
    root: Array  # (M, D): rootᵀ · root is the covariance

    @classmethod
    def fit(cls, features: NDArray[np.floating]) -> Gaussian:
        """Fits one to (N, D) features; the root has min(N, D) rows.

        Raises:
            ValueError: another shape, fewer than two samples, or a value that is not finite.
        """
        moments = FeatureMoments(np.shape(features)[-1] if np.ndim(features) else 0)
        moments.add(features)
        return moments.gaussian()

    def distance(self, other: Gaussian) -> float:
        """Squared Fréchet distance, at least 0.

        ``‖μ₁−μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½`` (Dowson and Landau, 1982; used for FID by
        Heusel et al., 2017). With ``Σ = XᵀX`` the last trace is the sum of the singular values of
        ``X₁X₂ᵀ``: exact, quick for few samples, and with no matrix square root of a singular
        matrix. Where both have as many rows as columns they are the roots of a symmetric matrix's
        eigenvalues, found in a fraction of the time, and exact to about 1e-8 of the largest.

        Raises:
            ValueError: features of another width.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"features differ in width: {self.mean.shape[0]} and {other.mean.shape[0]}"
            )
        difference = self.mean - other.mean
        product = self.root @ other.root.T
        if product.shape == (len(self.mean), len(self.mean)):
            squares = np.linalg.eigvalsh(product.T @ product)
            cross = np.sqrt(squares.clip(min=0)).sum()
        else:
            cross = np.linalg.svd(product, compute_uv=False).sum()
        traces = np.square(self.root).sum() + np.square(other.root).sum()
        return max(0.0, float(difference @ difference + traces - 2 * cross))


class FeatureMoments:
    """Mean and covariance of features that come in parts, in memory that does not grow with them.

    Parts of several processes are merged after Chan, Golub and LeVeque ("Algorithms for Computing the
    Sample Variance", 1983), in terms of a root of the scatter matrix, which loses no digits to squares.

    Example:
        >>> moments = FeatureMoments(1280)
        >>> for batch in batches:
        ...     moments.add(extractor(batch).numpy())
        >>> moments.gaussian().distance(other.gaussian())
    """

    def __init__(self, width: int) -> None:
        """Starts with no samples of ``width`` features."""
        self.count = 0  # samples that were added
        self._mean: Array = np.zeros(width)
        self._root: Array = np.empty((0, width))  # rootᵀ · root: the scatter about the mean
        self._folded = 0  # samples that mean and root stand for; the others are pending
        self._pending: list[Array] = []

    def add(self, features: NDArray[np.floating]) -> None:
        """Takes (N, D) features in; N may be 0.

        Raises:
            ValueError: another shape, or a value that is not finite.
        """
        x = np.array(features, dtype=np.float64)
        width = len(self._mean)
        if x.ndim != 2 or x.shape[1] != width:
            raise ValueError(f"expected (N, {width}) features, got {x.shape}")
        if not np.isfinite(x).all():
            raise ValueError("features must be finite, got NaN or infinity")
        self._pending.append(x)
        self.count += len(x)
        if self.count - self._folded >= 2 * width:
            self._fold()

    def merge(self, other: FeatureMoments) -> None:
        """Takes in what another one has taken in.

        Raises:
            ValueError: features of another width.
        """
        if self._mean.shape != other._mean.shape:
            raise ValueError(f"features differ in width: {len(self._mean)} and {len(other._mean)}")
        for part in other._pending:
            self.add(part)
        self._join(other._folded, other._mean, other._root)
        self.count += other._folded

    def gaussian(self) -> Gaussian:
        """The Gaussian of all samples, as :meth:`Gaussian.fit` gives it.

        Raises:
            ValueError: fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a Gaussian needs at least two samples, got {self.count}")
        self._fold()
        return Gaussian(self._mean.copy(), self._root / np.sqrt(self.count - 1))

    def _fold(self) -> None:
        x = np.concatenate([np.empty((0, len(self._mean))), *self._pending])
        self._pending = []
        if len(x):
            mean = x.mean(axis=0)
            self._join(len(x), mean, x - mean)

    def _join(self, count: int, mean: Array, root: Array) -> None:
        """Adds ``count`` samples of this mean and root of the scatter."""
        if not count:
            return
        total = self._folded + count
        between = mean - self._mean
        row = np.sqrt(self._folded * count / total) * between
        parts = [self._root, root] if not self._folded else [self._root, root, row[None]]
        stacked = np.concatenate(parts)
        if len(stacked) >= stacked.shape[1]:
            stacked = np.asarray(np.linalg.qr(stacked, mode="r"))
        self._mean = self._mean + between * (count / total)
        self._root, self._folded = stacked, total


def frechet_distance(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features.

    Args:
        first: (N₁, D).
        second: (N₂, D).

    Returns:
        The distance, at least 0; see :meth:`Gaussian.distance`.

    Raises:
        ValueError: shapes differ, fewer than two samples, or a value that is not finite.
    """
    return Gaussian.fit(first).distance(Gaussian.fit(second))


@dataclass(frozen=True)
class Interval:
    """A figure and its interval."""

    value: float  # of the whole sample
    low: float
    high: float
    level: float = 0.95

    def as_dict(self) -> dict[str, float]:
        """For a JSON report."""
        return {"value": self.value, "low": self.low, "high": self.high, "level": self.level}


def clustered_jackknife(
    statistics: Callable[[NDArray[np.intp]], Sequence[float]],
    clusters: Sequence[int],
    *,
    groups: int = GROUPS,
    level: float = 0.95,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> list[Interval]:
    """Intervals from leaving out one group of whole clusters at a time.

    Crops of one photograph are not independent, so a photograph is left out with all of its crops.
    Up to ``groups`` clusters are groups by themselves; more are dealt to as many groups at random.
    Source: Kott, "The Delete-a-Group Jackknife" (Journal of Official Statistics, 2001); Student's t
    with one degree of freedom less than there are groups.

    No sample comes twice, as it does in a bootstrap: of a Fréchet distance, which grows when fewer samples are
    different, that gave intervals 0.8 to 2 times as wide in simulations (docs/experiments.md).

    Statistics that are computed from the same samples are paired: pass a difference as one of them.

    Args:
        statistics: from sample indices to one or more figures.
        clusters: (N,), the cluster of every sample.
        groups: how many at most.
        level: of the interval.
        seed: of the dealing.
        progress: called after each group.

    Returns:
        One interval a statistic, symmetric about its figure of the whole sample.

    Raises:
        ValueError: there are fewer than two clusters or groups.
    """
    _, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    count = int(cluster.max()) + 1
    groups = min(groups, count)
    if groups < 2:
        raise ValueError(f"an interval needs at least two photographs and groups, got {groups}")
    group = (np.random.default_rng(seed).permutation(count) % groups)[cluster]  # (N,)
    values = np.asarray(statistics(np.arange(len(cluster))), dtype=np.float64)
    left = []
    for k in range(groups):
        left.append(statistics(np.flatnonzero(group != k)))
        if progress is not None:
            progress()
    spread = np.asarray(left, dtype=np.float64)
    spread -= spread.mean(axis=0)
    error = np.sqrt((groups - 1) / groups * np.square(spread).sum(axis=0))
    half = student.ppf((1 + level) / 2, groups - 1) * error
    return [
        Interval(float(v), float(v - h), float(v + h), level)
        for v, h in zip(values, half, strict=True)
    ]

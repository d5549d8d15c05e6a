from __future__ import annotations

import pickle

import numpy as np
import pytest
from numpy.typing import NDArray
from pytorch_fid.fid_score import calculate_frechet_distance
from scipy import stats

from parscale_ear.metrics.frechet import (
    FeatureMoments,
    Gaussian,
    Interval,
    clustered_jackknife,
    frechet_distance,
)

RNG = np.random.default_rng(0)


def features(samples: int, dimensions: int) -> np.ndarray:
    mixing = RNG.standard_normal((dimensions, dimensions)) / np.sqrt(dimensions)
    return RNG.standard_normal((samples, dimensions)) @ mixing


@pytest.mark.parametrize("samples", [20, 500])
def test_of_a_set_with_itself_is_0(samples: int) -> None:
    x = features(samples, 64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("samples", [20, 500])
def test_of_a_shifted_set_is_the_squared_shift(samples: int) -> None:
    x, shift = features(samples, 64), RNG.standard_normal(64)
    assert frechet_distance(x, x + shift) == pytest.approx(shift @ shift, rel=1e-9)


def test_of_scaled_gaussians() -> None:
    x = features(400, 16)
    expected = np.trace(np.cov(x, rowvar=False)) * (3 - 1) ** 2
    centred = x - x.mean(axis=0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("first", "second"), [(300, 200), (40, 200), (64, 65)])
def test_equals_pytorch_fid(first: int, second: int) -> None:
    x, y = features(first, 32), features(second, 32) * 1.5 + 0.3
    expected = calculate_frechet_distance(
        x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
    )
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)


def test_few_samples_equal_the_square_root_of_a_singular_product() -> None:
    # With fewer samples than features pytorch-fid regularises; compare eigenvalues instead.
    x, y = features(12, 40), features(15, 40)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.clip(np.linalg.eigvals(a @ b).real, 0, None)).sum()
    d = x.mean(0) - y.mean(0)
    expected = d @ d + np.trace(a) + np.trace(b) - 2 * roots
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)


def test_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(ValueError, match="at least two samples"):
        frechet_distance(features(1, 4), features(5, 4))
    with pytest.raises(ValueError, match="differ in width: 4 and 3"):
        frechet_distance(features(5, 4), features(5, 3))
    bad = features(5, 4)
    bad[0, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(bad, features(5, 4))


class TestFeatureMoments:
    """A far mean: sums of squares would lose the covariance to it."""

    @pytest.mark.parametrize("samples", [5, 16, 17, 500])
    @pytest.mark.parametrize("part", [1, 7, 500])
    def test_parts_give_what_the_whole_gives(self, samples: int, part: int) -> None:
        x, y = 1e6 + features(samples, 16), 1e6 + features(40, 16)
        moments = FeatureMoments(16)
        for first in range(0, samples, part):
            moments.add(x[first : first + part])
        moments.add(np.empty((0, 16)))
        found, expected = moments.gaussian(), Gaussian.fit(x)
        assert moments.count == samples
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
        covariance = expected.root.T @ expected.root
        np.testing.assert_allclose(found.root.T @ found.root, covariance, atol=1e-8)
        assert found.distance(Gaussian.fit(y)) == pytest.approx(frechet_distance(x, y), rel=1e-6)

    @pytest.mark.parametrize("shares", [(0, 30), (1, 29), (200, 100), (300, 0)])
    def test_two_are_merged(self, shares: tuple[int, int]) -> None:
        x = features(sum(shares), 16)
        first, second = FeatureMoments(16), FeatureMoments(16)
        first.add(x[: shares[0]])
        second.add(x[shares[0] :] + 3)
        first.merge(second)
        x[shares[0] :] += 3
        found, expected = first.gaussian(), Gaussian.fit(x)
        assert first.count == len(x)
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12, atol=1e-12)
        covariance = expected.root.T @ expected.root
        np.testing.assert_allclose(found.root.T @ found.root, covariance, atol=1e-12)

    def test_goes_on_after_it_was_asked(self) -> None:
        x, moments = features(50, 8), FeatureMoments(8)
        moments.add(x[:10])
        early = moments.gaussian()
        moments.add(x[10:])
        assert moments.gaussian().distance(Gaussian.fit(x)) == pytest.approx(0, abs=1e-9)
        assert early.distance(Gaussian.fit(x[:10])) == pytest.approx(0, abs=1e-9)

    def test_memory_is_that_of_some_samples(self) -> None:
        moments = FeatureMoments(8)
        for _ in range(100):
            moments.add(features(5, 8))
            assert len(pickle.dumps(moments)) < 8 * 8 * (2 * 8 + 5 + 8) + 4000
        assert moments.count == 500

    def test_keeps_no_view_of_what_it_was_given(self) -> None:
        x, moments = features(6, 4), FeatureMoments(4)
        moments.add(x)
        expected = Gaussian.fit(x)
        x[:] = 0
        assert moments.gaussian().distance(expected) == pytest.approx(0, abs=1e-9)

    def test_refuses_what_it_cannot_judge(self) -> None:
        moments, bad = FeatureMoments(4), features(5, 4)
        with pytest.raises(ValueError, match=r"\(N, 4\) features, got \(5, 3\)"):
            moments.add(features(5, 3))
        bad[0, 0] = np.inf
        with pytest.raises(ValueError, match="finite"):
            moments.add(bad)
        with pytest.raises(ValueError, match="differ in width: 4 and 3"):
            moments.merge(FeatureMoments(3))
        moments.add(features(1, 4))
        with pytest.raises(ValueError, match="at least two samples, got 1"):
            moments.gaussian()


class TestJackknife:
    @pytest.mark.parametrize("count", [5, 30, 200])
    def test_covers_the_mean_as_often_as_it_says(self, count: int) -> None:
        rng = np.random.default_rng(1)
        covered = 0
        for trial in range(400):
            means = rng.standard_normal(count)  # of the clusters: where the spread is
            x = (means[:, None] + 0.1 * rng.standard_normal((count, 5))).ravel()
            clusters = np.repeat(np.arange(count), 5).tolist()
            (interval,) = clustered_jackknife(lambda i, x=x: [x[i].mean()], clusters, seed=trial)
            covered += interval.low <= 0 <= interval.high
        assert 0.92 <= covered / 400 <= 0.98  # 0.95, three deviations each way

    def test_of_a_mean_it_is_students(self) -> None:
        x = np.random.default_rng(5).standard_normal(12)
        (interval,) = clustered_jackknife(lambda i: [x[i].mean()], range(12))
        expected = stats.t.interval(0.95, 11, x.mean(), x.std(ddof=1) / 12**0.5)
        assert (interval.low, interval.high) == pytest.approx(expected, rel=1e-9)

    def test_covers_a_distance_of_few_samples_and_is_not_far_too_wide(self) -> None:
        """As a release is judged: not many more samples than features, the other side a law."""
        rng = np.random.default_rng(0)
        scale = 3 / np.sqrt(np.arange(1, 17))
        law = Gaussian.fit(1.2 * scale * rng.standard_normal((3000, 16)) + 0.2)

        def draw() -> NDArray[np.float64]:
            return rng.standard_normal((25, 16)) * scale

        def distance(x: NDArray[np.float64]) -> float:
            return Gaussian.fit(x).distance(law)

        figures = np.array([distance(draw()) for _ in range(400)])
        widths, covered = [], 0
        for _ in range(200):
            x = draw()
            (found,) = clustered_jackknife(lambda i, x=x: [distance(x[i])], range(25))
            widths.append(found.high - found.low)
            covered += found.low <= figures.mean() <= found.high
        true = 2 * stats.t.ppf(0.975, 24) * figures.std(ddof=1)
        assert covered / 200 >= 0.9
        assert 0.9 < np.mean(widths) / true < 1.4

    def test_an_interval_of_a_distance_holds_the_distance(self) -> None:
        x, y = features(104, 100), features(104, 100) * 1.1
        clusters = np.arange(104) % 13
        (interval,) = clustered_jackknife(
            lambda i: [frechet_distance(x[i], y[i])], clusters.tolist()
        )
        assert interval.low < interval.value < interval.high

    def test_leaves_out_whole_clusters_each_once(self) -> None:
        seen: list[list[int]] = []
        clusters = [7, 7, 1, 1, 1, 2]
        clustered_jackknife(lambda i: [float(seen.append(i.tolist()) or 0)], clusters)
        assert sorted(seen) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 5], [2, 3, 4, 5]]

    def test_many_clusters_are_dealt_to_groups(self) -> None:
        seen: list[set[int]] = []
        clusters = np.repeat(np.arange(10), 2)
        clustered_jackknife(
            lambda i: [float(seen.append(set(range(20)) - set(i.tolist())) or 0)],
            clusters.tolist(), groups=4,
        )  # fmt: skip
        left_out = seen[1:]
        assert sorted(map(len, left_out)) == [4, 4, 6, 6]
        assert set.union(*left_out) == set(range(20))
        for group in left_out:
            assert group == {k for k in range(20) if clusters[k] in {clusters[j] for j in group}}

    def test_a_paired_difference_of_equals_is_0(self) -> None:
        x = np.random.default_rng(2).standard_normal(40)
        (interval,) = clustered_jackknife(lambda i: [x[i].mean() - x[i].mean()], range(40))
        assert (interval.value, interval.low, interval.high) == (0, 0, 0)

    def test_the_seed_and_the_level_settle_the_interval(self) -> None:
        x = np.random.default_rng(3).standard_normal(100)

        def interval(seed: int, level: float = 0.95) -> Interval:
            (found,) = clustered_jackknife(
                lambda i: [x[i].mean()], range(100), seed=seed, level=level
            )
            return found

        assert interval(1) == interval(1) != interval(2)
        half, most = interval(1, 0.5), interval(1)
        assert (half.level, most.level) == (0.5, 0.95)
        ratio = (half.high - half.low) / (most.high - most.low)
        assert ratio == pytest.approx(stats.t.ppf(0.75, 39) / stats.t.ppf(0.975, 39))

    def test_progress_is_told_a_group(self) -> None:
        told: list[int] = []
        clustered_jackknife(lambda i: [0.0], range(100), groups=7, progress=lambda: told.append(1))
        assert len(told) == 7

    @pytest.mark.parametrize(("clusters", "groups"), [([1, 1, 1], 5), ([1, 2, 3], 1)])
    def test_needs_two_groups(self, clusters: list[int], groups: int) -> None:
        with pytest.raises(ValueError, match="at least two photographs and groups"):
            clustered_jackknife(lambda i: [0.0], clusters, groups=groups)

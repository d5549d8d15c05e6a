from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from parscale_ear.checkpoint import CheckpointError
from parscale_ear.metrics.frechet import Gaussian, frechet_distance
from parscale_ear.metrics.generation import (
    FeatureStatistics,
    class_diversity,
    class_hits,
    effective_dimensions,
    nearest,
    nearest_other,
    quantiles,
    share,
)


@pytest.fixture
def features() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((60, 12)) @ rng.standard_normal((12, 12)) + 3


def test_statistics_on_disk_give_the_distance_of_the_pictures(
    features: np.ndarray, tmp_path: Path
) -> None:
    statistics = FeatureStatistics(Gaussian.fit(features), "judge", (3, 7), {"pictures": 60})
    found = FeatureStatistics.load(statistics.save(tmp_path / "s.safetensors"))
    other = np.random.default_rng(1).standard_normal((40, 12))
    exact = frechet_distance(features, other)
    assert Gaussian.fit(other).distance(found.law) == pytest.approx(exact, rel=2e-3)
    assert found.law.distance(statistics.law) < 1e-4 * exact
    np.testing.assert_allclose(found.law.root, statistics.law.root, rtol=2**-11, atol=1e-7)  # FP16
    assert (found.extractor, found.classes, found.facts) == ("judge", (3, 7), {"pictures": 60})


def test_any_root_of_a_covariance_is_kept(features: np.ndarray, tmp_path: Path) -> None:
    law = Gaussian.fit(features)
    turned = np.linalg.qr(np.random.default_rng(2).standard_normal((12, 12)))[0] @ law.root
    path = FeatureStatistics(Gaussian(law.mean, turned), "judge", ()).save(
        tmp_path / "s.safetensors"
    )
    far = frechet_distance(features, np.random.default_rng(1).standard_normal((40, 12)))
    assert FeatureStatistics.load(path).law.distance(law) < 1e-4 * far


@pytest.mark.parametrize("count", [12, 13])
def test_as_many_pictures_as_features_will_do(count: int, tmp_path: Path) -> None:
    few = np.random.default_rng(0).standard_normal((count, 12))
    statistics = FeatureStatistics(Gaussian.fit(few), "judge", ())
    found = FeatureStatistics.load(statistics.save(tmp_path / "s.safetensors"))
    far = frechet_distance(few, np.random.default_rng(1).standard_normal((40, 12)))
    assert found.law.distance(statistics.law) < 1e-3 * far


def test_statistics_of_too_few_pictures_are_refused(tmp_path: Path) -> None:
    few = np.random.default_rng(0).standard_normal((5, 12))
    with pytest.raises(ValueError, match="more pictures than features"):
        FeatureStatistics(Gaussian.fit(few), "judge", ()).save(tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())


def test_another_file_is_not_taken_for_statistics(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        FeatureStatistics.load(tmp_path / "none.safetensors")


def test_only_the_given_classes_stand_to_choice() -> None:
    logits = torch.zeros(3, 1000)
    logits[:, 999] = 9.0  # no class of ours
    logits[0, 10], logits[1, 20], logits[2, 10] = 1.0, 1.0, 1.0
    hits = class_hits(logits, torch.tensor([0, 1, 1]), (10, 20))
    assert hits.tolist() == [True, True, False]


def test_share_has_wilsons_interval() -> None:
    found = share(torch.tensor([True] * 8 + [False] * 2))
    # Wilson (1927): (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)
    z, n, p = 1.959964, 10, 0.8
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found.value == 0.8
    assert found.low == pytest.approx((middle - half) / (1 + z * z / n), rel=1e-5)
    assert found.high == pytest.approx((middle + half) / (1 + z * z / n), rel=1e-5)


def test_effective_dimensions_tell_repeated_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    round_ones = torch.randn(400, 5, generator=generator) * 3 + 7
    assert effective_dimensions(round_ones, labels, 200) == pytest.approx(5, rel=0.05)
    line = torch.randn(400, 1, generator=generator) * torch.ones(1, 5)
    assert effective_dimensions(line, labels, 200) == pytest.approx(1, rel=1e-4)
    wide = torch.randn(400, 100, generator=generator)
    few = wide[:6].repeat(67, 1)[:400]  # of each class three pictures, again and again
    assert effective_dimensions(few, labels, 200) <= 2.0
    assert effective_dimensions(wide, labels, 200) > 50
    assert effective_dimensions(torch.ones(400, 5), labels, 200) == 0
    assert effective_dimensions(wide, labels, 4) <= 3  # only the first of each are looked at


def test_nearest_finds_a_copy() -> None:
    references = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    apart, which = nearest(references[[7, 430]] + 1e-3, references)
    assert which.tolist() == [7, 430]
    assert float(apart.max()) < 0.01
    _, each = nearest(references.flip(0), references)  # more than are compared at a time
    assert each.tolist() == list(range(500))[::-1]


def test_quantiles_have_their_level_as_name() -> None:
    found = quantiles(torch.arange(101.0).flip(0))
    assert found == pytest.approx({"q0.01": 1, "q0.25": 25, "q0.5": 50, "q0.75": 75})


def test_only_the_first_of_a_class_are_its_neighbours() -> None:
    features = torch.tensor([[0.0], [9.0], [2.0], [9.5], [2.1]])
    found = nearest_other(features, torch.tensor([0, 1, 0, 1, 0]), 2)
    assert found.tolist() == [2, 2, 0.5, 0.5]


def test_a_class_of_one_picture_has_no_distances_within() -> None:
    features, labels = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1])
    assert class_diversity(features, labels) == 2
    assert nearest_other(features[:2], labels[:2], 2).tolist() == [2, 2]
    with pytest.raises(ValueError, match="class 1: at least two"):
        nearest_other(features, labels, 2)
    with pytest.raises(ValueError, match="no class has two"):
        class_diversity(features[1:], labels[1:])

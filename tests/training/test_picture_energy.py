from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.generator.energy import energy_score
from parscale_ear.training import picture_energy
from parscale_ear.training.distributed import OneProcess
from parscale_ear.training.loop import Precision, autocast_for
from parscale_ear.training.picture_energy import (
    BRIGHTNESS,
    CONTRAST,
    SATURATION,
    SEEN_SEED,
    SHIFT,
    SIZES,
    PictureScore,
    Seen,
    _changed,
    ensemble_score,
)


def test_ensemble_score_is_the_mean_of_energy_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    observations = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    expected = torch.stack([energy_score(draws, y) for y in observations]).mean()
    torch.testing.assert_close(ensemble_score(draws, observations), expected, atol=1e-6, rtol=0)


def test_ensemble_score_has_finite_gradients_where_draws_meet() -> None:
    draws = torch.zeros(3, 2, requires_grad=True)
    ensemble_score(draws, torch.ones(2, 2)).backward()
    assert draws.grad is not None
    assert torch.isfinite(draws.grad).all()


@pytest.fixture(scope="module")
def latents() -> Tensor:
    """Twelve latents of 32×32 pictures: six dark ones, six bright ones."""
    generator = torch.Generator().manual_seed(0)
    shade = torch.tensor([-0.7] * 6 + [0.7] * 6)[:, None, None, None]
    pictures = shade + 0.1 * torch.randn(12, 3, 32, 32, generator=generator)
    with torch.no_grad():
        return ParScaleEAR.from_pretrained().encode(pictures.clamp(-1, 1)).mode()


LABELS = torch.tensor([0] * 6 + [1] * 6)


@pytest.fixture(scope="module")
def score(latents: Tensor) -> PictureScore:
    return PictureScore(ParScaleEAR.from_pretrained(), latents, LABELS)


def total(score: PictureScore, latents: Tensor, labels: Tensor, size: int = 0) -> float:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found, _ = score(score.look(latents, size, generator), labels, generator)
    return float(found)


@pytest.mark.parametrize("size", [0, 1])
def test_pictures_of_the_class_score_better_than_others(
    score: PictureScore, latents: Tensor, size: int
) -> None:
    right = total(score, latents, LABELS, size)
    swapped = total(score, latents, 1 - LABELS, size)
    noise = total(score, torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)), LABELS, size)  # fmt: skip
    same = total(score, latents[[0, 0, 0, 6, 6, 6]], LABELS[[0, 0, 0, 6, 6, 6]], size)
    assert right < min(swapped, noise, same)


def test_every_part_reaches_the_latents(score: PictureScore, latents: Tensor) -> None:
    names = ("maps", "last", "latent", "patch", "small", "class", "range")
    seen = []
    for name in names:
        drawn = (1.5 * latents).requires_grad_()
        generator = torch.Generator().manual_seed(0)
        _, parts = score(score.look(drawn, 0, generator), LABELS, generator)
        assert set(parts) == set(names)
        parts[name].backward()
        assert drawn.grad is not None
        assert torch.isfinite(drawn.grad).all()
        assert drawn.grad.any()
        seen.append(float(parts[name].detach()))
    assert seen[-1] > 0
    assert not any(p.requires_grad for p in score.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_real_and_drawn_pictures_are_seen_alike(precision: Precision, latents: Tensor) -> None:
    """The real latents, drawn with the real ones' chances, are the real pictures."""
    latents = 1.5 * latents  # pictures that leave [−1, 1], too
    score = PictureScore(ParScaleEAR.from_pretrained(), latents, LABELS, precision=precision)
    with torch.no_grad(), autocast_for(precision, torch.device("cpu")):
        generator = torch.Generator().manual_seed(SEEN_SEED)
        _, parts = score(score.look(latents, 0, generator), LABELS, generator)
    for name, rows in (
        ("last", [score.real[label][0][-1] for label in (0, 1)]),
        ("small", [score.small[label] for label in (0, 1)]),
    ):
        expected = torch.stack([ensemble_score(part, part) for part in rows]).mean()
        torch.testing.assert_close(parts[name], expected, atol=1e-5, rtol=1e-3)


def test_two_ends_of_one_beginning_are_scored_against_its_own_end(
    score: PictureScore, latents: Tensor
) -> None:
    """A proper score: apart is better than alike, and near the truth better than far from it."""
    with torch.no_grad():
        seen = score.look(latents, 0, torch.Generator().manual_seed(0))

        def of(drawn: list[int], real: list[int]) -> float:
            ours, theirs = (
                Seen(seen.latents[k], seen.pictures[k], [m[k] for m in seen.maps], 0)
                for k in (drawn, real)
            )
            return float(score.continued(ours, theirs))

        real = [0, 6]
        apart, first, second = of([1, 7, 2, 8], real), of([1, 7, 1, 7], real), of([2, 8, 2, 8], real)  # fmt: skip
        assert apart < (first + second) / 2 - 0.05, (
            "two draws that are one and the same gain nothing"
        )
        assert of([0, 6, 0, 6], real) == pytest.approx(0, abs=1e-3)
        assert apart < of([7, 1, 8, 2], real), "draws of one picture do not answer for another"


def test_ends_know_how_their_score_depends_on_them(score: PictureScore, latents: Tensor) -> None:
    drawn = latents[[1, 7, 2, 8]].clone().requires_grad_()
    with torch.no_grad():
        real = score.look(latents[[0, 6]], 1)
    score.continued(score.look(drawn, 1), real).backward()
    assert drawn.grad is not None
    assert torch.isfinite(drawn.grad).all()
    assert drawn.grad.flatten(1).any(1).all()


def test_a_class_without_latents(latents: Tensor) -> None:
    with pytest.raises(ValueError, match="no latents of the classes 1"):
        PictureScore(ParScaleEAR.from_pretrained(), latents[:6], torch.tensor([0] * 5 + [2]))


def test_what_was_seen_is_kept(latents: Tensor, score: PictureScore, tmp_path: Path) -> None:
    cache = tmp_path / "features.safetensors"
    first = PictureScore(ParScaleEAR.from_pretrained(), latents, LABELS, cache=cache)
    assert cache.exists()
    written = cache.stat().st_mtime_ns
    again = PictureScore(ParScaleEAR.from_pretrained(), latents, LABELS, cache=cache)
    assert cache.stat().st_mtime_ns == written
    for a, b in zip(first.real[0][0], again.real[0][0], strict=True):
        assert torch.equal(a, b)
    other = PictureScore(ParScaleEAR.from_pretrained(), latents.flip(0), LABELS, cache=cache)
    assert cache.stat().st_mtime_ns != written
    assert not torch.equal(other.real[0][0][0], first.real[0][0][0])
    assert total(first, latents, LABELS) == pytest.approx(total(score, latents, LABELS), abs=1e-5)
    written = cache.stat().st_mtime_ns
    sharp = ParScaleEAR.from_pretrained(decoder="sharp")  # of the same latents
    PictureScore(sharp, latents.flip(0), LABELS, cache=cache)
    assert cache.stat().st_mtime_ns != written
    for precision, kept in (("bf16", False), ("bf16", True), ("fp32", False)):
        written = cache.stat().st_mtime_ns
        PictureScore(sharp, latents, LABELS, cache=cache, precision=precision)
        assert (cache.stat().st_mtime_ns == written) == kept, "another precision sees others"


@pytest.mark.usefixtures("one_thread")
def test_processes_share_the_looking(latents: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    class OneOf(OneProcess):
        """A process that keeps what it would tell the others."""

        def __init__(self, rank: int, size: int) -> None:
            super().__init__(torch.device("cpu"))
            self.rank, self.size = rank, size
            self.told: list[Tensor] = []

        def mean_(self, tensors: Iterable[Tensor]) -> None:
            self.told += [part.clone() for part in tensors]

    monkeypatch.setattr(picture_energy, "BATCH", 5)  # three batches
    for size in (2, 4):  # of four processes one has nothing to look at
        worlds = [OneOf(rank, size) for rank in range(size)]
        for world in (alone := OneOf(0, 1), *worlds):
            PictureScore(ParScaleEAR.from_pretrained(), latents, LABELS, world=world)
        assert len(alone.told) == len(worlds[0].told) > 3
        for whole, *shares in zip(alone.told, *(world.told for world in worlds), strict=True):
            assert torch.equal(torch.stack(shares).sum(0), whole)
            assert all(not torch.equal(share, whole) for share in shares)


def test_lite0_sees_pictures_changed_and_keeps_their_gradient(
    score: PictureScore, latents: Tensor
) -> None:
    drawn = latents[:2].clone().requires_grad_()
    seen = [score.look(drawn, 0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(seen[0].pictures, seen[2].pictures)
    assert torch.equal(seen[0].maps[0], seen[1].maps[0])
    assert not torch.equal(seen[0].maps[0], seen[2].maps[0])
    seen[0].maps[-1].mean().backward()
    assert drawn.grad is not None
    assert drawn.grad.any()
    large = score.look(latents[:2], 1)
    assert large.maps[0].shape[-1] == round(SIZES[1] * 32) // 2


@pytest.mark.parametrize("size", [0, 1])
def test_the_classifier_knows_the_classes(score: PictureScore, latents: Tensor, size: int) -> None:
    def of_class(labels: Tensor) -> float:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            _, parts = score(score.look(latents, size, generator), labels, generator)
        return float(parts["class"])

    assert of_class(LABELS) < 0.4  # by chance 0.69
    assert of_class(1 - LABELS) > 1


def test_the_classifier_counts_by_its_weight(score: PictureScore, latents: Tensor) -> None:
    weighted = PictureScore(ParScaleEAR.from_pretrained(), latents, LABELS, class_weight=3.0)
    generator = torch.Generator().manual_seed(0)  # as ``total``'s
    with torch.no_grad():
        _, parts = score(score.look(latents, 0, generator), 1 - LABELS, generator)
    expected = total(score, latents, 1 - LABELS)
    found = total(weighted, latents, 1 - LABELS)
    assert found - expected == pytest.approx(3 * float(parts["class"]), rel=1e-4)


def test_lite0s_view_moves_pictures_within_bounds_and_tints_them() -> None:
    pictures = torch.full((40, 3, 32, 32), -0.5)
    pictures[:, :, 16, 16] = 1.0
    pictures[:, 0] += 0.2
    seen = _changed(pictures, torch.Generator().manual_seed(0))
    brightest = seen.mean(1).flatten(1).argmax(1)
    rows, columns = brightest // 32 - 16, brightest % 32 - 16
    for places in (rows, columns):
        assert int(places.abs().max()) == round(SHIFT * 32)
        assert len(places.unique()) == 2 * round(SHIFT * 32) + 1
    means = seen.mean((2, 3))  # (40, 3)
    assert 0.05 < float(means[:, 1].std()) < BRIGHTNESS
    tints = means[:, 0] - means[:, 1]  # 0.2 where nothing is changed
    assert float(tints.std()) > 0.01
    assert float((tints - 0.2).abs().max()) < 0.2 * (SATURATION + CONTRAST + SATURATION * CONTRAST)

"""What the stages of an EnergyAR's training score, step by step, on tiny latents of two classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.cli import main
from parscale_ear.generator.ear import EnergyAR
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.training import ear_tasks
from parscale_ear.training.distributed import OneProcess
from parscale_ear.training.ear import load_latents
from parscale_ear.training.ear_recipe import EARRecipe
from parscale_ear.training.ear_tasks import EARTask, PicturesTask
from parscale_ear.training.loop import Precision
from parscale_ear.training.picture_critic import PictureCritic
from parscale_ear.training.picture_energy import PictureScore

pytest.importorskip("timm", reason="training needs the extra 'train'")


class Made:
    """A fresh generator and its task, on all latents."""

    def __init__(self, recipe: EARRecipe, folder: Path, kind: type[EARTask] = EARTask) -> None:
        autoencoder = ParScaleEAR.from_pretrained()
        self.store, held_out, classes = load_latents(recipe, autoencoder.latent_fingerprint())
        channels, side = self.store.latents.shape[2:4]
        torch.manual_seed(0)
        config = recipe.config(classes, channels=channels, side=side)
        self.model = EnergyAR(config).attach(autoencoder)
        self.model.pyramid.fit(self.store.latents.flatten(0, 1))
        world = OneProcess(torch.device("cpu"))
        self.task = kind(self.model, self.store, held_out, recipe, folder, world)

    def found(self, first: Tensor) -> list[list[int]]:
        """Of the first token (B, 1, Z) of latents: in which entry of the store each is, and side."""
        own = self.model.pyramid.encode(self.store.latents.flatten(0, 1))[0]
        same = (first[:, None] - own[None]).abs().amax((2, 3)) < 1e-5  # (B, 2N)
        assert (same.sum(1) == 1).all()
        return [list(divmod(int(number), 2)) for number in same.int().argmax(1)]


def test_scales_count_alike_where_asked(recipe: EARRecipe, tmp_path: Path) -> None:
    made = Made(recipe, tmp_path)
    task, model = made.task, made.model
    by_token, figures = task.tokens_loss(0, 4)
    by_scale, _ = task.tokens_loss(0, 4, by_scale=True)
    means = [float(figures[f"scale{k}"]) for k in range(len(figures))]
    bands = [1 if scale.level == 0 else 3 * len(scale.cells) for scale in model.pyramid.scales]
    assert float(by_scale.detach()) == pytest.approx(np.mean(means), rel=1e-5)
    assert float(by_token.detach()) == pytest.approx(np.average(means, weights=bands), rel=1e-5)
    assert float(by_scale.detach()) != pytest.approx(float(by_token.detach()), rel=1e-3)


def test_muon_gets_the_blocks_and_no_tables(recipe: EARRecipe, tmp_path: Path) -> None:
    made = Made(recipe, tmp_path)
    tables = {id(p) for p in made.task.elementwise()}
    matrices = {name: p for name, p in made.model.named_parameters() if p.ndim > 1}
    theirs = {name for name, p in matrices.items() if id(p) not in tables}
    maps = {
        name for name in matrices
        if ".blocks." in name or "modulation" in name or name == "head.hidden.weight"
    }  # fmt: skip
    assert theirs == maps


def test_tokens_are_scored_as_the_recipe_says(
    recipe: EARRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(
        recipe, batch=300, samples=3, alpha=1.3, train_temperature=0.7, input_noise=0.2,
        label_dropout=0.4,
    )  # fmt: skip
    made = Made(asked, tmp_path)
    seen: list[Any] = []
    plain = EnergyAR.scores

    def scores(self: EnergyAR, labels: Tensor, latents: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((labels, latents, options))
        return plain(self, labels, latents, *rest, **options)

    monkeypatch.setattr(EnergyAR, "scores", scores)
    made.task.loss(3)
    ((labels, latents, options),) = seen
    names = ("samples", "alpha", "temperature", "input_noise")
    assert [options[name] for name in names] == [3, 1.3, 0.7, 0.2]
    places = made.found(made.model.pyramid.encode(latents)[0])
    mirrored = sum(side for _, side in places) / len(places)
    null = made.model.transformer.null_label
    unlabelled = float((labels == null).float().mean())
    assert 0.4 < mirrored < 0.6  # three deviations each way
    assert 0.31 < unlabelled < 0.49
    for label, (number, _) in zip(labels.tolist(), places, strict=True):
        assert label in (null, int(made.store.labels[number]))


def test_scored_latents_have_the_noise_asked_for(
    recipe: EARRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    plain = EnergyAR.scores

    def scores(self: EnergyAR, labels: Tensor, latents: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append(latents)
        return plain(self, labels, latents, *rest, **options)

    monkeypatch.setattr(EnergyAR, "scores", scores)
    made = Made(recipe, tmp_path)
    noisy = Made(replace(recipe, latent_noise=0.3), tmp_path).task
    for task, step in ((made.task, 3), (noisy, 3), (noisy, 3), (noisy, 4), (made.task, 4)):
        task.tokens_loss(step, 200)
    clean, first, again, second, clean_second = seen
    assert torch.equal(first, again)
    noise = first - clean
    assert float(noise.std()) == pytest.approx(0.3, rel=0.03)
    assert abs(float(noise.mean())) < 0.02
    other = second - clean_second
    assert abs(float((noise * other).mean())) < 0.01


def test_drawn_pictures_go_on_from_real_ones_where_asked(
    recipe: EARRecipe, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = str(tmp_path / "latents")  # 4×4: six scales
    assert main(["encode", str(pictures), larger, "--side", "64", "--mirror"]) == 0
    asked = replace(recipe, latents=larger, validation=larger, picture_known=2, picture_pairs=0)
    made = Made(asked, tmp_path, PicturesTask)
    pyramid, counts = made.model.pyramid, set()
    begun: list[tuple[Tensor, list[Tensor]]] = []
    shown: list[Tensor] = []
    plain, critic = EnergyAR.draw_with_gradient, PictureCritic.forward

    def draw(self: EnergyAR, labels: Tensor, *rest: Any) -> Tensor:
        begun.append((labels, rest[1]))
        return plain(self, labels, *rest)

    def spy(self: PictureCritic, maps: list[Tensor], *rest: Any) -> list[Tensor]:
        shown.append(maps[-1])
        return critic(self, maps, *rest)

    monkeypatch.setattr(EnergyAR, "draw_with_gradient", draw)
    monkeypatch.setattr(PictureCritic, "forward", spy)
    for step in range(8):
        begun.clear()
        shown.clear()
        made.task.loss(step)
        ((labels, known),) = begun
        counts.add(len(known))
        real, drawn = shown[0].chunk(2)  # what the critic learns from: real pictures, drawn ones
        for label, (number, _) in zip(labels.tolist(), made.found(known[0]), strict=True):
            assert label == int(made.store.labels[number])
        for latents in (real, drawn):
            tokens = pyramid.encode(latents.detach())
            for own, given in zip(tokens, known, strict=False):
                torch.testing.assert_close(own, given, rtol=0, atol=1e-4)
        assert (real - drawn).abs().amax((1, 2, 3)).min() > 0.1  # drawn, not copied
    assert counts == {1, 2}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_real_pictures_are_seen_in_the_precision_asked_for(
    recipe: EARRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    seen: list[bool] = []
    plain = PictureScore.look

    def spy(self: PictureScore, *rest: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return plain(self, *rest)

    monkeypatch.setattr(PictureScore, "look", spy)
    Made(replace(recipe, precision=precision, adversarial_weight=0.0), tmp_path, PicturesTask)
    assert seen
    assert set(seen) == {precision == "bf16"}


def test_streams_own_scores_count_beside_the_joined_ones(recipe: EARRecipe, tmp_path: Path) -> None:
    made = Made(recipe, tmp_path)
    streams = ParallelStreams.fitting(made.model.config.transformer, 2, prefix_tokens=2)
    world = OneProcess(torch.device("cpu"))
    task = EARTask(made.model, made.store, made.store, recipe, tmp_path, world, streams)
    loss, figures = task.loss(0)
    assert float(figures["each"]) > 0.1
    own = float(loss.detach()) - float(figures["joined"])
    assert own == pytest.approx(0.5 * float(figures["each"]), rel=1e-4)


def test_real_pictures_that_the_critic_sees_do_not_repeat(
    recipe: EARRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at how much a group of a class differs."""
    made = Made(replace(recipe, picture_draws=6, picture_pairs=0), tmp_path, PicturesTask)
    shown: list[np.ndarray] = []
    plain = PicturesTask._latents

    def spy(self: PicturesTask, numbers: Any, rng: Any) -> Tensor:
        shown.append(numbers)
        return plain(self, numbers, rng)

    monkeypatch.setattr(PicturesTask, "_latents", spy)
    for step in range(3):
        made.task.loss(step)
    assert len(shown) == 3
    for numbers in shown:  # six of each class, of which there are six
        assert sorted(numbers) == list(range(12))


def test_a_steps_pictures_and_tokens_are_drawn_apart(
    recipe: EARRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(recipe, tmp_path, PicturesTask)
    begun: list[list[int]] = []
    plain = np.random.default_rng

    def spy(entropy: list[int]) -> np.random.Generator:
        begun.append(plain(entropy).integers(2**32, size=4).tolist())
        return plain(entropy)

    monkeypatch.setattr(np.random, "default_rng", spy)
    made.task.loss(0)
    assert len(begun) == len({tuple(numbers) for numbers in begun}) > 1


def test_pictures_go_on_from_real_ones_of_their_class(
    recipe: EARRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(recipe, picture_pairs=6, adversarial_weight=0.0)
    made = Made(asked, tmp_path, PicturesTask)
    continued: list[Any] = []
    sizes: list[int] = []
    plain, look = EnergyAR.draw_with_gradient, PictureScore.look

    def draw(self: EnergyAR, labels: Tensor, *rest: Any, **options: Any) -> Tensor:
        if rest[1]:
            continued.append((labels, rest[1][0]))
        return plain(self, labels, *rest, **options)

    def spy(self: PictureScore, latents: Tensor, size: int, *rest: Any) -> Any:
        sizes.append(size)
        return look(self, latents, size, *rest)

    monkeypatch.setattr(EnergyAR, "draw_with_gradient", draw)
    monkeypatch.setattr(PictureScore, "look", spy)
    for step in range(ear_tasks.LARGE_EVERY):
        made.task.loss(step)
    assert len(continued) == ear_tasks.LARGE_EVERY
    drawn = set()
    for labels, first in continued:
        for label, (number, _) in zip(labels.tolist(), made.found(first), strict=True):
            assert label == int(made.store.labels[number])
            drawn.add(label)
    assert drawn == {0, 1}
    assert set(sizes) == {0, 1}  # Lite0 sees some pictures at its larger size


def test_the_critics_scales_are_those_of_all_pictures_whatever_the_batch(
    recipe: EARRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(
        PictureCritic, "fit", lambda self, maps: seen.append([len(part) for part in maps])
    )
    monkeypatch.setattr(ear_tasks, "BATCH", 5)
    made = Made(recipe, tmp_path, PicturesTask)
    assert seen == [[len(made.store)] * 5]

"""The generator's recipe on tiny pictures of two classes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from parscale_ear import __version__, checkpoint
from parscale_ear.cli import main
from parscale_ear.data.images import find_images, from_uint8, to_uint8
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.generator.var import VAR
from parscale_ear.generator.vqvae import VQVAE, VQVAEConfig
from parscale_ear.metrics.reconstruction import mean_quality
from parscale_ear.training.distributed import OneProcess
from parscale_ear.training.folder import split_pictures
from parscale_ear.training.generator import load_labelled, train_var
from parscale_ear.training.generator_recipe import VARRecipe
from parscale_ear.training.generator_tasks import (
    IDLE_STEPS,
    TokenizerTask,
    TokenStore,
    token_losses,
)
from parscale_ear.training.loop import CHECKPOINT_FILE, TrainingError, read_log
from parscale_ear.training.stream_worth import summarise

pytest.importorskip("timm", reason="training needs the extra 'train'")


Killed = Callable[[int, Callable[[], object]], None]  # conftest.py
OneThread = Callable[[Callable[[], bool]], bool]  # likewise


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of 16×16, bright at the bottom or at the top."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for label, rows in (("bottom", slice(8, 16)), ("top", slice(0, 8))):
        (folder / label).mkdir()
        for index in range(6):
            pixels = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
            pixels[rows] += 150
            Image.fromarray(pixels).save(folder / label / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def recipe(pictures: Path) -> VARRecipe:
    return VARRecipe(
        images=(str(pictures),),
        validation=(str(pictures),),
        minutes=None,
        steps=30,
        stream_steps=4,
        streams=(1, 2),
        side=16,
        sides=(1, 2, 4),
        vocabulary=16,
        latent_channels=4,
        tokenizer_width=8,
        depth=2,
        width=16,
        heads=2,
        prefix_tokens=2,
        batch=8,
        feature_weight=0.0,
        precision="fp32",
    )


@pytest.fixture(scope="module")
def trained(
    recipe: VARRecipe, tmp_path_factory: pytest.TempPathFactory, with_one_thread: OneThread
) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert with_one_thread(lambda: train_var(recipe, out))  # its bits are compared below
    return out


def test_a_run_leaves_what_it_says(trained: Path) -> None:
    var = VAR.from_pretrained(trained / "var.safetensors")
    streams = ParallelStreams.from_pretrained(trained / "streams2.safetensors")
    images = var.generate([0, 1], streams=streams, generator=torch.Generator().manual_seed(0))
    assert images.shape == (2, 2, 3, 16, 16)
    for stage in ("tokenizer", "var", "streams2"):
        assert read_log(trained / stage)[-1]["finished"]
        assert list((trained / stage).glob("*.png"))
        told = checkpoint.load(trained / f"{stage}.safetensors")[1]["training"]
        assert (told["release"], told["torch"]) == (__version__, torch.__version__)
    result = json.loads((trained / "streams.json").read_text())
    assert {"device", "threads", "dtype", "trained_in", "date", "version"} <= result.keys()
    assert result["counts"] == [1, 2]
    assert result["pictures"] == 12
    assert result["minus_first"][0]["value"] == 0
    for row in (*result["each"], *result["minus_first"], result["slope_per_doubling"]):
        assert row["low"] <= row["value"] <= row["high"]


def test_the_backbone_stays_as_it_was(trained: Path) -> None:
    from parscale_ear import checkpoint

    var = VAR.from_pretrained(trained / "var.safetensors")
    tokenizer = VAR.from_pretrained(trained / "tokenizer.safetensors")
    assert checkpoint.load(trained / "streams2.safetensors")[1]["backbone"] == var.fingerprint()
    before = {k: v for k, v in tokenizer.state_dict().items() if k.startswith("vqvae.")}
    assert all(torch.equal(var.state_dict()[k], v) for k, v in before.items())
    assert var.fingerprint() != tokenizer.fingerprint()


def test_training_lowers_the_losses(pictures: Path, recipe: VARRecipe, tmp_path: Path) -> None:
    longer = replace(recipe, steps=500, streams=(2,), stream_steps=600, learning_rate=3e-3)
    assert train_var(longer, tmp_path / "run")
    squares, labels = load_labelled(find_images([str(pictures)]), 16, ["bottom", "top"])
    assert labels.tolist() == [0] * 6 + [1] * 6
    torch.manual_seed(0)
    fresh = VAR(longer.var_config(2)).vqvae
    with torch.no_grad():
        untrained = to_uint8(fresh.decode(fresh.encode(from_uint8(squares))))
    psnr = read_log(tmp_path / "run" / "tokenizer")[-1]["psnr_db"]
    assert psnr > mean_quality(untrained, squares)["psnr_db"] + 3
    var = VAR.from_pretrained(tmp_path / "run" / "var.safetensors")
    nats = read_log(tmp_path / "run" / "var")[-1]["validation_nats"]
    assert nats < 0.9 * np.log(16)
    halves = var.generate([0, 1], top_k=1).unflatten(2, (2, 8)).mean(dim=(1, 3, 4))  # (2, 2)
    assert halves[0, 1] > halves[0, 0] + 0.5  # the class is learnt
    assert halves[1, 0] > halves[1, 1] + 0.5
    # Streams learn: below any of five fresh ones on the same backbone.
    store = TokenStore(var.vqvae, squares, labels, torch.device("cpu"))

    def mean_loss(streams: ParallelStreams) -> float:
        return float(token_losses(var, store, streams, torch.device("cpu")).mean())

    untaught = []
    for seed in range(5):
        torch.manual_seed(seed)
        new = ParallelStreams.fitting(var.config.transformer, 2, prefix_tokens=2)
        untaught.append(mean_loss(new))
    learnt = ParallelStreams.from_pretrained(
        tmp_path / "run" / "streams2.safetensors", backbone=var.fingerprint()
    )
    assert mean_loss(learnt) < min(untaught) - 0.003


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("steps", [4, 18, 33])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    recipe: VARRecipe, trained: Path, tmp_path: Path, killed_after: Killed, steps: int
) -> None:
    out = tmp_path / "run"
    killed_after(steps, lambda: train_var(recipe, out))
    assert train_var(recipe, out, resume=True)
    for name in ("var", "streams2"):
        load = VAR.from_pretrained if name == "var" else ParallelStreams.from_pretrained
        whole, pieces = (load(folder / f"{name}.safetensors") for folder in (trained, out))
        for key, value in whole.state_dict().items():
            assert torch.equal(pieces.state_dict()[key], value), key


def test_another_recipe_is_refused(recipe: VARRecipe, trained: Path) -> None:
    with pytest.raises(TrainingError, match="already holds a run"):
        train_var(recipe, trained)
    with pytest.raises(TrainingError, match="another depth"):
        train_var(replace(recipe, depth=3), trained, resume=True)
    more = Path(recipe.images[0]) / "top" / "-.png"
    shutil.copy(more.with_name("0.png"), more)
    try:
        with pytest.raises(TrainingError, match="another pictures"):
            train_var(recipe, trained, resume=True)
    finally:
        more.unlink()


def test_weights_without_a_run_are_no_finished_stages(
    recipe: VARRecipe, trained: Path, tmp_path: Path
) -> None:
    for stored in ("tokenizer.safetensors", f"tokenizer/{CHECKPOINT_FILE}"):
        out = tmp_path / Path(stored).stem
        (out / stored).parent.mkdir(parents=True)
        shutil.copy(trained / stored, out / stored)
        with pytest.raises(TrainingError, match=f"holds {stored}, but no run"):
            train_var(recipe, out)
        assert [path.name for path in out.rglob("*.*")] == [Path(stored).name]


def test_too_small_a_side_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="side must be at least 11, got 8"):
        VARRecipe(images=("a",), side=8, sides=(1, 2, 4))


def test_the_only_picture_of_a_class_is_not_held_out(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = next(p for p in pictures.rglob("*") if p.is_file())
    for number in range(21):
        (tmp_path / f"{number:02d}").mkdir()
        shutil.copy(source, tmp_path / f"{number:02d}" / "a.png")
    for _ in range(2):
        shutil.copy(source, tmp_path / "19" / f"{_}.png")
    training, held = split_pictures([str(tmp_path)], [])
    assert {ref.label for ref in training} == {f"{number:02d}" for number in range(21)}
    assert [(ref.label, ref.relative) for ref in held] == [("19", "19/1.png")]
    assert not caplog.text
    assert len(split_pictures([str(tmp_path)], [str(tmp_path / "19")])[1]) == 3
    assert "3 of the validation pictures are trained on, too" in caplog.text
    caplog.clear()
    split_pictures([str(tmp_path / "18")], [str(tmp_path / "19")])
    assert not caplog.text
    few, same = split_pictures([str(source)], [])
    assert "too few pictures to hold some out (1)" in caplog.text
    assert [ref.name for ref in few] == [ref.name for ref in same]


def test_pictures_without_classes_are_refused(
    recipe: VARRecipe, pictures: Path, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(pictures, mixed)
    shutil.copy(next(p for p in pictures.rglob("*") if p.is_file()), mixed / "loose.png")
    with pytest.raises(TrainingError, match=r"loose\.png has no class"):
        train_var(replace(recipe, images=(str(mixed),)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_per_picture_losses_are_the_logits_cross_entropies(trained: Path) -> None:
    var = VAR.from_pretrained(trained / "var.safetensors")
    squares = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    store = TokenStore(var.vqvae, squares, torch.tensor([0, 1, 1]), torch.device("cpu"))
    found = token_losses(var, store, None, torch.device("cpu"))
    tokens = store.scales(torch.tensor([1]), torch.tensor([0]), torch.device("cpu"))
    with torch.no_grad():
        logits = var.logits([1], tokens)
    target = torch.cat(tokens, dim=1)
    expected = torch.nn.functional.cross_entropy(logits[0], target[0])
    assert float(found[1]) == pytest.approx(float(expected), abs=1e-5)
    mirrored = var.vqvae.encode(squares[:1].flip(-1).float() / 127.5 - 1)
    assert torch.equal(
        torch.cat(store.scales(torch.tensor([0]), torch.tensor([1]), torch.device("cpu")), 1),
        torch.cat(mirrored, 1),
    )


def test_straight_through_gradient_and_quantisers_loss() -> None:
    vqvae = VQVAE(VQVAEConfig(vocabulary=8, latent_channels=4, width=8, multipliers=(1, 1),
                              blocks=1, groups=8, sides=(1, 2)))  # fmt: skip
    latent = torch.randn(2, 4, 2, 2, requires_grad=True)
    total, distance = vqvae.quantizer.quantise(latent)
    torch.testing.assert_close(total, vqvae.quantizer.decode(vqvae.quantizer.encode(latent)))
    (gradient,) = torch.autograd.grad(total.sum(), latent, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(latent))
    distance.backward()
    assert vqvae.quantizer.codebook.weight.grad is not None
    assert bool(vqvae.quantizer.codebook.weight.grad.any())
    assert latent.grad is not None
    assert bool(latent.grad.any())


def test_the_quantisers_loss_is_that_of_the_paper() -> None:
    """One scale: squared error to the nearest vector, and a quarter of it for the encoder."""
    vqvae = VQVAE(VQVAEConfig(vocabulary=8, latent_channels=4, width=8, multipliers=(1, 1),
                              blocks=1, groups=8, sides=(2,)))  # fmt: skip
    latent = torch.randn(3, 4, 2, 2, requires_grad=True)
    total, loss = vqvae.quantizer.quantise(latent)
    error = total.detach() - latent.detach()
    assert float(loss.detach()) == pytest.approx(1.25 * float(error.square().mean()), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(latent.grad, -0.25 * 2 * error / error.numel())


def test_a_tokenizer_alone_draws_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid.png"
    for name, code in (("tokenizer", 2), ("var", 0)):
        weights = str(trained / f"{name}.safetensors")
        assert (
            main(["generate", "--checkpoint", weights, "--class", "0", "--out", str(out)]) == code
        )
        assert ("name var.safetensors" in capsys.readouterr().err) == (name == "tokenizer")
        assert out.exists() == (name == "var")


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="several processes need the extra 'train'")
    common = [
        *("parscale_ear.cli", "train", "var", "--images", str(pictures), "--device", "cpu"),
        *("--validation", str(pictures), "--steps", "40", "--stream-steps", "10"),
        *("--side", "16", "--sides", "1", "2", "4", "--vocabulary", "16", "--streams", "2"),
        *("--latent-channels", "4", "--tokenizer-width", "8", "--depth", "2", "--width", "16"),
        *("--heads", "2", "--prefix-tokens", "2", "--feature-weight", "0", "--precision", "fp32"),
    ]
    two = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]

    def run(name: str, batch: int, launcher: list[str], *more: str) -> Path:
        out = tmp_path / name
        options = ["--batch", str(batch), "--out", str(out), *more]
        done = subprocess.run(
            [sys.executable, "-m", *launcher, *common, *options],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return out

    alone = run("alone", 8, [])
    (tmp_path / "together").mkdir()  # with the same tokenizer: its codebook starts by chance
    shutil.copy(alone / "tokenizer.safetensors", tmp_path / "together")
    together = run("together", 4, two, "--resume")
    for name in ("var", "streams2"):
        load = VAR.from_pretrained if name == "var" else ParallelStreams.from_pretrained
        ours, theirs = (load(d / f"{name}.safetensors").state_dict() for d in (alone, together))
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, atol=2e-4, rtol=1e-3)
    apart = run("apart", 4, two)  # the tokenizer, too, trains in two processes
    tokenizer = VAR.from_pretrained(apart / "tokenizer.safetensors").vqvae.quantizer.codebook
    assert bool(torch.isfinite(tokenizer.weight).all())
    psnr = [read_log(out / "tokenizer")[-1]["psnr_db"] for out in (alone, apart)]
    assert psnr[1] == pytest.approx(psnr[0], abs=1)


def test_idle_codebook_vectors_are_put_where_vectors_are_looked_up(tmp_path: Path) -> None:
    recipe = VARRecipe(images=("a",), side=16, sides=(1, 2, 4), vocabulary=8, latent_channels=4,
                       tokenizer_width=8, batch=4, feature_weight=0.0)  # fmt: skip
    vqvae = VAR(recipe.var_config(2)).vqvae
    with torch.no_grad():
        vqvae.quantizer.codebook.weight[3:] = 1e6  # never the nearest
    squares = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)
    world = OneProcess(torch.device("cpu"))
    task = TokenizerTask(vqvae, squares, squares, recipe, tmp_path, world)
    task.idle.zero_()
    for step in range(IDLE_STEPS):
        task.loss(step)
    assert task.idle[3:].tolist() == [IDLE_STEPS] * 5
    assert bool((task.idle[:3] < IDLE_STEPS).any())
    assert bool((vqvae.quantizer.codebook.weight[3:] == 1e6).all())
    task.loss(IDLE_STEPS)
    assert bool((vqvae.quantizer.codebook.weight.abs() < 1e3).all())
    tensors, scalars = task.state()
    other = TokenizerTask(vqvae, squares, squares, recipe, tmp_path, world)
    other.load_state(tensors, scalars)
    assert torch.equal(other.idle, task.idle)


def test_slope_and_differences() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(5, 1, 400)
    losses = np.stack([base, base - 0.1, base - 0.2, base - 0.3])
    result = summarise([1, 2, 4, 8], losses, 0)
    assert result["slope_per_doubling"]["value"] == pytest.approx(-0.1)
    assert result["slope_per_doubling"]["high"] < -0.09
    assert result["minus_first"][2]["low"] == pytest.approx(-0.2)
    step = summarise([1, 2, 4, 8], np.stack([base, base - 1, base - 1, base - 1]), 0)
    assert step["slope_per_doubling"]["high"] < 0
    assert step["slope_from_two_streams"]["value"] == pytest.approx(0)
    none = summarise([1, 2, 4, 8], base + rng.normal(0, 1, (4, 400)), 0)
    assert none["slope_per_doubling"]["low"] < 0 < none["slope_per_doubling"]["high"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sides", "1", "2", "5"], "side must be 2, 4, 8"),
        (["--sides", "1", "2", "0"], "sides must be positive"),
        (["--sides", "2", "1", "4"], "sides must be positive"),
        (["--prefix-tokens", "-1"], "prefix_tokens must be at least 0"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--seed", str(2**32)], "below 2^32"),
        (["--vocabulary", "0"], "vocabulary must be at least 1"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--steps", "-5"], "steps must be at least 1"),
        (["--streams", "0"], "streams must be at least 1"),
        (["--heads", "5"], "multiple of heads"),
        (["--images", "none"], "none"),
    ],
)
def test_wrong_use_is_one_line(
    words: list[str],
    message: str,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = [] if "--images" in words else ["--images", str(pictures)]
    out = tmp_path / "run"
    code = main(["train", "var", "--side", "16", "--out", str(out), "--device", "cpu",
                 *(["--sides", "1", "2", "4"] if "--sides" not in words else []),
                 *images, *words])  # fmt: skip
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("parscale-ear: ")
    assert not out.exists()


def test_a_training_that_diverges_is_no_wrong_use(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        "parscale_ear.training.generator_tasks.log_mse_loss",
        lambda restored, images: restored.mean() * float("nan"),
    )
    words = ["train", "var", "--images", str(pictures), "--side", "16", "--sides", "1", "2", "4"]
    words += ["--steps", "3", "--streams", "--feature-weight", "0", "--tokenizer-width", "8"]
    assert main([*words, "--out", str(tmp_path / "run"), "--device", "cpu"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("parscale-ear: the loss became nan at step")

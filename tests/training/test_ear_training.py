"""The EnergyAR's recipe on tiny latents of two classes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from parscale_ear import __version__, checkpoint
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.checkpoint import CheckpointError
from parscale_ear.cli import main
from parscale_ear.data.latents import INDEX_FILE
from parscale_ear.generator.ear import RECOMMENDED, EnergyAR
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.training import ear_tasks
from parscale_ear.training.distributed import OneProcess
from parscale_ear.training.ear import compare_streams, load_latents, load_streamed, train_ear
from parscale_ear.training.ear_recipe import EARRecipe
from parscale_ear.training.loop import TrainingError, read_log

pytest.importorskip("timm", reason="training needs the extra 'train'")


Killed = Callable[[int, Callable[[], object]], None]  # conftest.py
OneThread = Callable[[Callable[[], bool]], bool]  # likewise


@pytest.fixture(scope="module")
def trained(
    recipe: EARRecipe, tmp_path_factory: pytest.TempPathFactory, with_one_thread: OneThread
) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert with_one_thread(lambda: train_ear(recipe, out))  # its bits are compared below
    return out


def test_a_run_leaves_what_it_says(trained: Path) -> None:
    first = EnergyAR.load(trained / "ear.safetensors")
    model = EnergyAR.from_pretrained(trained / "pictures.safetensors")
    assert first.fingerprint() != model.fingerprint()
    assert model.config.class_names == ("bottom", "top")
    told = checkpoint.load(trained / "pictures.safetensors")[1]["training"]
    assert (told["recipe"]["latents"], told["recipe"]["start"]) == ("cache", None)
    assert "/" not in json.dumps(told)  # no paths of this machine
    assert (told["release"], told["torch"]) == (__version__, torch.__version__)
    streams = ParallelStreams.from_pretrained(
        trained / "streams2.safetensors", backbone=model.fingerprint()
    )
    images = model.generate([0], streams=streams, generator=torch.Generator().manual_seed(0))
    assert images.shape == (1, 2, 3, 32, 32)
    for stage in ("ear", "pictures", "streams2"):
        assert read_log(trained / stage)[-1]["finished"]
        assert list((trained / stage).glob("*.png"))
    result = json.loads((trained / "streams.json").read_text())
    assert {"device", "threads", "dtype", "date", "version"} <= result.keys()
    assert result["counts"] == [1, 2]
    assert result["pictures"] == 12
    assert result["minus_first"][0]["value"] == 0
    for row in (*result["each"], *result["minus_first"], result["slope_per_doubling"]):
        assert row["low"] <= row["value"] <= row["high"]


def test_what_streams_are_worth_is_measured_in_fp32_however_they_were_trained(
    recipe: EARRecipe, trained: Path
) -> None:
    store = load_latents(recipe, ParScaleEAR.from_pretrained().latent_fingerprint())[1]
    asked, world = replace(recipe, precision="bf16"), OneProcess(torch.device("cpu"))
    expected = compare_streams(recipe, trained, store, world)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = compare_streams(asked, trained, store, world)
    assert (result["dtype"], result["trained_in"]) == ("float32", "bfloat16 autocast")
    assert result["each"] == expected["each"]


def test_settings_that_were_chosen_for_other_weights_are_not_recommended(
    recipe: EARRecipe, trained: Path, tmp_path: Path
) -> None:
    start = EnergyAR.load(trained / "ear.safetensors")
    start.recommended = {"guidance": 0.5, "temperature": 0.7}
    path = str(start.save_pretrained(tmp_path / "start.safetensors"))
    asked = replace(
        recipe, start=path, minutes=0, steps=None, picture_steps=0, streams=(1,), stream_steps=1,
        train_backbone=True,
    )  # fmt: skip
    assert asked.stages() == ("streams1",)
    assert train_ear(asked, tmp_path / "run")
    assert EnergyAR.load(tmp_path / "run" / "ear1.safetensors").recommended == RECOMMENDED


def test_the_critic_takes_part_where_it_has_weight(
    recipe: EARRecipe, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ear_tasks, "CRITIC_WARMUP", 1)
    start = str(trained / "ear.safetensors")
    found = {}
    for weight in (0.0, 50.0):
        out = tmp_path / str(weight)
        asked = replace(
            recipe, start=start, minutes=0, steps=None, streams=(), adversarial_weight=weight
        )
        assert train_ear(asked, out)
        tensors, _ = checkpoint.load(out / "pictures" / "checkpoint.safetensors")
        critic = [name for name in tensors if name.startswith("task.critic.")]
        assert bool(critic) == bool(weight)
        found[weight] = tensors["model.transformer.start"]
    assert not torch.equal(found[0.0], found[50.0])


def test_pairs_take_part_where_there_are_some(
    recipe: EARRecipe, trained: Path, tmp_path: Path
) -> None:
    start, found = str(trained / "ear.safetensors"), {}
    for pairs in (0, 2):
        out = tmp_path / str(pairs)
        asked = replace(
            recipe,
            start=start,
            minutes=0,
            steps=None,
            streams=(),
            picture_pairs=pairs,
            picture_rate=0.01,
        )
        assert train_ear(asked, out)
        found[pairs] = checkpoint.load(out / "pictures" / "checkpoint.safetensors")[0]
    names = [name for name in found[0] if name.startswith("model.")]
    assert names
    assert any(not torch.equal(found[0][name], found[2][name]) for name in names)


def test_more_scales_known_than_are_drawn_are_refused(recipe: EARRecipe, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="leave one of the 2 scales"):
        train_ear(replace(recipe, picture_known=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_averaged_weights_are_what_is_kept(trained: Path) -> None:
    for stage in ("ear", "pictures"):
        tensors = checkpoint.load(trained / stage / "checkpoint.safetensors")[0]
        kept = EnergyAR.load(trained / f"{stage}.safetensors").state_dict()
        for kind, expected in (("average", True), ("model", False)):
            same = [torch.equal(kept[name], tensors[f"{kind}.{name}"]) for name in kept]
            assert all(same) == expected, (stage, kind)


def test_training_learns_the_classes(recipe: EARRecipe, tmp_path: Path) -> None:
    longer = replace(
        recipe, steps=400, streams=(), picture_steps=0, learning_rate=5e-3, width=32, head_width=32,
        noise_channels=8, batch=12,
    )  # fmt: skip
    assert train_ear(longer, tmp_path / "run")
    model = EnergyAR.from_pretrained(tmp_path / "run" / "ear.safetensors")
    images = model.generate(
        [0] * 4 + [1] * 4, guidance=1.0, generator=torch.Generator().manual_seed(0)
    )
    halves = images.mean(dim=1).unflatten(1, (2, 16)).mean(dim=(2, 3))  # (8, 2)
    lower_minus_upper = halves[:, 1] - halves[:, 0]
    assert float(lower_minus_upper[:4].mean()) > 0.3
    assert float(lower_minus_upper[4:].mean()) < -0.3


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_latents_of_any_dtype_are_trained_on(
    recipe: EARRecipe, pictures: Path, tmp_path: Path, dtype: str
) -> None:
    out = tmp_path / dtype
    words = ["encode", str(pictures), str(out), "--side", "32", "--mirror", "--dtype", dtype]
    assert main([*words, "--device", "cpu"]) == 0
    tiny = replace(recipe, latents=str(out), validation=str(out), steps=2, streams=())
    assert train_ear(tiny, tmp_path / "run")
    assert read_log(tmp_path / "run" / "pictures")[-1]["finished"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("steps", [7, 21, 25])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    recipe: EARRecipe, trained: Path, tmp_path: Path, killed_after: Killed, steps: int
) -> None:
    out = tmp_path / "run"
    killed_after(steps, lambda: train_ear(recipe, out))
    assert train_ear(recipe, out, resume=True)
    for name in ("ear", "pictures", "streams2"):
        load = EnergyAR.load if name != "streams2" else ParallelStreams.from_pretrained
        whole, pieces = (load(folder / f"{name}.safetensors") for folder in (trained, out))
        for key, value in whole.state_dict().items():
            assert torch.equal(pieces.state_dict()[key], value), key


def test_goes_on_from_given_weights(
    recipe: EARRecipe, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = str(trained / "ear.safetensors")
    tiny = replace(recipe, start=start, steps=1, streams=(), picture_steps=0, learning_rate=1e-9)
    assert train_ear(tiny, tmp_path / "run")
    before, after = (EnergyAR.load(f / "ear.safetensors") for f in (trained, tmp_path / "run"))
    for key, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[key], value, atol=1e-5, rtol=1e-5)
    second = replace(recipe, start=start, minutes=0, steps=None, streams=(1, 2))
    assert second.stages() == ("pictures", "streams1", "streams2")
    assert train_ear(second, tmp_path / "second")
    assert not (tmp_path / "second" / "ear.safetensors").exists()
    foreign = EnergyAR.load(start)
    foreign.latent_fingerprint = "0" * 64
    foreign.recommended = {"guidance": 0.5, "temperature": 0.7}
    other = foreign.save_pretrained(tmp_path / "foreign.safetensors")
    alone = replace(tiny, start=str(other), minutes=0, steps=None, streams=(1, 2))
    with pytest.raises(TrainingError, match=r"latents of another autoencoder; train the generator"):
        train_ear(alone, tmp_path / "foreign")
    assert not (tmp_path / "foreign").exists()
    assert "another autoencoder" not in caplog.text
    assert train_ear(replace(tiny, start=str(other)), tmp_path / "foreign")
    assert "foreign.safetensors was trained on latents of another autoencoder" in caplog.text
    ours = EnergyAR.load(tmp_path / "foreign" / "ear.safetensors").latent_fingerprint
    assert ours == EnergyAR.load(start).latent_fingerprint
    # What was chosen for the old weights is not recommended for the new ones.
    assert EnergyAR.load(tmp_path / "foreign" / "ear.safetensors").recommended == RECOMMENDED
    with pytest.raises(TrainingError, match=r"another model.*depth is 1, not 2.*options"):
        train_ear(replace(tiny, depth=2), tmp_path / "deeper")


def test_streams_train_with_the_generator_or_on_a_frozen_one(
    recipe: EARRecipe, trained: Path, tmp_path: Path
) -> None:
    start = str(trained / "ear.safetensors")
    before = EnergyAR.load(start)
    frozen = replace(recipe, start=start, minutes=0, steps=None, picture_steps=0)
    for joint in (False, True):
        out = tmp_path / str(joint)
        asked = replace(frozen, train_backbone=joint)
        assert train_ear(asked, out)
        result = json.loads((out / "streams.json").read_text())
        assert result["steps"] == ([4, 4] if joint else [0, 4])
        assert result["backbone"] == ("trained with its streams" if joint else "frozen")
        for count in (1, 2):
            model, _ = load_streamed(asked, out, count, torch.device("cpu"))
            same = [
                torch.equal(value, model.state_dict()[key])
                for key, value in before.transformer.state_dict(prefix="transformer.").items()
            ]
            assert all(same) != joint
            if joint:  # the two numbers of streams have generators of their own
                assert read_log(out / f"streams{count}")[-1]["finished"]
    with pytest.raises(CheckpointError, match="another backbone"):
        ParallelStreams.from_pretrained(
            tmp_path / "True" / "streams2.safetensors", backbone=before.fingerprint()
        )


@pytest.mark.slow
def test_two_processes_train_all_stages(recipe: EARRecipe, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="several processes need the extra 'train'")
    words = {
        name: str(getattr(recipe, name))
        for name in (
            *("latents", "validation", "steps", "stream_steps", "picture_steps", "picture_classes"),
            *("picture_draws", "depth", "width", "heads", "head_width", "head_blocks"),
            *("noise_channels", "prefix_tokens", "precision"),
        )
    }
    words |= {
        "batch": "2",
        "picture_batch": "2",
        "picture_pairs": "4",
        "out": str(tmp_path / "run"),
    }
    options = [part for k, v in words.items() for part in (f"--{k.replace('_', '-')}", v)]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "parscale_ear.cli", "train", "ear", "--streams", "1", "2", *options),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for stage in ("ear", "pictures", "streams2"):
        ours, theirs = (read_log(folder / stage)[-1] for folder in (tmp_path / "run", trained))
        assert ours["finished"]
        name = "validation_energy_score"
        assert ours[name] == pytest.approx(theirs[name], rel=0.1)
    # They share the looking at real pictures, and see what one process sees.
    seen, expected = (
        checkpoint.load(folder / "pictures" / "features.safetensors")[0]
        for folder in (tmp_path / "run", trained)
    )
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, atol=1e-5, rtol=1e-5)
    before, after = (
        EnergyAR.load(tmp_path / "run" / f"{stage}.safetensors").state_dict()
        for stage in ("ear", "pictures")
    )
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())


def test_another_recipe_is_refused(recipe: EARRecipe, trained: Path) -> None:
    with pytest.raises(TrainingError, match="already holds a run"):
        train_ear(recipe, trained)
    with pytest.raises(TrainingError, match="another alpha"):
        train_ear(replace(recipe, alpha=1.5), trained, resume=True)
    index = Path(recipe.latents) / INDEX_FILE
    told = index.read_text()
    try:
        changed = json.loads(told)
        changed["shards"][0]["sha256"] = "0"
        index.write_text(json.dumps(changed))
        with pytest.raises(TrainingError, match="another pictures, validated"):
            train_ear(recipe, trained, resume=True)
    finally:
        index.write_text(told)


def test_a_run_from_before_a_field_was_there_goes_on(recipe: EARRecipe, tmp_path: Path) -> None:
    short = replace(recipe, steps=1, streams=(), picture_steps=0)
    assert train_ear(short, tmp_path)
    told = json.loads((tmp_path / "recipe.json").read_text())
    del told["input_noise"]
    (tmp_path / "recipe.json").write_text(json.dumps(told))
    with pytest.raises(TrainingError, match="another input_noise"):
        train_ear(replace(short, input_noise=0.1), tmp_path, resume=True)
    assert train_ear(short, tmp_path, resume=True)


def test_held_out_latents_are_not_trained_on(recipe: EARRecipe) -> None:
    fingerprint = ParScaleEAR.from_pretrained().latent_fingerprint()
    training, validation, names = load_latents(replace(recipe, validation=None), fingerprint)
    assert names == ("bottom", "top")
    assert (len(training), len(validation)) == (10, 2)
    assert training.latents.shape[1:] == (2, 32, 2, 2)
    for latent in validation.latents[:, 0]:
        assert not any(torch.equal(latent, other) for other in training.latents[:, 0])


def test_a_run_goes_on_with_the_same_start_and_decoder_alone(
    recipe: EARRecipe, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, out = tmp_path / "start.safetensors", tmp_path / "run"
    shutil.copy(trained / "ear.safetensors", start)
    asked = replace(
        recipe, start=str(start), minutes=0, steps=None, streams=(2, 2), picture_steps=1
    )
    assert train_ear(asked, out)
    assert train_ear(asked, out, resume=True)
    assert not (out / "streams.json").exists()  # nothing to compare
    load = ParScaleEAR.from_pretrained

    def another(*arguments: Any, **options: Any) -> ParScaleEAR:
        model = load(*arguments, **options)
        with torch.no_grad():
            next(model.decoder.parameters()).add_(1)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(ParScaleEAR, "from_pretrained", another)
        with pytest.raises(TrainingError, match="holds a run with another decoder;"):
            train_ear(asked, out, resume=True)
    shutil.copy(trained / "pictures.safetensors", start)
    with pytest.raises(TrainingError, match="holds a run with another start_weights;"):
        train_ear(asked, out, resume=True)


def test_latents_are_measured_on_others_that_were_refined_alike(
    recipe: EARRecipe, pictures: Path, tmp_path: Path
) -> None:
    fingerprint, refined = ParScaleEAR.from_pretrained().latent_fingerprint(), tmp_path / "refined"
    asked = ["--side", "32", "--mirror", "--refinements", "1"]
    assert main(["encode", str(pictures), str(refined), *asked]) == 0
    with pytest.raises(TrainingError, match=r"latents refined 1 times, those of .*cache 0 times"):
        load_latents(replace(recipe, validation=str(refined)), fingerprint)
    both = replace(recipe, latents=str(refined), validation=str(refined))
    assert len(load_latents(both, fingerprint)[0]) == 12
    otherwise = tmp_path / "otherwise"
    assert main(["encode", str(pictures), str(otherwise), *asked, "--decoder", "sharp"]) == 0
    with pytest.raises(
        TrainingError, match=r"1 times, those of .* 1 times, by another autoencoder"
    ):
        load_latents(replace(both, validation=str(otherwise)), fingerprint)


def test_weights_say_that_their_latents_were_refined(
    recipe: EARRecipe, trained: Path, pictures: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder, start = str(tmp_path / "refined"), str(trained / "ear.safetensors")
    asked = ["--side", "32", "--mirror", "--refinements", "1"]
    assert main(["encode", str(pictures), folder, *asked]) == 0
    one = replace(
        recipe, latents=folder, validation=folder, start=start, steps=1, streams=(), picture_steps=0
    )
    assert train_ear(one, tmp_path / "run")
    assert "was trained on latents that were refined otherwise" in caplog.text
    weights = tmp_path / "run" / "ear.safetensors"
    told = checkpoint.load(weights)[1]["training"]
    digest = checkpoint.digest(ParScaleEAR.from_pretrained().state_dict())
    assert (told["latent_refinements"], told["refined_by"]) == (1, digest)
    caplog.clear()
    assert train_ear(replace(one, start=str(weights)), tmp_path / "on")
    assert "refined otherwise" not in caplog.text
    alone = replace(one, minutes=0, steps=None, streams=(1,))
    with pytest.raises(TrainingError, match="latents that were refined otherwise; train the"):
        train_ear(alone, tmp_path / "alone")


def test_bad_latents(recipe: EARRecipe, latents: Path, tmp_path: Path) -> None:
    fingerprint = ParScaleEAR.from_pretrained().latent_fingerprint()
    with pytest.raises(TrainingError, match="3 class names for the 2 classes"):
        load_latents(replace(recipe, class_names=("a", "b", "c")), fingerprint)
    smaller = tmp_path / "smaller"
    folder = tmp_path / "pictures"
    for label in ("bottom", "top"):
        (folder / label).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (64, 64)).save(folder / label / f"{index}.png")
    assert main(["encode", str(folder), str(smaller), "--side", "64"]) == 0
    with pytest.raises(TrainingError, match="another size"):
        load_latents(replace(recipe, validation=str(smaller)), fingerprint)
    with pytest.raises(CheckpointError, match="another latent space"):
        load_latents(recipe, "0" * 64)
    with pytest.raises(CheckpointError, match="missing"):
        load_latents(replace(recipe, latents=str(tmp_path)), fingerprint)
    picture = tmp_path / "plain"
    picture.mkdir()
    Image.new("RGB", (32, 32)).save(picture / "one.png")
    assert main(["encode", str(picture), str(tmp_path / "none"), "--side", "32"]) == 0
    with pytest.raises(TrainingError, match="without classes"):
        load_latents(replace(recipe, latents=str(tmp_path / "none")), fingerprint)


def test_damaged_latents_are_not_trained_on(
    recipe: EARRecipe, latents: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "latents"
    shutil.copytree(latents, damaged)
    (shard,) = damaged.glob("shard-*")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        train_ear(replace(recipe, latents=str(damaged)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"alpha": 2.5}, "alpha"),
        ({"class_weight": math.inf}, "class_weight must be at least 0 and finite"),
        ({"critic_rate": math.inf}, "critic_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"samples": 1}, "samples"),
        ({"batch": 0}, "batch"),
        ({"streams": (0,)}, "streams"),
        ({"label_dropout": 1.0}, "label_dropout"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"train_temperature": 0.0}, "train_temperature"),
        ({"phases": 3}, "phases"),
        ({"width": 30, "heads": 4}, "heads"),
        ({"steps": None}, "minutes or steps"),
        ({"steps": None, "minutes": 0}, "weights to start"),
        ({"steps": 5, "minutes": 0, "start": "x"}, "leaves the first stage out"),
        ({"picture_draws": 1}, "picture_draws"),
        ({"picture_known": -1}, "picture_known"),
        ({"picture_pairs": -1}, "picture_pairs"),
        ({"picture_minutes": -1.0}, "picture_minutes"),
        ({"picture_rate": 0.0}, "picture_rate"),
        ({"critic_rate": 0.0}, "critic_rate"),
        ({"adversarial_weight": -1.0}, "adversarial_weight"),
        ({"class_weight": -1.0}, "class_weight"),
        ({"latent_noise": -0.1}, "latent_noise"),
        ({"input_noise": -0.1}, "input_noise"),
        ({"picture_minutes": 1.0}, "either picture_minutes or picture_steps"),
        ({"seed": 2**32}, "seed must be at least 0 and below"),
        (
            {"minutes": 0, "steps": None, "start": "x", "streams": (), "picture_steps": 0},
            "nothing to train",
        ),
    ],
)
def test_bad_recipes(recipe: EARRecipe, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(recipe, **changes)


def test_from_the_command_line(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train", "ear", "--latents", str(latents), "--out", str(tmp_path / "run")]
    small = [
        "--depth",
        "1",
        "--width",
        "16",
        "--heads",
        "2",
        "--head-width",
        "16",
        "--head-blocks",
        "1",
        "--batch",
        "4",
    ]
    assert (
        main([*common, *small, "--steps", "2", "--streams", "--class-names", "dark", "light"]) == 0
    )
    model = EnergyAR.load(tmp_path / "run" / "ear.safetensors")
    assert model.config.class_names == ("dark", "light")
    assert main([*common, *small, "--steps", "2", "--streams"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "ear", "--latents", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "parscale-ear encode" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()

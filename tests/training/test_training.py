from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from parscale_ear import checkpoint
from parscale_ear.autoencoder.config import ParScaleEARConfig
from parscale_ear.autoencoder.litevae import LiteVAEConfig
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.checkpoint import CheckpointError
from parscale_ear.data.crops import RandomCrops
from parscale_ear.data.images import find_images
from parscale_ear.training.autoencoder import (
    CENTRE_BATCH,
    CENTRE_STEPS,
    centre_colours,
    grown,
    train_autoencoder,
)
from parscale_ear.training.autoencoder_task import AutoencoderTask, CropsAhead
from parscale_ear.training.distributed import OneProcess
from parscale_ear.training.folder import Claim
from parscale_ear.training.loop import (
    CHECKPOINT_FILE,
    TrainingError,
    read_log,
)
from parscale_ear.training.recipe import STAGES, START, Recipe

pytest.importorskip("timm", reason="training needs the extra 'train'")
Killed = Callable[[int, Callable[[], object]], None]


def recipe(folder: Path, **changes: object) -> Recipe:
    fields: dict[str, object] = {
        "images": (str(folder),),
        "minutes": None,
        "steps": 10,
        "batch": 2,
        "crop": 32,
        "final_crop": 64,
        "precision": "fp32",
    }
    return Recipe(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_recipe_gives_three_decoders_on_one_latent(
    folder_of_pictures: Path, tmp_path: Path
) -> None:
    (folder_of_pictures / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "run"
    assert train_autoencoder(recipe(folder_of_pictures, steps=25), out)
    models = {name: ParScaleEAR.from_pretrained(out / f"{name}.safetensors") for name in STAGES}
    faithful = models["hybrid"]
    assert not torch.equal(faithful.encoder.level2.weight, models["vae"].encoder.level2.weight)
    for name in ("baseline", "sharp"):
        assert models[name].latent_fingerprint() == faithful.latent_fingerprint()
        ours, theirs = models[name].decoder.bands2.weight, faithful.decoder.bands2.weight
        assert not torch.equal(ours, theirs)
    assert models["baseline"].hybrid is None
    assert models["sharp"].hybrid is not None
    assert faithful.hybrid is not None
    for a, b in zip(faithful.hybrid.parameters(), models["sharp"].hybrid.parameters(), strict=True):
        assert torch.equal(a, b)
    _, header = checkpoint.load(out / "sharp.safetensors")
    history = header["training"]["history"]
    assert [stage["stage"] for stage in history] == ["vae", "hybrid", "sharp"]
    assert [stage["steps"] for stage in history] == [15, 5, 3]
    assert {stage["damaged"] for stage in history} == {1}
    assert history[0]["images"] == ["pictures"]  # no machine path
    assert header["training"]["validation"]["psnr_db"] > 0
    for name in ("curves.png", "sharp/log.jsonl"):
        assert (out / name).stat().st_size > 0
    assert len(list((out / "vae").glob("validation_*.png"))) == 1
    assert train_autoencoder(recipe(folder_of_pictures, steps=25), out, resume=True)  # nothing left


def task_of(
    stage: str, model: ParScaleEAR, folder: Path, asked: Recipe, out: Path
) -> AutoencoderTask:
    crops = RandomCrops(find_images([folder]), side=asked.crops(stage)[0])
    shown = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    return AutoencoderTask(stage, model, crops, asked, shown, out, OneProcess(torch.device("cpu")))


def test_running_statistics_find_mean_and_deviation(
    tiny: ParScaleEAR, folder_of_pictures: Path, tmp_path: Path
) -> None:
    task = task_of("vae", tiny, folder_of_pictures, recipe(tmp_path), tmp_path)
    mean = torch.tensor([3.0, 0.0, -1.0, 0.5]).reshape(4, 1, 1)
    deviation = torch.tensor([2.0, 0.5, 1.0, 4.0]).reshape(4, 1, 1)
    for _ in range(800):
        raw = mean + deviation * torch.randn(8, 4, 4, 4)
        task._update_statistics((raw - tiny.latent_mean) / tiny.latent_std)
    torch.testing.assert_close(tiny.latent_mean / deviation, mean / deviation, atol=0.05, rtol=0)
    torch.testing.assert_close(tiny.latent_std / deviation, torch.ones(4, 1, 1), atol=0.05, rtol=0)
    before = tiny.latent_mean, tiny.latent_std
    task._update_statistics(torch.full((8, 4, 4, 4), float("inf")))  # FP16 that overflowed
    assert (tiny.latent_mean, tiny.latent_std) == before


def test_latent_noise_has_the_strength_asked_for(
    tiny: ParScaleEAR, folder_of_pictures: Path, tmp_path: Path
) -> None:
    asked = recipe(tmp_path, latent_noise=0.4)
    task = task_of("vae", tiny, folder_of_pictures, asked, tmp_path)
    task.batch = 500
    latent = torch.zeros(500, 4, 8, 8)
    strengths = task._noisy(7, latent).std(dim=(1, 2, 3))
    assert torch.equal(task._noisy(7, latent), task._noisy(7, latent))
    assert strengths.max() < 0.45
    assert abs(strengths.mean() - 0.2) < 0.02


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_decodes_noisy_latents_where_asked(
    stage: str,
    tiny: ParScaleEAR,
    folder_of_pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []
    enhance = tiny.enhance
    monkeypatch.setattr(tiny, "enhance", lambda x: (seen.append(x.detach()), enhance(x))[1])
    for largest in (0.0, 0.4):
        torch.manual_seed(0)
        asked = recipe(tmp_path, latent_noise=largest)
        tiny.latent_mean, tiny.latent_std = torch.zeros(4, 1, 1), torch.ones(4, 1, 1)
        task_of(stage, tiny, folder_of_pictures, asked, tmp_path).loss(3)
    exact, noisy = seen
    strengths = (noisy - exact).std(dim=(1, 2, 3))
    assert (strengths > 0).all()
    assert (strengths < 0.6).all()  # of few numbers each


def test_the_sharp_stage_is_held_to_colours(
    tiny: ParScaleEAR, folder_of_pictures: Path, tmp_path: Path
) -> None:
    def measured(weight: float) -> tuple[float, dict[str, Tensor]]:
        torch.manual_seed(0)  # of the critic
        asked = recipe(tmp_path, chroma_weight=weight)
        loss, parts = task_of("sharp", tiny, folder_of_pictures, asked, tmp_path).loss(3)
        return loss.item(), parts

    (without, parts), (held, told) = measured(0.0), measured(50.0)
    assert "chroma_levels" not in parts
    squared = (told["chroma_levels"].item() / 127.5) ** 2
    assert squared > 1e-3
    assert held - without == pytest.approx(50 * squared, rel=1e-4)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "sharp"])
def test_structure_counts_in_every_stage_but_sharp(
    stage: str, tiny: ParScaleEAR, folder_of_pictures: Path, tmp_path: Path
) -> None:
    def measured(weight: float) -> tuple[float, dict[str, Tensor]]:
        tiny.latent_mean, tiny.latent_std = torch.zeros(4, 1, 1), torch.ones(4, 1, 1)
        asked = recipe(tmp_path, ssim_weight=weight)
        loss, parts = task_of(stage, tiny, folder_of_pictures, asked, tmp_path).loss(3)
        return loss.item(), parts

    (without, parts), (held, told) = measured(0.0), measured(5.0)
    assert "ssim" not in parts
    missing = 1 - told["ssim"].item()
    assert missing > 0.1
    assert held - without == pytest.approx(5 * missing, rel=1e-4)


def test_refined_latents_count_as_much_as_plain_ones(
    tiny: ParScaleEAR, folder_of_pictures: Path, tmp_path: Path
) -> None:
    def measured(refinements: int) -> tuple[float, dict[str, Tensor]]:
        tiny.latent_mean, tiny.latent_std = torch.zeros(4, 1, 1), torch.ones(4, 1, 1)
        asked = recipe(tmp_path, refinements=refinements, kl_weight=0.0, ssim_weight=0.5)
        loss, parts = task_of("vae", tiny, folder_of_pictures, asked, tmp_path).loss(3)
        return loss.item(), parts

    (plain, parts), (both, told) = measured(0), measured(1)
    assert told["reconstruction"] == parts["reconstruction"]
    refined = told["reconstruction_1"].item() + 0.5 * (1 - told["ssim_1"].item())
    assert refined != pytest.approx(plain, rel=1e-3)
    assert both == pytest.approx((plain + refined) / 2, rel=1e-4)


@pytest.mark.parametrize("refinements", [0, 1])
def test_a_step_uses_one_normalisation(
    refinements: int,
    tiny: ParScaleEAR,
    folder_of_pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[Tensor] = []
    for name in ("encode", "decode"):
        original = getattr(tiny, name)

        def spy(x: Tensor, original: Callable[[Tensor], object] = original) -> object:
            used.append(tiny.latent_mean)
            return original(x)

        monkeypatch.setattr(tiny, name, lambda x, spy=spy, **_: spy(x))
    asked = recipe(tmp_path, refinements=refinements)
    task_of("vae", tiny, folder_of_pictures, asked, tmp_path).loss(3)
    assert len(used) == 2 + 2 * refinements
    assert all(mean is used[0] for mean in used)
    assert not torch.equal(tiny.latent_mean, used[0])  # the next one has the new statistics


def test_a_refined_latent_is_trained_through_both_passes(
    tiny: ParScaleEAR, folder_of_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    decode = tiny.decode

    def spy(latent: Tensor) -> Tensor:
        latent.retain_grad()
        seen.append(latent)
        return decode(latent)

    monkeypatch.setattr(tiny, "decode", spy)
    asked = recipe(tmp_path, refinements=1, kl_weight=0.0)
    _, parts = task_of("vae", tiny, folder_of_pictures, asked, tmp_path).loss(3)
    assert "reconstruction_1" in parts
    plain, refined = seen
    refined.sum().backward()
    assert plain.grad is not None  # by the picture that it became
    assert plain.grad.abs().max() > 0


def test_a_run_with_refinements_says_so_and_measures_both(
    folder_of_pictures: Path, tmp_path: Path
) -> None:
    asked = recipe(folder_of_pictures, steps=10, refinements=1)
    assert train_autoencoder(asked, tmp_path / "run")
    for stage in STAGES:
        _, header = checkpoint.load(tmp_path / "run" / f"{stage}.safetensors")
        own = header["training"]["history"][-1]["refinements"]
        assert own == (1 if stage in ("vae", "hybrid") else 0)
    last = read_log(tmp_path / "run" / "hybrid")[-1]
    assert last["refined_psnr_db"] != last["psnr_db"]
    with pytest.raises(ValueError, match="refinements and latent_noise do not go together"):
        recipe(folder_of_pictures, refinements=1, latent_noise=0.1)
    with pytest.raises(ValueError, match="refinements must be at least 0"):
        recipe(folder_of_pictures, refinements=-1)


def test_it_starts_from_given_weights(
    folder_of_pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_autoencoder(recipe(folder_of_pictures, steps=5), first)
    start = str(first / "hybrid.safetensors")
    assert train_autoencoder(
        recipe(folder_of_pictures, steps=5, start=start, learning_rate=1e-9), second
    )
    assert "does not say how it was trained" not in caplog.text
    ours, theirs = (
        ParScaleEAR.from_pretrained(path).encoder.level2.weight
        for path in (start, second / "vae.safetensors")
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    bare = ParScaleEAR.from_pretrained(start).save_pretrained(tmp_path / "bare.safetensors")
    short = recipe(folder_of_pictures, steps=2, start=str(bare), stages=("vae",))
    assert train_autoencoder(short, tmp_path / "third")
    assert "bare.safetensors does not say how it was trained" in caplog.text


def test_batches_prepared_ahead_are_the_same(folder_of_pictures: Path) -> None:
    crops = RandomCrops(find_images([folder_of_pictures]), side=32)
    ahead = CropsAhead(crops, 3, 2, workers=2)
    for step in (0, 1, 2, 7):
        assert torch.equal(ahead.batch(step), crops.batch(step, 3, 2))


def test_it_trains_on_as_many_grey_crops_as_asked(
    folder_of_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    batch = CropsAhead.batch

    def watched(self: CropsAhead, step: int) -> torch.Tensor:
        seen.append(batch(self, step))
        return seen[-1]

    monkeypatch.setattr(CropsAhead, "batch", watched)
    asked = recipe(folder_of_pictures, steps=25, grey_share=0.5)
    assert train_autoencoder(asked, tmp_path / "run")
    crops = torch.cat([part.flatten(2)[..., :256] for part in seen])
    share = (crops.amax(1) == crops.amin(1)).all(1).float().mean().item()
    assert abs(share - 0.5) < 4 * 0.5 / len(crops) ** 0.5


def test_a_process_takes_its_stretch_of_a_batch(folder_of_pictures: Path) -> None:
    crops = RandomCrops(find_images([folder_of_pictures]), side=32)
    whole = crops.batch(5, 6)
    assert torch.equal(torch.cat((crops.batch(5, 4), crops.batch(5, 2, first=4))), whole)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(
    folder_of_pictures: Path, tmp_path: Path
) -> None:
    """By ``accelerate launch``; on the CPU, so with gloo. Every stage moves its weights alike."""
    pytest.importorskip("accelerate", reason="several processes need the extra 'train'")
    common = [
        *("parscale_ear.cli", "train", "autoencoder", "--images", str(folder_of_pictures)),
        *("--steps", "30", "--crop", "32", "--final-crop", "64", "--precision", "fp32"),
        *("--device", "cpu", "--learning-rate", "0.02", "--final-rate", "0.02"),
        *("--latent-noise", "0.1"),
    ]
    one = [sys.executable, "-m"]
    two = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        # Accelerate has no other name for several processes on one machine; port 0: a free one.
        *("--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command, batch, name in ((one, "16", "one"), ([*two, "-m"], "8", "two")):
        done = subprocess.run(
            [*command, *common, "--batch", batch, "--out", str(tmp_path / name)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        files = [str(tmp_path / name / f"{stage}.safetensors") for stage in sorted(STAGES)]
        said = [line for line in done.stdout.splitlines() if line.startswith("weights:")]
        assert said == [" ".join(["weights:", *files])]
    torch.manual_seed(0)
    fresh = ParScaleEAR().state_dict()
    starts: dict[tuple[str, str | None], Mapping[str, Tensor]] = {
        ("one", None): fresh,
        ("two", None): fresh,
    }
    for stage in STAGES:
        alone, together = (tmp_path / name / f"{stage}.safetensors" for name in ("one", "two"))
        crops = [
            checkpoint.load(path)[1]["training"]["history"][-1]["crops"]
            for path in (alone, together)
        ]
        assert crops[0] == crops[1]  # two processes did share the batch
        moved = difference = 0.0
        for name, path in (("one", alone), ("two", together)):
            starts[name, stage] = ParScaleEAR.from_pretrained(path).state_dict()
        for key, value in starts["one", stage].items():
            ours = value - starts["one", START.get(stage)][key]
            theirs = starts["two", stage][key] - starts["two", START.get(stage)][key]
            moved += float(ours.square().sum())
            difference += float((theirs - ours).square().sum())
        # Sums in another order make 4 % of the way in few steps; halves of a batch make far more.
        assert difference < 0.01 * moved, stage
    assert json.loads((tmp_path / "two" / "recipe.json").read_text())["processes"] == 2


def test_another_recipe_does_not_resume(folder_of_pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_autoencoder(recipe(folder_of_pictures, steps=3), out)
    with pytest.raises(TrainingError, match="another batch"):
        train_autoencoder(recipe(folder_of_pictures, steps=3, batch=4), out, resume=True)
    with pytest.raises(TrainingError, match="already holds a run"):
        train_autoencoder(recipe(folder_of_pictures, steps=3), out)
    Image.new("RGB", (96, 96)).save(folder_of_pictures / "-.png")  # who is held out would change
    with pytest.raises(TrainingError, match="another pictures, validated; give the same options"):
        train_autoencoder(recipe(folder_of_pictures, steps=3), out, resume=True)
    (out / "recipe.json").write_text("{")
    with pytest.raises(TrainingError, match=r"recipe\.json: damaged .*name a new folder"):
        train_autoencoder(recipe(folder_of_pictures, steps=3), out, resume=True)


def test_a_run_that_fails_before_anything_is_stored_leaves_its_folder_free(
    folder_of_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, small = tmp_path / "run", recipe(folder_of_pictures, steps=3, stages=("vae", "hybrid"))
    loss = AutoencoderTask.loss

    def out_of_memory(task: AutoencoderTask, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if task.stage == failing:
            raise torch.OutOfMemoryError("too large a batch")
        return loss(task, step)

    monkeypatch.setattr(AutoencoderTask, "loss", out_of_memory)
    failing = "vae"
    with pytest.raises(torch.OutOfMemoryError):
        train_autoencoder(replace(small, batch=4), out)
    failing = "hybrid"
    with pytest.raises(torch.OutOfMemoryError):
        train_autoencoder(small, out)  # another recipe, and no --resume
    with pytest.raises(TrainingError, match="already holds a run"):  # as vae.safetensors is there
        train_autoencoder(replace(small, batch=4), out)
    (out / "vae.safetensors").unlink()
    shutil.rmtree(out / "vae")  # and its checkpoint
    failing = "vae"
    with pytest.raises(torch.OutOfMemoryError):
        train_autoencoder(small, out, resume=True)
    with pytest.raises(TrainingError, match="already holds a run"):  # this call did not begin it
        train_autoencoder(replace(small, batch=4), out)


def test_to_resume_what_is_not_there_is_told(
    folder_of_pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_autoencoder(recipe(folder_of_pictures, steps=3), tmp_path / "new", resume=True)
    assert "new holds no run yet; a new one starts there" in caplog.text


def test_only_more_blocks_can_be_grown(tmp_path: Path) -> None:
    plain = replace(LiteVAEConfig(), encoder_bottlenecks=(0, 0, 0), decoder_blocks=(2, 1, 1))
    small = ParScaleEAR(ParScaleEARConfig(litevae=plain)).eval()
    larger = grown(small, ParScaleEARConfig()).eval()
    assert larger.parameter_count()["total"] > small.parameter_count()["total"]
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(larger(x), small(x))  # the new blocks do nothing yet
    for config in (
        ParScaleEARConfig(litevae=plain, hybrid=None),
        ParScaleEARConfig(litevae=replace(plain, encoder_widths=(64, 96, 96))),
    ):
        with pytest.raises(checkpoint.CheckpointError, match="another shape"):
            grown(ParScaleEAR(config), ParScaleEARConfig())


@pytest.mark.parametrize(("kernels", "recorded"), [(True, "bf16"), (False, "fp32")])
def test_autocast_trains_too_and_the_header_tells_in_what(
    kernels: bool, recorded: str, folder_of_pictures: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("parscale_ear.training.loop.multiplies_bf16", lambda device: kernels)
    short = recipe(folder_of_pictures, precision="auto", steps=6, stages=("vae",))
    assert train_autoencoder(short, tmp_path / "r")
    training = checkpoint.load(tmp_path / "r" / "vae.safetensors")[1]["training"]
    assert training["history"][-1]["precision"] == recorded
    assert training["validation"]["precision"] == recorded


def test_one_stage_alone_goes_on_from_given_weights(
    folder_of_pictures: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    stages = ("vae", "hybrid")
    assert train_autoencoder(recipe(folder_of_pictures, steps=4, stages=stages), first)
    assert not (first / "sharp.safetensors").exists()
    start = first / "hybrid.safetensors"
    asked = {"feature": 0.5, "adversarial": 0.02, "pattern": 10.0, "chroma": 3.0}
    alone = recipe(
        folder_of_pictures, steps=4, stages=("sharp",), start=str(start),
        **{f"{name}_weight": weight for name, weight in asked.items()},
    )  # fmt: skip
    assert train_autoencoder(alone, second)
    assert sorted(path.name for path in second.glob("*.safetensors")) == ["sharp.safetensors"]
    before, after = (
        ParScaleEAR.from_pretrained(path) for path in (start, second / "sharp.safetensors")
    )
    assert after.latent_fingerprint() == before.latent_fingerprint()
    assert not torch.equal(after.decoder.bands2.weight, before.decoder.bands2.weight)
    history = checkpoint.load(second / "sharp.safetensors")[1]["training"]["history"]
    # All of the steps go to the stages that are run.
    assert [(stage["stage"], stage["steps"]) for stage in history] == [
        ("vae", 3), ("hybrid", 1), ("sharp", 4),
    ]  # fmt: skip
    assert history[-1]["loss_weights"] == asked
    kept = start.read_bytes()
    ParScaleEAR.from_pretrained(second / "sharp.safetensors").save_pretrained(start)
    with pytest.raises(TrainingError, match="another start_weights"):
        train_autoencoder(alone, second, resume=True)
    start.write_bytes(kept)
    missing = replace(alone, start=str(tmp_path / "none.safetensors"))
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        train_autoencoder(missing, tmp_path / "third")
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages": ()}, "stages must be some of vae, hybrid, baseline, sharp"),
        ({"stages": ("hybrid", "vae")}, "in this order, got hybrid vae"),
        ({"stages": ("baseline",)}, "stage baseline needs weights to start from"),
        ({"stages": ("vae", "sharp"), "start": "x"}, "stages must have hybrid, which sharp"),
    ],
)
def test_stages_that_cannot_be_run(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        recipe(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"crop": 40},
        {"final_crop": 0},
        {"batch": 0},
        {"learning_rate": 0.0},
        {"steps": -5},
        {"seed": -1},
        {"adversarial_weight": float("nan")},
        {"latent_noise": -0.1},
        {"grey_share": -0.1},
        {"grey_share": 1.5},
        {"pattern_weight": -1.0},
        {"chroma_weight": -1.0},
        {"precision": "float32"},
    ],
)
def test_recipe_names_the_bad_field(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        recipe(tmp_path, **changes)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_killed_in_any_stage_it_resumes_exactly(
    device: str, folder_of_pictures: Path, tmp_path: Path, killed_after: Killed
) -> None:
    """FP16 on CUDA, so that the scaler of gradients is taken up too."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("SKIPPED: no CUDA device")
    precision = "fp16" if device == "cuda" else "fp32"
    asked = recipe(folder_of_pictures, steps=25, device=device, precision=precision)
    assert train_autoencoder(asked, tmp_path / "whole")
    for steps in (16, 5, 2, 1):  # of vae 15, hybrid 5, baseline 2 and sharp 3; by steps from there
        killed_after(steps, lambda: train_autoencoder(asked, tmp_path / "killed", resume=True))
    assert not (tmp_path / "killed" / "sharp.safetensors").exists()
    assert (tmp_path / "killed" / "sharp" / CHECKPOINT_FILE).exists()
    assert train_autoencoder(asked, tmp_path / "killed", resume=True)
    for stage in STAGES:
        whole, killed = (
            ParScaleEAR.from_pretrained(tmp_path / name / f"{stage}.safetensors").state_dict()
            for name in ("whole", "killed")
        )
        for key, value in whole.items():
            if device == "cpu":
                assert torch.equal(killed[key], value), (stage, key)
            else:
                torch.testing.assert_close(killed[key], value, atol=2e-3, rtol=2e-2)


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_exactly(folder_of_pictures: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle, twice; the end must equal an uninterrupted run's, bit for bit."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from parscale_ear.training import autoencoder, loop, recipe as recipes\n"
        "plain = loop.LoopConfig\n"
        "recipes.LoopConfig = lambda **k: plain(**k, checkpoint_minutes=1e-9, log_steps=1)\n"
        "recipe = recipes.Recipe(images=(sys.argv[1],), minutes=None, steps=60, batch=2,\n"
        "    crop=32, final_crop=64, precision='fp32')\n"
        "autoencoder.train_autoencoder(recipe, Path(sys.argv[2]), resume=True)\n"
    )

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code, str(folder_of_pictures), str(out)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(whole).wait() == 0
    for step in (8, 20):
        process = start(parts)
        deadline = time.monotonic() + 120
        while not any(line["step"] >= step for line in read_log(parts / "vae")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not (parts / "hybrid.safetensors").exists()
    assert start(parts).wait() == 0
    for stage in STAGES:
        ours, theirs = (checkpoint.load(out / stage / CHECKPOINT_FILE)[0] for out in (parts, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert not list((parts / stage).glob(".*.part"))
        steps = [line["step"] for line in read_log(parts / stage) if "loss" in line]
        assert steps == list(range(1, len(steps) + 1))
    assert json.loads((parts / "recipe.json").read_text())["steps"] == 60


def test_colours_are_centred_over_training_crops(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(3):
        small = rng.integers(60, 200, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC).save(
            tmp_path / f"{index}.png"
        )
    crops = RandomCrops(find_images([tmp_path]), side=32, seed=3)
    model = ParScaleEAR.from_pretrained(decoder="sharp").eval()
    with torch.no_grad():
        model.decoder.bands2.bias[:3] += torch.tensor([0.4, 0.0, -0.2])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.cat([crops.batch(step, CENTRE_BATCH) for step in range(CENTRE_STEPS)])
    with torch.no_grad():
        tinted = (model(images) - images).mean((0, 2, 3))
        centre_colours(model, crops)
        error = (model(images) - images).mean((0, 2, 3))
    assert tinted.abs().max() > 0.05
    torch.testing.assert_close(error, torch.zeros(3), atol=1e-5, rtol=0)
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["decoder.bands2.bias"]


def test_what_auto_is_belongs_to_the_run(
    folder_of_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine must not go on in another precision."""
    short = recipe(folder_of_pictures, steps=2, stages=("vae",), precision="auto")

    def claim(kernels: bool, *, resume: bool, asked: Recipe = short) -> Claim:
        monkeypatch.setattr("parscale_ear.training.loop.multiplies_bf16", lambda device: kernels)
        return Claim(asked, tmp_path, resume=resume)

    claim(True, resume=False).write()
    assert json.loads((tmp_path / "recipe.json").read_text())["precision"] == "bf16"
    claim(True, resume=True)
    claim(False, resume=True, asked=replace(short, precision="bf16"))
    with pytest.raises(TrainingError, match="another precision"):
        claim(False, resume=True)
    told = json.loads((tmp_path / "recipe.json").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps({**told, "precision": "auto"}))
    claim(False, resume=True)  # of a version that did not say what it was
    monkeypatch.setattr(OneProcess, "union", lambda self, names: {*names, "bf16"})
    with pytest.raises(TrainingError, match=r"different precisions \(bf16, fp32\); name one by"):
        claim(False, resume=True)

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from parscale_ear import checkpoint
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.data.images import from_uint8
from parscale_ear.metrics.reconstruction import ssim
from parscale_ear.training.autoencoder import Recipe, train_autoencoder
from parscale_ear.training.loop import (
    CHECKPOINT_FILE,
    LoopConfig,
    Progress,
    Run,
    TrainingError,
    learning_rate,
    read_log,
)
from parscale_ear.training.losses import log_mse_loss, ssim_loss

pytest.importorskip("timm", reason="training needs the extra 'train'")


class Toy:
    """A small regression, every step's data a function of its number."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6))
        self.stop_at: int | None = None

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        loss = (self.model(x) - x.flip(1)).square().mean()
        return loss, {"double": 2 * loss.detach()}

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(-1))
        with torch.no_grad():
            return {"error": float((model(x) - x.flip(1)).square().mean())}


def config(steps: int = 40) -> LoopConfig:
    return LoopConfig(
        steps=steps, precision="fp32", log_steps=5, warmup_steps=5, learning_rate=0.03
    )


def weights(run: Run) -> list[Tensor]:
    return [*run.task.model.state_dict().values(), *run.average.state_dict().values()]


def test_learns_and_logs(tmp_path: Path) -> None:
    run = Run(Toy(), config(300), tmp_path / "run")
    assert run.train()
    log = read_log(tmp_path / "run")
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 60
    assert losses[-1] < 0.2 * losses[0]
    assert log[-1]["finished"]
    assert log[-1]["error"] < 0.2 * losses[0]


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = Run(Toy(), config(), tmp_path / "whole")
    assert whole.train()
    toy = Toy()
    toy.stop_at = 17
    assert not Run(toy, config(), tmp_path / "parts").train()
    second = Run(Toy(), config(), tmp_path / "parts", resume=True)
    assert second.progress.step == 18
    assert second.train()
    for a, b in zip(weights(whole), weights(second), strict=True):
        assert torch.equal(a, b)
    strip = [
        [{k: v for k, v in line.items() if k != "minutes"} for line in read_log(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert strip[0] == strip[1]


def test_the_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    Run(Toy(), config(3), tmp_path / "run").train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    Run(Toy(), config(3), tmp_path / "run").train()
    with pytest.raises(TrainingError, match="--resume"):
        Run(Toy(), config(3), tmp_path / "run")


def test_another_models_run_is_refused(tmp_path: Path) -> None:
    Run(Toy(), config(3), tmp_path / "run").train()
    other = Toy()
    other.model = nn.Linear(6, 6)
    with pytest.raises(TrainingError, match="another model"):
        Run(other, config(3), tmp_path / "run", resume=True)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    class Broken(Toy):
        def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            loss, figures = super().loss(step)
            return loss * float("nan"), figures

    for steps in (40, 3):  # seen at a line of the log, and at the end
        with pytest.raises(TrainingError, match="the loss became nan"):
            Run(Broken(), config(steps), tmp_path / str(steps)).train()
        assert not (tmp_path / str(steps) / CHECKPOINT_FILE).exists()


def test_learning_rate() -> None:
    loop = LoopConfig(steps=1000, learning_rate=1.0, warmup_steps=10, final_rate=0.1)
    rates = [learning_rate(loop, Progress(step=step)) for step in (0, 9, 500, 1000)]
    assert rates == pytest.approx([0.1, 1.0, 0.55, 0.1], rel=1e-3)
    minutes = LoopConfig(minutes=1, learning_rate=1.0, final_rate=0.0)
    assert learning_rate(minutes, Progress(step=500, seconds=30)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "length",
    [{}, {"minutes": 1, "steps": 1}, {"steps": 0}, {"minutes": -1}, {"minutes": float("nan")}],
)
def test_length(length: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"minutes|length"):
        LoopConfig(**length)  # type: ignore[arg-type]


def test_log_mse_follows_psnr() -> None:
    target = torch.zeros(2, 3, 8, 8)
    output = torch.stack((torch.full((3, 8, 8), 0.1), torch.full((3, 8, 8), 0.5)))
    ten_times_better = output / 10**0.5
    gain = log_mse_loss(output, target) - log_mse_loss(ten_times_better, target)
    assert gain.item() == pytest.approx(0.1 * 2.3026, rel=0.05)


def test_ssim_loss_equals_the_metric(photographs: torch.Tensor) -> None:
    noise = torch.randint(-20, 21, photographs[:3].shape)
    damaged = (photographs[:3].int() + noise).clamp(0, 255).to(torch.uint8)
    ours = ssim_loss(from_uint8(damaged), from_uint8(photographs[:3]))
    assert 1 - ours.item() == pytest.approx(ssim(damaged, photographs[:3]).mean(), abs=1e-4)
    assert ssim_loss(from_uint8(damaged), from_uint8(damaged)).item() == pytest.approx(0, abs=1e-6)


# --- the autoencoder's recipe ---


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


def test_the_recipe_gives_two_models_on_one_latent(
    folder_of_pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert train_autoencoder(recipe(folder_of_pictures), out)
    vae, baseline, hybrid = (
        ParScaleEAR.from_pretrained(out / f"{name}.safetensors")
        for name in ("vae", "baseline", "hybrid")
    )
    assert baseline.latent_fingerprint() == hybrid.latent_fingerprint()
    for model in (baseline, hybrid):
        for a, b in zip(
            vae.encoder.state_dict().values(), model.encoder.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b)
        assert not torch.equal(vae.decoder.bands2.weight, model.decoder.bands2.weight)
    assert baseline.hybrid is None
    assert hybrid.hybrid is not None
    _, header = checkpoint.load(out / "hybrid.safetensors")
    assert header["training"]["steps"] == 2
    assert header["training"]["validation"]["psnr_db"] > 0
    assert header["training"]["recipe"]["images"] == ["pictures"]  # no machine path
    for name in ("curves.png", "hybrid/log.jsonl"):
        assert (out / name).stat().st_size > 0
    assert len(list((out / "vae").glob("validation_*.png"))) == 1
    assert train_autoencoder(recipe(folder_of_pictures), out, resume=True)  # nothing left to do


def test_another_recipe_does_not_resume(folder_of_pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_autoencoder(recipe(folder_of_pictures, steps=3), out)
    with pytest.raises(TrainingError, match="another batch"):
        train_autoencoder(recipe(folder_of_pictures, steps=3, batch=4), out, resume=True)
    with pytest.raises(TrainingError, match="already holds a run"):
        train_autoencoder(recipe(folder_of_pictures, steps=3), out)


def test_autocast_trains_too(folder_of_pictures: Path, tmp_path: Path) -> None:
    assert train_autoencoder(recipe(folder_of_pictures, precision="bf16", steps=6), tmp_path / "r")


@pytest.mark.parametrize(
    "changes",
    [
        {"crop": 40},
        {"final_crop": 0},
        {"batch": 0},
        {"learning_rate": 0.0},
        {"steps": -5},
        {"seed": -1},
    ],
)
def test_recipe_names_the_bad_field(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        recipe(tmp_path, **changes)


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_exactly(folder_of_pictures: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle, twice; the end must equal an uninterrupted run's, bit for bit."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from parscale_ear.training import autoencoder, loop\n"
        "plain = loop.LoopConfig\n"
        "autoencoder.LoopConfig = lambda **k: plain(**k, checkpoint_minutes=1e-9, log_steps=1)\n"
        "recipe = autoencoder.Recipe(images=(sys.argv[1],), minutes=None, steps=40, batch=2,\n"
        "    crop=32, final_crop=64, precision='fp32')\n"
        "autoencoder.train_autoencoder(recipe, Path(sys.argv[2]), resume=True)\n"
    )

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code, str(folder_of_pictures), str(out)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(whole).wait() == 0
    for step in (6, 15):
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
    for stage in ("vae", "baseline", "hybrid"):
        ours, theirs = (checkpoint.load(out / stage / CHECKPOINT_FILE)[0] for out in (parts, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert not list((parts / stage).glob(".*.part"))
        steps = [line["step"] for line in read_log(parts / stage) if "loss" in line]
        assert steps == list(range(1, len(steps) + 1))
    assert json.loads((parts / "recipe.json").read_text())["steps"] == 40

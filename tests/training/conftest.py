"""Fixtures of several recipes' tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from parscale_ear.cli import main
from parscale_ear.training import loop
from parscale_ear.training.ear_recipe import EARRecipe


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Calls a training and kills it after so many steps, of whatever stages.

    Every step is followed by a checkpoint.
    """
    original = loop.Run._step

    def call(steps: int, train: Callable[[], object]) -> None:
        left = [steps]

        def step(self: loop.Run) -> Any:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            figures = original(self)
            self.progress.step += 1
            self.save()
            self.progress.step -= 1
            return figures

        with monkeypatch.context() as patch:
            patch.setattr(loop.Run, "_step", step)
            with pytest.raises(KeyboardInterrupt):
                train()

    return call


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of 32×32, bright at the bottom or at the top."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for label, rows in (("bottom", slice(16, 32)), ("top", slice(0, 16))):
        (folder / label).mkdir()
        for index in range(6):
            pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            pixels[rows] += 150
            Image.fromarray(pixels).save(folder / label / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def latents(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures as latents of 2×2."""
    out = tmp_path_factory.mktemp("latents") / "cache"
    assert main(["encode", str(pictures), str(out), "--side", "32", "--mirror"]) == 0
    return out


@pytest.fixture(scope="module")
def recipe(latents: Path) -> EARRecipe:
    """A short training on them, of all stages."""
    return EARRecipe(
        latents=str(latents),
        validation=str(latents),
        minutes=None,
        steps=20,
        stream_steps=4,
        streams=(1, 2),
        picture_steps=3,
        picture_classes=2,
        picture_draws=2,
        picture_batch=4,
        depth=1,
        width=16,
        heads=2,
        head_width=16,
        head_blocks=1,
        noise_channels=4,
        prefix_tokens=2,
        batch=4,
        precision="fp32",
    )

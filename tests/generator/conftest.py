from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from official import official_states
from tiny_ear import CONFIG, build
from tiny_var import KINDS, read_vectors
from torch import Tensor

from parscale_ear.generator.ear import EnergyAR
from parscale_ear.generator.var import VAR


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which of the two tiny configurations: L2-normalised attention, or plain."""
    return str(request.param)


@pytest.fixture(scope="session")
def official_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Writes a configuration's checkpoints as the authors' code does; returns the two files."""
    written: dict[str, tuple[Path, Path]] = {}

    def write(kind: str) -> tuple[Path, Path]:
        if kind not in written:
            folder = tmp_path_factory.mktemp(kind)
            written[kind] = (folder / "vae.pth", folder / "var.pth")
            states = official_states(read_vectors(kind)[0])
            for path, state in zip(written[kind], states, strict=True):
                torch.save(state, path)
        return written[kind]

    return write


@pytest.fixture
def load(official_files: Callable[[str], tuple[Path, Path]]) -> Callable[..., VAR]:
    """Loads a configuration from the authors' format."""

    def build(kind: str = "l2", **options: object) -> VAR:
        heads = read_vectors(kind)[0].heads
        return VAR.from_official(*official_files(kind), heads=heads, **options)  # type: ignore[arg-type]

    return build


@pytest.fixture
def var(load: Callable[..., VAR]) -> VAR:
    """A tiny VAR with weights that do something."""
    return load("l2")


@pytest.fixture
def vectors(kind: str) -> dict[str, Tensor]:
    return read_vectors(kind)[1]


@pytest.fixture
def model() -> EnergyAR:
    """A tiny EnergyAR with weights that do something."""
    return build(CONFIG)

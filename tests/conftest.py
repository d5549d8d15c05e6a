"""Fixtures that several test folders share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from parscale_ear.autoencoder.config import ParScaleEARConfig
from parscale_ear.autoencoder.hybrid import HybridConfig
from parscale_ear.autoencoder.litevae import LiteVAEConfig
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.data.reference import wheel_reference

TINY = ParScaleEARConfig(
    litevae=LiteVAEConfig(
        latent_channels=4,
        encoder_widths=(8, 8, 8),
        decoder_widths=(8, 8, 8),
        decoder_blocks=(1, 1, 1),
    ),
    hybrid=HybridConfig(latent_channels=4, coarse_width=8, fine_width=8),
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@contextlib.contextmanager
def _single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def with_one_thread() -> Callable[[Callable[[], bool]], bool]:
    """Calls a training as tests do that have ``one_thread``."""

    def call(train: Callable[[], bool]) -> bool:
        with _single_thread():
            return train()

    return call


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, where bits are compared: on some CPUs they depend on how threads share the work.

    (AVX-512 with AMX, torch 2.9.1: convolutions of one small picture; and even equal trainings with
    two threads end 1e-8 apart.)
    """
    with _single_thread():
        yield


@pytest.fixture
def tiny() -> ParScaleEAR:
    """A model of the same structure with a few thousand parameters."""
    model = ParScaleEAR(TINY).eval()
    model.latent_mean.copy_(torch.tensor([0.5, -0.5, 0.0, 1.0]).reshape(4, 1, 1))
    model.latent_std.copy_(torch.tensor([2.0, 1.0, 0.5, 1.5]).reshape(4, 1, 1))
    return model


@pytest.fixture
def broken_weights(tiny: ParScaleEAR, tmp_path: Path) -> Path:
    """Weights of ``tiny`` with a NaN in the encoder."""
    next(tiny.encoder.parameters()).data[0] = torch.nan
    return Path(tiny.save_pretrained(tmp_path / "broken.safetensors"))


@pytest.fixture(scope="session")
def shipped() -> ParScaleEAR:
    """The shipped model, FP32 on the CPU."""
    return ParScaleEAR.from_pretrained()


@pytest.fixture(scope="session")
def photographs() -> torch.Tensor:
    """Crops of 14 photographs, (14, 3, 256, 256), 8-bit."""
    return wheel_reference(14).pictures


@pytest.fixture
def folder_of_pictures(tmp_path: Path) -> Path:
    """Six small noise pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        pixels = rng.integers(0, 256, (96 + 16 * index, 112, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder

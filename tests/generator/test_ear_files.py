from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_ear import CONFIG, NAMES, seeded

from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.checkpoint import CheckpointError
from parscale_ear.generator.ear import EnergyAR
from parscale_ear.generator.ear_config import EARConfig
from parscale_ear.generator.streams import ParallelStreams


def test_pictures_from_the_shipped_autoencoder(tmp_path: Path) -> None:
    autoencoder = ParScaleEAR.from_pretrained(decoder="sharp")
    config = EARConfig(
        depth=1, width=16, heads=1, head_width=16, head_blocks=1, noise_channels=4, side=4,
        class_names=NAMES,
    )  # fmt: skip
    model = EnergyAR(config).eval()
    with pytest.raises(ValueError, match="attach"):
        model.generate([0])
    model.latent_fingerprint = autoencoder.latent_fingerprint()
    model.attach(autoencoder)
    shown: list[torch.Tensor] = []
    images = model.generate(
        [0, 1], generator=seeded(), callback=lambda event: shown.append(event.render())
    )
    assert images.shape == (2, 3, 64, 64)
    assert float(images.abs().max()) <= 1
    assert len(shown) == len(model.pyramid.scales)
    torch.testing.assert_close(shown[-1], images)
    assert model.generate([0], streams=2).shape == (1, 2, 3, 64, 64)

    path = model.save_pretrained(tmp_path / "ear.safetensors")
    again = EnergyAR.from_pretrained(path)
    torch.testing.assert_close(again.generate([0, 1], generator=seeded()), images)
    assert again.fingerprint() == model.fingerprint()
    faithful = EnergyAR.from_pretrained(path, decoder="faithful")
    assert not torch.equal(faithful.generate([0, 1], generator=seeded()), images)
    half = model.save_pretrained(tmp_path / "half.safetensors", dtype=torch.float16)
    assert half.stat().st_size < 0.7 * path.stat().st_size
    assert EnergyAR.load(half).fingerprint() == model.fingerprint()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_are_loaded_for_use_in_the_dtype_asked_for(
    model: EnergyAR, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    path = model.save_pretrained(tmp_path / "half.safetensors", dtype=torch.float16)
    loaded = EnergyAR.load(path, dtype=dtype)
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {dtype or torch.float32}
    for name, statistics in model.pyramid.named_buffers():
        assert torch.equal(loaded.pyramid.get_buffer(name), statistics)  # not rounded to FP16
    assert loaded.fingerprint() == model.fingerprint()  # so streams of the one fit the other
    with torch.no_grad():
        next(loaded.parameters()).mul_(2)
    assert loaded.fingerprint() != model.fingerprint()


def test_what_is_of_another_kind_is_named(model: EnergyAR, tmp_path: Path) -> None:
    path = model.save_pretrained(tmp_path / "ear.safetensors")
    with pytest.raises(ValueError, match=r"dtype must be a torch.dtype.*'fp16'"):
        EnergyAR.from_pretrained(path, dtype="fp16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype must be a torch.dtype.*'fp16'"):
        ParScaleEAR.from_pretrained(dtype="fp16")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a ParScaleEAR, got str"):
        EnergyAR.from_pretrained(path, autoencoder="sharp")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a ParScaleEAR, got NoneType"):
        model.attach(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a class name is text, got 3"):
        model.label(3)  # type: ignore[arg-type]


def test_weights_are_in_fp32_whatever_the_default_is(tmp_path: Path) -> None:
    path = EnergyAR(CONFIG).save_pretrained(tmp_path / "ear.safetensors", dtype=torch.float16)
    expected = EnergyAR.load(path).state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = EnergyAR.load(path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])  # not rounded to BF16 on the way
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\.int8"):
        model.save_pretrained(tmp_path / "int.safetensors", dtype=torch.int8)


def test_a_decoder_is_not_chosen_for_an_autoencoder_that_is_given(tmp_path: Path) -> None:
    path = EnergyAR(CONFIG).save_pretrained(tmp_path / "ear.safetensors")
    with pytest.raises(ValueError, match="one of them"):
        EnergyAR.from_pretrained(path, autoencoder=ParScaleEAR(), decoder="sharp")


def test_weights_recommend_their_settings(tmp_path: Path) -> None:
    model = EnergyAR(CONFIG).eval()
    untold = model.generate_latents([0], generator=seeded())
    model.recommended = {"guidance": 3.5, "temperature": 0.5}
    again = EnergyAR.load(model.save_pretrained(tmp_path / "ear.safetensors"))
    assert again.recommended == model.recommended
    found = again.generate_latents([0], generator=seeded())
    told = model.generate_latents([0], guidance=3.5, temperature=0.5, generator=seeded())
    assert torch.equal(found, told)
    assert not torch.equal(found, untold)


def test_another_autoencoder_is_refused(tmp_path: Path) -> None:
    model = EnergyAR(CONFIG)
    model.latent_fingerprint = "0" * 64
    path = model.save_pretrained(tmp_path / "ear.safetensors")
    with pytest.raises(CheckpointError, match="another autoencoder"):
        EnergyAR.from_pretrained(path)
    assert EnergyAR.load(path).latent_fingerprint == "0" * 64


def test_a_size_of_older_weights_is_passed_over_if_it_was_not_used() -> None:
    told = CONFIG.__dict__
    assert EARConfig.from_dict({**told, "layout_channels": 0}) == CONFIG
    for name, value in (("layout_channels", 3), ("unheard_of", 0)):
        with pytest.raises(ValueError, match=name):
            EARConfig.from_dict({**told, name: value})


def test_foreign_files(tmp_path: Path) -> None:
    streams = ParallelStreams.fitting(CONFIG.transformer, 2)
    path = streams.save_pretrained(tmp_path / "streams.safetensors")
    with pytest.raises(CheckpointError):
        EnergyAR.load(path)

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parscale_ear.autoencoder.files import shipped_weights
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.checkpoint import CheckpointError, load
from parscale_ear.generator.ear import EnergyAR
from parscale_ear.generator.var import VAR

KEYS = Path(__file__).with_name("state_dict_keys.txt")


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) * 2 - 1


def test_parameter_names_are_pinned() -> None:
    names = [f"{k} {tuple(v.shape)}" for k, v in ParScaleEAR().state_dict().items()]
    assert names == KEYS.read_text().splitlines()
    parts = {name.split(".")[0].split(" ")[0] for name in names}
    assert parts == {"encoder", "hybrid", "decoder", "latent_mean", "latent_std"}


def test_save_and_load_give_the_same_bits(tiny: ParScaleEAR, tmp_path: Path) -> None:
    path = tiny.save_pretrained(tmp_path / "run", note="ours")
    assert path == tmp_path / "run" / "model.safetensors"
    x = images(1, 3, 64, 64)
    for source in (path, tmp_path / "run"):
        loaded = ParScaleEAR.from_pretrained(source)
        assert loaded.config == tiny.config
        assert not loaded.training
        assert torch.equal(loaded(x), tiny(x))
        assert loaded.latent_fingerprint() == tiny.latent_fingerprint()


def test_dtype_and_device(tiny: ParScaleEAR, tmp_path: Path) -> None:
    path = tiny.save_pretrained(tmp_path, dtype=torch.float16)
    assert next(ParScaleEAR.from_pretrained(path).parameters()).dtype == torch.float32
    half = ParScaleEAR.from_pretrained(path, device="cpu", dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    # BF16 rounds what the fingerprint is of; it is the same latent space all the same.
    assert half.latent_fingerprint() == tiny.latent_fingerprint()
    with torch.no_grad():
        half.encoder.level2.bias += 1
    assert half.latent_fingerprint() != tiny.latent_fingerprint()


def test_weights_stored_in_bf16_are_of_the_same_latents(tiny: ParScaleEAR, tmp_path: Path) -> None:
    stored = ParScaleEAR.from_pretrained(tiny.save_pretrained(tmp_path, dtype=torch.bfloat16))
    assert stored.latent_fingerprint() == tiny.latent_fingerprint()
    again = ParScaleEAR.from_pretrained(stored.save_pretrained(tmp_path / "again"))
    assert again.latent_fingerprint() == tiny.latent_fingerprint()
    with torch.no_grad():
        stored.encoder.level2.bias += 1
    assert stored.latent_fingerprint() != tiny.latent_fingerprint()


def test_the_fingerprint_follows_encoder_and_normalisation(tiny: ParScaleEAR) -> None:
    before = tiny.latent_fingerprint()
    with torch.no_grad():
        tiny.decoder.bands2.bias += 1
    assert tiny.latent_fingerprint() == before
    with torch.no_grad():
        tiny.encoder.level2.bias += 1
    changed = tiny.latent_fingerprint()
    assert changed != before
    tiny.latent_std.mul_(2)
    assert tiny.latent_fingerprint() not in (before, changed)


def test_weights_of_another_shape_are_refused(tiny: ParScaleEAR, tmp_path: Path) -> None:
    tiny.encoder.level2 = torch.nn.Conv2d(48, 8, 1)
    path = tiny.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="size mismatch"):
        ParScaleEAR.from_pretrained(path)


def test_two_decoders_share_one_copy_of_the_encoder(tiny: ParScaleEAR, tmp_path: Path) -> None:
    whole = tiny.save_pretrained(tmp_path / "whole.safetensors")
    part = tiny.save_pretrained(
        tmp_path / "part.safetensors", shared_parts=("encoder",), shared_file=whole.name
    )
    assert part.stat().st_size < whole.stat().st_size
    x = images(1, 3, 32, 32)
    assert torch.equal(ParScaleEAR.from_pretrained(part)(x), tiny(x))
    with torch.no_grad():
        tiny.encoder.level2.bias += 1
    tiny.save_pretrained(whole)
    with pytest.raises(CheckpointError, match="another latent space"):
        ParScaleEAR.from_pretrained(part)
    whole.unlink()
    with pytest.raises(
        CheckpointError,
        match=r"part.*: shares encoder with whole\.safetensors.*into one folder",
    ):
        ParScaleEAR.from_pretrained(part)


@pytest.mark.parametrize("half", [{"shared_parts": ("encoder",)}, {"shared_file": "a"}])
def test_a_file_that_could_not_be_loaded_is_not_written(
    tiny: ParScaleEAR, tmp_path: Path, half: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="go together"):
        tiny.save_pretrained(tmp_path / "a.safetensors", **half)
    assert not list(tmp_path.iterdir())


def test_a_shared_hybrid_must_be_the_same_too(tiny: ParScaleEAR, tmp_path: Path) -> None:
    whole = tiny.save_pretrained(tmp_path / "whole.safetensors")
    part = tiny.save_pretrained(
        tmp_path / "part.safetensors",
        shared_parts=("encoder", "hybrid"),
        shared_file=whole.name,
    )
    assert not any(k.startswith(("encoder", "hybrid")) for k in load(part)[0])
    x = images(1, 3, 32, 32)
    assert torch.equal(ParScaleEAR.from_pretrained(part)(x), tiny(x))
    assert tiny.hybrid is not None
    assert tiny.hybrid.fine is not None
    with torch.no_grad():
        tiny.hybrid.fine.expand.bias += 1
    tiny.save_pretrained(whole)
    with pytest.raises(CheckpointError, match="from one release"):
        ParScaleEAR.from_pretrained(part)


def test_files_can_be_read_by_others(tiny: ParScaleEAR, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = tiny.save_pretrained(tmp_path)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_unknown_variant() -> None:
    with pytest.raises(ValueError, match="variant must be"):
        shipped_weights("large")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decoder must be"):
        shipped_weights(decoder="blurred")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no sharp decoder for the baseline"):
        shipped_weights("baseline", "sharp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_cast_to_bf16_later_are_of_the_same_latents(
    tiny: ParScaleEAR, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tiny.save_pretrained(tmp_path / "w.safetensors")
    loaded = ParScaleEAR.from_pretrained(path, dtype=dtype)
    assert loaded.bfloat16().latent_fingerprint() == tiny.latent_fingerprint()


def test_loading_draws_no_random_numbers(tiny: ParScaleEAR, tmp_path: Path) -> None:
    path = tiny.save_pretrained(tmp_path / "w.safetensors")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    ParScaleEAR.from_pretrained(path)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, "fp16"])
def test_dtypes_that_nothing_can_be_computed_in(dtype: torch.dtype, tmp_path: Path) -> None:
    for model in (ParScaleEAR, EnergyAR):
        with pytest.raises(ValueError, match="dtype must be"):
            model.from_pretrained(dtype=dtype)
    with pytest.raises(ValueError, match="dtype must be"):
        VAR.from_pretrained(tmp_path / "var.safetensors", dtype=dtype)
    with pytest.raises(ValueError, match="dtype must be"):
        VAR.from_official("vqvae.pth", "var.pth", dtype=dtype)
    with pytest.raises(ValueError, match="dtype must be"):
        ParScaleEAR().save_pretrained(tmp_path / "w.safetensors", dtype=dtype)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("parts", "file", "message"),
    [
        ("encoder", "other.safetensors", "shared_parts must be several names"),
        (("encoder", "decodr"), "other.safetensors", "'decodr', of which the model has no weights"),
        (("encoder",), "w.safetensors", "another file in the same folder"),
        (("encoder",), "../other.safetensors", "another file in the same folder"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    tiny: ParScaleEAR, tmp_path: Path, parts: tuple[str, ...], file: str, message: str
) -> None:
    path = tiny.save_pretrained(tmp_path / "w.safetensors")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        tiny.save_pretrained(path, shared_parts=parts, shared_file=file)
    assert path.read_bytes() == before


def test_a_new_folders_file_does_not_share_with_itself(tiny: ParScaleEAR, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another file in the same folder"):
        tiny.save_pretrained(
            tmp_path / "new", shared_parts=("encoder",), shared_file="model.safetensors"
        )
    assert not (tmp_path / "new").exists()

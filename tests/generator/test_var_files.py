"""A VAR's sizes and files, its own and the published ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from official import Sizes, official_states, var_shapes, vqvae_shapes
from tiny_var import draw, read_vectors
from torch import Tensor

from parscale_ear.checkpoint import CheckpointError
from parscale_ear.generator.var import VAR, VARConfig
from parscale_ear.generator.vqvae import VQVAEConfig


def test_names_and_shapes_of_the_published_checkpoints() -> None:
    # SHA-256 of the sorted names and shapes of vae_ch160v4096z32.pth and var_d16.pth.
    for shapes, count, expected in (
        (
            vqvae_shapes(Sizes()),
            324,
            "ebbccd01046f9bc29d4b5245703ad44e3bb31dbe0447023e560771bb3c33fa11",
        ),
        (
            var_shapes(Sizes()),
            220,
            "d1a89666fe31361fbebc3ff68e8115725b9b5c12297523af37b458d0a33949c8",
        ),
    ):
        text = json.dumps(sorted((name, list(shape)) for name, shape in shapes.items()))
        assert len(shapes) == count
        assert hashlib.sha256(text.encode()).hexdigest() == expected


@pytest.mark.parametrize("depth", [16, 20, 24, 30])
def test_sizes_of_the_published_models(depth: int) -> None:
    # Tian et al. (2024), table 1: 310 M, 600 M, 1.0 B and 2.0 B parameters.
    with torch.device("meta"):
        var = VAR(VARConfig(depth=depth))
    expected = {16: 310e6, 20: 600e6, 24: 1.03e9, 30: 2.01e9}[depth]
    assert var.parameter_count()["transformer"] == pytest.approx(expected, rel=0.02)
    assert var.config.heads == depth
    assert var.config.transformer.tokens == 680


@pytest.mark.parametrize(
    "values",
    [
        {"depth": 0},
        {"width": 100, "heads": 3},
        {"classes": 0},
        {"vqvae": {"sides": (2, 1)}},
        {"vqvae": {"width": 100}},
        {"vqvae": {"vocabulary": 0}},
    ],
)
def test_config_names_a_bad_field(values: dict[str, object]) -> None:
    def build() -> VARConfig:
        if isinstance(values.get("vqvae"), dict):
            return VARConfig(vqvae=VQVAEConfig(**values["vqvae"]))  # type: ignore[arg-type]
        return VARConfig(**values)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"must be|and grow"):
        build()


def test_save_and_load(var: VAR, tmp_path: Path) -> None:
    path = var.save_pretrained(tmp_path / "var.safetensors")
    loaded = VAR.from_pretrained(path)
    assert torch.equal(draw(loaded, 0), draw(var, 0))
    assert loaded.fingerprint() == var.fingerprint()
    assert loaded.config == var.config
    narrow = VAR.from_pretrained(path, dtype=torch.bfloat16)
    assert narrow.transformer.positions.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="no such weight file"):
        VAR.from_pretrained(tmp_path / "none.safetensors")


def edited(kind: str, tmp_path: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """A transformer's checkpoint with a fault."""
    _, state = official_states(read_vectors(kind)[0])
    edit(state)
    path = tmp_path / "edited.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("blocks.1.ffn.fc1.bias"), r"missing keys.*blocks\.1\.mlp_in\.bias"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), r"foreign keys: extra\.weight"),
        (lambda s: s.update({"head.weight": torch.zeros(1, 2)}), r"head\.weight is \(1, 2\)"),
        (lambda s: s["blocks.0.attn.zero_k_bias"].fill_(1), "not zero"),
        (lambda s: s.pop("lvl_1L"), "lacks lvl_1L"),
        (lambda s: s.update({"lvl_1L": torch.zeros(1, 3).long()}), "sides of square"),
        (lambda s: s.clear(), "lacks lvl_1L"),
    ],
)
def test_every_key_of_a_foreign_checkpoint_is_accounted_for(
    edit: Callable[[dict[str, Tensor]], None],
    message: str,
    official_files: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    tokenizer, _ = official_files("l2")
    with pytest.raises(CheckpointError, match=message):
        VAR.from_official(tokenizer, edited("l2", tmp_path, edit))


def test_foreign_checkpoints_are_refused(
    official_files: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    tokenizer, transformer = official_files("l2")
    with pytest.raises(CheckpointError, match="depth 3, expected 16"):
        VAR.from_official(tokenizer, transformer, depth=16)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        VAR.from_official(tmp_path / "none.pth", transformer)
    with pytest.raises(CheckpointError, match="not one of VAR's"):
        VAR.from_official(transformer, transformer)
    torch.save({"a": [1]}, tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="named tensors"):
        VAR.from_official(tmp_path / "list.pth", transformer)
    torch.save({"a": Sizes()}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="tensors alone"):
        VAR.from_official(tmp_path / "code.pth", transformer)
    for damage in (b"hello", b"\x80", b"\x80\x02G", b""):
        (tmp_path / "text.pth").write_bytes(damage)
        with pytest.raises(CheckpointError, match="tensors alone"):
            VAR.from_official(tmp_path / "text.pth", transformer)

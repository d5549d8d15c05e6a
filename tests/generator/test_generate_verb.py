"""``parscale-ear generate`` on tiny weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_var import lively_streams
from torch._inductor.exc import InductorError, InvalidCxxCompiler

from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.cli import main
from parscale_ear.generator.ear import EnergyAR
from parscale_ear.generator.ear_config import EARConfig
from parscale_ear.generator.var import VAR


@pytest.fixture
def checkpoint(var: VAR, tmp_path: Path) -> str:
    return str(var.save_pretrained(tmp_path / "var.safetensors"))


def generate(*words: object) -> int:
    return main(["generate", "--device", "cpu", *map(str, words)])


def test_writes_a_grid(checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "sub" / "grid.png"
    words = ["--checkpoint", checkpoint, "--class", 3, "--count", 3, "--batch", 2, "--out", out]
    assert generate(*words) == 0
    first = Image.open(out)
    assert first.size == (64, 3 * 64 + 2 * 4)
    pixels = first.tobytes()
    assert generate(*words) == 0
    assert Image.open(out).tobytes() == pixels  # the same seed
    assert generate(*words, "--seed", 1) == 0
    assert Image.open(out).tobytes() != pixels


def test_weights_that_do_not_say_how_they_were_trained(var: VAR, tmp_path: Path) -> None:
    path = var.save_pretrained(tmp_path / "var.safetensors", training=None)
    assert generate("--checkpoint", path, "--out", tmp_path / "grid.png") == 0


def test_streams(var: VAR, checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    assert generate("--checkpoint", checkpoint, "--streams", 3, "--count", 2, "--out", out) == 0
    assert Image.open(out).size == (3 * 64 + 2 * 4, 2 * 64 + 4)
    trained = lively_streams(var, 2).save_pretrained(
        tmp_path / "streams.safetensors", backbone=var.fingerprint()
    )
    words = ["--checkpoint", checkpoint, "--streams-weights", trained, "--out", out]
    assert generate(*words) == 0
    assert Image.open(out).size == (2 * 64 + 4, 64)
    assert generate(*words, "--mode", "aggregate", "--dtype", "bf16") == 0
    assert Image.open(out).size == (64, 64)


def test_compiles_on_request_what_is_not_packed(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_(self: VAR) -> None:
        original(self, backend="eager")  # quick; raises if weights are packed
        compiled.append(self)

    compiled: list[VAR] = []
    original = VAR.compile
    monkeypatch.setattr(VAR, "compile", compile_)
    plain, out = tmp_path / "plain.png", tmp_path / "compiled.png"
    words = ["--checkpoint", checkpoint, "--class", 3, "--dtype", "fp32", "--out"]
    assert generate(*words, plain) == 0
    assert not compiled
    assert generate(*words, out, "--compile") == 0
    assert len(compiled) == 1
    pixels = [np.asarray(Image.open(path)).astype(int) for path in (plain, out)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_official_files(official_files: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    assert generate("--official", *official_files("l2"), "--class", 7, "--out", out) == 0
    assert Image.open(out).size == (64, 64)


@pytest.fixture
def energy(tmp_path: Path) -> str:
    """A tiny EnergyAR on the shipped autoencoder's latents."""
    config = EARConfig(
        depth=1, width=16, heads=1, head_width=16, head_blocks=1, noise_channels=4, side=2,
        class_names=("tench", "golf ball"),
    )  # fmt: skip
    model = EnergyAR(config)
    model.latent_fingerprint = ParScaleEAR.from_pretrained().latent_fingerprint()
    return str(model.save_pretrained(tmp_path / "ear.safetensors"))


def test_classes_by_name(energy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named, numbered = tmp_path / "named.png", tmp_path / "numbered.png"
    words = ["--checkpoint", energy, "--count", 2, "--streams", 3, "--guidance", 2]
    assert generate(*words, "--class", "Golf Ball", "--out", named) == 0
    assert generate(*words, "--class", 1, "--out", numbered) == 0
    assert Image.open(named).size == (3 * 32 + 2 * 4, 2 * 32 + 4)
    assert Image.open(named).tobytes() == Image.open(numbered).tobytes()
    capsys.readouterr()
    assert generate(*words, "--class", "gulf ball", "--out", tmp_path / "none.png") == 2
    assert "near: 'golf ball'" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def test_both_decoders(energy: str, tmp_path: Path) -> None:
    pictures = []
    for decoder in ("faithful", "sharp"):
        out = tmp_path / f"{decoder}.png"
        assert generate("--checkpoint", energy, "--decoder", decoder, "--out", out) == 0
        pictures.append(Image.open(out).tobytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("which", "words", "message"),
    [
        ("energy", ["--top-k", "5"], "--top-k does not go with EnergyAR"),
        ("energy", ["--temperature", "2"], "temperature must be in [0, 1]"),
        ("energy", ["--class", "2"], "0..1"),
        ("checkpoint", ["--temperature", "0.5"], "--temperature does not go with VAR"),
        ("checkpoint", ["--decoder", "sharp"], "--decoder does not go with VAR"),
        ("checkpoint", ["--class", "golf ball"], "by number only"),
    ],
)
def test_options_of_the_other_model(
    which: str,
    words: list[str],
    message: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "grid.png"
    assert generate("--checkpoint", request.getfixturevalue(which), *words, "--out", out) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not out.exists()


def test_weights_that_draw_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ParScaleEAR.from_pretrained().save_pretrained(tmp_path)
    assert generate("--checkpoint", path, "--out", tmp_path / "grid.png") == 2
    assert "of kind ParScaleEAR, which draws no pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--class", "10"], "0..9"),
        (["--top-p", "0"], "top_p must be above 0"),
        (["--guidance", "-1"], "guidance must be at least 0"),
        (
            ["--streams", "2", "--mode", "aggregate"],
            "joins trained streams; give --streams-weights",
        ),
        (["--mode", "aggregate"], "joins trained streams; give --streams-weights"),
        (["--out", "grid.jpg"], "name a .png file"),
        (["--streams-weights", "none.safetensors"], "no such weight file"),
        (["--checkpoint", "none.safetensors"], "no such weight file"),
        (["--out", "folder.png"], "folder.png is a folder; name a file"),
        (["--out", "file/grid.png"], "nothing can be written in"),
        (["--class=--5"], "knows its classes by number only"),
    ],
)
def test_wrong_use_is_one_line(
    words: list[str],
    message: str,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    asked = ["--checkpoint", checkpoint] if "--checkpoint" not in words else []
    asked += ["--out", "grid.png"] if "--out" not in words else []
    assert generate(*asked, *words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("parscale-ear: ")
    assert not any("Traceback" in line for line in lines)
    assert sorted(tmp_path.iterdir()) == before


def test_streams_of_another_number_are_refused(
    var: VAR, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = lively_streams(var, 2).save_pretrained(tmp_path / "streams.safetensors")
    out = tmp_path / "grid.png"
    words = ["--checkpoint", checkpoint, "--streams-weights", trained, "--streams", 4]
    assert generate(*words, "--out", out) == 2
    assert "holds 2 streams" in capsys.readouterr().err
    assert not out.exists()


def test_what_compiling_fails_at_is_one_line(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def compile_(self: VAR) -> None:
        self.generate = fail  # type: ignore[assignment]

    def fail(*_: object, **__: object) -> None:
        raise InductorError(InvalidCxxCompiler(), None)

    monkeypatch.setattr(VAR, "compile", compile_)
    out = tmp_path / "grid.png"
    assert generate("--checkpoint", checkpoint, "--class", 3, "--out", out, "--compile") == 2
    lines = capsys.readouterr().err.splitlines()
    assert re.search("leave --compile out$", lines[-1])
    assert not any("Traceback" in line for line in lines)
    assert not out.exists()


def test_pictures_that_are_not_finite_are_not_written(
    var: VAR, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for parameter in var.vqvae.decoder.parameters():
        parameter.data.fill_(torch.nan)
    path, out = var.save_pretrained(tmp_path / "broken.safetensors"), tmp_path / "grid.png"
    assert generate("--checkpoint", path, "--class", 3, "--out", out) == 2
    assert "the decoded pictures were not finite" in capsys.readouterr().err
    assert not out.exists()

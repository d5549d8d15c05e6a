from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.training import comparison

pytest.importorskip("timm", reason="training needs the extra 'train'")


def test_wider_has_the_hybrids_parameters() -> None:
    sizes = {
        name: ParScaleEAR(config).parameter_count()["total"]
        for name, config in comparison.variants().items()
    }
    assert 0.97 < sizes["LiteVAE, wider"] / sizes["hybrid"] < 1.01
    assert sizes["LiteVAE"] < sizes["coarse only"] < sizes["hybrid"]
    assert sizes["LiteVAE"] < sizes["fine only"] < sizes["hybrid"]
    flops = {n: ParScaleEAR(c).flops() for n, c in comparison.variants().items()}
    assert flops["LiteVAE, wider"] > flops["LiteVAE"]


def test_conditions_do_what_they_are_called() -> None:
    latent = torch.randn(2, 4, 16, 16)
    conditions = comparison.conditions()
    assert list(conditions) == ["clean", "noise 0.1", "noise 0.2", "8 bits", "6 bits", "4 bits"]
    for name, apply in conditions.items():
        changed = apply(latent, 3)
        assert torch.equal(changed, apply(latent, 3))  # the same for every variant
        if name == "clean":
            assert changed is latent
        elif name.startswith("noise"):
            sigma = float(name.split()[1])
            assert (changed - latent).std().item() == pytest.approx(sigma, rel=0.1)
            assert not torch.equal(changed, apply(latent, 4))  # other pictures, other noise
        else:
            bits = int(name.split()[0])
            assert len(changed.unique()) <= 2**bits
            inside = latent.abs() < comparison.RANGE
            limit = comparison.RANGE / (2**bits - 1) + 1e-6
            assert (changed - latent)[inside].abs().max() <= limit


@pytest.mark.parametrize(
    ("seeds", "spread"), [(2, 0.02), (2, 0.0), (3, 0.02), (3, 0.005), (3, 0.1), (8, 0.02)]
)
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int, spread: float) -> None:
    """Seeds and pictures both differ; of 2,000 intervals 1,900 or more must hold 0.

    A true share of 0.95 falls below 0.94 by chance once in fifty times; the seed is fixed.
    """
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        by_seed = spread * rng.standard_normal((seeds, 1))
        values = by_seed + 0.1 * rng.standard_normal(100) + 0.05 * rng.standard_normal((seeds, 100))
        found = comparison.interval(values)
        held += found["low"] <= 0 <= found["high"]
    assert 0.94 <= held / 2000 < 1


def test_intervals_are_paired() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.normal(27, 4, (1, 200))
    noise = rng.normal(0, 0.05, (4, 200))
    figures = {
        "hybrid": {"clean": (pictures + noise).tolist()},
        "LiteVAE": {"clean": (pictures - 0.1 + noise[::-1]).tolist()},
    }
    entry = comparison.summarise(figures)["LiteVAE"]["clean"]
    assert entry["minus_hybrid"]["value"] == pytest.approx(-0.1, abs=1e-6)
    assert -0.13 < entry["minus_hybrid"]["low"] < -0.1 < entry["minus_hybrid"]["high"] < -0.07
    assert entry["psnr_db"]["high"] - entry["psnr_db"]["low"] > 0.5  # pictures differ much more
    assert "minus_hybrid" not in comparison.summarise(figures)["hybrid"]["clean"]


@pytest.mark.slow
def test_from_pictures_to_figures(
    folder_of_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = ["--images", str(folder_of_pictures), "--validation", str(folder_of_pictures)]
    options += ["--steps", "2", "--batch", "1", "--crop", "32", "--precision", "fp32"]
    options += ["--out", str(tmp_path / "out")]
    assert comparison.main(options) == 0
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert set(result["variants"]) == set(comparison.variants())
    assert (result["dtype"], result["threads"]) == ("float32", torch.get_num_threads())
    assert len(result["variants"]["hybrid"]["4 bits"]["seeds_psnr_db"]) == 2
    for seeds in (("1",), ("1", "1"), ("0", "0", "1")):  # one twice would count as two trainings
        assert comparison.main([*options, "--seeds", *seeds]) == 2
        assert "at least two seeds are needed, all different" in capsys.readouterr().err
    assert comparison.main([*options, "--steps", "3"]) == 2
    assert "another steps" in capsys.readouterr().err
    monkeypatch.setattr(comparison, "__version__", "99.0")
    assert comparison.main(options) == 2
    assert "another release" in capsys.readouterr().err
    monkeypatch.undo()
    more = folder_of_pictures / "one_more.png"
    try:
        Image.new("RGB", (64, 64)).save(more)
        assert comparison.main(options) == 2
        assert "another pictures" in capsys.readouterr().err
    finally:
        more.unlink()

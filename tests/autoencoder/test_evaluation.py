from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from parscale_ear.autoencoder import evaluation
from parscale_ear.autoencoder.evaluation import EvaluationOptions, evaluate
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.reconstruct import reconstruct_pictures
from parscale_ear.data.images import ImageError, find_images, load_squares
from parscale_ear.metrics.features import load_extractor
from parscale_ear.metrics.frechet import frechet_distance
from parscale_ear.metrics.reconstruction import haarpsi, mean_quality

OPTIONS = EvaluationOptions(side=64, batch=4, features="efficientnet-lite1")


def test_equals_the_parts(folder_of_pictures: Path, shipped: ParScaleEAR) -> None:
    (folder_of_pictures / "broken.png").write_bytes(b"no picture")
    refs = find_images([folder_of_pictures])
    done: list[int] = []
    result = evaluate(refs, OPTIONS, progress=done.append)
    assert sum(done) == 7
    assert result["skipped"] == {
        "pictures/broken.png": "not a readable picture (of no known format)"
    }
    originals = load_squares(refs, 64)
    restored = reconstruct_pictures(shipped, originals, batch_size=4)
    for key, value in mean_quality(restored, originals).items():
        assert result[key] == pytest.approx(value, abs=1e-6)
    assert result["haarpsi"] == pytest.approx(haarpsi(restored, originals).mean(), abs=1e-6)
    assert result["ms_ssim"] is None  # too small for five scales
    extractor, _ = load_extractor("efficientnet-lite1")
    features = [extractor(x).numpy().astype(np.float64) for x in (restored, originals)]
    assert result["frechet_distance"] == pytest.approx(frechet_distance(*features), rel=1e-3)
    assert result["distance_name"] == "FD-EfficientNetLite1"
    assert result["images_per_s"] > 0


def test_refinements_are_measured(folder_of_pictures: Path, shipped: ParScaleEAR) -> None:
    refs = find_images([folder_of_pictures])
    result = evaluate(refs, replace(OPTIONS, refinements=1))
    originals = load_squares(refs, 64)
    restored = reconstruct_pictures(shipped, originals, refinements=1, batch_size=4)
    assert result["psnr_db"] == pytest.approx(mean_quality(restored, originals)["psnr_db"])
    assert result["psnr_db"] != pytest.approx(evaluate(refs, OPTIONS)["psnr_db"], abs=1e-3)
    assert result["refinements"] == 1


def test_two_processes_give_the_same(folder_of_pictures: Path) -> None:
    refs = find_images([folder_of_pictures])
    one = evaluate(refs, OPTIONS)
    two = evaluate(refs, OPTIONS, devices=("cpu", "cpu"))
    for key in ("psnr_db", "ssim", "haarpsi", "frechet_distance"):
        assert two[key] == pytest.approx(one[key], rel=1e-4)
    assert (one["processes"], two["processes"]) == (1, 2)


def test_speed_is_of_the_pictures_behind_the_first_batch(
    folder_of_pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock that is read before and after every batch, half a second apart.
    clock = SimpleNamespace(perf_counter=itertools.count(0, 0.5).__next__)
    monkeypatch.setattr(evaluation, "time", clock)
    refs = find_images([folder_of_pictures])
    assert len(refs) == 6
    assert evaluate(refs, OPTIONS)["images_per_s"] == pytest.approx(2 / 0.5)
    assert evaluate(refs[:4], OPTIONS)["images_per_s"] is None  # one batch: it warms up


def test_fp32_is_not_rounded_to_tf32(
    folder_of_pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[bool] = []

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return reconstruct_pictures(*arguments, **options)

    monkeypatch.setattr(evaluation, "reconstruct_pictures", spy)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        evaluate(find_images([folder_of_pictures]), OPTIONS)
    assert set(allowed) == {False}


def test_ms_ssim_where_it_fits(photographs: torch.Tensor, tmp_path: Path) -> None:
    from parscale_ear.data.images import save_png

    for index in range(2):
        save_png(photographs[index], tmp_path / f"{index}.png")
    result = evaluate(find_images([tmp_path]), EvaluationOptions(features="efficientnet-lite1"))
    assert 0.8 < result["ms_ssim"] < 1


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="none of the pictures"):
        evaluate(find_images([tmp_path / "a.png"]), OPTIONS)


@pytest.mark.parametrize("changes", [{"side": 100}, {"batch": 0}, {"dtype": "int8"}])
def test_bad_options(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        EvaluationOptions(**changes)


def test_what_is_not_finite_is_not_judged(folder_of_pictures: Path, broken_weights: Path) -> None:
    options = EvaluationOptions(**{**vars(OPTIONS), "weights": str(broken_weights)})
    with pytest.raises(ValueError, match="reconstructions were not finite"):
        evaluate(find_images([folder_of_pictures]), options)


def test_no_pictures() -> None:
    with pytest.raises(ImageError, match="no pictures to evaluate"):
        evaluate([], OPTIONS)


def test_no_devices(folder_of_pictures: Path) -> None:
    with pytest.raises(ValueError, match="devices must name at least one"):
        evaluate(find_images([folder_of_pictures]), OPTIONS, devices=())


def test_computes_in_the_dtype_that_is_asked_for(folder_of_pictures: Path) -> None:
    refs = find_images([folder_of_pictures])
    whole = evaluate(refs, OPTIONS)
    half = evaluate(refs, EvaluationOptions(**{**vars(OPTIONS), "dtype": "bf16"}))
    assert (whole["dtype"], half["dtype"]) == ("fp32", "bf16")
    assert 0 < abs(half["psnr_db"] - whole["psnr_db"]) < 0.05

from __future__ import annotations

import torch

from ci._distances import compare, distance_head, distance_rows
from parscale_ear.data.reference import ReferenceSet
from parscale_ear.metrics.reconstruction import HIGHEST_PSNR


class MeanColour:
    """Three features that can be worked out by hand."""

    name = distance = "mean colour"
    dimensions = 3

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.float().mean(dim=(2, 3))


def reference() -> ReferenceSet:
    """Two crops each of four scenes, dealt in turn; the scenes differ, their crops hardly."""
    shades = torch.tensor([20, 60, 120, 180, 22, 62, 122, 182], dtype=torch.uint8)
    pictures = shades[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    return ReferenceSet(pictures, (0, 1, 2, 3, 0, 1, 2, 3), ("",) * 8, "shades", "")


def test_equal_and_shifted_variants() -> None:
    found = reference()
    variants = {"same": found.pictures, "lighter": found.pictures + 10}
    result = compare(found, variants, MeanColour(), against={"lighter": "same"}, seed=0)
    same, lighter = result["variants"]["same"], result["variants"]["lighter"]
    assert same["psnr_db"]["value"] == HIGHEST_PSNR  # exact: no infinity in a report
    assert abs(same["distance"]["value"]) < 1e-6
    assert abs(lighter["distance"]["value"] - 3 * 10**2) < 1e-6
    difference = result["differences"]["lighter"]
    assert difference["against"] == "same"
    assert abs(difference["distance"]["value"] - 300) < 1e-6
    assert difference["haarpsi"]["value"] < 0
    head, rows = distance_head(result), distance_rows(result)
    assert all(len(row) == len(head) for row in rows)
    assert [row[0] for row in rows] == ["same", "lighter", "lighter − same"]
    assert rows[0][head.index("MS-SSIM")] == "—"  # not defined for 32 pixels


def test_the_yardstick_halves_every_photograph() -> None:
    found = reference()
    result = compare(found, {"same": found.pictures}, MeanColour(), against={}, seed=0)
    assert abs(result["reference_distance"] - 3 * 2**2) < 1e-6

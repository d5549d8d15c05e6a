"""Plots and picture grids of the report, as PNG bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.figure import Figure

from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.reconstruct import reconstruct_pictures
from parscale_ear.data.images import grid
from parscale_ear.data.reference import wheel_reference

SHOWN = (0, 1, 2, 4, 6, 8)  # astronaut, chelsea, coffee, motorcycle, grace_hopper, camera
AMPLIFIED = 5


def data_url(png: bytes) -> str:
    """A picture that an HTML file carries in itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def picture_grid(device: torch.device) -> bytes:
    """Rows of original, baseline, hybrid and amplified difference, at 1:1."""
    pictures = wheel_reference(14).pictures[list(SHOWN)]
    columns = [pictures]
    for variant in ("baseline", "hybrid"):
        model = ParScaleEAR.from_pretrained(
            variant=variant,  # type: ignore[arg-type]
            device=device,
            dtype=torch.float32,
        )
        columns.append(reconstruct_pictures(model, pictures))
    difference = (columns[-1].float() - pictures.float()) * AMPLIFIED + 128
    columns.append(difference.clamp(0, 255).round().to(torch.uint8))
    buffer = io.BytesIO()
    grid([list(row) for row in zip(*columns, strict=True)]).save(buffer, format="PNG")
    return buffer.getvalue()


def latency_plot(figures: Mapping[str, Any]) -> bytes:
    """Median and P99 per image against batch size."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    sizes = [row["batch_size"] for row in figures["batches"]]
    for key, label in (("p50", "median"), ("p99", "P99")):
        values = [row[f"{key}_ms_per_image"] for row in figures["batches"]]
        axis.plot(sizes, values, marker="o", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("batch size")
    axis.set_ylabel("ms per image")
    axis.legend()
    return _png(figure)


def ablation_plot(figures: Mapping[str, Any]) -> bytes:
    """Differences in PSNR and distance when branches are off, with intervals."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots(1, 2)
    names = list(figures["differences"])
    labels = (("psnr_db", "PSNR, dB"), ("distance", figures["distance_name"]))
    for axis, (metric, label) in zip(axes, labels, strict=True):
        rows = [figures["differences"][name][metric] for name in names]
        values = [row["value"] for row in rows]
        errors = [
            [row["value"] - row["low"] for row in rows],
            [row["high"] - row["value"] for row in rows],
        ]
        axis.errorbar(values, range(len(names)), xerr=errors, fmt="o", capsize=4)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_xlabel(f"change in {label}")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()

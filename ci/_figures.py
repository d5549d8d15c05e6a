"""Plots and picture grids of the report, as PNG bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from ci._published import TOKENIZERS
from parscale_ear.autoencoder.files import Decoder
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.reconstruct import reconstruct_pictures
from parscale_ear.data.images import grid
from parscale_ear.data.reference import wheel_reference
from parscale_ear.generator.ear import EnergyAR

SHOWN = (0, 1, 2, 4, 6, 8)  # astronaut, chelsea, coffee, motorcycle, grace_hopper, camera
AMPLIFIED = 5
SAMPLED = (1, 2)  # chelsea, coffee


def data_url(png: bytes) -> str:
    """A picture that an HTML file carries in itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def picture_grid(device: torch.device) -> bytes:
    """Rows of original, faithful, sharp, and the faithful one's amplified difference, at 1:1."""
    columns = _restored(SHOWN, device)
    difference = (columns[1].float() - columns[0].float()) * AMPLIFIED + 128
    columns.append(difference.clamp(0, 255).round().to(torch.uint8))
    return _grid([list(row) for row in zip(*columns, strict=True)])


def restored_sample(device: torch.device) -> bytes:
    """Two rows of original, faithful and sharp at 1:1, for the README."""
    return _grid([list(row) for row in zip(*_restored(SAMPLED, device), strict=True)])


def _restored(scenes: Sequence[int], device: torch.device) -> list[Tensor]:
    """Photographs, and what the faithful and the sharp decoder make of them."""
    pictures = wheel_reference(14).pictures[list(scenes)]
    columns = [pictures]
    for decoder in get_args(Decoder):
        model = ParScaleEAR.from_pretrained(decoder=decoder, device=device, dtype=torch.float32)
        columns.append(reconstruct_pictures(model, pictures))
    return columns


def drawn_grid(device: torch.device, columns: int = 8) -> bytes:
    """A row a class of what the shipped generator draws: the first pictures of seed 0."""
    return _grid(_drawn(device, columns))


def drawn_sample(device: torch.device, shown: int = 4) -> bytes:
    """The same in short and turned, a column a class, for the README."""
    return _grid([list(row) for row in zip(*_drawn(device, shown), strict=True)])


def _drawn(device: torch.device, count: int) -> list[list[Tensor]]:
    """The first pictures of seed 0 of every class."""
    model = EnergyAR.from_pretrained(device=device)
    generator = torch.Generator(device).manual_seed(0)
    return [
        list(model.generate([label] * count, generator=generator).cpu())
        for label in range(len(model.config.class_names))
    ]


def tokenizer_plot(ours: Mapping[str, Mapping[str, float]]) -> bytes:
    """Parameters and FLOPs against PSNR: published tokenizers, and ours on other pictures.

    ``ours``: name → figures, at most two, the upper one last.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, label in (
        (axes[0], "parameters_m", "parameters, millions"),
        (axes[1], "gflop", "GFLOP an image"),
    ):
        for row in TOKENIZERS:
            value = getattr(row, key)
            if value is not None:
                axis.plot(value, row.psnr_db, "o", color="tab:grey")
                axis.annotate(row.name, (value, row.psnr_db), (-6, 0), ha="right", va="center",
                              textcoords="offset points", fontsize=8)  # fmt: skip
        for place, (name, own) in enumerate(ours.items()):
            below, side = ((-1, "top"), (1, "bottom"))[place]
            axis.plot(own[key], own["psnr_db"], "*", color="tab:red", markersize=11)
            axis.annotate(f"{name}*", (own[key], own["psnr_db"]), (9, below), va=side,
                          textcoords="offset points", fontsize=8)  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel(label)
    axes[0].set_ylabel("PSNR, dB")
    return _png(figure)


def _values(rows: Sequence[Mapping[str, float]]) -> list[float]:
    return [row["value"] for row in rows]


def _arms(rows: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """Lengths of error bars, downwards and upwards; matplotlib refuses negative ones."""
    return [
        [row["value"] - row["low"] for row in rows],
        [row["high"] - row["value"] for row in rows],
    ]


def training_plot(variants: Mapping[str, Any]) -> bytes:
    """Difference to the hybrid of models trained without it, or with half of it."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axis = figure.subplots()
    names = [name for name in variants if name != "hybrid"]
    for offset, name in enumerate(names):
        rows = [entry["minus_hybrid"] for entry in variants[name].values()]
        places = [k + 0.15 * (offset - (len(names) - 1) / 2) for k in range(len(rows))]
        axis.errorbar(places, _values(rows), yerr=_arms(rows), fmt="o", capsize=3, label=name)
    axis.set_xticks(range(len(variants["hybrid"])), list(variants["hybrid"]))
    axis.axhline(0, color="grey", linewidth=1)
    axis.set_ylabel("PSNR − hybrid's, dB")
    axis.legend()
    return _png(figure)


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


def streams_plot(figures: Mapping[str, Any]) -> bytes:
    """Seconds of a generation's tokens, stacked by scale, with the measured roof beside them."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axis = figure.subplots()
    cases = figures["cases"]
    shades = colormaps["viridis"]
    starts = [0.0] * len(cases)
    scales = len(cases[0]["scale_s"])
    for scale in range(scales):
        widths = [case["scale_s"][scale] for case in cases]
        shade = shades(scale / max(1, scales - 1))
        axis.barh(range(len(cases)), widths, left=starts, color=shade, label=str(scale + 1))
        starts = [a + b for a, b in zip(starts, widths, strict=True)]
    roofs = [case["roof_s"] for case in cases]
    axis.plot(roofs, range(len(cases)), "|", color="tab:red", markersize=24, label="roof")
    axis.set_yticks(range(len(cases)), [case["name"] for case in cases])
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.legend(title="scale", ncols=2, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return _png(figure)


def worth_plot(counts: Sequence[int], rows: Sequence[Mapping[str, float]], label: str) -> bytes:
    """A difference to one stream against the number of streams, with intervals."""
    figure = Figure(figsize=(5, 2.8), layout="constrained")
    axis = figure.subplots()
    axis.errorbar(counts, _values(rows), yerr=_arms(rows), fmt="o", capsize=4)
    axis.axhline(0, color="grey", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_xlabel("streams")
    axis.set_ylabel(label)
    return _png(figure)


def ablation_plot(figures: Mapping[str, Any]) -> bytes:
    """Differences in PSNR and distance when branches are off, with intervals."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots(1, 2)
    names = list(figures["differences"])
    labels = (("psnr_db", "PSNR, dB"), ("distance", figures["distance_name"]))
    for axis, (metric, label) in zip(axes, labels, strict=True):
        rows = [figures["differences"][name][metric] for name in names]
        axis.errorbar(_values(rows), range(len(names)), xerr=_arms(rows), fmt="o", capsize=4)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_xlabel(f"change in {label}")
    return _png(figure)


def _grid(rows: Sequence[Sequence[Tensor]]) -> bytes:
    buffer = io.BytesIO()
    grid(rows).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()

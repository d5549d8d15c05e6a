"""Turns a finished run into weights to ship: FP16 files, measured again, and the card's figures.

    python -m parscale_ear.training.release RUN --validation DIR_OR_TAR --out parscale_ear/weights

The figures are those of the rounded weights, in FP32, by the protocol that tokenizers are compared
by: short side to 256 by Lanczos, centre crop, 8-bit reconstruction of the posterior's mode, PSNR
and SSIM a picture, then the mean.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from parscale_ear import __version__, checkpoint
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.reconstruct import reconstruct_pictures
from parscale_ear.data.images import find_images, load_squares
from parscale_ear.metrics.reconstruction import mean_quality
from parscale_ear.training.marks import between_marks
from parscale_ear.training.program import FAILED, add_pictures, attempt, new_parser
from parscale_ear.training.recipe import SHARP_KEEPS, named_release

# What each file leaves to hybrid.safetensors, which is whole.
SHARED = {"hybrid": (), "sharp": ("encoder", *SHARP_KEEPS), "baseline": ("encoder",)}
NAMES = {"hybrid": "faithful", "sharp": "sharp", "baseline": "baseline (no hybrid)"}
CARD = "README.md"
BEGIN, END = "<!-- figures: written by parscale_ear.training.release -->", "<!-- /figures -->"


def measure(model: ParScaleEAR, pictures: Tensor, name: str) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM over 8-bit pictures, (N, 3, 256, 256), in the model's dtype."""
    with tqdm(total=len(pictures), desc=name) as bar:
        restored = reconstruct_pictures(model, pictures, progress=bar.update)
    return {key: round(value, 4) for key, value in mean_quality(restored, pictures).items()}


def release(run: Path, validation: Sequence[str], out: Path) -> dict[str, dict[str, Any]]:
    """Writes ``out/{hybrid,sharp,baseline}.safetensors`` and the figures of ``out/README.md``.

    Args:
        run: the folder of a finished run.
        validation: pictures to measure on: files, folders or tar archives.
        out: folder for the weights; its card must hold the two marks.

    Returns:
        The training facts that each header carries.

    Raises:
        CheckpointError: the run is not finished, or damaged.
        ImageError: no pictures.
        ValueError: the models do not share one latent space, or the card lacks its marks.
    """
    pictures = load_squares(find_images(validation))
    card = (out / CARD).read_text(encoding="utf-8")
    with_figures(card, {})  # fails now rather than half-way
    headers = {name: checkpoint.load(run / f"{name}.safetensors")[1] for name in SHARED}
    if len({header.get("latent_fingerprint") for header in headers.values()}) > 1:
        raise ValueError("the models do not share one latent space; they are of different runs")
    facts: dict[str, dict[str, Any]] = {}
    for header in headers.values():
        for stage in header["training"]["history"]:
            stage.setdefault("release", __version__)  # this one, where it was not shipped before
    for name, shared in SHARED.items():
        model = ParScaleEAR.from_pretrained(run / f"{name}.safetensors").half().float()
        facts[name] = {
            **headers[name]["training"],
            "validation": {
                "data": [Path(path).name for path in validation],
                "pictures": len(pictures),
                "side": 256,
                "precision": "float32",
                **measure(model, pictures, name),
            },
        }
        model.save_pretrained(
            out / f"{name}.safetensors",
            dtype=torch.float16,
            shared_parts=shared,
            shared_file="hybrid.safetensors" if shared else "",
            training=facts[name],
        )
    checkpoint.write_text(out / CARD, with_figures(card, facts))
    return facts


def with_figures(card: str, facts: Mapping[str, Mapping[str, Any]]) -> str:
    """The card's text with its figures replaced.

    Raises:
        ValueError: the card lacks its marks.
    """
    lines = ["| weights | decoder | PSNR, dB | SSIM |", "|---|---|---|---|"]
    for name, row in facts.items():
        figures = row["validation"]
        lines.append(
            f"| `{name}.safetensors` | {NAMES[name]} | {figures['psnr_db']:.2f} "
            f"| {figures['ssim']:.4f} |"
        )
    if facts:
        figures = next(iter(facts.values()))["validation"]
        lines += [
            "",
            f"Measured on {figures['pictures']} pictures of {', '.join(figures['data'])} at "
            f"{figures['side']}×{figures['side']}, {figures['precision']}, weights rounded to "
            "FP16.",
            "",
            "Every stage goes on from the one above it, baseline and sharp from hybrid:",
            "",
            "| stage | trains | pictures | steps | minutes | crops a step | peak rate | loss weights |",
            "|---|---|---|---|---|---|---|---|",
        ]
        stages: list[Mapping[str, Any]] = []
        for row in facts.values():
            stages += [stage for stage in row["history"] if stage not in stages]
        for stage in stages:
            weights = ", ".join(f"{k} {v:g}" for k, v in stage["loss_weights"].items())
            name, release = named_release(stage)
            earlier = "" if release == named_release(stages[-1])[1] else f" ({release})"
            lines.append(
                f"| {name}{earlier} | {stage['trains']} | {stage['pictures']:,} "
                f"| {stage['steps']:,} "
                f"| {stage['minutes']:g} | {stage['crops']} of {stage['side']}×{stage['side']} "
                f"| {stage['rate']:g} | {weights or '—'} |"
            )
        last = stages[-1]
        lines += [
            "",
            f"Autocast {last['precision']}, torch {last['torch']}, seed {last['seed']}.",
        ]
    return between_marks(card, BEGIN, END, "\n".join(lines), "the model card")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = new_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    add_pictures(parser, "--validation")
    parser.add_argument("--out", type=Path, default=Path("parscale_ear/weights"))
    arguments = parser.parse_args(argv)
    facts = attempt("release", lambda: release(arguments.run, arguments.validation, arguments.out))
    if facts is None:
        return FAILED
    for variant, row in facts.items():
        figures = row["validation"]
        print(f"{variant}: {figures['psnr_db']} dB, SSIM {figures['ssim']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

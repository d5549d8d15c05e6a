"""Turns a finished run into weights to ship: FP16 files, measured again, and the card's figures.

    python -m parscale_ear.training.release RUN... --validation DIR_OR_TAR --out parscale_ear/weights

The figures are those of the rounded weights, in FP32, by the protocol that tokenizers are compared
by: short side to 256 by Lanczos, centre crop, 8-bit reconstruction of the posterior's mode, PSNR
and SSIM a picture, then the mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from parscale_ear import checkpoint
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.reconstruct import reconstruct_pictures
from parscale_ear.data.images import ImageError, find_images, load_squares
from parscale_ear.metrics.reconstruction import mean_quality
from parscale_ear.training.autoencoder import Recipe

VARIANTS = ("baseline", "hybrid")
TRAINED = {"vae": "encoder and decoder", "baseline": "decoder", "hybrid": "hybrid and decoder"}
CARD = "README.md"
BEGIN, END = "<!-- figures: written by parscale_ear.training.release -->", "<!-- /figures -->"


def measure(model: ParScaleEAR, pictures: Tensor, name: str) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM over 8-bit pictures, (N, 3, 256, 256), in the model's dtype."""
    with tqdm(total=len(pictures), desc=name) as bar:
        restored = reconstruct_pictures(model, pictures, progress=bar.update)
    return {key: round(value, 4) for key, value in mean_quality(restored, pictures).items()}


def release(
    runs: Sequence[Path], validation: Sequence[str], out: Path
) -> dict[str, dict[str, Any]]:
    """Writes ``out/{baseline,hybrid}.safetensors`` and the figures of ``out/README.md``.

    Several runs that start from one ``vae`` stage are averaged, weight by weight: the mean of
    fine-tunings of one model is often better than each (Wortsman et al., "Model soups", 2022).

    Args:
        runs: the folders of finished runs on one latent space.
        validation: pictures to measure on: files, folders or tar archives.
        out: folder for the weights; its card must hold the two marks.

    Returns:
        The training facts that each header carries.

    Raises:
        CheckpointError: a run is not finished, or damaged.
        ImageError: no pictures.
        ValueError: the runs do not share one latent space, or the card lacks its marks.
    """
    pictures = load_squares(find_images(validation))
    card = (out / CARD).read_text(encoding="utf-8")
    with_figures(card, {})  # fails now rather than half-way
    files = {variant: [run / f"{variant}.safetensors" for run in runs] for variant in VARIANTS}
    headers = {v: [checkpoint.load(path)[1] for path in paths] for v, paths in files.items()}
    spaces = {header.get("latent_fingerprint") for group in headers.values() for header in group}
    if len(spaces) > 1:
        raise ValueError("the models do not share one latent space; train them from one vae stage")
    encoder_stage = checkpoint.load(runs[0] / "vae.safetensors")[1]["training"]
    facts: dict[str, dict[str, Any]] = {}
    for variant, paths in files.items():
        model = average([ParScaleEAR.from_pretrained(path) for path in paths]).half().float()
        facts[variant] = {
            "averaged": [header["training"] for header in headers[variant]],
            "encoder_stage": encoder_stage,
            "validation": {
                "data": [Path(path).name for path in validation],
                "pictures": len(pictures),
                "side": 256,
                "precision": "float32",
                **measure(model, pictures, variant),
            },
        }
        model.save_pretrained(
            out / f"{variant}.safetensors",
            dtype=torch.float16,
            encoder_in=None if variant == "hybrid" else "hybrid.safetensors",
            training=facts[variant],
        )
    checkpoint.write_text(out / CARD, with_figures(card, facts))
    return facts


def average(models: Sequence[ParScaleEAR]) -> ParScaleEAR:
    """The first model with the mean of all models' weights."""
    states = [model.state_dict() for model in models]
    mean = {k: torch.stack([state[k] for state in states]).mean(dim=0) for k in states[0]}
    models[0].load_state_dict(mean)
    return models[0]


def with_figures(card: str, facts: Mapping[str, Mapping[str, Any]]) -> str:
    """The card's text with its figures replaced.

    Raises:
        ValueError: the card lacks its marks.
    """
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the model card lacks the marks {BEGIN} and {END}")
    lines = ["| weights | PSNR, dB | SSIM |", "|---|---|---|"]
    for variant, row in facts.items():
        figures = row["validation"]
        lines.append(f"| {variant} | {figures['psnr_db']:.2f} | {figures['ssim']:.4f} |")
    if facts:
        figures = next(iter(facts.values()))["validation"]
        lines += [
            "",
            f"Measured on {figures['pictures']} pictures of {', '.join(figures['data'])} at "
            f"{figures['side']}×{figures['side']}, {figures['precision']}, weights rounded to "
            "FP16.",
            "",
            "| stage | trains | steps | minutes | crops a step | peak rate | SSIM weight |",
            "|---|---|---|---|---|---|---|",
        ]
        stages = [("vae", facts["baseline"]["encoder_stage"])]
        stages += [(variant, row) for variant in facts for row in facts[variant]["averaged"]]
        for stage, row in stages:
            recipe = Recipe.from_dict(row["recipe"])
            side, batch = recipe.crops(stage)
            ssim_weight = "—" if stage == "vae" else f"{recipe.ssim_weight:g}"
            lines.append(
                f"| {stage} | {TRAINED[stage]} | {row['steps']:,} | {row['minutes']:g} "
                f"| {batch} of {side}×{side} | {recipe.loop(stage).learning_rate:g} "
                f"| {ssim_weight} |"
            )
        lines += [
            "",
            "Where a stage stands twice, the weights are the mean of both. "
            f"Seed {recipe.seed}, autocast {recipe.precision} on {recipe.device}, torch "
            f"{row['torch']}.",
        ]
    return f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs; averaged")
    parser.add_argument("--validation", nargs="+", required=True, metavar="DIR_OR_TAR")
    parser.add_argument("--out", type=Path, default=Path("parscale_ear/weights"))
    arguments = parser.parse_args(argv)
    try:
        facts = release(arguments.runs, arguments.validation, arguments.out)
    except (checkpoint.CheckpointError, ImageError, ValueError, OSError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    for variant, row in facts.items():
        figures = row["validation"]
        print(f"{variant}: {figures['psnr_db']} dB, SSIM {figures['ssim']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

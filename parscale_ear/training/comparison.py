"""Is Lite-Hybrid worth its parameters? Trains the model with and without it, and with half of it.

    python -m parscale_ear.training.comparison --images DIR_OR_TAR... --validation DIR_OR_TAR \
        --steps 3000 --seeds 0 1 --out RUN

Every variant is trained from fresh weights by the same recipe, on the same crops, for the same
number of steps, with at least two seeds. Then every one reconstructs the same pictures: from its
own latents, from latents with noise, and from quantised latents. Differences are paired picture by
picture; their intervals are over other seeds and other pictures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student
from torch import Tensor

from parscale_ear import __version__, checkpoint
from parscale_ear.autoencoder.config import ParScaleEARConfig
from parscale_ear.autoencoder.hybrid import HybridConfig
from parscale_ear.autoencoder.litevae import LiteVAEConfig
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.data.crops import RandomCrops
from parscale_ear.data.images import find_images, from_uint8, list_digest, load_squares, to_uint8
from parscale_ear.metrics.reconstruction import psnr
from parscale_ear.profiling.origin import origin
from parscale_ear.training.autoencoder_task import AutoencoderTask
from parscale_ear.training.distributed import OneProcess
from parscale_ear.training.folder import Claim
from parscale_ear.training.loop import (
    LoopConfig,
    Precision,
    Run,
    TrainingError,
    computed_in,
    resolve_precision,
)
from parscale_ear.training.program import FAILED, add_pictures, attempt, new_parser
from parscale_ear.training.recipe import Recipe

NOISE = (0.1, 0.2)  # σ of noise on the normalised latent
BITS = (8, 6, 4)  # of a quantised latent
RANGE = 4.0  # deviations each way that the quantiser covers
LEVEL = 0.95  # of the intervals
BATCH = 8  # pictures at a time when measuring


def variants() -> dict[str, ParScaleEARConfig]:
    """What is compared; all but the first two have a part of the hybrid.

    ``wider`` spends the hybrid's parameters, and about its FLOPs, on layers at 1/16.
    """
    plain = LiteVAEConfig()
    return {
        "LiteVAE": ParScaleEARConfig(hybrid=None),
        "LiteVAE, wider": ParScaleEARConfig(litevae=wider(plain), hybrid=None),
        "hybrid": ParScaleEARConfig(),
        "coarse only": ParScaleEARConfig(hybrid=HybridConfig(fine_width=0)),
        "fine only": ParScaleEARConfig(hybrid=HybridConfig(coarse_width=0)),
    }


def wider(config: LiteVAEConfig) -> LiteVAEConfig:
    """``config`` with wider layers at 1/16, so that it has the hybrid's parameters too."""
    goal = ParScaleEAR(ParScaleEARConfig(litevae=config)).parameter_count()["total"]
    best = config
    for extra in range(0, 65, 8):
        candidate = replace(
            config,
            encoder_widths=(*config.encoder_widths[:2], config.encoder_widths[2] + extra),
            decoder_widths=(*config.decoder_widths[:2], config.decoder_widths[2] + extra),
        )
        model = ParScaleEAR(ParScaleEARConfig(litevae=candidate, hybrid=None))
        if model.parameter_count()["total"] <= goal * 1.01:
            best = candidate
    return best


def conditions() -> dict[str, Callable[[Tensor, int], Tensor]]:
    """What is done to a normalised latent before it is enhanced and decoded."""

    def noisy(sigma: float) -> Callable[[Tensor, int], Tensor]:
        def apply(latent: Tensor, number: int) -> Tensor:
            generator = torch.Generator().manual_seed(number)
            noise: Tensor = sigma * torch.randn(latent.shape, generator=generator)
            return latent + noise

        return apply

    def quantised(bits: int) -> Callable[[Tensor, int], Tensor]:
        step = 2 * RANGE / (2**bits - 1)

        def apply(latent: Tensor, number: int) -> Tensor:
            levels: Tensor = ((latent.clamp(-RANGE, RANGE) + RANGE) / step).round()
            return torch.sub(levels * step, RANGE)

        return apply

    found: dict[str, Callable[[Tensor, int], Tensor]] = {"clean": lambda latent, number: latent}
    found |= {f"noise {sigma:g}": noisy(sigma) for sigma in NOISE}
    return found | {f"{bits} bits": quantised(bits) for bits in BITS}


@torch.inference_mode()
def measure(model: ParScaleEAR, pictures: Tensor) -> dict[str, list[float]]:
    """PSNR of every picture, in dB, under every condition."""
    figures: dict[str, list[float]] = {name: [] for name in conditions()}
    for number, part in enumerate(pictures.split(BATCH)):
        latent = model.encode(from_uint8(part)).mode()
        for name, apply in conditions().items():
            restored = to_uint8(model.decode(model.enhance(apply(latent, number))))
            figures[name] += np.minimum(psnr(restored, part), 100.0).tolist()
    return figures


def train(
    name: str, seed: int, recipe: Recipe, steps: int, crops: RandomCrops, out: Path
) -> ParScaleEAR:
    """Trains one variant with one seed, or takes it up where it stopped."""
    folder = out / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}"
    weights = folder / "model.safetensors"
    if weights.exists():
        return ParScaleEAR.from_pretrained(weights)
    torch.manual_seed(seed)
    model = ParScaleEAR(variants()[name]).train()
    world = OneProcess(torch.device("cpu"))
    shown = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    task = AutoencoderTask("vae", model, crops, recipe, shown, folder, world)
    config = LoopConfig(steps=steps, learning_rate=recipe.learning_rate, precision=recipe.precision)
    run = Run(task, config, folder, resume=True)
    if not run.train():
        raise TrainingError("stopped; the same command goes on")
    averaged = run.average
    assert isinstance(averaged, ParScaleEAR)
    minutes = round(run.progress.seconds / 60, 2)
    averaged.save_pretrained(weights, variant=name, seed=seed, steps=steps, minutes=minutes)
    return averaged


def interval(values: NDArray[np.float64]) -> dict[str, float]:
    """Mean of (seeds, pictures) and its interval over other seeds and other pictures.

    Variances of the seeds' and of the pictures' means are added, each times the square of its own
    Student's t, so that two seeds give wide intervals: no narrower than they say, if anything
    wider. Resampling two seeds would hide how little is known of their variance; one t with
    Satterthwaite's degrees of freedom for the sum holds the truth in 89 to 92 % of simulations with
    two or three seeds that differ by as much as chance within them makes.
    """
    squared = 0.0
    for means in (values.mean(axis=1), values.mean(axis=0)):
        quantile = student.ppf((1 + LEVEL) / 2, len(means) - 1)
        squared += quantile**2 * means.var(ddof=1) / len(means)
    half, mean = float(np.sqrt(squared)), float(values.mean())
    return {"value": mean, "low": mean - half, "high": mean + half}


def summarise(figures: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> dict[str, Any]:
    """Means, and every variant's difference to the hybrid, by condition.

    Args:
        figures: variant → condition → PSNR of (seeds, pictures).
    """
    summary: dict[str, Any] = {}
    for name, by_condition in figures.items():
        summary[name] = {}
        for condition, rows in by_condition.items():
            ours = np.asarray(rows, dtype=np.float64)
            entry: dict[str, Any] = {
                "psnr_db": interval(ours),
                "seeds_psnr_db": ours.mean(axis=1).round(4).tolist(),
            }
            if name != "hybrid":
                theirs = np.asarray(figures["hybrid"][condition], dtype=np.float64)
                entry["minus_hybrid"] = interval(ours - theirs)
            summary[name][condition] = entry
    return summary


def compare(
    images: Sequence[str], validation: Sequence[str], steps: int, seeds: Sequence[int], out: Path,
    **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """Trains and measures all variants; goes on where an earlier call stopped.

    Raises:
        ImageError: there are no usable pictures.
        ValueError: fewer than two seeds, or one twice.
    """
    if len(set(seeds)) < max(2, len(seeds)):  # a repeated one would count as two trainings
        raise ValueError("at least two seeds are needed, all different")
    pictures = load_squares(find_images(validation))
    asked = Recipe(images=tuple(images), minutes=None, steps=steps, **changes)
    trained = {name: asdict(config) for name, config in variants().items()}
    recipes = [replace(asked, seed=seed) for seed in seeds]  # all looked at before the first trains
    told = {"pictures": list_digest(find_images(images)), "release": __version__}
    Claim(asked, out, resume=True, variants=trained, **told).write()
    figures: dict[str, dict[str, list[list[float]]]] = {}
    facts: dict[str, Any] = {}
    for seed, recipe in zip(seeds, recipes, strict=True):
        crops = RandomCrops(find_images(images), side=recipe.crop, seed=seed)
        for name, config in variants().items():
            model = train(name, seed, recipe, steps, crops, out)
            for condition, values in measure(model.eval(), pictures).items():
                figures.setdefault(name, {}).setdefault(condition, []).append(values)
            facts[name] = {
                "parameters": model.parameter_count()["total"],
                "flops": model.flops(),
                "config": asdict(config),
            }
    return {
        "steps": steps,
        "seeds": list(seeds),
        "crops_a_step": recipe.batch,
        "crop": recipe.crop,
        "learning_rate": recipe.learning_rate,
        "precision": resolve_precision(recipe.precision, torch.device("cpu")),
        "latent_noise": recipe.latent_noise,
        "ssim_weight": recipe.ssim_weight,
        "pictures": len(pictures),
        "validation": [Path(path).name for path in validation],
        "images": [Path(path).name for path in images],
        **origin(torch.device("cpu"), "float32"),
        "trained_in": computed_in(recipe.precision, torch.device("cpu")),
        "models": facts,
        "variants": summarise(figures),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = new_parser(__doc__)
    add_pictures(parser, "--images", "--validation")
    parser.add_argument("--steps", type=int, default=3000, help="of every training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--batch", type=int, default=16, help="crops a step")
    parser.add_argument("--crop", type=int, default=128, help="side of a crop, pixels")
    parser.add_argument("--precision", choices=get_args(Precision), default="auto")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--latent-noise", type=float, default=0.0)
    parser.add_argument("--out", type=Path, required=True, help="the trainings' folder")
    arguments = parser.parse_args(argv)
    result = attempt(
        "comparison",
        lambda: compare(
            arguments.images,
            arguments.validation,
            arguments.steps,
            arguments.seeds,
            arguments.out,
            batch=arguments.batch,
            crop=arguments.crop,
            precision=arguments.precision,
            learning_rate=arguments.learning_rate,
            latent_noise=arguments.latent_noise,
        ),
    )
    if result is None:
        return FAILED
    checkpoint.write_text(arguments.out / "comparison.json", json.dumps(result, indent=1) + "\n")
    for name, by_condition in result["variants"].items():
        cells = [f"{k} {v['psnr_db']['value']:.3f}" for k, v in by_condition.items()]
        print(f"{name:<16}" + "  ".join(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())

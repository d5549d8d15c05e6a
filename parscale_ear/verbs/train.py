"""``parscale-ear train``: runs a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from parscale_ear.verbs.common import STOPPED, Verbs, add_device


def add_parser(verbs: Verbs) -> None:
    """Adds the verb."""
    verb = verbs.add_parser("train", help="train a model (needs the extra 'train')")
    models = verb.add_subparsers(metavar="MODEL", required=True)
    model = models.add_parser(
        "autoencoder",
        help="LiteVAE with hybrid, then a baseline and a sharp decoder for the same latents",
        description="Trains LiteVAE with hybrid, then a baseline and a sharp decoder for the same "
        "latents. For several processes or machines: accelerate launch -m parscale_ear.cli train "
        "autoencoder ...",
    )
    model.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="DIR_OR_TAR",
        help="files, folders, tars, or hf:DATASET[:SPLIT]",
    )
    model.add_argument("--validation", nargs="+", default=[], metavar="DIR_OR_TAR")
    length = model.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=120.0, help="of all stages (default 120)")
    length.add_argument("--steps", type=int, help="of all stages together, instead of minutes")
    model.add_argument("--out", required=True, type=Path, help="the run's folder")
    model.add_argument("--resume", action="store_true", help="go on with the run in --out")
    model.add_argument("--start", type=Path, help="weights to start from instead of fresh ones")
    model.add_argument(
        "--batch", type=int, default=32, help="crops a step and process (default 32)"
    )
    model.add_argument(
        "--crop", type=int, default=128, help="side in the first stage (default 128)"
    )
    model.add_argument("--final-crop", type=int, default=256, help="side later (default 256)")
    model.add_argument("--learning-rate", type=float, default=1e-3)
    model.add_argument("--final-rate", type=float, default=5e-4, help="after the first stage")
    model.add_argument("--kl-weight", type=float, default=1e-4)
    model.add_argument("--latent-noise", type=float, default=0.0, help="largest σ in training")
    model.add_argument("--ssim-weight", type=float, default=0.05, help="after the first stage")
    model.add_argument("--feature-weight", type=float, default=0.3, help="of the sharp decoder")
    model.add_argument("--adversarial-weight", type=float, default=0.01, help="likewise")
    model.add_argument("--workers", type=int, default=0, help="threads that prepare crops ahead")
    model.add_argument("--seed", type=int, default=0)
    model.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    add_device(model, dtype=False)
    model.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from parscale_ear.device import UsageError, resolve_device
    from parscale_ear.training.autoencoder import train_autoencoder
    from parscale_ear.training.loop import TrainingError
    from parscale_ear.training.recipe import Recipe

    sizes = ("crop", "final_crop", "batch", "seed", "workers")
    rates = ("learning_rate", "final_rate", "latent_noise")
    weights = ("kl_weight", "ssim_weight", "feature_weight", "adversarial_weight")
    recipe = Recipe(
        images=tuple(arguments.images),
        validation=tuple(arguments.validation),
        start=None if arguments.start is None else str(arguments.start),
        minutes=arguments.minutes if arguments.steps is None else None,
        steps=arguments.steps,
        precision=arguments.precision,
        device=str(resolve_device(arguments.device)),
        **{name: getattr(arguments, name) for name in (*sizes, *rates, *weights)},
    )
    try:
        finished = train_autoencoder(recipe, arguments.out, resume=arguments.resume)
    except TrainingError as error:
        raise UsageError(str(error)) from error
    if not finished:
        print("parscale-ear: stopped; the same command with --resume goes on", file=sys.stderr)
        return STOPPED
    print(f"weights: {arguments.out}/{{hybrid,baseline,sharp}}.safetensors")
    return 0

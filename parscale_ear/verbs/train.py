"""``parscale-ear train``: runs a recipe."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

from parscale_ear.places import check_folder
from parscale_ear.verbs.common import STOPPED, Verbs, add_device, import_torch

PICTURES = "files, folders, tars, or hf:DATASET[:SPLIT]"
LABELLED = "folders of class folders, tars, or hf:DATASET[:SPLIT]"
# The options that are a recipe's numbers, by field, with their help; defaults are the recipe's.
AUTOENCODER = {
    "batch": "crops a step and process",
    "crop": "side in the first stage",
    "final_crop": "side later",
    "learning_rate": "peak",
    "final_rate": "after the first stage",
    "kl_weight": "of the mean KL an element",
    "grey_share": "of the crops, which are turned to grey",
    "latent_noise": "largest σ of noise on the latents that are decoded, drawn a picture",
    "refinements": "of latents that are decoded beside plain ones in stages vae and hybrid",
    "ssim_weight": "of 1 − SSIM, in all stages but sharp",
    "feature_weight": "of the sharp decoder",
    "adversarial_weight": "likewise",
    "pattern_weight": "of the error that all 8x8 cells share, likewise",
    "chroma_weight": "of the error of colours less their grey, likewise",
    "workers": "threads that prepare crops ahead",
    "seed": "of weights, crops and noise",
}
VAR = {
    "stream_steps": "of each number of streams",
    "streams": "numbers of streams to train",
    "side": "of the pictures",
    "sides": "of the token maps",
    "vocabulary": "vectors in the codebook",
    "latent_channels": "of a vector",
    "tokenizer_width": "channels at full resolution",
    "depth": "blocks",
    "width": "channels",
    "heads": "of the attention",
    "prefix_tokens": "of a stream",
    "batch": "pictures a step and process",
    "learning_rate": "peak",
    "feature_weight": "in the tokenizer",
    "label_dropout": "share of labels left out",
    "seed": "of weights, order and noise",
}
EAR = {
    "picture_minutes": "of a second stage that scores whole pictures",
    "picture_steps": "the same in steps",
    "picture_classes": "classes a step there",
    "picture_draws": "pictures drawn of each",
    "picture_known": "most first scales that these take from real ones",
    "picture_pairs": "real pictures there that are continued twice from their first scales",
    "picture_batch": "latents a step there whose tokens are scored",
    "picture_rate": "peak learning rate there",
    "adversarial_weight": "of a critic's verdict there; 0: no critic",
    "critic_rate": "learning rate of the critic",
    "class_weight": "of a classifier's verdict there",
    "stream_steps": "of each number of streams",
    "streams": "numbers of streams to train; none: the generator alone",
    "train_backbone": "train the generator with its streams instead of freezing it",
    "depth": "blocks of the trunk",
    "width": "its channels",
    "heads": "of its attention",
    "head_width": "channels of the energy head",
    "head_blocks": "its residual blocks",
    "noise_channels": "its noise",
    "phases": "passes of the finest level: 1, 2 or 4",
    "prefix_tokens": "of a stream",
    "batch": "latents a step and process",
    "learning_rate": "peak",
    "alpha": "exponent of the energy score",
    "samples": "draws of every token",
    "train_temperature": "weight of the draws' distance from each other",
    "latent_noise": "σ of noise on the latents whose tokens are scored",
    "input_noise": "largest σ of noise on what is known",
    "label_dropout": "share of labels left out",
    "seed": "of weights, order and noise",
}


class _LateParser(argparse.ArgumentParser):
    """Gets its options when it is used: their defaults are the recipes', which import PyTorch."""

    fill: Callable[[], None] | None = None

    def _filled(self) -> None:
        fill, self.fill = self.fill, None
        if fill is not None:
            import_torch()
            fill()

    def parse_known_args(self, *arguments: Any, **named: Any) -> Any:
        """As argparse's."""
        self._filled()
        return super().parse_known_args(*arguments, **named)

    def format_help(self) -> str:
        """As argparse's."""
        self._filled()
        return super().format_help()


def add_parser(verbs: Verbs) -> None:
    """Adds the verb."""
    verb = verbs.add_parser("train", help="train a model (needs the extra 'train')")
    models = verb.add_subparsers(metavar="MODEL", required=True, parser_class=_LateParser)
    _add_autoencoder(models)
    _add_var(models)
    _add_ear(models)


def _add_autoencoder(models: argparse._SubParsersAction[_LateParser]) -> None:
    model = models.add_parser(
        "autoencoder",
        help="LiteVAE with hybrid, then a baseline and a sharp decoder for the same latents",
        description="Trains LiteVAE with hybrid, then a baseline and a sharp decoder for the same "
        "latents. For several processes or machines: accelerate launch -m parscale_ear.cli train "
        "autoencoder ...",
    )
    _add_pictures(model, PICTURES)
    _add_start(model)
    model.set_defaults(run=_autoencoder)

    def fill() -> None:
        from parscale_ear.training.recipe import STAGES, Recipe

        _add_common(model, Recipe, AUTOENCODER, "all these stages together")
        model.add_argument(
            "--stages", nargs="+", choices=STAGES, default=STAGES,
            help="which to run; without vae, --start names the weights to go on from",
        )  # fmt: skip

    model.fill = fill


def _add_var(models: argparse._SubParsersAction[_LateParser]) -> None:
    model = models.add_parser(
        "var",
        help="a small VAR with its tokenizer, and parallel streams on it",
        description="Trains a tokenizer, a VAR on its tokens, and P parallel streams on the "
        "frozen VAR, on pictures in class folders (or a tar of them).",
    )
    _add_pictures(model, LABELLED)
    model.set_defaults(run=_var)

    def fill() -> None:
        from parscale_ear.training.generator_recipe import VARRecipe

        _add_common(model, VARRecipe, VAR, "tokenizer and VAR")

    model.fill = fill


def _add_ear(models: argparse._SubParsersAction[_LateParser]) -> None:
    model = models.add_parser(
        "ear",
        help="an EnergyAR on cached latents, and parallel streams on it",
        description="Trains an EnergyAR on latents that parscale-ear encode wrote (--mirror adds "
        "mirrored pictures), and P parallel streams on the generator.",
    )
    model.add_argument("--latents", required=True, metavar="DIR", help="made by encode")
    model.add_argument("--validation", metavar="DIR", help="likewise, to measure on")
    model.add_argument(
        "--class-names", nargs="+", default=[], metavar="NAME",
        help="what the classes are called, in the order of their folders",
    )  # fmt: skip
    _add_start(model)
    model.set_defaults(run=_ear)

    def fill() -> None:
        from parscale_ear.training.ear_recipe import EARRecipe

        _add_common(model, EARRecipe, EAR, "the generator's first stage; 0 with --start: none")

    model.fill = fill


def _add_start(model: argparse.ArgumentParser) -> None:
    model.add_argument(
        "--start",
        "--initial-weights",  # torchrun takes --start for a beginning of its own options
        type=Path,
        help="weights to start from instead of fresh ones (under torchrun: --initial-weights)",
    )


def _add_pictures(model: argparse.ArgumentParser, kinds: str) -> None:
    model.add_argument("--images", nargs="+", required=True, metavar="DIR_OR_TAR", help=kinds)
    model.add_argument("--validation", nargs="+", default=[], metavar="DIR_OR_TAR")


def _add_common(
    model: argparse.ArgumentParser, recipe: type[Any], numbers: Mapping[str, str], of: str
) -> None:
    """Options that all recipes have, and the numbers of this one."""
    from parscale_ear.training.loop import Precision

    defaults = {field.name: field.default for field in fields(recipe)}
    length = model.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=float,
        default=defaults["minutes"],
        help=f"of {of}, validation not counted (default {defaults['minutes']:g})",
    )
    length.add_argument("--steps", type=int, help=f"of {of}, instead of minutes")
    model.add_argument("--out", required=True, type=Path, help="the run's folder")
    model.add_argument("--resume", action="store_true", help="go on with the run in --out")
    for name, text in numbers.items():
        default = defaults[name]
        assert default is not MISSING
        if isinstance(default, bool):
            model.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
            continue
        many = isinstance(default, tuple)
        shown = " ".join(map(str, default)) if many else default
        model.add_argument(
            f"--{name.replace('_', '-')}",
            type=int if many else type(default),
            default=default,
            nargs="*" if many else None,
            help=f"{text} (default {shown})",
        )
    model.add_argument(
        "--precision", choices=get_args(Precision), default="auto",
        help="autocast dtype (default auto: bf16 where the device has kernels for it, else fp32)",
    )  # fmt: skip
    add_device(model, dtype=False)


def _common(arguments: argparse.Namespace, numbers: Mapping[str, str]) -> dict[str, Any]:
    """A recipe's fields from the options of :func:`_add_common`."""
    from parscale_ear.device import resolve_device

    values = {name: getattr(arguments, name) for name in numbers}
    return {
        "minutes": arguments.minutes if arguments.steps is None else None,
        "steps": arguments.steps,
        "precision": arguments.precision,
        "device": str(resolve_device(arguments.device)),
        **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()},
    }


def _start(arguments: argparse.Namespace) -> str | None:
    return None if arguments.start is None else str(arguments.start)


def _train(train: Callable[..., bool], recipe: Any, arguments: argparse.Namespace) -> int:
    from parscale_ear.device import UsageError
    from parscale_ear.training.distributed import leave_world
    from parscale_ear.training.loop import DivergedError, TrainingError

    out: Path = arguments.out
    check_folder(out)
    try:
        finished = train(recipe, out, resume=arguments.resume)
    except DivergedError as error:  # no mistake in what was asked for
        print(f"parscale-ear: {error}", file=sys.stderr)
        return 1
    except TrainingError as error:
        raise UsageError(str(error)) from error
    finally:
        leave_world()
    if not finished:
        print("parscale-ear: stopped; the same command with --resume goes on", file=sys.stderr)
        return STOPPED
    if os.environ.get("RANK", "0") == "0":  # one of several processes says it
        print("weights:", *sorted(map(str, out.glob("*.safetensors"))))
    return 0


def _autoencoder(arguments: argparse.Namespace) -> int:
    from parscale_ear.training.autoencoder import train_autoencoder
    from parscale_ear.training.recipe import Recipe

    recipe = Recipe(
        images=tuple(arguments.images),
        validation=tuple(arguments.validation),
        start=_start(arguments),
        stages=tuple(arguments.stages),
        **_common(arguments, AUTOENCODER),
    )
    return _train(train_autoencoder, recipe, arguments)


def _var(arguments: argparse.Namespace) -> int:
    from parscale_ear.training.generator import train_var
    from parscale_ear.training.generator_recipe import VARRecipe

    recipe = VARRecipe(
        images=tuple(arguments.images),
        validation=tuple(arguments.validation),
        **_common(arguments, VAR),
    )
    return _train(train_var, recipe, arguments)


def _ear(arguments: argparse.Namespace) -> int:
    from parscale_ear.training.ear import train_ear
    from parscale_ear.training.ear_recipe import EARRecipe

    recipe = EARRecipe(
        latents=arguments.latents,
        validation=arguments.validation,
        class_names=tuple(arguments.class_names),
        start=_start(arguments),
        **_common(arguments, EAR),
    )
    return _train(train_ear, recipe, arguments)

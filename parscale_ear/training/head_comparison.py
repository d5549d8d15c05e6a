r"""Is the energy head worth having? The same trunk trained alike with four heads.

    python -m parscale_ear.training.head_comparison --latents LATENTS --validation-latents LATENTS \\
        --training TRAIN_TAR --validation VAL_TAR --minutes 45 --out RUN

Every head is trained from the same trunk weights, on the same latents in the same order, for the
same time on the same machine: on tokens alone, or with ``--picture-minutes`` after that on whole
pictures drawn with their gradient, by their energy scores beside the head's own loss of tokens (no
critic, no classifier). Guidance and temperature are chosen for each by the distance to the training
pictures; EfficientNet-Lite1 judges. Two calls with different ``--heads`` and one ``--out`` may run
side by side; the last one to end writes ``RUN/heads.json`` with all that are finished.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parscale_ear import __version__, checkpoint
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.generator.ear import DEFAULT_DECODER, EnergyAR
from parscale_ear.generator.ear_config import EARConfig
from parscale_ear.generator.energy import EnergyHead
from parscale_ear.metrics.frechet import Gaussian
from parscale_ear.profiling.origin import origin
from parscale_ear.training import judging
from parscale_ear.training.control_heads import DiffusionHead, GaussianHead, SquaredErrorHead
from parscale_ear.training.distributed import OneProcess
from parscale_ear.training.ear import load_latents, refined
from parscale_ear.training.ear_recipe import EARRecipe
from parscale_ear.training.ear_tasks import EARTask, LatentStore, PicturesTask
from parscale_ear.training.folder import Claim
from parscale_ear.training.judging import (
    NO_REFINED,
    Judge,
    Real,
    choose,
    distance_interval,
    judge_drawn,
    load_real,
    save_classes,
)
from parscale_ear.training.loop import Run, TrainingError, computed_in, read_log
from parscale_ear.training.program import FAILED, add_pictures, attempt, new_parser

HEADS: dict[str, Callable[..., nn.Module]] = {
    "energy": EnergyHead,
    "squared-error": SquaredErrorHead,
    "gaussian": GaussianHead,
    "diffusion": DiffusionHead,
}
ALIKE = ("device", "threads", "dtype", "torch", "trained_in")  # in all heads' origins
PICTURE_CLASSES = 2  # a step of the training on pictures


def build(kind: str, config: EARConfig, seed: int) -> EnergyAR:
    """An EnergyAR with another head; the trunk's fresh weights are the same for all.

    Args:
        kind: of :data:`HEADS`.
        config: sizes; ``head_width`` and ``head_blocks`` are those of all heads.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    model = EnergyAR(config)
    if kind != "energy":
        model.head = HEADS[kind](**config.head)  # type: ignore[assignment]
    return model


def train_head(
    kind: str, recipe: EARRecipe, latents: LatentStore, validation: LatentStore,
    classes: tuple[str, ...], autoencoder: ParScaleEAR, out: Path,
) -> tuple[EnergyAR, dict[str, Run]]:  # fmt: skip
    """Trains one, or goes on with what is in ``out``; the averaged weights, and a run a stage.

    Raises:
        TrainingError: a signal stopped it; the same call goes on.
    """
    channels, side = latents.latents.shape[2:4]
    model = build(kind, recipe.config(classes, channels=channels, side=side), recipe.seed)
    model.pyramid.fit(latents.latents.flatten(0, 1))
    model.latent_fingerprint = autoencoder.latent_fingerprint()
    world = OneProcess(torch.device(recipe.device))
    model = model.to(world.device).attach(autoencoder)
    runs: dict[str, Run] = {}
    for stage in recipe.stages():
        folder = out if stage == "ear" else out / stage
        kind_of_task = EARTask if stage == "ear" else PicturesTask
        task = kind_of_task(model.train(), latents, validation, recipe, folder, world)
        run = runs[stage] = Run(task, recipe.loop(stage), folder, resume=True, world=world)
        if not run.train():
            raise TrainingError("stopped; the same command goes on")
        average = run.average
        assert isinstance(average, EnergyAR)
        model = average.attach(autoencoder)
    return model.eval(), runs


def measure(kind: str, model: EnergyAR, judge: Judge, training: Real, law: Gaussian, out: Path) -> dict[str, Any]:  # fmt: skip
    """Figures of one head; writes a row of pictures a class."""
    settings, tried = choose(model, judge, training)
    drawn = judge_drawn(model, judge, settings, kind)
    save_classes(drawn.pictures, len(judge.classes), out / f"{kind}.png")
    return {
        "settings": settings,
        "tried_on_training": tried,
        **drawn.figures(),
        "distance": distance_interval(drawn.features, law).as_dict(),
        "parameters": {
            "trunk": sum(p.numel() for p in model.transformer.parameters()),
            "head": sum(p.numel() for p in model.head.parameters()),
        },
    }


def _validation(folder: Path) -> list[list[float]]:
    """Minutes and the head's own loss on the validation latents.

    A rise says that it learns the training latents by heart. The end counts once, though it may
    have been measured at its turn and as the end, and again by a later call.
    """
    lines = {line["step"]: line for line in read_log(folder) if "validation_energy_score" in line}
    return [[line["minutes"], line["validation_energy_score"]] for line in lines.values()]


def _origin(recipe: EARRecipe, device: torch.device) -> dict[str, Any]:
    """Where a head is trained and judged, and in what."""
    return {**origin(device, "float32"), "trained_in": computed_in(recipe.precision, device)}


def _finished(out: Path) -> dict[str, dict[str, Any]]:
    """Figures of all heads that are finished."""
    paths = {kind: out / f"{kind}.json" for kind in HEADS}
    return {
        kind: json.loads(path.read_text(encoding="utf-8"))
        for kind, path in paths.items()
        if path.exists()
    }


def _check_alike(finished: Mapping[str, Any], here: Mapping[str, Any], out: Path) -> None:
    """Heads are trained by minutes, so what they are trained on decides how far they come."""
    for kind, row in finished.items():
        then = row["origin"]
        if changed := [f"{k} {then[k]}, not {here[k]}" for k in ALIKE if then[k] != here[k]]:
            raise TrainingError(
                f"{out}: the {kind} head was trained with {'; '.join(changed)}; train the others so, "
                "too, or name a new folder"
            )


def compare(
    recipe: EARRecipe, heads: Sequence[str], training_paths: Sequence[str],
    validation_paths: Sequence[str], out: Path,
) -> dict[str, Any]:  # fmt: skip
    """Trains and measures heads; goes on where an earlier call stopped.

    Returns:
        What is known of all heads that are finished in ``out``.

    Raises:
        TrainingError: ``out`` holds a comparison by another recipe or heads of another machine, the
            latents were refined, or a signal stopped this one.
        CheckpointError: the latents cannot be used.
        ImageError: no pictures, or of other classes.
        FeatureError: Lite1's packages are missing.
    """
    autoencoder = ParScaleEAR.from_pretrained(decoder=DEFAULT_DECODER, dtype=torch.float32)
    pictures = {"training": list(training_paths), "validation_pictures": list(validation_paths)}
    decoder = checkpoint.digest(autoencoder.decoder.state_dict())
    # Heads that other calls finished stand beside these: all by one release.
    claim = Claim(recipe, out, resume=True, decoder=decoder, release=__version__, **pictures)
    if refined(recipe.latents):
        raise TrainingError(f"{recipe.latents}: {NO_REFINED}")
    device = torch.device(recipe.device)
    if any(kind not in _finished(out) for kind in heads):
        _check_alike(_finished(out), _origin(recipe, device), out)
    claim.write()
    latents, validation, classes = load_latents(recipe, autoencoder.latent_fingerprint())
    judge = Judge()
    real: tuple[Real, Gaussian] | None = None
    for kind in heads:
        path = out / f"{kind}.json"
        if path.exists():
            continue
        model, runs = train_head(
            kind, recipe, latents, validation, classes, autoencoder, out / kind
        )
        if real is None:
            training = load_real(training_paths, model, judge, "training")
            refs = load_real(validation_paths, model, judge, "validation")
            real = (training, Gaussian.fit(judge.look(refs.pictures, "validation").numpy()))
        figures = {
            "steps": runs["ear"].progress.step,
            "minutes": round(runs["ear"].progress.seconds / 60, 1),
            "picture_steps": runs["pictures"].progress.step if "pictures" in runs else 0,
            "picture_minutes": round(runs["pictures"].progress.seconds / 60, 1)
            if "pictures" in runs
            else 0.0,
            **measure(kind, model, judge, *real, out),
            "origin": _origin(recipe, device),
        }
        checkpoint.write_text(path, json.dumps(figures, indent=1) + "\n")
    done = _finished(out)
    origins = [done[kind].pop("origin") for kind in done]
    return {
        "heads": {
            kind: {**row, "validation": _validation(out / kind)} for kind, row in done.items()
        },
        "judge": judge.network.name,
        "distance_name": judge.network.distance,
        "pictures": judging.JUDGED,
        "intervals": judging.INTERVALS,
        "latents": len(latents),
        "batch": recipe.batch,
        "picture_draws": recipe.picture_classes * recipe.picture_draws,
        "picture_pairs": recipe.picture_pairs,
        "learning_rate": recipe.learning_rate,
        "seed": recipe.seed,
        "decoder_sha256": decoder,
        "data": [Path(path).name for path in (*training_paths, *validation_paths)],
        **max(origins, key=lambda told: str(told["date"])),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = new_parser(__doc__)
    parser.add_argument("--latents", required=True, help="folder of parscale-ear encode")
    parser.add_argument("--validation-latents", required=True, help="the same to log on")
    add_pictures(parser, "--training", "--validation")
    parser.add_argument("--heads", nargs="+", choices=tuple(HEADS), default=tuple(HEADS))
    parser.add_argument("--minutes", type=float, default=45.0, help="of every training on tokens")
    parser.add_argument(
        "--picture-minutes", type=float, default=0.0, help="and of every training on pictures"
    )
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the trainings' folder")
    arguments = parser.parse_args(argv)

    def work() -> dict[str, Any]:
        recipe = EARRecipe(
            latents=arguments.latents,
            validation=arguments.validation_latents,
            minutes=arguments.minutes,
            picture_minutes=arguments.picture_minutes,
            picture_classes=PICTURE_CLASSES,
            adversarial_weight=0.0,
            class_weight=0.0,
            depth=arguments.depth,
            batch=arguments.batch,
            learning_rate=arguments.learning_rate,
            seed=arguments.seed,
            streams=(),
        )
        return compare(
            recipe, arguments.heads, arguments.training, arguments.validation, arguments.out
        )

    result = attempt("head_comparison", work)
    if result is None:
        return FAILED
    checkpoint.write_text(arguments.out / "heads.json", json.dumps(result, indent=1) + "\n")
    for kind, row in result["heads"].items():
        distance, accuracy = row["distance"], row["class_accuracy"]
        print(
            f"{kind:<14} {result['distance_name']} {distance['value']:.1f} "
            f"[{distance['low']:.1f}, {distance['high']:.1f}]  in their class "
            f"{accuracy['value']:.1%}  {row['steps']:,} steps"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

r"""What P streams that draw one picture together are worth in pictures, not only in scores.

    parscale-ear train ear --start EAR --minutes 0 --train-backbone --streams 1 2 4 --out RUN ...
    python -m parscale_ear.training.stream_judging RUN \\
        --training TRAIN_DIR_OR_TAR --validation VAL_DIR_OR_TAR

Guidance and temperature are chosen once, for one stream, by the distance to the training pictures,
and are the same for all P. EfficientNet-Lite1, which took no part in the training, judges. Writes
``RUN/streams_judged.json``: what ``RUN/streams.json`` holds, and what the pictures told.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parscale_ear import checkpoint
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.device import resolve_device
from parscale_ear.generator.ear import DEFAULT_DECODER
from parscale_ear.metrics.frechet import Gaussian, clustered_jackknife
from parscale_ear.places import check_folder
from parscale_ear.profiling.origin import origin
from parscale_ear.training.ear import load_streamed
from parscale_ear.training.ear_recipe import EARRecipe
from parscale_ear.training.folder import BESIDE, RECIPE_FILE
from parscale_ear.training.judging import (
    INTERVALS,
    NO_REFINED,
    Judge,
    choose,
    judge_drawn,
    load_real,
    save_classes,
)
from parscale_ear.training.loop import TrainingError
from parscale_ear.training.program import FAILED, add_pictures, attempt, new_parser

SCORES_FILE, JUDGED_FILE = "streams.json", "streams_judged.json"


def read_run(run: Path) -> tuple[EARRecipe, dict[str, Any]]:
    """Recipe and scores of a finished training of streams.

    Raises:
        TrainingError: there is no such run in the folder, it is not finished, or its generators
            cannot be judged.
    """
    for name in (RECIPE_FILE, SCORES_FILE):
        if not (run / name).exists():
            raise TrainingError(
                f"{run / name} is missing; parscale-ear train ear --streams 1 2 4 writes it"
            )
    told = json.loads((run / RECIPE_FILE).read_text(encoding="utf-8"))
    told = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items() if k not in BESIDE}
    if told.get("layout_channels") == 0:  # a field of release 0.6 that said nothing
        del told["layout_channels"]
    try:
        recipe = EARRecipe(**told)
    except TypeError as error:
        raise TrainingError(f"{run / RECIPE_FILE}: not of an EnergyAR's training") from error
    scores = json.loads((run / SCORES_FILE).read_text(encoding="utf-8"))
    if scores.get("latent_refinements"):
        raise TrainingError(f"{run}: {NO_REFINED}")
    if recipe.train_backbone and 1 not in scores["counts"]:
        raise TrainingError(
            f"{run}: guidance and temperature are chosen for one stream, and no backbone was trained "
            "with one; train with --streams 1, too"
        )
    return recipe, scores


def judge_streams(
    run: Path,
    training_paths: Sequence[str],
    validation_paths: Sequence[str],
    device: torch.device,
) -> dict[str, Any]:
    """Draws pictures with every trained number of streams and judges them; writes a grid of each.

    Args:
        run: folder of a finished training.
        training_paths: the pictures it was trained on.
        validation_paths: others.
        device: where to draw and to judge.

    Returns:
        The run's scores, and by number of streams, in their order: Fréchet ``distance`` to the
        validation pictures, its difference from that of the fewest streams, ``class_accuracy`` and
        ``diversity``; the slope of the distance a doubling.

    Raises:
        TrainingError: ``run`` holds no finished training of streams.
        CheckpointError: its weights cannot be used.
        ImageError: no pictures, or of other classes.
        FeatureError: Lite1's packages are missing.
    """
    recipe, scores = read_run(run)
    check_folder(run)
    autoencoder = ParScaleEAR.from_pretrained(
        decoder=DEFAULT_DECODER, dtype=torch.float32, device=device
    )
    judge = Judge(device=device)
    settings: dict[str, float] = {}
    seen, rows = [], []
    for count in scores["counts"]:
        model, streams = load_streamed(recipe, run, count, device)
        model.attach(autoencoder).eval()
        if not settings:
            training = load_real(training_paths, model, judge, "training")
            real = load_real(validation_paths, model, judge, "validation")
            law = Gaussian.fit(judge.look(real.pictures, "validation").numpy())
            settings, tried = choose(model, judge, training)
        drawn = judge_drawn(model, judge, settings, f"P = {count}", streams)
        save_classes(drawn.pictures, len(judge.classes), run / f"streams{count}.png")
        seen.append(drawn.features.numpy())
        rows.append(drawn.figures())
    exponents = np.log2(np.asarray(scores["counts"], dtype=np.float64))
    centred = exponents - exponents.mean()

    def statistics(chosen: Any) -> list[float]:
        found = [Gaussian.fit(features[chosen]).distance(law) for features in seen]
        slope = float(centred @ np.asarray(found)) / max(1e-12, float(centred @ centred))
        return [*found, *(value - found[0] for value in found), slope]

    told = clustered_jackknife(statistics, range(len(drawn.labels)))
    for k, row in enumerate(rows):
        row["distance"] = told[k].as_dict()
        row["distance_minus_first"] = told[len(rows) + k].as_dict()
    return {
        **scores,
        "judged": rows,
        "distance_slope_per_doubling": told[-1].as_dict(),
        "judged_on": origin(device, "float32"),
        "judge": judge.network.name,
        "intervals": INTERVALS,
        "distance_name": judge.network.distance,
        "judged_pictures": len(drawn.labels),
        "settings": settings,
        "tried_on_training": tried,
        "data": [Path(path).name for path in (*training_paths, *validation_paths)],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = new_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of parscale-ear train ear --streams ...")
    add_pictures(parser, "--training", "--validation")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    arguments = parser.parse_args(argv)
    result = attempt(
        "stream_judging",
        lambda: judge_streams(
            arguments.run,
            arguments.training,
            arguments.validation,
            resolve_device(arguments.device),
        ),
    )
    if result is None:
        return FAILED
    checkpoint.write_text(arguments.run / JUDGED_FILE, json.dumps(result, indent=1) + "\n")
    for count, score, row in zip(result["counts"], result["each"], result["judged"], strict=True):
        distance = row["distance"]
        print(
            f"P = {count}: energy score {score['value']:.4f} [{score['low']:.4f}, "
            f"{score['high']:.4f}], {result['distance_name']} {distance['value']:.1f} "
            f"[{distance['low']:.1f}, {distance['high']:.1f}], in their class "
            f"{row['class_accuracy']['value']:.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What every recipe needs before it starts: its folder, and its pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from parscale_ear import __version__, checkpoint
from parscale_ear.data.images import ImageError, ImageRef, find_images
from parscale_ear.data.reading import read_squares
from parscale_ear.training.distributed import World, find_world
from parscale_ear.training.loop import (
    CHECKPOINT_FILE,
    Run,
    TrainingError,
    read_log,
    resolve_precision,
)
from parscale_ear.training.optimizer import build_optimizer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)
RECIPE_FILE = "recipe.json"
# What recipe.json says beside a recipe's fields.
BESIDE = ("processes", "pictures", "validated", "decoder", "start_weights")
PATHS = ("images", "latents", "validation", "start")  # fields of recipes

HELD_OUT = 64  # at most so many pictures are held out when none are named for validation
READERS, AHEAD = 2, 64  # threads that read pictures, and how many of these ahead
MOST_VALIDATED = 512  # at most so many of those named are used, evenly spread


class Claim:
    """A run's folder, for one recipe and number of processes.

    What is wrong shows when the claim is made; the folder is written to by :meth:`taken` (or :meth:`write`,
    where several calls may share it), when all else that may be wrong has been looked at, too.
    """

    def __init__(self, recipe: DataclassInstance, out: Path, *, resume: bool, **more: Any) -> None:
        """Checks that a folder is free, or holds a run of the same recipe.

        Args:
            recipe: what is asked for; its ``device`` and ``precision`` say where and in what.
            out: the run's folder, the same for all processes.
            resume: whether to go on with what is there.
            more: JSON-serialisable facts that must also be the same.

        Raises:
            TrainingError: it is a file; the folder holds a run, or weights, and ``resume`` is false; or another
                recipe's run; or the processes would compute in different precisions.
            ModuleNotFoundError: a package for training is missing.
        """
        self.world: World = find_world(torch.device(recipe.device))  # type: ignore[attr-defined]
        # What "auto" is on this machine: another one must not go on in something else.
        precision = resolve_precision(recipe.precision, self.world.device)  # type: ignore[attr-defined]
        if len(several := self.world.union([precision])) > 1:
            raise TrainingError(
                f"the processes' machines would compute in different precisions "
                f"({', '.join(sorted(several))}); name one by --precision"
            )
        told = {**asdict(recipe), "precision": precision, "processes": self.world.size, **more}
        self.path, self.asked = out / RECIPE_FILE, json.loads(json.dumps(told))
        self.fresh = not self.path.exists()
        if out.exists() and not out.is_dir():
            raise TrainingError(f"{out} is a file; name a folder")
        build_optimizer([nn.Parameter(torch.zeros(1))], 1.0)  # fails now if timm is missing
        if not self.path.exists():
            done = _stored(out)
            if done and not resume:  # they would count as finished stages
                raise TrainingError(f"{out} holds {done[0]}, but no run; name a new folder")
            if resume:
                taken = f"; finished there: {', '.join(done)}" if done else ""
                log.warning("%s holds no run yet; a new one starts there%s", out, taken)
            return
        if not resume:
            raise TrainingError(f"{out} already holds a run; add --resume, or name a new folder")
        # A field that the run's version did not know yet has its default: what it did then.
        unsaid = {f.name: f.default for f in fields(recipe) if f.default is not MISSING}
        try:
            found = json.loads(json.dumps({**unsaid, **more}))
            found |= json.loads(self.path.read_text("utf-8"))
            if found["precision"] == "auto":  # of versions that did not say what that was
                found["precision"] = precision
        except (ValueError, TypeError) as error:
            raise TrainingError(f"{self.path}: damaged ({error}); name a new folder") from error
        changed = sorted(k for k in self.asked if self.asked[k] != found.get(k))
        if changed:
            raise TrainingError(
                f"{out} holds a run with another {', '.join(changed)}; give the same options and "
                "data to resume it, or name a new folder"
            )

    def write(self) -> None:
        """Takes the folder; all processes wait for each other first."""
        self.world.wait()
        if self.world.rank == 0:
            checkpoint.write_text(self.path, json.dumps(self.asked, indent=1) + "\n")

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Takes the folder for this call alone.

        A new one is free again for another recipe when something fails before any weights were
        stored (out of memory in the first step, say).
        """
        self.write()
        try:
            yield
        except BaseException:
            if self.fresh and self.world.rank == 0 and not _stored(self.path.parent):
                self.path.unlink(missing_ok=True)
            raise


def _stored(out: Path) -> list[str]:
    """Names of the weights that a folder of a run holds: finished stages' and checkpoints."""
    found = [*out.glob("*.safetensors"), *out.glob(f"*/{CHECKPOINT_FILE}")]
    return sorted(path.relative_to(out).as_posix() for path in found)


def without_paths(recipe: DataclassInstance) -> dict[str, Any]:
    """A recipe for the header of weights: of files and folders their names alone."""

    def shown(name: str, value: Any) -> Any:
        if name not in PATHS or value is None:
            return value
        return Path(value).name if isinstance(value, str) else [Path(part).name for part in value]

    return {name: shown(name, value) for name, value in asdict(recipe).items()}


def told_of(run: Run, recipe: DataclassInstance) -> dict[str, Any]:
    """What the header of a generator's weights says of the run that they are of."""
    last = read_log(run.out)[-1]
    return {
        "recipe": without_paths(recipe),
        "steps": run.progress.step,
        "minutes": round(run.progress.seconds / 60, 1),
        "validation": {k: v for k, v in last.items() if k not in ("step", "finished")},
        "torch": torch.__version__,
        "release": __version__,
    }


def split_pictures(
    images: Sequence[str],
    validation: Sequence[str],
    *,
    held_out: int = HELD_OUT,
    most_validated: int = MOST_VALIDATED,
) -> tuple[list[ImageRef], list[ImageRef]]:
    """Pictures to train on and to measure on.

    Args:
        images: files, folders, tars and datasets to train on.
        validation: the same to measure on; none: some of the others are held out, never the
            first of a class (of too few pictures none is: then it is on those that are trained on,
            and the log says so).
        held_out: at most so many are held out.
        most_validated: at most so many of those named are used, evenly spread.

    Raises:
        ImageError: there are none.
    """
    training = find_images(images)
    if validation:
        named = find_images(validation)
        if both := {ref.name for ref in training} & {ref.name for ref in named}:
            log.warning("%d of the validation pictures are trained on, too", len(both))
        return training, named[:: -(-len(named) // most_validated)]
    every = max(10, -(-len(training) // held_out))
    seen: set[str] = set()  # classes; pictures may also be of none
    kept: list[ImageRef] = []
    held: list[ImageRef] = []
    for index, ref in enumerate(training):
        first = ref.label != "" and ref.label not in seen
        seen.add(ref.label)
        (kept if index % every or first else held).append(ref)
    if not kept or not held:
        log.warning(
            "too few pictures to hold some out (%d): validation is on those that are trained on",
            len(training),
        )
        return training, training[::every]
    return kept, held


def load_labelled(
    refs: Sequence[ImageRef], side: int, classes: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Squares of all pictures and their labels: (N, 3, side, side) 8-bit, (N,) int64.

    Raises:
        ImageError: none can be read, or one has a class that is not among ``classes``.
    """
    number = {name: index for index, name in enumerate(classes)}
    squares, labels, skipped = [], [], []
    for ref, pixels in read_squares(refs, side, READERS, AHEAD):
        if isinstance(pixels, str):
            skipped.append(f"{ref.name}: {pixels}")
            continue
        if ref.label not in number:
            raise ImageError(f"{ref.name}: class {ref.label!r} is not one of {', '.join(classes)}")
        squares.append(pixels)
        labels.append(number[ref.label])
    for reason in skipped[:5]:
        log.warning("skipped %s", reason)
    if skipped:
        log.warning("%d damaged pictures were left out", len(skipped))
    if not squares:
        raise ImageError(f"none of the {len(refs)} pictures can be read")
    return torch.stack(squares), torch.tensor(labels)

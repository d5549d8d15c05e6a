"""What the programs of this folder (``python -m parscale_ear.training.X``) have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TypeVar

from parscale_ear.checkpoint import CheckpointError
from parscale_ear.data.images import ImageError
from parscale_ear.device import UsageError, exact_fp32
from parscale_ear.metrics.features import FeatureError
from parscale_ear.training.loop import TrainingError

Result = TypeVar("Result")
MISTAKES = (
    CheckpointError,
    FeatureError,
    ImageError,
    ModuleNotFoundError,
    TrainingError,
    UsageError,
    ValueError,
    OSError,
)
FAILED = 2  # the exit code of a user's mistake


def new_parser(documentation: str | None) -> argparse.ArgumentParser:
    """A parser that is described by the first paragraph of a module's documentation."""
    return argparse.ArgumentParser(description=(documentation or "").split("\n\n")[0])


def add_pictures(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds required options, each for files of pictures, folders or tars."""
    for name in names:
        parser.add_argument(name, nargs="+", required=True, metavar="DIR_OR_TAR")


def attempt(name: str, work: Callable[[], Result]) -> Result | None:
    """Does a program's work; FP32 on CUDA is FP32 in it, not TF32.

    Args:
        name: the program's.
        work: what it does; its result is not None.

    Returns:
        The result; None after a user's mistake, which has been told in one line.
    """
    try:
        with exact_fp32():
            return work()
    except MISTAKES as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return None

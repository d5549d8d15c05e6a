"""Options that several verbs have."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeAlias

STOPPED = 130  # exit code of a run that a signal ended
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Ctrl-C ends the process: while C code imports numpy, an exception would be lost or garbled."""

    def stop(signum: int, frame: FrameType | None) -> None:
        os.write(2, b"parscale-ear: stopped\n")
        os._exit(STOPPED)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def import_torch() -> None:
    """Imports what takes seconds; Ctrl-C ends the process meanwhile."""
    with stopped_at_once():
        import numpy  # noqa: F401
        import torch  # noqa: F401


def positive(text: str) -> int:
    """A whole number above 0 that a dimension can have, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    if int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2^31, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """A small whole number of at least 0, for argparse."""
    if not text.isdecimal() or int(text) > 100:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 100, got {text!r}")
    return int(text)


def seed_number(text: str) -> int:
    """A seed of PyTorch's generators, for argparse."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 to 2^32 - 1, got {text!r}"
        )
    return int(text)


def add_weights(verb: argparse.ArgumentParser) -> None:
    """``--weights``, ``--variant`` and ``--decoder``."""
    which = verb.add_mutually_exclusive_group()
    which.add_argument("--weights", type=Path, help="weight file or folder (default: the shipped)")
    which.add_argument("--variant", choices=("hybrid", "baseline"), default="hybrid")
    verb.add_argument(
        "--decoder",
        choices=("faithful", "sharp"),
        help="of the shipped weights: closest to the pixels (default), or best to look at",
    )


def add_device(verb: argparse.ArgumentParser, *, dtype: bool = True) -> None:
    """``--device`` and ``--dtype``."""
    verb.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    if dtype:
        verb.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default: by device")


def add_refinements(verb: argparse.ArgumentParser) -> None:
    """``--refinements``."""
    verb.add_argument(
        "--refinements",
        type=count,
        default=0,
        metavar="N",
        help="times that latents are corrected by what becomes of them, for another encoding and "
        "decoding each: the first brings nearly all of what there is to gain (default 0)",
    )


def add_processes(verb: argparse.ArgumentParser) -> None:
    """``--processes``."""
    verb.add_argument(
        "--processes", type=positive, help="default: one a GPU with --device cuda, else one"
    )


def weights_of(arguments: argparse.Namespace) -> Path:
    """The weight file that the options name.

    Raises:
        ValueError: there is no such combination.
    """
    from parscale_ear import checkpoint
    from parscale_ear.autoencoder.files import shipped_weights

    path: Path | None = arguments.weights
    if path is None:
        return shipped_weights(arguments.variant, arguments.decoder)
    if arguments.decoder is not None:
        raise ValueError("--decoder names one of the shipped decoders; leave it out with --weights")
    return checkpoint.resolve(path)

"""The one command: ``parscale-ear VERB``.

Exit codes: 0 done, 1 something failed, 2 wrong use or missing data, 130 stopped.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from parscale_ear import __version__
from parscale_ear.verbs import evaluate, generate, latents, reconstruct, train
from parscale_ear.verbs.common import STOPPED, import_torch


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        argv: arguments after the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    if sys.stderr is None:  # closed by the caller; progress bars write to it
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without arrows is no failure
    try:
        return _run(_parser().parse_args(argv))
    except KeyboardInterrupt:
        print("parscale-ear: stopped", file=sys.stderr)
        return STOPPED


def _run(arguments: argparse.Namespace) -> int:
    # PyTorch is imported below this line, so that --help and mistakes answer at once.
    import_torch()
    from parscale_ear.checkpoint import CheckpointError
    from parscale_ear.data.images import ImageError
    from parscale_ear.device import UsageError, out_of_memory
    from parscale_ear.metrics.features import FeatureError
    from parscale_ear.parallel import WorkerError

    try:
        _tell_of_slow_bf16(arguments)
        return int(arguments.run(arguments))
    except WorkerError as error:
        print(f"parscale-ear: {error}", file=sys.stderr)
        return 1
    except (UsageError, CheckpointError, ImageError, FeatureError) as error:
        print(f"parscale-ear: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(
            "parscale-ear: out of memory; take smaller batches (--batch), tiles (--tile) or "
            "another --device",
            file=sys.stderr,
        )
        return 1
    except (ModuleNotFoundError, ValueError, OverflowError, OSError) as error:
        print(f"parscale-ear: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2


def _tell_of_slow_bf16(arguments: argparse.Namespace) -> None:
    """BF16 was asked for where it takes longer than FP32: done, but told."""
    from parscale_ear.device import multiplies_bf16, resolve_device

    options = [o for o in ("dtype", "precision") if getattr(arguments, o, None) == "bf16"]
    if options and not multiplies_bf16(resolve_device(arguments.device)):
        print(
            f"parscale-ear: note: --{options[0]} bf16 is slow on this device, which has no kernels "
            "for it; fp32 takes less time",
            file=sys.stderr,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="parscale-ear", description="A light-weight wavelet image tokenizer, and a generator."
    )
    parser.add_argument("--version", action="version", version=f"parscale-ear {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for module in (reconstruct, evaluate, latents, generate, train):
        module.add_parser(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())

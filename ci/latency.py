"""M2-2: latency, throughput and memory of the shipped model, under the roof of the same run."""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ci import _common as ci
from ci._tables import LATENCY_HEAD, latency_rows
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.device import DTYPES
from parscale_ear.profiling.latency import benchmark_model_precise, time_alternately
from parscale_ear.profiling.redflags import SLACK
from parscale_ear.profiling.roofline import least_bytes, measure_roof

__all__ = ["benchmark_model_precise", "main"]

FULL_RUNS = ci.FULL["latency"]["num_runs"]
CUDA_P99_MS = 1.0  # per image at batch 16
CPU_RATIO = 10.0  # times faster than AutoencoderTiny, batch 4, plain FP32
BATCH_SIZES = (1, 4, 8, 16)
COMPARED_BATCH = 4
PROTOTYPE_P99_MS = 0.566  # published by the prototype; hardware and weights not stated there


def compare_with_autoencoder_tiny(runs: int) -> dict[str, Any]:
    """Ours and diffusers' AutoencoderTiny, encode and decode, plain FP32 on the CPU, in turn.

    Ours in channels-last layout, the other one in the layout that suits it better.

    Raises:
        ImportError: diffusers is not installed, or does not import.
    """
    try:
        import diffusers

        make = diffusers.AutoencoderTiny
    except RuntimeError as error:  # how diffusers reports an import that failed inside it
        raise ImportError(str(error).splitlines()[0]) from error
    ours = ParScaleEAR.from_pretrained(device="cpu", dtype=torch.float32)
    torch.manual_seed(0)
    tiny = make().eval()  # its published sizes; weights do not change time
    tiny_last = copy.deepcopy(tiny).to(memory_format=torch.channels_last)
    images = torch.rand(COMPARED_BATCH, 3, 256, 256) * 2 - 1
    channels_last = images.to(memory_format=torch.channels_last)
    with ci.progress(runs, "against AutoencoderTiny") as advance:
        timings = time_alternately(
            [lambda: ours(channels_last), lambda: tiny(images), lambda: tiny_last(channels_last)],
            device="cpu",
            runs=runs,
            warmup=2,
            progress=advance,
        )
    ours_ms, *theirs = (t.summary(COMPARED_BATCH)["p50_ms"] for t in timings)
    tiny_ms = min(theirs)
    return {
        "diffusers": diffusers.__version__,
        "device": ci.device_name(torch.device("cpu")),
        "batch_size": COMPARED_BATCH,
        "num_runs": runs,
        "dtype": "float32",
        "parscale_ear_p50_ms_per_image": ours_ms,
        "autoencoder_tiny_p50_ms_per_image": tiny_ms,
        "autoencoder_tiny_layout": ("contiguous", "channels-last")[theirs.index(tiny_ms)],
        "ratio_p50": tiny_ms / ours_ms,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = ci.parser(__doc__ or "", "latency.json")
    parser.add_argument(
        "--num-runs",
        type=ci.positive_int,
        default=os.environ.get("CI_NUM_RUNS") or None,
        help=f"timed runs a batch size (or CI_NUM_RUNS; default {FULL_RUNS}, quick 10)",
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default: by device")
    arguments = parser.parse_args(argv)
    runs = arguments.num_runs or (10 if arguments.quick else FULL_RUNS)
    device = ci.resolve_device(arguments.device)
    torch.manual_seed(arguments.seed)
    model = ParScaleEAR.from_pretrained(device=device, dtype=DTYPES[arguments.dtype])
    dtype = model.dtype

    roof_runs = 3 if arguments.quick else 10
    roof = measure_roof(device, dtype, runs=roof_runs)
    flops = model.flops(256, 256)
    rows: list[dict[str, Any]] = []
    for batch in BATCH_SIZES:
        with ci.progress(runs, f"batch {batch}") as advance:
            row = benchmark_model_precise(model, device, batch, runs, progress=advance)
        rows.append(row)
    # Before and after: something else that ran for a moment does not lower it so easily.
    roof = roof.or_better(measure_roof(device, dtype, runs=roof_runs))
    for row, batch in zip(rows, BATCH_SIZES, strict=True):
        seconds = row["mean_ms_per_image"] / 1000
        row["flops_per_s"] = flops / seconds
        row["fraction_of_compute_roof"] = row["flops_per_s"] / roof.flops_per_s
        row["least_bytes_per_s"] = least_bytes(model, batch) / batch / seconds
        row["fraction_of_memory_roof"] = row["least_bytes_per_s"] / roof.bytes_per_s
    compared, reason = None, ""
    try:
        compared = compare_with_autoencoder_tiny(max(3, runs // 5))
    except ImportError as error:
        reason = f"diffusers does not import ({error}); it is in the Poetry group 'bench'"

    figures = {
        "gflop_per_image": flops / 1e9,
        "batches": rows,
        "roof": roof.as_dict(),
        "against_autoencoder_tiny": compared,
    }
    _print(figures)
    targets = _targets(device, rows, compared, reason, arguments.quick)
    fields = ci.common_fields(device, dtype, arguments.seed)
    settings = {"num_runs": runs, "height": 256, "width": 256, "batch_sizes": list(BATCH_SIZES)}
    return ci.finish("M2-2", "latency", arguments, fields, settings, figures, targets)


def _targets(
    device: torch.device,
    rows: list[dict[str, Any]],
    compared: dict[str, Any] | None,
    reason: str,
    quick: bool,
) -> list[ci.Target]:
    beside = f"the prototype printed {PROTOTYPE_P99_MS} ms"
    p99 = ci.at_most(
        f"P99 per image at batch {BATCH_SIZES[-1]} on CUDA",
        rows[-1]["p99_ms_per_image"],
        CUDA_P99_MS,
        "ms",
        beside,
    )
    ratio = ci.at_least(
        "times faster than AutoencoderTiny (FP32, CPU, batch 4)",
        math.nan if compared is None else compared["ratio_p50"],
        CPU_RATIO,
    )
    share = ci.at_most(
        "largest share of the compute roof: more than all of it cannot be",
        max(row["fraction_of_compute_roof"] for row in rows),
        1 + SLACK,
    )
    if quick:
        return ci.unjudged([p99, ratio, share], "--quick gives no verdict on timings")
    if device.type == "cuda":
        (ratio,) = ci.unjudged([ratio], "counts where the P99 on CUDA cannot be measured")
        return [p99, ratio, share]
    (p99,) = ci.unjudged([p99], f"measured on {device.type}, not on CUDA; {beside}")
    if compared is None:
        (ratio,) = ci.unjudged([ratio], reason)
    return [p99, ratio, share]


def _print(figures: Mapping[str, Any]) -> None:
    ci.table(LATENCY_HEAD, latency_rows(figures))
    roof = figures["roof"]
    print(
        f"{figures['gflop_per_image']:.2f} GFLOP an image; roof measured here: "
        f"{roof['flops_per_s'] / 1e9:.0f} GFLOP/s, {roof['bytes_per_s'] / 1e9:.1f} GB/s"
    )


if __name__ == "__main__":
    sys.exit(ci.run(main))

"""``parscale-ear evaluate``: how well pictures are reconstructed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from parscale_ear.places import check_output
from parscale_ear.verbs.common import (
    Verbs,
    add_device,
    add_processes,
    add_refinements,
    add_weights,
    positive,
    weights_of,
)


def add_parser(verbs: Verbs) -> None:
    """Adds the verb."""
    verb = verbs.add_parser(
        "evaluate",
        help="PSNR, SSIM, MS-SSIM, HaarPSI, Fréchet distance and throughput on pictures",
        description="Measures reconstructions by the protocol that tokenizers are compared by: "
        "short side resized by Lanczos, centre crop, 8 bits. The last line is JSON.",
    )
    verb.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="DIR_OR_TAR",
        help="files, folders, tars, or hf:DATASET[:SPLIT]",
    )
    verb.add_argument("--side", type=positive, default=256, help="of the squares (default 256)")
    verb.add_argument("--batch", type=positive, default=8, help="pictures at a time (default 8)")
    verb.add_argument(
        "--features",
        choices=("auto", "inception", "efficientnet-lite1", "efficientnet-lite0"),
        default="auto",
        help="of the Fréchet distance (default: Inception where its weights can be had)",
    )
    verb.add_argument("--inception-weights", type=Path, help="pytorch-fid's weight file")
    verb.add_argument("--output", type=Path, help="also write the JSON to this file")
    add_refinements(verb)
    add_weights(verb)
    add_device(verb)
    add_processes(verb)
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from parscale_ear import checkpoint
    from parscale_ear.autoencoder.evaluation import EvaluationOptions, evaluate
    from parscale_ear.data.images import find_images
    from parscale_ear.device import default_dtype, resolve_device
    from parscale_ear.parallel import worker_devices

    device = resolve_device(arguments.device)
    if arguments.output is not None:
        check_output(arguments.output)
    refs = find_images(arguments.images)
    weights = weights_of(arguments)
    options = EvaluationOptions(
        weights=weights,
        side=arguments.side,
        dtype=arguments.dtype or default_dtype(device),
        batch=arguments.batch,
        refinements=arguments.refinements,
        features=arguments.features,
        inception_weights=arguments.inception_weights,
    )
    with tqdm(total=len(refs), unit="image") as bar:
        result = evaluate(
            refs,
            options,
            devices=worker_devices(device, arguments.processes),
            progress=bar.update,
        )
    for name, reason in result["skipped"].items():
        print(f"parscale-ear: skipped {name}: {reason}", file=sys.stderr)
    result["weights"] = weights.name
    result["weights_sha256"] = checkpoint.load(weights)[1]["sha256"]
    rows = [
        ("pictures", f"{result['pictures']}"),
        ("PSNR", f"{result['psnr_db']:.3f} dB"),
        ("SSIM", f"{result['ssim']:.4f}"),
        ("MS-SSIM", "(from 161 px)" if result["ms_ssim"] is None else f"{result['ms_ssim']:.4f}"),
        ("HaarPSI", f"{result['haarpsi']:.4f}"),
    ]
    if result["frechet_distance"] is not None:
        rows.append((result["distance_name"], f"{result['frechet_distance']:.3f}"))
    many = "" if result["processes"] == 1 else f" ({result['processes']} processes)"
    speed = result["images_per_s"]
    rows.append(
        ("model", "(from the second batch)" if speed is None else f"{speed:.1f} images/s{many}")
    )
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    line = json.dumps(result)
    print(line)
    if arguments.output is not None:
        checkpoint.write_text(arguments.output, line + "\n")
    return 2 if result["skipped"] else 0

"""M2-3: Fréchet distance, PSNR and SSIM between reconstructions and their originals."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from ci import _common as ci
from ci._distances import compare, print_comparison
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.reconstruct import reconstruct_pictures
from parscale_ear.data.reference import ReferenceSet, load_reference
from parscale_ear.metrics.features import load_extractor

MOST_FID_ADDED = 3.0  # hybrid − baseline
MOST_RELATIVE_ADDED = 0.03  # the same for the offline extractor, of the baseline's distance


def reference_of(arguments: Any) -> ReferenceSet:
    """The reference set that the options name."""
    count = arguments.num_samples or (42 if arguments.quick else 280)
    return load_reference(count, directory=arguments.ref_dir, name=arguments.reference)


def restore(variant: Any, device: torch.device, pictures: Tensor, **options: Any) -> Tensor:
    """Reconstructions of one shipped variant in FP32, 8-bit."""
    model = ParScaleEAR.from_pretrained(variant=variant, device=device, dtype=torch.float32)
    with ci.progress(len(pictures), f"reconstructing: {variant}") as advance:
        return reconstruct_pictures(model, pictures, progress=advance, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = ci.parser(__doc__ or "", "fid.json")
    parser.add_argument(
        "--mode",
        choices=("baseline", "hybrid"),
        default="hybrid",
        help="baseline: LiteVAE alone, no verdict; hybrid: both, and the difference between them",
    )
    ci.add_reference_options(parser)
    arguments = parser.parse_args(argv)
    device = ci.resolve_device(arguments.device)
    torch.manual_seed(arguments.seed)
    reference = reference_of(arguments)
    extractor, note = load_extractor(
        arguments.features, device=device, weights=arguments.inception_weights
    )
    print(f"reference: {reference.source}")
    for line in filter(None, (reference.warning, note)):
        print(f"note: {line}")
    variants = {
        variant: restore(variant, device, reference.pictures)
        for variant in ("baseline", "hybrid")[: 1 + (arguments.mode == "hybrid")]
    }
    result = compare(
        reference,
        variants,
        extractor,
        against="baseline",
        repeats=20 if arguments.quick else 200,
        seed=arguments.seed,
    )
    print_comparison(result)
    figures = {
        **result,
        "features": extractor.name,
        "features_note": note,
        "reference": reference.as_dict(),
    }
    settings = {"mode": arguments.mode, "num_samples": len(reference.pictures)}
    fields = ci.common_fields(device, torch.float32, arguments.seed)
    return ci.finish(
        "M2-3", "FID", arguments, fields, settings, figures, _targets(result, arguments.mode)
    )


def _targets(result: dict[str, Any], mode: str) -> list[ci.Target]:
    name = result["distance_name"]
    fid = "FID, hybrid − baseline"
    if mode == "baseline":
        return [ci.skipped(fid, "--mode baseline measures no difference", "≤ 3")]
    difference = result["differences"]["hybrid"]
    if name == "FID":
        return [ci.at_most(fid, difference["distance"]["value"], MOST_FID_ADDED)]
    relative = difference["relative_distance"]["value"]
    return [
        ci.skipped(fid, "Inception's weights are not to be had here", "≤ 3"),
        ci.at_most(f"{name}, (hybrid − baseline) / baseline", relative, MOST_RELATIVE_ADDED),
    ]


if __name__ == "__main__":
    sys.exit(ci.run(main))

"""M2-3: how close reconstructions are to their originals, and what the latent is like."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from ci import _common as ci
from ci._distances import compare, print_comparison
from ci._quality import latent_figures, print_quality, size_figures
from parscale_ear import checkpoint
from parscale_ear.autoencoder.files import Decoder, shipped_weights
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.reconstruct import reconstruct_pictures
from parscale_ear.data.reference import ReferenceSet, load_reference
from parscale_ear.metrics.features import load_extractor

ADDED = "FID, hybrid − baseline"
MOST_FID_ADDED = 3.0
MOST_RELATIVE_ADDED = 0.03  # the same for the offline extractor, of the baseline's distance
LEAST_PSNR, LEAST_SSIM = 27.4, 0.79  # dB; on the photographs of the model card
LEAST_LOWERED = 0.35  # by the sharp decoder, of the faithful one's distance
MOST_PATTERN = 1.0  # level of 255, highest less lowest place: the least that 8 bits can show
LEAST_SHARP_PSNR = 25.8  # dB
MOST_TILE_ERROR = 1e-4  # of the pixels in [−1, 1], tiles against the whole
MODES: dict[str, dict[str, tuple[str, str | None, int]]] = {  # weights, decoder, refinements
    "baseline": {"baseline": ("baseline", None, 0)},
    "hybrid": {
        "baseline": ("baseline", None, 0),
        "hybrid": ("hybrid", "faithful", 0),
        "refined once": ("hybrid", "faithful", 1),
        "sharp": ("hybrid", "sharp", 0),
    },
}
AGAINST = {"hybrid": "baseline", "refined once": "hybrid", "sharp": "hybrid"}


def reference_of(arguments: Any) -> ReferenceSet:
    """The reference set that the options name."""
    count = arguments.num_samples or (42 if arguments.quick else ci.FULL["fid"]["num_samples"])
    return load_reference(count, directory=arguments.ref_dir, name=arguments.reference)


def restore(
    variant: Any, decoder: Any, device: torch.device, pictures: Tensor, **options: Any
) -> Tensor:
    """Reconstructions of one shipped model in FP32, 8-bit."""
    model = ParScaleEAR.from_pretrained(
        variant=variant, decoder=decoder, device=device, dtype=torch.float32
    )
    with ci.progress(len(pictures), f"reconstructing: {variant} {decoder or ''}") as advance:
        return reconstruct_pictures(model, pictures, progress=advance, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = ci.parser(__doc__ or "", "fid.json")
    parser.add_argument(
        "--mode",
        choices=("baseline", "hybrid"),
        default="hybrid",
        help="baseline: LiteVAE alone, no verdict; hybrid: also with the hybrid and both decoders",
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
        name: restore(variant, decoder, device, reference.pictures, refinements=times)
        for name, (variant, decoder, times) in MODES[arguments.mode].items()
    }
    result = compare(
        reference,
        variants,
        extractor,
        against={a: b for a, b in AGAINST.items() if a in variants},
        seed=arguments.seed,
    )
    print_comparison(result)
    sizes = size_figures(device, (128, 256) if arguments.quick else (128, 256, 512, 1024))
    latent = latent_figures(device, reference.pictures)
    print_quality(sizes, latent)
    figures = {
        **result,
        "sizes": sizes,
        "latent": latent,
        "features": extractor.name,
        "features_note": note,
        "reference": reference.as_dict(),
    }
    settings = {"mode": arguments.mode, "num_samples": len(reference.pictures)}
    fields = ci.common_fields(device, torch.float32, arguments.seed)
    targets = _targets(result, arguments.mode, quick=arguments.quick)
    if arguments.mode == "hybrid":
        tiles = max(row["tile_error"] for row in sizes if row["tile"])
        name = "tiles against the whole, one picture a size, largest difference"
        targets.append(ci.at_most(name, tiles, MOST_TILE_ERROR))
    return ci.finish("M2-3", "quality", arguments, fields, settings, figures, targets)


def shipped_facts() -> dict[str, dict[str, Any]]:
    """What the shipped weights say of their own measuring: decoder → the header's facts.

    ``refined``: of the faithful decoder, given latents that were refined once.
    """
    told = {
        name: checkpoint.load(shipped_weights("hybrid", name))[1]["training"]
        for name in get_args(Decoder)
    }
    return {
        **{name: facts["validation"] for name, facts in told.items()},
        "refined": told["faithful"]["refined"],
    }


def card_targets(facts: Mapping[str, Mapping[str, Any]], *, quick: bool) -> list[ci.Target]:
    """The bars on the photographs of the model card, which the weights' headers tell.

    Args:
        facts: decoder → its figures there; nothing of them is measured in this run.
        quick: give no verdict.
    """
    faithful, sharp = facts["faithful"], facts["sharp"]
    relative = sharp["distance"] / faithful["distance"] - 1
    data = (
        f"on record: {sharp['pictures']:,} pictures of {', '.join(sharp['data'])}, on which recipes were "
        "chosen"
    )
    refined = f"; {facts['refined']['psnr_db']:.2f} dB refined once, at twice the FLOPs"
    targets = [
        ci.at_least("model card: PSNR", faithful["psnr_db"], LEAST_PSNR, "dB", data + refined),
        ci.at_least("model card: SSIM", faithful["ssim"], LEAST_SSIM, why=data),
        ci.at_least("model card: PSNR, sharp", sharp["psnr_db"], LEAST_SHARP_PSNR, "dB", data),
        ci.at_most(
            f"model card: {sharp['distance_name']}, (sharp − faithful) / faithful",
            relative, -LEAST_LOWERED, why=data,
        ),
        ci.at_most("model card: 4×4 pattern, sharp", sharp["pattern"],
                   MOST_PATTERN, "of 255", data),
        ci.at_most("model card: 4×4 pattern in flat blocks, sharp", sharp["pattern_flat"],
                   MOST_PATTERN, "of 255", data),
    ]  # fmt: skip
    return ci.unjudged(targets, "judged in a full run only") if quick else targets


def _targets(result: dict[str, Any], mode: str, *, quick: bool = False) -> list[ci.Target]:
    name = result["distance_name"]
    if mode == "baseline":
        limit = f"≤ {MOST_FID_ADDED:g}"
        return [ci.skipped(ADDED, "--mode baseline measures no difference", limit)]
    difference = result["differences"]["hybrid"]
    added = ci.at_most(ADDED, difference["distance"]["value"], MOST_FID_ADDED)
    targets = [added]
    if name != "FID":
        why = f"Inception was not there, or not asked for: measured by {name}"
        relative = difference["relative_distance"]["value"]
        targets = [
            *ci.unjudged([added], why),
            ci.at_most(f"{name}, (hybrid − baseline) / baseline", relative, MOST_RELATIVE_ADDED),
        ]
    high = difference["distance"]["high"]
    earned = ci.Target(
        f"{name}, hybrid − baseline, upper end of its interval",
        "PASS" if high < 0 else "MISSED",
        high,
        "< 0",
        f"mean {difference['distance']['value']:+.2f}",
    )
    row = result["differences"]["sharp"]["relative_distance"]
    lowered = ci.at_most(
        f"{name}, (sharp − faithful) / faithful",
        row["value"],
        -LEAST_LOWERED,
        why=f"the figure, not an end of its interval over scenes: {row['low']:+.3f} to {row['high']:+.3f}",
    )
    if quick:
        targets += ci.unjudged(
            [earned, lowered], "judged in a full run: so few crops show little of it"
        )
    elif name == "FD-EfficientNetLite0":
        why = "Lite0 took part in the sharp decoder's training"
        targets += [earned, *ci.unjudged([lowered], why)]
    else:
        targets += [earned, lowered]
    psnr = result["variants"]["sharp"]["psnr_db"]["value"]
    return [
        *targets,
        ci.at_least("sharp decoder: PSNR", psnr, LEAST_SHARP_PSNR, "dB"),
        *card_targets(shipped_facts(), quick=quick),
    ]


if __name__ == "__main__":
    sys.exit(ci.run(main))

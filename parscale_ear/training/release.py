"""Turns a finished run into weights to ship: FP16 files, measured again, and the card's figures.

    python -m parscale_ear.training.release RUN --validation DIR_OR_TAR --out parscale_ear/weights

The figures are those of the rounded weights, in FP32, by the protocol that tokenizers are compared
by: short side to 256 by Lanczos, centre crop, 8-bit reconstruction of the posterior's mode, PSNR
and SSIM a picture, then the mean. Beside them stand MS-SSIM, HaarPSI and the Fréchet distance to
the originals in features of EfficientNet-Lite1, which took no part in training; with
``--training``, also the mean and deviation of the latent's channels over the training pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from parscale_ear import __version__, checkpoint
from parscale_ear.autoencoder.files import leave_out
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.reconstruct import reconstruct_pictures
from parscale_ear.data.images import find_images, from_uint8, load_squares, to_grey
from parscale_ear.metrics.features import FeatureChoice, FeatureExtractor, load_extractor
from parscale_ear.metrics.frechet import frechet_distance
from parscale_ear.metrics.reconstruction import cell_pattern, chroma, similarities
from parscale_ear.places import check_folder
from parscale_ear.training.marks import between_marks
from parscale_ear.training.program import FAILED, add_pictures, attempt, new_parser
from parscale_ear.training.recipe import SHARP_KEEPS, named_release

# What each file leaves to hybrid.safetensors, which is whole.
SHARED = {"hybrid": (), "sharp": ("encoder", *SHARP_KEEPS), "baseline": ("encoder",)}
NAMES = {"hybrid": "faithful", "sharp": "sharp", "baseline": "baseline (no hybrid)"}
REFINED = "latents refined once"
CARD = "README.md"
JUDGE: FeatureChoice = "efficientnet-lite1"  # Lite0 took part in the sharp decoder's training
BATCH = 16  # pictures at a time
FLAT = 3.0  # levels of 255: a block of a smaller deviation is flat
BEGIN, END = "<!-- figures: written by parscale_ear.training.release -->", "<!-- /figures -->"


def _height(pattern: NDArray[np.float64]) -> float:
    """Highest less lowest position of a pattern, (3, S, S), in the colour where that is most."""
    return round(float(np.ptp(pattern, axis=(1, 2)).max()), 3)


def look(extractor: FeatureExtractor, pictures: Tensor) -> NDArray[np.float32]:
    """(N, 3, H, W), 8-bit → (N, D)."""
    return np.concatenate([extractor(part).numpy() for part in pictures.split(BATCH)])


def measure(
    model: ParScaleEAR,
    pictures: Tensor,
    originals: NDArray[np.float32],
    extractor: FeatureExtractor,
    name: str,
    *,
    refinements: int = 0,
) -> dict[str, Any]:
    """Mean similarities over 8-bit pictures, (N, 3, 256, 256), and the distance to them.

    Beside them the checkerboard in the error (:func:`cell_pattern`), highest less lowest position, in
    levels: everywhere, and where a picture is flat; and the colour of the same pictures when they are
    given in grey, levels too (:func:`chroma`).

    ``originals``: what the extractor sees of them, (N, D).
    """
    with tqdm(total=len(pictures), desc=name) as bar:
        restored = reconstruct_pictures(
            model, pictures, refinements=refinements, progress=bar.update
        )
    grey = torch.from_numpy(to_grey(pictures.movedim(1, 3).numpy())).movedim(3, 1)
    with tqdm(total=len(pictures), desc=f"{name}, in grey") as bar:
        greys = reconstruct_pictures(model, grey, refinements=refinements, progress=bar.update)
    return {
        **{k: round(float(v.mean()), 4) for k, v in similarities(restored, pictures).items()},
        "distance": round(frechet_distance(look(extractor, restored), originals), 2),
        "distance_name": extractor.distance,
        "pattern": _height(cell_pattern(restored, pictures)),
        "pattern_flat": _height(cell_pattern(restored, pictures, most_varied=FLAT)),
        "grey_chroma": round(float(chroma(greys).mean()), 3),
    }


@torch.inference_mode()
def latent_statistics(model: ParScaleEAR, sources: Sequence[str]) -> dict[str, Any]:
    """Least and largest mean and deviation of a latent channel over pictures (256×256 squares).

    Raises:
        ImageError: no pictures.
    """
    pictures = load_squares(find_images(sources))
    channels = model.config.litevae.latent_channels
    total, squares = (torch.zeros(channels, dtype=torch.float64) for _ in range(2))
    count = 0
    with tqdm(total=len(pictures), desc="latents") as bar:
        for part in pictures.split(BATCH):
            latent = model.encode(from_uint8(part)).mode().double().transpose(0, 1).flatten(1)
            total += latent.sum(1)
            squares += latent.square().sum(1)
            count += latent.shape[1]
            bar.update(len(part))
    mean = total / count
    deviation = (squares / count - mean.square()).sqrt()
    return {
        "data": [Path(path).name for path in sources],
        "pictures": len(pictures),
        "mean": [round(float(edge), 3) for edge in (mean.min(), mean.max())],
        "deviation": [round(float(edge), 3) for edge in (deviation.min(), deviation.max())],
    }


def release(
    run: Path, validation: Sequence[str], out: Path, training: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Writes ``out/{hybrid,sharp,baseline}.safetensors`` and the figures of ``out/README.md``.

    Args:
        run: the folder of a finished run.
        validation: pictures to measure on: files, folders or tar archives.
        out: folder for the weights; its card must hold the two marks.
        training: pictures of the training, over which the latent's statistics are taken; may be
            none.

    Returns:
        The training facts that each header carries.

    Raises:
        CheckpointError: the run is not finished, or damaged.
        FeatureError: the extractor cannot be had.
        ImageError: no pictures.
        ValueError: the models do not share one latent space or what is stored once, or the card
            lacks its marks.
    """
    check_folder(out)
    pictures = load_squares(find_images(validation))
    card = (out / CARD).read_text(encoding="utf-8")
    with_figures(card, {})  # fails now rather than half-way
    headers = {name: checkpoint.load(run / f"{name}.safetensors")[1] for name in SHARED}
    if len({header.get("latent_fingerprint") for header in headers.values()}) > 1:
        raise ValueError("the models do not share one latent space; they are of different runs")
    models = {
        name: ParScaleEAR.from_pretrained(run / f"{name}.safetensors").half().float()
        for name in SHARED
    }
    for name, parts in SHARED.items():
        kept, own = (
            leave_out(models[model].state_dict(), parts, "")[1] for model in ("hybrid", name)
        )
        if kept != own:
            raise ValueError(f"{name}.safetensors has another {' or '.join(parts)} than hybrid's")
    extractor, _ = load_extractor(JUDGE)
    originals = look(extractor, pictures)
    facts: dict[str, dict[str, Any]] = {}
    for header in headers.values():
        # Shipped weights may ship again; those up to 0.5 did not say of which release they are.
        old = "data" in header["training"].get("validation", {})
        for stage in header["training"]["history"]:
            stage.setdefault("release", named_release(stage)[1] if old else __version__)
    for name, model in models.items():
        shared = SHARED[name]
        facts[name] = {
            **headers[name]["training"],
            "validation": {
                "data": [Path(path).name for path in validation],
                "pictures": len(pictures),
                "side": 256,
                "precision": "float32",
                **measure(model, pictures, originals, extractor, name),
            },
        }
        if not shared:
            facts[name]["refined"] = measure(
                model, pictures, originals, extractor, f"{name}, {REFINED}", refinements=1
            )
        if training and not shared:
            facts[name]["latent"] = latent_statistics(model, training)
    # All at the end: a new one beside earlier ones of another latent space could not be read.
    for name, model in models.items():
        model.save_pretrained(
            out / f"{name}.safetensors",
            dtype=torch.float16,
            shared_parts=SHARED[name],
            shared_file="hybrid.safetensors" if SHARED[name] else "",
            training=facts[name],
        )
    checkpoint.write_text(out / CARD, with_figures(card, facts))
    return facts


def with_figures(card: str, facts: Mapping[str, Mapping[str, Any]]) -> str:
    """The card's text with its figures replaced.

    Raises:
        ValueError: the card lacks its marks.
    """
    lines = []
    if facts:
        first = next(iter(facts.values()))
        figures = first["validation"]
        lines += [
            f"| weights | decoder | PSNR, dB | SSIM | MS-SSIM | HaarPSI | {figures['distance_name']} "
            "| 4×4 pattern: all, flat |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, row in facts.items():
            lines.append(_figure_row(name, NAMES[name], row["validation"]))
            if "refined" in row:  # weights up to 0.14 do not say
                lines.append(_figure_row(name, f"{NAMES[name]}, {REFINED}", row["refined"]))
        lines += [
            "",
            f"Measured on {figures['pictures']} pictures of {', '.join(figures['data'])} at "
            f"{figures['side']}×{figures['side']}, {figures['precision']}, weights rounded to "
            "FP16. A distance between so few pictures compares models on them, and nothing else. "
            "Pattern: the mean error at each of 4×4 positions, highest less lowest, in levels of 255: "
            f"everywhere, and in flat blocks (16×16 pixels of a deviation below {FLAT:g} levels).",
            *_grey_lines(facts),
            *(_latent_lines(first["latent"]) if "latent" in first else ()),
            "",
            "A stage goes on from the one above it, baseline and the first sharp one from the hybrid of their release:",
            "",
            "| stage | trains | pictures | steps | minutes | crops a step | peak rate | loss weights |",
            "|---|---|---|---|---|---|---|---|",
        ]
        stages: list[Mapping[str, Any]] = []
        for row in facts.values():
            stages += [stage for stage in row["history"] if stage not in stages]
        newest = max((named_release(stage)[1] for stage in stages), key=_order)
        for stage in stages:
            weights = ", ".join(f"{k} {v:g}" for k, v in stage["loss_weights"].items())
            crops = f"{stage['crops']} of {stage['side']}×{stage['side']}"
            if stage.get("grey_share"):
                crops += f", {100 * stage['grey_share']:g} % grey"
            if stage.get("refinements"):
                crops += f", latents refined up to {stage['refinements']}×"
            if stage.get("latent_noise"):
                crops += f", noise up to σ {stage['latent_noise']:g}"
            name, release = named_release(stage)
            earlier = "" if release == newest else f" ({release})"
            lines.append(
                f"| {name}{earlier} | {stage['trains']} | {stage['pictures']:,} "
                f"| {stage['steps']:,} "
                f"| {stage['minutes']:g} | {crops} "
                f"| {stage['rate']:g} | {weights or '—'} |"
            )
        last = [stage for stage in stages if named_release(stage)[1] == newest][-1]
        lines += [
            "",
            f"The last stage that is new: autocast {last['precision']}, torch {last['torch']}, seed "
            f"{last['seed']}.",
        ]
    return between_marks(card, BEGIN, END, "\n".join(lines), "the model card")


def _figure_row(name: str, decoder: str, found: Mapping[str, Any]) -> str:
    return (
        f"| `{name}.safetensors` | {decoder} | {found['psnr_db']:.2f} "
        + "".join(f"| {found[key]:.4f} " for key in ("ssim", "ms_ssim", "haarpsi"))
        + f"| {found['distance']:.1f} | {found['pattern']:.1f}, {found['pattern_flat']:.1f} |"
    )


def _order(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def _grey_lines(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = {NAMES[name]: row["validation"].get("grey_chroma") for name, row in facts.items()}
    if None in found.values():
        return []  # weights of 0.8 do not say
    each = ", ".join(f"{label} {value:.1f}" for label, value in found.items())
    return [
        "",
        "False colour when the same pictures are given in grey, highest less lowest channel, mean over "
        f"pixels, in levels of 255: {each}.",
    ]


def _latent_lines(latent: Mapping[str, Any]) -> list[str]:
    mean, deviation = latent["mean"], latent["deviation"]
    return [
        "",
        f"Over the {latent['pictures']:,} pictures of {', '.join(latent['data'])}, 256×256, a channel "
        f"of the latent has a mean of {mean[0]:.3f} to {mean[1]:.3f} and a deviation of "
        f"{deviation[0]:.3f} to {deviation[1]:.3f}.",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = new_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    add_pictures(parser, "--validation")
    parser.add_argument(
        "--training", nargs="+", default=[], metavar="DIR_OR_TAR",
        help="pictures of the training, for the latent's statistics",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("parscale_ear/weights"))
    arguments = parser.parse_args(argv)
    facts = attempt(
        "release",
        lambda: release(arguments.run, arguments.validation, arguments.out, arguments.training),
    )
    if facts is None:
        return FAILED
    for variant, row in facts.items():
        figures = row["validation"]
        print(
            f"{variant}: {figures['psnr_db']} dB, SSIM {figures['ssim']}, "
            f"{figures['distance_name']} {figures['distance']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

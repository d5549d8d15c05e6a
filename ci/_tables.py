"""Rows of the tables that the HTML report and docs/figures.md both show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ci import _common as ci
from ci._markdown import told
from ci._published import TOKENIZERS
from parscale_ear import checkpoint
from parscale_ear.autoencoder.files import shipped_weights
from parscale_ear.autoencoder.model import ParScaleEAR

TOKENIZER_HEAD = (
    *("tokenizer", "latent", "parameters, M", "GFLOP", "PSNR, dB", "SSIM", "measured on", "source"),
)
TOKENIZER_NOTE = (
    "Published figures are their authors' or those of the paper named, on ImageNet validation "
    "pictures, which were not used here; ours (*) are of other photographs, on which our recipes were chosen, by the "
    "same protocol. They stand side by side for the order of size, not for a ranking to a tenth of a "
    "decibel. Most of the others were trained with perceptual and adversarial losses, which cost "
    "PSNR."
)
DECODERS = (
    "hybrid is the default, LiteVAE with Lite-Hybrid and the faithful decoder; baseline LiteVAE alone, by a "
    "decoder trained to do without the hybrid; sharp the decoder for looks; refined once hybrid again, from latents "
    "of encode(images, refinements=1), at twice the FLOPs. In brackets: intervals."
)
SWITCHED = "full is the default as it ships; without a branch, its output is 0 and nothing is trained anew."
OURS, OURS_REFINED = "ours", "ours, latents refined once"
TRIAL_HEAD = (
    *("change", "parameters", "GFLOP", "ms/image", "minutes", "steps", "PSNR, dB", "SSIM", "seed"),
)


LATENCY_HEAD = (
    *("batch", "mean, ms/image", "P50", "P95", "P99", "images/s"),
    *("of the compute roof", "of the memory roof"),
)


def latency_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row a batch size."""
    return [
        (
            str(row["batch_size"]),
            *(f"{row[f'{key}_ms_per_image']:.2f}" for key in ("mean", "p50", "p95", "p99")),
            f"{row['images_per_s']:.1f}",
            f"{row['fraction_of_compute_roof']:.0%}",
            f"{row['fraction_of_memory_roof']:.0%}",
        )
        for row in figures["batches"]
    ]


def own_figures() -> dict[str, dict[str, float]]:
    """PSNR and SSIM on the validation pictures of the model card, and the size: name → figures.

    The names are ``ours`` and ``ours, latents refined once``, which goes through encoder and decoder
    twice.
    """
    facts = checkpoint.load(shipped_weights())[1]["training"]
    model = ParScaleEAR.from_pretrained()
    return {
        name: {
            **{key: facts[measured][key] for key in ("psnr_db", "ssim")},
            "pictures": facts["validation"]["pictures"],
            "parameters_m": model.parameter_count()["total"] / 1e6,
            "gflop": times * model.flops() / 1e9,
        }
        for name, measured, times in ((OURS, "validation", 1), (OURS_REFINED, "refined", 2))
    }


def tokenizer_rows() -> list[tuple[str, ...]]:
    """Published tokenizers, and ours last."""

    def text(value: float | None, digits: int) -> str:
        return "—" if value is None else f"{value:.{digits}f}"

    rows = [
        (
            *(row.name, row.latent, text(row.parameters_m, 1), text(row.gflop, 0)),
            *(f"{row.psnr_db:.2f}", f"{row.ssim:.3f}", "ImageNet validation, 256×256"),
            row.source + (f"; FLOPs: {row.counted}" if row.counted else ""),
        )
        for row in TOKENIZERS
    ]
    rows += [
        (
            *(f"{name}*", "f16c32", f"{ours['parameters_m']:.2f}", f"{ours['gflop']:.1f}"),
            *(f"{ours['psnr_db']:.2f}", f"{ours['ssim']:.3f}"),
            f"{ours['pictures']} other photographs, 256×256",
            "the model card beside the weights",
        )
        for name, ours in own_figures().items()
    ]
    return rows


def training_head(evidence: Mapping[str, Any]) -> tuple[str, ...]:
    """The head of a table of ``training_rows``."""
    return ("variant", "parameters", *evidence["variants"]["hybrid"])


def training_rows(evidence: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Mean PSNR by variant and condition, and the difference to the hybrid."""
    rows = []
    for name, conditions in evidence["variants"].items():
        cells = []
        for entry in conditions.values():
            cell = f"{entry['psnr_db']['value']:.2f}"
            if "minus_hybrid" in entry:
                cell += f" ({ci.interval(entry['minus_hybrid'])})"
            cells.append(cell)
        rows.append((name, f"{evidence['models'][name]['parameters']:,}", *cells))
    return rows


def training_text(evidence: Mapping[str, Any]) -> str:
    """How the trainings with and without hybrid were made and measured, and where."""
    return (
        f"Every variant trained from fresh weights by one recipe: {evidence['steps']:,} steps of "
        f"{evidence['crops_a_step']} crops of {evidence['crop']}×{evidence['crop']} out of "
        f"{', '.join(evidence['images'])}, {len(evidence['seeds'])} seeds. PSNR in dB on "
        f"{evidence['pictures']} pictures of {', '.join(evidence['validation'])} in float32, also from "
        "latents with noise and from quantised latents. In brackets: the difference to the hybrid and "
        "its interval, paired, over pictures and seeds, meant for 95 %; by an older formula than the "
        "command's, which held in 92 % of simulations (docs/experiments.md). Short trainings: they rank, they do not show the end. On record: "
        f"{told(evidence)}."
    )


def trial_rows(trials: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of one set of trials, which were made alike."""
    return [
        (
            row["change"],
            f"{row['parameters']:,}",
            f"{row['gflop']:.2f}",
            f"{row['ms_per_image']:.1f}",
            f"{row['minutes']:g}",
            f"{row['steps']:,}",
            f"{row['psnr_db']:.2f}",
            f"{row['ssim']:.4f}",
            str(row["seed"]),
        )
        for row in trials["trials"]
    ]

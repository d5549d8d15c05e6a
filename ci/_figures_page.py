"""All figures of a full run as Markdown: docs/figures.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ci import _evidence, _generation_tables, _stream_tables
from ci._distances import distance_head, distance_rows
from ci._markdown import markdown, origin
from ci._quality import SIZE_HEAD, latent_line, size_rows
from ci._tables import (
    TOKENIZER_HEAD,
    TOKENIZER_NOTE,
    tokenizer_rows,
    training_head,
    training_rows,
)
from ci.validate_results import REPORTS, milestone_rows


def all_figures(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Every table, with hardware, dtype, sample count and date, or the training on record it is of."""
    sanity, latency, fid, ablation, streams, generation = (reports[name] for name in REPORTS)
    compared = latency["figures"]["against_autoencoder_tiny"]
    counts = sanity["figures"]["parameters"]
    lines = [
        f"Parameters: encoder {counts['encoder']:,}, hybrid {counts['hybrid']:,}, "
        f"decoder {counts['decoder']:,}, together {counts['total']:,}.",
        "",
        "**Milestones**",
        "",
        markdown(
            ("milestone", "target", "value", "limit", "status"),
            [row[:5] for row in milestone_rows(reports)],
        ),
        "",
        f"**Latency** ({latency['figures']['gflop_per_image']:.2f} GFLOP per 256×256 image)",
        "",
        markdown(
            ("batch", "mean, ms/image", "P50", "P99", "images/s", "share of the compute roof"),
            [
                (
                    str(row["batch_size"]),
                    *(f"{row[f'{key}_ms_per_image']:.1f}" for key in ("mean", "p50", "p99")),
                    f"{row['images_per_s']:.0f}",
                    f"{row['fraction_of_compute_roof']:.0%}",
                )
                for row in latency["figures"]["batches"]
            ],
        ),
        "",
        origin(latency, f"{latency['settings']['num_runs']} runs a batch size"),
    ]
    if compared is not None:
        lines.append(
            f"In the same run, plain FP32, batch {compared['batch_size']}: "
            f"{compared['ratio_p50']:.1f}× faster than diffusers {compared['diffusers']}'s "
            f"`AutoencoderTiny` (median of {compared['num_runs']} alternating runs)."
        )
    if latency["device_type"] != "cuda":
        lines.append("**Not measured on a GPU yet.**")
    for title, report in (
        ("Reconstruction", fid),
        ("Ablation by switching branches off", ablation),
    ):
        figures = report["figures"]
        reference = figures["reference"]
        samples = f"{reference['pictures']} crops of {reference['scenes']} scenes"
        rows = distance_rows(figures)
        head = distance_head(figures)
        lines += ["", f"**{title}**", "", markdown(head, rows), "", origin(report, samples)]
        if reference["warning"]:
            lines.append(f"Note: {reference['warning']}.")
    lines += _quality(fid["figures"])
    used = ", ".join(f"{k}: {v}" for k, v in ablation["figures"]["branches"].items())
    lines.append(f"Branches in the trained model — {used} (used is not the same as worth it).")
    precision = sanity["figures"]["precision"]
    lines += [
        "",
        "**Half precision** against FP32 on the same photographs: "
        + "; ".join(
            f"{decoder} decoder, {name}: relative error {row['relative_error']:.1e}, "
            f"{row['psnr_lost_db']:+.4f} dB lost"
            for decoder, rows in precision.items()
            for name, row in rows.items()
            if name != "float32"
        )
        + ". "
        + origin(sanity, f"{sanity['figures']['reference']['pictures']} crops"),
        *_streams(streams),
        *_generation(generation["figures"]),
        origin(generation, f"{generation['figures']['pictures']} pictures"),
    ]
    return "\n".join(lines)


def _streams(report: Mapping[str, Any]) -> list[str]:
    """Parallel streams beside the prototype's figures."""
    figures, rounds = report["figures"], f"{report['settings']['num_runs']} rounds in turn"
    return [
        "",
        f"**Parallel streams** ({figures['model']}, one label, {figures['side']}×{figures['side']}, guidance; a "
        "generation "
        "with its decoder, and its tokens alone)",
        "",
        markdown(_stream_tables.stream_head(), _stream_tables.stream_rows(figures)),
        "",
        *(f"{note}  " for note in _stream_tables.stream_notes(figures)),
        "",
        f"{_stream_tables.SCALES_TITLE}:",
        "",
        markdown(_stream_tables.scale_head(figures), _stream_tables.scale_rows(figures)),
        "",
        origin(report, f"batch 1, {rounds}; the calls one after the other once, afterwards"),
        "",
        _stream_tables.trained_note(figures),
        "",
        markdown(_stream_tables.TRAINED_HEAD, _stream_tables.trained_rows(figures)),
        "",
        origin({**report, "dtype": "float32"}, f"{rounds}, the calls too"),
        "",
        markdown(_stream_tables.PROTOTYPE_HEAD, _stream_tables.PROTOTYPE_ROWS),
        "",
        _stream_tables.PROTOTYPE_NOTE,
        "",
        *_worth(figures),
    ]


def _generation(figures: Mapping[str, Any]) -> list[str]:
    """Drawn pictures, as judged and as measured in the run."""
    tables = _generation_tables
    judged = _evidence.read(_evidence.JUDGED)
    lines = ["", "**Drawn pictures** (the shipped EnergyAR)", ""]
    if judged is not None:
        lines += [
            markdown(tables.HEAD, tables.rows(judged, judged["ceiling"])),
            "",
            f"{tables.judged_note(judged)} Data: {', '.join(judged['data'])}; {judged['dtype']}, torch "
            f"{judged['torch']}.",
            "",
            markdown(tables.NEIGHBOUR_HEAD, tables.neighbour_rows(judged)),
            "",
            tables.NEIGHBOUR_NOTE,
            "",
        ]
    for title, path in _evidence.HEAD_COMPARISONS.items():
        heads = _evidence.read(path)
        if heads is not None:
            lines += [
                f"{title}:",
                "",
                markdown(tables.HEADS_HEAD, tables.head_rows(heads)),
                "",
                tables.head_text(heads),
                "",
            ]
    return [
        *lines,
        f"As measured in this run, of {figures['pictures']:,} pictures:",
        "",
        markdown(tables.HEAD, tables.rows(figures, figures["reference"]["ceiling"])),
        "",
        *(f"{note}  " for note in tables.generation_notes(figures)),
        "",
    ]


def _worth(figures: Mapping[str, Any]) -> list[str]:
    tables, lines = _stream_tables, []
    evidence = _evidence.read(_evidence.STREAMS)
    if evidence is not None:
        lines += [
            f"**{tables.WORTH_TITLE}**",
            "",
            markdown(tables.WORTH_HEAD, tables.worth_rows(evidence)),
            "",
            tables.worth_text(evidence),
            "",
        ]
    evidence = _evidence.read(_evidence.EAR_STREAMS)
    if evidence is not None:
        lines += [
            f"**{tables.EAR_WORTH_TITLE}**",
            "",
            markdown(tables.ear_worth_head(evidence), tables.ear_worth_rows(evidence, figures)),
            "",
            tables.ear_worth_text(evidence, figures),
            "",
        ]
    return lines


def _quality(figures: Mapping[str, Any]) -> list[str]:
    """Sizes, latent, published tokenizers and the controlled training."""
    lines = [
        "",
        "**By size**",
        "",
        markdown(SIZE_HEAD, size_rows(figures["sizes"])),
        "",
        "; ".join(f"{row['side']}: {row['source']}" for row in figures["sizes"]) + ".",
        "",
        f"**The latent**: {latent_line(figures['latent'])}.",
        "",
        "**Beside published tokenizers**",
        "",
        markdown(TOKENIZER_HEAD, tokenizer_rows()),
        "",
        TOKENIZER_NOTE,
        "",
    ]
    evidence = _evidence.read(_evidence.TRAINING)
    if evidence is not None:
        lines += [
            "**What the hybrid is worth**: PSNR in dB of models trained alike with and without it "
            f"({evidence['steps']:,} steps, {len(evidence['seeds'])} seeds), and the difference to "
            "the hybrid.",
            "",
            markdown(training_head(evidence), training_rows(evidence)),
            "",
        ]
    return lines

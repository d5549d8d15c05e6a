"""All figures of a full run as Markdown: docs/figures.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ci import _evidence, _generation_tables, _stream_tables
from ci._distances import distance_head, distance_rows, interval_note
from ci._markdown import markdown, origin
from ci._quality import SIZE_HEAD, latent_line, size_rows
from ci._tables import (
    DECODERS,
    LATENCY_HEAD,
    SWITCHED,
    TOKENIZER_HEAD,
    TOKENIZER_NOTE,
    latency_rows,
    tokenizer_rows,
    training_head,
    training_rows,
    training_text,
)
from ci.validate_results import milestone_rows

Section = tuple[str, list[str]]


def all_figures(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Every table, with hardware, dtype, sample count and date, or the training on record it is of."""
    sanity, latency, fid, ablation, streams, generation = (
        reports[name] for name in ("sanity", "latency", "fid", "ablation", "streams", "generation")
    )
    sections: list[Section] = [
        ("Size and latency", _latency(sanity, latency)),
        ("Reconstruction", [DECODERS, "", *_distances(fid)]),
        *_quality(fid),
        ("Half precision", _precision(sanity)),
        ("Ablation by switching branches off", _switched_off(ablation)),
        *_training(),
        *_streams(streams),
        *_generation(generation),
        (
            "Milestones",
            [
                markdown(
                    ("milestone", "target", "value", "limit", "status", "to keep in mind"),
                    milestone_rows(reports),
                )
            ],
        ),
    ]
    contents = [f"- [{title}](#{anchor(title)})" for title, _ in sections]
    written = ["\n".join([f"## {title}", "", *lines]).rstrip() for title, lines in sections]
    return "\n\n".join(["\n".join(contents), *written])


def anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _latency(sanity: Mapping[str, Any], latency: Mapping[str, Any]) -> list[str]:
    counts, compared = (
        sanity["figures"]["parameters"],
        latency["figures"]["against_autoencoder_tiny"],
    )
    lines = [
        f"Parameters: encoder {counts['encoder']:,}, hybrid {counts['hybrid']:,}, "
        f"decoder {counts['decoder']:,}, together {counts['total']:,}; "
        f"{latency['figures']['gflop_per_image']:.2f} GFLOP per 256×256 image, there and back.",
        "",
        markdown(LATENCY_HEAD, latency_rows(latency["figures"])),
        "",
        origin(latency, f"{latency['settings']['num_runs']} runs a batch size"),
    ]
    if compared is not None:
        lines += [
            "",
            f"In the same run, on the CPU ({compared['device']}), plain FP32, batch {compared['batch_size']}: "
            f"{compared['ratio_p50']:.1f}× faster than diffusers {compared['diffusers']}'s "
            f"`AutoencoderTiny` (median of {compared['num_runs']} alternating runs).",
        ]
    if latency["device_type"] != "cuda":
        lines += ["", "**Not measured on a GPU yet.**"]
    return lines


def _distances(report: Mapping[str, Any]) -> list[str]:
    figures = report["figures"]
    reference = figures["reference"]
    samples = f"{reference['pictures']} crops of {reference['scenes']} scenes"
    head, rows = distance_head(figures), distance_rows(figures)
    note = interval_note(reference)
    lines = [
        markdown(head, rows), "", origin(report, samples), "", f"{note[0].upper()}{note[1:]}."
    ]  # fmt: skip
    if reference["warning"]:
        lines += ["", f"Note: {reference['warning']}."]
    return lines


def _switched_off(report: Mapping[str, Any]) -> list[str]:
    used = ", ".join(f"{k}: {v}" for k, v in report["figures"]["branches"].items())
    return [
        SWITCHED,
        "",
        *_distances(report),
        "",
        f"Branches in the trained model: {used} (used is not the same as worth it).",
    ]


def _precision(report: Mapping[str, Any]) -> list[str]:
    """What half precision loses."""
    rows = [
        (decoder, name, f"{row['relative_error']:.1e}", f"{row['psnr_lost_db']:+.4f}")
        for decoder, rows in report["figures"]["precision"].items()
        for name, row in rows.items()
        if name != "float32"
    ]
    return [
        "Against FP32 on the same photographs.",
        "",
        markdown(("decoder", "dtype", "relative error", "PSNR lost, dB"), rows),
        "",
        origin(
            {**report, "dtype": ", ".join(next(iter(report["figures"]["precision"].values())))},
            f"{report['figures']['reference']['pictures']} crops",
        ),
    ]


def _streams(report: Mapping[str, Any]) -> list[Section]:
    """Parallel streams, beside the prototype's figures."""
    tables, figures = _stream_tables, report["figures"]
    rounds = f"{report['settings']['num_runs']} rounds in turn"
    return [
        (
            "Parallel streams: VAR",
            [
                f"{figures['model']}, one label, {figures['side']}×{figures['side']}, guidance "
                f"{report['settings']['guidance']:g}; a generation with its decoder, and its tokens alone.",
                "",
                markdown(tables.stream_head(), tables.stream_rows(figures)),
                "",
                *(f"{note}  " for note in tables.stream_notes(figures)),
                "",
                f"{tables.SCALES_TITLE}:",
                "",
                markdown(tables.scale_head(figures), tables.scale_rows(figures)),
                "",
                origin(
                    report, f"batch 1, {rounds}; the calls one after the other once, afterwards"
                ),
                "",
                markdown(tables.PROTOTYPE_HEAD, tables.PROTOTYPE_ROWS),
                "",
                tables.PROTOTYPE_NOTE,
            ],
        ),
        (
            "Parallel streams: EnergyAR",
            [
                tables.trained_note(figures),
                "",
                markdown(tables.TRAINED_HEAD, tables.trained_rows(figures)),
                "",
                origin({**report, "dtype": "float32"}, f"{rounds}, the calls too"),
            ],
        ),
        *_worth(report),
    ]


def _worth(report: Mapping[str, Any]) -> list[Section]:
    tables = _stream_tables
    sections: list[Section] = []
    evidence = _evidence.read(_evidence.STREAMS)
    if evidence is not None:
        rows = markdown(tables.WORTH_HEAD, tables.worth_rows(evidence))
        sections.append((tables.WORTH_TITLE, [rows, "", tables.worth_text(evidence)]))
    evidence = _evidence.read(_evidence.EAR_STREAMS)
    if evidence is not None:
        rows = markdown(
            tables.ear_worth_head(evidence), tables.ear_worth_rows(evidence, report["figures"])
        )
        text = tables.ear_worth_text(evidence, report)
        sections.append((tables.EAR_WORTH_TITLE, [rows, "", text]))
    return sections


def _generation(report: Mapping[str, Any]) -> list[Section]:
    """Drawn pictures, as judged and as measured in the run."""
    tables, figures = _generation_tables, report["figures"]
    judged, why = _evidence.shipped_judgement()
    lines = ["The shipped EnergyAR.", ""]
    if judged is None:
        lines += [f"SKIPPED: {why}.", ""]
    else:
        lines += [
            markdown(tables.HEAD, tables.rows(judged, judged["ceiling"])),
            "",
            tables.judged_note(judged),
            "",
            markdown(tables.NEIGHBOUR_HEAD, tables.neighbour_rows(judged)),
            "",
            tables.NEIGHBOUR_NOTE,
            "",
        ]
    lines += [
        f"As measured in this run, of {figures['pictures']:,} pictures:",
        "",
        markdown(tables.HEAD, tables.rows(figures, figures["reference"]["ceiling"])),
        "",
        *(f"{note}  " for note in tables.generation_notes(figures)),
        "",
        origin(report, f"{figures['pictures']} pictures"),
    ]
    sections = [("Drawn pictures", lines)]
    for title, pattern in _evidence.HEAD_COMPARISONS.items():
        heads = _evidence.head_comparisons(pattern)
        if heads:
            rows = markdown(tables.HEADS_HEAD, tables.head_rows(heads))
            sections.append((title, [rows, "", tables.head_text(heads)]))
    return sections


def _quality(report: Mapping[str, Any]) -> list[Section]:
    """Sizes, latent and published tokenizers."""
    figures = report["figures"]
    crops = f"{figures['reference']['pictures']} crops"
    return [
        (
            "By size",
            [
                markdown(SIZE_HEAD, size_rows(figures["sizes"])),
                "",
                "; ".join(f"{row['side']}: {row['source']}" for row in figures["sizes"]) + ".",
                "",
                origin(report, "pictures as in the table"),
            ],
        ),
        ("The latent", [f"{latent_line(figures['latent'])}.", "", origin(report, crops)]),
        (
            "Beside published tokenizers",
            [markdown(TOKENIZER_HEAD, tokenizer_rows()), "", TOKENIZER_NOTE],
        ),
    ]


def _training() -> list[Section]:
    """The controlled training with and without hybrid, on record."""
    evidence = _evidence.read(_evidence.TRAINING)
    if evidence is None:
        return []
    lines = [
        markdown(training_head(evidence), training_rows(evidence)),
        "",
        training_text(evidence),
    ]
    return [("What the hybrid is worth", lines)]

"""What a full run's committed reports say in words, tables and pictures outside the HTML report.

README.md gets a summary between its marks, docs/figures.md every table, docs/experiments.md the
trials, docs/pictures the two pictures that the README shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from ci import _common as ci
from ci import _evidence, _stream_tables
from ci._distances import interval_note
from ci._figures import drawn_sample, restored_sample
from ci._figures_page import all_figures
from ci._markdown import markdown, told
from ci._tables import OURS, OURS_REFINED, TRIAL_HEAD, own_figures, trial_rows
from ci.fid_eval import shipped_facts
from ci.validate_results import milestone_rows
from parscale_ear import checkpoint
from parscale_ear.training.marks import between_marks

README = ci.ROOT / "README.md"
FIGURES = ci.ROOT / "docs" / "figures.md"
EXPERIMENTS = ci.ROOT / "docs" / "experiments.md"
PICTURES = {  # below docs/pictures
    "restored.png": restored_sample,
    "drawn.png": drawn_sample,
}
PICTURE_FOLDER = ci.ROOT / "docs" / "pictures"
GLOSSARY = (
    "The eager twin is a plain implementation of the same VAR, FP32 weights under autocast in the dtype that is timed; t(P) the time of "
    "P streams; tokens, a generation without its decoder; the roof, what the hardware did at its best in the same "
    "run; trained alike, by the same recipe, the hybrid's variants for as many steps, the heads for as many minutes. "
    "Brackets hold 95 % intervals, over scenes, pictures or trainings; docs/figures.md says which and how."
)
BEGIN, END = "<!-- figures: written by ci/report.py -->", "<!-- /figures -->"


def summary(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The README's figures: what is measured of each part, the missed targets, the prototype's."""
    milestones = milestone_rows(reports)
    count = Counter(status for *_, status, _ in milestones)
    rows = [
        (target, value, limit, f"SKIPPED: {why}" if status == "SKIPPED" else why)
        for _, target, value, limit, status, why in milestones
        if status != "PASS"
    ]
    return "\n".join(
        [
            markdown(("what", "figure", "measured"), _glance(reports)),
            "",
            f"**Milestones**: {count['PASS']} passed, {count['MISSED']} missed, {count['SKIPPED']} "
            "SKIPPED; among them what is on record (the model cards' figures, trainings and judgements), which "
            "a run reads and does not measure. Those that did not pass:",
            "",
            markdown(("target", "value", "limit", "why"), rows),
            "",
            GLOSSARY,
            "",
            "**The prototype's figures**, which this project was built to replace, beside ours: "
            f"{_model(reports['streams']['figures'])}, {told(reports['streams'], 'one label')}, a whole "
            "generation in one pass.",
            "",
            markdown(
                ("", *_stream_tables.PROTOTYPE_HEAD[1:]),
                _prototype_rows(reports["streams"]["figures"]),
            ),
            "",
            _stream_tables.PROTOTYPE_NOTE,
        ]
    )


def _model(figures: Mapping[str, Any]) -> str:
    return f"{figures['model']} with {'trained' if figures['trained'] else 'random'} weights"


def _glance(reports: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """One line for each thing that a user would ask first."""
    latency, fid, streams, generation = (
        reports[name] for name in ("latency", "fid", "streams", "generation")
    )
    own, facts = own_figures(), shipped_facts()
    ours, refined = own[OURS], own[OURS_REFINED]
    sharp, lowered = facts["sharp"], 1 - facts["sharp"]["distance"] / facts["faithful"]["distance"]
    card = f"model card: {ours['pictures']} photographs, on which recipes were chosen; float32"
    nearer = fid["figures"]["differences"]["sharp"]["relative_distance"]
    variants, reference = fid["figures"]["variants"], fid["figures"]["reference"]
    crops = told(fid, f"{reference['pictures']} crops of {reference['scenes']} scenes")
    single = latency["figures"]["batches"][0]
    compared = latency["figures"]["against_autoencoder_tiny"]
    cases = {row["name"]: row for row in streams["figures"]["cases"]}
    rows = [
        (
            "size",
            f"{ours['parameters_m']:.2f} M parameters, {ours['gflop']:.1f} GFLOP",
            "256×256, there and back",
        ),
        (
            "faithful decoder",
            f"PSNR {ours['psnr_db']:.2f} dB, SSIM {ours['ssim']:.3f}",
            card,
        ),
        (
            "faithful decoder, latents refined once",
            f"PSNR {refined['psnr_db']:.2f} dB, SSIM {refined['ssim']:.3f}; {refined['gflop']:.1f} GFLOP, of which "
            "decoding takes what it did",
            card,
        ),
        (
            "sharp decoder",
            f"PSNR {sharp['psnr_db']:.2f} dB, SSIM {sharp['ssim']:.3f}; {sharp['distance_name']} {lowered:.0%} "
            "below the faithful one's",
            card,
        ),
        (
            "other photographs",
            "; ".join(
                f"{name}: PSNR {row['psnr_db']['value']:.2f} dB, SSIM {row['ssim']['value']:.3f}"
                for name, row in (
                    ("faithful", variants["hybrid"]),
                    ("refined once", variants["refined once"]),
                    ("sharp", variants["sharp"]),
                )
            )
            + f", {fid['figures']['distance_name']} {-nearer['value']:.0%} [{-nearer['high']:.0%}, "
            f"{-nearer['low']:.0%}] below the faithful one's",
            f"{crops}; {interval_note(reference)}; these crops were also looked at while the sharp decoder's "
            "recipe was chosen",
        ),
        (
            "latency",
            f"{single['mean_ms_per_image']:.1f} ms an image (mean), P99 {single['p99_ms_per_image']:.1f}; "
            f"{single['fraction_of_compute_roof']:.0%} of what the hardware can do",
            told(
                latency,
                f"256×256, batch {single['batch_size']}, {latency['settings']['num_runs']} runs",
            ),
        ),
    ]
    if compared is not None:
        rows.append(
            (
                "against diffusers' `AutoencoderTiny`",
                f"{compared['ratio_p50']:.1f}× faster",
                f"the same run on the CPU ({compared['device']}), {compared['dtype']}, 256×256, batch "
                f"{compared['batch_size']}, median of {compared['num_runs']} runs in turn",
            )
        )
    figures = generation["figures"]
    judged, why = _evidence.shipped_judgement()
    if judged is None:
        rows.append(("drawn pictures", f"SKIPPED: {why}", ""))
    else:
        own, real = judged["class_accuracy"]["value"], judged["ceiling"]["class_accuracy"]["value"]
        rows.append(
            (
                "drawn pictures",
                f"{own:.1%} in their own class of ten (real ones {real:.1%}); "
                f"{judged['distance_name']} {judged['distance']['value']:.1f} (real ones "
                f"{judged['ceiling']['distance']:.1f})",
                told(
                    judged, f"{figures['side']}×{figures['side']}, {judged['pictures']:,} pictures"
                )
                + "; a classifier took part in their training, the "
                "judge chose guidance and temperature, and the real ones' distance is of pictures that the "
                "decoder was trained on",
            )
        )
    rows.append(
        (
            "a drawn picture",
            f"{figures['passes']} passes, {1000 * figures['single_picture_s']:.0f} ms alone "
            f"(median of {figures['single_picture_calls']} calls), {1000 * figures['picture_s']:.1f} ms in batches of "
            f"{figures['batch_size']}",
            told(
                generation, f"{figures['side']}×{figures['side']}, {figures['pictures']} pictures"
            ),
        )
    )
    if {"P = 4", "P = 4, aggregate"} <= cases.keys():
        rows.append(
            (
                f"4 streams of {_model(streams['figures'])} in one pass",
                f"{cases['P = 4']['median_s']:.1f} s for four pictures (four calls: "
                f"{cases['P = 4']['sequential_s']:.1f} s), {cases['P = 4, aggregate']['median_s']:.1f} s for one "
                f"from all four (one stream: {cases['P = 1']['median_s']:.1f} s)",
                told(
                    streams,
                    f"256×256, median of {streams['settings']['num_runs']} rounds in turn; the four calls once",
                ),
            )
        )
    if latency["device_type"] != "cuda":
        rows.append(("on a GPU", "**not measured yet**", ""))
    return rows


def _prototype_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The prototype's two tables, and ours of a run."""
    cases = {row["streams"]: row for row in figures["cases"] if row["mode"] == "diverse"}
    ours = [cases.get(count) for count in _stream_tables.PROTOTYPE_STREAMS]
    times = ("" if row is None else f"{1000 * row['median_s']:,.0f} ms" for row in ours)
    peaks = (
        "" if row is None or row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB"
        for row in ours
    )
    return [
        *(("prototype: " + name, *values) for name, *values in _stream_tables.PROTOTYPE_ROWS),
        ("ours: latency", *times),
        ("ours: peak memory", *peaks),
    ]


def write_documents(reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the figures of README.md, docs/figures.md, docs/experiments.md and docs/pictures.

    Raises:
        ValueError: a document lacks its marks.
    """
    readme = with_summary(README.read_text(encoding="utf-8"), reports)
    figures = with_figures(FIGURES.read_text(encoding="utf-8"), reports)
    experiments = with_trials(EXPERIMENTS.read_text(encoding="utf-8"))
    for path, text in ((README, readme), (FIGURES, figures), (EXPERIMENTS, experiments)):
        checkpoint.write_text(path, text)
    PICTURE_FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        with checkpoint.atomic_path(PICTURE_FOLDER / name) as temporary:
            temporary.write_bytes(draw(torch.device("cpu")))


def with_summary(text: str, reports: Mapping[str, Mapping[str, Any]]) -> str:
    """A README's text with its figures replaced."""
    return between_marks(text, BEGIN, END, summary(reports), "the README")


def with_figures(text: str, reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of docs/figures.md with its figures replaced."""
    return between_marks(text, BEGIN, END, all_figures(reports), "docs/figures.md")


def with_trials(text: str) -> str:
    """The experiments' text with the tables of trials replaced."""
    trials = _evidence.read(_evidence.TRIALS)
    if trials is None:
        raise ci.UsageError(f"{_evidence.TRIALS.name} is missing; git checkout it")
    content = "\n\n".join(
        f"**{part['title']}**\n\n{markdown(TRIAL_HEAD, trial_rows(part))}\n\n{part['conditions']}"
        for part in trials["sets"]
    )
    return between_marks(text, BEGIN, END, content, "docs/experiments.md")

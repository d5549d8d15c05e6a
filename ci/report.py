"""Turns the reports of a run into results/report.html, and README and docs from docs/results.

``--keep`` copies a full run's reports to docs/results; ``--readme`` writes the figures of README
and docs from there, and the README's pictures. Both are for maintainers, after a run that is to be
published.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ci import _common as ci
from ci import _evidence, _generation_tables, _stream_tables
from ci._distances import distance_head, distance_rows, interval_note
from ci._figures import (
    ablation_plot,
    data_url,
    drawn_grid,
    latency_plot,
    picture_grid,
    streams_plot,
    tokenizer_plot,
    training_plot,
    worth_plot,
)
from ci._quality import SIZE_HEAD, latent_line, size_rows
from ci._readme import write_documents
from ci._tables import (
    DECODERS,
    LATENCY_HEAD,
    SWITCHED,
    TOKENIZER_HEAD,
    TOKENIZER_NOTE,
    TRIAL_HEAD,
    latency_rows,
    own_figures,
    tokenizer_rows,
    training_head,
    training_rows,
    training_text,
    trial_rows,
)
from ci.validate_results import (
    REPORTS,
    find_problems,
    judge,
    milestone_rows,
    read_reports,
    unlike_full,
)
from parscale_ear import checkpoint
from parscale_ear.training.ear_release import EVIDENCE_FILE, NEIGHBOURS_FILE

KEPT = ci.EVIDENCE
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       color: #1c1e21; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid #ddd; vertical-align: top }
.PASS { color: #146c2e; font-weight: 600 } .MISSED { color: #b3261e; font-weight: 600 }
.SKIPPED { color: #7a5a00; font-weight: 600 }
.verdict { font-size: 1.3rem } .note { background: #fff6db; padding: .5rem .8rem; border-radius: 4px }
img { max-width: 100%; height: auto } .scroll { overflow-x: auto }
pre { background: #f4f5f7; padding: .8rem; overflow-x: auto; border-radius: 4px }
figcaption { color: #555 } figure { margin: 1.5rem 0 }
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cell(text: str, tag: str) -> str:
        name = f' class="{text}"' if text in ("PASS", "MISSED", "SKIPPED") else ""
        return f"<{tag}{name}>{html.escape(text)}</{tag}>"

    lines = ["".join(cell(text, "th") for text in head)]
    lines += ["".join(cell(text, "td") for text in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{body}</table></div>'


def build_html(
    reports: Mapping[str, Mapping[str, Any]],
    problems: Sequence[str],
    device: torch.device,
    neighbours: bytes | None = None,
) -> str:
    """The whole report as one self-contained HTML file.

    Args:
        reports: of the run.
        problems: why they do not belong together.
        device: that pictures are drawn on.
        neighbours: PNG of drawn pictures beside their nearest training pictures, where the
            training pictures are at hand; they are not ours to pass on.
    """
    words = {ci.PASSED: "PASS", ci.MISSED: "MISSED", ci.WRONG: "UNUSABLE"}
    verdict = words[judge(reports, problems)]
    parts = [
        '<p class="verdict">Verdict: ' + f'<span class="{verdict}">{verdict}</span></p>',
        *(f'<p class="note">{html.escape(problem)}</p>' for problem in problems),
        _table(("milestone", "target", "value", "limit", "status", ""), milestone_rows(reports)),
    ]
    first = next(iter(reports.values()), None)
    if first is not None:
        weights = ", ".join(f"{k} {v[:12]}" for k, v in first["weights_sha256"].items())
        pairs = [
            ("date", first["date"]),
            ("device", f"{first['device']}, {first['threads']} threads"),
            ("versions", f"parscale_ear {first['version']}, torch {first['torch']}"),
            ("source", first["source_sha256"][:12]),
            ("weights", weights),
            ("run", _extent(reports)),
        ]
        parts.append("<h2>Where this was measured</h2>" + _table(("", ""), pairs))
    parts.append("<h2>Pictures</h2>")
    caption = (
        "Original, faithful decoder, sharp decoder, and the faithful one's difference from the "
        "original ×5 (grey: none), at 1:1. Crops of photographs out of the wheels of scikit-image "
        "and matplotlib."
    )
    parts.append(_figure(picture_grid(device), caption))
    parts += _tokenizers()
    if "latency" in reports:
        parts += _latency(reports["latency"])
    for name, title, variants in (
        ("fid", "M2-3 distance to the originals", DECODERS),
        ("ablation", "M3-1 ablation", SWITCHED),
    ):
        if name in reports:
            parts += _distances(reports[name], title, variants)
    if "ablation" in reports:
        parts.append(
            _figure(
                ablation_plot(reports["ablation"]["figures"]),
                "What switching a branch off in the trained model changes, with the intervals of the "
                "table. It shows whether a branch is used, not what it is worth.",
            )
        )
    if "streams" in reports:
        parts += _streams(reports["streams"])
    if "generation" in reports:
        parts += _generation(reports["generation"], device, neighbours)
    parts += [*_training(), *_trials()]
    parts.append(
        "<h2>How to repeat it</h2><pre>bash ci/run.sh\n"
        "CI_NUM_RUNS=100 CI_FID_SAMPLES=280 REF_DIR=/your/photographs bash ci/run.sh</pre>"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ParScale-EAR validation</title><style>{STYLE}</style></head><body>"
        f"<h1>ParScale-EAR validation</h1>{''.join(parts)}</body></html>\n"
    )


def _figure(png: bytes, caption: str) -> str:
    return (
        f'<figure><div class="scroll"><img alt="{html.escape(caption)}" src="{data_url(png)}"></div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _tokenizers() -> list[str]:
    return [
        "<h2>Beside published tokenizers</h2>",
        _table(TOKENIZER_HEAD, tokenizer_rows()),
        f'<p class="note">{html.escape(TOKENIZER_NOTE)}</p>',
        _figure(tokenizer_plot(own_figures()), "Parameters and FLOPs against PSNR; see the note."),
    ]


def _training() -> list[str]:
    evidence = _evidence.read(_evidence.TRAINING)
    title = "<h2>What the hybrid is worth: trained with and without it</h2>"
    if evidence is None:
        return [title, "<p>SKIPPED: no controlled training on record.</p>"]
    return [
        title,
        _table(training_head(evidence), training_rows(evidence)),
        f"<p>{html.escape(training_text(evidence))}</p>",
        _figure(training_plot(evidence["variants"]), "Difference to the hybrid; below 0: worse."),
    ]


def _trials() -> list[str]:
    trials = _evidence.read(_evidence.TRIALS)
    if trials is None:
        return []
    parts = ["<h2>Trials on the way</h2>"]
    for part in trials["sets"]:
        parts += [
            f"<h3>{html.escape(part['title'])}</h3>",
            _table(TRIAL_HEAD, trial_rows(part)),
            f"<p>{html.escape(part['conditions'])}</p>",
        ]
    return parts


def _latency(report: Mapping[str, Any]) -> list[str]:
    figures = report["figures"]
    roof = figures["roof"]
    text = (
        f"Milliseconds per 256×256 image, {report['dtype']}, {report['settings']['num_runs']} runs, "
        f"{figures['gflop_per_image']:.2f} GFLOP an image. Roof measured in the same run: "
        f"{roof['flops_per_s'] / 1e9:.0f} GFLOP/s, {roof['bytes_per_s'] / 1e9:.1f} GB/s."
    )
    compared = figures["against_autoencoder_tiny"]
    if compared is not None:
        text += (
            f" On the CPU, {compared['device']}, diffusers' AutoencoderTiny "
            f"({compared['autoencoder_tiny_layout']}, its faster layout) "
            f"took {compared['autoencoder_tiny_p50_ms_per_image']:.0f} ms an image beside {compared['parscale_ear_p50_ms_per_image']:.1f} ms of ours in "
            f"plain FP32 at batch {compared['batch_size']}, timed in turn: "
            f"{compared['ratio_p50']:.1f} times faster."
        )
    return [
        "<h2>M2-2 latency</h2>",
        _table(LATENCY_HEAD, latency_rows(figures)),
        f"<p>{html.escape(text)}</p>",
        _figure(latency_plot(figures), "Milliseconds per image against batch size."),
    ]


def _streams(report: Mapping[str, Any]) -> list[str]:
    figures = report["figures"]
    text = (
        f"{figures['model']}, one label at {figures['side']}×{figures['side']}, guidance {report['settings']['guidance']}, "
        f"{report['dtype']}{', packed weights' if figures['packed'] else ''}, medians of "
        f'{report["settings"]["num_runs"]} rounds in which all cases took turns. "s": a whole '
        'generation with its decoder; "tokens": without the decoder.'
    )
    return [
        "<h2>M2-4 parallel streams</h2>",
        _table(_stream_tables.stream_head(), _stream_tables.stream_rows(figures)),
        f"<p>{html.escape(text)}</p>",
        *(
            f'<p class="note">{html.escape(note)}</p>'
            for note in _stream_tables.stream_notes(figures)
        ),
        f"<h3>{_stream_tables.SCALES_TITLE}</h3>",
        _table(_stream_tables.scale_head(figures), _stream_tables.scale_rows(figures)),
        _figure(
            streams_plot(figures), "Tokens of a generation by scale, and the roof of this machine."
        ),
        f"<p>{html.escape(_stream_tables.trained_note(figures))}</p>",
        _table(_stream_tables.TRAINED_HEAD, _stream_tables.trained_rows(figures)),
        _table(_stream_tables.PROTOTYPE_HEAD, _stream_tables.PROTOTYPE_ROWS),
        f"<p>{html.escape(_stream_tables.PROTOTYPE_NOTE)}</p>",
        *_worth(report),
    ]


def _generation(
    report: Mapping[str, Any], device: torch.device, neighbours: bytes | None
) -> list[str]:
    figures = report["figures"]
    tables = _generation_tables
    names = ", ".join(figures["class_accuracy_by_class"])
    ceiling = figures["reference"]["ceiling"]
    parts = [
        "<h2>M3-2 drawn pictures</h2>",
        _figure(drawn_grid(device), f"A row a class, the first of seed 0, none chosen: {names}."),
        _table(tables.HEAD, tables.rows(figures, ceiling)),
        *(f"<p>{html.escape(note)}</p>" for note in tables.generation_notes(figures)),
        _table(tables.CLASS_HEAD, tables.class_rows(figures)),
        "<h3>Judged on more pictures, on record</h3>",
    ]
    judged, why = _evidence.shipped_judgement()
    if judged is None:
        return [*parts, f"<p>SKIPPED: {why}.</p>", *_heads()]
    return [
        *parts,
        _table(tables.HEAD, tables.rows(judged, judged["ceiling"])),
        f'<p class="note">{html.escape(tables.judged_note(judged))}</p>',
        _table(tables.NEIGHBOUR_HEAD, tables.neighbour_rows(judged)),
        f"<p>{html.escape(tables.NEIGHBOUR_NOTE)}</p>",
        "<p>SKIPPED: the training pictures are not at hand; parscale_ear.training.ear_release "
        "--evidence results shows them here.</p>"
        if neighbours is None
        else _figure(neighbours, "Drawn pictures, each beside its nearest training picture."),
        *_heads(),
    ]


def _heads() -> list[str]:
    tables, parts = _generation_tables, []
    for title, pattern in _evidence.HEAD_COMPARISONS.items():
        evidence = _evidence.head_comparisons(pattern)
        parts.append(f"<h3>{title}</h3>")
        if not evidence:
            parts.append("<p>SKIPPED: no such training of heads on record.</p>")
        else:
            parts += [
                _table(tables.HEADS_HEAD, tables.head_rows(evidence)),
                f"<p>{html.escape(tables.head_text(evidence))}</p>",
            ]
    return parts


def _worth(report: Mapping[str, Any]) -> list[str]:
    tables, skipped = _stream_tables, "<p>SKIPPED: no training of streams on record.</p>"
    parts = [f"<h3>{tables.WORTH_TITLE}</h3>"]
    evidence = _evidence.read(_evidence.STREAMS)
    if evidence is None:
        parts.append(skipped)
    else:
        parts += [
            _table(tables.WORTH_HEAD, tables.worth_rows(evidence)),
            f"<p>{html.escape(tables.worth_text(evidence))}</p>",
            _figure(
                worth_plot(evidence["counts"], evidence["minus_first"], "nats a token"),
                "Validation loss less that of one stream; below 0: better.",
            ),
        ]
    parts.append(f"<h3>{tables.EAR_WORTH_TITLE}</h3>")
    evidence = _evidence.read(_evidence.EAR_STREAMS)
    if evidence is None:
        return [*parts, skipped]
    distances = [row["distance_minus_first"] for row in evidence["judged"]]
    return [
        *parts,
        _table(tables.ear_worth_head(evidence), tables.ear_worth_rows(evidence, report["figures"])),
        f"<p>{html.escape(tables.ear_worth_text(evidence, report))}</p>",
        _figure(
            worth_plot(evidence["counts"], evidence["minus_first"], "energy score"),
            "Validation energy score less that of one stream; below 0: better.",
        ),
        _figure(
            worth_plot(evidence["counts"], distances, evidence["distance_name"]),
            "Distance to the validation pictures less that of one stream; below 0: better.",
        ),
    ]


def _distances(report: Mapping[str, Any], title: str, variants: str) -> list[str]:
    figures = report["figures"]
    reference = figures["reference"]
    notes = [reference["warning"], figures["features_note"]]
    more = []
    if "sizes" in figures:
        sources = ", ".join(f"{row['side']}: {row['source']}" for row in figures["sizes"])
        more = [
            "<h3>By size</h3>",
            _table(SIZE_HEAD, size_rows(figures["sizes"])),
            f"<p>{html.escape(sources)}.</p>",
            f"<h3>The latent</h3><p>{html.escape(latent_line(figures['latent']))}.</p>",
        ]
    return [
        f"<h2>{html.escape(title)}</h2>",
        f"<p>{html.escape(variants)}</p>",
        _table(distance_head(figures), distance_rows(figures)),
        f"<p>{interval_note(reference)}; {html.escape(reference['source'])}. Two halves of the originals are "
        f"{figures['reference_distance']:.1f} apart.</p>",
        *(f'<p class="note">{html.escape(note)}</p>' for note in notes if note),
        *more,
    ]


def _extent(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """How much of a full run was measured."""
    if any(report["quick"] for report in reports.values()):
        return "quick: fewer samples, fewer verdicts"
    if unlike := unlike_full(reports):
        return f"other than a full run: {'; '.join(unlike)}"
    return "full"


def keep(reports: Mapping[str, Mapping[str, Any]], problems: Sequence[str], folder: Path) -> None:
    """Copies a full run's reports to docs/results.

    Raises:
        UsageError: the reports are unusable, or of less than a full run.
    """
    if problems:
        raise ci.UsageError(f"not kept: {problems[0]}")
    if any(report["quick"] for report in reports.values()):
        raise ci.UsageError("not kept: a --quick run is not for publishing; run bash ci/run.sh")
    if unlike := unlike_full(reports):
        raise ci.UsageError(f"not kept: other than a full run ({'; '.join(unlike)})")
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in REPORTS:
        text = (folder / f"{name}.json").read_text(encoding="utf-8")
        checkpoint.write_text(KEPT / f"{name}.json", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = ci.parser((__doc__ or "").split("\n\n")[0], "report.html")
    ci.add_results_option(parser)
    parser.add_argument("--keep", action="store_true", help="copy the reports to docs/results")
    parser.add_argument(
        "--readme",
        action="store_true",
        help="write the figures of README.md and docs/, and docs/pictures, from docs/results",
    )
    arguments = parser.parse_args(argv)
    reports, problems = read_reports(arguments.results)
    if not reports and not arguments.readme:
        raise ci.UsageError(f"no reports in {arguments.results}; run bash ci/run.sh first")
    problems += find_problems(reports, source=ci.source_digest(), weights=ci.weights_digest())
    if arguments.keep:
        keep(reports, problems, arguments.results)
        print(f"kept in {KEPT.relative_to(ci.ROOT)}")
    if arguments.readme:
        kept, missing = read_reports(KEPT)
        missing += find_problems(kept, evidence=ci.evidence_digest(), weights=ci.weights_digest())
        missing += unlike_full(kept)
        if missing:
            raise ci.UsageError(f"not written: in docs/results: {missing[0]}")
        write_documents(kept)
        print("wrote the figures of README.md and docs/, and docs/pictures")
        if not reports:
            return ci.PASSED
    path = arguments.results / NEIGHBOURS_FILE
    judged, _ = _evidence.shipped_judgement(arguments.results / EVIDENCE_FILE)  # beside them
    neighbours = path.read_bytes() if path.is_file() and judged is not None else None
    page = build_html(reports, problems, ci.resolve_device(arguments.device), neighbours)
    output = arguments.output or arguments.results / "report.html"
    checkpoint.write_text(output, page)
    print(f"wrote {output} ({len(page) / 2**20:.1f} MiB)")
    for problem in problems:
        print(f"problem: {problem}")
    print(json.dumps({"report": str(output), "problems": problems}))
    return ci.WRONG if problems else ci.PASSED


if __name__ == "__main__":
    sys.exit(ci.run(main))

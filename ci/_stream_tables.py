"""Tables of the parallel streams, for the terminal, the report and docs/figures.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ci import _common as ci
from ci import _evidence
from ci._markdown import told

SCALES_TITLE = "Milliseconds by scale"
# What the prototype's documents printed. Its hardware is not stated there; its streams were calls
# in a loop, its baseline a constant in the source.
PROTOTYPE_STREAMS = (1, 2, 4)
PROTOTYPE_HEAD = ("the prototype printed", *(f"P = {count}" for count in PROTOTYPE_STREAMS))
PROTOTYPE_ROWS = [
    ("latency, first table", '282.6 ms ("baseline")', "265.2 ms", ""),
    ("latency, second table", "400 ms", "800 ms", "1600 ms"),
    ("memory, second table", "2 GB", "4 GB", "8 GB"),
]
PROTOTYPE_NOTE = (
    "The prototype's hardware is not stated, its second table is a loop over single calls, and the "
    "first one's baseline was a constant in the source; no claim is made across hardware."
)


def stream_head() -> tuple[str, ...]:
    """Columns of the table of cases."""
    return (
        *("", "s", "tokens s", "least–most s", "P·t(1)/t(P)", "peak MiB", "above model MiB"),
        *("cache MiB", "diversity", "pixel cosine", "roof s", "H100 roof s (computed)"),
    )


def stream_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of cases."""

    def mib(value: float | None) -> str:
        return "" if value is None else f"{value / 2**20:,.0f}"

    rows = []
    for row in figures["cases"]:
        above = None if row["peak_bytes"] is None else row["peak_bytes"] - row["loaded_bytes"]
        rows.append(
            (
                row["name"],
                f"{row['median_s']:.2f}",
                f"{row['tokens_s']:.2f}",
                f"{row['least_s']:.2f}–{row['most_s']:.2f}",
                f"{row['efficiency']:.2f}",
                mib(row["peak_bytes"]),
                mib(above),
                mib(row["cache_bytes"]),
                ci.number(row["diversity"]),
                ci.number(row["pixel_cosine"]),
                f"{row['roof_s']:.2f}",
                f"{row['h100_roof_s_computed']:.4f}",
            )
        )
    return rows


TRAINED_HEAD = (
    *("", "s", "P calls s", "P·t(1)/t(P)", "cache MiB", "diversity", "of P calls", "pixel cosine"),
)


def trained_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Plain streams of the shipped EnergyAR."""
    return [
        (
            f"P = {row['streams']}",
            f"{row['median_s']:.3f}",
            f"{row['sequential_s']:.3f}",
            f"{row['efficiency']:.2f}",
            f"{row['cache_bytes'] / 2**20:.2f}",
            ci.number(row["diversity"]),
            ci.number(row["diversity_of_calls"]),
            ci.number(row["pixel_cosine"]),
        )
        for row in figures["trained_model"]["cases"]
    ]


def trained_note(figures: Mapping[str, Any]) -> str:
    """What the table of the trained model shows."""
    trained = figures["trained_model"]
    most = trained["cases"][-1]["streams"]
    by_guidance = sorted((float(k), v) for k, v in trained["diversity_by_guidance"].items())
    guided = ", ".join(f"{value:g}: {ci.number(found)}" for value, found in by_guidance)
    return (
        f"{trained['model']}, trained, {trained['side']}×{trained['side']}, guidance "
        f"{trained['settings']['guidance']:g}, FP32: P pictures of one label in one pass, with their "
        f"decoding; diversity over all {trained['classes']} classes: the mean distance of two pictures of a "
        f"label in features of {figures['features']}, of no unit, to be compared within one network alone; "
        "pixel cosine: of their pixels, centred at grey. At "
        f"P = {most} by guidance: {guided}."
    )


def stream_notes(figures: Mapping[str, Any]) -> list[str]:
    """Lines under the table of cases."""
    roof, h100 = figures["roof"], figures["h100_assumed"]
    rows = figures["cases"]
    kinds = "; ".join(f"{row['name']}: {row['kind']}" for row in rows if row["streams"] > 1)
    calls = ", ".join(
        f"P = {row['streams']}: {row['sequential_s']:.2f} s" for row in rows if row["sequential_s"]
    )
    flags = "; ".join(f"{flag['rule']}: {flag['why']}" for flag in figures["red_flags"])
    return [
        *([f"{figures['model']}: {figures['note']}."] if figures["note"] else []),
        f"P calls of one stream, one after the other, in the same run: {calls}; the eager twin's "
        f"tokens: {figures['twin_tokens_s']:.2f} s in the rounds of all cases; over {figures['twin_rounds']} "
        f"rounds of it and one stream, these among them, it took {figures['twin_ratio']:.2f} times as long (median).",
        f"Roof: the least time for the tokens at {roof['flops_per_s'] / 1e9:.0f} GFLOP/s and "
        f"{roof['bytes_per_s'] / 1e9:.1f} GB/s, measured in this run. The H100 column is computed "
        f"from the same FLOPs and bytes with {h100['flops_per_s'] / 1e12:.0f} TFLOP/s and "
        f"{h100['bytes_per_s'] / 1e12:.2f} TB/s of the data sheet, at full use: nothing of it was "
        "measured.",
        _inception_line(figures),
        f"Streams: {kinds}.",
        f"Red flags: {flags or 'none'}.",
    ]


def scale_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Milliseconds of every scale, a row a case."""
    return [
        (row["name"], *(f"{1000 * seconds:.0f}" for seconds in row["scale_s"]))
        for row in figures["cases"]
    ]


def scale_head(figures: Mapping[str, Any]) -> tuple[str, ...]:
    """Columns of :func:`scale_rows`."""
    return ("", *(str(k + 1) for k in range(len(figures["cases"][0]["scale_s"]))))


WORTH_TITLE = "What P streams that draw one picture together are worth: VAR"
WORTH_HEAD = ("streams", "steps of training", "validation loss, nats a token", "minus one stream")


def worth_rows(evidence: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the trained streams' validation loss."""
    columns = zip(
        *(evidence[key] for key in ("counts", "steps", "each", "minus_first")), strict=True
    )
    return [
        (
            str(count),
            f"{steps:,}" if steps else "none: nothing to train",
            f"{each['value']:.4f}",
            "" if count == 1 else ci.interval(minus, 4),
        )
        for count, steps, each, minus in columns
    ]


def worth_text(evidence: Mapping[str, Any]) -> str:
    """How the streams were trained, and the slopes."""
    slopes = [f"over all: {ci.interval(evidence['slope_per_doubling'], 4)}"]
    if evidence["slope_from_two_streams"] is not None:
        slopes.append(f"from two on: {ci.interval(evidence['slope_from_two_streams'], 4)}")
    total = evidence["parameters"]["transformer"]
    return (
        f"{evidence['model']} ({total / 1e6:.1f} M parameters), trained on "
        f"{' and '.join(evidence['images'])} at {evidence['side']}×{evidence['side']} and then "
        f"frozen; {evidence['prefix_tokens']} prefix tokens a layer and stream, batches of "
        f"{evidence['batch']}, one seed; {evidence['pictures']:,} pictures of "
        f"{' and '.join(evidence['validation'])}. Slope a doubling of the streams, nats a token, "
        f"{'; '.join(slopes)}. Intervals: 95 %, bootstrap over pictures. On record: {told(evidence)}."
    )


EAR_WORTH_TITLE = "What P streams that draw one picture together are worth: EnergyAR"


def ear_worth_head(evidence: Mapping[str, Any]) -> tuple[str, ...]:
    """Columns of :func:`ear_worth_rows`."""
    difference = f"minus P = {evidence['counts'][0]}"
    return (
        *("streams", "steps of training", "validation energy score", difference),
        *(evidence["distance_name"], difference, "in their own class", "s a picture", "cache MiB"),
        "above model MiB",
    )


def _above(row: Mapping[str, Any]) -> str:
    """MiB that a generation takes at its peak above the loaded model."""
    if row["peak_bytes"] is None:
        return ""
    return f"{(row['peak_bytes'] - row['loaded_bytes']) / 2**20:.1f}"


def ear_worth_rows(
    evidence: Mapping[str, Any], figures: Mapping[str, Any] | None
) -> list[tuple[str, ...]]:
    """Score, pictures and cost by number of streams.

    Args:
        evidence: what the trainings gave.
        figures: of M2-4, for time and memory; None: not measured in this run.
    """
    costs = (
        {row["streams"]: row for row in figures["trained_model"]["aggregate"]} if figures else {}
    )
    rows = []
    for k, count in enumerate(evidence["counts"]):
        judged, cost = evidence["judged"][k], costs.get(count)
        rows.append(
            (
                str(count),
                f"{evidence['steps'][k]:,}",
                ci.interval(evidence["each"][k], 4, sign=""),
                ci.interval(evidence["minus_first"][k], 4) if k else "",
                ci.interval(judged["distance"], 1, sign=""),
                ci.interval(judged["distance_minus_first"], 1) if k else "",
                f"{judged['class_accuracy']['value']:.1%}",
                f"{cost['median_s']:.3f}" if cost else "",
                f"{cost['cache_bytes'] / 2**20:.2f}" if cost else "",
                _above(cost) if cost else "",
            )
        )
    return rows


def ear_worth_text(evidence: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    """How the streams were trained, the slopes, and the verdict.

    Args:
        evidence: what the trainings gave.
        report: of M2-4, for time and memory; None: not measured in this run.
    """
    settings = evidence["settings"]
    figures, cost = None, ""
    if report is not None:
        figures = report["figures"]
        where = told(
            {**report, "dtype": "float32"}, f"{report['settings']['num_runs']} rounds in turn"
        )
        cost = (
            " Seconds and memory are of this run: the shipped generator with untrained streams of the "
            f"same size, guidance {figures['trained_model']['settings']['guidance']:g}; {where}."
        )
    return (
        f"{evidence['model']} ({evidence['parameters']['total'] / 1e6:.1f} M parameters), the "
        f"generator {evidence['backbone']}, from the same weights (docs/experiments.md says "
        f"which), each number of streams for as "
        f"many steps of {evidence['batch']} latents; {evidence['prefix_tokens']} prefix tokens a "
        f"layer and stream, one seed. Energy score of {evidence['pictures']:,} validation latents; "
        f"{evidence['judged_pictures']:,} pictures drawn at guidance {settings['guidance']:g}, "
        f"temperature {settings['temperature']:g} (the same for all, chosen on training pictures) "
        f"and judged by {evidence['judge']}. Slope a doubling of the streams: energy score "
        f"{ci.interval(evidence['slope_per_doubling'], 4)}, {evidence['distance_name']} "
        f"{ci.interval(evidence['distance_slope_per_doubling'], 1)}. Intervals: 95 %, "
        f"of the scores a bootstrap over pictures, of distances: {_evidence.interval_method(evidence)}. On record: {', '.join(evidence['data'])}; "
        f"{told(evidence)}.{cost} {_ear_verdict(evidence, figures)}"
    )


def _ear_verdict(evidence: Mapping[str, Any], figures: Mapping[str, Any] | None) -> str:
    """What the most streams buy, and what they cost."""

    def change(row: Mapping[str, float], name: str, digits: int) -> str:
        if row["high"] < 0:
            word = "lower"
        elif row["low"] > 0:
            word = "higher"
        else:
            return f"{name} cannot be told from one stream's"
        return f"{name} is {word} by {abs(row['value']):.{digits}f}"

    most = evidence["counts"][-1]
    found = (
        f"Verdict: with P = {most} the {change(evidence['minus_first'][-1], 'energy score', 4)} and "
        f"the {change(evidence['judged'][-1]['distance_minus_first'], evidence['distance_name'], 1)}"
    )
    if figures is None:
        return f"{found}; what it costs was not measured in this run."
    costs = {row["streams"]: row for row in figures["trained_model"]["aggregate"]}
    if most not in costs or 1 not in costs:
        return f"{found}; what it costs was not measured in this run."
    time, memory = (costs[most][key] / costs[1][key] for key in ("median_s", "cache_bytes"))
    return (
        f"{found} (one training each; the intervals are over pictures); a picture takes {time:.1f} times "
        f"the time and {memory:.1f} times the cache."
    )


def _inception_line(figures: Mapping[str, Any]) -> str:
    scores, why = figures["inception_score"], figures["inception_why"]
    if scores is None:
        return f"Inception Score: SKIPPED, {why}."
    values = ", ".join(f"{name}: {score:.2f}" for name, score in scores.items())
    return f"Inception Score ({why}): {values}."

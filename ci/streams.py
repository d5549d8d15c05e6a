"""M2-4: P parallel streams through one backbone: time, memory, diversity, and what cannot be true."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from ci import _common as ci
from ci._ear_streams import measure_ear_streams
from ci._stream_tables import (
    SCALES_TITLE,
    TRAINED_HEAD,
    scale_head,
    scale_rows,
    stream_head,
    stream_notes,
    stream_rows,
    trained_note,
    trained_rows,
)
from ci._streams import (
    H100_BYTES_PER_S,
    H100_FLOPS_PER_S,
    Case,
    Source,
    as_timed,
    load_fp32,
    measure_memory,
    measurement_of,
    now,
    pixel_digests,
    prefix_tokens,
    roof_seconds,
    run_alternately,
    run_case,
    streams_for,
    timed_dtype,
)
from parscale_ear.generator.sampling import check_guidance
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.generator.var import VAR
from parscale_ear.metrics.diversity import feature_diversity, inception_score, pixel_cosine
from parscale_ear.metrics.features import (
    EfficientNetLite,
    FeatureError,
    FeatureExtractor,
    Inception,
    inception_weights,
)
from parscale_ear.profiling.redflags import NOISY_RULES, find_red_flags
from parscale_ear.profiling.roofline import measure_roof
from parscale_ear.training.loop import autocast_for
from tests.generator.eager_var import eager_tokens

FULL_RUNS = ci.FULL["streams"]["num_runs"]
TWIN_RATIO = 1.5  # times faster than the eager twin
TWIN_PAIRS = 8  # more rounds of the twin and one stream alone, as the ratio swings with the machine
STREAMS_RATIO = 2.8  # t(4) over the lesser of t(1) and the twin's time / 1.5
MEMORY_RATIO = 1.5  # whole memory at P = 4 over that at P = 1
EXPLAINED = 0.2  # by which the peak may differ from what cache and activations explain
BF16_ERROR = 0.02  # relative, of teacher-forced logits against the FP32 twin's
STREAM_DIVERSITY = 0.9  # of P independent calls', where chance alone makes some difference
JUDGED = 4  # streams that the targets speak of
RANDOM = "random weights: pictures and diversity mean nothing then; time and memory do"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = ci.parser(__doc__ or "", "streams.json")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--checkpoint", help="a VAR that save_pretrained wrote")
    model.add_argument("--official", nargs=2, metavar=("VQVAE", "VAR"), help="the authors' files")
    parser.add_argument("--streams-weights", help="trained streams for the checkpoint")
    parser.add_argument("--depth", type=ci.positive_int, help="of random weights (16; quick 4)")
    parser.add_argument("--counts", type=ci.positive_int, nargs="+", default=list(ci.FULL_STREAMS))
    full = ci.FULL_GENERATION
    parser.add_argument("--label", type=int, default=full["label"])
    parser.add_argument("--guidance", type=float, default=full["guidance"])
    parser.add_argument(
        "--num-runs",
        type=ci.positive_int,
        default=os.environ.get("CI_STREAM_RUNS") or None,
        help=f"timed rounds (or CI_STREAM_RUNS; default {FULL_RUNS}, quick 1)",
    )
    arguments = parser.parse_args(argv)
    device = ci.resolve_device(arguments.device)
    runs = int(arguments.num_runs or (1 if arguments.quick else FULL_RUNS))
    pairs = 0 if arguments.quick else TWIN_PAIRS
    source = Source(
        depth=arguments.depth or (4 if arguments.quick else ci.FULL_DEPTH),
        checkpoint=arguments.checkpoint,
        official=tuple(arguments.official) if arguments.official else None,
        streams=arguments.streams_weights,
    )
    options = {name: getattr(arguments, name) for name in ("label", "guidance", "seed")}
    counts = sorted({1, *arguments.counts})
    cases = [Case(count, "diverse") for count in counts]
    cases += [Case(count, "aggregate") for count in counts if count > 1]

    twin = load_fp32(source, device, arguments.seed)
    # What is wrong is refused before anything is timed.
    twin.label_tensor([arguments.label])
    check_guidance(arguments.guidance)
    if source.streams is not None:
        trained = ParallelStreams.from_pretrained(source.streams, backbone=twin.fingerprint())
        if trained.count not in counts:
            raise ci.UsageError(
                f"--streams-weights holds {trained.count} streams; name {trained.count} in --counts"
            )
    digest = source.digest(arguments.seed)
    dtype = timed_dtype(device)
    roof_runs = 3 if arguments.quick else 10
    roof = measure_roof(device, dtype, runs=roof_runs)
    var, packed = as_timed(copy.deepcopy(twin))
    sequential, twin_seconds, pair_ratios = _time(var, twin, source, cases, runs, pairs, options)
    # Before and after: something else that ran for a moment does not lower it so easily.
    roof = roof.or_better(measure_roof(device, dtype, runs=roof_runs))
    error = _logits_error(var, twin, options)
    del twin
    with ci.progress(len(cases), "memory in fresh processes") as advance:
        memory = []
        for case in cases:
            memory.append(measure_memory(source, case, device, **options))
            advance()

    origin = {
        "source": ci.source_digest(),
        "weights": digest,
        "device": ci.device_name(device),
    }
    extractor = EfficientNetLite(1, device)
    guided = arguments.guidance > 0
    rows = []
    for case, peak in zip(cases, memory, strict=True):
        streams, kind = streams_for(var, source, case, arguments.seed)
        row = _row(var, case, prefix_tokens(streams), guided, peak, extractor)
        flops = row["flops_by_scale"]
        row["kind"] = kind
        row["sequential_s"] = sequential.get(case.streams) if case.mode == "diverse" else None
        row["roof_s"] = roof_seconds(var, flops, roof.flops_per_s, roof.bytes_per_s, dtype)
        row["h100_roof_s_computed"] = roof_seconds(
            var, flops, H100_FLOPS_PER_S, H100_BYTES_PER_S, torch.bfloat16
        )
        rows.append(row)
    for row in rows:
        row["efficiency"] = row["streams"] * rows[0]["median_s"] / row["median_s"]
    measurements = [measurement_of(row, origin) for row in rows]
    flags = find_red_flags(measurements, roof_flops_per_s=roof.flops_per_s, origin=origin)
    figures = {
        "model": f"VAR-d{var.config.depth}",
        "side": var.config.vqvae.image_side,
        "trained": source.trained,
        "note": "" if source.trained else RANDOM,
        "packed": packed,
        "parameters": var.parameter_count(),
        "cases": rows,
        "twin_tokens_s": float(np.median(twin_seconds)),
        "twin_ratio": float(np.median(pair_ratios)),
        "twin_rounds": len(pair_ratios),
        "logits_relative_error": error,
        "roof": roof.as_dict(),
        "h100_assumed": {
            "flops_per_s": H100_FLOPS_PER_S,
            "bytes_per_s": H100_BYTES_PER_S,
            "source": "data sheet of the H100 SXM: dense BF16, HBM3",
        },
        "origin": origin,
        "red_flags": [{"rule": flag.rule, "why": flag.why} for flag in flags],
        "features": extractor.name,
        "trained_model": measure_ear_streams(counts, runs, device, extractor, arguments.seed),
        **_inception_scores(cases, device),
    }
    _print(figures)
    fields = ci.common_fields(device, dtype, arguments.seed)
    settings = {"num_runs": runs, "batch_size": 1, "counts": counts, **options}
    targets = _targets(figures, device, arguments.quick)
    return ci.finish("M2-4", "parallel streams", arguments, fields, settings, figures, targets)


def _time(
    var: VAR,
    twin: VAR,
    source: Source,
    cases: Sequence[Case],
    runs: int,
    pairs: int,
    options: Mapping[str, Any],
) -> tuple[dict[int, float], list[float], list[float]]:
    """Fills in the cases from ``runs`` rounds.

    The cases and the twin take turns, so that drift of the machine hits all alike; then the twin
    and the first case alone, ``pairs`` times, which count for their ratio only; the single calls
    follow once.

    Returns:
        Seconds of P single calls one by one, by P; of the twin's tokens, a round; and how many times
        longer these take than the first case's, in every round and pair.
    """
    device = var.device
    twin_times: list[float] = []

    def eager() -> None:
        generator = torch.Generator(device).manual_seed(options["seed"])
        start = now(device)
        with autocast_for("auto", device):
            eager_tokens(
                twin, [options["label"]], guidance=options["guidance"], generator=generator
            )
        twin_times.append(now(device) - start)

    functions = [eager]
    for case in cases:
        streams, _ = streams_for(var, source, case, options["seed"])
        functions.append(lambda c=case, s=streams: run_case(var, s, c, **options))  # type: ignore[misc]
    counts = [case.streams for case in cases if case.mode == "diverse" and case.streams > 1]
    total = len(functions) * (runs + 1) + 2 * pairs + sum(counts)
    with ci.progress(total, "generations") as advance:
        run_alternately(functions, runs, advance)
        for _ in range(pairs):
            for function in functions[:2]:
                function()
                advance()
        ratios = twin_ratios(twin_times[1:], cases[0].token_seconds[1:])
        for case in cases:
            for times in (case.seconds, case.token_seconds, case.scale_seconds):
                times[:] = times[1 : runs + 1]  # without the warm-up and the pairs
        sequential = {}
        for count in counts:
            single = Case(1, "diverse")
            for _ in range(count):
                run_case(var, 1, single, **options)
                advance()
            sequential[count] = sum(single.seconds)
    return sequential, twin_times[1 : runs + 1], ratios


def twin_ratios(twin: Sequence[float], single: Sequence[float]) -> list[float]:
    """How many times longer the twin takes, in rounds of one after the other.

    Args:
        twin: seconds, a round.
        single: seconds of one stream in the same rounds.
    """
    return [a / b for a, b in zip(twin, single, strict=True)]


@torch.no_grad()
def _logits_error(var: VAR, twin: VAR, options: Mapping[str, Any]) -> float:
    """Relative difference of all scales' logits, by the path that is timed, to the FP32 twin's."""
    expected: list[torch.Tensor] = []
    found: list[torch.Tensor] = []
    tokens, _ = eager_tokens(
        twin,
        [options["label"]],
        guidance=options["guidance"],
        top_k=1,
        on_logits=lambda _, logits: expected.append(logits),
    )
    var.generate_tokens(
        [options["label"]],
        guidance=options["guidance"],
        forced=tokens,
        on_logits=lambda _, logits: found.append(logits),
    )
    exact = torch.cat(expected, dim=1)
    return float((torch.cat(found, dim=1) - exact).norm() / exact.norm())


def _inception_scores(cases: Sequence[Case], device: torch.device) -> dict[str, Any]:
    """Inception Score of each case's pictures, where Inception's weights are on this machine."""
    try:
        inception = Inception(inception_weights(download=False), device)
    except FeatureError as error:
        return {"inception_score": None, "inception_why": str(error).split(" (")[0]}
    scores = {
        case.name: inception_score(inception.logits(inception(case.pictures[0])))
        for case in cases
        if case.pictures is not None and len(case.pictures[0]) > 1
    }
    return {"inception_score": scores, "inception_why": "of P pictures: at most P"}


def _row(
    var: VAR,
    case: Case,
    prefix: int,
    guided: bool,
    memory: Mapping[str, int | None],
    extractor: FeatureExtractor,
) -> dict[str, Any]:
    assert case.pictures is not None
    sizes: dict[str, Any] = {
        "streams": case.streams,
        "prefix": prefix,
        "mode": case.mode,
        "guidance": guided,
    }
    several = case.mode == "diverse"
    return {
        "name": case.name,
        "streams": case.streams,
        "mode": case.mode,
        "median_s": float(np.median(case.seconds)),
        "least_s": float(min(case.seconds)),
        "most_s": float(max(case.seconds)),
        "tokens_s": float(np.median(case.token_seconds)),
        "scale_s": np.median(case.scale_seconds, axis=0).tolist(),
        "flops_by_scale": var.flops(**sizes),
        "cache_bytes": var.kv_cache_bytes(**sizes),
        "explained_bytes": var.generation_bytes(**sizes),
        "loaded_bytes": memory["loaded"],
        "peak_bytes": memory["peak"],
        "block_calls": list(case.block_calls),
        "synchronised": case.synchronised,
        "diversity": feature_diversity(case.pictures, extractor) if several else None,
        "pixel_cosine": pixel_cosine(case.pictures) if several else None,
        "pixel_sha256": list(pixel_digests(case)),
    }


def explained(row: Mapping[str, Any]) -> float:
    """What a generation takes above the loaded model, over what its sizes explain."""
    above = row["peak_bytes"] - row["loaded_bytes"]
    return float(above / row["explained_bytes"])


def _targets(figures: Mapping[str, Any], device: torch.device, quick: bool) -> list[ci.Target]:
    rows = {(row["streams"], row["mode"]): row for row in figures["cases"]}
    calls = [set(row["block_calls"]) == {len(row["scale_s"])} for row in rows.values()]
    flags = [f for f in figures["red_flags"] if not (quick and f["rule"] in NOISY_RULES)]
    why = "; ".join(f"{flag['rule']}: {flag['why']}" for flag in flags)[:300]
    calls += [
        set(row["block_calls"]) == {row["scales"]} for row in figures["trained_model"]["cases"]
    ]
    targets = [
        ci.holds("every block runs once a scale, whatever P", all(calls)),
        ci.at_most("logits against the FP32 twin", figures["logits_relative_error"], BF16_ERROR),
        ci.holds("no red flag", not flags, why=why),
        *_trained_targets(figures["trained_model"]["cases"]),
    ]
    several = rows.get((JUDGED, "diverse"))
    names = {
        "twin": "times faster than the eager twin (tokens, P = 1)",
        "aggregate": f"t({JUDGED}), aggregate, over min(t(1), twin / {TWIN_RATIO}) (tokens)",
        "diverse": f"t({JUDGED}), diverse, over min(t(1), twin / {TWIN_RATIO}) (tokens)",
        "memory": f"memory at P = {JUDGED} over that at P = 1",
        "explained": "memory above the model, over cache and activations, farthest from 1 of all P",
    }
    limits = {
        "twin": f"≥ {TWIN_RATIO}",
        "aggregate": f"≤ {STREAMS_RATIO}",
        "diverse": f"≤ {STREAMS_RATIO}",
        "memory": f"≤ {MEMORY_RATIO}",
        "explained": f"1 ± {EXPLAINED}",
    }
    why = ""
    diversity = f"diversity at P = {JUDGED}"
    if several is None:
        why = f"P = {JUDGED} was not asked for"
        targets.append(ci.skipped(diversity, why, "≥ 1e-06"))
    else:
        targets.append(
            ci.at_least(
                diversity,
                several["diversity"],
                1e-6,
                why="" if figures["trained"] else "random weights: only that the streams differ",
            )
        )
        why = "--quick gives no verdict on timings and memory" if quick else ""
    if why:
        return targets + [ci.skipped(names[key], why, limits[key]) for key in names]
    assert several is not None
    single = rows[1, "diverse"]["tokens_s"]
    if device.type == "cpu":
        targets.append(ci.at_least(names["twin"], figures["twin_ratio"], TWIN_RATIO))
        bound = single * min(1.0, figures["twin_ratio"] / TWIN_RATIO)
        for mode in ("aggregate", "diverse"):
            row = rows[JUDGED, mode]
            ratio = row["tokens_s"] / bound
            note = f"the roof of this machine allows {row['roof_s'] / bound:.2f}"
            targets.append(ci.at_most(names[mode], ratio, STREAMS_RATIO, why=note))
    else:
        note = "asked for on the CPU"
        targets += [ci.skipped(names[key], note, limits[key]) for key in list(names)[:3]]
    if several["peak_bytes"] is None:
        note = "this system does not tell a process's peak memory"
        return targets + [ci.skipped(names[key], note, limits[key]) for key in list(names)[3:]]
    one = rows[1, "diverse"]
    ratio = several["peak_bytes"] / one["peak_bytes"]
    above = [row["peak_bytes"] - row["loaded_bytes"] for row in (several, one)]
    why = f"of the whole process; above the loaded model {above[0] / above[1]:.2f}"
    targets.append(ci.at_most(names["memory"], ratio, MEMORY_RATIO, why=why))
    share = max((explained(row) for row in rows.values()), key=lambda share: abs(share - 1))
    status = "PASS" if abs(share - 1) <= EXPLAINED else "MISSED"
    targets.append(ci.Target(names["explained"], status, share, limits["explained"]))
    return targets


def _trained_targets(rows: Sequence[Mapping[str, Any]]) -> list[ci.Target]:
    """Streams of the trained model must differ as much as pictures of calls of their own do."""
    name = "EnergyAR: diversity of P streams over that of P calls"
    ratios = [r["diversity"] / r["diversity_of_calls"] for r in rows if r["streams"] > 1]
    if not ratios:
        return [ci.skipped(name, "no P above 1 was asked for", f"≥ {STREAM_DIVERSITY}")]
    return [ci.at_least(name, min(ratios), STREAM_DIVERSITY)]


def _print(figures: Mapping[str, Any]) -> None:
    ci.table(stream_head(), stream_rows(figures))
    print(f"\n{SCALES_TITLE}")
    ci.table(scale_head(figures), scale_rows(figures))
    for note in stream_notes(figures):
        print(note)
    print(f"\n{trained_note(figures)}")
    ci.table(TRAINED_HEAD, trained_rows(figures))


if __name__ == "__main__":
    sys.exit(ci.run(main))

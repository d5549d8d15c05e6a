"""Reads the reports of one run, refuses stale or mixed ones and prints the milestone table."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ci import _common as ci
from ci._streams import measurement_of
from parscale_ear import checkpoint
from parscale_ear.data.reference import WHEELS
from parscale_ear.device import DTYPES, default_dtype
from parscale_ear.generator.ear import shipped_generator
from parscale_ear.profiling.redflags import find_red_flags

REPORTS = ci.REPORTS
NUMBER = r"-?[\d.,e+-]+"  # as ``ci.number`` writes it
JUDGES = ("FID", "FD-EfficientNetLite1")  # distances to publish: Lite0 took part in trainings
ROUNDED = 5e-4  # relative: what four digits may leave out
SAME_IN_ALL = (
    *("source_sha256", "evidence_sha256", "weights_sha256", "device", "torch", "packages"),
    *("threads", "version", "quick"),
)
NEEDED = (*SAME_IN_ALL, "milestone", "verdict", "targets", "settings", "figures")


def _targets(report: Mapping[str, Any]) -> list[ci.Target]:
    return [ci.Target(**target) for target in report["targets"]]


def read_reports(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The reports in a folder, and a line for each that is missing or unreadable."""
    reports: dict[str, dict[str, Any]] = {}
    problems = []
    for name, milestone in REPORTS.items():
        path = folder / f"{name}.json"
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            missing = [key for key in NEEDED if key not in report]
            _targets(report)
            if report.get("milestone") != milestone or missing:
                problems.append(
                    f"{path}: not a report of {milestone}; run ci/{_script(name)} again"
                )
                continue
            reports[name] = report
        except FileNotFoundError:
            problems.append(f"{path}: missing; run ci/{_script(name)}")
        except (ValueError, AttributeError, TypeError, KeyError, OSError):
            problems.append(f"{path}: not readable as a report; run ci/{_script(name)} again")
    return reports, problems


def _script(name: str) -> str:
    return "fid_eval.py" if name == "fid" else f"{name}.py"


def find_problems(
    reports: Mapping[str, Mapping[str, Any]],
    *,
    source: str | None = None,
    evidence: str | None = None,
    weights: Mapping[str, str] | None = None,
) -> list[str]:
    """Why these reports do not belong together, or to this source and these weights.

    Args:
        reports: name → report.
        source: digest of the source as it is now; None: any, if all have the same.
        evidence: digest of the evidence as it is now; None likewise.
        weights: digests of the weights as they are now; None likewise.
    """
    problems = []
    for name, report in reports.items():
        if source is not None and report["source_sha256"] != source:
            problems.append(
                f"{name}: made from another source, or beside other evidence in docs/results; run ci/{_script(name)} again"
            )
        if evidence is not None and report["evidence_sha256"] != evidence:
            problems.append(f"{name}: made beside other evidence; run ci/{_script(name)} again")
        if weights is not None and report["weights_sha256"] != weights:
            problems.append(f"{name}: made with other weights; run ci/{_script(name)} again")
        if report["verdict"] != ci.verdict(_targets(report)):
            problems.append(f"{name}: its verdict does not follow from its targets")
        problems += [
            f"{name}: {target.status} does not follow from the figure of {target.name!r}"
            for target in _targets(report)
            if not follows(target)
        ]
    for key in SAME_IN_ALL:
        if len({json.dumps(report[key], sort_keys=True) for report in reports.values()}) > 1:
            problems.append(f"the reports mix different {key}: run all scripts again")
    counts = {
        name: (
            report["settings"].get("num_samples"),
            report["figures"].get("reference", {}).get("sha256"),
            report["figures"].get("features"),
        )
        for name, report in reports.items()
        if name in ("fid", "ablation")
    }
    if len(set(counts.values())) > 1:
        problems.append(
            "fid and ablation measured on different pictures or features: run both again"
        )
    if "fid" in reports and reports["fid"]["settings"].get("mode") != "hybrid":
        problems.append("fid: of LiteVAE alone; run ci/fid_eval.py without --mode")
    if "streams" in reports:
        problems += _stream_problems(reports["streams"])
    if "generation" in reports:
        drawn_by = reports["generation"]["settings"].get("generator_sha256")
        if drawn_by != reports["generation"]["weights_sha256"].get("ear"):
            problems.append(
                "generation: of another generator than the shipped one; run ci/generation.py without "
                "--checkpoint"
            )
    return problems


def follows(target: ci.Target) -> bool:
    """Whether a target's status is what its figure and its limit say.

    Limits are written with four digits, so a figure within ``ROUNDED`` of one says nothing; nor do
    targets without limit, and skipped ones. What has a limit and no figure cannot have passed.
    """
    if target.status == "SKIPPED" or not target.limit:
        return True
    if not isinstance(target.value, int | float) or math.isnan(target.value):
        return target.status == "MISSED"
    if found := re.fullmatch(rf"({NUMBER}) ± ({NUMBER})", target.limit):  # limits how far off it is
        sign, value, limit = "≤", abs(target.value - _float(found[1])), _float(found[2])
    elif found := re.fullmatch(rf"([≥≤<]) ({NUMBER})( .*)?", target.limit):
        sign, value, limit = found[1], target.value, _float(found[2])
    else:
        return False
    if limit and abs(value - limit) <= ROUNDED * abs(limit):
        return True
    met = value >= limit if sign == "≥" else value <= limit if sign == "≤" else value < limit
    return target.status == ("PASS" if met else "MISSED")


def _float(text: str) -> float:
    return float(text.replace(",", ""))


def _stream_problems(report: Mapping[str, Any]) -> list[str]:
    """Looks for red flags again, in the figures as they stand in the report."""
    figures = report["figures"]
    try:
        flags = find_red_flags(
            [measurement_of(row, figures["origin"]) for row in figures["cases"]],
            roof_flops_per_s=figures["roof"]["flops_per_s"],
            origin={"source": report["source_sha256"], "device": report["device"]},
        )
        told = [(flag["rule"], flag["why"]) for flag in figures["red_flags"]]
        problems = _ratio_problems(figures["cases"]) + _ratio_problems(
            figures["trained_model"]["cases"]
        )
    except (KeyError, TypeError, IndexError, ZeroDivisionError):
        return ["streams: its figures are not whole; run ci/streams.py again"]
    if told != [(flag.rule, flag.why) for flag in flags]:
        found = "; ".join(f"{flag.rule}: {flag.why}" for flag in flags) or "none"
        problems.append(f"streams: its red flags do not follow from its figures ({found})")
    return problems


def _ratio_problems(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Efficiencies that do not follow from the times beside them."""
    first = rows[0]["median_s"]
    return [
        f"streams: the efficiency at P = {row['streams']} does not follow from its times"
        for row in rows
        if not math.isclose(
            row["efficiency"], row["streams"] * first / row["median_s"], rel_tol=1e-6
        )
    ]


def unlike_full(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was not measured as a full run does: ``fid: num_samples 14 of 280``."""
    try:
        return _unlike_full(reports)
    except (KeyError, TypeError, AttributeError):
        return ["settings or figures that are not whole"]


def _unlike_full(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = [f"{name}: missing" for name in REPORTS if name not in reports]
    runs = {report.get("run") for report in reports.values()}
    if len(runs) > 1 or None in runs:
        found.append("not all by one bash ci/run.sh")
    found += [
        f"{name}: {setting} {counted:,} of {count:,}"
        for name, full in ci.FULL.items()
        if name in reports
        for setting, count in full.items()
        if (counted := reports[name]["settings"][setting]) < count
    ]
    found += [f"{name}: seed {r['seed']}" for name, r in reports.items() if r["seed"] != 0]
    if reports:
        report = next(iter(reports.values()))
        locked = locked_versions()
        installed = {"torch": report["torch"].partition("+")[0], **report["packages"]}
        found += [
            f"{name} {version} instead of {locked[name]}"
            for name, version in installed.items()
            if locked.get(name, version) != version
        ]
    if "streams" in reports:
        figures = reports["streams"]["figures"]
        if figures["trained"] or figures["model"] != f"VAR-d{ci.FULL_DEPTH}":
            kind = "trained" if figures["trained"] else "untrained"
            found.append(
                f"streams: {kind} {figures['model']} instead of untrained VAR-d{ci.FULL_DEPTH}"
            )
        if missing := sorted(set(ci.FULL_STREAMS) - set(reports["streams"]["settings"]["counts"])):
            found.append(f"streams: without P = {', '.join(map(str, missing))}")
        found += [
            f"streams: {name} {settings[name]:g} instead of {value:g}"
            for name, value in ci.FULL_GENERATION.items()
            if (settings := reports["streams"]["settings"])[name] != value
        ]
    for name in ("fid", "ablation"):
        if name in reports:
            figures = reports[name]["figures"]
            if figures["distance_name"] not in JUDGES:
                found.append(f"{name}: {figures['distance_name']}")
            if WHEELS not in figures["reference"]["source"]:
                found.append(f"{name}: on {figures['reference']['source']}")
    if "generation" in reports:
        recommended = checkpoint.load(shipped_generator())[1]["recommended"]
        found += [
            f"generation: {name} {value:g} instead of {recommended[name]:g}"
            for name, value in reports["generation"]["figures"]["settings"].items()
            if value != recommended[name]
        ]
    if "latency" in reports:
        report = reports["latency"]
        usual = DTYPES[default_dtype(torch.device(report["device_type"]))]
        if report["dtype"] != str(usual).removeprefix("torch."):
            found.append(f"latency: in {report['dtype']}")
    return found


def locked_versions() -> dict[str, str]:
    """What poetry.lock installs: name → version."""
    text = (ci.ROOT / "poetry.lock").read_text(encoding="utf-8")
    return dict(
        re.findall(r'^\[\[package\]\]\nname = "(.+)"\nversion = "(.+)"$', text, re.MULTILINE)
    )


def milestone_rows(reports: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The milestone table: milestone, target, value, limit, status, remark."""
    rows = []
    for name, milestone in REPORTS.items():
        report = reports.get(name)
        if report is None:
            rows.append((milestone, name, "", "", "SKIPPED", "no report"))
            continue
        for target in report["targets"]:
            rows.append(
                (
                    milestone,
                    target["name"],
                    ci.number(target["value"]),
                    target["limit"],
                    target["status"],
                    target["why"],
                )
            )
    return rows


def judge(reports: Mapping[str, Mapping[str, Any]], problems: Sequence[str]) -> int:
    """The exit code: 2 for unusable reports, 1 for a missed target, else 0."""
    if problems:
        return ci.WRONG
    missed = any(report["verdict"] == "MISSED" for report in reports.values())
    return ci.MISSED if missed else ci.PASSED


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = ci.parser(__doc__ or "", "summary.json")
    ci.add_results_option(parser)
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.results / "summary.json"
    device = ci.resolve_device(arguments.device)
    reports, problems = read_reports(arguments.results)
    problems += find_problems(reports, source=ci.source_digest(), weights=ci.weights_digest())
    code = judge(reports, problems)
    rows = milestone_rows(reports)
    ci.table(("milestone", "target", "value", "limit", "status", ""), rows)
    counts = {s: sum(row[4] == s for row in rows) for s in ("PASS", "MISSED", "SKIPPED")}
    words = {ci.PASSED: "PASS", ci.MISSED: "MISSED", ci.WRONG: "UNUSABLE"}
    for problem in problems:
        print(f"problem: {problem}")
    if unlike := unlike_full(reports):
        print(f"other than a full run: {'; '.join(unlike)}")
    print(
        f"\n{words[code]}: {counts['PASS']} passed, {counts['MISSED']} missed, "
        f"{counts['SKIPPED']} SKIPPED (a skipped check is not a passed one)"
    )
    summary = {
        **ci.common_fields(device, torch.float32, arguments.seed),
        "verdict": words[code],
        "counts": counts,
        "problems": problems,
        "other_than_a_full_run": unlike,
        "milestones": {REPORTS[name]: report["verdict"] for name, report in reports.items()},
        "skipped": {
            REPORTS[name]: sum(target.status == "SKIPPED" for target in _targets(report))
            for name, report in reports.items()
        },
    }
    checkpoint.write_text(output, json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    return code


if __name__ == "__main__":
    sys.exit(ci.run(main))

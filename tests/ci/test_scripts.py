from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ci._streams
import ci.ablation
import ci.fid_eval
import ci.generation
import ci.latency
import ci.quick_check
import ci.report
import ci.sanity
import ci.streams
import ci.validate_results
from ci import _common, _evidence
from ci.validate_results import REPORTS, find_problems, follows, judge, milestone_rows, read_reports
from parscale_ear.generator.ear import EnergyAR
from parscale_ear.metrics.frechet import Gaussian
from parscale_ear.metrics.generation import FeatureStatistics, shipped_statistics
from parscale_ear.profiling.latency import benchmark_model_precise
from parscale_ear.training.judging import Judge, judge_drawn

ROOT = Path(__file__).parents[2]
SCRIPTS = ["sanity", "latency", "fid_eval", "ablation", "streams", "generation", "quick_check"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reports of a small, real run."""
    folder = tmp_path_factory.mktemp("results")
    common = ["--quick", "--device", "cpu", "--output"]
    few = ["--num-samples", "14", "--features", "efficientnet-lite1"]
    assert ci.sanity.main([*common, str(folder / "sanity.json")]) == 0
    assert ci.latency.main([*common, str(folder / "latency.json"), "--num-runs", "1"]) == 0
    assert ci.fid_eval.main([*common, str(folder / "fid.json"), *few]) in (0, 1)
    assert ci.ablation.main([*common, str(folder / "ablation.json"), *few]) == 0
    small = ["--depth", "1", "--counts", "1", "2"]
    assert ci.streams.main([*common, str(folder / "streams.json"), *small]) == 0
    drawn = ["--num-samples", "20"]
    assert ci.generation.main([*common, str(folder / "generation.json"), *drawn]) in (0, 1)
    return folder


@pytest.fixture
def reports(results: Path) -> dict[str, dict[str, Any]]:
    found, problems = read_reports(results)
    assert problems == []
    return copy.deepcopy(found)


class TestStreams:
    def test_the_twin_is_compared_round_by_round(self) -> None:
        # The machine is slower by half in the last rounds: both are.
        found = ci.streams.twin_ratios([3.0, 4.5, 4.6], [2.0, 3.0, 2.0])
        assert found == pytest.approx([1.5, 1.5, 2.3])

    def test_pairs_beside_the_twin_count_for_the_ratio_only(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = {1: 0, 2: 0}  # by number of streams
        clock = [0.0]

        def run(var: object, streams: object, case: ci._streams.Case, **options: object) -> None:
            calls[case.streams] += 1
            for times in (case.seconds, case.token_seconds):
                times.append(float(calls[case.streams]))
            case.scale_seconds.append([float(calls[case.streams])])

        def twin(*rest: object, **options: object) -> None:
            clock[0] += 10

        monkeypatch.setattr(ci.streams, "run_case", run)
        monkeypatch.setattr(ci.streams, "eager_tokens", twin)
        monkeypatch.setattr(ci.streams, "streams_for", lambda *rest: (1, ""))
        monkeypatch.setattr(ci.streams, "now", lambda device: clock[0])
        cases = [ci._streams.Case(1, "diverse"), ci._streams.Case(2, "diverse")]
        options = {"label": 0, "guidance": 0.0, "seed": 0}
        var: Any = SimpleNamespace(device=torch.device("cpu"), config=None)
        found = ci.streams._time(var, var, ci._streams.Source(), cases, 2, 3, options)
        # Rounds 1 (a warm-up), 2 and 3 in turn; 4 to 6 beside the twin; 7 and 8 one by one.
        assert cases[0].seconds == cases[0].token_seconds == cases[1].seconds == [2, 3]
        assert cases[0].scale_seconds == [[2], [3]]
        assert found == ({2: 15}, [10, 10], [10 / k for k in (2, 3, 4, 5, 6)])

    def test_a_report_with_touched_figures_is_refused(
        self, reports: dict[str, dict[str, Any]]
    ) -> None:
        assert find_problems(reports) == []
        forged = copy.deepcopy(reports)
        for row in forged["streams"]["figures"]["cases"]:
            if row["streams"] == 2:
                row["tokens_s"] = row["tokens_s"] / 100
        assert "red flags do not follow" in " ".join(find_problems(forged))
        for part in ("cases", "trained_model"):
            forged = copy.deepcopy(reports)
            rows = forged["streams"]["figures"][part]
            (rows["cases"] if part == "trained_model" else rows)[1]["efficiency"] = 39.0
            assert "efficiency at P = " in " ".join(find_problems(forged))
        hidden = copy.deepcopy(reports)
        hidden["streams"]["figures"]["cases"][1]["block_calls"] = [20]
        assert "block calls" in " ".join(find_problems(hidden))
        del hidden["streams"]["figures"]["origin"]
        assert "not whole" in " ".join(find_problems(hidden))

    def test_untrained_weights_say_so(self, reports: dict[str, dict[str, Any]]) -> None:
        figures = reports["streams"]["figures"]
        assert not figures["trained"]
        assert "mean nothing" in figures["note"]
        assert [row["kind"] for row in figures["cases"]] == [
            "plain streams", "untrained prefixes", "untrained prefixes",
        ]  # fmt: skip
        assert figures["cases"][0]["diversity"] == 0

    def test_wrong_label(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"0\.\.999"):
            ci.streams.main(["--depth", "1", "--label", "2000", "--quick"])


class TestGeneration:
    def test_what_is_reported_was_counted(self, reports: dict[str, dict[str, Any]]) -> None:
        figures = reports["generation"]["figures"]
        assert figures["pictures"] == 20
        assert figures["passes"] == 7
        assert figures["same_again"]
        by_class = list(figures["class_accuracy_by_class"].values())
        mean = sum(by_class) / len(by_class)  # the classes take turns
        assert figures["class_accuracy"]["value"] == pytest.approx(mean)
        model, statistics = EnergyAR.from_pretrained(), FeatureStatistics.load(shipped_statistics())
        seed = reports["generation"]["seed"]
        drawn = judge_drawn(
            model, Judge(statistics.classes), figures["settings"], count=20, seed=seed
        )
        assert figures["diversity"] == pytest.approx(drawn.figures()["diversity"], rel=1e-4)
        assert figures["class_accuracy"] == drawn.figures()["class_accuracy"]
        distance = Gaussian.fit(drawn.features.numpy()).distance(statistics.law)
        assert figures["distance"] == pytest.approx(distance, rel=1e-4)

    def test_no_verdict_on_timings_in_a_quick_run(self, reports: dict[str, dict[str, Any]]) -> None:
        targets = {t["name"]: t["status"] for t in reports["generation"]["targets"]}
        assert [s for n, s in targets.items() if n.startswith("time of")] == ["SKIPPED"]

    def test_classes_that_the_judge_does_not_know(self, tmp_path: Path) -> None:
        model = EnergyAR.from_pretrained()
        names = tuple(sorted(model.config.class_names))  # the same ones, in another order
        model.config = replace(model.config, class_names=names)
        path = model.save_pretrained(tmp_path / "ear.safetensors")
        with pytest.raises(_common.UsageError, match="the judge knows tench, English springer"):
            ci.generation.main(["--quick", "--device", "cpu", "--checkpoint", str(path)])

    def test_too_few_pictures(self) -> None:
        with pytest.raises(_common.UsageError, match="at least 20"):
            ci.generation.main(["--quick", "--num-samples", "5"])


class TestReports:
    def test_evidence_on_record_is_part_of_the_source(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        evidence = tmp_path / "results"
        evidence.mkdir()
        (tmp_path / "tests" / "generator").mkdir(parents=True)
        (tmp_path / "tests" / "generator" / "eager_var.py").touch()
        monkeypatch.setattr(_common, "ROOT", tmp_path)
        monkeypatch.setattr(_common, "EVIDENCE", evidence)
        digest = _common.source_digest()
        (evidence / "sanity.json").touch()  # a report, no evidence
        assert _common.source_digest() == digest
        before = _common.evidence_digest()
        (evidence / "heads_pictures_9.json").touch()
        assert _common.source_digest() != digest
        assert _common.evidence_digest() != before

    @pytest.mark.parametrize("what", ["source", "evidence", "weights"])
    def test_what_changed_while_it_was_measured_is_not_reported(
        self, what: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_common, "_began", {})
        _common.parser("", "x.json")
        assert _common.common_fields(torch.device("cpu"), torch.float32, 0)["seed"] == 0
        monkeypatch.setattr(_common, f"{what}_digest", lambda: "another")
        with pytest.raises(_common.UsageError, match="changed while this was measured"):
            _common.common_fields(torch.device("cpu"), torch.float32, 0)

    def test_a_ceiling_through_another_decoder_is_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shipped = FeatureStatistics.load(shipped_statistics())
        other = replace(shipped, facts={**shipped.facts, "decoder_sha256": "0"})
        monkeypatch.setattr(ci.generation.FeatureStatistics, "load", lambda path: other)
        with pytest.raises(_common.UsageError, match="through another decoder"):
            ci.generation.main(["--quick", "--device", "cpu"])

    def test_say_where_they_come_from(self, reports: dict[str, dict[str, Any]]) -> None:
        for name, milestone in REPORTS.items():
            report = reports[name]
            assert report["milestone"] == milestone
            assert report["source_sha256"] == _common.source_digest()
            assert report["weights_sha256"] == _common.weights_digest()
            assert report["device_type"] == "cpu"
            assert report["torch"] == torch.__version__
            assert report["packages"]["numpy"] == np.__version__
            assert "none" not in report["packages"].values()  # all of them are installed for tests

    def test_a_skipped_target_says_why(self, reports: dict[str, dict[str, Any]]) -> None:
        skipped = [
            target
            for report in reports.values()
            for target in report["targets"]
            if target["status"] == "SKIPPED"
        ]
        assert len(skipped) >= 4  # CUDA memory, CUDA latency, Inception, controlled training
        assert all(target["why"] for target in skipped)

    def test_streams_say_which_weights_they_are_of(
        self, reports: dict[str, dict[str, Any]]
    ) -> None:
        told = reports["streams"]["figures"]["origin"]["weights"]
        assert told == "random, depth 1, seed 0"

    def test_the_switched_off_model_is_the_baselines_kin(
        self, reports: dict[str, dict[str, Any]]
    ) -> None:
        full = reports["ablation"]["figures"]["variants"]["full"]["psnr_db"]["value"]
        hybrid = reports["fid"]["figures"]["variants"]["hybrid"]["psnr_db"]["value"]
        assert full == pytest.approx(hybrid, abs=1e-9)

    def test_last_line_of_stdout_is_json(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "quick.json"
        assert ci.quick_check.main(["--device", "cpu", "--output", str(output)]) == 0
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert json.loads(last) == json.loads(output.read_text())


class TestValidation:
    def test_good_reports_pass(self, results: Path, tmp_path: Path) -> None:
        found, _ = read_reports(results)
        expected = 1 if any(r["verdict"] == "MISSED" for r in found.values()) else 0
        assert ci.validate_results.main(["--results", str(results)]) == expected
        summary = json.loads((results / "summary.json").read_text())  # beside what it is of
        assert summary["verdict"] == ("MISSED" if expected else "PASS")
        named = tmp_path / "named.json"
        ci.validate_results.main(["--results", str(results), "--output", str(named)])
        assert json.loads(named.read_text())["counts"] == summary["counts"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda r: r["fid"].update(source_sha256="0"), "another source"),
            (lambda r: r["fid"]["weights_sha256"].update(hybrid="0"), "other weights"),
            (lambda r: r["latency"].update(device="another"), "different device"),
            (lambda r: r["fid"].update(evidence_sha256="0"), "beside other evidence"),
            (lambda r: r["fid"]["packages"].update(piq="0.1"), "different packages"),
            (lambda r: r["latency"].update(quick=False), "different quick"),
            (lambda r: r["fid"]["settings"].update(num_samples=9), "different pictures"),
            (lambda r: r["fid"]["figures"]["reference"].update(sha256="0"), "different pictures"),
            (lambda r: r["fid"]["figures"].update(features="inception"), "or features"),
            (lambda r: r["sanity"]["targets"][0].update(status="MISSED"), "does not follow"),
            (lambda r: r["fid"]["settings"].update(mode="baseline"), "LiteVAE alone"),
            (
                lambda r: r["generation"]["settings"].update(generator_sha256="0"),
                "another generator than the shipped one",
            ),
        ],
    )
    def test_stale_or_mixed_reports_are_refused(
        self, reports: dict[str, dict[str, Any]], change: Any, message: str
    ) -> None:
        assert not find_problems(reports, source=_common.source_digest())
        change(reports)
        problems = find_problems(
            reports, source=_common.source_digest(), evidence=_common.evidence_digest(),
            weights=_common.weights_digest(),
        )  # fmt: skip
        assert any(message in problem for problem in problems)
        assert judge(reports, problems) == 2

    def test_a_missed_target_is_exit_code_1(self, reports: dict[str, dict[str, Any]]) -> None:
        reports["sanity"]["targets"][0].update(status="MISSED", value=None)
        reports["sanity"]["verdict"] = "MISSED"
        assert find_problems(reports) == []
        assert judge(reports, []) == 1

    @pytest.mark.parametrize(
        ("value", "limit", "status"),
        [
            (1.4, "≥ 1.5", "MISSED"), (3.4e9, "≥ 1.5 dB", "PASS"), (-0.33, "≤ -0.35", "MISSED"),
            (2e-7, "≤ 1e-06", "PASS"), (0.1, "< 0", "MISSED"), (float("nan"), "≥ 1", "MISSED"),
            (27.17, "≥ 27.4 dB", "MISSED"), (0.783, "≥ 0.79", "MISSED"),
            (1_500_000, "≥ 1,520,000", "MISSED"), (1_672_272, "≤ 1,680,000", "PASS"),
            (0.81, "1 ± 0.2", "PASS"), (1.3, "1 ± 0.2", "MISSED"), (0.5, "1 ± 0.2", "MISSED"), (None, "≥ 1", "MISSED"),
            (0.0, "< 0", "MISSED"), (0.0, "≥ 0", "PASS"), (0.0, "≤ 0", "PASS"),
        ],
    )  # fmt: skip
    def test_a_status_must_follow_from_its_figure(
        self, value: float | None, limit: str, status: str
    ) -> None:
        other = {"PASS": "MISSED", "MISSED": "PASS"}[status]
        assert follows(_common.Target("x", status, value, limit))
        assert not follows(_common.Target("x", other, value, limit))
        assert follows(_common.Target("x", "SKIPPED", value, limit))
        assert not follows(_common.Target("x", "PASS", 1.0, "about 1"))  # cannot be followed

    @pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"milestone": "M2-2"}'])
    def test_unreadable_reports(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "sanity.json").write_text(content)
        found, problems = read_reports(tmp_path)
        assert found == {}
        assert len(problems) == len(REPORTS)
        assert judge(found, problems) == 2

    def test_what_is_not_whole_is_a_problem_and_no_crash(
        self, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for file in results.glob("*.json"):
            shutil.copy(file, tmp_path)
        for name, part in (("latency", "settings"), ("fid", "figures")):
            report = json.loads((tmp_path / f"{name}.json").read_text())
            (tmp_path / f"{name}.json").write_text(json.dumps({**report, part: {}}))
        assert ci.validate_results.main(["--results", str(tmp_path)]) == 2
        assert "problem: fid and ablation measured on different" in capsys.readouterr().out

    def test_what_was_skipped_stands_beside_a_milestones_verdict(
        self, reports: dict[str, dict[str, Any]], results: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "summary.json"
        ci.validate_results.main(["--results", str(results), "--output", str(output)])
        summary = json.loads(output.read_text())
        assert sum(summary["skipped"].values()) == summary["counts"]["SKIPPED"]
        assert summary["skipped"]["M2-4"] == sum(
            target["status"] == "SKIPPED" for target in reports["streams"]["targets"]
        )

    def test_the_table_has_every_target(self, reports: dict[str, dict[str, Any]]) -> None:
        rows = milestone_rows(reports)
        assert len(rows) == sum(len(report["targets"]) for report in reports.values())
        del reports["fid"]
        assert ("M2-3", "fid", "", "", "SKIPPED", "no report") in milestone_rows(reports)


class TestTargets:
    def test_not_a_number_never_passes(self) -> None:
        assert _common.at_most("x", float("nan"), 1).status == "MISSED"
        assert _common.at_least("x", float("nan"), 1).status == "MISSED"

    def test_verdict(self) -> None:
        passed, missed = _common.at_most("x", 1, 1), _common.at_least("x", 0, 1)
        skipped = _common.skipped("x", "why")
        assert _common.verdict([passed, skipped]) == "PASS"
        assert _common.verdict([passed, missed, skipped]) == "MISSED"
        assert _common.verdict([skipped]) == "SKIPPED"

    def test_used_needs_an_interval_below_0(self) -> None:
        def result(high: float) -> dict[str, Any]:
            row = {"psnr_db": {"value": -1.0, "low": -2.0, "high": high}}
            return {"differences": {"no coarse": row, "no fine": row}}

        assert ci.ablation.branch_verdicts(result(-0.1))["coarse"] == "used"
        assert ci.ablation.branch_verdicts(result(0.1))["fine"] == "not used"
        for high, status in ((-0.1, "PASS"), (0.1, "MISSED")):
            targets = ci.ablation.branch_targets(result(high), quick=False)
            assert [(t.status, t.value) for t in targets] == [(status, high)] * 2
            assert all(follows(target) for target in targets)
            quick = ci.ablation.branch_targets(result(high), quick=True)
            assert [t.status for t in quick] == ["SKIPPED"] * 2

    def test_an_extractor_that_took_part_in_training_does_not_judge(self) -> None:
        def result(name: str) -> dict[str, Any]:
            row = {
                "distance": {"value": -1.0, "high": 0.1},
                "relative_distance": {"value": -0.5, "low": -0.6, "high": -0.4},
            }
            return {
                "distance_name": name,
                "differences": {"hybrid": row, "sharp": row},
                "variants": {"sharp": {"psnr_db": {"value": 26.0}}},
            }

        for name, expected in (
            ("FD-EfficientNetLite0", "SKIPPED"),
            ("FD-EfficientNetLite1", "PASS"),
        ):
            targets = ci.fid_eval._targets(result(name), "hybrid")
            lowered = [t for t in targets if f"{name}, (sharp − faithful)" in t.name]
            lowered = [t for t in lowered if "model card" not in t.name]
            assert [t.status for t in lowered] == [expected]
            earned = [t for t in targets if "upper end" in t.name]
            assert [(t.status, t.value) for t in earned] == [("MISSED", 0.1)]
            assert sum("model card" in t.name for t in targets) == 6
            alone = ci.fid_eval._targets(result(name), "baseline")
            assert [t.status for t in alone] == ["SKIPPED"]  # of LiteVAE alone there is no verdict

    def test_the_cards_bars_are_judged_in_full_runs(self) -> None:
        def facts(psnr: float, distance: float) -> dict[str, Any]:
            row = {"ssim": 0.8, "pictures": 9, "data": ["x.tar"], "distance_name": "FD"}
            row["pattern"], row["pattern_flat"] = 20 - distance, 10 - distance
            return {
                "faithful": {**row, "psnr_db": psnr, "distance": 10.0},
                "sharp": {**row, "psnr_db": 26.0, "distance": distance},
                "refined": {**row, "psnr_db": psnr + 0.5},
            }

        def statuses(psnr: float, distance: float, quick: bool = False) -> list[str]:
            found = ci.fid_eval.card_targets(facts(psnr, distance), quick=quick)
            return [target.status for target in found]

        assert statuses(27.5, 6.0) == ["PASS"] * 4 + ["MISSED"] * 2
        assert statuses(27.3, 6.6) == ["MISSED", "PASS", "PASS", "MISSED", "MISSED", "MISSED"]
        assert statuses(27.5, 9.9)[-2] == "MISSED"
        assert statuses(27.5, 9.9)[-1] == "PASS"
        assert set(statuses(27.3, 6.6, quick=True)) == {"SKIPPED"}
        shipped = ci.fid_eval.card_targets(ci.fid_eval.shipped_facts(), quick=False)
        assert all(".tar" in target.why for target in shipped)
        told = ci.fid_eval.card_targets(facts(27.2, 6.0), quick=False)
        assert (told[0].status, "27.70 dB refined once" in told[0].why) == ("MISSED", True)
        assert {t.status for t in shipped if "sharp" in t.name} == {"PASS"}

    def test_the_hybrids_worth_needs_an_interval_below_0(self) -> None:
        def evidence(high: float) -> dict[str, Any]:
            row = {"clean": {"minus_hybrid": {"value": -1.0, "low": -2.0, "high": high}}}
            variants = dict.fromkeys(_evidence.VERDICTS, row)
            told = {"seeds": [0, 1], "steps": 10, "version": "0.7", "ssim_weight": 0.1}
            return {"variants": variants, **told}

        assert {t.status for t in _evidence.training_targets(evidence(-0.1))} == {"PASS"}
        assert {t.status for t in _evidence.training_targets(evidence(0.1))} == {"MISSED"}
        why = "10 steps by release 0.7, SSIM's weight in the loss 0.1"
        assert all(why in target.why for target in _evidence.training_targets(evidence(0.1)))
        assert {t.status for t in _evidence.training_targets(None)} == {"SKIPPED"}

    def test_latency_without_a_gpu_is_skipped_not_passed(self) -> None:
        def targets(device: str, p99: float, ratio: float | None, why: str = "") -> list[Any]:
            rows = [{"p99_ms_per_image": p99, "fraction_of_compute_roof": 0.6}]
            compared = None if ratio is None else {"ratio_p50": ratio}
            return ci.latency._targets(torch.device(device), rows, compared, why, False)[:2]

        assert [t.status for t in targets("cpu", 0.5, 12.0)] == ["SKIPPED", "PASS"]
        assert [t.status for t in targets("cuda", 0.5, 12.0)] == ["PASS", "SKIPPED"]
        assert [t.status for t in targets("cuda", 1.1, None)] == ["MISSED", "SKIPPED"]
        assert [t.status for t in targets("cpu", 0.5, 9.9)] == ["SKIPPED", "MISSED"]
        last = targets("cpu", 0.5, None, "no diffusers")[1]
        assert (last.status, last.why) == ("SKIPPED", "no diffusers")

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize(("shares", "status"), [((0.5, 1.05), "PASS"), ((1.37, 0.5), "MISSED")])
    def test_a_latency_above_the_roof_is_missed(
        self, device: str, shares: tuple[float, float], status: str
    ) -> None:
        rows = [{"p99_ms_per_image": 1.0, "fraction_of_compute_roof": share} for share in shares]
        found = ci.latency._targets(torch.device(device), rows, None, "", False)
        (judged,) = [target for target in found if "share of the compute roof" in target.name]
        assert (judged.status, judged.value) == (status, max(shares))


class TestWrongUse:
    @pytest.mark.parametrize("name", [*SCRIPTS, "validate_results", "report"])
    def test_help(self, name: str) -> None:
        done = subprocess.run(
            [sys.executable, f"ci/{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "--output" in done.stdout

    @pytest.mark.parametrize(
        "arguments",
        [
            ["ci/fid_eval.py", "--ref-dir", "nothing"],
            ["ci/fid_eval.py", "--inception-weights", "nothing", "--num-samples", "4"],
            ["ci/fid_eval.py", "--num-samples", "1"],
            ["ci/fid_eval.py", "--num-samples", "many"],
            ["ci/latency.py", "--device", "cuda:99"],
            ["ci/validate_results.py", "--results", "nothing"],
            ["ci/report.py", "--results", "nothing"],
        ],
    )
    def test_exit_code_2_and_no_traceback(self, arguments: list[str], tmp_path: Path) -> None:
        output = tmp_path / "x"
        done = subprocess.run(
            [sys.executable, *arguments, "--output", str(output)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        if "validate" not in arguments[0]:
            assert not output.exists()

    @pytest.mark.parametrize("script", [*SCRIPTS, "validate_results", "report"])
    def test_what_cannot_be_written_is_told_first(self, script: str, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        done = subprocess.run(
            [sys.executable, f"ci/{script}.py", "--output", str(tmp_path / "file" / "x.json")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        assert "nothing can be written in" in done.stderr
        assert "Traceback" not in done.stderr

    def test_run_sh_needs_an_interpreter_that_has_it_all(self, tmp_path: Path) -> None:
        """Tried on a copy: it removes what an earlier run left, and must not here."""
        for folder in ("ci", "results", "elsewhere"):
            (tmp_path / folder).mkdir()
        (tmp_path / "results" / "summary.json").write_text("{}")
        shutil.copy(ROOT / "ci" / "run.sh", tmp_path / "ci")
        bare = tmp_path / "bare"
        bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
        bare.chmod(0o755)
        done = subprocess.run(
            ["bash", "../ci/run.sh"],
            cwd=tmp_path / "elsewhere",
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin", "CI_PYTHON": "../bare"},
        )
        assert done.returncode == 2
        assert "No module named" in done.stderr
        assert "bare lacks what is needed" in done.stderr
        assert (tmp_path / "results" / "summary.json").exists()

    @pytest.mark.parametrize(
        ("variable", "said"),
        [
            ("CI_NUM_RUNS=abc", "CI_NUM_RUNS: expected a whole number"),
            ("CI_GENERATION_SAMPLES=0", "CI_GENERATION_SAMPLES: expected a whole number"),
            ("CI_GENERATION_SAMPLES=19", "CI_GENERATION_SAMPLES: at least 20 are needed"),
            ("CI_FID_SAMPLES=3", "CI_FID_SAMPLES: at least 4 are needed"),
            ("REF_DIR=ci", "ci: no picture in it"),
            ("CI_FEATURES=x", "CI_FEATURES must be one of auto,"),
            ("REF_DIR=nowhere", "nowhere: no such file"),
            ("--device gpu", "--device gpu: unknown"),
        ],
    )
    def test_run_sh_looks_at_what_is_asked_before_it_removes_anything(
        self, variable: str, said: str, tmp_path: Path
    ) -> None:
        """Tried on a copy, too."""
        shutil.copytree(ROOT / "ci", tmp_path / "ci")
        (tmp_path / "results").mkdir()
        (tmp_path / "results" / "summary.json").write_text("{}")
        option = variable.split() if variable.startswith("-") else []
        name, _, value = variable.partition("=")
        done = subprocess.run(
            ["bash", "ci/run.sh", *option],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={
                **os.environ, "CI_PYTHON": sys.executable, "PYTHONPATH": str(ROOT),
                **({} if option else {name: value}),
            },
        )  # fmt: skip
        assert done.returncode == 2
        assert f"run.sh: {said}" in done.stderr.replace(f"{tmp_path}/", "")
        assert "Traceback" not in done.stderr
        assert (tmp_path / "results" / "summary.json").exists()

    def test_run_sh_stays_in_its_own_checkout_and_names_its_run(self, tmp_path: Path) -> None:
        for folder in ("ours/ci", "others/ci"):
            (tmp_path / folder).mkdir(parents=True)
        shutil.copy(ROOT / "ci" / "run.sh", tmp_path / "ours" / "ci")
        told = tmp_path / "told"
        fake = tmp_path / "python"  # as a script's output, -c prints what the run is called
        fake.write_text(f'#!/bin/sh\necho "$PWD $CI_RUN" >>"{told}"\necho 42\n')
        fake.chmod(0o755)
        subprocess.run(
            ["bash", "ci/run.sh"],
            cwd=tmp_path / "ours",
            capture_output=True,
            env={
                "PATH": "/usr/bin:/bin",
                "CI_PYTHON": str(fake),
                "CDPATH": str(tmp_path / "others"),
            },
            check=False,
        )
        lines = told.read_text().splitlines()
        assert lines[2:] == [f"{tmp_path / 'ours'} 42"] * 8  # behind the two before the scripts

    def test_run_sh(self) -> None:
        done = subprocess.run(
            ["bash", "ci/run.sh", "--fast"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert "unknown option '--fast'" in done.stderr


def test_latency_hands_on_the_packages_function() -> None:
    assert ci.latency.benchmark_model_precise is benchmark_model_precise


@pytest.mark.parametrize(("kernels", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_streams_are_timed_in_what_the_device_has_kernels_for(
    kernels: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parscale_ear.training.loop.multiplies_bf16", lambda device: kernels)
    source = ci._streams.Source(depth=1)
    var, _ = ci._streams.as_timed(ci._streams.load_fp32(source, torch.device("cpu"), 0))
    positions = var.transformer.positions
    assert str(positions.dtype) == f"torch.{dtype}"
    assert ci._streams.timed_dtype(torch.device("cpu")) == positions.dtype
    few = ci._streams.roof_seconds(var, [0.0], 1.0, 1.0, positions.dtype)
    assert few == positions.element_size() * ci._streams.roof_seconds(
        var, [0.0], 1.0, 1.0, torch.uint8
    )


def test_a_clock_that_is_read_while_the_device_works_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = EnergyAR.from_pretrained()
    options: dict[str, Any] = {"label": 0, "guidance": 0.0, "seed": 0}
    case = ci._streams.Case(1, "diverse")
    ci._streams.run_case(model, 1, case, **options)
    assert case.synchronised
    busy = iter([True] * 3 + [False] + [True] * 20)
    monkeypatch.setattr(ci._streams, "idle", lambda device: next(busy))
    ci._streams.run_case(model, 1, case, **options)
    assert not case.synchronised
    ci._streams.run_case(model, 1, case, **options)
    assert not case.synchronised  # one look is enough


def test_a_folder_of_weights_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    found = ci._streams.Source(checkpoint=str(tmp_path)).digest(0)
    assert found == ci._streams.Source(checkpoint=str(tmp_path / "model.safetensors")).digest(0)


@pytest.mark.parametrize("seed", ["-1", "18446744073709551616", "one"])
def test_a_seed_that_cannot_be_taken_is_told(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        ci.fid_eval.main(["--seed", seed])
    assert stopped.value.code == 2
    assert "--seed: expected a whole number from 0 to" in capsys.readouterr().err

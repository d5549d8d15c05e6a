from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ci import _evidence
from ci._common import UsageError
from ci._markdown import told


def judged(accuracy: float, drawn: float, held_out: float, copied: float = 0.8) -> dict[str, Any]:
    row = {"value": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.02}
    return {
        "weights_sha256": "ours",
        "decoder_sha256": "its",
        "pictures": 2000,
        "class_accuracy": row,
        "ceiling": {"class_accuracy": {"value": 0.85}},
        "nearest_training_picture": {"drawn": {"q0.01": drawn}, "held_out": {"q0.01": held_out}},
        "nearest_of_its_class": {"drawn": {"q0.5": 8.5}, "held_out": {"q0.5": 10.0}},
        "effective_dimensions": {"drawn": 20.0, "held_out": 30.0},
        "nearest_is_from_training": {"value": copied, "by_chance": 0.8},
    }


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        (judged(0.41, 5.0, 5.0), ["PASS", "PASS", "PASS", "MISSED", "PASS"]),
        (judged(0.39, 5.0, 5.0), ["MISSED", "PASS", "PASS", "MISSED", "PASS"]),
        (judged(0.9, 0.5, 5.0), ["PASS", "MISSED", "PASS", "MISSED", "PASS"]),  # exact copies
        (judged(0.9, 5.0, 5.0, 0.9), ["PASS", "PASS", "PASS", "MISSED", "MISSED"]),  # rough ones
    ],
)
def test_a_judgement_decides(evidence: dict[str, Any], expected: list[str]) -> None:
    targets = _evidence.judged_targets(evidence, "ours", "its", quick=False)
    assert [target.status for target in targets] == expected
    assert targets[2].value == pytest.approx(0.85)
    quick = _evidence.judged_targets(evidence, "ours", "its", quick=True)
    assert [t.name for t in quick] == [t.name for t in targets]
    assert {t.status for t in quick} == {"SKIPPED"}


@pytest.mark.parametrize(
    "file",
    [f for f in sorted(_evidence.FOLDER.glob("*.json")) if f != _evidence.TRIALS],
    ids=lambda f: f.stem,
)
def test_what_is_on_record_says_where_and_when_it_was_measured(file: Path) -> None:
    report = json.loads(file.read_text(encoding="utf-8"))
    line = told(report)
    for key in ("device", "dtype", "torch"):
        assert report[key] in line
    assert report["date"][:10] in line


def test_what_is_not_known_is_left_out() -> None:
    assert told({"torch": "2"}, "3 samples") == "3 samples, torch 2"
    known = {"device": "X", "threads": 1, "dtype": "float32", "torch": "2", "date": "2026-01-02"}
    assert told(known) == "X, 1 thread, float32, torch 2, 2026-01-02"


@pytest.mark.parametrize(
    ("evidence", "why"), [(None, "no judgement"), (judged(0.9, 5, 5), "other weights")]
)
def test_no_judgement_of_these_weights_is_no_pass(
    evidence: dict[str, Any] | None, why: str
) -> None:
    targets = _evidence.judged_targets(evidence, "theirs", "its", quick=False)
    assert len(targets) == 5
    for target in targets:
        assert target.status == "SKIPPED"
        assert why in target.why


def test_a_judgement_of_another_decoder_is_no_pass() -> None:
    targets = _evidence.judged_targets(judged(0.9, 5, 5), "ours", "another's", quick=False)
    assert len(targets) == 5
    for target in targets:
        assert target.status == "SKIPPED"
        assert "another decoder" in target.why


def of(value: float) -> dict[str, Any]:
    return {"distance": {"value": value, "low": value - 1, "high": value + 1}}


def test_heads_are_compared_where_both_are_on_record() -> None:
    heads = {"energy": of(90), "gaussian": of(100), "diffusion": of(91.5)}
    evidence = [{"heads": heads, "version": "9.8.7", "seed": 0}]
    targets = _evidence.head_targets(evidence, [], quick=False)
    found = {target.name.split(" − ")[1]: target for target in targets}
    alone, then = (
        f"head, trained alike on tokens{k}: upper end" for k in (" alone", ", then pictures")
    )
    assert {kind: target.status for kind, target in found.items()} == {
        f"squared-error {alone}": "SKIPPED", f"gaussian {alone}": "PASS",
        f"diffusion {alone}": "MISSED", f"gaussian {then}": "SKIPPED",
        f"diffusion {then}": "SKIPPED",
    }  # fmt: skip
    assert found[f"gaussian {alone}"].value == pytest.approx(91 - 99)
    # The intervals meet.
    assert "90.0 [89.0, 91.0] and 91.5 [90.5, 92.5]" in found[f"diffusion {alone}"].why
    assert "by release 9.8.7 and its decoder" in found[f"diffusion {alone}"].why
    targets = _evidence.head_targets([], evidence, quick=False)
    assert [t.status for t in targets] == ["SKIPPED"] * 3 + ["PASS", "MISSED"]
    targets = _evidence.head_targets([], [], quick=False)
    assert {t.status for t in targets} == {"SKIPPED"}
    assert {t.why for t in _evidence.head_targets(evidence, evidence, quick=True)} == {
        "judged in a full run only"
    }


def test_heads_of_several_seeds_are_compared_by_their_mean_difference() -> None:
    pairs = [(90.0, 93.0), (92.0, 94.0), (88.0, 92.0)]  # differences of −3, −2 and −4
    runs = [
        {"heads": {"energy": of(a), "gaussian": of(b)}, "version": "9.8.7", "seed": k}
        for k, (a, b) in enumerate(pairs)
    ]
    runs[0]["heads"]["diffusion"] = of(90.5)
    found = _evidence.head_difference(runs, "gaussian")
    assert found is not None
    assert found["value"] == pytest.approx(-3)
    half = 4.302653 / 3**0.5  # 97.5 % of Student's t with two degrees of freedom, deviation 1
    assert (found["low"], found["high"]) == pytest.approx((-3 - half, -3 + half))
    target = _evidence.head_targets(runs, [], quick=False)[1]
    assert (target.status, target.value) == ("PASS", found["high"])
    assert "over 3 seeds: 90.0 and 93.0" in target.why
    assert _evidence.head_targets(runs, [], quick=False)[2].why.startswith("one seed: 90.0")
    runs[2]["heads"]["energy"] = of(91.9)  # −3, −2 and −0.1: the interval holds 0
    assert _evidence.head_targets(runs, [], quick=False)[1].status == "MISSED"


def test_comparisons_of_heads_must_be_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(name: str, seed: int, batch: int, *minutes: float) -> None:
        kinds = zip(("energy", "gaussian"), minutes or (45, 45), strict=True)
        heads = {kind: {**of(90), "minutes": length} for kind, length in kinds}
        (tmp_path / name).write_text(json.dumps({"heads": heads, "seed": seed, "batch": batch}))

    monkeypatch.setattr(_evidence, "FOLDER", tmp_path)
    assert _evidence.head_comparisons("heads*.json") == []
    record("heads.json", 3, 128)
    record("heads_b.json", 1, 128)
    assert [run["seed"] for run in _evidence.head_comparisons("heads*.json")] == [1, 3]
    record("heads_c.json", 3, 128)
    with pytest.raises(UsageError, match="of one seed"):
        _evidence.head_comparisons("heads*.json")
    record("heads_c.json", 2, 64)
    with pytest.raises(UsageError, match="different batch"):
        _evidence.head_comparisons("heads*.json")
    record("heads_c.json", 2, 128, 45, 45.1)  # a last step's length
    assert len(_evidence.head_comparisons("heads*.json")) == 3
    record("heads_c.json", 2, 128, 45, 44)
    with pytest.raises(UsageError, match="different minutes"):
        _evidence.head_comparisons("heads*.json")
    record("heads_c.json", 2, 128, 44, 44)
    with pytest.raises(UsageError, match="different minutes"):
        _evidence.head_comparisons("heads*.json")

from __future__ import annotations

from typing import Any

import pytest

from ci import _evidence


def judged(accuracy: float, drawn: float, held_out: float) -> dict[str, Any]:
    row = {"value": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.02}
    return {
        "weights_sha256": "ours",
        "decoder_sha256": "its",
        "pictures": 2000,
        "class_accuracy": row,
        "ceiling": {"class_accuracy": {"value": 0.85}},
        "nearest_training_picture": {"drawn": {"q0.01": drawn}, "held_out": {"q0.01": held_out}},
    }


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        (judged(0.41, 5.0, 5.0), ["PASS", "PASS"]),
        (judged(0.39, 5.0, 5.0), ["MISSED", "PASS"]),
        (judged(0.9, 0.5, 5.0), ["PASS", "MISSED"]),  # copies of training pictures
    ],
)
def test_a_judgement_decides(evidence: dict[str, Any], expected: list[str]) -> None:
    targets = _evidence.judged_targets(evidence, "ours", "its")
    assert [target.status for target in targets] == expected


@pytest.mark.parametrize(
    ("evidence", "why"), [(None, "no judgement"), (judged(0.9, 5, 5), "other weights")]
)
def test_no_judgement_of_these_weights_is_no_pass(
    evidence: dict[str, Any] | None, why: str
) -> None:
    for target in _evidence.judged_targets(evidence, "theirs", "its"):
        assert target.status == "SKIPPED"
        assert why in target.why


def test_a_judgement_of_another_decoder_is_no_pass() -> None:
    for target in _evidence.judged_targets(judged(0.9, 5, 5), "ours", "another's"):
        assert target.status == "SKIPPED"
        assert "another decoder" in target.why


def test_heads_are_compared_where_both_are_on_record() -> None:
    def of(value: float) -> dict[str, Any]:
        return {"distance": {"value": value, "low": value - 1, "high": value + 1}}

    heads = {"energy": of(90), "gaussian": of(100), "diffusion": of(91.5)}
    evidence = {"heads": heads, "version": "9.8.7"}
    targets = _evidence.head_targets(evidence, None, quick=False)
    found = {target.name.split(" over ")[1]: target for target in targets}
    alone, then = (
        "head's lower end, trained alike on tokens" + k for k in (" alone", ", then pictures")
    )
    assert {kind: target.status for kind, target in found.items()} == {
        f"squared-error {alone}": "SKIPPED", f"gaussian {alone}": "PASS",
        f"diffusion {alone}": "MISSED", f"gaussian {then}": "SKIPPED",
        f"diffusion {then}": "SKIPPED",
    }  # fmt: skip
    assert found[f"gaussian {alone}"].value == pytest.approx(91 / 99)
    # The intervals meet.
    assert "90.0 [89.0, 91.0] and 91.5 [90.5, 92.5]" in found[f"diffusion {alone}"].why
    assert "by release 9.8.7 and its decoder" in found[f"diffusion {alone}"].why
    targets = _evidence.head_targets(None, evidence, quick=False)
    assert [t.status for t in targets] == ["SKIPPED"] * 3 + ["PASS", "MISSED"]
    targets = _evidence.head_targets(None, None, quick=False)
    assert {t.status for t in targets} == {"SKIPPED"}
    assert {t.why for t in _evidence.head_targets(evidence, evidence, quick=True)} == {
        "judged in a full run only"
    }

"""Committed evidence that a validation run cannot make again: trainings and trials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ci import _common as ci

FOLDER = ci.ROOT / "docs" / "results"
TRAINING = FOLDER / "hybrid_training.json"  # of parscale_ear.training.comparison
STREAMS = FOLDER / "streams_training.json"  # of parscale-ear train var, RUN/streams.json
TRIALS = FOLDER / "trials.json"
JUDGED = FOLDER / "generation_judged.json"  # of parscale_ear.training.ear_release
VERDICTS = {  # variant → what its difference to the hybrid tells
    "LiteVAE": "LiteVAE alone − hybrid, trained alike",
    "LiteVAE, wider": "as many parameters in wider layers − hybrid, trained alike",
    "fine only": "trained without the coarse branch − hybrid",
    "coarse only": "trained without the fine branch − hybrid",
}


def read(path: Path) -> dict[str, Any] | None:
    """A committed file of evidence; None: there is none.

    Raises:
        UsageError: it cannot be read.
    """
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ci.UsageError(f"{path.name}: not JSON ({error}); git checkout {path.name}") from error


def training_targets(evidence: Mapping[str, Any] | None) -> list[ci.Target]:
    """Whether the hybrid and each branch earn their place: PSNR below the hybrid's without it."""
    targets = []
    for variant, name in VERDICTS.items():
        name = f"{name}: PSNR, upper end of the interval"
        if evidence is None:
            targets.append(ci.skipped(name, "no controlled training on record", "< 0 dB"))
            continue
        row = evidence["variants"][variant]["clean"]["minus_hybrid"]
        status = "PASS" if row["high"] < 0 else "MISSED"
        why = (
            f"mean {row['value']:+.3f} dB, {len(evidence['seeds'])} seeds of "
            f"{evidence['steps']:,} steps"
        )
        targets.append(ci.Target(name, status, row["high"], "< 0 dB", why))
    return targets

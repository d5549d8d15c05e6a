"""M3-1: what each branch of the hybrid does in the trained model, and what it is worth.

Switching off a branch that was trained together with the rest shows whether it is used, not what
it is worth: worth takes a training without it. Those trainings take hours; their committed figures
(docs/results/hybrid_training.json, made by parscale_ear.training.comparison) are judged here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ci import _common as ci
from ci import _evidence
from ci._distances import compare, print_comparison
from ci.fid_eval import reference_of, restore
from parscale_ear.metrics.features import load_extractor

SWITCHED_OFF = {
    "full": {"coarse", "fine"},
    "no coarse": {"fine"},
    "no fine": {"coarse"},
    "neither": set[str](),
}


def branch_verdicts(result: dict[str, Any]) -> dict[str, str]:
    """``used`` where switching a branch off costs PSNR beyond its interval, else ``not used``."""
    return {
        branch: "used"
        if result["differences"][f"no {branch}"]["psnr_db"]["high"] < 0
        else "not used"
        for branch in ("coarse", "fine")
    }


def branch_targets(result: dict[str, Any], *, quick: bool) -> list[ci.Target]:
    """Whether the trained model uses its branches."""
    targets = []
    for branch, word in branch_verdicts(result).items():
        name = f"without the {branch} branch − full, as trained: PSNR, upper end of the interval"
        row = result["differences"][f"no {branch}"]["psnr_db"]
        if quick:
            why = "judged in a full run: so few crops show little of it"
            targets.append(ci.skipped(name, why, "< 0 dB"))
        else:
            status = "PASS" if word == "used" else "MISSED"
            why = f"mean {row['value']:+.3f} dB; whether it is used, not what it is worth"
            targets.append(ci.Target(name, status, row["high"], "< 0 dB", why))
    return targets


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = ci.parser((__doc__ or "").split("\n\n")[0], "ablation.json")
    ci.add_reference_options(parser)
    arguments = parser.parse_args(argv)
    device = ci.resolve_device(arguments.device)
    torch.manual_seed(arguments.seed)
    reference = reference_of(arguments)
    extractor, note = load_extractor(
        arguments.features, device=device, weights=arguments.inception_weights
    )
    variants = {
        name: restore("hybrid", None, device, reference.pictures, branches=branches)
        for name, branches in SWITCHED_OFF.items()
    }
    result = compare(
        reference,
        variants,
        extractor,
        against={name: "full" for name in SWITCHED_OFF if name != "full"},
        seed=arguments.seed,
    )
    print_comparison(result)
    used = branch_verdicts(result)
    print("; ".join(f"the {branch} branch is {word}" for branch, word in used.items()))
    figures = {
        **result,
        "branches": used,
        "features": extractor.name,
        "features_note": note,
        "reference": reference.as_dict(),
    }
    targets = branch_targets(result, quick=arguments.quick)
    on_record = _evidence.training_targets(_evidence.read(_evidence.TRAINING))
    if arguments.quick:
        targets += ci.unjudged(on_record, "judged in a full run only")
    else:
        targets += on_record
    fields = ci.common_fields(device, torch.float32, arguments.seed)
    settings = {"num_samples": len(reference.pictures)}
    return ci.finish("M3-1", "ablation", arguments, fields, settings, figures, targets)


if __name__ == "__main__":
    sys.exit(ci.run(main))

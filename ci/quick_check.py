"""Does it work at all? Loads the shipped weights and reconstructs photographs; no timing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from ci import _common as ci
from ci.sanity import identity_targets, shape_targets
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.reconstruct import reconstruct_pictures
from parscale_ear.data.reference import wheel_reference
from parscale_ear.metrics.reconstruction import psnr

LEAST_PSNR = 24.0  # dB, on the crops out of wheels: far below what trained weights give


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    arguments = ci.parser(__doc__ or "", "quick_check.json").parse_args(argv)
    device = ci.resolve_device(arguments.device)
    torch.manual_seed(arguments.seed)
    reference = wheel_reference(14)
    targets = []
    figures = {}
    for variant in ("baseline", "hybrid"):
        model = ParScaleEAR.from_pretrained(variant=variant, device=device)
        restored = reconstruct_pictures(model, reference.pictures)
        figures[f"{variant}_psnr_db"] = float(np.mean(psnr(restored, reference.pictures)))
        targets.append(
            ci.at_least(f"{variant}: PSNR", figures[f"{variant}_psnr_db"], LEAST_PSNR, "dB")
        )
    targets += [*shape_targets(model), *identity_targets(model, reference.pictures[:4])]
    dtype = model.dtype
    fields = ci.common_fields(device, dtype, arguments.seed)
    settings = {"num_samples": len(reference.pictures)}
    return ci.finish("quick", "check", arguments, fields, settings, figures, targets)


if __name__ == "__main__":
    sys.exit(ci.run(main))

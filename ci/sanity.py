"""M2-1: does the shipped model do what it says? Shapes, precision, determinism, sizes, memory."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ci import _common as ci
from parscale_ear.autoencoder.files import Decoder
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.reconstruct import reconstruct_image, reconstruct_pictures
from parscale_ear.data.images import from_uint8, to_uint8
from parscale_ear.data.reference import wheel_reference
from parscale_ear.metrics.reconstruction import psnr
from parscale_ear.profiling.memory import peak_memory_mib

LITEVAE_PARAMETERS = 1_600_000  # ± 5 %
HYBRID_PARAMETERS = 200_000  # ± 5 %
MOST_GFLOP = 4.5  # encode + enhance + decode of one 256×256 image
MOST_PEAK_MIB = 512.0  # CUDA
ERROR_LIMITS = {"float16": 0.005, "bfloat16": 0.03}  # relative, of the reconstruction
MOST_DECIBEL_LOST = 0.05  # by half precision
ODD_SIZES = ((16, 16), (48, 80), (144, 272), (304, 208))


def precision_figures(device: torch.device, pictures: Tensor, decoder: Decoder) -> dict[str, Any]:
    """Half precision against FP32 on photographs: relative error and PSNR lost."""
    reference = ParScaleEAR.from_pretrained(decoder=decoder, device=device, dtype=torch.float32)
    images = from_uint8(pictures.to(device))
    exact = _forward(reference, images)
    exact_psnr = float(np.mean(psnr(to_uint8(exact), pictures)))
    figures: dict[str, Any] = {"float32": {"psnr_db": exact_psnr}}
    for dtype in (torch.float16, torch.bfloat16):
        model = ParScaleEAR.from_pretrained(decoder=decoder, device=device, dtype=dtype)
        restored = _forward(model, images.to(dtype)).float()
        error = float((restored - exact).norm() / exact.norm())
        decibel = float(np.mean(psnr(to_uint8(restored), pictures)))
        figures[str(dtype).removeprefix("torch.")] = {
            "relative_error": error,
            "psnr_db": decibel,
            "psnr_lost_db": exact_psnr - decibel,
        }
    return figures


def precision_targets(precision: Mapping[str, Mapping[str, Any]]) -> list[ci.Target]:
    """Bounds on what half precision costs, by decoder."""
    targets = []
    for decoder, figures in precision.items():
        for dtype, limit in ERROR_LIMITS.items():
            name, found = f"{dtype}, {decoder} decoder", figures[dtype]
            targets += [
                ci.at_most(f"{name}: relative error", found["relative_error"], limit),
                ci.at_most(f"{name}: PSNR lost", found["psnr_lost_db"], MOST_DECIBEL_LOST, "dB"),
            ]
    return targets


@torch.inference_mode()
def _forward(model: ParScaleEAR, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(4)]).cpu()


def shape_targets(model: ParScaleEAR) -> list[ci.Target]:
    """Sizes on and off the grid, and every component alone."""
    targets = []
    with torch.inference_mode():
        for height, width in ((256, 256), *ODD_SIZES):
            images = torch.rand(2, 3, height, width, device=model.device, dtype=model.dtype)
            images = images * 2 - 1
            posterior = model.encode(images)
            latent = posterior.sample(torch.Generator().manual_seed(0))
            expected = (2, model.config.litevae.latent_channels, height // 16, width // 16)
            parts = {
                "mean": posterior.mean,
                "sample": latent,
                "kl": posterior.kl(),
                **{
                    f"enhance {sorted(branches)}": model.enhance(latent, branches=branches)
                    for branches in ({"coarse"}, {"fine"}, {"coarse", "fine"}, set())
                },
            }
            restored = model.decode(model.enhance(posterior.mode()))
            good = all(tuple(t.shape) == expected for t in parts.values())
            good &= tuple(restored.shape) == (2, 3, height, width)
            finite = all(bool(torch.isfinite(t).all()) for t in (*parts.values(), restored))
            targets.append(ci.holds(f"shapes and finiteness at {height}×{width}", good and finite))
        odd = torch.rand(3, 123, 77) * 2 - 1
        restored = reconstruct_image(model, odd)
        targets.append(ci.holds("any size by padding (123×77)", restored.shape == odd.shape))
        try:
            model.encode(torch.zeros(1, 3, 100, 100, device=model.device, dtype=model.dtype))
            refused = False
        except ValueError:
            refused = True
        targets.append(ci.holds("a size off the grid is refused", refused))
    return targets


def identity_targets(model: ParScaleEAR, pictures: Tensor) -> list[ci.Target]:
    """Determinism, and save → load → the same bits."""
    first = reconstruct_pictures(model, pictures)
    second = reconstruct_pictures(model, pictures)
    with tempfile.TemporaryDirectory() as folder:
        path = model.save_pretrained(folder)
        loaded = ParScaleEAR.from_pretrained(path, device=model.device, dtype=model.dtype)
    same_weights = all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    same_pictures = torch.equal(reconstruct_pictures(loaded, pictures), first)
    return [
        ci.holds("the same pictures twice give the same bits", torch.equal(first, second)),
        ci.holds("save → load → the same bits", same_weights and same_pictures),
        ci.holds(
            "save → load → the same latent fingerprint",
            model.latent_fingerprint() == loaded.latent_fingerprint(),
        ),
    ]


def counted_gflop(model: ParScaleEAR) -> float:
    """GFLOP of one 256×256 image as ``torch.utils.flop_counter`` counts them."""
    images = torch.zeros(1, 3, 256, 256, device=model.device, dtype=model.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    arguments = ci.parser(__doc__ or "", "sanity.json").parse_args(argv)
    device = ci.resolve_device(arguments.device)
    torch.manual_seed(arguments.seed)
    reference = wheel_reference(14 if arguments.quick else 28)
    pictures = reference.pictures
    model = ParScaleEAR.from_pretrained(device=device)
    dtype = model.dtype

    counts = model.parameter_count()
    gflop = counted_gflop(model)
    precision = {name: precision_figures(device, pictures, name) for name in get_args(Decoder)}
    with torch.inference_mode():
        images = from_uint8(pictures.to(device)).to(dtype)
        latent = model.encode(images).mode().float()
    spread = latent.transpose(0, 1).flatten(1).std(dim=1)
    with peak_memory_mib(device) as peak:
        _forward(model, images[:1].expand(16, -1, -1, -1))

    litevae = counts["encoder"] + counts["decoder"]
    targets = [
        *shape_targets(model),
        *identity_targets(model, pictures[:4]),
        ci.at_least("LiteVAE parameters", litevae, 0.95 * LITEVAE_PARAMETERS),
        ci.at_most("LiteVAE parameters", litevae, 1.05 * LITEVAE_PARAMETERS),
        ci.at_least("hybrid parameters", counts["hybrid"], 0.95 * HYBRID_PARAMETERS),
        ci.at_most("hybrid parameters", counts["hybrid"], 1.05 * HYBRID_PARAMETERS),
        ci.at_most("cost of one image", gflop, MOST_GFLOP, "GFLOP"),
        ci.holds("flops() equals PyTorch's count", abs(model.flops() / 1e9 - gflop) < 1e-6),
        *precision_targets(precision),
        ci.at_least("least deviation of a latent channel", float(spread.min()), 0.25),
        ci.at_most("largest deviation of a latent channel", float(spread.max()), 4.0),
        _memory_target(peak[0], device),
    ]
    figures = {
        "parameters": counts,
        "gflop_per_image": gflop,
        "precision": precision,
        "latent_deviation": {
            "least": float(spread.min()),
            "mean": float(spread.mean()),
            "largest": float(spread.max()),
        },
        "peak_memory_mib": peak[0],
        "reference": reference.as_dict(),
    }
    fields = ci.common_fields(device, dtype, arguments.seed)
    return ci.finish("M2-1", "sanity", arguments, fields, {"batch_size": 4}, figures, targets)


def _memory_target(peak: float | None, device: torch.device) -> ci.Target:
    name = "peak memory on CUDA (forward by batches of 4)"
    if peak is None:
        return ci.skipped(name, f"measured on {device.type}, not on CUDA", "≤ 512 MiB")
    return ci.at_most(name, peak, MOST_PEAK_MIB, "MiB")


if __name__ == "__main__":
    sys.exit(ci.run(main))

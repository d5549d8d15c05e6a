"""Quality at several sizes, and what the latent is like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ci import _common as ci
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.reconstruct import reconstruct_pictures
from parscale_ear.data.images import from_uint8, to_uint8
from parscale_ear.data.reference import wheel_squares
from parscale_ear.metrics.reconstruction import psnr, ssim

NOISE = (0.05, 0.1, 0.2)  # σ on the normalised latent
TILE = 256  # pixels


def size_figures(device: torch.device, sides: Sequence[int]) -> list[dict[str, Any]]:
    """PSNR and SSIM of both decoders on squares of several sizes, and the error of tiling."""
    rows = []
    models = {
        decoder: ParScaleEAR.from_pretrained(decoder=decoder, device=device, dtype=torch.float32)  # type: ignore[arg-type]
        for decoder in ("faithful", "sharp")
    }
    for side in sides:
        pictures, source = wheel_squares(side)
        row: dict[str, Any] = {"side": side, "pictures": len(pictures), "source": source}
        for decoder, model in models.items():
            with ci.progress(len(pictures), f"{decoder} at {side}×{side}") as advance:
                restored = reconstruct_pictures(
                    model, pictures, batch_size=max(1, 8 * 256**2 // side**2), progress=advance
                )
            row[decoder] = {
                "psnr_db": float(np.mean(psnr(restored, pictures))),
                "ssim": float(np.mean(ssim(restored, pictures))),
            }
        # In smaller pictures a tile with its margins is the whole picture.
        tile = row["tile"] = min(TILE, side // 2) if side >= TILE else None
        images = from_uint8(pictures[:1]).to(device)
        with torch.inference_mode():
            row["tile_error"] = tile and max(
                float((model(images) - model(images, tile=tile)).abs().max())
                for model in models.values()
            )
        rows.append(row)
    return rows


@torch.inference_mode()
def latent_figures(device: torch.device, pictures: Tensor) -> dict[str, Any]:
    """KL, statistics a channel, and how PSNR falls with noise on the latent."""
    model = ParScaleEAR.from_pretrained(device=device, dtype=torch.float32)
    latents: list[Tensor] = []
    kl: list[Tensor] = []
    values: dict[str, list[float]] = {f"{sigma:g}": [] for sigma in (0.0, *NOISE)}
    generator = torch.Generator().manual_seed(0)
    with ci.progress(len(pictures), "noise on the latent") as advance:
        for part in pictures.split(8):
            posterior = model.encode(from_uint8(part).to(device))
            latent = posterior.mode()
            latents.append(latent.cpu())
            kl.append(posterior.kl().mean(dim=(0, 2, 3)).cpu() * len(part))
            for sigma in values:
                noise = torch.randn(latent.shape, generator=generator).to(latent)
                restored = model.decode(model.enhance(latent + float(sigma) * noise))
                values[sigma] += psnr(to_uint8(restored).cpu(), part).tolist()
            advance(len(part))
    channels = torch.cat(latents).transpose(0, 1).flatten(1)  # (Z, positions)
    return {
        "kl_nats_per_channel": (torch.stack(kl).sum(0) / len(pictures)).tolist(),
        "mean_per_channel": channels.mean(1).tolist(),
        "deviation_per_channel": channels.std(1).tolist(),
        "psnr_db_under_noise": {sigma: float(np.mean(v)) for sigma, v in values.items()},
    }


def size_rows(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of a table of ``size_figures``."""
    return [
        (
            f"{row['side']}×{row['side']}",
            str(row["pictures"]),
            f"{row['faithful']['psnr_db']:.2f}",
            f"{row['faithful']['ssim']:.4f}",
            f"{row['sharp']['psnr_db']:.2f}",
            f"{row['sharp']['ssim']:.4f}",
            "" if row["tile"] is None else f"{row['tile_error']:.1e} (tile {row['tile']})",
        )
        for row in rows
    ]


SIZE_HEAD = (
    *("size", "pictures", "faithful: PSNR, dB", "SSIM", "sharp: PSNR, dB", "SSIM"),
    "tiles against the whole",
)


def latent_line(figures: Mapping[str, Any]) -> str:
    """One line about the latent."""
    kl, mean, spread = (figures[f"{key}_per_channel"] for key in ("kl_nats", "mean", "deviation"))
    falls = ", ".join(f"σ {k}: {v:.2f}" for k, v in figures["psnr_db_under_noise"].items())
    return (
        f"KL {np.mean(kl):.2f} nats an element ({min(kl):.2f} to {max(kl):.2f} by channel), mean "
        f"{min(mean):+.2f} to {max(mean):+.2f}, deviation {min(spread):.2f} to {max(spread):.2f}; "
        f"PSNR in dB with Gaussian noise on the latent: {falls}"
    )


def print_quality(sizes: Sequence[Mapping[str, Any]], latent: Mapping[str, Any]) -> None:
    """Prints both for people."""
    ci.table(SIZE_HEAD, size_rows(sizes))
    print(latent_line(latent))

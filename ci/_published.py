"""Published figures of image tokenizers, for a table beside ours. They are not our measurements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One tokenizer; PSNR and SSIM on ImageNet validation at 256×256 as its source has them."""

    name: str
    latent: str  # f: pixels a position stands for, each way; c: channels
    psnr_db: float
    ssim: float
    source: str
    parameters_m: float | None = None  # millions; None: not stated where we looked
    gflop: float | None = None  # of one 256×256 image there and back; None: not counted
    counted: str = ""  # how the FLOPs were counted


KL_F16 = "diffusers' AutoencoderKL with widths 128·(1, 1, 2, 2, 4), no attention at 16×16"

TOKENIZERS = (
    Published("LDM", "f16c32", 28.59, 0.80, "AToken, arXiv 2509.14476", 70.0, 386.8, KL_F16),
    Published("VA-VAE", "f16c32", 27.96, 0.79, "arXiv 2501.01423", 70.0, 386.8, KL_F16),
    Published(
        *("SD-VAE", "f8c4", 26.26, 0.745, "AToken, arXiv 2509.14476", 83.7, 894.9),
        "diffusers' AutoencoderKL with Stable Diffusion's widths",
    ),
    Published("MAR KL-16", "f16c16", 26.18, 0.715, "AToken, arXiv 2509.14476", 66.0, 386.8, KL_F16),
    Published("LiteVAE-B", "f8c4", 26.02, 0.74, "arXiv 2405.14477"),
    Published("DC-AE", "f32c32", 23.85, 0.66, "arXiv 2410.10733"),
)

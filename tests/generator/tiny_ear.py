"""A tiny EnergyAR that the tests of several files use."""

from __future__ import annotations

import torch

from parscale_ear.generator.ear import EnergyAR
from parscale_ear.generator.ear_config import EARConfig
from parscale_ear.generator.streams import ParallelStreams

NAMES = ("tench", "English springer", "golf ball")
CONFIG = EARConfig(
    depth=2, width=32, heads=2, head_width=24, head_blocks=2, noise_channels=8, channels=4, side=8,
    class_names=NAMES,
)  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(config: EARConfig) -> EnergyAR:
    """Fresh weights, made lively: labels, context and noise all show in what is drawn."""
    torch.manual_seed(0)
    model = EnergyAR(config).eval()
    model.pyramid.fit(torch.randn(64, 4, 8, 8, generator=seeded()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4 if "embedding" in name or name.endswith("start") else 1.5)
    return model


def lively(model: EnergyAR, count: int) -> ParallelStreams:
    torch.manual_seed(1)
    streams = ParallelStreams.fitting(model.config.transformer, count, prefix_tokens=3)
    with torch.no_grad():
        for parameter in streams.parameters():
            parameter.normal_()
    return streams.eval()

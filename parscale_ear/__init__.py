"""ParScale-EAR: a light-weight image tokenizer, a generator, and the tools that validate them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.18.0"

__all__ = [
    "VAR",
    "CheckpointError",
    "EARConfig",
    "EnergyAR",
    "HybridConfig",
    "LatentDataset",
    "LiteVAEConfig",
    "ParScaleEAR",
    "ParScaleEARConfig",
    "ParallelStreams",
    "VARConfig",
    "__version__",
    "benchmark_model_precise",
]

if TYPE_CHECKING:
    from parscale_ear.autoencoder.config import ParScaleEARConfig
    from parscale_ear.autoencoder.hybrid import HybridConfig
    from parscale_ear.autoencoder.litevae import LiteVAEConfig
    from parscale_ear.autoencoder.model import ParScaleEAR
    from parscale_ear.checkpoint import CheckpointError
    from parscale_ear.data.latents import LatentDataset
    from parscale_ear.generator.ear import EnergyAR
    from parscale_ear.generator.ear_config import EARConfig
    from parscale_ear.generator.streams import ParallelStreams
    from parscale_ear.generator.var import VAR, VARConfig
    from parscale_ear.profiling.latency import benchmark_model_precise

_HOMES = {
    "CheckpointError": "parscale_ear.checkpoint",
    "EARConfig": "parscale_ear.generator.ear_config",
    "EnergyAR": "parscale_ear.generator.ear",
    "HybridConfig": "parscale_ear.autoencoder.hybrid",
    "LatentDataset": "parscale_ear.data.latents",
    "LiteVAEConfig": "parscale_ear.autoencoder.litevae",
    "ParScaleEAR": "parscale_ear.autoencoder.model",
    "ParScaleEARConfig": "parscale_ear.autoencoder.config",
    "ParallelStreams": "parscale_ear.generator.streams",
    "VAR": "parscale_ear.generator.var",
    "VARConfig": "parscale_ear.generator.var",
    "benchmark_model_precise": "parscale_ear.profiling.latency",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that ``parscale-ear --help`` is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, also those that were not used yet."""
    return sorted({*globals(), *__all__})

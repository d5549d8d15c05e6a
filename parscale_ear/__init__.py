"""ParScale-EAR: a light-weight wavelet image tokenizer, and the tools that validate it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.4.0"

__all__ = [
    "CheckpointError",
    "LatentDataset",
    "ParScaleEAR",
    "ParScaleEARConfig",
    "__version__",
    "benchmark_model_precise",
]

if TYPE_CHECKING:
    from parscale_ear.autoencoder.config import ParScaleEARConfig
    from parscale_ear.autoencoder.model import ParScaleEAR
    from parscale_ear.checkpoint import CheckpointError
    from parscale_ear.data.latents import LatentDataset
    from parscale_ear.profiling.latency import benchmark_model_precise

_HOMES = {
    "CheckpointError": "parscale_ear.checkpoint",
    "ParScaleEAR": "parscale_ear.autoencoder.model",
    "LatentDataset": "parscale_ear.data.latents",
    "ParScaleEARConfig": "parscale_ear.autoencoder.config",
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

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from parscale_ear import EARConfig, HybridConfig, LiteVAEConfig, VARConfig
from parscale_ear.autoencoder.evaluation import EvaluationOptions
from parscale_ear.autoencoder.latent_cache import CacheOptions
from parscale_ear.checks import check_whole
from parscale_ear.generator.streams import StreamsConfig


@pytest.mark.parametrize("value", [2.0, "2", None, True, float("nan")])
def test_whole_numbers_alone(value: object) -> None:
    with pytest.raises(ValueError, match=f"count must be a whole number, got {value!r}"):
        check_whole(0, count=value)


def test_the_least_is_allowed_and_no_less() -> None:
    check_whole(2, a=2, b=np.int64(3))
    with pytest.raises(ValueError, match="b must be at least 2, got 1"):
        check_whole(2, a=2, b=np.int64(1))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (lambda x: EARConfig(class_names=("a",), depth=x), "depth"),
        (lambda x: EARConfig(class_names=("a",), side=x), "side"),
        (lambda x: EARConfig(class_names=("a",), noise_channels=x), "noise_channels"),
        (lambda x: VARConfig(depth=x), "depth"),
        (lambda x: VARConfig(classes=x), "classes"),
        (lambda x: HybridConfig(coarse_width=x), "coarse_width"),
        (lambda x: LiteVAEConfig(latent_channels=x), "latent_channels"),
        (lambda x: StreamsConfig(count=2, depth=x, width=4, heads=1), "depth"),
        (lambda x: EvaluationOptions(batch=x), "batch"),
        (lambda x: CacheOptions(side=x), "side"),
    ],
)
def test_sizes_are_whole_numbers(config: Callable[[Any], object], field: str) -> None:
    for value in (32.0, "32", None):
        with pytest.raises(ValueError, match=f"{field} must be a whole number"):
            config(value)


def test_a_dtype_by_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype must be fp32, fp16 or bf16, got None"):
        EvaluationOptions(dtype=None)  # type: ignore[arg-type]

"""What only a GPU can show; SKIPPED elsewhere."""

from __future__ import annotations

import pytest
import torch

from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.profiling.latency import benchmark_model_precise
from parscale_ear.profiling.memory import peak_memory_mib

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="SKIPPED: no CUDA device")


@pytest.fixture(scope="module")
def model() -> ParScaleEAR:
    return ParScaleEAR.from_pretrained(device="cuda")


@pytest.fixture
def images() -> torch.Tensor:
    return (torch.rand(2, 3, 256, 256) * 2 - 1).to("cuda", torch.float16)


def test_half_is_the_default(model: ParScaleEAR) -> None:
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_nothing_waits_for_the_device(model: ParScaleEAR, images: torch.Tensor) -> None:
    with torch.inference_mode():
        model(images)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(images)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_gives_the_same(model: ParScaleEAR, images: torch.Tensor) -> None:
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(images)
        images.neg_()
        graph.replay()
        torch.testing.assert_close(captured, model(images))


def test_a_cpu_generator_gives_the_same_noise_everywhere(images: torch.Tensor) -> None:
    noises = []
    for device in ("cpu", "cuda"):
        model = ParScaleEAR.from_pretrained(device=device, dtype=torch.float32)
        posterior = model.encode(images.to(device, torch.float32))
        sample = posterior.sample(torch.Generator().manual_seed(3))
        noises.append(((sample - posterior.mean) / (0.5 * posterior.log_variance).exp()).cpu())
    torch.testing.assert_close(noises[0], noises[1], atol=0.05, rtol=0.05)


def test_the_wrong_device_is_refused(model: ParScaleEAR) -> None:
    with pytest.raises(ValueError, match="model's device, cuda:0, got cpu"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.float16))


def test_benchmark_and_memory(model: ParScaleEAR) -> None:
    result = benchmark_model_precise(model, "cuda", 16, 10)
    assert result["dtype"] == "float16"
    assert result["peak_memory_mib"] > 16 * 3 * 256 * 256 * 2 / 2**20
    with peak_memory_mib("cuda") as peak:
        block = torch.empty(2**20, device="cuda", dtype=torch.uint8)
        del block
    assert peak[0] is not None
    assert peak[0] >= 1

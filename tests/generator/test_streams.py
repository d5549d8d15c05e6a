"""P streams in one pass: what they share, what they cost, what they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_var import count_rows, draw, lively_streams
from torch import Tensor

from parscale_ear import checkpoint
from parscale_ear.checkpoint import CheckpointError
from parscale_ear.generator.streams import ParallelStreams, StreamsConfig
from parscale_ear.generator.transformer import TransformerConfig
from parscale_ear.generator.var import VAR


@pytest.mark.parametrize("mode", ["diverse", "aggregate"])
def test_one_stream_is_the_plain_model_bit_for_bit(var: VAR, mode: str) -> None:
    streams = ParallelStreams.fitting(var.transformer.config, 1)
    assert not list(streams.parameters())
    assert streams.prefix_tokens == 0
    plain = draw(var, 0)
    one = draw(var, 0, streams=streams, mode=mode)
    assert torch.equal(one if mode == "aggregate" else one[:, 0], plain)
    assert torch.equal(draw(var, 0, streams=1)[:, 0], plain)
    tokens = [torch.zeros(1, side * side, dtype=torch.long) for side in (1, 2, 3, 4)]
    assert torch.equal(var.logits([3], tokens, streams=streams), var.logits([3], tokens))


@pytest.mark.parametrize("mode", ["diverse", "aggregate"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_block_runs_once_a_scale_whatever_the_streams(
    var: VAR, count: int, mode: str
) -> None:
    streams = lively_streams(var, count, prefix_tokens=5)
    calls = count_rows(var, lambda: var.generate([3, 7], streams=streams, mode=mode))  # type: ignore[arg-type]
    rows = var.rows(2, streams=count, mode=mode)  # type: ignore[arg-type]
    assert calls == [[rows] * 4] * 3
    assert rows == (4 * count if mode == "diverse" else 2 * count + 2)
    without = count_rows(
        var,
        lambda: var.generate([3, 7], guidance=0, streams=streams, mode=mode),  # type: ignore[arg-type]
    )
    assert without == [[2 * count] * 4] * 3


def test_modes(var: VAR) -> None:
    streams = lively_streams(var, 3)
    several = var.generate([3, 7], streams=streams, generator=torch.Generator().manual_seed(0))
    assert several.shape == (2, 3, 3, 64, 64)
    assert not torch.equal(several[:, 0], several[:, 1])
    joined = var.generate(
        [3, 7], streams=streams, mode="aggregate", generator=torch.Generator().manual_seed(0)
    )
    assert joined.shape == (2, 3, 64, 64)
    # Prefixes differ, so arg-max pictures of two streams do, too; those of plain streams do not.
    greedy = var.generate([3], streams=streams, top_k=1)
    assert not torch.equal(greedy[:, 0], greedy[:, 1])
    plain = var.generate([3], streams=3, top_k=1)
    assert torch.equal(plain[:, 0], plain[:, 1])
    torch.testing.assert_close(plain[:, 0], var.generate([3], top_k=1), atol=1e-3, rtol=0)


def test_fresh_streams_differ_at_once(var: VAR) -> None:
    """Streams that start alike would learn alike."""
    streams = ParallelStreams.fitting(var.transformer.config, 2)
    greedy = var.generate([3], streams=streams, top_k=1)
    assert not torch.allclose(greedy[:, 0], greedy[:, 1], atol=0.01)


def each_alone(var: VAR, streams: ParallelStreams, number: int) -> ParallelStreams:
    """Two copies of one stream."""
    twice = ParallelStreams.fitting(var.transformer.config, 2, prefix_tokens=streams.prefix_tokens)
    assert twice.prefix is not None
    assert streams.prefix is not None
    with torch.no_grad():
        twice.prefix.copy_(streams.prefix[:, :, [number, number]])
    return twice


def test_streams_do_not_see_each_other(var: VAR) -> None:
    streams = lively_streams(var, 3, prefix_tokens=5)
    greedy = var.generate([3, 7], streams=streams, top_k=1)  # (B, P, 3, H, W)
    for number in range(3):
        alone = var.generate([3, 7], streams=each_alone(var, streams, number), top_k=1)
        torch.testing.assert_close(alone[:, 0], greedy[:, number], atol=1e-3, rtol=0)


@pytest.mark.parametrize("mode", ["diverse", "aggregate"])
def test_cached_and_uncached_streams_agree(load: Callable[..., VAR], kind: str, mode: str) -> None:
    var = load(kind)
    streams = lively_streams(var, 3, prefix_tokens=5)
    cached: list[Tensor] = []
    tokens, _ = var.generate_tokens(
        [3, 7],
        guidance=0,
        top_k=1,
        streams=streams,
        mode=mode,  # type: ignore[arg-type]
        on_logits=lambda _, found: cached.append(found),
    )
    shared = tokens if mode == "aggregate" else [part[::3] for part in tokens]  # stream 0's
    maps = var.vqvae.quantizer.teacher_input(shared)
    with torch.no_grad():
        whole = var.logits_from_maps(torch.tensor([3, 7]), maps, streams, each=True)
    expected = whole[:, 0] if mode == "aggregate" else whole[:, 1]
    for (first, last), part in zip(var.config.transformer.spans(), cached, strict=True):
        found = part if mode == "aggregate" else part[::3]
        torch.testing.assert_close(found, expected[:, first:last], atol=1e-4, rtol=1e-4)
    if mode == "aggregate":
        direct = var.logits([3, 7], tokens, streams=streams)
        torch.testing.assert_close(direct, expected, atol=1e-5, rtol=1e-5)


def test_each_stream_needs_streams(var: VAR) -> None:
    tokens, _ = var.generate_tokens([3, 7], guidance=0)
    maps = var.vqvae.quantizer.teacher_input(tokens)
    with pytest.raises(ValueError, match="give streams or leave it out"):
        var.logits_from_maps(torch.tensor([0, 1]), maps, each=True)


def test_weights_are_smoothed_and_sum_to_one() -> None:
    config = TransformerConfig(depth=1, width=8, heads=2, counts=(1, 4))
    streams = ParallelStreams.fitting(config, 4, smoothing=0.2)
    hidden = torch.randn(2, 4, 5, 8)
    equal = streams.weights(hidden)  # (N, P, T)
    torch.testing.assert_close(equal, torch.full((2, 4, 5), 0.25))
    torch.testing.assert_close(streams.aggregate(hidden), hidden.mean(1))
    assert streams.mixer is not None
    with torch.no_grad():
        streams.mixer[-1].bias.copy_(torch.tensor([100.0, 0, 0, 0]))
    weights = streams.weights(hidden)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 5))
    torch.testing.assert_close(weights[:, 0], torch.full((2, 5), 0.8 + 0.05))
    torch.testing.assert_close(weights[:, 1], torch.full((2, 5), 0.05))


def test_prefix_is_stored_once_and_written_once(var: VAR) -> None:
    streams = lively_streams(var, 3, prefix_tokens=5)
    assert streams.prefix is not None
    assert streams.prefix.shape == (2, 3, 3, 3, 5, 32)
    cache = var.transformer.new_cache(6, 5)
    streams.fill(cache, torch.tensor([0, 1, 2, 0, 1, 2]))
    assert cache.length == 5
    slots = cache.slots[..., :5, :]
    assert torch.equal(slots[:, :, :3], slots[:, :, 3:])
    torch.testing.assert_close(slots[1, :, :3], streams.prefix[1].detach())
    norms = slots[0].norm(dim=-1)  # keys are unit vectors where the backbone's are
    torch.testing.assert_close(norms, torch.ones_like(norms))
    with pytest.raises(ValueError, match="empty cache"):
        streams.fill(cache, torch.tensor([0, 1, 2, 0, 1, 2]))
    with pytest.raises(ValueError, match="6 rows"):
        streams.fill(var.transformer.new_cache(6, 5), torch.tensor([0, 1]))


def test_every_parameter_of_the_streams_gets_a_gradient(
    load: Callable[..., VAR], kind: str
) -> None:
    var = load(kind).requires_grad_(False)
    streams = lively_streams(var, 2, prefix_tokens=4)
    tokens = [torch.randint(64, (2, side * side)) for side in (1, 2, 3, 4)]
    maps = var.vqvae.quantizer.teacher_input(tokens)
    var.logits_from_maps(torch.tensor([3, 10]), maps, streams).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in streams.parameters())


def test_save_and_load(var: VAR, tmp_path: Path) -> None:
    streams = lively_streams(var, 2, prefix_tokens=4)
    path = streams.save_pretrained(tmp_path / "streams.safetensors")
    assert streams.save_pretrained(tmp_path / "folder").name == "model.safetensors"
    loaded = ParallelStreams.from_pretrained(tmp_path / "folder")
    assert torch.equal(draw(var, 0, streams=loaded), draw(var, 0, streams=streams))
    assert not loaded.training
    with pytest.raises(CheckpointError, match="of kind ParallelStreams, expected VAR"):
        VAR.from_pretrained(path)


@pytest.mark.parametrize("change", [{"unheard_of": 1}, {"count": 0}, {"count": 3}])
def test_a_config_that_does_not_fit_the_file_is_named(
    var: VAR, tmp_path: Path, change: dict[str, int]
) -> None:
    streams, path = lively_streams(var, 2), tmp_path / "streams.safetensors"
    config = {**asdict(streams.config), **change}
    checkpoint.save(path, streams.state_dict(), kind="ParallelStreams", config=config)
    with pytest.raises(CheckpointError, match=r"streams\.safetensors: .*(unheard_of|streams|size)"):
        ParallelStreams.from_pretrained(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "streams must be at least 1"),
        ({"prefix_tokens": -1}, "prefix_tokens must be at least 0"),
        ({"smoothing": 1.0}, "smoothing must be"),
        ({"width": 7}, "multiple of heads"),
    ],
)
def test_config_names_a_bad_field(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamsConfig(**{"count": 2, "depth": 1, "width": 8, "heads": 2, **values})  # type: ignore[arg-type]


def test_streams_of_another_training_are_refused(var: VAR, tmp_path: Path) -> None:
    path = lively_streams(var, 2).save_pretrained(
        tmp_path / "streams.safetensors", backbone=var.fingerprint()
    )
    ParallelStreams.from_pretrained(path, backbone=var.fingerprint())
    with torch.no_grad():
        var.transformer.start[0, 0] += 1
    with pytest.raises(CheckpointError, match="trained on another backbone"):
        ParallelStreams.from_pretrained(path, backbone=var.fingerprint())


@pytest.mark.parametrize("mode", ["diverse", "aggregate"])
def test_streams_in_fp32_serve_a_backbone_in_bf16(load: Callable[..., VAR], mode: str) -> None:
    var = load("l2", dtype=torch.bfloat16)
    streams = lively_streams(var, 2)
    assert bool(torch.isfinite(draw(var, 0, streams=streams, mode=mode)).all())
    tokens = [torch.zeros(1, side * side, dtype=torch.long) for side in (1, 2, 3, 4)]
    with torch.inference_mode():
        exact, found = (m.logits([3], tokens, streams=streams) for m in (load("l2"), var))
    assert float((found - exact).square().mean() / exact.var()) < 5e-4


def test_streams_of_another_backbone_are_refused(var: VAR) -> None:
    other = TransformerConfig(depth=2, width=96, heads=3, counts=(1, 4))
    streams = ParallelStreams.fitting(other, 2)
    with pytest.raises(ValueError, match="depth 2 instead of 3"):
        var.generate([3], streams=streams)
    tokens = [torch.zeros(1, side * side, dtype=torch.long) for side in (1, 2, 3, 4)]
    with pytest.raises(ValueError, match="another backbone"):
        var.logits([3], tokens, streams=streams)
    assert ParallelStreams.fitting(other, 1).check_fits(var.transformer.config) is None
    plain = ParallelStreams.fitting(replace(var.transformer.config, l2_norm=False), 2)
    with pytest.raises(ValueError, match="l2_norm False instead of True"):
        var.generate([3], streams=plain)


def test_streams_on_another_device_are_refused(var: VAR) -> None:
    with pytest.raises(ValueError, match=r'on meta, the backbone on cpu; .*streams\.to\("cpu"\)'):
        var.generate([3], streams=lively_streams(var, 2).to("meta"))


def test_one_stream_has_all_the_weight() -> None:
    config = TransformerConfig(
        width=32, depth=2, heads=2, counts=(1, 4), classes=3, input_channels=4
    )
    streams = ParallelStreams.fitting(config, 1)
    assert torch.equal(streams.weights(torch.randn(2, 1, 5, 32)), torch.ones(2, 1, 5))

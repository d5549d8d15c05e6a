from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_ear import CONFIG, NAMES, build, lively, seeded
from torch.utils.flop_counter import FlopCounterMode

from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.generator.base import Mode, Rows
from parscale_ear.generator.ear import EnergyAR, LatentEvent
from parscale_ear.generator.ear_config import EARConfig, find_class


def test_generation_is_what_teaching_says(model: EnergyAR) -> None:
    """Scale by scale through the cache, the hidden states are those of all scales at once."""
    hidden: list[torch.Tensor] = []
    hook = model.head.hidden.register_forward_hook(lambda _, inputs, __: hidden.append(inputs[0]))
    latents = model.generate_latents([0, 2], guidance=0, generator=seeded())
    hook.remove()
    # The head is called once for the mean, then three times a scale: take each scale's first.
    drawn = torch.cat([hidden[0], *hidden[1::3]], dim=1)
    taught = model.teach(torch.tensor([0, 2]), model.pyramid.teacher_input(latents))
    torch.testing.assert_close(drawn, taught, atol=2e-4, rtol=1e-3)


def test_generation_is_deterministic_and_depends_on_label_and_seed(model: EnergyAR) -> None:
    first, again, seed, label = (
        model.generate_latents([k], generator=seeded(s))
        for k, s in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert first.shape == (1, 4, 8, 8)
    assert torch.equal(first, again)
    assert not torch.allclose(first, seed, atol=1e-2)
    assert not torch.allclose(first, label, atol=1e-2)


def test_blocks_run_once_a_scale(model: EnergyAR) -> None:
    calls = []
    for block in model.transformer.layers():
        block.register_forward_hook(lambda *_: calls.append(1))
    modes: list[Mode] = ["diverse", "aggregate"]
    for streams in (None, 4, lively(model, 3)):
        for mode in modes[: 1 if isinstance(streams, int) else 2]:
            calls.clear()
            model.generate_latents([0, 1], streams=streams, mode=mode, generator=seeded())
            assert len(calls) == len(model.pyramid.scales) * CONFIG.depth


def test_one_stream_is_the_plain_model(model: EnergyAR) -> None:
    plain = model.generate_latents([0, 1], generator=seeded())
    one = lively(model, 1)
    assert sum(p.numel() for p in one.parameters()) == 0
    for mode in ("diverse", "aggregate"):
        found = model.generate_latents([0, 1], streams=one, mode=mode, generator=seeded())  # type: ignore[arg-type]
        assert torch.equal(found, plain)


def test_streams_draw_different_latents(model: EnergyAR) -> None:
    found = model.generate_latents([0], streams=3, generator=seeded())
    assert found.shape == (3, 4, 8, 8)
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    joined = model.generate_latents(
        [0], streams=lively(model, 3), mode="aggregate", generator=seeded()
    )
    assert joined.shape == (1, 4, 8, 8)


def test_guidance_without_weight_computes_no_unconditional_rows(model: EnergyAR) -> None:
    rows: list[int] = []
    model.transformer.layers()[0].register_forward_hook(
        lambda _, inputs, __: rows.append(len(inputs[0]))
    )
    model.generate_latents([0, 1], guidance=0, generator=seeded())
    assert set(rows) == {2}
    rows.clear()
    model.generate_latents([0, 1], guidance=1, generator=seeded())
    assert set(rows) == {4}
    rows.clear()
    model.generate_latents([None, None], guidance=1, generator=seeded())
    assert set(rows) == {2}


def test_guidance_moves_away_from_no_label(model: EnergyAR) -> None:
    plain, guided = (
        model.generate_latents([0], guidance=g, generator=seeded()) for g in (0.0, 3.0)
    )
    # The first scale has no guidance yet, so the mean is the same.
    torch.testing.assert_close(plain.mean((2, 3)), guided.mean((2, 3)), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, guided, atol=1e-2)


def test_guidance_rises_over_the_scales(model: EnergyAR, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the hidden states, from 0 at the first scale to its whole weight at the last."""
    plain, found = Rows.settle, []

    def settle(self: Rows, *arguments: Any) -> torch.Tensor:
        states = plain(self, *arguments)
        transformer, hidden, condition, share = arguments
        conditional, unconditional = transformer.output_norm(hidden, condition).chunk(2)
        expected = conditional + 3.0 * share * (conditional - unconditional)
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
        found.append(share)
        return states

    monkeypatch.setattr(Rows, "settle", settle)
    model.generate_latents([0, 2], guidance=3.0, generator=seeded())
    last = len(model.pyramid.scales) - 1
    assert found == pytest.approx([k / last for k in range(last + 1)])


def test_the_first_stream_speaks_for_no_label(model: EnergyAR) -> None:
    null = model.transformer.null_label
    joined = model.lay_out([1, 0], guidance=1.0, streams=lively(model, 3), mode="aggregate")
    assert joined.stream_of.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert joined.labels.tolist() == [1, 1, 1, 0, 0, 0, null, null]
    several = model.lay_out([1], guidance=1.0, streams=lively(model, 3), mode="diverse")
    assert several.stream_of.tolist() == [0, 1, 2, 0, 1, 2]
    assert several.labels.tolist() == [1, 1, 1, null, null, null]


def test_temperature_is_that_of_the_heads_noise(model: EnergyAR) -> None:
    def draw(temperature: float, seed: int) -> torch.Tensor:
        return model.generate_latents(
            [0, 1], guidance=0, temperature=temperature, generator=seeded(seed)
        )

    assert torch.equal(draw(0.0, 1), draw(0.0, 2))  # no noise, no chance
    spreads = [float((draw(t, 1) - draw(t, 2)).norm()) for t in (0.1, 0.5, 1.0)]
    assert 0 < spreads[0] < spreads[1] < spreads[2]


@pytest.mark.parametrize(
    "options",
    [{}, {"samples": 3}, {"alpha": 1.5}, {"temperature": 0.5}, {"input_noise": 0.4}],
)
def test_scores_are_the_heads_own(model: EnergyAR, options: dict[str, Any]) -> None:
    labels, latents = torch.tensor([0, 2]), torch.randn(2, 4, 8, 8, generator=seeded(4))
    found = model.scores(labels, latents, generator=seeded(5), **options)
    generator, rest = seeded(5), dict(options)
    noise = rest.pop("input_noise", 0.0)
    maps = model.pyramid.teacher_input(latents, noise, generator)
    parts = model.teach(labels, maps).split(model.pyramid.counts, dim=-2)
    tokens = model.pyramid.encode(latents)
    numbers = range(len(parts))
    for level in range(model.pyramid.levels):
        chosen = [k for k in numbers if model.pyramid.scales[k].level == level]
        expected = model.head.scores(
            torch.cat([parts[k] for k in chosen], dim=-2),
            torch.cat([tokens[k] for k in chosen], dim=-2),
            level=level,
            generator=generator,
            **rest,
        )
        assert torch.equal(torch.cat([found[k] for k in chosen], dim=-2), expected)
    if options:
        others = model.scores(labels, latents, generator=seeded(5))
        assert not torch.equal(found[-1], others[-1])


def test_two_generations_may_interleave(model: EnergyAR) -> None:
    expected = model.generate_latents([1], generator=seeded(1))
    inner: list[torch.Tensor] = []

    def interrupt(event: LatentEvent) -> None:
        if event.scale == 3:
            inner.append(model.generate_latents([1], generator=seeded(1)))

    outer = model.generate_latents([0], generator=seeded(0), callback=interrupt)
    assert torch.equal(inner[0], expected)
    assert torch.equal(outer, model.generate_latents([0], generator=seeded(0)))


def test_cache_is_as_large_as_said(model: EnergyAR) -> None:
    rows = model.lay_out([0, 1], guidance=1.0, streams=lively(model, 3), mode="aggregate")
    cache = rows.new_cache(model.transformer)
    said = model.kv_cache_bytes(2, streams=3, prefix=3, mode="aggregate")
    assert cache.nbytes == said


def test_scores_fall_when_trained(model: EnergyAR) -> None:
    torch.manual_seed(0)
    latents = torch.randn(16, 4, 8, 8) * 0.3 + 1.0
    labels = torch.arange(16) % 3
    optimizer = torch.optim.Adam(model.train().parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        scores = model.scores(labels, latents, generator=seeded(step), input_noise=0.1)
        assert [tuple(part.shape) for part in scores] == [
            (16, 1, 1), (16, 1, 3), *[(16, 4, 3)] * 5
        ]  # fmt: skip
        loss = torch.cat([part.flatten() for part in scores]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_scores_of_streams_reach_their_parameters(model: EnergyAR) -> None:
    streams = lively(model, 2)
    scores = model.scores(torch.tensor([0, 3]), torch.randn(2, 4, 8, 8), streams)
    torch.cat([part.flatten() for part in scores]).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in streams.parameters())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"labels": [3]}, "0..2"),
        ({"labels": []}, "at least one"),
        ({"labels": [0], "guidance": -1.0}, "guidance"),
        ({"labels": [0], "temperature": 1.5}, "temperature"),
        ({"labels": [0], "temperature": -0.5}, "temperature"),
        ({"labels": [0], "streams": 0}, "streams must be at least 1"),
        ({"labels": [0], "streams": 2, "mode": "aggregate"}, "trained streams"),
        ({"labels": [0], "mode": "both"}, "mode"),
    ],
)
def test_bad_arguments(model: EnergyAR, arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        model.generate_latents(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("guidance", [0, 2])
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 1e-3), (torch.float16, 3e-5)])
def test_half_precision_draws_about_the_same(
    model: EnergyAR, dtype: torch.dtype, most: float, guidance: float
) -> None:
    exact = model.generate_latents([0, 1], guidance=guidance, generator=seeded())
    found = copy.deepcopy(model).set_dtype(dtype)
    assert found.pyramid.mean0.dtype == torch.float32
    half = found.generate_latents([0, 1], guidance=guidance, generator=seeded())
    assert half.dtype == torch.float32
    assert float((half - exact).square().mean() / exact.square().mean()) < most


def test_double_precision_draws_the_same(model: EnergyAR) -> None:
    exact = model.generate_latents([0, 1], generator=seeded())
    twice = copy.deepcopy(model).double().generate_latents([0, 1], generator=seeded())
    assert twice.dtype == torch.float64
    torch.testing.assert_close(twice.float(), exact, atol=1e-3, rtol=1e-3)


def test_flops_equal_pytorchs_count(model: EnergyAR) -> None:
    # In BF16, as PyTorch's counter passes over the CPU's fused attention.
    model.set_dtype(torch.bfloat16)
    for streams in (1, 3):
        with FlopCounterMode(display=False) as counter:
            model.generate_latents([0, 1], streams=streams, guidance=1.0)
        assert counter.get_total_flops() == sum(model.flops(2, streams=streams))
    trained = lively(model, 3).to(torch.bfloat16)
    for guidance in (0.0, 1.0):
        with FlopCounterMode(display=False) as counter:
            model.generate_latents([0, 1], streams=trained, mode="aggregate", guidance=guidance)
        expected = model.flops(2, streams=3, prefix=3, mode="aggregate", guidance=guidance > 0)
        assert counter.get_total_flops() == sum(expected)


def test_every_streams_own_scores(model: EnergyAR) -> None:
    streams, latents = lively(model, 2), torch.randn(3, 4, 8, 8)
    labels = torch.tensor([0, 1, 2])
    both = model.scores(labels, latents, streams, each=True, generator=seeded())
    assert [tuple(part.shape) for part in both[:2]] == [(3, 3, 1, 1), (3, 3, 1, 3)]
    joined, own = (torch.cat([p[:, k].flatten() for p in both]).mean() for k in (0, 1))
    assert abs(float((joined - own).detach())) > 1e-4
    own.backward()
    assert streams.prefix is not None
    assert streams.prefix.grad is not None
    assert not streams.prefix.grad[:, :, 1].any()  # the first stream's own, alone


def test_damaged_weights(model: EnergyAR) -> None:
    with torch.no_grad():
        model.head.out[0].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        model.generate_latents([0])


def test_pictures_are_the_autoencoders_own(model: EnergyAR, tiny: ParScaleEAR) -> None:
    """Those of the enhanced latent, limited to what a picture can show."""
    model.attach(tiny)
    with torch.no_grad():
        for parameter in tiny.decoder.parameters():
            parameter.mul_(2)
        latents = torch.randn(2, 4, 8, 8)
        pictures = tiny.decode(tiny.enhance(latents))
        assert not torch.allclose(tiny.decode(latents), pictures, atol=0.1)
    assert float(pictures.abs().max()) > 1
    torch.testing.assert_close(model.decode(latents), pictures.clamp(-1, 1))


def test_the_autoencoder_moves_along_but_keeps_its_dtype(
    model: EnergyAR, tiny: ParScaleEAR
) -> None:
    model.attach(tiny).to("meta", torch.bfloat16)
    assert model.transformer.positions.dtype == torch.bfloat16
    assert {p.dtype for p in tiny.parameters()} == {torch.float32}
    assert {p.device.type for p in tiny.parameters()} == {"meta"}


def test_pictures_without_an_autoencoder_fail_before_the_work(model: EnergyAR) -> None:
    events: list[LatentEvent] = []
    with pytest.raises(ValueError, match="attach"):
        model.generate([0], callback=events.append)
    assert not events


def test_a_callback_sees_every_scale(model: EnergyAR) -> None:
    events: list[LatentEvent] = []
    latents = model.generate_latents([0, 2], generator=seeded(), callback=events.append)
    tokens = model.pyramid.encode(latents)
    assert [(event.scale, event.scales) for event in events] == [(k, 7) for k in range(7)]
    for event, part in zip(events, tokens, strict=True):
        torch.testing.assert_close(event.tokens, part, atol=1e-4, rtol=1e-4)


def test_a_damaged_decoder_draws_no_pictures(model: EnergyAR, tiny: ParScaleEAR) -> None:
    model.latent_fingerprint = tiny.latent_fingerprint()
    model.attach(tiny)
    assert model.generate([0], generator=seeded()).isfinite().all()
    assert tiny.decoder.bands2.bias is not None
    for value in (torch.nan, torch.inf):
        tiny.decoder.bands2.bias.data[:3] = value
        with pytest.raises(ValueError, match="decoded pictures were not finite"):
            model.generate([0], generator=seeded())


def test_class_names() -> None:
    assert find_class("golf ball", NAMES) == 2
    assert find_class("ENGLISH_springer", NAMES) == 1
    with pytest.raises(ValueError, match="near: 'golf ball'"):
        find_class("gulf ball", NAMES)
    assert find_class("golf_ball", ("tench", "golf_ball")) == 1
    assert [find_class(name, ("Crane", "crane")) for name in ("Crane", "crane")] == [0, 1]
    with pytest.raises(ValueError, match="near: 'Crane'"):
        find_class("CRANE", ("Crane", "crane"))
    with pytest.raises(ValueError, match="tench"):
        find_class("xyzzy", NAMES)


@pytest.mark.parametrize(
    ("field", "value"),
    [("side", 12), ("phases", 3), ("head_width", 0), ("class_names", ()), ("class_names", ("a", "a")),
     ("heads", 3)],
)  # fmt: skip
def test_bad_config(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field.split("_")[0]):
        EARConfig(**{**CONFIG.__dict__, field: value})


def test_what_the_weights_recommend_is_taken_where_nothing_is_said(model: EnergyAR) -> None:
    model.recommended = {"guidance": 3.0, "temperature": 0.5}

    def draw(**options: float) -> torch.Tensor:
        return model.generate_latents([0, 2], generator=seeded(), **options)

    assert torch.equal(draw(), draw(guidance=3.0, temperature=0.5))
    model.recommended = {"guidance": 3.0}
    assert torch.equal(draw(), draw(guidance=3.0, temperature=1.0))
    model.recommended["temperature"] = 0.5
    assert not torch.equal(draw(), draw(guidance=0.0))
    assert not torch.equal(draw(), draw(temperature=1.0))


def test_parameters_are_counted_apart(model: EnergyAR) -> None:
    counts = model.parameter_count()
    own = {
        name: sum(p.numel() for p in model.get_submodule(name).parameters())
        for name in ("transformer", "head")
    }
    assert counts == {**own, "total": sum(p.numel() for p in model.parameters())}


def test_draws_with_gradient_are_the_plain_draws(model: EnergyAR) -> None:
    plain = model.generate_latents([0, 2], guidance=0, generator=seeded())
    taped = model.draw_with_gradient(torch.tensor([0, 2]), generator=seeded())
    torch.testing.assert_close(taped.detach(), plain, atol=1e-5, rtol=1e-5)
    taped.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without, "every weight has a part in what is drawn"


def test_a_draw_goes_on_from_known_scales() -> None:
    model = build(CONFIG)
    labels = torch.tensor([0, 2])
    whole = model.draw_with_gradient(labels, generator=seeded()).detach()
    tokens = model.pyramid.encode(whole)
    for given in range(1, len(tokens)):
        found = model.draw_with_gradient(labels, seeded(), tokens[:given])
        again = model.pyramid.encode(found)
        for part, known in zip(again[:given], tokens[:given], strict=True):
            torch.testing.assert_close(part, known, atol=1e-4, rtol=1e-4)
        assert not any(
            torch.allclose(a, b) for a, b in zip(again[given:], tokens[given:], strict=True)
        )
        assert found.requires_grad
    for wrong in (tokens, tokens[1:2], [tokens[0][:1]]):
        with pytest.raises(ValueError, match="known must be tokens of fewer than"):
            model.draw_with_gradient(labels, seeded(), wrong)
    # What follows is drawn as if the model had drawn what is known.
    hidden = []
    hook = model.transformer.register_forward_hook(lambda _m, _a, out: hidden.append(out.detach()))
    model.draw_with_gradient(labels, generator=seeded())
    drawn = [*hidden]
    hidden.clear()
    model.draw_with_gradient(labels, seeded(), tokens[:-1])
    hook.remove()
    for a, b in zip(drawn, hidden, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_labels_and_latents_are_as_many(model: EnergyAR) -> None:
    with pytest.raises(ValueError, match="3 latents need as many labels"):
        model.scores(torch.tensor([0, 1]), torch.zeros(3, 4, 8, 8))


def test_an_autoencoder_of_other_channels_is_refused(model: EnergyAR) -> None:
    with pytest.raises(ValueError, match="draws latents of 4 channels, the autoencoder decodes 32"):
        model.attach(ParScaleEAR())


def test_one_name_is_no_list_of_names() -> None:
    with pytest.raises(ValueError, match="several names"):
        EARConfig(class_names="tench")  # type: ignore[arg-type]

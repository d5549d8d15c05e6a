"""Drawing with a VAR: what a user may rely on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_var import count_rows, draw, lively_streams
from torch import Tensor

from parscale_ear.generator.var import VAR, ScaleEvent

SCALES = range(4)


def test_generations_interleave_and_survive_exceptions(var: VAR) -> None:
    first, second = draw(var, 0), draw(var, 1)
    assert not torch.equal(first, second)
    inner: list[Tensor] = []

    def other(event: ScaleEvent) -> None:
        if event.scale == 1:
            inner.append(draw(var, 1))

    assert torch.equal(draw(var, 0, callback=other), first)
    assert torch.equal(inner[0], second)

    def fail(event: ScaleEvent) -> None:
        if event.scale == 2:
            raise RuntimeError("stopped")

    state = {k: v.clone() for k, v in var.state_dict().items()}
    with pytest.raises(RuntimeError, match="stopped"):
        draw(var, 0, callback=fail)
    assert torch.equal(draw(var, 0), first)
    assert all(torch.equal(v, state[k]) for k, v in var.state_dict().items())


def test_generation(var: VAR) -> None:
    images = var.generate([3, None, 7], generator=torch.Generator().manual_seed(0))
    assert images.shape == (3, 3, 64, 64)
    assert float(images.min()) >= -1
    assert float(images.max()) <= 1
    again = var.generate([3, None, 7], generator=torch.Generator().manual_seed(0))
    assert torch.equal(images, again)
    tensor = var.generate(torch.tensor([3, 7]), generator=torch.Generator().manual_seed(0))
    assert tensor.shape == (2, 3, 64, 64)


def test_no_unconditional_rows_without_guidance(var: VAR) -> None:
    for labels, guidance, rows in (([3, 7], 1.5, 4), ([3, 7], 0.0, 2), ([None, None], 1.5, 2)):
        calls = count_rows(var, lambda a=labels, g=guidance: var.generate(a, guidance=g))  # type: ignore[misc]
        assert calls == [[rows] * 4] * 3


@pytest.mark.parametrize("mode", ["diverse", "aggregate"])
def test_a_row_without_label_does_not_depend_on_its_neighbours(var: VAR, mode: str) -> None:
    streams = lively_streams(var, 2, prefix_tokens=4)
    options = {"streams": streams, "mode": mode, "top_k": 1}
    alone, beside = [], []
    var.generate_tokens([None], on_logits=lambda _, x: alone.append(x), **options)  # type: ignore[arg-type]
    var.generate_tokens([3, None], on_logits=lambda _, x: beside.append(x), **options)  # type: ignore[arg-type]
    rows = slice(2, 4) if mode == "diverse" else slice(1, 2)
    for scale in SCALES:
        torch.testing.assert_close(beside[scale][rows], alone[scale], atol=1e-4, rtol=1e-4)


def test_labels_of_any_integer_type(var: VAR) -> None:
    for labels in (np.array([3, 7]), (3, 7), torch.tensor([3, 7]), [np.int64(3), 7]):
        assert var.label_tensor(labels).tolist() == [3, 7]  # type: ignore[arg-type]


def test_the_global_generator_is_left_alone(var: VAR) -> None:
    trained = lively_streams(var, 2)
    before = torch.get_rng_state()
    for streams in (None, 3, trained):
        draw(var, 0, streams=streams)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_quantiser_works_in_fp32_under_autocast(var: VAR) -> None:
    latent = torch.randn(2, 8, 4, 4)
    quantizer = var.vqvae.quantizer
    plain = quantizer.encode(latent)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer.encode(latent)
        total = quantizer.decode(inside)
        _, loss = quantizer.quantise(latent)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert torch.equal(total, quantizer.decode(plain))
    assert torch.equal(loss, quantizer.quantise(latent)[1])


def test_callback_sees_every_scale(var: VAR) -> None:
    events: list[ScaleEvent] = []
    pictures: list[Tensor] = []

    def callback(event: ScaleEvent) -> None:
        events.append(event)
        pictures.append(event.render())

    last = draw(var, 0, callback=callback)
    assert [event.scale for event in events] == list(SCALES)
    assert [event.tokens.shape[1] for event in events] == [1, 4, 9, 16]
    assert torch.equal(pictures[-1], last)
    assert not torch.equal(pictures[0], last)


def test_top_k_and_top_p_limit_what_is_drawn(var: VAR) -> None:
    assert torch.equal(draw(var, 0, top_k=1), draw(var, 1, top_k=1))
    assert torch.equal(draw(var, 0, top_p=1e-6), draw(var, 0, top_k=1))
    assert not torch.equal(draw(var, 0, top_k=None, top_p=1.0), draw(var, 0, top_k=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [10]}, r"0\.\.9"),
        ({"labels": [-1]}, r"0\.\.9"),
        ({"labels": [1.0]}, r"0\.\.9"),
        ({"labels": []}, "at least one"),
        ({"labels": 3}, "at least one"),
        ({"labels": None}, "at least one"),
        ({"labels": ["dog"]}, r"0\.\.9"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": None}, "top_p must be above 0 and at most 1, got None"),
        ({"guidance": "2"}, "guidance must be at least 0 and finite, got '2'"),
        ({"top_p": 1.1}, "at most 1"),
        ({"top_k": -1}, "top_k must be at least 1"),
        ({"guidance": -0.1}, "guidance must be at least 0"),
        ({"guidance": float("nan")}, "guidance must be at least 0"),
        *(({"streams": bad}, "streams must be at least 1") for bad in (0, 2.0, "2", True)),
        ({"top_k": 5.5}, "top_k must be at least 1"),
        ({"streams": 2, "mode": "both"}, "'diverse' or 'aggregate'"),
        ({"streams": 2, "mode": "aggregate"}, "needs trained streams"),
    ],
)
def test_wrong_use_is_refused(var: VAR, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        var.generate(**{"labels": [3], **options})  # type: ignore[arg-type]


def test_logits_that_are_not_finite_are_refused(var: VAR) -> None:
    with torch.no_grad():
        var.transformer.layers()[1].mlp_out.bias[0] = torch.nan  # type: ignore[index]
    with pytest.raises(ValueError, match="not finite"):
        var.generate([3])
    shown: list[object] = []
    with pytest.raises(ValueError, match="not finite"):
        var.generate([3], callback=shown.append)
    assert not shown


def test_numbers_of_numpy_will_do(var: VAR) -> None:
    plain, same = (
        var.generate([3], streams=count, top_k=k, generator=torch.Generator().manual_seed(0))
        for count, k in ((2, 5), (np.int64(2), np.int64(5)))
    )
    assert torch.equal(plain, same)


def test_teacher_forcing_refuses_wrong_tokens(var: VAR) -> None:
    right = [torch.zeros(1, side * side, dtype=torch.long) for side in (1, 2, 3, 4)]
    with pytest.raises(ValueError, match="shapes"):
        var.logits([3], right[:3])
    with pytest.raises(ValueError, match=r"0\.\.63"):
        var.logits([3], [*right[:3], right[3] + 64])
    with pytest.raises(ValueError, match=r"0\.\.9"):
        var.logits([10], right)

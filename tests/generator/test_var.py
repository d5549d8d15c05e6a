"""VAR's logits against the authors' implementation and its eager twin; what it costs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from eager_var import eager_tokens
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from parscale_ear.generator import attention
from parscale_ear.generator.packing import PackedLinear, can_pack
from parscale_ear.generator.quantizer import MultiScaleQuantizer
from parscale_ear.generator.var import VAR

LOGITS_TOLERANCE = 1e-4  # FP32, against the authors' own figures
BF16_ERROR = 0.012  # relative, of teacher-forced logits
SCALES = range(4)


def tokens_of(vectors: dict[str, Tensor], what: str) -> list[Tensor]:
    return [vectors[f"{what}.tokens.{scale}"] for scale in SCALES]


def test_tokenizer_equals_the_authors(
    load: Callable[..., VAR], kind: str, vectors: dict[str, Tensor]
) -> None:
    vqvae = load(kind).vqvae
    with torch.no_grad():
        latent = vqvae.latent(vectors["in.image"])
        torch.testing.assert_close(latent, vectors["vqvae.latent"], atol=1e-5, rtol=1e-5)
        found = vqvae.encode(vectors["in.image"])
        for ours, theirs in zip(found, tokens_of(vectors, "vqvae"), strict=True):
            assert torch.equal(ours, theirs)
        restored = vqvae.decode(found)
    torch.testing.assert_close(restored, vectors["vqvae.reconstruction"], atol=1e-4, rtol=0)


def test_ten_scales_share_four_convolutions_as_the_authors_do() -> None:
    quantizer = MultiScaleQuantizer(1, 1, sides=range(1, 11), phis=4).requires_grad_(False)
    quantizer.codebook.weight.zero_()
    for number, phi in enumerate(quantizer.phi):
        phi.weight.zero_()
        phi.bias.fill_(2 * number)  # half of it is added
    added = [
        quantizer.contribution(scale, torch.zeros(1, side * side, dtype=torch.long))
        for scale, side in enumerate(quantizer.sides)
    ]
    assert [int(part.mean()) for part in added] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_an_observer_is_told_which_vectors_became_which_tokens(var: VAR) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    quantizer = var.vqvae.quantizer
    tokens = quantizer.encode(torch.randn(2, 8, 4, 4), lambda *told: seen.append(told))
    for (vectors, numbers), part in zip(seen, tokens, strict=True):
        assert torch.equal(numbers, part.flatten())
        nearest = torch.cdist(vectors, quantizer.codebook.weight).min(1).values
        own = (vectors - quantizer.codebook(numbers)).norm(dim=1)
        torch.testing.assert_close(own, nearest, atol=1e-3, rtol=1e-3)


def test_teacher_forced_logits_equal_the_authors(
    load: Callable[..., VAR], kind: str, vectors: dict[str, Tensor]
) -> None:
    var, tokens = load(kind), tokens_of(vectors, "vqvae")
    inputs = var.vqvae.quantizer.teacher_input(tokens)
    torch.testing.assert_close(inputs, vectors["var.teacher_input"], atol=1e-5, rtol=0)
    with torch.no_grad():
        logits = var.logits(vectors["in.labels"], tokens)
    expected = vectors["var.teacher_logits"]
    torch.testing.assert_close(logits, expected, atol=LOGITS_TOLERANCE, rtol=0)
    with torch.no_grad():
        narrow = var.set_dtype(torch.bfloat16).logits(vectors["in.labels"], tokens).float()
    assert var.vqvae.quantizer.codebook.weight.dtype == torch.float32
    assert (narrow - expected).norm() / expected.norm() < BF16_ERROR


def test_guided_generation_equals_the_authors(
    load: Callable[..., VAR], kind: str, vectors: dict[str, Tensor]
) -> None:
    var, logits = load(kind), []
    tokens, latent = var.generate_tokens(
        vectors["in.labels"], guidance=1.5, top_k=1, on_logits=lambda _, found: logits.append(found)
    )
    for scale in SCALES:
        expected = vectors[f"generate.guided_logits.{scale}"]
        torch.testing.assert_close(logits[scale], expected, atol=LOGITS_TOLERANCE, rtol=0)
        best = expected.topk(2, dim=-1).values
        clear = best[..., 0] - best[..., 1] > 1e-3
        assert clear.float().mean() > 0.9
        same = tokens[scale] == vectors[f"generate.tokens.{scale}"]
        assert bool(same[clear].all())
    # The authors' pictures lie in [0, 1].
    picture = (var.vqvae.decode_latent(latent) + 1) / 2
    torch.testing.assert_close(picture, vectors["generate.image"], atol=1e-4, rtol=0)
    again = var.generate(vectors["in.labels"], top_k=1)
    torch.testing.assert_close(again, picture * 2 - 1, atol=1e-6, rtol=0)


def test_cached_and_uncached_logits_agree_at_every_scale(
    load: Callable[..., VAR], kind: str
) -> None:
    var, cached = load(kind), []
    tokens, _ = var.generate_tokens(
        [3, None], guidance=0, top_k=1, on_logits=lambda _, found: cached.append(found)
    )
    with torch.no_grad():
        whole = var.logits([3, None], tokens)
    for (first, last), part in zip(var.config.transformer.spans(), cached, strict=True):
        torch.testing.assert_close(part, whole[:, first:last], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", [1.5, 0.0])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_its_eager_twin(
    load: Callable[..., VAR], kind: str, packed: bool, guidance: float
) -> None:
    if packed and not can_pack(torch.float32):
        pytest.skip("this PyTorch or CPU cannot pack FP32 weights")
    twin = load(kind)
    ours, expected = [], []
    options = {"guidance": guidance, "top_k": 1}
    tokens, _ = eager_tokens(twin, [3, 7], on_logits=lambda _, x: expected.append(x), **options)  # type: ignore[arg-type]
    var = load(kind).pack() if packed else load(kind)
    found, _ = var.generate_tokens([3, 7], on_logits=lambda _, x: ours.append(x), **options)  # type: ignore[arg-type]
    for scale in SCALES:
        torch.testing.assert_close(ours[scale], expected[scale], atol=1e-4, rtol=1e-4)
        assert torch.equal(found[scale], tokens[scale])


@pytest.mark.parametrize(("guidance", "rows"), [(1.5, 4), (0.0, 2)])
def test_the_twin_computes_no_row_for_nothing(
    load: Callable[..., VAR], kind: str, guidance: float, rows: int
) -> None:
    var, seen = load(kind), set()
    layer = var.transformer.blocks[0].mlp_in
    layer.register_forward_hook(lambda _, inputs, __: seen.add(len(inputs[0])))
    eager_tokens(var, [3, 7], guidance=guidance, top_k=1)
    assert seen == {rows}


@pytest.mark.parametrize("packed", [False, True])
def test_bf16_equals_the_twin_under_autocast(
    load: Callable[..., VAR], kind: str, packed: bool
) -> None:
    """All scales, by the cached path: both take the FP32 twin's tokens."""
    if packed and not can_pack(torch.bfloat16):
        pytest.skip("this PyTorch or CPU cannot pack BF16 weights")
    twin, logits, expected = load(kind), [], []
    tokens, _ = eager_tokens(twin, [3], top_k=1, on_logits=lambda _, x: expected.append(x))
    var = load(kind, dtype=torch.bfloat16)
    var = var.pack() if packed else var
    var.generate_tokens([3], forced=tokens, on_logits=lambda _, x: logits.append(x))
    for scale in SCALES:
        error = (logits[scale] - expected[scale]).norm() / expected[scale].norm()
        assert error < 2 * BF16_ERROR  # guidance of 1.5 multiplies the rounding


def test_scores_in_pieces_equal_scores_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8).bfloat16() for n in (5, 9, 9))
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    with torch.no_grad():
        whole = attention.attend(query, key, value, mask=mask, scale=0.3)
        monkeypatch.setattr(attention, "SCORE_BYTES", 4 * 5 * 9 * 2)  # four of six heads
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        pieces = attention.attend(query, key, value, mask=mask, scale=0.3)
        exact = torch.nn.functional.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=mask, scale=0.3
        )
    assert torch.equal(whole, pieces)
    torch.testing.assert_close(whole.float(), exact, atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_queries_and_keys_without_length_are_no_division_by_zero(dtype: torch.dtype) -> None:
    layer, x = attention.SelfAttention(8, 2, l2_norm=True).to(dtype), torch.randn(1, 3, 8)
    assert layer.log_scale is not None
    layer.log_scale.data.fill_(9)  # beyond the largest that counts
    x[:, 1] = 0
    assert bool(layer(x.to(dtype)).isfinite().all())


def test_packing(var: VAR, tmp_path: Path) -> None:
    if not can_pack(torch.float32):
        pytest.skip("this PyTorch or CPU cannot pack FP32 weights")
    generator = torch.Generator().manual_seed(0)
    expected = var.generate([3], generator=generator)
    packed = copy.deepcopy(var).pack()
    assert isinstance(packed.head, PackedLinear)
    torch.testing.assert_close(
        packed.generate([3], generator=torch.Generator().manual_seed(0)),
        expected,
        atol=1e-3,
        rtol=0,
    )
    with pytest.raises(ValueError, match="packed model cannot be saved"):
        packed.save_pretrained(tmp_path / "packed.safetensors")
    with pytest.raises(ValueError, match="packed model cannot be cast"):
        packed.set_dtype(torch.bfloat16)
    for cast in (packed.half, packed.double, lambda: packed.to("meta")):
        with pytest.raises(ValueError, match="packed model cannot be cast or moved"):
            cast()
    assert {p.dtype for p in packed.parameters()} == {torch.float32}  # nothing of it was
    with pytest.raises(ValueError, match="packed model has no fingerprint"):
        packed.fingerprint()
    assert packed.parameter_count() == var.parameter_count()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="BF16 and FP32"):
        copy.deepcopy(var).set_dtype(torch.float16).pack()


def test_flops_equal_pytorchs_count(load: Callable[..., VAR], kind: str) -> None:
    # In BF16, as PyTorch's counter passes over the CPU's fused attention.
    var, marks = load(kind, dtype=torch.bfloat16), []
    with FlopCounterMode(display=False) as counter:
        var.generate_tokens([3, 7], callback=lambda _: marks.append(counter.get_total_flops()))
    quantizer = []
    for scale, side in enumerate((1, 2, 3, 4)):
        with FlopCounterMode(display=False) as part:
            var.vqvae.quantizer.contribution(scale, torch.zeros(2, side * side, dtype=torch.long))
        quantizer.append(part.get_total_flops())
    counts = [b - a - q for a, b, q in zip([0, *marks], marks, quantizer, strict=False)]
    assert counts == var.flops(batch=2)


def test_every_parameter_gets_a_gradient(load: Callable[..., VAR], kind: str) -> None:
    var = load(kind)
    tokens = [torch.randint(64, (2, side * side)) for side in (1, 2, 3, 4)]
    maps = var.vqvae.quantizer.teacher_input(tokens).detach()
    var.logits_from_maps(torch.tensor([3, 10]), maps).square().sum().backward()
    without = {
        name
        for part in (var.transformer, var.head)
        for name, p in part.named_parameters()
        if p.grad is None or not bool(p.grad.any())
    }
    assert not without


def test_compiled_blocks_draw_the_same(var: VAR) -> None:
    logits: list[torch.Tensor] = []

    def tokens_of() -> list[torch.Tensor]:
        logits.clear()
        generator = torch.Generator().manual_seed(0)
        tokens, _ = var.generate_tokens(
            [1, 2], generator=generator, on_logits=lambda _, found: logits.append(found)
        )
        return tokens

    plain, before = tokens_of(), list(logits)
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters
    counts.clear()
    var.compile(backend="aot_eager")
    compiled = tokens_of()
    assert counts["frames"]["ok"] == counts["frames"]["total"] > 0  # no graph was given up
    for first, second in zip(before, logits, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))
    graphs = counts["stats"]["unique_graphs"]
    var.generate([0], streams=3, generator=torch.Generator().manual_seed(1))
    assert counts["stats"]["unique_graphs"] <= graphs + 4  # not one a scale


@pytest.mark.skipif(not can_pack(torch.float32), reason="SKIPPED: this CPU cannot pack FP32")
def test_packed_weights_are_not_compiled(var: VAR) -> None:
    with pytest.raises(ValueError, match="instead of pack"):
        copy.deepcopy(var).pack().compile()


def test_tokens_that_are_told_are_checked(load: Callable[..., VAR], kind: str) -> None:
    var = load(kind)
    tokens, _ = var.generate_tokens([3], top_k=1)
    with pytest.raises(ValueError, match="tokens must have the shapes"):
        var.generate_tokens([3], forced=tokens[:-1])
    tokens[0] = tokens[0] + var.config.vqvae.vocabulary
    with pytest.raises(ValueError, match="tokens must lie in"):
        var.generate_tokens([3], forced=tokens)

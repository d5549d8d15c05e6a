"""VAR against the authors' implementation, and what a user may rely on."""

from __future__ import annotations

import copy
import hashlib
import json
import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from eager_var import eager_tokens
from official import Sizes, official_states, var_shapes, vqvae_shapes
from tiny_var import count_rows, draw, lively_streams, read_vectors
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from parscale_ear.checkpoint import CheckpointError
from parscale_ear.generator import attention
from parscale_ear.generator.packing import PackedLinear, can_pack
from parscale_ear.generator.var import VAR, ScaleEvent, VARConfig
from parscale_ear.generator.vqvae import VQVAEConfig

LOGITS_TOLERANCE = 1e-4  # FP32, against the authors' own figures
BF16_ERROR = 0.012  # relative, of teacher-forced logits
SCALES = range(4)


def tokens_of(vectors: dict[str, Tensor], what: str) -> list[Tensor]:
    return [vectors[f"{what}.tokens.{scale}"] for scale in SCALES]


# --- the authors' figures ---


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


def test_names_and_shapes_of_the_published_checkpoints() -> None:
    # SHA-256 of the sorted names and shapes of vae_ch160v4096z32.pth and var_d16.pth.
    for shapes, count, expected in (
        (
            vqvae_shapes(Sizes()),
            324,
            "ebbccd01046f9bc29d4b5245703ad44e3bb31dbe0447023e560771bb3c33fa11",
        ),
        (
            var_shapes(Sizes()),
            220,
            "d1a89666fe31361fbebc3ff68e8115725b9b5c12297523af37b458d0a33949c8",
        ),
    ):
        text = json.dumps(sorted((name, list(shape)) for name, shape in shapes.items()))
        assert len(shapes) == count
        assert hashlib.sha256(text.encode()).hexdigest() == expected


@pytest.mark.parametrize("depth", [16, 20, 24, 30])
def test_sizes_of_the_published_models(depth: int) -> None:
    # Tian et al. (2024), table 1: 310 M, 600 M, 1.0 B and 2.0 B parameters.
    with torch.device("meta"):
        var = VAR(VARConfig(depth=depth))
    expected = {16: 310e6, 20: 600e6, 24: 1.03e9, 30: 2.01e9}[depth]
    assert var.parameter_count()["transformer"] == pytest.approx(expected, rel=0.02)
    assert var.config.heads == depth
    assert var.config.transformer.tokens == 680


# --- one path against another ---


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


@pytest.mark.parametrize("packed", [False, True])
def test_equals_its_eager_twin(load: Callable[..., VAR], kind: str, packed: bool) -> None:
    if packed and not can_pack(torch.float32):
        pytest.skip("this PyTorch or CPU cannot pack FP32 weights")
    twin = load(kind)
    ours, expected = [], []
    options = {"guidance": 1.5, "top_k": 1}
    tokens, _ = eager_tokens(twin, [3, 7], on_logits=lambda _, x: expected.append(x), **options)  # type: ignore[arg-type]
    var = load(kind).pack() if packed else load(kind)
    found, _ = var.generate_tokens([3, 7], on_logits=lambda _, x: ours.append(x), **options)  # type: ignore[arg-type]
    for scale in SCALES:
        torch.testing.assert_close(ours[scale], expected[scale], atol=1e-4, rtol=1e-4)
        assert torch.equal(found[scale], tokens[scale])


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
    with pytest.raises(ValueError, match="packed model has no fingerprint"):
        packed.fingerprint()
    assert packed.parameter_count() == var.parameter_count()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="BF16 and FP32"):
        copy.deepcopy(var).set_dtype(torch.float16).pack()


# --- the cache ---


def test_cache_is_as_large_as_it_says(var: VAR) -> None:
    for rows, prefix in ((1, 0), (6, 5)):
        cache = var.transformer.new_cache(rows, prefix)
        assert cache.nbytes == var.transformer.kv_cache_bytes(rows, prefix)
        assert cache.slots.untyped_storage().nbytes() == cache.nbytes
    assert var.kv_cache_bytes(2, streams=3, prefix=5) == var.transformer.kv_cache_bytes(12, 5)
    assert var.kv_cache_bytes(2, guidance=False) == var.transformer.kv_cache_bytes(2)
    joined = var.kv_cache_bytes(2, streams=3, mode="aggregate")
    assert joined == var.transformer.kv_cache_bytes(2 * 3 + 2)


def test_cache_refuses_what_does_not_fit(var: VAR) -> None:
    cache = var.transformer.new_cache(1)
    parts = torch.zeros(1, 3, cache.capacity + 1, 32)
    with pytest.raises(ValueError, match="do not fit"):
        cache.write(0, parts, parts)
    with pytest.raises(ValueError, match="do not fit"):
        cache.write(0, parts[:, :2, :1], parts[:, :2, :1])
    assert cache.length == 0


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


# --- generation ---


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


# --- wrong use ---


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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells its mappings")
def test_a_large_cache_lies_in_memory_that_may_have_huge_pages() -> None:
    cache = attention.KVCache(depth=4, rows=2, heads=4, tokens=512, head_width=64)
    assert cache.nbytes >= attention.HUGE_PAGE
    place, last = cache.slots.data_ptr(), cache.slots.data_ptr() + cache.nbytes
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        first, end = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= place and last <= end:
            assert line.split()[1] == "rw-p"  # shared memory gets plain pages
            return
    pytest.fail("the cache lies in no single mapping")


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages are Linux's")
def test_a_caches_memory_serves_the_next_one_when_it_is_free() -> None:
    attention.spare_pages.clear()

    def new(tokens: int = 512) -> attention.KVCache:
        return attention.KVCache(depth=4, rows=2, heads=4, tokens=tokens, head_width=64)

    first = new()
    first.slots.fill_(1)
    second = new()  # beside it
    second.slots.fill_(2)
    assert bool((first.slots == 1).all())
    place, view = second.slots.data_ptr(), second.slots[0, 0]
    del first, second
    third = new()
    third.slots.fill_(3)
    assert bool((view == 2).all())  # a view alone keeps it from being used again
    place = third.slots.data_ptr()
    del third
    again = new()
    assert again.slots.data_ptr() == place
    assert again.slots.untyped_storage().nbytes() == again.nbytes
    del again
    assert new(400).slots.data_ptr() == place  # smaller ones fit
    assert new(5000).nbytes > 9 * new(512).nbytes


def test_teacher_forcing_refuses_wrong_tokens(var: VAR) -> None:
    right = [torch.zeros(1, side * side, dtype=torch.long) for side in (1, 2, 3, 4)]
    with pytest.raises(ValueError, match="shapes"):
        var.logits([3], right[:3])
    with pytest.raises(ValueError, match=r"0\.\.63"):
        var.logits([3], [*right[:3], right[3] + 64])
    with pytest.raises(ValueError, match=r"0\.\.9"):
        var.logits([10], right)


@pytest.mark.parametrize(
    "values",
    [
        {"depth": 0},
        {"width": 100, "heads": 3},
        {"classes": 0},
        {"vqvae": {"sides": (2, 1)}},
        {"vqvae": {"width": 100}},
        {"vqvae": {"vocabulary": 0}},
    ],
)
def test_config_names_a_bad_field(values: dict[str, object]) -> None:
    def build() -> VARConfig:
        if isinstance(values.get("vqvae"), dict):
            return VARConfig(vqvae=VQVAEConfig(**values["vqvae"]))  # type: ignore[arg-type]
        return VARConfig(**values)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"must be|and grow"):
        build()


# --- in and out ---


def test_save_and_load(var: VAR, tmp_path: Path) -> None:
    path = var.save_pretrained(tmp_path / "var.safetensors")
    loaded = VAR.from_pretrained(path)
    assert torch.equal(draw(loaded, 0), draw(var, 0))
    assert loaded.fingerprint() == var.fingerprint()
    assert loaded.config == var.config
    narrow = VAR.from_pretrained(path, dtype=torch.bfloat16)
    assert narrow.transformer.positions.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="no such weight file"):
        VAR.from_pretrained(tmp_path / "none.safetensors")


def edited(kind: str, tmp_path: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """A transformer's checkpoint with a fault."""
    _, state = official_states(read_vectors(kind)[0])
    edit(state)
    path = tmp_path / "edited.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("blocks.1.ffn.fc1.bias"), r"missing keys.*blocks\.1\.mlp_in\.bias"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), r"foreign keys: extra\.weight"),
        (lambda s: s.update({"head.weight": torch.zeros(1, 2)}), r"head\.weight is \(1, 2\)"),
        (lambda s: s["blocks.0.attn.zero_k_bias"].fill_(1), "not zero"),
        (lambda s: s.pop("lvl_1L"), "lacks lvl_1L"),
        (lambda s: s.update({"lvl_1L": torch.zeros(1, 3).long()}), "sides of square"),
        (lambda s: s.clear(), "lacks lvl_1L"),
    ],
)
def test_every_key_of_a_foreign_checkpoint_is_accounted_for(
    edit: Callable[[dict[str, Tensor]], None],
    message: str,
    official_files: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    tokenizer, _ = official_files("l2")
    with pytest.raises(CheckpointError, match=message):
        VAR.from_official(tokenizer, edited("l2", tmp_path, edit))


def test_foreign_checkpoints_are_refused(
    official_files: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    tokenizer, transformer = official_files("l2")
    with pytest.raises(CheckpointError, match="depth 3, expected 16"):
        VAR.from_official(tokenizer, transformer, depth=16)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        VAR.from_official(tmp_path / "none.pth", transformer)
    with pytest.raises(CheckpointError, match="not one of VAR's"):
        VAR.from_official(transformer, transformer)
    torch.save({"a": [1]}, tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="named tensors"):
        VAR.from_official(tmp_path / "list.pth", transformer)
    torch.save({"a": Sizes()}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="tensors alone"):
        VAR.from_official(tmp_path / "code.pth", transformer)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(CheckpointError, match="tensors alone"):
        VAR.from_official(tmp_path / "text.pth", transformer)


# --- cost and gradients ---


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

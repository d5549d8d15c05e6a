"""The KV cache: its size, its memory, what it refuses."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from parscale_ear.device import out_of_memory
from parscale_ear.generator import attention
from parscale_ear.generator.var import VAR, VARConfig
from parscale_ear.generator.vqvae import VQVAEConfig


def test_cache_is_as_large_as_it_says(var: VAR) -> None:
    for rows, prefix in ((1, 0), (6, 5)):
        cache = var.transformer.new_cache(rows, prefix)
        assert cache.nbytes == var.transformer.kv_cache_bytes(rows, prefix)
        assert cache.slots.untyped_storage().nbytes() == cache.nbytes
    assert var.kv_cache_bytes(2, streams=3, prefix=5) == var.transformer.kv_cache_bytes(12, 5)
    assert var.kv_cache_bytes(2, guidance=False) == var.transformer.kv_cache_bytes(2)
    joined = var.kv_cache_bytes(2, streams=3, mode="aggregate")
    assert joined == var.transformer.kv_cache_bytes(2 * 3 + 2)


def test_memory_of_a_generation_is_cache_and_the_largest_of_what_comes_beside() -> None:
    """Sizes of VAR-d16 in BF16, and of a decoder that is larger than blocks and logits or not."""
    for width, largest in ((160, "decoder"), (4, "sampling")):
        config = VARConfig(depth=16, vqvae=VQVAEConfig(width=width, groups=min(width, 32)))
        with torch.device("meta"):
            model = VAR(config).set_dtype(torch.bfloat16)
        elsewhere = model.generation_bytes(streams=4, prefix=48)  # on no CPU
        model.transformer.positions = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        cache = 2 * 16 * 8 * (680 + 48) * 1024 * 2  # keys and values of 8 rows: 4 streams, guided
        parts = {
            "decoder": 5 * width * 256 * 256 * 2,
            "blocks": 8 * 256 * 1024 * (3 + 4) * 2,
            "sampling": 4 * 256 * 4096 * (2 + 4 + 4),
        }
        assert max(parts, key=lambda name: parts[name]) == largest
        assert model.generation_bytes(streams=4, prefix=48) == cache + parts[largest]
        blocks = cache + max(parts["blocks"], parts["sampling"])
        assert elsewhere == max(blocks, 4 * parts["decoder"])


def test_cache_refuses_what_does_not_fit(var: VAR) -> None:
    cache = var.transformer.new_cache(1)
    parts = torch.zeros(1, 3, cache.capacity + 1, 32)
    with pytest.raises(ValueError, match="do not fit"):
        cache.write(0, parts, parts)
    with pytest.raises(ValueError, match="do not fit"):
        cache.write(0, parts[:, :2, :1], parts[:, :2, :1])
    with pytest.raises(ValueError, match="in 3 layers"):
        cache.write(3, parts[:, :, :1], parts[:, :, :1])
    for foreign in (parts[:, :1, :1], parts[:, :, :1, :1]):  # would broadcast
        with pytest.raises(ValueError, match="do not fit"):
            cache.write(0, foreign, foreign)
    with pytest.raises(ValueError, match="of 2 rows"):
        var.transformer.new_cache(2).write(0, parts[:, :, :1], parts[:, :, :1])
    assert cache.length == 0


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
def test_a_caches_memory_serves_the_next_one_when_it_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    for tokens in (400, 130):  # smaller ones fit, one stream's cache into that of four too
        assert new(tokens).slots.data_ptr() == place
    taken: list[int] = []
    real = mmap.mmap

    def counted(number: int, size: int, **more: int) -> mmap.mmap:
        taken.append(size)
        return real(number, size, **more)

    monkeypatch.setattr(mmap, "mmap", counted)
    large = new(5000).nbytes
    small = new(512).nbytes  # of a tenth: the large memory goes
    assert taken == [large, small]


def test_memory_that_there_is_not_is_told_as_pytorch_tells_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left(size: int) -> memoryview:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(attention.spare_pages, "take", none_left)
    cpu = torch.device("cpu")
    assert attention._empty((attention.HUGE_PAGE,), torch.float32, cpu).numel()  # elsewhere
    with pytest.raises(RuntimeError) as found:
        attention._empty((2**50,), torch.float32, cpu)
    assert out_of_memory(found.value)

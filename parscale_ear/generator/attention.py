"""Self-attention over scales, and the key/value cache that is handed into it.

Shapes: R rows (of all streams, and those without a label under guidance), T new tokens, S tokens seen so far and now, C width,
N heads, D head width.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parscale_ear.generator.packing import PackedLinear

HUGE_PAGE = 2 * 2**20  # bytes
MOST_SPARE = 8  # times a cache's size that the memory kept from another may have
SCORE_BYTES = 3 * 2**18  # of attention scores a CPU thread holds at a time: its cache's worth
LEAST_LENGTH = 1e-12  # of a query or key that is made a unit vector
MAX_LOG_SCALE = math.log(100)  # limit of a head's learned scale under L2-normalised attention


class Cache(Protocol):
    """What attention needs of a cache."""

    length: int  # tokens so far

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Takes (R, N, T, D) each; returns those of all tokens so far, (R, N, S, D)."""

    def advance(self, tokens: int) -> None:
        """Counts tokens that every layer has written."""


def write_cache(cache: Cache, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """``cache.write``, as a function that compilation can be kept out of."""
    return cache.write(layer, keys, values)


class KVCache:
    """Keys and values of one generation, allocated once and handed from scale to scale.

    Nothing of it is stored on a module, so that two generations may interleave and an exception
    leaves nothing behind.
    """

    def __init__(
        self,
        *,
        depth: int,
        rows: int,
        heads: int,
        tokens: int,
        head_width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocates; the slots' content is undefined until written.

        Args:
            depth: layers.
            rows: of all streams, and those without a label under guidance.
            heads: attention heads.
            tokens: slots a row.
            head_width: channels of a head.
            dtype: of keys and values.
            device: where.
        """
        shape = (2, depth, rows, heads, tokens, head_width)
        self.slots = _empty(shape, dtype, torch.device(device))
        self.length = 0  # slots filled in every layer

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.slots.shape[4]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.slots.numel() * self.slots.element_size()

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the new tokens of a layer behind the old ones.

        Args:
            layer: which.
            keys: (R, N, T, D).
            values: (R, N, T, D).

        Returns:
            Keys and values of all tokens so far, (R, N, S, D), as views of the cache.

        Raises:
            ValueError: the cache is full, or made for another number of rows or heads.
        """
        end = self.length + keys.shape[2]
        _, depth, rows, heads, capacity, head_width = self.slots.shape
        fits = keys.shape[:2] == (rows, heads) and keys.shape[3] == head_width and layer < depth
        if not fits or end > capacity:
            raise ValueError(
                f"the cache holds {capacity} tokens of {rows} rows and {heads} heads of "
                f"{head_width} in {depth} layers; {tuple(keys.shape)} of layer {layer} behind "
                f"{self.length} do not fit"
            )
        self.slots[0, layer, :, :, self.length : end] = keys
        self.slots[1, layer, :, :, self.length : end] = values
        return self.slots[0, layer, :, :, :end], self.slots[1, layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Counts tokens that every layer has written."""
        self.length += tokens


class GrowingCache:
    """A cache as lists that grow, so that gradients flow through them (training)."""

    def __init__(self, depth: int) -> None:
        """Empty.

        Args:
            depth: layers.
        """
        self.length = 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * depth

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far, (R, N, S, D); as :meth:`KVCache.write`."""
        before = self._layers[layer]
        if before is not None:
            keys = torch.cat((before[0], keys), dim=2)
            values = torch.cat((before[1], values), dim=2)
        self._layers[layer] = keys, values
        return keys, values

    def advance(self, tokens: int) -> None:
        """Counts tokens that every layer has written."""
        self.length += tokens


class SparePages:
    """Memory of the last cache on the CPU, kept for the next one.

    New memory is handed out page by page as it is touched, and every page is cleared first: that
    takes a tenth of a generation's time. Here it happens once. It is in huge pages on Linux, where
    the kernel has some. Two generations at a time get memory of their own. Memory that is larger
    than asked for serves too, up to ``MOST_SPARE`` times: one stream's cache lies in that of four.
    """

    def __init__(self) -> None:
        """Holds nothing yet."""
        self._lock = threading.Lock()
        self._pages: mmap.mmap | None = None
        self._handed_out: weakref.ref[memoryview] | None = None

    def take(self, size: int) -> memoryview:
        """Memory of ``size`` bytes, whatever is in it; free again when the view of it is gone."""
        with self._lock:
            used = self._handed_out is not None and self._handed_out() is not None
            if self._pages is None or used or not size <= len(self._pages) <= MOST_SPARE * size:
                # Private: what is shared gets plain pages. What was there goes with its last view.
                self._pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                with suppress(OSError):  # a kernel without huge pages: plain ones serve as well
                    self._pages.madvise(mmap.MADV_HUGEPAGE)
            view = memoryview(self._pages)[:size]  # a tensor on it keeps it, and it the pages
            self._handed_out = weakref.ref(view)
            return view

    def clear(self) -> None:
        """Lets the memory go, when nothing looks at it any more."""
        with self._lock:
            self._pages = self._handed_out = None


spare_pages = SparePages()


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory to be filled; on Linux's CPU that of the last cache, if that is free."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        pages = spare_pages.take(size)
    except OSError:  # there is not so much; PyTorch's own error says so in the usual way
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class SelfAttention(nn.Module):
    """Multi-head attention with one fused projection, and a learned bias for queries and values.

    With ``l2_norm`` queries and keys are unit vectors and a head learns the logarithm of its scale
    (Tian et al., "Visual Autoregressive Modeling", 2024, section 3.2); else the softmax scale is
    ``0.25 / √D``, as in the authors' code.
    """

    def __init__(self, width: int, heads: int, *, l2_norm: bool) -> None:
        super().__init__()
        self.heads, self.l2_norm = heads, l2_norm
        self.qkv: nn.Linear | PackedLinear = nn.Linear(width, 3 * width, bias=False)
        self.query_bias = nn.Parameter(torch.zeros(width))
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(4))) if l2_norm else None
        self.out: nn.Linear | PackedLinear = nn.Linear(width, width)
        self.write = write_cache

    def compile_around_cache(self) -> None:
        """Keeps compilation out of the cache, whose slots would each need one of their own."""
        self.write = torch.compiler.disable(write_cache)

    def forward(
        self,
        x: Tensor,
        *,
        layer: int = 0,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attends from the new tokens to all that they may see.

        Args:
            x: (R, T, C).
            layer: of the cache.
            cache: what came before; gets the new keys and values. None: only ``x`` itself.
            mask: (T, S), True where a token may look; None: everywhere.
            prefix: keys and values, (R, N, S', D) each, in front of those of ``x``; without cache.

        Returns:
            (R, T, C).
        """
        rows, tokens, width = x.shape
        qkv = self._project(x)  # (R, T, 3C)
        qkv = qkv.view(rows, tokens, 3, self.heads, width // self.heads)
        scale = 0.25 / math.sqrt(width // self.heads)
        if self.log_scale is not None:
            # So that the largest gain over it is finite, in FP16 too.
            least = max(LEAST_LENGTH, 1.01 * math.exp(MAX_LOG_SCALE) / torch.finfo(qkv.dtype).max)
            lengths = qkv[:, :, :2].norm(dim=-1, keepdim=True).clamp_min(least)
            gain = self.log_scale.clamp_max(MAX_LOG_SCALE).exp()[:, None]  # (N, 1)
            # The gain goes with the length, (R, T, N, 1): one pass over the queries less.
            query, key = qkv[:, :, 0] * (gain / lengths[:, :, 0]), qkv[:, :, 1] / lengths[:, :, 1]
            scale = 1.0
        else:
            query, key = qkv[:, :, 0], qkv[:, :, 1]
        # (R, N, T, D) each
        query, key, value = (part.transpose(1, 2) for part in (query, key, qkv[:, :, 2]))
        if cache is not None:
            key, value = self.write(cache, layer, key, value)  # (R, N, S, D) each
        elif prefix is not None:
            key = torch.cat((prefix[0].to(key.dtype), key), dim=2)
            value = torch.cat((prefix[1].to(value.dtype), value), dim=2)
        mixed = attend(query, key, value, mask=mask, scale=scale)  # (R, N, T, D)
        return self.out(mixed.transpose(1, 2).reshape(rows, tokens, width))  # type: ignore[no-any-return]

    def _bias(self) -> Tensor:
        """(3C,): keys have none."""
        return torch.cat((self.query_bias, torch.zeros_like(self.query_bias), self.value_bias))

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values: (R, T, C) → (R, T, 3C)."""
        if isinstance(self.qkv, PackedLinear):
            return self.qkv(x)  # type: ignore[no-any-return]
        return F.linear(x, self.qkv.weight, self._bias())

    def pack(self) -> None:
        """Packs the weights for inference on the CPU, in place (:mod:`.packing`)."""
        if isinstance(self.qkv, nn.Linear) and isinstance(self.out, nn.Linear):
            self.qkv = PackedLinear(self.qkv.weight, self._bias())
            self.out = PackedLinear(self.out.weight, self.out.bias)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float
) -> Tensor:
    """Softmax attention.

    PyTorch's fused kernel, but for BF16 on the CPU: without AMX that kernel multiplies in FP32 and
    takes more than twice the time of two BF16 matrix products (measured on two AVX512-BF16 cores:
    10.0 against 4.1 ms for 2 × 16 heads, 256 × 680 tokens of 64 channels; in training, forward
    and backward of an EnergyAR of 6 blocks with 128 × 22 tokens on one core: 1,258 against 969
    ms). The scores are then rounded to BF16, as every other activation is, and formed two or so
    heads a thread at a time, so that they are still in its cache when softmax and second product
    come (the same two cores: 4.0 to 4.1 ms, and 5.7 to 5.8 ms with all 32 heads at once).

    Args:
        query: (R, N, T, D).
        key: (R, N, S, D).
        value: (R, N, S, D).
        mask: (T, S), True where a token may look; None: everywhere.
        scale: of the scores.

    Returns:
        (R, N, T, D).
    """
    if query.device.type != "cpu" or value.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    query, key = query.to(value.dtype), key.to(value.dtype)
    rows, heads, tokens, _ = query.shape
    flat = (query * scale if scale != 1 else query).flatten(0, 1)  # (R · N, T, D)
    keys, values = key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1)
    each = tokens * key.shape[2] * flat.element_size()  # bytes of a head's scores
    step = torch.get_num_threads() * max(1, SCORE_BYTES // each)

    def mix(first: int, last: int) -> Tensor:
        scores = torch.bmm(flat[first:last], keys[first:last])  # (last − first, T, S)
        if mask is not None:
            scores = scores.masked_fill_(~mask, -torch.inf)
        return torch.bmm(scores.softmax(dim=-1).to(value.dtype), values[first:last])

    if step >= rows * heads or torch.is_grad_enabled():
        parts = [mix(k, min(k + step, rows * heads)) for k in range(0, rows * heads, step)]
        return (torch.cat(parts) if parts[1:] else parts[0]).view(rows, heads, tokens, -1)
    # Each part goes, out of the cache, to where the projection behind this wants it.
    mixed = values.new_empty(rows, tokens, heads, values.shape[-1])
    for row in range(rows):
        for first in range(0, heads, step):
            last = min(first + step, heads)
            part = mix(row * heads + first, row * heads + last)  # (last − first, T, D)
            mixed[row, :, first:last] = part.transpose(0, 1)
    return mixed.transpose(1, 2)

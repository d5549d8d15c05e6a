"""The transformer under every generator here: next-scale, block-causal, class-conditional.

Source: Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale
Prediction" (NeurIPS 2024). A picture is a pyramid of token maps of growing side; a token sees all
tokens of its own and of coarser scales. The class enters through adaptive layer norms (Peebles and
Xie, "Scalable Diffusion Models with Transformers", ICCV 2023) and as the first token.

Shapes: R rows (batch × streams × guidance), K scales, T tokens, L tokens of all scales, C width,
I input channels, U different conditions in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parscale_ear.checks import check_whole
from parscale_ear.generator.attention import Cache, KVCache, SelfAttention
from parscale_ear.generator.packing import PackedLinear

NORM_EPS = 1e-6
FIRST_GAIN = 0.1  # of a block's branches, as in LayerScale (Touvron et al., ICCV 2021)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of a next-scale transformer."""

    depth: int = 16  # blocks
    width: int = 1024  # channels
    heads: int = 16  # attention heads
    mlp_ratio: int = 4  # hidden channels of a block's MLP in widths
    counts: tuple[int, ...] = (1, 4, 9, 16, 25, 36, 64, 100, 169, 256)  # tokens of every scale
    classes: int = 1000  # labels; one more stands for "no label"
    input_channels: int = 32  # of the token maps that come in
    l2_norm: bool = True  # unit queries and keys, a learned scale a head
    shared_modulation: bool = False  # one modulation for all blocks, and an offset in each

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        for name in ("depth", "width", "heads", "mlp_ratio", "classes", "input_channels"):
            check_whole(1, **{name: getattr(self, name)})
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads = {self.heads}, got {self.width}")
        if not self.counts or min(self.counts) < 1:
            raise ValueError(f"every scale must have at least 1 token, got {self.counts}")

    @property
    def tokens(self) -> int:
        """Tokens of all scales."""
        return sum(self.counts)

    def spans(self) -> list[tuple[int, int]]:
        """First token of every scale, and the one behind its last."""
        spans, start = [], 0
        for count in self.counts:
            spans.append((start, start + count))
            start += count
        return spans


class Conditioning:
    """Everything that the labels decide, computed once a generation.

    Projections run once a different label; rows with one label have equal parts.
    """

    def __init__(
        self, index: Tensor, classes: Tensor, blocks: Sequence[Tensor], output: Tensor
    ) -> None:
        """Spreads the parts over the rows.

        Args:
            index: (R,), which of the U different labels a row has.
            classes: (U, C), class vectors.
            blocks: a layer, (U, 6, C): two gains, two scales plus one, two shifts.
            output: (U, 2, C): scale plus one and shift in front of the head.
        """
        self.class_vectors = classes[index]  # (R, C)
        # A layer, six (R, 1, C).
        self.blocks = [part[index].unsqueeze(2).unbind(1) for part in blocks]
        self.output = output[index]  # (R, 2, C)

    def head(self, rows: slice | Tensor = slice(None)) -> tuple[Tensor, ...]:
        """Two (R', 1, C), of some of the rows."""
        return self.output[rows].unsqueeze(2).unbind(1)


class Block(nn.Module):
    """Attention and MLP, each between an adaptive layer norm and a gain."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.attention = SelfAttention(width, config.heads, l2_norm=config.l2_norm)
        self.mlp_in: nn.Linear | PackedLinear = nn.Linear(width, config.mlp_ratio * width)
        self.activation: nn.Module = nn.GELU(approximate="tanh")
        self.mlp_out: nn.Linear | PackedLinear = nn.Linear(config.mlp_ratio * width, width)
        if config.shared_modulation:
            self.modulation_offset = nn.Parameter(torch.randn(6, width) / width**0.5)
        else:
            self.modulation: nn.Linear | PackedLinear = nn.Linear(width, 6 * width)

    def forward(
        self,
        x: Tensor,
        modulation: Sequence[Tensor],
        *,
        layer: int = 0,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(R, T, C) → (R, T, C); ``modulation`` is six (R, 1, C), scales with one added."""
        gain1, gain2, scale1, scale2, shift1, shift2 = modulation
        normed = torch.addcmul(shift1, _norm(x), scale1)  # (R, T, C)
        mixed = self.attention(normed, layer=layer, cache=cache, mask=mask, prefix=prefix)
        x = torch.addcmul(x, mixed, gain1)
        normed = torch.addcmul(shift2, _norm(x), scale2)
        hidden = self.activation(self.mlp_in(normed))  # (R, T, mlp_ratio · C)
        return torch.addcmul(x, self.mlp_out(hidden), gain2)

    def pack(self) -> None:
        """Packs the weights for inference on the CPU, in place (:mod:`.packing`)."""
        self.attention.pack()
        if isinstance(self.mlp_in, nn.Linear) and isinstance(self.mlp_out, nn.Linear):
            self.mlp_in = PackedLinear(self.mlp_in.weight, self.mlp_in.bias, gelu=True)
            self.activation = nn.Identity()
            self.mlp_out = PackedLinear(self.mlp_out.weight, self.mlp_out.bias)
        if hasattr(self, "modulation") and isinstance(self.modulation, nn.Linear):
            self.modulation = PackedLinear(self.modulation.weight, self.modulation.bias)


class NextScaleTransformer(nn.Module):
    """Embeddings, blocks and the norm in front of a head; the head itself is the generator's."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.input = nn.Linear(config.input_channels, width)
        self.class_embedding = nn.Embedding(config.classes + 1, width)
        self.start = nn.Parameter(torch.empty(config.counts[0], width))
        self.positions = nn.Parameter(torch.empty(config.tokens, width))
        self.levels = nn.Embedding(len(config.counts), width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.shared_modulation = nn.Linear(width, 6 * width) if config.shared_modulation else None
        self.output_modulation = nn.Linear(width, 2 * width)
        self._initialise()

    def _initialise(self) -> None:
        """Truncated normals of deviation √(1 / 3C); all gains start at ``FIRST_GAIN``."""
        deviation = (1 / self.config.width / 3) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=deviation)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start, std=deviation)
        nn.init.trunc_normal_(self.positions, std=deviation)
        with torch.no_grad():
            width = self.config.width
            for block in self.layers():
                for layer in (block.attention.out, block.mlp_out):
                    assert isinstance(layer, nn.Linear)
                    layer.weight.mul_((2 * self.config.depth) ** -0.5)
                if self.config.shared_modulation:
                    block.modulation_offset[:2] = FIRST_GAIN
                else:
                    assert isinstance(block.modulation, nn.Linear)
                    block.modulation.weight[: 2 * width] = 0
                    block.modulation.weight[2 * width :] *= 0.5
                    block.modulation.bias[: 2 * width] = FIRST_GAIN
            self.output_modulation.weight.mul_(0.5)

    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return cast("list[Block]", list(self.blocks))

    @property
    def null_label(self) -> int:
        """The class index that stands for "no label"."""
        return self.config.classes

    # --- the labels' part, once a generation ---

    def condition(self, labels: Tensor) -> Conditioning:
        """Computes all that the labels decide.

        Args:
            labels: (R,), int64 in 0..classes; ``null_label`` for none.
        """
        different, index = labels.unique(return_inverse=True)  # (U,), (R,)
        classes = self.class_embedding(different)  # (U, C)
        active = F.silu(classes)
        width = self.config.width
        # Scales act as 1 + scale: the one is added here, once.
        one = torch.zeros(6, 1, device=classes.device, dtype=classes.dtype)
        one[2:4] = 1
        if self.shared_modulation is not None:
            shared = self.shared_modulation(active).view(-1, 6, width) + one
            blocks = [shared + block.modulation_offset for block in self.layers()]
        else:
            blocks = [block.modulation(active).view(-1, 6, width) + one for block in self.layers()]
        output = self.output_modulation(active).view(-1, 2, width)  # (U, 2, C)
        output = output + torch.tensor([[1.0], [0.0]]).to(output)
        return Conditioning(index, classes, blocks, output)

    # --- the tokens' part ---

    def embed(self, scale: int, maps: Tensor | None, condition: Conditioning) -> Tensor:
        """Embeds the input of one scale.

        Args:
            scale: which.
            maps: (R, T, I), what the coarser scales say at this side; None at the first scale.
            condition: of the rows.

        Returns:
            (R, T, C).
        """
        if scale == 0:
            tokens = condition.class_vectors[:, None] + self.start  # (R, T, C)
        else:
            assert maps is not None
            tokens = self.input(maps.to(self.input.weight.dtype))
        first, last = self.config.spans()[scale]
        return tokens + self.levels.weight[scale] + self.positions[first:last]

    def forward(
        self,
        x: Tensor,
        condition: Conditioning,
        *,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        prefixes: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Runs all blocks.

        Args:
            x: (R, T, C), embedded tokens.
            condition: of the rows.
            cache: keys and values of coarser scales; gets those of ``x``.
            mask: (T, S), True where a token may look; None: everywhere.
            prefixes: a layer, keys and values in front of those of ``x``; without cache.

        Returns:
            (R, T, C), in front of the output norm.
        """
        for layer, block in enumerate(self.layers()):
            x = block(
                x,
                condition.blocks[layer],
                layer=layer,
                cache=cache,
                mask=mask,
                prefix=None if prefixes is None else prefixes[layer],
            )
        if cache is not None:
            cache.advance(x.shape[1])
        return x

    def teacher_input(self, maps: Tensor, condition: Conditioning) -> Tensor:
        """Embeds the inputs of all scales at once: (R, L − T₀, I) → (R, L, C)."""
        first = self.config.spans()[0][1]
        head = condition.class_vectors[:, None] + self.start  # (R, T₀, C)
        rest = self.input(maps.to(self.input.weight.dtype))  # (R, L − T₀, C)
        assert head.shape[1] == first
        counts = torch.tensor(self.config.counts, device=maps.device)
        levels = self.levels.weight.repeat_interleave(counts, dim=0)  # (L, C)
        return torch.cat((head, rest), dim=1) + levels + self.positions

    def block_causal_mask(self, device: torch.device, prefix: int = 0) -> Tensor:
        """(L, prefix + L), True where a token may look: prefix, coarser scales, its own."""
        counts = torch.tensor(self.config.counts, device=device)
        level = torch.arange(len(counts), device=device).repeat_interleave(counts)  # (L,)
        mask = level[:, None] >= level[None, :]
        return F.pad(mask, (prefix, 0), value=True)

    def output_norm(
        self, hidden: Tensor, condition: Conditioning, rows: slice | Tensor = slice(None)
    ) -> Tensor:
        """The adaptive norm in front of the head: (R', T, C) → (R', T, C) for some rows."""
        scale, shift = condition.head(rows)
        return torch.addcmul(shift, _norm(hidden), scale)

    # --- what it costs ---

    def new_cache(self, rows: int, prefix: int = 0) -> KVCache:
        """An empty cache for ``rows`` rows of all scales and ``prefix`` slots in front."""
        config, weight = self.config, self.input.weight
        return KVCache(
            depth=config.depth,
            rows=rows,
            heads=config.heads,
            tokens=prefix + config.tokens,
            head_width=config.width // config.heads,
            dtype=weight.dtype,
            device=weight.device,
        )

    def kv_cache_bytes(self, rows: int, prefix: int = 0) -> int:
        """Bytes of :meth:`new_cache`: keys and values of every layer."""
        config, item = self.config, self.input.weight.dtype.itemsize
        return 2 * config.depth * rows * (prefix + config.tokens) * config.width * item

    def flops(self, rows: int = 1, prefix: int = 0, conditions: int = 1) -> list[int]:
        """FLOPs of every scale (a multiply-add counts two; matrix products only).

        Args:
            rows: batch × streams × guidance.
            prefix: tokens in front.
            conditions: different labels, "no label" included; their part counts to the first
                scale.
        """
        config = self.config
        width = config.width
        counts = []
        for scale, (first, last) in enumerate(config.spans()):
            tokens, seen = last - first, prefix + last
            linear = 2 * tokens * width * width * (4 + 2 * config.mlp_ratio)
            attention = 4 * tokens * seen * width
            embedding = 2 * tokens * config.input_channels * width if scale else 0
            counts.append(rows * (config.depth * (linear + attention) + embedding))
        modulations = 6 * (1 if config.shared_modulation else config.depth) + 2
        counts[0] += 2 * conditions * modulations * width * width
        return counts


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)

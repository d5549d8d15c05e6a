"""What every next-scale generator shares: labels, rows, guidance, streams and their cost.

Shapes: B labels, P streams, R rows of a generation, T tokens of a scale, L tokens of all scales,
C width.

Rows lie as B · P conditional ones (stream p of label b is row ``b · P + p``), then the
unconditional ones that guidance needs: B · P in diverse mode, where every stream has tokens of its
own; B in aggregate mode, where all streams share their tokens: there the first stream alone speaks
for "no label". (Guiding with less than the whole model is what Karras et al., "Guiding a Diffusion
Model with a Bad Version of Itself", NeurIPS 2024, do on purpose.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from parscale_ear.generator.attention import KVCache
from parscale_ear.generator.packing import PackedLinear
from parscale_ear.generator.sampling import guided
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.generator.transformer import Conditioning, NextScaleTransformer

Mode = Literal["diverse", "aggregate"]
Labels = Tensor | Sequence[int | None]


def stream_count(streams: ParallelStreams | int) -> int:
    """P of trained streams or of a number of plain ones.

    Raises:
        ValueError: the number is below 1, or ``streams`` is neither.
    """
    if isinstance(streams, ParallelStreams):
        return streams.count
    try:
        count = 0 if isinstance(streams, bool) else operator.index(streams)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"streams must be at least 1, or trained streams, got {streams!r}")
    return count


class Rows:
    """Which rows go through the blocks together, and what becomes of their hidden states."""

    def __init__(
        self,
        labels: Tensor,
        *,
        null: int,
        count: int,
        trained: ParallelStreams | None,
        joined: bool,
        guidance: float,
    ) -> None:
        """Lays out the rows.

        Args:
            labels: (B,), int64; ``null`` for none.
            null: the index that stands for "no label".
            count: streams, P.
            trained: their parameters; None: plain ones.
            joined: aggregate mode.
            guidance: weight at the last scale; 0: no unconditional rows.
        """
        self.count, self.trained, self.joined = count, trained, joined
        nulls = torch.full_like(labels, null)
        self.guided = guidance > 0 and not torch.equal(labels, nulls)
        self.conditional = len(labels) * count  # the others lie behind them
        self.pictures = len(labels) * (1 if joined else count)
        each = torch.arange(count, device=labels.device).repeat(len(labels))  # (B · P,)
        rows, stream_of = labels.repeat_interleave(count), each
        if self.guided and joined:
            rows = torch.cat((rows, nulls))
            stream_of = torch.cat((each, torch.zeros_like(labels)))  # the first stream
        elif self.guided:
            rows, stream_of = torch.cat((rows, nulls.repeat_interleave(count))), each.repeat(2)
        self.labels, self.stream_of = rows, stream_of  # (R,) each
        # Weight of guidance at the last scale; pictures without a label stay as they are.
        strength = guidance * (labels != nulls).float()
        self._strength = strength.repeat_interleave(1 if joined else count)[:, None, None]

    def new_cache(self, transformer: NextScaleTransformer) -> KVCache:
        """A cache for these rows that holds the streams' prefixes already."""
        prefix = 0 if self.trained is None else self.trained.prefix_tokens
        cache = transformer.new_cache(len(self.labels), prefix)
        if self.trained is not None:
            self.trained.fill(cache, self.stream_of)
        return cache

    def spread(self, maps: Tensor) -> Tensor:
        """A picture's part for each of its rows: (B or B · P, ...) → (R, ...)."""
        wide = maps.repeat_interleave(self.count, dim=0) if self.joined else maps  # (B · P, ...)
        return torch.cat((wide, maps)) if self.guided else wide

    def settle(
        self,
        transformer: NextScaleTransformer,
        hidden: Tensor,
        condition: Conditioning,
        share: float,
    ) -> Tensor:
        """Joins the streams, applies the output norm, and guides.

        Heads are linear, or ask for guidance on what goes into them, so this happens in front of
        the head.

        Args:
            transformer: whose output norm.
            hidden: (R, T, C), of all rows.
            condition: of all rows.
            share: of the guidance at this scale, 0..1.

        Returns:
            (B or B · P, T, C).
        """
        half, device = self.conditional, hidden.device
        states, kept = hidden[:half], torch.arange(half, device=device)
        if self.joined and self.trained is not None:
            states = self.trained.aggregate(states.unflatten(0, (-1, self.count)))  # (B, T, C)
        if self.joined:
            kept = kept[:: self.count]
        if not (self.guided and share):  # the other rows have no weight
            return transformer.output_norm(states, condition, kept)
        states = torch.cat((states, hidden[half:])) if self.joined else hidden
        kept = torch.cat((kept, torch.arange(half, len(hidden), device=device)))
        normed = transformer.output_norm(states, condition, kept)
        conditional, unconditional = normed.float().chunk(2)
        return guided(conditional, unconditional, share * self._strength).to(normed.dtype)


class NextScaleGenerator(nn.Module):
    """A class-conditional generator on a :class:`NextScaleTransformer`."""

    transformer: NextScaleTransformer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.positions.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer's weights."""
        return self.transformer.positions.dtype

    @property
    def packed(self) -> bool:
        """Whether weights are packed (``VAR.pack``)."""
        return any(isinstance(module, PackedLinear) for module in self.modules())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What casts and moves call.

        Raises:
            ValueError: the model is packed.
        """
        if self.packed:  # before anything of it is cast or moved
            raise ValueError("a packed model cannot be cast or moved; do so before pack()")
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def label_tensor(self, labels: Labels) -> Tensor:
        """Labels as the transformer takes them.

        Args:
            labels: (B,) integers in 0..classes − 1; in a sequence None stands for no label.

        Returns:
            (B,), int64, on the model's device.

        Raises:
            ValueError: there are none, or one is out of range or not an integer.
        """
        classes = self.transformer.config.classes
        if isinstance(labels, Tensor):
            labels = labels.tolist()
        if not isinstance(labels, Iterable) or not (values := list(labels)):
            raise ValueError(f"labels must be a list of at least one label, got {labels!r}")
        filled = []
        for value in values:
            try:
                label = classes if value is None else operator.index(value)
            except TypeError:
                label = -1
            if not 0 <= label < classes and value is not None:
                raise ValueError(
                    f"labels must be integers in 0..{classes - 1} or None, got {value!r}"
                )
            filled.append(label)
        return torch.tensor(filled, device=self.device)

    def compile(self, **options: Any) -> None:
        """Compiles the blocks for generation, in place; the first pictures then take minutes.

        Args:
            options: of ``torch.compile``, such as ``backend``; shapes are dynamic, so that one
                compilation serves all scales, batches and streams.

        Raises:
            ValueError: the model is packed.
        """
        if self.packed:
            raise ValueError("a packed model cannot be compiled; compile it instead of pack()")
        for block in self.transformer.layers():
            block.attention.compile_around_cache()
            block.compile(dynamic=True, **options)  # type: ignore[no-untyped-call]

    def lay_out(
        self,
        labels: Labels,
        *,
        guidance: float,
        streams: ParallelStreams | int | None,
        mode: Mode,
    ) -> Rows:
        """The rows of a generation.

        Args:
            labels: (B,) integers; None in a sequence: no label.
            guidance: weight at the last scale.
            streams: trained prefixes, a number of plain streams, or None: the plain model.
            mode: what the streams are for.

        Raises:
            ValueError: a label, ``streams`` or ``mode`` is out of range, or the streams are
                another backbone's.
        """
        wanted = self.label_tensor(labels)
        count, trained = self._streams(streams, mode)
        return Rows(
            wanted,
            null=self.transformer.null_label,
            count=count,
            trained=trained,
            joined=streams is not None and mode == "aggregate",
            guidance=guidance,
        )

    def _streams(
        self, streams: ParallelStreams | int | None, mode: str
    ) -> tuple[int, ParallelStreams | None]:
        """Number of streams of a generation, and their parameters where they have any."""
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be 'diverse' or 'aggregate', got {mode!r}")
        if streams is None:
            return 1, None
        count = stream_count(streams)
        if isinstance(streams, ParallelStreams):
            streams.check_fits(self.transformer.config, self.device)
            return count, streams
        if mode == "aggregate" and count > 1:
            raise ValueError(
                f"aggregate mode needs trained streams, not only their number {count}; "
                "give a ParallelStreams (--streams-weights)"
            )
        return count, None

    @staticmethod
    def by_stream(images: Tensor, streams: ParallelStreams | int | None, mode: Mode) -> Tensor:
        """(B · P, 3, H, W) → (B, P, 3, H, W) in diverse mode; without streams as they are."""
        if streams is None or mode == "aggregate":
            return images
        return images.view(-1, stream_count(streams), *images.shape[1:])

    def teach(
        self,
        labels: Tensor,
        maps: Tensor,
        streams: ParallelStreams | None = None,
        *,
        each: bool = False,
    ) -> Tensor:
        """What goes into the head at all scales when everything before is known (training).

        Args:
            labels: (B,), int64 in 0..classes; ``classes`` for none.
            maps: (B, L − T₀, I), the inputs of all scales but the first.
            streams: join the streams' last hidden states (aggregate); None: the plain model.
            each: also return every stream's own, (B, 1 + P, L, C): the joined ones first.

        Returns:
            (B, L, C), behind the output norm.

        Raises:
            ValueError: the streams are another backbone's, or ``each`` is asked for without any.
        """
        if each and streams is None:
            raise ValueError("each is of streams, and there are none; give streams or leave it out")
        transformer = self.transformer
        count = 1 if streams is None else streams.count
        prefix = None
        if streams is not None:
            streams.check_fits(transformer.config, self.device)
            prefix = streams.prefixes(len(labels) * count)
        condition = transformer.condition(labels.repeat_interleave(count))
        x = transformer.teacher_input(maps.repeat_interleave(count, dim=0), condition)
        length = 0 if prefix is None or streams is None else streams.prefix_tokens
        mask = transformer.block_causal_mask(x.device, length)
        hidden = transformer(x, condition, mask=mask, prefixes=prefix)  # (B · P, L, C)
        if streams is None:
            return transformer.output_norm(hidden, condition)
        joined = streams.aggregate(hidden.unflatten(0, (-1, count)))  # (B, L, C)
        normed = transformer.output_norm(joined, condition, slice(None, None, count))
        if not each:
            return normed
        single = transformer.output_norm(hidden, condition).unflatten(0, (-1, count))
        return torch.cat((normed[:, None], single), dim=1)

    # --- what it costs ---

    @staticmethod
    def rows(
        batch: int = 1, *, guidance: bool = True, streams: int = 1, mode: Mode = "diverse"
    ) -> int:
        """Rows that go through every block at once.

        Args:
            batch: labels.
            guidance: whether unconditional rows run too.
            streams: P.
            mode: in aggregate mode there is one unconditional row a label, else P.
        """
        unconditional = batch * (1 if mode == "aggregate" else streams) if guidance else 0
        return batch * streams + unconditional

    def head_flops(self, scale: int) -> int:
        """FLOPs of the head a token at a scale (0 is the first)."""
        raise NotImplementedError

    def flops(
        self,
        batch: int = 1,
        *,
        guidance: bool = True,
        streams: int = 1,
        prefix: int = 0,
        mode: Mode = "diverse",
    ) -> list[int]:
        """FLOPs of transformer and head at every scale (a multiply-add counts two).

        Args:
            batch: different labels.
            guidance: whether unconditional rows run too.
            streams: P.
            prefix: tokens of a stream's prefix.
            mode: in aggregate mode the head runs once for all streams, and what joins them (two
                layers, and the weighted sum) is counted too.
        """
        rows = self.rows(batch, guidance=guidance, streams=streams, mode=mode)
        counts = self.transformer.flops(rows, prefix, batch + (1 if guidance else 0))
        pictures = batch * (1 if mode == "aggregate" else streams)
        width, joining = self.transformer.config.width, 0
        if mode == "aggregate" and streams > 1:
            joining = 2 * streams * (width * width + width + width)
        for scale, tokens in enumerate(self.transformer.config.counts):
            counts[scale] += pictures * tokens * (self.head_flops(scale) + joining)
        return counts

    def kv_cache_bytes(
        self,
        batch: int = 1,
        *,
        guidance: bool = True,
        streams: int = 1,
        prefix: int = 0,
        mode: Mode = "diverse",
    ) -> int:
        """Bytes of the key/value cache of one generation.

        Args:
            batch: labels.
            guidance: whether unconditional rows run too.
            streams: P.
            prefix: tokens of a stream's prefix.
            mode: see :meth:`rows`.
        """
        rows = self.rows(batch, guidance=guidance, streams=streams, mode=mode)
        return self.transformer.kv_cache_bytes(rows, prefix)

"""Parallel streams: P different continuations through one backbone, in one batch.

Source: Chen et al., "Parallel Scaling Law for Language Models" (2025). A stream differs from the
others by learned keys and values in front of every layer's own (a prefix); what the streams say is
joined by weights that an MLP computes from all of their hidden states.

There is no loop over streams anywhere: streams are rows of a batch.

Shapes: N labels, P streams, R rows, T tokens, C width, H heads, S prefix tokens, D head width.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parscale_ear import checkpoint
from parscale_ear.checks import check_whole
from parscale_ear.generator.attention import KVCache
from parscale_ear.generator.transformer import TransformerConfig

PREFIX_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class StreamsConfig:
    """Sizes of the streams' parameters and of the backbone that they fit."""

    count: int  # streams, P
    depth: int  # layers of the backbone
    width: int  # channels of the backbone
    heads: int  # attention heads of the backbone
    l2_norm: bool = True  # the backbone's keys are unit vectors, so the prefixes' are, too
    prefix_tokens: int = PREFIX_TOKENS  # keys and values a layer and a stream
    smoothing: float = 0.1  # share of the weights that is spread evenly over the streams

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        check_whole(1, streams=self.count, depth=self.depth, width=self.width, heads=self.heads)
        check_whole(0, prefix_tokens=self.prefix_tokens)
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads = {self.heads}, got {self.width}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, got {self.smoothing}")


class ParallelStreams(nn.Module):
    """Prefixes and dynamic aggregation for P streams through one backbone.

    With P = 1 there is nothing to tell apart and nothing to join: no parameter is added, and the
    results are bit for bit those of the plain backbone.
    """

    def __init__(self, config: StreamsConfig) -> None:
        """Fresh parameters: random prefixes, equal weights.

        Args:
            config: sizes; :meth:`fitting` takes them from a backbone.
        """
        super().__init__()
        self.config = config
        if config.count == 1:
            self.register_parameter("prefix", None)
            self.mixer = None
            return
        head_width = config.width // config.heads
        shape = (2, config.depth, config.count, config.heads, config.prefix_tokens, head_width)
        self.prefix = nn.Parameter(torch.randn(shape) * head_width**-0.5)
        self.mixer = nn.Sequential(
            nn.Linear(config.count * config.width, config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.count),
        )
        last = self.mixer[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)  # all streams weigh the same at first
        nn.init.zeros_(last.bias)

    @classmethod
    def fitting(
        cls,
        backbone: TransformerConfig,
        count: int,
        *,
        prefix_tokens: int = PREFIX_TOKENS,
        smoothing: float = 0.1,
    ) -> ParallelStreams:
        """Streams with fresh parameters for a backbone.

        Raises:
            ValueError: ``count`` is below 1, or another argument is out of range.
        """
        return cls(cls.check(backbone, count, prefix_tokens, smoothing))

    @staticmethod
    def check(
        backbone: TransformerConfig,
        count: int,
        prefix_tokens: int = PREFIX_TOKENS,
        smoothing: float = 0.1,
    ) -> StreamsConfig:
        """The config of streams that fit a backbone.

        Raises:
            ValueError: ``count`` is below 1, or another argument is out of range.
        """
        return StreamsConfig(
            count=count,
            depth=backbone.depth,
            width=backbone.width,
            heads=backbone.heads,
            l2_norm=backbone.l2_norm,
            prefix_tokens=prefix_tokens,
            smoothing=smoothing,
        )

    @property
    def count(self) -> int:
        """P."""
        return self.config.count

    @property
    def prefix_tokens(self) -> int:
        """Slots that the prefix takes in the cache; 0 for one stream."""
        return 0 if self.prefix is None else self.config.prefix_tokens

    def check_fits(self, backbone: TransformerConfig, device: torch.device | None = None) -> None:
        """Checks that the streams were made for such a backbone, and are where it is.

        Raises:
            ValueError: depth, width, heads, the kind of attention or the device differ; the
                message says how.
        """
        if self.count == 1:
            return
        if device is not None and self.prefix is not None and self.prefix.device != device:
            raise ValueError(
                f"the streams are on {self.prefix.device}, the backbone on {device}; move them: "
                f'streams.to("{device}")'
            )
        differ = [
            f"{name} {getattr(self.config, name)} instead of {getattr(backbone, name)}"
            for name in ("depth", "width", "heads", "l2_norm")
            if getattr(self.config, name) != getattr(backbone, name)
        ]
        if differ:
            raise ValueError(f"the streams were made for another backbone: {', '.join(differ)}")

    def _prefixes(self) -> Tensor:
        """(2, depth, P, H, S, D), keys as the attention compares them."""
        assert self.prefix is not None
        if not self.config.l2_norm:
            return self.prefix
        return torch.stack((F.normalize(self.prefix[0], dim=-1), self.prefix[1]))

    @torch.no_grad()
    def fill(self, cache: KVCache, stream_of: Tensor) -> None:
        """Copies the prefixes into the first slots of an empty cache, once for all layers.

        Args:
            cache: of R rows.
            stream_of: (R,), int64, the stream of every row.

        Raises:
            ValueError: the cache is not empty, or has another number of rows.
        """
        if self.prefix is None or not self.prefix_tokens:
            return
        rows = cache.slots.shape[2]
        if cache.length or rows != len(stream_of):
            raise ValueError(
                f"prefixes of {len(stream_of)} rows go into an empty cache of as many, got "
                f"{cache.length} tokens and {rows} rows"
            )
        slots = cache.slots[..., : self.prefix_tokens, :]  # (2, depth, R, H, S, D)
        slots.copy_(self._prefixes()[:, :, stream_of])
        cache.advance(self.prefix_tokens)

    def prefixes(self, rows: int) -> list[tuple[Tensor, Tensor]] | None:
        """A layer, keys and values of all rows, (R, H, S, D) each, with gradients (training)."""
        if self.prefix is None or not self.prefix_tokens:
            return None
        repeats = rows // self.count
        keys, values = self._prefixes()  # (depth, P, H, S, D) each
        keys = keys[:, None].expand(-1, repeats, -1, -1, -1, -1).flatten(1, 2)
        values = values[:, None].expand(-1, repeats, -1, -1, -1, -1).flatten(1, 2)
        return list(zip(keys, values, strict=True))

    def weights(self, hidden: Tensor) -> Tensor:
        """Weights of the streams.

        Args:
            hidden: (N, P, T, C), the backbone's last hidden states.

        Returns:
            (N, P, T), positive, with sum 1 over the streams.
        """
        if self.mixer is None:
            return torch.ones_like(hidden[..., 0])
        states = hidden.permute(0, 2, 1, 3).flatten(2)  # (N, T, P · C)
        dtype = next(self.mixer.parameters()).dtype
        share = self.mixer(states.to(dtype)).float().softmax(dim=-1)  # (N, T, P)
        smoothing = self.config.smoothing
        return (share * (1 - smoothing) + smoothing / self.count).transpose(1, 2)  # type: ignore[no-any-return]

    def aggregate(self, hidden: Tensor) -> Tensor:
        """Joins the streams.

        Args:
            hidden: (N, P, T, C).

        Returns:
            (N, T, C); for one stream its own states, unchanged.
        """
        if self.mixer is None:
            return hidden[:, 0]
        weights = self.weights(hidden).to(hidden.dtype)
        return torch.einsum("npt,nptc->ntc", weights, hidden)

    def save_pretrained(self, path: str | os.PathLike[str], **facts: Any) -> Path:
        """Writes parameters and config as one safetensors file.

        Args:
            path: a ``.safetensors`` file, or a folder that gets a ``model.safetensors``.
            facts: further JSON-serialisable header entries (recipe, backbone's digest ...).

        Raises:
            ValueError: a fact has a name that is taken.
        """
        return checkpoint.save_model(
            path, self.state_dict(), facts, kind=type(self).__name__, config=asdict(self.config)
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        backbone: str | None = None,
        device: torch.device | str | None = None,
    ) -> ParallelStreams:
        """Reads what :meth:`save_pretrained` wrote.

        Args:
            path: the file.
            backbone: fingerprint of the backbone that they are for, to be compared with the one
                that they were trained on; None: not compared.
            device: where to; None: the CPU.

        Raises:
            CheckpointError: the file is missing, damaged or foreign, or the streams were trained
                on another backbone.
        """
        tensors, header = checkpoint.load(path, kind=cls.__name__)
        if backbone is not None and header.get("backbone") not in (None, backbone):
            raise checkpoint.CheckpointError(
                f"{path}: these streams were trained on another backbone (or on this one before its weights were "
                "rounded to BF16); use them with that one"
            )
        try:
            config = StreamsConfig(**header["config"])
            with torch.random.fork_rng(devices=()):  # fresh weights are thrown away: no draw counts
                streams = cls(config).float()  # whatever the default is
            streams.load_state_dict(tensors)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise checkpoint.CheckpointError(f"{path}: {reason}") from error
        return streams.to(device or "cpu").eval()

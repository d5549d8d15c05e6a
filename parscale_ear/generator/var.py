"""VAR: class-conditional pictures by next-scale prediction of tokens, in one or P streams.

Source: Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale
Prediction" (NeurIPS 2024); streams after Chen et al., "Parallel Scaling Law for Language Models"
(2025).

Shapes: B labels, P streams, R rows of a generation (:mod:`.base`), K scales, T tokens of a scale,
L tokens of all scales, V vocabulary, Z latent channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parscale_ear import checkpoint
from parscale_ear.checkpoint import CheckpointError
from parscale_ear.checks import check_whole
from parscale_ear.device import check_finite
from parscale_ear.generator.base import Labels, Mode, NextScaleGenerator
from parscale_ear.generator.packing import PackedLinear
from parscale_ear.generator.sampling import check_sampling, sample_tokens
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.generator.transformer import NextScaleTransformer, TransformerConfig
from parscale_ear.generator.vqvae import VQVAE, VQVAEConfig

HEAD_WIDTH = 64  # channels of a head in the published models


@dataclass(frozen=True, kw_only=True)
class VARConfig:
    """Sizes of a VAR; the defaults are those of ``var_d16``. Depth 20, 24, 30 likewise."""

    depth: int = 16  # blocks
    width: int | None = None  # channels; None: 64 · depth
    heads: int | None = None  # attention heads; None: width / 64
    classes: int = 1000  # labels; one more stands for "no label"
    l2_norm: bool = True  # unit queries and keys, a learned scale a head
    shared_modulation: bool = False  # one modulation for all blocks, and an offset in each
    vqvae: VQVAEConfig = field(default_factory=VQVAEConfig)  # the tokenizer

    def __post_init__(self) -> None:
        """Fills in what was left out, and checks.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        check_whole(1, depth=self.depth)
        if self.width is None:
            object.__setattr__(self, "width", HEAD_WIDTH * self.depth)
        if self.heads is None:
            object.__setattr__(self, "heads", max(1, (self.width or 0) // HEAD_WIDTH))
        self.transformer  # noqa: B018 - its checks

    @property
    def transformer(self) -> TransformerConfig:
        """The transformer's part."""
        assert self.width is not None
        assert self.heads is not None
        return TransformerConfig(
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            counts=tuple(side * side for side in self.vqvae.sides),
            classes=self.classes,
            input_channels=self.vqvae.latent_channels,
            l2_norm=self.l2_norm,
            shared_modulation=self.shared_modulation,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VARConfig:
        """The inverse of ``dataclasses.asdict``, also after a trip through JSON.

        Raises:
            ValueError: a field is unknown, missing or out of range.
        """
        try:
            tokenizer: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in values["vqvae"].items()
            }
            return cls(**{**values, "vqvae": VQVAEConfig(**tokenizer)})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a VAR config: {error}") from error


@dataclass(frozen=True)
class ScaleEvent:
    """What a callback is told after each scale."""

    scale: int  # number of the scale that is done, from 0
    scales: int  # how many there are
    tokens: Tensor  # (B or B · P, T), int64: what was drawn
    render: Callable[[], Tensor]  # decodes what there is so far: (B or B · P, 3, H, W) in [−1, 1]


class VAR(NextScaleGenerator):
    """Tokenizer, transformer and head.

    Example:
        >>> var = VAR.from_official("vae_ch160v4096z32.pth", "var_d16.pth")
        >>> images = var.generate([207, 980], generator=torch.Generator().manual_seed(0))
    """

    def __init__(self, config: VARConfig | None = None) -> None:
        """Builds the model with fresh weights in FP32.

        Args:
            config: sizes; the default is VAR-d16.
        """
        super().__init__()
        self.config = config = config or VARConfig()
        self.vqvae = VQVAE(config.vqvae)
        self.transformer = NextScaleTransformer(config.transformer)
        head = nn.Linear(config.transformer.width, config.vqvae.vocabulary)
        nn.init.trunc_normal_(head.weight, std=0.02 * (1 / config.transformer.width / 3) ** 0.5)
        nn.init.zeros_(head.bias)
        self.head: nn.Linear | PackedLinear = head
        vqvae = sum(p.numel() for p in self.vqvae.parameters())
        total = sum(p.numel() for p in self.parameters())
        self._counts = {"vqvae": vqvae, "transformer": total - vqvae, "total": total}

    def set_dtype(self, dtype: torch.dtype) -> VAR:
        """Casts transformer, head and the tokenizer's convolutions, in place.

        The quantiser stays in FP32: the nearest codebook vector must not hang on rounding.

        Args:
            dtype: ``torch.bfloat16``, ``torch.float16`` or ``torch.float32``.

        Raises:
            ValueError: the model is packed.
        """
        return self.to(dtype)

    def pack(self) -> VAR:
        """Packs the transformer's weights for fast inference on the CPU, in place.

        The packed model takes the same memory and gives the same logits but for rounding; it
        cannot be trained, saved, cast or moved any more.

        Raises:
            ValueError: the weights are not BF16 or FP32 on the CPU.
            NotImplementedError: this PyTorch lacks the operators.
        """
        with torch.no_grad():
            for block in self.transformer.layers():
                block.pack()
            if isinstance(self.head, nn.Linear):
                self.head = PackedLinear(self.head.weight, self.head.bias)
        return self

    # --- teacher forcing ---

    def logits(
        self,
        labels: Labels,
        tokens: Sequence[Tensor],
        *,
        streams: ParallelStreams | None = None,
    ) -> Tensor:
        """Logits of all scales when the tokens are known.

        Args:
            labels: (B,) integers; None in a sequence: no label.
            tokens: (B, side²) int64 a scale; those of the last scale are not looked at.
            streams: join the streams' last hidden states (aggregate); None: the plain model.

        Returns:
            (B, L, V), in the model's dtype.

        Raises:
            ValueError: a label is out of range, the tokens have the wrong shapes, or the streams
                are another backbone's.
        """
        rows = self.label_tensor(labels)
        self._check_tokens(tokens, len(rows))
        maps = self.vqvae.quantizer.teacher_input(tokens)  # (B, L − T₀, Z)
        return self.logits_from_maps(rows, maps, streams)

    def logits_from_maps(
        self,
        labels: Tensor,
        maps: Tensor,
        streams: ParallelStreams | None = None,
        *,
        each: bool = False,
    ) -> Tensor:
        """As :meth:`logits`, with labels as a tensor and inputs looked up before (training).

        Args:
            labels: (B,), int64 in 0..classes; ``classes`` for none.
            maps: (B, L − T₀, Z), from ``vqvae.quantizer.teacher_input``.
            streams: as for :meth:`logits`.
            each: also return every stream's own logits, (B, 1 + P, L, V): joined ones first.
        """
        return self.head(self.teach(labels, maps, streams, each=each))  # type: ignore[no-any-return]

    def _check_tokens(self, tokens: Sequence[Tensor], batch: int) -> None:
        expected = [(batch, side * side) for side in self.config.vqvae.sides]
        found = [tuple(part.shape) for part in tokens]
        if found != expected:
            raise ValueError(f"tokens must have the shapes {expected}, got {found}")
        vocabulary = self.config.vqvae.vocabulary
        if any(part.numel() and not 0 <= int(part.min()) <= int(part.max()) < vocabulary
               for part in tokens):  # fmt: skip
            raise ValueError(f"tokens must lie in 0..{vocabulary - 1}")

    # --- generation ---

    @torch.no_grad()
    def generate_tokens(
        self,
        labels: Labels,
        *,
        guidance: float = 1.5,
        top_k: int | None = 900,
        top_p: float = 0.95,
        generator: torch.Generator | None = None,
        streams: ParallelStreams | int | None = None,
        mode: Mode = "diverse",
        callback: Callable[[ScaleEvent], object] | None = None,
        on_logits: Callable[[int, Tensor], object] | None = None,
        forced: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Draws the tokens of all scales; arguments as for :meth:`generate`.

        Args:
            labels: see there, as the others.
            guidance: see there.
            top_k: see there.
            top_p: see there.
            generator: see there.
            streams: see there.
            mode: see there.
            callback: see there.
            on_logits: called a scale with its number and the guided logits, (B or B · P, T, V).
            forced: tokens to take instead of drawing, (B or B · P, T) a scale.

        Returns:
            Tokens a scale, (B or B · P, T), and the latent that they add up to, (B or B · P, Z,
            h, w) in FP32.
        """
        check_sampling(top_k, top_p, guidance)
        rows = self.lay_out(labels, guidance=guidance, streams=streams, mode=mode)
        if forced is not None:
            self._check_tokens(forced, rows.pictures)
        transformer, quantizer = self.transformer, self.vqvae.quantizer
        condition = transformer.condition(rows.labels)
        cache = rows.new_cache(transformer)
        side, device = quantizer.sides[-1], rows.labels.device
        latent = torch.zeros(rows.pictures, quantizer.channels, side, side, device=device)
        extremes: list[Tensor] = []
        tokens: list[Tensor] = []
        scales = len(quantizer.sides)
        for scale in range(scales):
            # (R, T, Z)
            maps = rows.spread(quantizer.resized(scale, latent)) if scale else None
            x = transformer.embed(scale, maps, condition)  # (R, T, C)
            hidden = transformer(x, condition, cache=cache)  # (R, T, C)
            share = scale / max(1, scales - 1)  # of the guidance
            normed = rows.settle(transformer, hidden, condition, share)
            logits = self.head(normed).float()  # (pictures, T, V)
            # Both ends are finite only if all is: NaN is the lowest and the highest.
            extremes += torch.aminmax(logits)
            if on_logits is not None:
                on_logits(scale, logits)
            if forced is not None:
                drawn = forced[scale]
            else:
                drawn = sample_tokens(logits, top_k=top_k, top_p=top_p, generator=generator)
            tokens.append(drawn)
            latent = latent + quantizer.contribution(scale, drawn)
            if callback is not None:
                check_finite(
                    torch.stack(extremes), "logits"
                )  # nobody is shown what damaged weights draw
                render = partial(self.vqvae.decode_latent, latent)
                callback(ScaleEvent(scale, scales, drawn, render))
        check_finite(torch.stack(extremes), "logits")
        return tokens, latent

    def generate(
        self,
        labels: Labels,
        guidance: float = 1.5,
        top_k: int | None = 900,
        top_p: float = 0.95,
        generator: torch.Generator | None = None,
        streams: ParallelStreams | int | None = None,
        mode: Mode = "diverse",
        callback: Callable[[ScaleEvent], object] | None = None,
    ) -> Tensor:
        """Draws pictures; deterministic for one generator state, device and dtype.

        Args:
            labels: (B,) integers in 0..classes − 1; None in a sequence: no label.
            guidance: weight of classifier-free guidance at the last scale; it rises from 0 at the
                first. 0: none, and no unconditional rows are computed.
            top_k: draw among as many likeliest tokens; None or 0: all.
            top_p: draw among the likeliest tokens of this probability together, in (0, 1].
            generator: of the draws, on any device (on the CPU: the same noise
                everywhere); None: PyTorch's own.
            streams: P streams in one pass: trained prefixes, or a number P of plain streams
                (``mode="diverse"``). None: the plain model.
            mode: ``"diverse"``: every stream draws for itself; ``"aggregate"``: one picture from
                all streams.
            callback: called after each scale.

        Returns:
            (B, 3, H, W) in [−1, 1]; with streams in diverse mode (B, P, 3, H, W).

        Raises:
            ValueError: an argument is out of range, the streams are another backbone's, or the
                logits were not finite.
        """
        _, latent = self.generate_tokens(
            labels,
            guidance=guidance,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            streams=streams,
            mode=mode,
            callback=callback,
        )
        with torch.no_grad():
            images = self.vqvae.decode_latent(latent)
        return self.by_stream(images, streams, mode)

    # --- what it costs ---

    def parameter_count(self) -> dict[str, int]:
        """Parameters of ``vqvae``, ``transformer`` (head included), and their ``total``."""
        return dict(self._counts)  # a packed model has parameters no longer

    def head_flops(self, scale: int) -> int:
        """FLOPs of the head a token, the same at every ``scale``."""
        return 2 * self.config.transformer.width * self.config.vqvae.vocabulary

    def generation_bytes(
        self,
        batch: int = 1,
        *,
        guidance: bool = True,
        streams: int = 1,
        prefix: int = 0,
        mode: Mode = "diverse",
    ) -> int:
        """Bytes that one generation takes beside the model, at its peak.

        An estimate from sizes alone, for comparison with what is measured, of the cache and the
        largest of what comes beside it: at the last scale, a token and row, the residual stream,
        the normed input, the MLP's hidden state and its result, or logits, as the model gives
        them, in FP32, and the draw's; then the decoder at full resolution (five feature maps). On
        the CPU the cache's memory is kept for the next one while the decoder runs, a picture at a
        time; elsewhere it is free by then, and all pictures are decoded at once.

        Args:
            batch: labels.
            guidance: whether unconditional rows run too.
            streams: P.
            prefix: tokens of a stream's prefix.
            mode: see :meth:`rows`.
        """
        config, tokenizer = self.config.transformer, self.config.vqvae
        rows = self.rows(batch, guidance=guidance, streams=streams, mode=mode)
        tokens = config.counts[-1]
        item = self.transformer.positions.element_size()
        blocks = rows * tokens * config.width * (3 + config.mlp_ratio) * item
        pictures = batch * (1 if mode == "aggregate" else streams)
        sampling = pictures * tokens * tokenizer.vocabulary * (item + 4 + 4)
        cache = self.transformer.kv_cache_bytes(rows, prefix)
        decoder = 5 * tokenizer.width * tokenizer.image_side**2 * item
        if self.device.type == "cpu":
            return cache + max(blocks, sampling, decoder)
        return max(cache + max(blocks, sampling), pictures * decoder)

    # --- in and out ---

    def fingerprint(self) -> str:
        """SHA-256 of the transformer's and the head's weights; streams name their backbone by it.

        Of the weights as they are: take it before casting.

        Raises:
            ValueError: the model is packed.
        """
        if self.packed:
            raise ValueError("a packed model has no fingerprint; take it before pack()")
        tensors = {k: v for k, v in self.state_dict().items() if not k.startswith("vqvae.")}
        return checkpoint.digest(tensors)

    def save_pretrained(self, path: str | os.PathLike[str], **facts: Any) -> Path:
        """Writes weights and config as one safetensors file.

        Args:
            path: a ``.safetensors`` file, or a folder that gets a ``model.safetensors``.
            facts: further JSON-serialisable header entries (recipe, source ...).

        Raises:
            ValueError: the model is packed, or a fact has a name that is taken.
        """
        if self.packed:
            raise ValueError("a packed model cannot be saved; save it before pack()")
        return checkpoint.save_model(
            path, self.state_dict(), facts, kind="VAR", config=asdict(self.config)
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> VAR:
        """Reads what :meth:`save_pretrained` wrote; in evaluation mode.

        Args:
            path: the file.
            device: where to; None: the CPU.
            dtype: of transformer and convolutions; None: as stored.

        Raises:
            CheckpointError: the file is missing, damaged or foreign.
            ValueError: ``dtype`` is not of floating-point numbers of 16 bits or more.
        """
        checkpoint.check_stored_dtype(dtype)
        tensors, header = checkpoint.load(path, kind="VAR")
        try:
            with torch.device("meta"):
                model = cls(VARConfig.from_dict(header["config"]))
            model.load_state_dict(tensors, assign=True)
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path}: {reason}") from error
        model = model.to(device=device or "cpu")
        model.vqvae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return (model if dtype is None else model.set_dtype(dtype)).eval()

    @classmethod
    def from_official(
        cls,
        vqvae_path: str | os.PathLike[str],
        var_path: str | os.PathLike[str],
        *,
        heads: int | None = None,
        depth: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> VAR:
        """Loads the authors' checkpoints, ``vae_ch160v4096z32.pth`` and ``var_d*.pth``.

        Sizes are read off the tensors. Every key must be accounted for.

        Args:
            vqvae_path: the tokenizer's file.
            var_path: the transformer's file.
            heads: attention heads, where the tensors do not tell them (plain attention, which no
                published checkpoint has); None: one a 64 channels then.
            depth: blocks that the checkpoint must have; None: as many as it has.
            device: where to; None: the CPU.
            dtype: of transformer and convolutions; None: FP32.

        Raises:
            CheckpointError: a file is missing or not a state dict, keys are missing or foreign,
                shapes do not fit, or the depth is another.
            ValueError: ``dtype`` is not of floating-point numbers of 16 bits or more.
        """
        checkpoint.check_stored_dtype(dtype)
        from parscale_ear.generator.adapters import load_official

        model = load_official(cls, vqvae_path, var_path, heads=heads, depth=depth)
        model = model.to(device=device or "cpu")
        return (model if dtype is None else model.set_dtype(dtype)).eval()

"""EnergyAR: pictures from continuous tokens, drawn scale by scale with an energy-score head.

Next-scale prediction as in Tian et al., "Visual Autoregressive Modeling" (NeurIPS 2024), without a
codebook: what is predicted is a latent of the project's autoencoder, token by token a vector, drawn
in one pass of a head a band (the mean is one, details are three) after Shao et al., "Continuous Visual Autoregressive Generation via Score
Maximization" (ICML 2025); streams after Chen et al., "Parallel Scaling Law for Language Models"
(2025).

Shapes: B labels, P streams, R rows of a generation (:mod:`.base`), T tokens of a scale, Z latent
channels, S side of the latent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parscale_ear import checkpoint
from parscale_ear.autoencoder.files import Decoder
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.checkpoint import CheckpointError
from parscale_ear.device import check_finite
from parscale_ear.generator.attention import Cache, GrowingCache
from parscale_ear.generator.base import Labels, Mode, NextScaleGenerator, Rows
from parscale_ear.generator.ear_config import EARConfig, find_class
from parscale_ear.generator.energy import EnergyHead
from parscale_ear.generator.pyramid import LatentPyramid
from parscale_ear.generator.sampling import check_guidance, check_temperature
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.generator.transformer import NextScaleTransformer

SHIPPED_FILE = "ear.safetensors"
RECOMMENDED = {"guidance": 2.0, "temperature": 1.0}  # where weights say nothing
DEFAULT_DECODER: Decoder = "sharp"  # a drawn picture has no original to be faithful to


@dataclass(frozen=True)
class LatentEvent:
    """What a callback is told after each scale."""

    scale: int  # number of the scale that is done, from 0
    scales: int  # how many there are
    tokens: Tensor  # (B or B · P, T, Z or 3Z): what was drawn, normalised
    render: Callable[[], Tensor]  # decodes what there is so far: (B or B · P, 3, H, W) in [−1, 1]


class EnergyAR(NextScaleGenerator):
    """Trunk and energy head over the pyramid of an autoencoder's normalised latent.

    ``state_dict`` holds the weights alone: not what ``recommended`` says of guidance and temperature, nor
    ``latent_fingerprint``. ``save_pretrained`` and ``copy.deepcopy`` take all along.

    Example:
        >>> model = EnergyAR.from_pretrained()
        >>> images = model.generate([model.label("golf ball")], guidance=2.0)
        >>> images.shape
        torch.Size([1, 3, 128, 128])
    """

    def __init__(self, config: EARConfig) -> None:
        """Builds the model with fresh weights in FP32; the pyramid is not yet fitted."""
        super().__init__()
        self.config = config
        self.pyramid = LatentPyramid(config.channels, config.side, config.phases)
        self.transformer = NextScaleTransformer(config.transformer)
        self.head = EnergyHead(**config.head)
        head = sum(p.numel() for p in self.head.parameters())
        total = sum(p.numel() for p in self.parameters())
        self._counts = {"transformer": total - head, "head": head, "total": total}
        self._known_digests: dict[str, str] = {}  # of weights as rounded → fingerprint
        self.latent_fingerprint: str | None = None  # of the latent space that it was trained on
        self.recommended = dict(RECOMMENDED)  # what :meth:`generate` takes where it is not told
        self._autoencoder: tuple[ParScaleEAR, ...] = ()  # in a tuple: no part of the weights

    # --- the autoencoder that turns latents into pictures ---

    @property
    def autoencoder(self) -> ParScaleEAR:
        """What decodes the latents.

        Raises:
            ValueError: none is attached.
        """
        if not self._autoencoder:
            raise ValueError("no autoencoder is attached; call attach(ParScaleEAR...)")
        return self._autoencoder[0]

    def attach(self, autoencoder: ParScaleEAR) -> EnergyAR:
        """Takes an autoencoder for decoding; it is not saved with the weights.

        Args:
            autoencoder: of the latent space that this model was trained on, any decoder. It stays
                where it is, and decodes there; from then on it is moved to whatever device this
                model is moved to.

        Raises:
            TypeError: it is none.
            ValueError: it has another latent space.
        """
        if not isinstance(autoencoder, ParScaleEAR):
            raise TypeError(f"autoencoder must be a ParScaleEAR, got {type(autoencoder).__name__}")
        if self.latent_fingerprint not in (None, autoencoder.latent_fingerprint()):
            raise ValueError(
                "this generator was trained on latents of another autoencoder; use the one that "
                "it was trained with (in FP32 or FP16), or train it anew"
            )
        channels = autoencoder.config.litevae.latent_channels
        if channels != self.config.channels:
            raise ValueError(
                f"this generator draws latents of {self.config.channels} channels, the autoencoder "
                f"decodes {channels}"
            )
        self._autoencoder = (autoencoder,)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EnergyAR:
        """Moves the autoencoder along, but keeps its dtype."""
        super()._apply(fn, recurse)
        if self._autoencoder:
            self._autoencoder[0].to(self.device)
        return self

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(N, Z, S, S) → pictures (N, 3, 16S, 16S) in [−1, 1], in FP32.

        Raises:
            ValueError: no autoencoder is attached, or a picture has NaN or infinity in it.
        """
        autoencoder = self.autoencoder
        latents = latents.to(autoencoder.device, autoencoder.dtype)
        pictures = autoencoder.decode(autoencoder.enhance(latents)).float()
        check_finite(pictures, "decoded pictures")  # before infinity becomes white
        return pictures.clamp(-1, 1)

    # --- labels ---

    def label(self, name: str) -> int:
        """The label of a class name, whatever its case.

        Raises:
            ValueError: there is none; the message says which are near.
        """
        return find_class(name, self.config.class_names)

    # --- training ---

    def scores(
        self,
        labels: Tensor,
        latents: Tensor,
        streams: ParallelStreams | None = None,
        *,
        samples: int = 2,
        alpha: float = 1.0,
        temperature: float = 1.0,
        input_noise: float = 0.0,
        each: bool = False,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Energy scores of all scales when everything before each is known.

        Args:
            labels: (B,), int64 in 0..classes; ``classes`` for none.
            latents: (B, Z, S, S), normalised as the autoencoder gives them.
            streams: join the streams' last hidden states (aggregate); None: the plain model.
            samples: draws of every token.
            alpha: exponent of the score.
            temperature: weight of the draws' distance from each other.
            input_noise: largest deviation of noise on what is known.
            each: also score every stream's own states, behind the joined ones.
            generator: of the head's noise and the inputs'; on any device.

        Returns:
            (B, T, 1 or 3) a scale, FP32: of the mean, or of three bands; with ``each``
            (B, 1 + P, T, 1 or 3), the joined ones first.

        Raises:
            ValueError: shapes do not fit, ``samples`` is below 2, ``alpha`` out of (0, 2], the streams
                are another backbone's, or ``each`` is asked for without streams.
        """
        if labels.shape != latents.shape[:1]:
            raise ValueError(
                f"{len(latents)} latents need as many labels, got {tuple(labels.shape)}"
            )
        with torch.autocast(latents.device.type, enabled=False):
            maps = self.pyramid.teacher_input(latents, input_noise, generator)  # (B, L − 1, I)
            tokens = self.pyramid.encode(latents)
        states = self.teach(labels, maps, streams, each=each)  # (B, L, C), each: (B, 1 + P, L, C)
        if each:
            tokens = [part[:, None].expand(-1, states.shape[-3], -1, -1) for part in tokens]
        parts = states.split(self.pyramid.counts, dim=-2)
        # Scales of one level go through the head together: it does not tell them apart.
        found: list[Tensor] = []
        for level in range(self.pyramid.levels):
            chosen = [k for k, scale in enumerate(self.pyramid.scales) if scale.level == level]
            scores = self.head.scores(
                torch.cat([parts[k] for k in chosen], dim=-2),
                torch.cat([tokens[k] for k in chosen], dim=-2),
                level=level,
                samples=samples,
                alpha=alpha,
                temperature=temperature,
                generator=generator,
            )
            found += scores.split([self.pyramid.counts[k] for k in chosen], dim=-2)
        return found

    # --- generation ---

    @torch.no_grad()
    def generate_latents(
        self,
        labels: Labels,
        *,
        guidance: float | None = None,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
        streams: ParallelStreams | int | None = None,
        mode: Mode = "diverse",
        callback: Callable[[LatentEvent], object] | None = None,
    ) -> Tensor:
        """Draws latents; arguments as for :meth:`generate`.

        Args:
            labels: see there, as the others.
            guidance: see there.
            temperature: see there.
            generator: see there.
            streams: see there.
            mode: see there.
            callback: see there.

        Returns:
            (B or B · P, Z, S, S), normalised, FP32 (FP64 of a model in FP64).
        """
        recommended = {**RECOMMENDED, **self.recommended}
        guidance = recommended["guidance"] if guidance is None else guidance
        temperature = recommended["temperature"] if temperature is None else temperature
        check_guidance(guidance)
        check_temperature(temperature)
        rows = self.lay_out(labels, guidance=guidance, streams=streams, mode=mode)
        latents = self._draw(
            rows, rows.new_cache(self.transformer), temperature, generator, callback
        )
        check_finite(latents, "latents")
        return latents

    def _draw(
        self,
        rows: Rows,
        cache: Cache,
        temperature: float,
        generator: torch.Generator | None,
        callback: Callable[[LatentEvent], object] | None = None,
        known: Sequence[Tensor] = (),
    ) -> Tensor:
        """The scales, one after the other; those of ``known`` are given."""
        transformer, pyramid = self.transformer, self.pyramid
        condition = transformer.condition(rows.labels)
        scales, canvas = len(pyramid.scales), None
        for number, scale in enumerate(pyramid.scales):
            # (R, T, I)
            maps = None if canvas is None else rows.spread(pyramid.inputs(canvas, number))
            x = transformer.embed(number, maps, condition)  # (R, T, C)
            hidden = transformer(x, condition, cache=cache)
            if number < len(known):
                tokens = known[number]  # the trunk ran all the same: later scales need its keys
            else:
                states = rows.settle(transformer, hidden, condition, number / max(1, scales - 1))
                tokens = self.head.draw(
                    states, level=scale.level, temperature=temperature, generator=generator
                )  # (B or B · P, T, Z or 3Z)
            canvas = (
                pyramid.start(tokens) if canvas is None else pyramid.put(canvas, number, tokens)
            )
            if callback is not None:
                render = partial(self._render, canvas)
                callback(LatentEvent(number, scales, tokens, render))
        assert canvas is not None
        return pyramid.finish(canvas)

    def draw_with_gradient(
        self,
        labels: Tensor,
        generator: torch.Generator | None = None,
        known: Sequence[Tensor] = (),
    ) -> Tensor:
        """Draws latents that know how they depend on the weights (training); no guidance.

        Args:
            labels: (B,), int64 in 0..classes; ``classes`` for none.
            generator: of the noise.
            known: tokens of the first scales, (B, T, Z or 3Z) each, that are given instead of
                drawn; fewer than there are scales.

        Returns:
            (B, Z, S, S), normalised, FP32.

        Raises:
            ValueError: all scales are given, or tokens of another shape.
        """
        pyramid = self.pyramid
        shapes = [
            (len(labels), count, pyramid.width(scale.level))
            for count, scale in zip(pyramid.counts, pyramid.scales, strict=True)
        ]
        given = [tuple(part.shape) for part in known]
        if len(given) >= len(shapes) or given != shapes[: len(given)]:
            raise ValueError(
                f"known must be tokens of fewer than {len(shapes)} scales, of the shapes {shapes}; "
                f"got {given}"
            )
        rows = Rows(
            labels, null=self.transformer.null_label, count=1, trained=None, joined=False,
            guidance=0.0,
        )  # fmt: skip
        return self._draw(rows, GrowingCache(self.config.depth), 1.0, generator, known=known)

    def _render(self, canvas: Any) -> Tensor:
        return self.decode(self.pyramid.preview(canvas))

    def generate(
        self,
        labels: Labels,
        guidance: float | None = None,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
        streams: ParallelStreams | int | None = None,
        mode: Mode = "diverse",
        callback: Callable[[LatentEvent], object] | None = None,
    ) -> Tensor:
        """Draws pictures; deterministic for one generator state, device and dtype.

        Args:
            labels: (B,) integers in 0..classes − 1 (:meth:`label` gives those of names); None in
                a sequence: no label.
            guidance: weight of classifier-free guidance on the hidden states at the last scale;
                it rises from 0 at the first. 0: none, and no unconditional rows are computed.
                None: what the weights recommend (``recommended``).
            temperature: of the head's noise, in [0, 1]; below 1: less varied, 0: none; None: what
                the weights recommend.
            generator: of the noise, on any device (on the CPU: the same noise
                everywhere); None: PyTorch's own.
            streams: P streams in one pass: trained prefixes, or a number P of plain streams
                (``mode="diverse"``). None: the plain model.
            mode: ``"diverse"``: every stream draws for itself; ``"aggregate"``: one picture from
                all streams.
            callback: called after each scale.

        Returns:
            (B, 3, H, W) in [−1, 1]; with streams in diverse mode (B, P, 3, H, W).

        Raises:
            ValueError: an argument is out of range, the streams are another backbone's, no
                autoencoder is attached, or latents or pictures were not finite.
        """
        self.autoencoder  # noqa: B018 - fails before the work
        latents = self.generate_latents(
            labels,
            guidance=guidance,
            temperature=temperature,
            generator=generator,
            streams=streams,
            mode=mode,
            callback=callback,
        )
        return self.by_stream(self.decode(latents), streams, mode)

    # --- what it costs ---

    def parameter_count(self) -> dict[str, int]:
        """Parameters of ``transformer``, ``head``, and their ``total``."""
        return dict(self._counts)

    def head_flops(self, scale: int) -> int:
        """FLOPs of the head a token at a scale."""
        return self.head.flops(self.pyramid.scales[scale].level)

    def set_dtype(self, dtype: torch.dtype) -> EnergyAR:
        """Casts all but the pyramid, in place; half precision leaves its dtype as it is (FP32 as a rule)."""
        return self.to(dtype)

    # --- in and out ---

    def fingerprint(self) -> str:
        """SHA-256 of all weights (as FP16); streams name their backbone by it.

        The same for the model in FP32 and in FP16, as weights ship in FP16, and for one that was
        loaded in BF16. Cast to BF16 later, or stored in it, it is another.
        """
        found = checkpoint.digest({name: t.half() for name, t in self.state_dict().items()})
        return self._known_digests.get(found, found)

    def save_pretrained(
        self, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **facts: Any
    ) -> Path:
        """Writes weights, config and the latent space's fingerprint as one safetensors file.

        Args:
            path: a ``.safetensors`` file, or a folder that gets a ``model.safetensors``.
            dtype: store the weights in this dtype; the pyramid's statistics stay in FP32.
            facts: further JSON-serialisable header entries (recipe, figures ...).

        Raises:
            ValueError: ``dtype`` is of integers or of less than 16 bits, or a fact has a name that
                is taken.
        """
        checkpoint.check_stored_dtype(dtype)
        tensors = {
            name: tensor if dtype is None or name.startswith("pyramid.") else tensor.to(dtype)
            for name, tensor in self.state_dict().items()
        }
        return checkpoint.save_model(
            path,
            tensors,
            facts,
            kind="EnergyAR",
            config=asdict(self.config),
            latent_fingerprint=self.latent_fingerprint,
            recommended=self.recommended,
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> EnergyAR:
        """Reads weights alone, without an autoencoder; in evaluation mode.

        Args:
            path: a file that :meth:`save_pretrained` wrote.
            device: where to; None: the CPU.
            dtype: of the weights; None: FP32.

        Raises:
            CheckpointError: the file is missing, damaged or foreign.
            ValueError: ``dtype`` is not of floating-point numbers of 16 bits or more.
        """
        checkpoint.check_stored_dtype(dtype)
        tensors, header = checkpoint.load(path, kind="EnergyAR")
        try:
            config = EARConfig.from_dict(header["config"])
            with torch.random.fork_rng(devices=()):  # fresh weights are thrown away: no draw counts
                model = cls(config).float()  # whatever the default is
            model.load_state_dict(tensors)
            model.recommended.update(header.get("recommended") or {})
        except (ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path}: {reason}") from error
        model.latent_fingerprint = header.get("latent_fingerprint")
        model = model.to(device or "cpu")
        fingerprint = model.fingerprint() if dtype == torch.bfloat16 else None
        model = model.set_dtype(torch.float32 if dtype is None else dtype).eval()
        if fingerprint is not None:  # which BF16 rounds
            model._known_digests = {model.fingerprint(): fingerprint}
        return model

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        autoencoder: ParScaleEAR | None = None,
        decoder: Decoder | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> EnergyAR:
        """Reads weights and the autoencoder that they belong to; in evaluation mode.

        Args:
            path: a file that :meth:`save_pretrained` wrote; None: the shipped weights.
            autoencoder: what decodes; None: the shipped one.
            decoder: which of the shipped decoders, where ``autoencoder`` is None; None: the
                sharp one, as a drawn picture has no original to be faithful to.
            device: where to; None: the CPU.
            dtype: of the weights; None: FP32.

        Raises:
            CheckpointError: the file is missing, damaged or foreign, or was trained on another
                autoencoder's latents.
            TypeError: ``autoencoder`` is none.
            ValueError: both ``autoencoder`` and ``decoder`` are given, or ``dtype`` is none of
                PyTorch's.
        """
        if autoencoder is not None and decoder is not None:
            raise ValueError(
                "decoder chooses one of the shipped decoders, and autoencoder brings its own; give "
                "one of them"
            )
        path = shipped_generator() if path is None else Path(path)
        model = cls.load(path, device=device, dtype=dtype)
        if autoencoder is None:
            autoencoder = ParScaleEAR.from_pretrained(
                decoder=decoder or DEFAULT_DECODER, device=device
            )
        try:
            return model.attach(autoencoder)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error


def shipped_generator() -> Path:
    """Path of the generator's weights inside the package.

    Raises:
        CheckpointError: this package has none.
    """
    path = Path(str(resources.files("parscale_ear") / "weights" / SHIPPED_FILE))
    if not path.is_file():
        raise CheckpointError(
            "no generator weights come with this version; train some (parscale-ear train ear) and "
            "name them"
        )
    return path

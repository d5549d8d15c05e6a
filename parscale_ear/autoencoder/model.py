"""ParScaleEAR: LiteVAE encoder → normalised latent → Lite-Hybrid → LiteVAE decoder.

Shapes: B batch, H W pixels, h w latent height and width (H/16, W/16), Z latent channels.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parscale_ear import checkpoint
from parscale_ear.autoencoder.blocks import autocasts
from parscale_ear.autoencoder.config import ParScaleEARConfig
from parscale_ear.autoencoder.files import (
    Decoder,
    Variant,
    check_shared,
    leave_out,
    read,
    shipped_weights,
)
from parscale_ear.autoencoder.hybrid import BRANCHES, HybridLatent, check_branches
from parscale_ear.autoencoder.litevae import STRIDE, LiteVAE
from parscale_ear.autoencoder.posterior import LatentPosterior
from parscale_ear.autoencoder.tiling import check_tile, run_tiled
from parscale_ear.checks import check_whole
from parscale_ear.data.images import pad_to_multiple

_LOG_VARIANCE_RANGE = (-30.0, 20.0)


class ParScaleEAR(LiteVAE):
    """The autoencoder: 256×256 RGB → 32×16×16 → 256×256, 1.9 M parameters.

    Images are (B, 3, H, W) in [−1, 1], H and W multiples of 16; latents are (B, 32, H/16, W/16).
    With ``config.hybrid`` None it is the LiteVAE alone (the baseline) and ``enhance`` hands the
    latent on as it is.

    Example:
        >>> model = ParScaleEAR.from_pretrained()
        >>> latent = model.encode(images).mode()
        >>> restored = model.decode(model.enhance(latent), clamp=True)
    """

    latent_mean: Tensor  # (Z, 1, 1): a channel's mean before normalising
    latent_std: Tensor  # (Z, 1, 1): a channel's deviation likewise

    def __init__(self, config: ParScaleEARConfig | None = None) -> None:
        """Builds the model with fresh weights in FP32 on the CPU, channels-last.

        Args:
            config: sizes; the default is the shipped model's.
        """
        config = ParScaleEARConfig() if config is None else config
        super().__init__(config.litevae)
        self.config = config
        self.hybrid = None if config.hybrid is None else HybridLatent(config.hybrid)
        for parameter in self.parameters():
            if parameter.ndim == 4:  # as the kernels want it; activations follow
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        channels = self.config.litevae.latent_channels
        self.register_buffer("latent_mean", torch.zeros(channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(channels, 1, 1))
        self._known_digests: dict[str, str] = {}  # of weights as rounded → latent fingerprint

    # --- the way of an image ---

    def encode(
        self,
        images: Tensor,
        *,
        refinements: int = 0,
        pad: bool = False,
        tile: int | None = None,
        check_finite: bool = False,
    ) -> LatentPosterior:
        """Encodes images.

        Args:
            images: (B, 3, H, W) in [−1, 1]; H and W multiples of 16; in the model's dtype, or
                float32, float16 or bfloat16 under autocast; on the model's device.
            refinements: times that :meth:`refined` corrects the latent by what becomes of it; each
                costs a decoding and another encoding, decoding costs what it did. Latents of the
                shipped decoders are the same bit for bit without refinements only.
            pad: repeat the last row and column up to multiples of 16 instead of refusing other
                sizes; ``decode(size=(H, W))`` cuts that off again.
            tile: side in pixels, a multiple of 16, of the tiles in which the encoder runs; None:
                the whole at once. Tiles overlap by all that the convolutions see, so the result
                is the same but for the order of floating-point sums.
            check_finite: also look for NaN and infinity (waits for the device).

        Returns:
            The posterior of the normalised latent, (B, 32, H/16, W/16), sides rounded up.

        Raises:
            ValueError: rank, channels, size, refinements, tile, dtype or device are wrong, or a
                value is not finite.
        """
        check_whole(0, refinements=refinements)
        if (
            pad
            and isinstance(images, Tensor)
            and images.ndim == 4
            and images.numel()
            and images.is_floating_point()
        ):
            images = pad_to_multiple(images, STRIDE)
        self._check(images, "images", 3, STRIDE, check_finite)
        if tile is None:
            mean, log_variance = self.encoder(images)  # (B, Z, h, w) each
        else:
            mean, log_variance = run_tiled(
                self.encoder,
                images,
                tile=check_tile(tile, STRIDE),
                overlap=self.encoder.radius(),
                cell=STRIDE,
            )
        log_variance = log_variance.clamp(*_LOG_VARIANCE_RANGE)
        scale = self.latent_std.to(mean.dtype)
        shift = self.latent_mean.to(mean.dtype)
        first = posterior = LatentPosterior(
            (mean - shift) / scale, log_variance - 2 * scale.log(), shift, scale
        )
        for _ in range(refinements):
            restored = self.decode(self.enhance(posterior.mode()), tile=tile)
            posterior = self.refined(first, posterior, restored, tile=tile)
        return posterior

    def refined(
        self,
        first: LatentPosterior,
        current: LatentPosterior,
        restored: Tensor,
        *,
        tile: int | None = None,
    ) -> LatentPosterior:
        """A latent corrected by what became of it: z + E(x) − E(D(z)).

        As iterative back-projection corrects a picture (Irani and Peleg, "Improving resolution by
        image registration", CVGIP 1991), with the encoder E as the projection.

        Args:
            first: E(x), the latent without refinements.
            current: z, the one to correct.
            restored: D(z), what ``decode`` made of it, (B, 3, 16h, 16w), not clamped.
            tile: as for ``encode``.

        Returns:
            The posterior with the corrected mean and the first one's variance.

        Raises:
            ValueError: as ``encode``.
        """
        again = self.encode(restored, tile=tile)
        mean = current.mean + first.mean - again.mean
        return replace(first, mean=mean)

    def enhance(
        self,
        latent: Tensor,
        *,
        branches: Collection[str] = BRANCHES,
        check_finite: bool = False,
    ) -> Tensor:
        """Runs Lite-Hybrid over a normalised latent.

        Args:
            latent: (B, 32, h, w), normalised.
            branches: which branches run, a subset of ``{"coarse", "fine"}``.
            check_finite: also look for NaN and infinity (waits for the device).

        Returns:
            (B, 32, h, w), what ``decode`` expects.

        Raises:
            ValueError: rank, channels, dtype or device are wrong, a value is not finite, or
                ``branches`` names something else.
        """
        channels = self.config.litevae.latent_channels
        self._check(latent, "latent", channels, 1, check_finite)
        if self.hybrid is None:
            check_branches(branches)
            return latent
        return self.hybrid(latent, branches)  # type: ignore[no-any-return]

    def decode(
        self,
        latent: Tensor,
        *,
        size: tuple[int, int] | None = None,
        tile: int | None = None,
        clamp: bool = False,
        check_finite: bool = False,
    ) -> Tensor:
        """Decodes an enhanced latent.

        Args:
            latent: (B, 32, h, w), from ``enhance``.
            size: (height, width) to cut the result to, for images that ``encode`` padded.
            tile: side in pixels, a multiple of 16, of the tiles in which the decoder runs, as for
                ``encode``.
            clamp: limit the result to [−1, 1].
            check_finite: also look for NaN and infinity (waits for the device).

        Returns:
            (B, 3, 16h, 16w), or cut to ``size``; about [−1, 1].

        Raises:
            ValueError: rank, channels, size, tile, dtype or device are wrong, or a value is not
                finite.
        """
        channels = self.config.litevae.latent_channels
        self._check(latent, "latent", channels, 1, check_finite)
        full = (latent.shape[2] * STRIDE, latent.shape[3] * STRIDE)
        if size is not None and not _inside(size, full):
            raise ValueError(f"size must be (H, W) in 1..{full[0]} × 1..{full[1]}, got {size}")
        latent = latent * self.latent_std.to(latent.dtype) + self.latent_mean.to(latent.dtype)
        if tile is None:
            images = self.decoder(latent)  # (B, 3, H, W)
        else:
            (images,) = run_tiled(
                lambda part: (self.decoder(part),),
                latent,
                tile=check_tile(tile, STRIDE),
                overlap=self.decoder.radius(),
                scale=STRIDE,
            )
        if size is not None:
            images = images[..., : size[0], : size[1]]
        return images.clamp(-1, 1) if clamp else images  # type: ignore[no-any-return]

    def forward(
        self,
        images: Tensor,
        *,
        branches: Collection[str] = BRANCHES,
        refinements: int = 0,
        pad: bool = False,
        tile: int | None = None,
        clamp: bool = False,
        check_finite: bool = False,
    ) -> Tensor:
        """``decode(enhance(encode(images).mode()))``: (B, 3, H, W) → (B, 3, H, W).

        The options are those of the three; ``enhance`` always sees the whole latent, and
        ``check_finite`` looks at the images and at the enhanced latent. Latents are refined by all
        branches, whichever decode them.
        """
        latent = self.encode(
            images, refinements=refinements, pad=pad, tile=tile, check_finite=check_finite
        ).mode()
        size = (images.shape[2], images.shape[3]) if pad else None
        latent = self.enhance(latent, branches=branches)
        return self.decode(latent, size=size, tile=tile, clamp=clamp, check_finite=check_finite)

    def _check(
        self, x: Tensor, name: str, channels: int, multiple: int, check_finite: bool
    ) -> None:
        """Checks a tensor by its metadata alone, so that no device is waited for."""
        weight = self.decoder.latent4.weight
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(
                f"{name} must have shape (B, {channels}, height, width), got {tuple(x.shape)}"
            )
        half_or_float = x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        if x.dtype != weight.dtype and not (half_or_float and autocasts(x)):
            raise ValueError(
                f"{name} must have the model's dtype, {weight.dtype} (or float32, float16 or "
                f"bfloat16 under torch.autocast), got {x.dtype}"
            )
        if 0 in x.shape or x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(
                f"{name} must have a height and width that are multiples of {multiple} and a "
                f"batch of at least 1, got {tuple(x.shape)}"
            )
        if x.device != weight.device:
            raise ValueError(
                f"{name} must be on the model's device, {weight.device}, got {x.device}"
            )
        if check_finite and not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")

    # --- what it costs ---

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def parameter_count(self) -> dict[str, int]:
        """Parameters of ``encoder``, ``hybrid`` and ``decoder``, and their ``total``."""
        counts = {
            name: sum(p.numel() for p in module.parameters()) if module is not None else 0
            for name, module in (
                ("encoder", self.encoder),
                ("hybrid", self.hybrid),
                ("decoder", self.decoder),
            )
        }
        return {**counts, "total": sum(counts.values())}

    def flops(self, height: int = 256, width: int = 256, *, refinements: int = 0) -> int:
        """FLOPs of ``forward`` for one image (a multiply-add counts two; convolutions only).

        Args:
            height: of the image, a multiple of 16.
            width: likewise.
            refinements: of the latent; each costs as much again.

        Raises:
            ValueError: a side is off the grid, or ``refinements`` below 0.
        """
        check_whole(0, refinements=refinements)
        if height < STRIDE or width < STRIDE or height % STRIDE or width % STRIDE:
            raise ValueError(f"sides must be multiples of {STRIDE}, got {height} and {width}")
        count = super().flops(height, width)
        if self.hybrid is not None:
            count += self.hybrid.flops(height // STRIDE, width // STRIDE)
        return count * (1 + refinements)

    # --- in and out ---

    def latent_fingerprint(self) -> str:
        """SHA-256 of what defines the latent space: encoder weights (as FP16) and normalisation.

        A generator trained on one latent space makes no sense in another; it stores this. The
        same for the model in FP32 and in FP16, as weights ship in FP16, and for one that
        :meth:`from_pretrained` gave in BF16, or that was cast to it later.
        """
        found = self._latent_digest()
        return self._known_digests.get(found, found)

    def _latent_digest(self, *dtypes: torch.dtype) -> str:
        """Of the weights as they are, or as they would be after casts to ``dtypes``."""

        def cast(tensor: Tensor) -> Tensor:
            for dtype in dtypes:
                tensor = tensor.to(dtype)
            return tensor.half()

        tensors = {
            name: cast(tensor)
            for name, tensor in self.state_dict().items()
            if name.startswith(("encoder.", "latent_"))
        }
        return checkpoint.digest(tensors)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        shared_parts: tuple[str, ...] = (),
        shared_file: str = "",
        **facts: Any,
    ) -> Path:
        """Writes weights and config.

        Args:
            path: a ``.safetensors`` file, or a folder that gets a ``model.safetensors``.
            dtype: store the weights in this dtype instead of the model's own.
            shared_parts: leave these out, modules by name (``"encoder"``, ``"hybrid"``,
                ``"decoder.features4"`` ...), as ``shared_file`` has
                the same: several decoders of one latent space then share one copy.
            shared_file: name of the file, in the same folder, that has them.
            facts: further JSON-serialisable header entries (recipe, figures ...).

        Returns:
            The file written.

        Raises:
            OSError: the file cannot be written; what was there stays.
            ValueError: only one of ``shared_parts`` and ``shared_file`` is given, a part is none of the
                model's, or ``shared_file`` is not the name of another file; ``dtype`` is of integers or of less than 16 bits,
                or a fact has a name that is taken.
        """
        checkpoint.check_stored_dtype(dtype)
        tensors = {
            name: tensor if dtype is None else tensor.to(dtype)
            for name, tensor in self.state_dict().items()
        }
        check_shared(path, tensors, shared_parts, shared_file)
        own: dict[str, Any] = {"latent_fingerprint": self.latent_fingerprint()}
        if shared_parts:
            tensors, own["shared"] = leave_out(tensors, shared_parts, shared_file)
        return checkpoint.save_model(
            path, tensors, facts, kind=type(self).__name__, config=asdict(self.config), **own
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        variant: Variant = "hybrid",
        decoder: Decoder | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ParScaleEAR:
        """Loads weights; offline, in evaluation mode.

        Args:
            path: a weight file, or a folder with ``model.safetensors``; None: the shipped weights.
            variant: which of the shipped weights: ``"hybrid"``, or ``"baseline"`` (LiteVAE alone:
                a decoder for the same latents that was trained to do without the hybrid).
            decoder: which of the shipped decoders: ``"faithful"`` (highest PSNR, the default) or
                ``"sharp"`` (trained for looks: texture instead of blur, at a lower PSNR). Both
                read the same latents.
            device: where to; None: the CPU.
            dtype: of the weights; None: FP16 on CUDA, FP32 elsewhere.

        Raises:
            CheckpointError: the file is missing, truncated, foreign or changed.
            ValueError: ``variant`` or ``decoder`` is unknown, or given beside a ``path``; or ``dtype``
                is not of floating-point numbers of 16 bits or more.
        """
        if path is not None and (decoder is not None or variant != "hybrid"):
            raise ValueError(
                "variant and decoder name shipped weights; leave them out where a path is given"
            )
        checkpoint.check_stored_dtype(dtype)
        path = shipped_weights(variant, decoder) if path is None else checkpoint.resolve(path)
        tensors, header = read(path, cls.__name__)
        try:
            config = ParScaleEARConfig.from_dict(header["config"])
            with torch.random.fork_rng(devices=()):  # fresh weights are thrown away: no draw counts
                model = cls(config).float()  # whatever the default is
            model.load_state_dict(tensors)
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise checkpoint.CheckpointError(f"{path}: {reason}") from error
        device = torch.device("cpu" if device is None else device)
        if dtype is None:
            dtype = torch.float16 if device.type == "cuda" else torch.float32
        # The header's: weights stored in BF16 are rounded, and are of the same latents all the same.
        fingerprint = header.get("latent_fingerprint") or model.latent_fingerprint()
        # BF16 rounds the weights, now or later, in one step or by FP16.
        rounded = (
            model._latent_digest(torch.bfloat16),
            model._latent_digest(torch.float16, torch.bfloat16),
        )
        model = model.to(device, dtype).eval()
        model._known_digests = dict.fromkeys((*rounded, model._latent_digest()), fingerprint)
        return model


def _inside(size: Any, full: tuple[int, int]) -> bool:
    """Whether ``size`` is a height and width of at least 1 and at most ``full``."""
    return (
        isinstance(size, Sequence)
        and len(size) == 2
        and all(isinstance(n, Integral) for n in size)  # NumPy's integers, too
        and all(0 < int(n) <= most for n, most in zip(size, full, strict=True))
    )

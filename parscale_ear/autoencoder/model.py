"""ParScaleEAR: LiteVAE encoder → normalised latent → Lite-Hybrid → LiteVAE decoder.

Shapes: B batch, H W pixels, h w latent height and width (H/16, W/16), Z latent channels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from parscale_ear import checkpoint
from parscale_ear.autoencoder.blocks import autocasts
from parscale_ear.autoencoder.hybrid import BRANCHES, HybridConfig, HybridLatent
from parscale_ear.autoencoder.litevae import STRIDE, LiteVAE, LiteVAEConfig

Variant = Literal["hybrid", "baseline"]
WEIGHTS_FILE = "model.safetensors"
_LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclass(frozen=True, kw_only=True)
class ParScaleEARConfig:
    """Everything that the weights need to be read; stored in the header of the weight file."""

    litevae: LiteVAEConfig = field(default_factory=LiteVAEConfig)
    hybrid: HybridConfig | None = field(default_factory=HybridConfig)  # None: LiteVAE alone
    latent_mean: tuple[float, ...] | None = None  # a channel's mean before normalising; None: 0
    latent_std: tuple[float, ...] | None = None  # a channel's deviation likewise; None: 1

    def __post_init__(self) -> None:
        """Checks that the parts fit.

        Raises:
            ValueError: a field does not fit the others; the message names it.
        """
        channels = self.litevae.latent_channels
        if self.hybrid is not None and self.hybrid.latent_channels != channels:
            raise ValueError(
                f"hybrid.latent_channels must be litevae.latent_channels = {channels}, "
                f"got {self.hybrid.latent_channels}"
            )
        for name in ("latent_mean", "latent_std"):
            values = getattr(self, name)
            if values is None:
                continue
            if len(values) != channels:
                raise ValueError(f"{name} must hold {channels} numbers, got {len(values)}")
            if not all(math.isfinite(v) and (name == "latent_mean" or v > 0) for v in values):
                raise ValueError(f"{name} must hold finite numbers (deviations above 0)")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ParScaleEARConfig:
        """The inverse of ``dataclasses.asdict``, also after a trip through JSON.

        Raises:
            ValueError: a field is unknown, missing or out of range.
        """

        def build(config: type[Any], fields: Mapping[str, Any]) -> Any:
            return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

        try:
            parts = dict(values)
            parts["litevae"] = build(LiteVAEConfig, parts["litevae"])
            if parts["hybrid"] is not None:
                parts["hybrid"] = build(HybridConfig, parts["hybrid"])
            return build(cls, parts)  # type: ignore[no-any-return]
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a ParScaleEAR config: {error}") from error


@dataclass(frozen=True)
class LatentPosterior:
    """A diagonal Gaussian over the normalised latent.

    ``mean`` is (B, Z, h, w) and normalised: about zero mean and unit variance per channel.
    """

    mean: Tensor  # normalised
    log_variance: Tensor  # of the normalised latent
    _shift: Tensor  # (Z, 1, 1): a channel's mean before normalising
    _scale: Tensor  # (Z, 1, 1): a channel's deviation before normalising

    def mode(self) -> Tensor:
        """The likeliest latent, (B, Z, h, w): the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws a latent, (B, Z, h, w).

        Args:
            generator: source of randomness. One on the CPU works with a model on any device and
                then gives the same noise everywhere.
        """
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(
            self.mean.shape, generator=generator, device=device, dtype=torch.float32
        ).to(self.mean)
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        """KL divergence to N(0, 1) in nats, (B, Z, h, w), taken before normalising, in FP32."""
        mean = self.mean.float() * self._scale.float() + self._shift.float()
        log_variance = self.log_variance.float() + 2 * self._scale.float().log()
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


class ParScaleEAR(LiteVAE):
    """The autoencoder: 256×256 RGB → 32×16×16 → 256×256, 1.7 M parameters.

    Images are (B, 3, H, W) in [−1, 1], H and W multiples of 16; latents are (B, 32, H/16, W/16).
    With ``config.hybrid`` None it is the LiteVAE alone (the baseline) and ``enhance`` hands the
    latent on as it is.

    Example:
        >>> model = ParScaleEAR.from_pretrained()
        >>> latent = model.encode(images).mode()
        >>> restored = model.decode(model.enhance(latent), clamp=True)
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: ParScaleEARConfig | None = None) -> None:
        """Builds the model with fresh weights in FP32 on the CPU, channels-last.

        Args:
            config: sizes and normalisation; the default is the shipped model's.
        """
        config = config or ParScaleEARConfig()
        super().__init__(config.litevae)
        self.config = config
        self.hybrid = None if config.hybrid is None else HybridLatent(config.hybrid)
        for parameter in self.parameters():
            if parameter.ndim == 4:  # as the kernels want it; activations follow
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        channels = self.config.litevae.latent_channels
        for name, values, default in (
            ("latent_mean", self.config.latent_mean, 0.0),
            ("latent_std", self.config.latent_std, 1.0),
        ):
            constants = torch.tensor(values or (default,) * channels, dtype=torch.float32)
            self.register_buffer(name, constants.reshape(channels, 1, 1), persistent=False)

    # --- the way of an image ---

    def encode(self, images: Tensor, *, check_finite: bool = False) -> LatentPosterior:
        """Encodes images.

        Args:
            images: (B, 3, H, W) in [−1, 1]; H and W multiples of 16; in the model's dtype, or
                float32, float16 or bfloat16 under autocast; on the model's device.
            check_finite: also look for NaN and infinity (waits for the device).

        Returns:
            The posterior of the normalised latent, (B, 32, H/16, W/16).

        Raises:
            ValueError: rank, channels, size, dtype or device are wrong, or a value is not finite.
        """
        self._check(images, "images", 3, STRIDE, check_finite)
        mean, log_variance = self.encoder(images)  # (B, Z, h, w) each
        log_variance = log_variance.clamp(*_LOG_VARIANCE_RANGE)
        scale = self.latent_std.to(mean.dtype)
        shift = self.latent_mean.to(mean.dtype)
        return LatentPosterior((mean - shift) / scale, log_variance - 2 * scale.log(), shift, scale)

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
            return latent
        return self.hybrid(latent, branches)  # type: ignore[no-any-return]

    def decode(self, latent: Tensor, *, clamp: bool = False, check_finite: bool = False) -> Tensor:
        """Decodes an enhanced latent.

        Args:
            latent: (B, 32, h, w), from ``enhance``.
            clamp: limit the result to [−1, 1].
            check_finite: also look for NaN and infinity (waits for the device).

        Returns:
            (B, 3, 16h, 16w), about [−1, 1].

        Raises:
            ValueError: rank, channels, dtype or device are wrong, or a value is not finite.
        """
        channels = self.config.litevae.latent_channels
        self._check(latent, "latent", channels, 1, check_finite)
        images = self.decoder(
            latent * self.latent_std.to(latent.dtype) + self.latent_mean.to(latent.dtype)
        )  # (B, 3, H, W)
        return images.clamp(-1, 1) if clamp else images  # type: ignore[no-any-return]

    def forward(
        self,
        images: Tensor,
        *,
        branches: Collection[str] = BRANCHES,
        clamp: bool = False,
        check_finite: bool = False,
    ) -> Tensor:
        """``decode(enhance(encode(images).mode()))``: (B, 3, H, W) → (B, 3, H, W)."""
        latent = self.encode(images, check_finite=check_finite).mode()
        return self.decode(self.enhance(latent, branches=branches), clamp=clamp)

    def _check(
        self, x: Tensor, name: str, channels: int, multiple: int, check_finite: bool
    ) -> None:
        """Checks a tensor by its metadata alone, so that no device is waited for."""
        weight = self.decoder.latent4.weight
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(
                f"{name} must have shape (B, {channels}, height, width), got {tuple(x.shape)}"
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
        half_or_float = x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        if x.dtype != weight.dtype and not (half_or_float and autocasts(x)):
            raise ValueError(
                f"{name} must have the model's dtype, {weight.dtype} (or float32, float16 or "
                f"bfloat16 under torch.autocast), got {x.dtype}"
            )
        if check_finite and not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")

    # --- what it costs ---

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

    def flops(self, height: int = 256, width: int = 256) -> int:
        """FLOPs of ``forward`` for one image (a multiply-add counts two; convolutions only)."""
        count = super().flops(height, width)
        if self.hybrid is not None:
            count += self.hybrid.flops(height // STRIDE, width // STRIDE)
        return count

    # --- in and out ---

    def latent_fingerprint(self) -> str:
        """SHA-256 of what defines the latent space: encoder weights (as FP16) and normalisation.

        A generator trained on one latent space makes no sense in another; it stores this. The
        same for the model in FP32 and in FP16, as weights ship in FP16.
        """
        tensors = {name: t.half() for name, t in self.encoder.state_dict().items()}
        return checkpoint.digest(tensors, self.config.latent_mean, self.config.latent_std)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        encoder_in: str | None = None,
        **facts: Any,
    ) -> Path:
        """Writes weights and config.

        Args:
            path: a ``.safetensors`` file, or a folder that gets a ``model.safetensors``.
            dtype: store the weights in this dtype instead of the model's own.
            encoder_in: leave the encoder out, as the file of this name in the same folder has it
                (several decoders of one latent space then share one copy).
            facts: further JSON-serialisable header entries (recipe, figures ...).

        Returns:
            The file written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            path = path / WEIGHTS_FILE
        tensors = {
            name: tensor if dtype is None else tensor.to(dtype)
            for name, tensor in self.state_dict().items()
            if encoder_in is None or not name.startswith("encoder.")
        }
        checkpoint.save(
            path,
            tensors,
            kind=type(self).__name__,
            config=asdict(self.config),
            latent_fingerprint=self.latent_fingerprint(),
            encoder_in=encoder_in,
            **facts,
        )
        return path

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        variant: Variant = "hybrid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ParScaleEAR:
        """Loads weights; offline, in evaluation mode.

        Args:
            path: a weight file, or a folder with ``model.safetensors``; None: the shipped weights.
            variant: which of the shipped weights: ``"hybrid"``, or ``"baseline"`` (LiteVAE alone,
                trained for the same time on the same encoder).
            device: where to; None: the CPU.
            dtype: of the weights; None: FP16 on CUDA, FP32 elsewhere.

        Raises:
            CheckpointError: the file is missing, truncated, foreign or changed.
            ValueError: ``variant`` is unknown.
        """
        if path is None:
            path = shipped_weights(variant)
        path = Path(path)
        if path.is_dir():
            path = path / WEIGHTS_FILE
        tensors, header = checkpoint.load(path, kind=cls.__name__)
        if header.get("encoder_in") is not None:
            tensors |= _encoder_of(path, header)
        try:
            model = cls(ParScaleEARConfig.from_dict(header["config"]))
            model.load_state_dict(tensors)
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise checkpoint.CheckpointError(f"{path}: {reason}") from error
        device = torch.device("cpu" if device is None else device)
        if dtype is None:
            dtype = torch.float16 if device.type == "cuda" else torch.float32
        return model.to(device, dtype).eval()


def _encoder_of(path: Path, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """The encoder that a file without one shares with its neighbour.

    Raises:
        CheckpointError: the neighbour is missing or damaged, or of another latent space.
    """
    neighbour = path.with_name(Path(str(header["encoder_in"])).name)
    tensors, other = checkpoint.load(neighbour, kind=str(header["kind"]))
    if other.get("latent_fingerprint") != header.get("latent_fingerprint"):
        raise checkpoint.CheckpointError(
            f"{path}: decodes another latent space than the encoder in {neighbour} makes; "
            "both files must come from one release"
        )
    return {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}


def shipped_weights(variant: Variant = "hybrid") -> Path:
    """Path of a weight file inside the package.

    Raises:
        ValueError: ``variant`` is neither ``"hybrid"`` nor ``"baseline"``.
    """
    if variant not in ("hybrid", "baseline"):
        raise ValueError(f"variant must be 'hybrid' or 'baseline', got {variant!r}")
    return Path(str(resources.files("parscale_ear") / "weights" / f"{variant}.safetensors"))

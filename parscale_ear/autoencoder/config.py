"""The autoencoder's config, as the header of a weight file holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parscale_ear.autoencoder.hybrid import HybridConfig
from parscale_ear.autoencoder.litevae import LiteVAEConfig


@dataclass(frozen=True, kw_only=True)
class ParScaleEARConfig:
    """Everything that the weights need to be read; stored in the header of the weight file."""

    litevae: LiteVAEConfig = field(default_factory=LiteVAEConfig)
    hybrid: HybridConfig | None = field(default_factory=HybridConfig)  # None: LiteVAE alone

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

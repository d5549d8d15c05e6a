"""Sizes of an EnergyAR, and the names of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from parscale_ear.autoencoder.litevae import STRIDE
from parscale_ear.checks import check_whole
from parscale_ear.generator.pyramid import LatentPyramid
from parscale_ear.generator.transformer import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class EARConfig:
    """Sizes of an EnergyAR."""

    depth: int = 8  # blocks of the trunk
    width: int = 256  # its channels
    heads: int = 4  # its attention heads
    head_width: int = 256  # channels of the energy head
    head_blocks: int = 3  # its residual blocks
    noise_channels: int = 64  # its noise
    channels: int = 32  # of the latent
    side: int = 8  # of the latent, a power of two; pictures have 16 times as much
    phases: int = 4  # passes of the finest level: 1, 2 or 4
    class_names: tuple[str, ...]  # what the labels stand for
    l2_norm: bool = True  # unit queries and keys, a learned scale a head
    shared_modulation: bool = True  # one modulation for all blocks, and an offset in each

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        check_whole(1, head_width=self.head_width, head_blocks=self.head_blocks)
        check_whole(1, noise_channels=self.noise_channels)
        names = self.class_names
        if isinstance(names, str):
            raise ValueError(f"class_names must be several names, as a tuple, got {names!r}")
        if not names or len(set(names)) != len(names):
            raise ValueError(f"class_names must be different names, at least one, got {names}")
        self.transformer  # noqa: B018 - the other checks

    @property
    def transformer(self) -> TransformerConfig:
        """The trunk's part."""
        pyramid = LatentPyramid(self.channels, self.side, self.phases)
        return TransformerConfig(
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            counts=pyramid.counts,
            classes=len(self.class_names),
            input_channels=pyramid.input_channels,
            l2_norm=self.l2_norm,
            shared_modulation=self.shared_modulation,
        )

    @property
    def head(self) -> dict[str, int]:
        """The head's part: arguments of :class:`~parscale_ear.generator.energy.EnergyHead`."""
        return {
            "width": self.width,
            "channels": self.channels,
            "levels": LatentPyramid(self.channels, self.side, self.phases).levels,
            "head_width": self.head_width,
            "blocks": self.head_blocks,
            "noise": self.noise_channels,
        }

    @property
    def image_side(self) -> int:
        """Side of the pictures, pixels."""
        return STRIDE * self.side

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EARConfig:
        """The inverse of ``dataclasses.asdict``, also after a trip through JSON.

        Raises:
            ValueError: a field is unknown, missing or out of range.
        """
        # Weights up to release 0.6 name a size that never was other than 0.
        if values.get("layout_channels") == 0:
            values = {name: value for name, value in values.items() if name != "layout_channels"}
        try:
            return cls(**{**values, "class_names": tuple(values["class_names"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not an EnergyAR config: {error}") from error


def find_class(name: str, names: Sequence[str]) -> int:
    """Number of a class by its name, whatever its case.

    Raises:
        ValueError: there is none; the message says which are near. Or it is no name.
    """
    if not isinstance(name, str):
        raise ValueError(f"a class name is text, got {name!r}; numbers of classes need no look-up")

    def plain(text: str) -> str:
        return " ".join(text.lower().replace("_", " ").split())

    if name in names:
        return list(names).index(name)
    wanted = plain(name)
    known: dict[str, int] = {}
    for index, other in enumerate(names):
        known.setdefault(plain(other), index)
    if [plain(other) for other in names].count(wanted) == 1:
        return known[wanted]
    near = get_close_matches(wanted, known, n=3, cutoff=0.4) or list(known)
    nearest = ", ".join(repr(names[known[word]]) for word in near[:10])
    raise ValueError(f"there is no class {name!r}; near: {nearest}")

"""Names what cannot be true in a set of measurements of parallel streams.

Every rule follows from arithmetic or from the hardware: a set that breaks one was measured wrong,
mixed up or made up. That no rule is broken does not prove that a measurement is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SLACK = 0.10  # by which a measurement may pass a limit that was itself measured
MEMORY_NOISE = 64 * 2**20  # bytes by which the peaks of two equal processes may differ
LEAST_CACHE_SHARE = 0.8  # of a cache's growth that must show in the peak
# Rules that look at clocks and memory, which one short run on a busy machine may break honestly.
NOISY_RULES = frozenset({"above the roof", "efficiency", "memory"})


@dataclass(frozen=True, kw_only=True)
class StreamMeasurement:
    """What was measured, and what follows from the model alone, for one number of streams."""

    streams: int  # P
    mode: str  # "diverse" or "aggregate"
    seconds: float  # median of a generation, decoder included
    token_seconds: float  # median of its tokens alone
    scale_seconds: tuple[float, ...]  # medians of its scales
    flops_by_scale: tuple[float, ...]  # of transformer and head, from the model's sizes
    peak_bytes: int | None  # memory high-water mark; None: not measured
    cache_bytes: int  # of keys and values, from the model's sizes
    block_calls: tuple[int, ...]  # calls of every block in a generation, counted
    diversity: float | None  # mean feature distance; None: aggregate mode, one picture a label
    pixel_digests: tuple[str, ...]  # SHA-256 of every picture
    synchronised: bool  # whether the device was waited for before the clock was read
    origin: Mapping[str, Any]  # source, weights and device that it was made with

    @property
    def name(self) -> str:
        """What a flag calls it."""
        return f"P = {self.streams}, {self.mode}"


@dataclass(frozen=True)
class RedFlag:
    """One impossibility."""

    rule: str  # short name
    why: str  # one line


def find_red_flags(
    measurements: Sequence[StreamMeasurement],
    *,
    roof_flops_per_s: float,
    origin: Mapping[str, Any],
) -> list[RedFlag]:
    """Everything in the measurements that cannot be true.

    Args:
        measurements: of one run.
        roof_flops_per_s: what the hardware reached in the same run and dtype.
        origin: source, weights and device as they are now; those that are not named here are only
            compared among the measurements.
    """
    flags: list[RedFlag] = []
    if not (math.isfinite(roof_flops_per_s) and roof_flops_per_s > 0):
        flags.append(RedFlag("no roof", f"a roof of {roof_flops_per_s} FLOP/s"))
    single = next((m for m in measurements if m.streams == 1), None)
    if single is None:
        flags.append(RedFlag("no single stream", "P = 1 was not measured, so nothing compares"))
    for m in measurements:
        found = [*_shape(m), *_diversity(m), *_origin(m, origin, measurements[0])]
        if not found:  # else its numbers mean nothing
            found += _clock(m, roof_flops_per_s)
            if single is not None and m.streams > 1 and not _shape(single):
                found += _against(m, single)
            if (m.peak_bytes is None) != (measurements[0].peak_bytes is None):
                found.append(("memory", "was measured for some and not for all"))
        flags += [RedFlag(rule, f"{m.name}: {why}") for rule, why in found]
    return flags


def _positive(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) and value > 0 for value in values)


def _shape(m: StreamMeasurement) -> list[tuple[str, str]]:
    """Numbers that are no measurements, and counts that do not fit."""
    found = []
    timed = _positive((m.seconds, m.token_seconds, *m.scale_seconds))
    if not timed:
        found.append(("no time", "a duration is not above 0"))
    scales = len(m.flops_by_scale)
    if not scales or not _positive(m.flops_by_scale) or m.cache_bytes <= 0:
        found.append(("work", "no FLOPs or no cache"))
    elif len(m.scale_seconds) != scales:
        found.append(("scales", f"{len(m.scale_seconds)} scales were timed of {scales}"))
    elif timed:
        total = sum(m.scale_seconds)
        if not abs(total - m.token_seconds) <= 2 * SLACK * m.token_seconds:
            found.append(
                ("scales", f"its scales take {total:.3f} s, its tokens {m.token_seconds:.3f} s")
            )
        elif m.token_seconds > m.seconds:
            found.append(("scales", "its tokens take longer than the whole generation"))
    if not m.block_calls or set(m.block_calls) != {scales}:
        counts = ", ".join(map(str, sorted(set(m.block_calls)))) or "no"
        found.append(("block calls", f"blocks ran {counts} times for {scales} scales"))
    if not m.synchronised:
        found.append(("not synchronised", "the clock was read without waiting for the device"))
    return found


def _diversity(m: StreamMeasurement) -> list[tuple[str, str]]:
    """A diversity that does not come from pixels."""
    pictures = m.streams if m.mode == "diverse" else 1
    if len(m.pixel_digests) != pictures:
        return [("diversity", f"{len(m.pixel_digests)} pictures instead of {pictures}")]
    if m.mode != "diverse":
        return []
    if m.diversity is None or not (math.isfinite(m.diversity) and m.diversity >= 0):
        return [("diversity", f"{m.diversity} is no distance")]
    if m.streams == 1 and m.diversity != 0:
        return [("diversity", f"one picture differs from itself by {m.diversity:.3g}")]
    different = len(set(m.pixel_digests)) > 1
    if m.diversity > 0 and not different:
        return [("diversity", f"{m.diversity:.3g} between pictures with the same pixels")]
    if m.diversity == 0 and different:
        return [("diversity", "0 between pictures with different pixels")]
    return []


def _origin(
    m: StreamMeasurement, origin: Mapping[str, Any], first: StreamMeasurement
) -> list[tuple[str, str]]:
    differ = {key for key, value in origin.items() if m.origin.get(key) != value}
    differ |= {k for k in {*m.origin, *first.origin} if m.origin.get(k) != first.origin.get(k)}
    missing = {"source", "weights", "device"} - m.origin.keys()
    if differ or missing:
        return [("other origin", f"made with another {', '.join(sorted(differ | missing))}")]
    return []


def _clock(m: StreamMeasurement, roof: float) -> list[tuple[str, str]]:
    """Rates above the hardware's; the scales with most of the work are judged one by one."""
    most = max(m.flops_by_scale)
    parts = [
        (f"scale {k + 1}", flops, seconds)
        for k, (flops, seconds) in enumerate(zip(m.flops_by_scale, m.scale_seconds, strict=True))
        if flops > most / 4
    ]
    parts.append(("its tokens", sum(m.flops_by_scale), m.token_seconds))
    for name, flops, seconds in parts:
        rate = flops / seconds
        if rate > roof * (1 + SLACK):
            why = f"{name} at {rate / 1e9:.0f} GFLOP/s, above the roof of {roof / 1e9:.0f}"
            return [("above the roof", why)]
    return []


def _against(m: StreamMeasurement, single: StreamMeasurement) -> list[tuple[str, str]]:
    """What P streams cannot do beside one."""
    found = []
    parts = {
        "tokens": (single.token_seconds, m.token_seconds),
        "generation": (single.seconds, m.seconds),
    }
    for name, (one, several) in parts.items():
        efficiency = m.streams * one / several
        # P streams do more work than one in the same number of passes: at best the rest is free.
        # Aggregated they end in one picture, so that only the tokens are sure to be more.
        if efficiency > m.streams * (1 + SLACK) and (name == "tokens" or m.mode == "diverse"):
            why = f"{name}: P · t(1) / t(P) = {efficiency:.2f}, above P: faster than one stream"
            found.append(("efficiency", why))
            break
    work, cache = sum(m.flops_by_scale), m.cache_bytes - single.cache_bytes
    if work <= sum(single.flops_by_scale) or cache <= 0:
        found.append(("work", "no more FLOPs, or no larger cache, than one stream"))
    if m.peak_bytes is not None and single.peak_bytes is not None:
        grown = m.peak_bytes - single.peak_bytes
        if grown < LEAST_CACHE_SHARE * cache - MEMORY_NOISE:
            why = f"grew by {grown / 2**20:.0f} MiB, its cache by {cache / 2**20:.0f} MiB"
            found.append(("memory", why))
    return found

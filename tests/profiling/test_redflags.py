"""Every red flag has a forged set that it must catch, and passes the honest one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from parscale_ear.profiling.redflags import StreamMeasurement, find_red_flags

ORIGIN = {"source": "a1", "weights": "b2", "device": "a CPU"}
ROOF = 1e12
MIB = 2**20

ONE = StreamMeasurement(
    streams=1,
    mode="diverse",
    seconds=1.5,
    token_seconds=1.2,
    scale_seconds=(0.3, 0.9),
    flops_by_scale=(0.1e12, 0.5e12),
    peak_bytes=1000 * MIB,
    cache_bytes=90 * MIB,
    block_calls=(2, 2, 2),
    diversity=0.0,
    pixel_digests=("p1",),
    synchronised=True,
    origin=ORIGIN,
)
FOUR = replace(
    ONE,
    streams=4,
    seconds=5.0,
    token_seconds=4.3,
    scale_seconds=(0.7, 3.6),
    flops_by_scale=(0.4e12, 2.0e12),
    peak_bytes=1350 * MIB,
    cache_bytes=370 * MIB,
    diversity=7.5,
    pixel_digests=("p1", "p2", "p3", "p4"),
)
JOINED = replace(
    FOUR,
    mode="aggregate",
    seconds=3.0,
    token_seconds=2.5,
    scale_seconds=(0.5, 2.0),
    flops_by_scale=(0.25e12, 1.25e12),
    diversity=None,
    cache_bytes=230 * MIB,
    peak_bytes=1200 * MIB,
    pixel_digests=("p5",),
)
SMALL = {"cache_bytes": 3 * MIB, "peak_bytes": 960 * MIB}


def rules(*measurements: StreamMeasurement, origin: dict[str, Any] | None = None) -> set[str]:
    flags = find_red_flags(measurements, roof_flops_per_s=ROOF, origin=origin or ORIGIN)
    assert all(flag.why for flag in flags)
    return {flag.rule for flag in flags}


def test_an_honest_set_raises_no_flag() -> None:
    assert rules(ONE, FOUR, JOINED) == set()
    unmeasured = [replace(m, peak_bytes=None) for m in (ONE, FOUR, JOINED)]
    assert rules(*unmeasured) == set()
    # Peaks of small models differ by less than two runs of one do.
    small = [replace(ONE, cache_bytes=MIB, peak_bytes=1000 * MIB), replace(FOUR, **SMALL)]
    assert rules(*small) == set()
    assert rules(ONE, FOUR, origin={"source": "a1"}) == set()


@pytest.mark.parametrize(
    ("rule", "forged"),
    [
        ("above the roof", {"token_seconds": 2.0, "scale_seconds": (0.5, 1.5)}),
        ("above the roof", {"scale_seconds": (2.7, 1.6)}),  # one scale alone
        ("above the roof", {"flops_by_scale": (1.0e12, 1.4e12)}),  # and not the largest
        (
            "efficiency",
            {
                "token_seconds": 0.9,
                "scale_seconds": (0.2, 0.7),
                "flops_by_scale": (0.15e12, 0.6e12),
            },
        ),
        ("memory", {"peak_bytes": 1100 * MIB}),
        ("memory", {"peak_bytes": 900 * MIB}),
        ("memory", {"peak_bytes": None}),
        ("diversity", {"pixel_digests": ("p1", "p1", "p1", "p1")}),
        ("diversity", {"diversity": 0.0}),
        ("diversity", {"diversity": -1.0}),
        ("diversity", {"diversity": float("nan")}),
        ("diversity", {"diversity": None}),
        ("diversity", {"pixel_digests": ("p1", "p2")}),
        ("diversity", {"pixel_digests": ()}),
        ("not synchronised", {"synchronised": False}),
        ("other origin", {"origin": {**ORIGIN, "source": "a0"}}),
        ("other origin", {"origin": {**ORIGIN, "weights": "b0"}}),
        ("other origin", {"origin": {**ORIGIN, "device": "a GPU"}}),
        ("other origin", {"origin": {}}),
        ("block calls", {"block_calls": (8, 8, 8)}),
        ("block calls", {"block_calls": (2, 2, 8)}),
        ("block calls", {"block_calls": (1, 1, 1)}),
        ("block calls", {"block_calls": ()}),
        ("scales", {"scale_seconds": (2.0, 4.0)}),
        ("scales", {"scale_seconds": (1e-6, 1e-6)}),
        ("scales", {"scale_seconds": ()}),
        ("scales", {"token_seconds": 5.5, "scale_seconds": (1.5, 4.0)}),
        ("no time", {"scale_seconds": (-0.5, 4.8)}),
        ("no time", {"seconds": 0.0}),
        ("no time", {"token_seconds": float("nan")}),
        ("work", {"flops_by_scale": (0.1e12, 0.5e12)}),
        ("work", {"cache_bytes": 90 * MIB}),
        ("work", {"cache_bytes": 0}),
    ],
)
def test_a_forged_set_is_caught(rule: str, forged: dict[str, Any]) -> None:
    assert rules(ONE, replace(FOUR, **forged)) == {rule}


def test_a_single_stream_that_takes_too_long_is_caught() -> None:
    """It makes others look good; joined streams end in one picture, too, and may save a decoder."""
    assert rules(replace(ONE, seconds=30.0), FOUR) == {"efficiency"}
    assert rules(replace(ONE, seconds=3.5), JOINED) == set()


def test_no_scales_at_all() -> None:
    empty = replace(FOUR, block_calls=(), flops_by_scale=(), scale_seconds=())
    assert "work" in rules(ONE, empty)


def test_a_set_must_have_one_stream_and_a_roof() -> None:
    assert rules(FOUR) == {"no single stream"}
    for roof in (float("nan"), 0.0):
        flags = find_red_flags([ONE], roof_flops_per_s=roof, origin=ORIGIN)
        assert "no roof" in {flag.rule for flag in flags}


def test_one_stream_has_no_diversity() -> None:
    assert rules(replace(ONE, diversity=3.0), FOUR) == {"diversity"}


def test_an_aggregate_has_one_picture() -> None:
    assert rules(ONE, replace(JOINED, pixel_digests=("p1", "p2"))) == {"diversity"}


def test_measurements_must_agree_where_they_come_from() -> None:
    other = {**ORIGIN, "weights": "b9"}
    found = rules(ONE, replace(FOUR, origin=other), origin={"source": "a1", "device": "a CPU"})
    assert found == {"other origin"}


def test_the_prototypes_table_is_caught() -> None:
    """Its first table: two streams faster than one, with no more memory."""
    one = replace(ONE, seconds=0.2826, token_seconds=0.2, scale_seconds=(0.05, 0.15),
                  flops_by_scale=(1e9, 4e9))  # fmt: skip
    two = replace(
        FOUR, streams=2, seconds=0.12, token_seconds=0.1, scale_seconds=(0.03, 0.07),
        flops_by_scale=(2e9, 8e9), peak_bytes=one.peak_bytes, pixel_digests=("p1", "p2"),
    )  # fmt: skip
    assert rules(one, two) == {"efficiency", "memory"}

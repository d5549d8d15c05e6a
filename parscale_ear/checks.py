"""Numbers that a caller gives."""

from __future__ import annotations

from numbers import Integral


def check_whole(least: int, **values: object) -> None:
    """Looks whether numbers are whole and large enough; NumPy's integers are, truth values are not.

    Args:
        least: of each.
        values: the numbers, under the names that the message gives them.

    Raises:
        ValueError: one is not; the message names it.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")

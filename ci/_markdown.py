"""Markdown that the README and docs/figures.md share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def told(report: Mapping[str, Any], samples: str = "") -> str:
    """Hardware, dtype, sample count, release, version of torch and date.

    Evidence of early releases does not say all of it; what is not known is left out.
    """
    threads = report.get("threads")
    parts = (
        report.get("device"),
        None if threads is None else f"{threads} thread{'s' if threads > 1 else ''}",
        report.get("dtype"),
        f"trained in {report['trained_in']}" if "trained_in" in report else None,
        samples,
        f"release {report['version']}" if "version" in report else None,
        f"torch {report['torch']}" if "torch" in report else None,
        report.get("date", "")[:10],
    )
    return ", ".join(part for part in parts if part)


def origin(report: Mapping[str, Any], samples: str) -> str:
    """The same as a line under a table."""
    return f"*{told(report, samples)}.*"

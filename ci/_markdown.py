"""Markdown that the README and docs/figures.md share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def told(report: Mapping[str, Any], samples: str) -> str:
    """Hardware, dtype, sample count, version of torch and date of a report."""
    return (
        f"{report['device']}, {report['threads']} threads, {report['dtype']}, {samples}, "
        f"torch {report['torch']}, {report['date'][:10]}"
    )


def origin(report: Mapping[str, Any], samples: str) -> str:
    """The same as a line under a table."""
    return f"*{told(report, samples)}.*"

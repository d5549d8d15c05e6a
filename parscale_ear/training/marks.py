"""Text between two marks of a document, which a command writes anew."""

from __future__ import annotations


def between_marks(text: str, begin: str, end: str, content: str, name: str) -> str:
    """The text with ``content`` between its marks, an empty line on either side.

    Raises:
        ValueError: the marks are not there; the message calls the document ``name``.
    """
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"{name} lacks the marks {begin} and {end}")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"

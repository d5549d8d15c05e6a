"""Whether results can be written where they are asked for; imports PyTorch only to complain."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def check_output(path: Path) -> None:
    """Looks whether a file can be written, before the work that it is the result of.

    Raises:
        UsageError: it is a folder, a pipe or a device, or lies where nothing can be written.
    """
    from parscale_ear.device import UsageError

    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is a pipe or a device, which would be replaced; name a file")
    _check_place(path, path.absolute().parents)


def check_folder(path: Path) -> None:
    """Looks whether files can be written to a folder, which need not be there, before the work.

    Raises:
        UsageError: it is no folder, or nothing can be written there.
    """
    from parscale_ear.device import UsageError

    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; name a folder")
    _check_place(path, (path.absolute(), *path.absolute().parents))


def _check_place(path: Path, places: Iterable[Path]) -> None:
    from parscale_ear.device import UsageError

    folder = next(place for place in places if place.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: nothing can be written in {folder}; name another place")

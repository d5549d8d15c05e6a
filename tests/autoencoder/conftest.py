"""Pictures that the tests of cached latents share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Fourteen pictures in two classes; two of them are damaged."""
    folder = tmp_path / "classes"
    rng = np.random.default_rng(0)
    for index in range(14):
        path = folder / ("cat" if index % 3 else "dog") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (80 + index, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    whole = (folder / "dog" / "03.png").read_bytes()
    (folder / "dog" / "03.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "07.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def flip_a_bit() -> Callable[[Path], None]:
    """Damages a file without changing its length."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)

    return damage

"""Pictures too large for memory: overlapping tiles, each cut back to its core.

Encoder and decoder are made of convolutions alone, so an output depends on its inputs within a
finite radius. A tile that is extended on all sides by that radius gives the same values in its
core as the whole picture would; where a tile meets the picture's border, both see the same border.

Shapes: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

from torch import Tensor


def spans(length: int, tile: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Cuts ``length`` positions into cores of at most ``tile``, each extended by ``overlap``.

    Returns:
        ``(start, stop, core_start, core_stop)`` of every tile; the cores cover all positions once.
    """
    cores = [(start, min(start + tile, length)) for start in range(0, length, tile)]
    return [(max(0, a - overlap), min(length, b + overlap), a, b) for a, b in cores]


def run_tiled(
    function: Callable[[Tensor], tuple[Tensor, ...]],
    x: Tensor,
    *,
    tile: int,
    overlap: int,
    cell: int = 1,
    scale: int = 1,
) -> tuple[Tensor, ...]:
    """Applies ``function`` tile by tile and puts the cores together.

    Args:
        function: (B, C, h, w) → tensors of (B, ·, h · scale / cell, w · scale / cell).
        x: (B, C, H, W), H and W multiples of ``cell``.
        tile: side of a core, in cells.
        overlap: by which a core is extended on every side, in cells.
        cell: positions of ``x``, each way, that belong together.
        scale: positions of the output, each way, for a cell.

    Returns:
        The outputs for the whole of ``x``.
    """
    height, width = x.shape[-2] // cell, x.shape[-1] // cell
    outputs: list[Tensor] = []
    for top, bottom, row, row_end in spans(height, tile, overlap):
        for left, right, column, column_end in spans(width, tile, overlap):
            part = x[..., top * cell : bottom * cell, left * cell : right * cell]
            results = function(part)
            if not outputs:
                batch = len(x)
                outputs = [
                    r.new_empty((batch, r.shape[1], height * scale, width * scale)) for r in results
                ]
            for whole, result in zip(outputs, results, strict=True):
                core = result[
                    ...,
                    (row - top) * scale : (row_end - top) * scale,
                    (column - left) * scale : (column_end - left) * scale,
                ]
                whole[..., row * scale : row_end * scale, column * scale : column_end * scale] = (
                    core
                )
    return tuple(outputs)


def check_tile(tile: int, stride: int) -> int:
    """A tile's side in latent positions.

    Args:
        tile: side in pixels.
        stride: pixels a latent position stands for.

    Raises:
        ValueError: it is not a multiple of the stride, or below one.
    """
    # NumPy's integers are as good as Python's.
    if isinstance(tile, bool) or not isinstance(tile, Integral) or tile < stride or tile % stride:
        raise ValueError(f"tile must be a multiple of {stride} pixels, got {tile!r}")
    return int(tile) // stride

"""Pictures through the autoencoder and back: batches of 8-bit pictures, or one of any size.

Shapes: N pictures, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from parscale_ear.autoencoder.hybrid import BRANCHES
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.data.images import from_uint8, to_uint8
from parscale_ear.device import check_finite, exact_fp32


@exact_fp32()
@torch.inference_mode()
def reconstruct_image(
    model: ParScaleEAR, image: Tensor, *, refinements: int = 0, tile: int | None = None
) -> Tensor:
    """One picture of any size through the model.

    The last row and column are repeated up to a multiple of 16 and cut off again.

    Args:
        model: in evaluation mode, on any device, in any dtype.
        image: (3, H, W), FP32 in [−1, 1], on the CPU.
        refinements: of the latent, as for ``ParScaleEAR.encode``.
        tile: side in pixels of the tiles in which encoder and decoder run; None: the whole at
            once.

    Returns:
        (3, H, W), FP32 in [−1, 1], on the CPU.

    Raises:
        ValueError: the picture or its reconstruction has NaN or infinity in it, or the picture a
            wrong shape or whole numbers.
    """
    if not image.is_floating_point():
        raise ValueError(f"image must be of floats in [-1, 1], got {image.dtype}")
    images = image[None].to(model.device, model.dtype)  # (1, 3, H, W)
    restored = model(images, refinements=refinements, pad=True, tile=tile, check_finite=True)
    check_finite(restored, "reconstructions")  # before infinity becomes white
    return restored[0].clamp(-1, 1).float().cpu()  # type: ignore[no-any-return]


@exact_fp32()
@torch.inference_mode()
def reconstruct_pictures(
    model: ParScaleEAR,
    pictures: Tensor,
    *,
    branches: Collection[str] = BRANCHES,
    refinements: int = 0,
    autocast: torch.dtype | None = None,
    batch_size: int = 8,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """8-bit pictures through the model and back to 8 bits, as PNG files would hold them.

    Args:
        model: on any device, in any dtype.
        pictures: (N, 3, H, W), 8-bit, on the CPU; H and W multiples of 16.
        branches: which branches of the hybrid run.
        refinements: of the latents, as for ``ParScaleEAR.encode``.
        autocast: run under autocast in this dtype; None: in the model's own dtype.
        batch_size: pictures at a time.
        progress: called with the number of pictures done after each batch.

    Returns:
        (N, 3, H, W), 8-bit, on the CPU.

    Raises:
        ValueError: a reconstruction has NaN or infinity in it, or the pictures are not 8-bit.
    """
    restored = []
    for part in torch.split(pictures, batch_size):
        images = from_uint8(part.to(model.device))  # (B, 3, H, W)
        images = images.to(model.dtype, memory_format=torch.channels_last)
        with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
            found = model(images, branches=branches, refinements=refinements)
        check_finite(found, "reconstructions")
        restored.append(to_uint8(found).cpu())
        if progress is not None:
            progress(len(part))
    return torch.cat(restored)  # (N, 3, H, W)

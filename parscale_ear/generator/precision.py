"""Parts of a model that stay in FP32 when the rest is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class KeepsFloat32(nn.Module):
    """Passes over casts to half precision, of itself or of the model that it is in.

    ``model.bfloat16()``, ``model.half()`` and ``model.to(dtype)`` leave its tensors as they are;
    moves to another device are made, and so are other casts.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def kept(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(result.device)
            return result

        return super()._apply(kept, recurse)  # type: ignore[no-untyped-call]

"""Weights in the layout that the CPU's matrix kernels want, for inference.

oneDNN reorders the weights of a plain linear layer at every call, which costs most where few
tokens meet many weights: at the coarse scales. Here that is done once, and the activation behind
a layer is computed with it. The operators are those that ``torch.compile`` puts in the same place.

oneDNN's BF16 kernels take rows in blocks of 64, and a few rows behind the last whole block cost up
to half a block more (two AVX512-BF16 cores, the four layers of a block of VAR-d16: 64 rows 4.2 ms, 72
rows 6.4 ms, 8 rows 1.1 ms, 32 rows 2.3 ms, 96 rows 7.1 ms). So in BF16 these are multiplied by themselves:
2 to 5 % of the time of one stream's tokens there.

Shapes: M rows.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

DTYPES = (torch.bfloat16, torch.float32)
ROW_BLOCK = 64  # rows that oneDNN's kernels take at a time
MOST_LEFT = 32  # rows behind the last whole block, up to which they are multiplied by themselves


class PackedLinear(nn.Module):
    """A linear layer with packed weights and, if asked, a GELU (tanh) behind it.

    Holds no parameters: it cannot be trained, saved, cast or moved.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> None:
        """Packs.

        Args:
            weight: (outputs, inputs), BF16 or FP32, on the CPU.
            bias: (outputs,) in the same dtype, or None.
            gelu: apply GELU in its tanh form to the result.

        Raises:
            ValueError: another device or dtype.
            NotImplementedError: this PyTorch was built without oneDNN, or lacks the operators.
        """
        super().__init__()
        if weight.device.type != "cpu" or weight.dtype not in DTYPES:
            raise ValueError(
                f"only BF16 and FP32 weights on the CPU can be packed, got {weight.dtype} on "
                f"{weight.device}"
            )
        if not can_pack(weight.dtype):
            raise NotImplementedError(
                f"this PyTorch or this CPU cannot pack {weight.dtype} weights; use the model unpacked"
            )
        with torch.no_grad():
            # Plain attributes: state_dict, .to() and friends must not touch the opaque layout.
            self.packed = _packed(weight.detach().contiguous())
            self.bias = None if bias is None else bias.detach().clone()
        self.activation = ("gelu", "tanh") if gelu else ("none", "")

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) → (..., outputs)."""
        flat = x.flatten(0, -2)  # (M, inputs)
        left = len(flat) % ROW_BLOCK
        if flat.dtype != torch.bfloat16 or len(flat) < ROW_BLOCK or not 0 < left <= MOST_LEFT:
            parts = [flat]
        else:
            parts = [flat[:-left], flat[-left:]]
        found = [_multiply(part, self.packed, self.bias, self.activation) for part in parts]
        together = torch.cat(found) if found[1:] else found[0]
        return together.unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)  # type: ignore[no-any-return]


def _multiply(
    x: Tensor, packed: Tensor, bias: Tensor | None, activation: tuple[str, str]
) -> Tensor:
    kind, algorithm = activation
    return torch.ops.mkldnn._linear_pointwise(  # type: ignore[no-any-return]
        x, packed, bias, kind, [], algorithm
    )


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this CPU can pack weights of a dtype: tried on a small matrix."""
    if dtype not in DTYPES:
        return False
    try:
        weight = torch.zeros(16, 16, dtype=dtype)
        _multiply(weight, _packed(weight), None, ("gelu", "tanh"))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True

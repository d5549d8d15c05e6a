from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from parscale_ear.generator import packing
from parscale_ear.generator.packing import PackedLinear, can_pack


@pytest.mark.parametrize("rows", [1, 63, 64, 72, 96, 97, 128, 200])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows(rows: int, gelu: bool, dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this PyTorch or CPU cannot pack {dtype} weights")
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, 48), (80, 48), (80,))
    )
    expected = F.linear(x.double(), weight.double(), bias.double())
    if gelu:
        expected = F.gelu(expected, approximate="tanh")
    with torch.inference_mode():
        found = PackedLinear(weight, bias, gelu=gelu)(x)
    assert found.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.1  # half a step of BF16 at 16 is 0.06
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)
    if rows % 2 == 0:  # (B, T, inputs)
        with torch.inference_mode():
            again = PackedLinear(weight, None)(x.view(2, -1, 48))
        assert again.shape == (2, rows // 2, 80)


@pytest.mark.parametrize(
    ("dtype", "rows", "parts"),
    [
        (torch.bfloat16, 8, [8]),
        (torch.bfloat16, 72, [64, 8]),
        (torch.bfloat16, 96, [64, 32]),
        (torch.bfloat16, 97, [97]),
        (torch.float32, 72, [72]),
    ],
)
def test_few_rows_behind_whole_blocks_are_multiplied_by_themselves(
    dtype: torch.dtype, rows: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this PyTorch or CPU cannot pack {dtype} weights")
    weight = torch.randn(16, 16).to(dtype)
    layer, multiply, seen = PackedLinear(weight, None), packing._multiply, []

    def spy(x: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.append(len(x))
        return multiply(x, *others)

    monkeypatch.setattr(packing, "_multiply", spy)
    layer(torch.randn(rows, 16).to(dtype))
    assert seen == parts

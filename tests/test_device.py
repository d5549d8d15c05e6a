from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from parscale_ear import device

CPU = torch.device("cpu")


def test_x86_has_kernels_for_bf16_from_avx512_on() -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an x86 CPU")
    kernels = device.multiplies_bf16(CPU)
    if torch.cpu._is_avx512_bf16_supported():
        assert kernels
    if not torch.cpu._is_avx512_supported():
        assert not kernels


def test_without_onednn_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not device._cpu_multiplies_bf16.__wrapped__()


@pytest.mark.parametrize("ampere", [True, False])
def test_emulation_on_a_gpu_does_not_count(ampere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return ampere or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert device.multiplies_bf16(torch.device("cuda")) == ampere


def test_fp32_is_exact_while_asked_for() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with device.exact_fp32():
            assert not torch.backends.cudnn.allow_tf32
            assert torch.backends.cudnn.enabled
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before[1])
    assert torch.backends.cudnn.allow_tf32 == before[0]


NEWER_SETTINGS = """
import torch
from parscale_ear.device import exact_fp32

def precisions():
    places = (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn)
    return [place.fp32_precision for place in places]

b = torch.backends
{setting}
before = precisions()
with exact_fp32():
    print(*set(precisions()))
print(precisions() == before)
if b.fp32_precision == "tf32":  # what follows it still does
    b.fp32_precision = "ieee"
    print([*precisions()[:1], *precisions()[3:]] == ["ieee"] * 4)
else:
    print(True)
"""


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="of PyTorch 2.9 and later"
)
@pytest.mark.parametrize(
    "setting",
    [
        "",
        "torch.set_float32_matmul_precision('medium')",
        "b.cuda.matmul.fp32_precision = b.mkldnn.matmul.fp32_precision = 'tf32'",
        "b.cudnn.conv.fp32_precision = 'ieee'",
        "b.mkldnn.conv.fp32_precision = 'bf16'",
        "b.fp32_precision = 'tf32'",
        "torch.set_float32_matmul_precision('high'); b.cudnn.conv.fp32_precision = 'ieee'",
    ],
)
def test_fp32_is_exact_whatever_a_program_has_set(setting: str) -> None:
    """In a process of its own, as PyTorch refuses the older settings after newer ones."""
    program = NEWER_SETTINGS.replace("{setting}", setting)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["ieee", "True", "True"]


def test_other_settings_of_cudnn_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with device.exact_fp32():
        assert torch.backends.cudnn.deterministic


@pytest.mark.parametrize("name", ["cuda:2", "cuda:130", "cuda:256"])
def test_a_gpu_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(device.UsageError, match="no such GPU"):
        device.resolve_device(name)

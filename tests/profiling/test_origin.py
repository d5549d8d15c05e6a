from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch

import parscale_ear
from parscale_ear.profiling.origin import device_name, origin


def test_says_where_with_what_and_when() -> None:
    before = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    said = origin(torch.device("cpu"), "bfloat16 autocast")
    assert before <= datetime.datetime.fromisoformat(said.pop("date"))
    assert said == {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16 autocast",
        "torch": torch.__version__,
        "version": parscale_ear.__version__,
    }


@pytest.mark.parametrize("told", ["model name\t: Abacus 3000\nmodel name\t: other\n", "", None])
def test_names_a_cpu(told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Path, *_: object, **__: object) -> str:
        if told is None:
            raise FileNotFoundError  # not a Linux
        return told

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    expected = "Abacus 3000" if told else "arm64"
    assert device_name(torch.device("cpu")) == f"{expected} (5 cores)"

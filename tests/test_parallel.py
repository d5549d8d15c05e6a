from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from parscale_ear.parallel import Progress, WorkerError, run_shares, worker_devices


def double(share: Any, progress: Progress) -> Any:
    for _ in range(3):
        progress(1)
    return [2 * value for value in share], os.getpid()


def fail(share: Any, progress: Progress) -> Any:
    if share == "raise":
        raise ValueError("a number\nis wrong")
    if share == "die":
        os._exit(9)
    progress(1)
    return share


def test_results_come_in_order_from_other_processes() -> None:
    done: list[int] = []
    results = run_shares(double, [[1, 2], [3]], done.append)
    assert [values for values, _ in results] == [[2, 4], [6]]
    assert sum(done) == 6
    assert len({os.getpid(), *(pid for _, pid in results)}) == 3
    assert run_shares(double, [[5]], done.append) == [([10], os.getpid())]  # nothing to start


@pytest.mark.parametrize(
    ("share", "message"),
    [("raise", "ValueError: a number is wrong"), ("die", "process 1 ended with exit code 9")],
)
def test_a_failure_is_one_line(share: str, message: str) -> None:
    with pytest.raises(WorkerError) as caught:
        run_shares(fail, ["fine", share], lambda count: None)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_devices() -> None:
    assert worker_devices(torch.device("cpu"), None) == ["cpu"]
    assert worker_devices(torch.device("cpu"), 3) == ["cpu"] * 3
    assert worker_devices(torch.device("cuda:1"), 2) == ["cuda:1"] * 2
    with pytest.raises(ValueError, match="processes must be at least 1"):
        worker_devices(torch.device("cpu"), 0)

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from parscale_ear.checkpoint import CheckpointError, atomic_path
from parscale_ear.parallel import Progress, WorkerError, run_shares, worker_devices

TALK = 3000  # half a minute


def double(share: Any, progress: Progress) -> Any:
    for _ in range(3):
        progress(1)
    return [2 * value for value in share], os.getpid()


def fail(share: Any, progress: Progress) -> Any:
    if share == "raise":
        raise ValueError("a number\nis wrong")
    if share == "damaged":
        raise CheckpointError("a.safetensors: damaged")
    if share == "die":
        os._exit(9)
    if share == "talk":
        for _ in range(TALK):
            progress(1)
            time.sleep(0.01)
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


def test_a_process_that_died_is_noticed_while_others_talk() -> None:
    told: list[int] = []
    with pytest.raises(WorkerError, match="process 1 ended with exit code 9"):
        run_shares(fail, ["talk", "die"], told.append)
    assert sum(told) < TALK


def test_an_error_of_the_package_is_what_it_would_be_with_one_process() -> None:
    for shares in (["damaged"], ["fine", "damaged"]):
        with pytest.raises(CheckpointError, match=r"^a\.safetensors: damaged$"):
            run_shares(fail, shares, lambda count: None)


def run_out(share: Any, progress: Progress) -> Any:
    if share == "memory":
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: no memory")
    return (lambda: share) if share == "no pickle" else share


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ("memory", "out of memory; take smaller batches or fewer processes"),
        ("no pickle", "process 1 ended without a result that can be sent"),
    ],
)
def test_a_failure_says_what_to_do(share: str, message: str) -> None:
    with pytest.raises(WorkerError, match=message):
        run_shares(run_out, ["fine", share], lambda count: None)


def write_or_fail(share: Any, progress: Progress) -> Any:
    folder, writes = share
    if writes:
        with atomic_path(folder / "half.txt"):
            progress(1)
            time.sleep(60)
    while not list(folder.iterdir()):
        time.sleep(0.05)
    raise ValueError("the other one")


def test_processes_that_are_stopped_leave_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="the other one"):
        run_shares(write_or_fail, [(tmp_path, True), (tmp_path, False)], lambda count: None)
    assert not list(tmp_path.iterdir())


def test_nothing_to_do() -> None:
    assert run_shares(double, [], lambda count: None) == []


def threads(share: Any, progress: Progress) -> int:
    return torch.get_num_threads()


@pytest.mark.parametrize(("of_the_caller", "of_each"), [(8, 4), (3, 1), (1, 1)])
def test_processes_share_the_threads_of_the_caller(of_the_caller: int, of_each: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(of_the_caller)
    try:
        assert run_shares(threads, [0, 1], lambda count: None) == [of_each] * 2
    finally:
        torch.set_num_threads(before)


def test_devices() -> None:
    assert worker_devices(torch.device("cpu"), None) == ["cpu"]
    assert worker_devices(torch.device("cpu"), 3) == ["cpu"] * 3
    assert worker_devices(torch.device("cuda:1"), 2) == ["cuda:1"] * 2
    with pytest.raises(ValueError, match="processes must be at least 1"):
        worker_devices(torch.device("cpu"), 0)


def wait_long(share: Any, progress: Progress) -> Any:
    (Path(share) / str(os.getpid())).touch()
    while True:
        progress(1)
        time.sleep(0.05)


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="SKIPPED: looks into /proc")
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_a_parent_that_was_killed(kind: signal.Signals, tmp_path: Path) -> None:
    code = (
        "from parscale_ear.parallel import run_shares\n"
        "from test_parallel import wait_long\n"
        "if __name__ == '__main__':\n"
        f"    run_shares(wait_long, [{str(tmp_path)!r}] * 2, lambda count: None)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    places = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    parent = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": places})
    try:
        while len(pids := [int(p.name) for p in tmp_path.iterdir() if p.name.isdecimal()]) < 2:
            assert parent.poll() is None
            time.sleep(0.1)
    finally:
        parent.send_signal(kind)
        parent.wait()
    for _ in range(600):  # a minute; it takes less than a second
        if not any(map(running, pids)):
            break
        time.sleep(0.1)
    left = [pid for pid in pids if running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []

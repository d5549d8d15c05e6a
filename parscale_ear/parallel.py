"""Several processes on one job: each takes a share, reports progress, and hands back a result.

A share is worked through by a picklable function in a process of its own (spawned, so that CUDA
and threads are safe), and ends with the caller's. With one process all happens in the caller's, with
nothing to start.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.queues import Queue
from typing import Any

import torch

from parscale_ear.checks import check_whole
from parscale_ear.device import out_of_memory

Progress = Callable[[int], object]  # called with the number of things done since the last call
Work = Callable[[Any, Progress], Any]  # a share and where to report progress → a result
_POLL_S = 0.5
_GRACE_S = 10.0  # for processes that are stopped to remove what is half-written


class WorkerError(RuntimeError):
    """A process failed; the message is one line, the traceback is in the notes."""


def worker_devices(device: torch.device, processes: int | None) -> list[str]:
    """The device of every process.

    Args:
        device: what was asked for; ``cuda`` without a number stands for all GPUs.
        processes: how many; None: one a GPU, or one on the CPU.

    Raises:
        ValueError: ``processes`` is below 1.
    """
    if processes is not None:
        check_whole(1, processes=processes)
    if device.type == "cuda" and device.index is None:
        gpus = torch.cuda.device_count()
        return [f"cuda:{k % gpus}" for k in range(processes or gpus)]
    return [str(device)] * (processes or 1)


def run_shares(work: Work, shares: Sequence[Any], progress: Progress) -> list[Any]:
    """Runs ``work(share, progress)`` for every share, each in its own process.

    Args:
        work: a function that spawned processes can import.
        shares: one a process; picklable. A single one is worked through in this process.
        progress: called in this process with the number of things done.

    Returns:
        The results, in the order of the shares.

    Raises:
        WorkerError: a process failed or died; the others are stopped. An error of this package is
            raised as itself.
    """
    if not shares:
        return []
    if len(shares) == 1:
        return [work(shares[0], progress)]
    context = multiprocessing.get_context("spawn")
    messages: Queue[tuple[int, str, Any]] = context.Queue()
    threads = max(1, torch.get_num_threads() // len(shares))  # as OMP_NUM_THREADS says
    processes = [
        context.Process(target=_work, args=(k, work, share, messages, threads), daemon=True)
        for k, share in enumerate(shares)
    ]
    results: dict[int, Any] = {}
    gone: set[int] = set()  # ended, and nothing was heard of them for one more turn
    for process in processes:
        process.start()
    looked = time.monotonic()
    try:
        while len(results) < len(shares):
            if time.monotonic() - looked > _POLL_S:  # others may have enough to tell
                looked = time.monotonic()
                _check_alive(processes, results, gone, silent=False)
            try:
                index, kind, content = messages.get(timeout=_POLL_S)
            except queue.Empty:
                looked = time.monotonic()
                _check_alive(processes, results, gone, silent=True)
                continue
            if kind == "progress":
                progress(content)
            elif kind == "result":
                results[index] = content
            else:
                own, line, trace = content
                if own is not None:
                    raise own
                error = WorkerError(line)
                if hasattr(error, "add_note"):
                    error.add_note(trace)
                raise error
    finally:
        if len(results) < len(shares):
            for process in processes:
                process.terminate()
        for process in processes:
            process.join(_GRACE_S if len(results) < len(shares) else None)
            if process.is_alive():
                process.kill()
                process.join()
    return [results[k] for k in range(len(shares))]


def _check_alive(
    processes: Sequence[Any], results: dict[int, Any], gone: set[int], *, silent: bool
) -> None:
    """A process that was killed sends no message; one that ended may still have one under way.

    As long as others are heard (not ``silent``), it may stand behind theirs.
    """
    for index, process in enumerate(processes):
        if index in results or process.exitcode is None:
            continue
        if process.exitcode == 0 and not silent:
            continue
        if index not in gone:
            gone.add(index)
        else:
            if process.exitcode == 0:
                raise WorkerError(f"process {index} ended without a result that can be sent")
            raise WorkerError(
                f"process {index} ended with exit code {process.exitcode} (out of memory?); try "
                "fewer processes"
            )


def _end_with_parent() -> None:
    """Ends this process as soon as the parent is gone, which a signal may end without a word."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(index: int, work: Work, share: Any, messages: Any, threads: int) -> None:
    """What runs in a process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def stop(*_: object) -> None:  # as an exception, so that nothing half-written stays
        messages.cancel_join_thread()
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    torch.set_num_threads(threads)
    try:
        result = work(share, lambda count: messages.put((index, "progress", count)))
        messages.put((index, "result", result))
    except KeyboardInterrupt:
        return  # the parent was interrupted too, and says so
    except Exception as error:
        # An error of this package (a damaged file, say) is the caller's as if there were one process.
        own = error if type(error).__module__.partition(".")[0] == __package__ else None
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if out_of_memory(error):
            line = "a process is out of memory; take smaller batches or fewer processes"
        messages.put((index, "error", (own, line, traceback.format_exc())))

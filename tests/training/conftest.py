"""Fixtures of several recipes' tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parscale_ear.training import loop


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Calls a training and kills it after so many steps, of whatever stages.

    Every step is followed by a checkpoint.
    """
    original = loop.Run._step

    def call(steps: int, train: Callable[[], object]) -> None:
        left = [steps]

        def step(self: loop.Run) -> Any:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            figures = original(self)
            self.progress.step += 1
            self.save()
            self.progress.step -= 1
            return figures

        with monkeypatch.context() as patch:
            patch.setattr(loop.Run, "_step", step)
            with pytest.raises(KeyboardInterrupt):
                train()

    return call

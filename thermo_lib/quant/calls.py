"""What a forward pass is about: the denoising step and which tokens are masked, in each thread its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Rows = tuple[Tensor, int]


class _Call(threading.local):
    """What this thread's forward pass is about; one that nobody has set is the first of all timesteps."""

    step: tuple[int, int] = (0, 1)
    is_masked: Tensor | None = None
    rows: Rows | None = None


CALL = _Call()


@contextmanager
def denoising(
    step: tuple[int, int], is_masked: Tensor | None = None, rows: Rows | tuple[()] | None = None
) -> Iterator[None]:
    """While it is entered (``with``), this thread's quantized layers compute for a timestep and for token states.

    Both belong to a call, not to a layer, so that several threads can use one model.

    Args:
        step: timestep ``i`` and number of timesteps ``T`` of the run; a layer made for another ``T`` takes the step at
            the same mask ratio.
        is_masked: which tokens of the input are masked, bool ``(batch, length)``; None where no layer asks.
        rows: timestep of each row of the input, int64 ``(batch,)``, and number of timesteps, where the rows are at
            several: in training, and where texts are generated in blocks. Parameters that depend on the timestep
            follow it instead of ``step``. None leaves what is set, ``()`` takes it away.
    """
    before = CALL.step, CALL.is_masked, CALL.rows
    CALL.step, CALL.is_masked, CALL.rows = step, is_masked, CALL.rows if rows is None else rows or None
    try:
        yield
    finally:
        CALL.step, CALL.is_masked, CALL.rows = before


class CurrentStep(threading.local):
    """The denoising step that a model computes for, in each thread its own.

    Attributes:
        value: timestep and number of timesteps; the first step until it is set.
    """

    value: tuple[int, int] = (0, 1)

    def set(self, timestep: int, timesteps: int) -> None:
        """Go to a step; raises ValueError unless it is in ``0..timesteps-1``."""
        if not 0 <= timestep < timesteps:
            raise ValueError(f"timestep: found {timestep}, allowed are 0..{timesteps - 1}")
        self.value = timestep, timesteps

    def __deepcopy__(self, memo: dict[int, Any]) -> "CurrentStep":
        return CurrentStep()

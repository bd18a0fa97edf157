"""What a forward pass is about: the denoising step and which tokens are masked, in each thread its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class _Call(threading.local):
    """What this thread's forward pass is about; one that nobody has set is the first of all timesteps."""

    step: tuple[int, int] = (0, 1)
    is_masked: Tensor | None = None
    rows: tuple[Tensor, int] | None = None


CALL = _Call()


@contextmanager
def denoising(
    step: tuple[int, int], is_masked: Tensor | None = None, rows: tuple[Tensor, int] | None = None
) -> Iterator[None]:
    """While it is entered (``with``), this thread's quantized layers compute for a timestep and for token states.

    Both belong to a call, not to a layer, so that several threads can use one model.

    Args:
        step: timestep ``i`` and number of timesteps ``T`` of the run; a layer made for another ``T`` takes the step at
            the same mask ratio.
        is_masked: which tokens of the input are masked, bool ``(batch, length)``; None where no layer asks.
        rows: timestep of each row of the input, ``(batch,)``, and number of timesteps, where layers are trained on rows
            of several; None leaves what is set.
    """
    before = CALL.step, CALL.is_masked, CALL.rows
    CALL.step, CALL.is_masked, CALL.rows = step, is_masked, CALL.rows if rows is None else rows
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

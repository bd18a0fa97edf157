"""Modules whose buffers keep their precision, and tables with a row for each timestep."""

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from thermo_lib.quant.calls import CALL


class PreciseBuffers(nn.Module):
    """A module with buffers that move between devices with the model, but keep their precision.

    ``PRECISE`` names them: a parameter of a code in bfloat16, say, would be that of another weight.
    """

    PRECISE: tuple[str, ...] = ("scale", "zero_point")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self.get_buffer(name) for name in self.PRECISE}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            changed = self.get_buffer(name)
            if changed.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(changed.device)
        return self


class TimestepTable(PreciseBuffers):
    """Parameters that may depend on the timestep: ``scale`` and ``zero_point`` of distinct rows, and each step's row.

    Neighbouring timesteps that share parameters share a row.

    Args:
        scale, zero_point: the rows, ``(rows, ...)``.
        row_of_step: int32 ``(timesteps,)``.
    """

    scale: Tensor
    zero_point: Tensor
    row_of_step: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, row_of_step: Tensor):
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("row_of_step", row_of_step)
        self._read: tuple[Tensor, list[int]] | None = None

    def row(self) -> int:
        """The table's row of the call's timestep; a run with another number of timesteps takes the same mask ratio's.

        A table is read once: an index that is a tensor on a GPU is waited for, at every call of every layer.
        """
        return self._row_at(*CALL.step)

    def rows_of(self, x: Tensor) -> list[int] | None:
        """The table's row for each row of an input ``(batch, length, channels)``; None where one is for all: ``row``.

        Raises:
            ValueError: the call has timesteps of another number of rows.
        """
        if CALL.rows is None or len(self.scale) == 1:
            return None
        steps, timesteps = CALL.rows
        if x.ndim != 3 or len(x) != len(steps):
            allowed = f"allowed is ({len(steps)}, length, channels), a row for each timestep"
            raise ValueError(f"rows: found an input of shape {tuple(x.shape)}, {allowed}")
        return [self._row_at(timestep, timesteps) for timestep in steps.tolist()]

    def _row_at(self, timestep: int, timesteps: int) -> int:
        if self._read is None or self._read[0] is not self.row_of_step:
            self._read = self.row_of_step, self.row_of_step.tolist()
        rows = self._read[1]
        return rows[timestep * len(rows) // timesteps]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read = None  # the table may have been overwritten where it is

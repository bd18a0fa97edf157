"""Boundary smoothing: interpolate quantization parameters across the edge between two time groups."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from thermo_lib.quant.limits import SMALLEST_SCALE
from thermo_lib.time_aware.groups import TimeGroupParams, check_contiguous

WINDOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda a: a,
    "cubic": lambda a: 3 * a**2 - 2 * a**3,
    "sigmoid": lambda a: torch.sigmoid(10 * (a - 0.5)),
}
SMOOTHING_METHODS = (*WINDOWED, "spline")
WINDOWS = range(1, 21)


@dataclass(frozen=True)
class BoundarySmoother:
    """Interpolates parameters across the boundaries between time groups.

    Every value comes from the two *original* neighbours, and a window takes at most half of a group, so windows
    never overlap, never reach past the neighbouring group and never cascade.

    Attributes:
        method: ``linear``, ``cubic``, ``sigmoid``, or None for no smoothing (bit-identical parameters). ``spline``
            goes further: a natural cubic spline over all timesteps through the groups' values at their middles,
            constant before the first and after the last; it has no window.
        window: timesteps smoothed on each side, 1-20.

    Raises:
        ValueError: unknown method or window out of range.
    """

    method: Literal["linear", "cubic", "sigmoid", "spline"] | None
    window: int

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in SMOOTHING_METHODS:
            raise ValueError(
                f"smoothing_method: found {self.method!r}, allowed are {', '.join(SMOOTHING_METHODS)}, None"
            )
        if self.window not in WINDOWS:
            raise ValueError(f"smoothing_window: found {self.window}, allowed are {WINDOWS[0]}..{WINDOWS[-1]}")

    def smooth(self, params: Sequence[TimeGroupParams]) -> list[TimeGroupParams]:
        """One ``TimeGroupParams`` a timestep.

        Args:
            params: the time groups in order, contiguous.

        Raises:
            ValueError: no group, a gap between groups, or parameters of different shapes.
        """
        check_contiguous(params)
        first = params[0].time_range[0]
        steps = [
            TimeGroupParams((i, i + 1), group.scale, group.zero_point, group.group_size)
            for group in params
            for i in range(*group.time_range)
        ]
        if self.method is None:
            return steps
        if self.method == "spline":
            return _combine(params, self.weights([group.time_range for group in params]))
        for left, right in itertools.pairwise(params):
            before, after = min(self.window, len(left) // 2), min(self.window, len(right) // 2)
            boundary = right.time_range[0]
            for j in range(1, before + after + 1):
                alpha = torch.tensor(j / (before + after + 1), dtype=torch.float64)
                weight = float(WINDOWED[self.method](alpha))
                i = boundary - before + j - 1
                steps[i - first] = TimeGroupParams(
                    (i, i + 1),
                    _interpolate(left.scale, right.scale, weight),
                    _interpolate(left.zero_point, right.zero_point, weight),
                    left.group_size,
                )
        return steps

    def weights(self, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """The smoothing as a matrix: row ``t`` holds what each group contributes to timestep ``t``.

        Args:
            ranges: half-open ``(start, stop)`` of the groups, contiguous from 0.

        Returns:
            float64 ``(timesteps, groups)``; each row sums to 1.
        """
        if self.method == "spline":
            middles = np.array([(start + stop - 1) / 2 for start, stop in ranges])
            if len(ranges) == 1:
                return torch.ones((ranges[0][1], 1), dtype=torch.float64)
            from scipy.interpolate import CubicSpline  # takes a while to import, and no other method needs it

            at = np.arange(ranges[-1][1]).clip(middles[0], middles[-1])
            return torch.from_numpy(CubicSpline(middles, np.eye(len(ranges)), bc_type="natural")(at))
        return _matrix(self, tuple((start, stop) for start, stop in ranges)).clone()


@lru_cache(maxsize=64)  # every layer of a model asks for the same
def _matrix(smoother: BoundarySmoother, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    """See ``BoundarySmoother.weights``, for all methods but splines."""
    columns = []
    for number in range(len(ranges)):
        unit = [
            TimeGroupParams(time_range, *torch.tensor([1.0, k == number], dtype=torch.float64))
            for k, time_range in enumerate(ranges)
        ]
        columns.append(torch.stack([step.zero_point for step in smoother.smooth(unit)]))
    return torch.stack(columns, -1)


def _combine(params: Sequence[TimeGroupParams], weights: Tensor) -> list[TimeGroupParams]:
    """One entry a timestep, each a weighted sum of the groups; a scale stays above zero."""

    def mix(values: list[Tensor]) -> Tensor:
        return torch.tensordot(weights.to(values[0].device), torch.stack(values).double(), 1).to(values[0].dtype)

    scale = mix([group.scale for group in params]).clamp(min=SMALLEST_SCALE)
    zero_point = mix([group.zero_point for group in params])
    first = params[0].time_range[0]
    return [
        TimeGroupParams((first + i, first + i + 1), s, z, params[0].group_size)
        for i, (s, z) in enumerate(zip(scale, zero_point, strict=True))
    ]


def _interpolate(left: Tensor, right: Tensor, weight: float) -> Tensor:
    """``left + (right - left) * weight``, computed in at least float32 and returned in the input's dtype."""
    dtype = torch.promote_types(left.dtype, torch.float32)
    return (left.to(dtype) + (right.to(dtype) - left.to(dtype)) * weight).to(
        left.dtype if left.is_floating_point() else dtype
    )

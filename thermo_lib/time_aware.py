"""Time-aware quantization parameters: time groups, boundary smoothing, Markov smoothness.

A time group is a contiguous range of timesteps with quantization parameters of its own. Boundary smoothing
interpolates the parameters across the edge between two groups; Markov smoothness scores how little they jump.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from thermo_lib.quant import SMALLEST_SCALE

WINDOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda a: a,
    "cubic": lambda a: 3 * a**2 - 2 * a**3,
    "sigmoid": lambda a: torch.sigmoid(10 * (a - 0.5)),
}
METHODS = (*WINDOWED, "spline")
WINDOWS = range(1, 21)
VIOLATION_THRESHOLD = 0.30
_MEDIUM, _HIGH = 0.3, 0.5


@dataclass(frozen=True)
class TimeGroups:
    """``T`` timesteps in contiguous groups.

    Attributes:
        timesteps: ``T``.
        num_groups: number of groups, 1 to ``T``.
        starts: the first timestep of every group but the first; None for groups of equal width (the first groups
            are one longer where T doesn't divide).
    """

    timesteps: int
    num_groups: int
    starts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.timesteps < 1:
            raise ValueError(f"timesteps: found {self.timesteps}, allowed is at least 1")
        if not 1 <= self.num_groups <= self.timesteps:
            raise ValueError(
                f"num_time_groups: found {self.num_groups}, allowed are 1..{self.timesteps} (the number of timesteps)"
            )
        if self.starts is not None:
            edges = (0, *self.starts, self.timesteps)
            if len(self.starts) != self.num_groups - 1 or any(a >= b for a, b in itertools.pairwise(edges)):
                raise ValueError(
                    f"time_group_starts: found {list(self.starts)}, allowed are {self.num_groups - 1} rising timesteps "
                    f"in 1..{self.timesteps - 1} for {self.num_groups} time groups"
                )

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Half-open ``(start, stop)`` of each group."""
        if self.starts is not None:
            return list(itertools.pairwise((0, *self.starts, self.timesteps)))
        width, longer = divmod(self.timesteps, self.num_groups)
        edges = [width * k + min(k, longer) for k in range(self.num_groups + 1)]
        return list(itertools.pairwise(edges))

    @property
    def boundaries(self) -> list[int]:
        """The first timestep of every group but the first."""
        return [start for start, _ in self.ranges[1:]]

    def group_of(self, timestep: int) -> int:
        """The number of the group that holds a timestep."""
        for number, (start, stop) in enumerate(self.ranges):
            if start <= timestep < stop:
                return number
        raise ValueError(f"timestep: found {timestep}, allowed are 0..{self.timesteps - 1}")


@dataclass(frozen=True)
class TimeGroupParams:
    """Quantization parameters of one time group.

    Attributes:
        time_range: half-open ``(start, stop)`` of timesteps; a ``range`` is accepted.
        scale: positive tensor: of weights ``(out_features, groups)``, of activations ``(token states, channel
            groups)``; any shape is taken.
        zero_point: tensor of the same shape.
        group_size: weights that share a scale; None where the parameters belong to a whole tensor.
    """

    time_range: tuple[int, int]
    scale: Tensor
    zero_point: Tensor
    group_size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.time_range, range):
            object.__setattr__(self, "time_range", (self.time_range.start, self.time_range.stop))
        start, stop = self.time_range
        if not 0 <= start < stop:
            raise ValueError(f"time_range: found {self.time_range}, allowed is (start, stop) with 0 <= start < stop")
        for name in ("scale", "zero_point"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)))
            if not getattr(self, name).isfinite().all():
                raise ValueError(f"{name}: found NaN or infinity, expected finite numbers")
        if self.scale.shape != self.zero_point.shape:
            shapes = f"{tuple(self.zero_point.shape)}, expected the scale's {tuple(self.scale.shape)}"
            raise ValueError(f"zero_point: found shape {shapes}")
        if (self.scale <= 0).any():
            raise ValueError(f"scale: found {self.scale.min().item():.3g}, allowed is above 0")

    def __len__(self) -> int:
        return self.time_range[1] - self.time_range[0]


def _check_contiguous(params: Sequence[TimeGroupParams]) -> None:
    if not params:
        raise ValueError("params: found no time group, allowed is at least one")
    for left, right in itertools.pairwise(params):
        if left.time_range[1] != right.time_range[0]:
            raise ValueError(f"time_range: found {right.time_range} after {left.time_range}, expected no gap")
        if left.scale.shape != right.scale.shape:
            raise ValueError(f"scale: found shape {tuple(right.scale.shape)} after {tuple(left.scale.shape)}")


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
        if self.method is not None and self.method not in METHODS:
            raise ValueError(f"smoothing_method: found {self.method!r}, allowed are {', '.join(METHODS)}, None")
        if self.window not in WINDOWS:
            raise ValueError(f"smoothing_window: found {self.window}, allowed are {WINDOWS[0]}..{WINDOWS[-1]}")

    def smooth(self, params: Sequence[TimeGroupParams]) -> list[TimeGroupParams]:
        """One ``TimeGroupParams`` a timestep.

        Args:
            params: the time groups in order, contiguous.

        Raises:
            ValueError: no group, a gap between groups, or parameters of different shapes.
        """
        _check_contiguous(params)
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
            at = np.arange(ranges[-1][1]).clip(middles[0], middles[-1])
            return torch.from_numpy(CubicSpline(middles, np.eye(len(ranges)), bc_type="natural")(at))
        columns = []
        for number in range(len(ranges)):
            unit = [
                TimeGroupParams(time_range, torch.tensor(1.0), torch.tensor(float(k == number), dtype=torch.float64))
                for k, time_range in enumerate(ranges)
            ]
            columns.append(torch.stack([step.zero_point for step in self.smooth(unit)]))
        return torch.stack(columns, -1)


def _combine(params: Sequence[TimeGroupParams], weights: Tensor) -> list[TimeGroupParams]:
    """One entry a timestep, each a weighted sum of the groups; a scale stays above zero."""

    def mix(values: list[Tensor]) -> Tensor:
        return torch.tensordot(weights, torch.stack(values).double(), 1).to(values[0].dtype)

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


@dataclass(frozen=True)
class Violation:
    """A boundary where the scale jumps by more than the threshold."""

    layer: str
    boundary: int
    scale_jump: float
    severity: Literal["low", "medium", "high"]


@dataclass(frozen=True)
class MarkovReport:
    """Markov smoothness of time-dependent parameters.

    Attributes:
        score: over the boundaries, 1 is smooth; 1 where there is no boundary.
        score_all_steps: the same over all adjacent timesteps.
        boundary_scores: first timestep after a boundary to the score of that boundary.
        violations: boundaries whose mean relative scale jump exceeds the threshold.
        max_jump: largest relative scale jump at a boundary, between adjacent timesteps.
        mean_jump: mean relative scale jump at the boundaries.
    """

    score: float
    score_all_steps: float
    boundary_scores: dict[int, float]
    violations: list[Violation]
    max_jump: float
    mean_jump: float


def _severity(jump: float) -> Literal["low", "medium", "high"]:
    return "low" if jump <= _MEDIUM else "medium" if jump <= _HIGH else "high"


def markov_report(
    params: Mapping[str, Sequence[TimeGroupParams]] | Sequence[TimeGroupParams],
    boundaries: Sequence[int],
    bits: int,
    threshold: float = VIOLATION_THRESHOLD,
) -> MarkovReport:
    """Markov smoothness: ``1 - mean over boundaries of (min(1, ds) + min(1, dz)) / 2``.

    ``ds = |s_R - s_L| / s_L`` and ``dz = |z_R - z_L| / (2^bits - 1)`` between the two timesteps next to a boundary,
    after smoothing; for parameters that are tensors, their mean over the elements.

    Args:
        params: one ``TimeGroupParams`` a timestep (what ``smooth`` returns), or such a list for each layer.
        boundaries: the first timestep of every group but the first (``TimeGroups.boundaries``).
        bits: bits of the codes that the zero points belong to.
        threshold: mean relative scale jump above which a boundary is a violation.

    Raises:
        ValueError: no layer, a boundary outside the timesteps, or parameters that aren't one a timestep.
    """
    layers = dict(params) if isinstance(params, Mapping) else {"": params}
    if not layers:
        raise ValueError("params: found no layer, allowed is at least one")
    at_boundaries: dict[int, list[float]] = {b: [] for b in boundaries}
    everywhere: list[float] = []
    violations: list[Violation] = []
    largest, jumps = 0.0, []
    for name, steps in layers.items():
        _check_contiguous(steps)
        if any(len(step) != 1 for step in steps):
            raise ValueError("params: found a range of several timesteps, expected one TimeGroupParams a timestep")
        inside = range(steps[0].time_range[0] + 1, steps[-1].time_range[1])
        outside = [b for b in boundaries if b not in inside]
        if outside:
            raise ValueError(f"boundaries: found {outside[0]}, allowed are {inside.start}..{inside.stop - 1}")
        for left, right in itertools.pairwise(steps):
            boundary = right.time_range[0]
            ds = (right.scale.double() - left.scale.double()).abs() / left.scale.double()
            dz = (right.zero_point.double() - left.zero_point.double()).abs() / (2**bits - 1)
            score = 1 - float(ds.clamp(max=1).mean() + dz.clamp(max=1).mean()) / 2
            everywhere.append(score)
            if boundary not in at_boundaries:
                continue
            at_boundaries[boundary].append(score)
            jump = float(ds.mean())
            jumps.append(jump)
            largest = max(largest, float(ds.max()))
            if jump > threshold:
                violations.append(Violation(name, boundary, jump, _severity(jump)))
    scores = {boundary: sum(values) / len(values) for boundary, values in at_boundaries.items()}
    return MarkovReport(
        score=sum(scores.values()) / len(scores) if scores else 1.0,
        score_all_steps=sum(everywhere) / len(everywhere) if everywhere else 1.0,
        boundary_scores=scores,
        violations=violations,
        max_jump=largest,
        mean_jump=sum(jumps) / len(jumps) if jumps else 0.0,
    )

"""Time groups: contiguous ranges of timesteps, each with quantization parameters of its own."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
    def intervals(self) -> list[tuple[int, int]]:
        """Half-open ``(start, stop)`` of each group."""
        if self.starts is not None:
            return list(itertools.pairwise((0, *self.starts, self.timesteps)))
        width, longer = divmod(self.timesteps, self.num_groups)
        edges = [width * k + min(k, longer) for k in range(self.num_groups + 1)]
        return list(itertools.pairwise(edges))

    @property
    def boundaries(self) -> list[int]:
        """The first timestep of every group but the first."""
        return [start for start, _ in self.intervals[1:]]

    def group_of(self, timestep: int) -> int:
        """The number of the group that holds a timestep."""
        for number, (start, stop) in enumerate(self.intervals):
            if start <= timestep < stop:
                return number
        raise ValueError(f"timestep: found {timestep}, allowed are 0..{self.timesteps - 1}")


def _tensor(values: Any) -> Tensor:
    """As a tensor; of Python's numbers, torch would take the process's default type."""
    found = torch.as_tensor(values)
    is_typed = hasattr(values, "dtype") or not found.is_floating_point()
    return found if is_typed else torch.as_tensor(values, dtype=torch.float32)


@dataclass(frozen=True)
class TimeGroupParams:
    """Quantization parameters of one time group.

    Attributes:
        time_range: half-open ``(start, stop)`` of timesteps; a ``range`` is accepted.
        scale: positive tensor: of weights ``(out_features, groups)``, of activations ``(token states, channel
            groups)``; any shape is taken, and Python's numbers, which become float32.
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
            object.__setattr__(self, name, _tensor(getattr(self, name)))
            if not getattr(self, name).isfinite().all():
                raise ValueError(f"{name}: found NaN or infinity, expected finite numbers")
        if self.scale.shape != self.zero_point.shape:
            shapes = f"{tuple(self.zero_point.shape)}, expected the scale's {tuple(self.scale.shape)}"
            raise ValueError(f"zero_point: found shape {shapes}")
        if (self.scale <= 0).any():
            raise ValueError(f"scale: found {self.scale.min().item():.3g}, allowed is above 0")

    def __len__(self) -> int:
        return self.time_range[1] - self.time_range[0]


def check_contiguous(params: Sequence[TimeGroupParams]) -> None:
    if not params:
        raise ValueError("params: found no time group, allowed is at least one")
    for left, right in itertools.pairwise(params):
        if left.time_range[1] != right.time_range[0]:
            raise ValueError(f"time_range: found {right.time_range} after {left.time_range}, expected no gap")
        if left.scale.shape != right.scale.shape:
            raise ValueError(f"scale: found shape {tuple(right.scale.shape)} after {tuple(left.scale.shape)}")

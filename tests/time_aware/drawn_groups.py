"""Parameters of time groups, given and drawn."""

import torch
from hypothesis import strategies as st

from thermo_lib import TimeGroupParams
from thermo_lib.time_aware.smoothing import WINDOWED

methods = st.sampled_from(list(WINDOWED))
windows = st.integers(1, 20)


def group(start: int, stop: int, scale: float | list[float], zero_point: float | list[float] = 0.0) -> TimeGroupParams:
    """Parameters of one time group."""
    return TimeGroupParams((start, stop), torch.tensor(scale), torch.tensor(zero_point))


def steps_of(scales: list[float], zero_points: list[float] | None = None) -> list[TimeGroupParams]:
    """One entry a timestep."""
    zeros = zero_points or [0.0] * len(scales)
    return [group(i, i + 1, s, z) for i, (s, z) in enumerate(zip(scales, zeros, strict=True))]


@st.composite
def time_groups(draw: st.DrawFn) -> list[TimeGroupParams]:
    """Two to five contiguous groups of one to twelve timesteps, with two parameters each, sometimes float16."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=2, max_size=5))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    positive, signed = st.floats(1e-3, 1e3), st.floats(-300, 300)
    start, groups = draw(st.integers(0, 3)), []
    for length in lengths:
        scale = torch.tensor(draw(st.tuples(positive, positive)), dtype=dtype)
        zero = torch.tensor(draw(st.tuples(signed, signed)), dtype=dtype)
        groups.append(TimeGroupParams((start, start + length), scale, zero))
        start += length
    return groups

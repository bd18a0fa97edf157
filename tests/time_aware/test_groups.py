"""Time groups divide the timesteps without gap or overlap, and impossible ones are refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thermo_lib import TimeGroupParams, TimeGroups


class TestTimeGroups:
    """Groups divide the timesteps without gap or overlap, as evenly as they can."""

    @given(timesteps=st.integers(1, 200), data=st.data())
    def test_groups_are_contiguous_and_differ_by_at_most_one(self, timesteps: int, data: st.DataObject) -> None:
        num_groups = data.draw(st.integers(1, timesteps))
        groups = TimeGroups(timesteps, num_groups)
        members = [i for start, stop in groups.intervals for i in range(start, stop)]
        widths = [stop - start for start, stop in groups.intervals]
        assert members == list(range(timesteps))
        assert len(widths) == num_groups
        assert max(widths) - min(widths) <= 1
        assert groups.boundaries == [start for start, _ in groups.intervals][1:]
        assert all(start <= i < stop for i in members for start, stop in [groups.intervals[groups.group_of(i)]])

    @pytest.mark.parametrize(
        ("timesteps", "num_groups", "ranges"),
        [
            (20, 2, [(0, 10), (10, 20)]),
            (16, 3, [(0, 6), (6, 11), (11, 16)]),
            (10, 4, [(0, 3), (3, 6), (6, 8), (8, 10)]),
            (3, 3, [(0, 1), (1, 2), (2, 3)]),
            (5, 1, [(0, 5)]),
        ],
    )
    def test_the_first_groups_are_one_longer(
        self, timesteps: int, num_groups: int, ranges: list[tuple[int, int]]
    ) -> None:
        assert TimeGroups(timesteps, num_groups).intervals == ranges

    @pytest.mark.parametrize(
        ("timesteps", "num_groups", "message"),
        [
            (4, 5, r"num_time_groups: found 5, allowed are 1\.\.4"),
            (4, 0, r"num_time_groups: found 0, allowed are 1\.\.4"),
            (0, 1, "timesteps: found 0, allowed is at least 1"),
        ],
    )
    def test_impossible_groups_are_refused(self, timesteps: int, num_groups: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TimeGroups(timesteps, num_groups)

    @pytest.mark.parametrize("timestep", [-1, 4])
    def test_a_timestep_outside_has_no_group(self, timestep: int) -> None:
        with pytest.raises(ValueError, match=rf"timestep: found {timestep}, allowed are 0\.\.3"):
            TimeGroups(4, 2).group_of(timestep)


class TestTimeGroupParams:
    """Parameters are checked when they are made."""

    def test_a_range_is_accepted(self) -> None:
        assert TimeGroupParams(range(2, 5), torch.ones(1), torch.zeros(1)).time_range == (2, 5)
        assert len(TimeGroupParams(range(2, 5), torch.ones(1), torch.zeros(1))) == 3

    def test_plain_numbers_are_accepted(self) -> None:
        assert TimeGroupParams((0, 1), 0.5, 3).scale.item() == 0.5

    @pytest.mark.parametrize(
        ("time_range", "scale", "zero_point", "message"),
        [
            ((0, 1), [0.1, 0.0], [0.0, 0.0], "scale: found 0, allowed is above 0"),
            ((0, 1), [0.1, -2.0], [0.0, 0.0], "scale: found -2, allowed is above 0"),
            ((0, 1), [0.1, math.nan], [0.0, 0.0], "scale: found NaN or infinity"),
            ((0, 1), [0.1, 0.1], [0.0, math.inf], "zero_point: found NaN or infinity"),
            ((0, 1), [0.1, 0.1], [0.0], r"zero_point: found shape \(1,\), expected the scale's \(2,\)"),
            ((3, 3), [0.1], [0.0], r"time_range: found \(3, 3\)"),
            ((-1, 3), [0.1], [0.0], r"time_range: found \(-1, 3\)"),
        ],
    )
    def test_impossible_parameters_are_refused(
        self, time_range: tuple[int, int], scale: list[float], zero_point: list[float], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            TimeGroupParams(time_range, torch.tensor(scale), torch.tensor(zero_point))


class TestStarts:
    """Time groups of chosen widths."""

    def test_ranges_follow_the_starts(self) -> None:
        groups = TimeGroups(10, 3, (2, 9))
        assert groups.intervals == [(0, 2), (2, 9), (9, 10)]
        assert groups.boundaries == [2, 9]
        assert [groups.group_of(t) for t in (0, 1, 2, 8, 9)] == [0, 0, 1, 1, 2]

    @pytest.mark.parametrize("starts", [(2,), (0, 5), (5, 5), (6, 5), (5, 10), (1, 2, 3)])
    def test_starts_that_make_no_groups_are_refused(self, starts: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="time_group_starts: found"):
            TimeGroups(10, 3, starts)

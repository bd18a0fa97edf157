"""Smoothing changes parameters at the boundaries by each method's formula, with values worked out by hand."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from drawn_groups import group, methods, steps_of, time_groups, windows
from hypothesis import given, settings
from hypothesis import strategies as st

from thermo_lib import BoundarySmoother, TimeGroupParams, TimeGroups
from thermo_lib.time_aware.smoothing import SMOOTHING_METHODS, WINDOWED


class TestBoundarySmoother:
    """Parameters near a boundary lie between those of the two groups, and nothing else changes."""

    def test_the_example_of_two_groups(self) -> None:
        # Window 2: two timesteps on each side, alpha = 1/5, 2/5, 3/5, 4/5 from 0.10 to 0.20.
        smoothed = BoundarySmoother("linear", 2).smooth([group(0, 10, 0.10), group(10, 20, 0.20)])
        expected = [0.10] * 8 + [0.12, 0.14, 0.16, 0.18] + [0.20] * 8
        assert [step.scale.item() for step in smoothed] == pytest.approx(expected, rel=1e-6)
        assert [step.time_range for step in smoothed] == [(i, i + 1) for i in range(20)]
        unchanged = [*range(8), *range(12, 20)]
        assert all(smoothed[i].scale.item() == torch.tensor(0.10 if i < 10 else 0.20).item() for i in unchanged)

    @pytest.mark.parametrize(
        ("method", "formula"),
        [
            ("linear", lambda a: a),
            ("cubic", lambda a: 3 * a**2 - 2 * a**3),
            ("sigmoid", lambda a: 1 / (1 + math.exp(-10 * (a - 0.5)))),
        ],
    )
    @given(window=windows)
    @settings(max_examples=20)
    def test_each_method_weighs_the_right_group_by_its_formula(
        self, method: str, formula: Callable[[float], float], window: int
    ) -> None:
        smoothed = BoundarySmoother(method, window).smooth([group(0, 40, 1.0, 5.0), group(40, 80, 3.0, -5.0)])
        for j in range(1, 2 * window + 1):
            weight = formula(j / (2 * window + 1))
            step = smoothed[40 - window + j - 1]
            assert step.scale.item() == pytest.approx(1 + 2 * weight, rel=1e-5)
            assert step.zero_point.item() == pytest.approx(5 - 10 * weight, abs=1e-5)

    @pytest.mark.parametrize(
        ("method", "values"),
        [
            # alpha = 0, 1/4, 1/2, 3/4, 1; cubic: 3/16 - 2/64 = 5/32; sigmoid: 1/(1 + e^2.5) = 0.0758582.
            ("linear", [0, 0.25, 0.5, 0.75, 1]),
            ("cubic", [0, 5 / 32, 0.5, 27 / 32, 1]),
            ("sigmoid", [0.0066929, 0.0758582, 0.5, 0.9241418, 0.9933071]),
        ],
    )
    def test_weights_at_five_places(self, method: str, values: list[float]) -> None:
        alpha = torch.arange(5, dtype=torch.float64) / 4
        torch.testing.assert_close(
            WINDOWED[method](alpha), torch.tensor(values, dtype=torch.float64), rtol=1e-5, atol=1e-7
        )

    @given(groups=time_groups(), method=methods, window=windows)
    def test_no_value_leaves_the_interval_of_its_two_groups_and_all_are_in_order(
        self, groups: list[TimeGroupParams], method: str, window: int
    ) -> None:
        first = groups[0].time_range[0]
        smoothed = BoundarySmoother(method, window).smooth(groups)
        for left, right in itertools.pairwise(groups):
            boundary = right.time_range[0] - first
            before, after = min(window, len(left) // 2), min(window, len(right) // 2)
            near = smoothed[boundary - before : boundary + after]
            for name in ("scale", "zero_point"):
                ends = torch.stack([getattr(left, name), getattr(right, name)])
                # From the left group's value over the window to the right group's, without a step back.
                values = torch.stack([ends[0], *[getattr(step, name) for step in near], ends[1]])
                assert ((values >= ends.amin(0)) & (values <= ends.amax(0))).all()
                rising = (ends[1] >= ends[0]).to(values.dtype) * 2 - 1
                assert (values.diff(dim=0) * rising >= 0).all()
                assert values.dtype == getattr(left, name).dtype

    @given(groups=time_groups(), method=methods, window=windows)
    def test_windows_neither_overlap_nor_reach_beyond_the_neighbours(
        self, groups: list[TimeGroupParams], method: str, window: int
    ) -> None:
        # A change of one group's parameters changes its own timesteps and its neighbours' halves towards it.
        changed = 1 % len(groups)
        other = TimeGroupParams(groups[changed].time_range, groups[changed].scale * 2, groups[changed].zero_point + 1)
        smoother = BoundarySmoother(method, window)
        before = smoother.smooth(groups)
        after = smoother.smooth([*groups[:changed], other, *groups[changed + 1 :]])
        start, stop = groups[changed].time_range
        reach = range(start - len(groups[0]) // 2, stop + (len(groups[2]) // 2 if len(groups) > 2 else 0))
        for old, new in zip(before, after, strict=True):
            same = torch.equal(old.scale, new.scale) and torch.equal(old.zero_point, new.zero_point)
            assert same or old.time_range[0] in reach

    @given(groups=time_groups(), method=methods, window=windows)
    def test_timesteps_outside_the_windows_keep_their_parameters(
        self, groups: list[TimeGroupParams], method: str, window: int
    ) -> None:
        smoothed = BoundarySmoother(method, window).smooth(groups)
        assert [s.time_range[0] for s in smoothed] == list(range(groups[0].time_range[0], groups[-1].time_range[1]))
        for number, one in enumerate(groups):
            start, stop = one.time_range
            margin = min(window, len(one) // 2)
            kept = range(start + (margin if number else 0), stop - (margin if number < len(groups) - 1 else 0))
            for step in smoothed:
                if step.time_range[0] in kept:
                    assert torch.equal(step.scale, one.scale)
                    assert torch.equal(step.zero_point, one.zero_point)

    def test_groups_of_one_timestep_are_left_alone(self) -> None:
        groups = steps_of([0.1, 0.5, 0.2, 0.9])
        smoothed = BoundarySmoother("linear", 20).smooth(groups)
        assert [s.scale.item() for s in smoothed] == [g.scale.item() for g in groups]

    @given(groups=time_groups(), window=windows)
    def test_without_a_method_parameters_are_bit_identical(self, groups: list[TimeGroupParams], window: int) -> None:
        smoothed = BoundarySmoother(None, window).smooth(groups)
        originals = [g for g in groups for _ in range(len(g))]
        for step, original in zip(smoothed, originals, strict=True):
            assert step.scale is original.scale
            assert step.zero_point is original.zero_point

    @pytest.mark.parametrize("window", [-1, 0, 21])
    def test_a_window_out_of_range_is_named(self, window: int) -> None:
        with pytest.raises(ValueError, match=rf"smoothing_window: found {window}, allowed are 1\.\.20"):
            BoundarySmoother("linear", window)

    def test_an_unknown_method_is_named_with_the_known_ones(self) -> None:
        with pytest.raises(
            ValueError, match="smoothing_method: found 'step', allowed are linear, cubic, sigmoid, spline, None"
        ):
            BoundarySmoother("step", 5)

    @pytest.mark.parametrize(
        ("groups", "message"),
        [
            ([], "params: found no time group, allowed is at least one"),
            ([group(0, 3, 0.1), group(4, 6, 0.2)], r"time_range: found \(4, 6\) after \(0, 3\), expected no gap"),
            ([group(0, 3, 0.1), group(2, 6, 0.2)], r"time_range: found \(2, 6\) after \(0, 3\), expected no gap"),
            ([group(0, 3, 0.1), group(3, 6, [0.2], [0.0])], r"scale: found shape \(1,\) after \(\)"),
        ],
    )
    def test_groups_that_do_not_follow_each_other_are_refused(
        self, groups: list[TimeGroupParams], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            BoundarySmoother("linear", 2).smooth(groups)


class TestWeights:
    """Smoothing as a matrix, and the spline, which is defined by one."""

    @given(timesteps=st.integers(1, 30), data=st.data(), method=st.sampled_from([None, *SMOOTHING_METHODS]))
    def test_the_matrix_smooths_and_its_rows_sum_to_one(
        self, timesteps: int, data: st.DataObject, method: str | None
    ) -> None:
        groups = TimeGroups(timesteps, data.draw(st.integers(1, timesteps)))
        smoother = BoundarySmoother(method, data.draw(st.integers(1, 20)))
        weights = smoother.weights(groups.intervals)
        assert weights.shape == (timesteps, groups.num_groups)
        torch.testing.assert_close(weights.sum(1), torch.ones(timesteps, dtype=torch.float64))
        scales = torch.rand(groups.num_groups, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
        params = [TimeGroupParams(r, s, s - 5) for r, s in zip(groups.intervals, scales, strict=True)]
        smoothed = smoother.smooth(params)
        torch.testing.assert_close(torch.stack([step.scale for step in smoothed]), weights @ scales)
        torch.testing.assert_close(torch.stack([step.zero_point for step in smoothed]), weights @ (scales - 5))

    def test_a_spline_passes_through_the_middles_and_stays_constant_outside(self) -> None:
        groups = TimeGroups(15, 3)  # middles 2, 7 and 12
        params = [
            TimeGroupParams(r, torch.tensor([s, 2 * s]), torch.zeros(2))
            for r, s in zip(groups.intervals, (1.0, 3.0, 2.0), strict=True)
        ]
        steps = BoundarySmoother("spline", 5).smooth(params)
        assert [steps[i].scale.tolist() for i in (0, 2, 7, 12, 14)] == [
            pytest.approx([s, 2 * s]) for s in (1.0, 1.0, 3.0, 2.0, 2.0)
        ]
        assert 1.0 < steps[4].scale[0] < 3.0

    def test_a_spline_through_a_line_is_the_line(self) -> None:
        groups = TimeGroups(20, 4)
        params = [
            TimeGroupParams((a, b), torch.tensor((a + b - 1) / 2 + 1), torch.tensor(0.0)) for a, b in groups.intervals
        ]
        steps = BoundarySmoother("spline", 1).smooth(params)
        inside = range(2, 18)  # from the first middle, 2, to the last, 17
        assert [steps[i].scale.item() for i in inside] == pytest.approx([i + 1 for i in inside])

    def test_a_spline_that_swings_below_zero_keeps_a_positive_scale(self) -> None:
        params = [
            TimeGroupParams((5 * k, 5 * k + 5), torch.tensor(s), torch.tensor(0.0))
            for k, s in enumerate((9.0, 1e-3, 1e-3, 9.0))
        ]
        assert all(step.scale > 0 for step in BoundarySmoother("spline", 5).smooth(params))

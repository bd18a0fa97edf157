"""Time groups, boundary smoothing and Markov smoothness, with values worked out by hand."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thermo_lib import BoundarySmoother, TimeGroupParams, TimeGroups, markov_report
from thermo_lib.time_aware.markov import Violation
from thermo_lib.time_aware.smoothing import METHODS, WINDOWED

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


class TestTimeGroups:
    """Groups divide the timesteps without gap or overlap, as evenly as they can."""

    @given(timesteps=st.integers(1, 200), data=st.data())
    def test_groups_are_contiguous_and_differ_by_at_most_one(self, timesteps: int, data: st.DataObject) -> None:
        num_groups = data.draw(st.integers(1, timesteps))
        groups = TimeGroups(timesteps, num_groups)
        members = [i for start, stop in groups.ranges for i in range(start, stop)]
        widths = [stop - start for start, stop in groups.ranges]
        assert members == list(range(timesteps))
        assert len(widths) == num_groups
        assert max(widths) - min(widths) <= 1
        assert groups.boundaries == [start for start, _ in groups.ranges][1:]
        assert all(start <= i < stop for i in members for start, stop in [groups.ranges[groups.group_of(i)]])

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
        assert TimeGroups(timesteps, num_groups).ranges == ranges

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


class TestMarkovReport:
    """The score is one minus the mean jump of scale and zero point at the boundaries, each at most one."""

    def test_worked_example(self) -> None:
        # Boundaries at 2, 4 and 6, four bits (15 codes).
        # 2: ds = |0.14 - 0.10| / 0.10 = 0.4, dz = 3 / 15 = 0.2: score 1 - 0.6/2 = 0.7, a medium violation.
        # 4: ds = |0.35 - 0.14| / 0.14 = 1.5, in the score 1, dz = 0: score 0.5, a high violation.
        # 6: ds = |0.28 - 0.35| / 0.35 = 0.2, dz = 30 / 15 = 2, in the score 1: score 0.4, no violation.
        steps = steps_of([0.10, 0.10, 0.14, 0.14, 0.35, 0.35, 0.28], [3, 3, 6, 6, 6, 6, 36])
        report = markov_report(steps, [2, 4, 6], bits=4)
        assert report.boundary_scores == pytest.approx({2: 0.7, 4: 0.5, 6: 0.4}, abs=1e-6)
        assert report.score == pytest.approx(1.6 / 3, abs=1e-6)
        # Between the other three pairs of timesteps nothing changes: (1 + 0.7 + 1 + 0.5 + 1 + 0.4) / 6.
        assert report.score_all_steps == pytest.approx(4.6 / 6, abs=1e-6)
        assert [(v.boundary, v.severity) for v in report.violations] == [(2, "medium"), (4, "high")]
        assert [v.scale_jump for v in report.violations] == pytest.approx([0.4, 1.5], abs=1e-5)
        assert report.max_jump == pytest.approx(1.5, abs=1e-5)
        assert report.mean_jump == pytest.approx(2.1 / 3, abs=1e-5)

    @pytest.mark.parametrize(
        ("jump", "threshold", "severity"),
        [  # powers of two, so that a jump is exactly what it says
            (0.25, 0.30, None),
            (0.25, 0.25, None),
            (0.25, 0.125, "low"),
            (0.375, 0.30, "medium"),
            (0.5, 0.30, "medium"),
            (0.5625, 0.30, "high"),
            (1.0, 0.30, "high"),
        ],
    )
    def test_severity(self, jump: float, threshold: float, severity: str | None) -> None:
        report = markov_report({"layer": steps_of([1.0, 1.0 + jump])}, [1], bits=8, threshold=threshold)
        assert report.violations == ([] if severity is None else [Violation("layer", 1, jump, severity)])

    def test_the_threshold_is_thirty_percent(self) -> None:
        jumps = {f"{percent} %": steps_of([100.0, 100.0 + percent]) for percent in (29, 31)}
        assert [v.layer for v in markov_report(jumps, [1], bits=8).violations] == ["31 %"]

    def test_equal_parameters_score_one(self) -> None:
        report = markov_report(steps_of([0.3] * 6, [2.0] * 6), [2, 4], bits=2)
        assert (report.score, report.score_all_steps, report.max_jump, report.mean_jump) == (1, 1, 0, 0)
        assert report.violations == []

    def test_without_a_boundary_the_score_is_one(self) -> None:
        report = markov_report(steps_of([0.3, 0.6]), [], bits=2)
        assert (report.score, report.boundary_scores) == (1, {})
        assert report.score_all_steps == pytest.approx(0.5)  # ds = 1, dz = 0

    def test_layers_count_alike_and_tensors_by_their_mean(self) -> None:
        # Layer a: ds = (0 + 1) / 2 = 0.5, dz = (3 + 0) / 3 / 2 = 0.5: 0.5. Layer b: ds = 0.5, dz = 0: 0.75.
        a = [group(0, 1, [1.0, 1.0], [0.0, 0.0]), group(1, 2, [1.0, 2.0], [3.0, 0.0])]
        b = [group(0, 1, [2.0, 2.0, 2.0], [0.0] * 3), group(1, 2, [3.0, 3.0, 3.0], [0.0] * 3)]
        report = markov_report({"a": a, "b": b}, [1], bits=2)
        assert report.boundary_scores == {1: pytest.approx(0.625)}
        assert (report.max_jump, report.mean_jump) == (1.0, 0.5)

    @given(groups=time_groups(), method=methods, window=windows)
    def test_smoothing_never_lowers_the_score(self, groups: list[TimeGroupParams], method: str, window: int) -> None:
        # Next to a boundary both sides move towards each other, so their ratio and their difference shrink.
        boundaries = [g.time_range[0] for g in groups[1:]]
        rough, smooth = (
            markov_report(BoundarySmoother(m, window).smooth(groups), boundaries, bits=8) for m in (None, method)
        )
        assert 0 <= rough.score <= smooth.score + 1e-9
        assert smooth.score <= 1
        assert smooth.max_jump <= rough.max_jump + 1e-9

    @pytest.mark.parametrize(
        ("params", "boundaries", "message"),
        [
            ({}, [1], "params: found no layer"),
            ({"layer": []}, [1], "params: found no time group"),
            ([group(0, 2, 0.1), group(2, 3, 0.1)], [1], "found a range of several timesteps, expected one"),
            (steps_of([0.1, 0.1, 0.1]), [3], r"boundaries: found 3, allowed are 1\.\.2"),
            (steps_of([0.1, 0.1, 0.1]), [0], r"boundaries: found 0, allowed are 1\.\.2"),
            ([group(0, 1, 0.1), group(2, 3, 0.1)], [1], "expected no gap"),
        ],
    )
    def test_what_has_no_score_is_refused(self, params: object, boundaries: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            markov_report(params, boundaries, bits=2)


class TestStarts:
    """Time groups of chosen widths."""

    def test_ranges_follow_the_starts(self) -> None:
        groups = TimeGroups(10, 3, (2, 9))
        assert groups.ranges == [(0, 2), (2, 9), (9, 10)]
        assert groups.boundaries == [2, 9]
        assert [groups.group_of(t) for t in (0, 1, 2, 8, 9)] == [0, 0, 1, 1, 2]

    @pytest.mark.parametrize("starts", [(2,), (0, 5), (5, 5), (6, 5), (5, 10), (1, 2, 3)])
    def test_starts_that_make_no_groups_are_refused(self, starts: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="time_group_starts: found"):
            TimeGroups(10, 3, starts)


class TestWeights:
    """Smoothing as a matrix, and the spline, which is defined by one."""

    @given(timesteps=st.integers(1, 30), data=st.data(), method=st.sampled_from([None, *METHODS]))
    def test_the_matrix_smooths_and_its_rows_sum_to_one(
        self, timesteps: int, data: st.DataObject, method: str | None
    ) -> None:
        groups = TimeGroups(timesteps, data.draw(st.integers(1, timesteps)))
        smoother = BoundarySmoother(method, data.draw(st.integers(1, 20)))
        weights = smoother.weights(groups.ranges)
        assert weights.shape == (timesteps, groups.num_groups)
        torch.testing.assert_close(weights.sum(1), torch.ones(timesteps, dtype=torch.float64))
        scales = torch.rand(groups.num_groups, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
        params = [TimeGroupParams(r, s, s - 5) for r, s in zip(groups.ranges, scales, strict=True)]
        smoothed = smoother.smooth(params)
        torch.testing.assert_close(torch.stack([step.scale for step in smoothed]), weights @ scales)
        torch.testing.assert_close(torch.stack([step.zero_point for step in smoothed]), weights @ (scales - 5))

    def test_a_spline_passes_through_the_middles_and_stays_constant_outside(self) -> None:
        groups = TimeGroups(15, 3)  # middles 2, 7 and 12
        params = [
            TimeGroupParams(r, torch.tensor([s, 2 * s]), torch.zeros(2))
            for r, s in zip(groups.ranges, (1.0, 3.0, 2.0), strict=True)
        ]
        steps = BoundarySmoother("spline", 5).smooth(params)
        assert [steps[i].scale.tolist() for i in (0, 2, 7, 12, 14)] == [
            pytest.approx([s, 2 * s]) for s in (1.0, 1.0, 3.0, 2.0, 2.0)
        ]
        assert 1.0 < steps[4].scale[0] < 3.0

    def test_a_spline_through_a_line_is_the_line(self) -> None:
        groups = TimeGroups(20, 4)
        params = [
            TimeGroupParams((a, b), torch.tensor((a + b - 1) / 2 + 1), torch.tensor(0.0)) for a, b in groups.ranges
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

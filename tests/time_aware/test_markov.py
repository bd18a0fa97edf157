"""The Markov score is that of examples worked out by hand, and smoothing never lowers it."""

import pytest
from drawn_groups import group, methods, steps_of, time_groups, windows
from hypothesis import given

from thermo_lib import BoundarySmoother, TimeGroupParams, markov_report
from thermo_lib.time_aware.markov import Violation


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

"""Bootstrap intervals have their width, and a verdict is what its interval shows of a target."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermo_lib.evaluation.statistics import interval, mean_interval, verdict


class TestIntervals:
    """Bootstrap percentile intervals, paired over sequences."""

    @pytest.mark.parametrize("seed", range(5))
    def test_an_interval_holds_the_value_and_is_the_same_again(self, seed: int) -> None:
        values = np.random.default_rng(seed).normal(size=30)

        def of_mean(seed: int) -> tuple[float, float]:
            return interval(lambda index: float(values[index].mean()), 30, resamples=200, seed=seed)

        low, high = of_mean(0)
        assert low < values.mean() < high
        assert (low, high) == of_mean(0)
        assert (low, high) != of_mean(1)

    def test_the_width_is_that_of_a_95_percent_interval(self) -> None:
        # The mean of 400 values of variance 1 has a standard error of 1/20: 2 * 1.96 / 20 = 0.196.
        values = np.random.default_rng(0).normal(size=400)
        values = (values - values.mean()) / values.std()
        low, high = interval(lambda index: float(values[index].mean()), 400)
        assert high - low == pytest.approx(0.196, rel=0.1)

    @pytest.mark.parametrize("kind", [np.float64, np.float32])
    @pytest.mark.parametrize("count", [2, 9, 130])
    def test_all_samples_at_once_give_the_same_interval(self, count: int, kind: type) -> None:
        values = np.random.default_rng(count).normal(size=count).astype(kind)
        assert mean_interval(values, 50) == interval(lambda index: float(values[index].mean()), count, 50)
        medians = interval(lambda index: np.median(values[index], -1).astype(float), count, 50, vectorized=True)
        assert medians == interval(lambda index: float(np.median(values[index])), count, 50)

    @pytest.mark.parametrize("count", [0, 1])
    def test_one_row_has_no_interval(self, count: int) -> None:
        with pytest.raises(ValueError, match=f"interval: found {count} rows .*, allowed are 2 or more"):
            interval(lambda index: float(index.sum()), count)


class TestVerdict:
    """A target is met or not where the whole interval is on one side."""

    @pytest.mark.parametrize(
        ("ci", "at_least", "below"),
        [
            ((0.3, 0.4), "met", "not met"),
            ((0.1, 0.15), "not met", "met"),
            ((0.1, 0.3), "inconclusive", "inconclusive"),
            ((0.2, 0.3), "met", "not met"),  # "at least" includes the target, "below" doesn't
            ((0.1, 0.2), "inconclusive", "inconclusive"),
            ((0.2, 0.2), "met", "not met"),
            ((0.1, 0.1), "not met", "met"),
        ],
    )
    def test_both_directions(self, ci: tuple[float, float], at_least: str, below: str) -> None:
        assert verdict(ci, 0.2, at_least=True) == at_least
        assert verdict(ci, 0.2, at_least=False) == below

    @given(ends=st.tuples(st.floats(-1, 1), st.floats(-1, 1)).map(sorted), target=st.floats(-1, 1))
    def test_the_directions_exclude_each_other(self, ends: list[float], target: float) -> None:
        opposite = {"met": "not met", "not met": "met", "inconclusive": "inconclusive"}
        ci = (ends[0], ends[1])
        assert verdict(ci, target, at_least=False) == opposite[verdict(ci, target, at_least=True)]

    @pytest.mark.parametrize("ci", [(0.3, 0.1), (math.nan, 0.1), (0.1, math.nan)])
    def test_what_is_no_interval_is_refused(self, ci: tuple[float, float]) -> None:
        with pytest.raises(ValueError, match="expected low <= high"):
            verdict(ci, 0.2, at_least=True)

"""The laws of a comparison: it turns round, pairs values on the same inputs, and says what the interval says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermo_lib.evaluation.comparison import MEASURES, differences, in_words, judge

RNG = np.random.default_rng(0)
HARD = RNG.normal(size=40)  # how hard each sequence is, for both models


def row(values: np.ndarray, inputs: str = "same", **more: object) -> dict[str, object]:
    """A row of scores whose accuracy is the mean of some values."""
    return {"accuracy": float(values.mean()), "sequences": {"inputs": inputs, "accuracy": values.tolist()}} | more


NOISE = 0.01 * RNG.normal(size=40)
A, B = row(HARD), row(HARD + NOISE + 0.1)


def only(rows: list[dict[str, object]]) -> dict[str, object]:
    """The single row."""
    (found,) = rows
    return found


def test_the_other_way_round_the_sign_and_the_verdict_turn() -> None:
    forward, back = only(differences(A, B)), only(differences(B, A))
    assert (forward["verdict"], back["verdict"]) == ("better", "worse")
    assert forward["difference"] == -back["difference"]
    assert forward["ci"] == pytest.approx([-end for end in reversed(back["ci"])], abs=1e-3)


def test_pairing_finds_a_difference_that_is_lost_on_other_inputs() -> None:
    paired, apart = only(differences(A, B)), only(differences(A, row(HARD + NOISE + 0.1, "others")))
    assert (paired["pairs"], apart["pairs"]) == (40, None)
    assert paired["difference"] == apart["difference"] == pytest.approx(0.1 + NOISE.mean())
    widths = [each["ci"][1] - each["ci"][0] for each in (paired, apart)]
    assert 10 * widths[0] < widths[1]
    assert (paired["verdict"], apart["verdict"]) == ("better", "can't be told apart")


def test_the_same_row_is_equal_and_one_sequence_decides_nothing() -> None:
    assert only(differences(A, A))["verdict"] == "equal"
    single = only(differences(row(HARD[:1]), row(HARD[:1] + 1)))
    assert (single["ci"], single["verdict"]) == (None, None)


def test_without_values_the_interval_is_that_of_independent_numbers() -> None:
    a = {"accuracy": 0.5, "accuracy_ci": [0.47, 0.54]}
    b = {"accuracy": 0.6, "accuracy_ci": [0.56, 0.63]}
    found = only(differences(a, b))
    assert found["ci"] == pytest.approx([0.1 - np.hypot(0.04, 0.04), 0.1 + np.hypot(0.03, 0.03)])
    assert (found["pairs"], found["verdict"]) == (None, "better")


@given(st.sampled_from(MEASURES), st.floats(-1, 1), st.floats(0, 1))
def test_a_verdict_needs_an_interval_without_zero(measure: object, middle: float, half: float) -> None:
    said = judge(measure, middle, (middle - half, middle + half))
    if not measure.is_score:
        assert said in ("smaller", "larger", "equal")
    elif said in ("better", "worse"):
        assert abs(middle) > half
        assert (said == "better") == (measure.sign * middle > 0)
    else:
        assert abs(middle) <= half


def test_words_name_each_number_once() -> None:
    a, b = A | {"nelbo": 3.0, "bits_per_weight": 32.0}, B | {"nelbo": 3.1, "bits_per_weight": 2.25}
    said = in_words(differences(a, b))
    assert said == "B is better in accuracy; needs less: bits per weight; differs without a known interval in NELBO."

"""Two models or two results beside each other: each difference with an interval, and what it says in words.

Where both were scored on the same inputs the difference is paired: it is taken on every sequence (or trajectory, or
puzzle), and its interval is the bootstrap interval of the mean over these. Sequences that are hard for both then don't
widen it. Without such values the interval of the difference comes from the intervals of both numbers, as if these were
independent (MOVER, Zou and Donner 2008, https://doi.org/10.1002/sim.3095), and is wider.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from thermo_lib.diffusion.sampling import unmask_probabilities
from thermo_lib.evaluation.scores import Evaluation, Suite, accuracy_per_sequence
from thermo_lib.evaluation.statistics import RESAMPLES, mean_interval
from thermo_lib.files.snapshots import digest, named

Judgement = Literal["better", "worse", "equal", "can't be told apart", "smaller", "larger"]


class Measure(NamedTuple):
    """A number that models are compared by.

    Attributes:
        key: its name in a row of scores.
        label: its name and unit for people.
        sign: 1 where more is better, -1 where less is better.
        is_score: False for a size, which is known exactly.
    """

    key: str
    label: str
    sign: int
    is_score: bool = True


MEASURES = (
    Measure("accuracy", "accuracy (0-1)", 1),
    Measure("nelbo", "NELBO (nats a token)", -1),
    Measure("path_kl", "path KL (nats a sequence)", -1),
    Measure("sudoku_solved", "Sudoku solved (0-1)", 1),
    Measure("bits_per_weight", "bits per weight", -1, is_score=False),
    Measure("megabytes", "weights on the disk (MB)", -1, is_score=False),
)
DIFFERENCE_COLUMNS = {
    "configuration": ("name", "{}"),
    "number": ("number", "{}"),
    "A": ("a", "{:.4f}"),
    "B": ("b", "{:.4f}"),
    "B - A": ("difference", "{:+.4f}"),
    "95 % of B - A": ("ci", "{0[0]:+.4f}..{0[1]:+.4f}"),
    "paired": ("pairs", "{}"),
    "B is": ("verdict", "{}"),
}


def per_sequence(evaluation: Evaluation, suite: Suite) -> dict[str, Any]:
    """What a paired comparison with another model needs of an evaluation.

    Returns:
        ``inputs``, a digest of what the model was scored on, and, by the key of a measure, a list of each sequence's
        (trajectory's, puzzle's) value, whose mean is the measure; JSON can hold all of it.
    """
    states = named("held_out", vars(suite.held_out)) | named("trajectories", vars(suite.trajectories))
    how = [suite.timesteps, suite.sampler, suite.temperature, [vars(puzzle) for puzzle in suite.puzzles]]
    rho = unmask_probabilities(evaluation.nll.shape[1])
    values = {
        "accuracy": accuracy_per_sequence(evaluation.correct, evaluation.masked).tolist(),
        "nelbo": ((evaluation.nll * rho).sum(1) / evaluation.length).tolist(),
        "path_kl": evaluation.path.per_sequence.sum(1).tolist(),
    }
    if evaluation.puzzles is not None:
        values["sudoku_solved"] = [float(solved) for solved in evaluation.puzzles.solved]
    return {"inputs": digest(states, how), **values}


def differences(
    a: Mapping[str, Any], b: Mapping[str, Any], *, name: str | None = None, resamples: int = RESAMPLES
) -> list[dict[str, Any]]:
    """What ``b`` has more or less than ``a``, number by number.

    Args:
        a, b: rows of scores by the keys of ``MEASURES``, with ``KEY_ci`` where a number has an interval and with
            ``sequences``, see ``per_sequence``, where there are values to pair.
        name: of the configuration that both are, for the rows.
        resamples: number of bootstrap samples of an interval.

    Returns:
        For each number that both rows have: ``name``, ``number``, ``key``, ``a``, ``b``, ``difference`` (b - a), ``ci``
        (its 95 % interval, None where it has none), ``pairs`` (how many values were paired, None if none were) and
        ``verdict`` on ``b`` (None where nothing says how sure the numbers are).
    """
    rows = []
    for measure in MEASURES:
        old, new = a.get(measure.key), b.get(measure.key)
        if old is None or new is None:
            continue
        pairs = _pairs(a, b, measure.key)
        ci = _interval(a, b, measure, pairs, resamples)
        rows.append(
            {
                "name": name,
                "number": measure.label,
                "key": measure.key,
                "a": old,
                "b": new,
                "difference": new - old,
                "ci": None if ci is None else list(ci),
                "pairs": None if pairs is None else len(pairs),
                "verdict": judge(measure, new - old, ci),
            }
        )
    return rows


def judge(measure: Measure, difference: float, ci: tuple[float, float] | None) -> Judgement | None:
    """What a difference says of the second model; None for a score without an interval that differs."""
    if not measure.is_score:
        return "equal" if difference == 0 else "smaller" if difference < 0 else "larger"
    if difference == 0 and ci in (None, (0, 0)):
        return "equal"
    if ci is None:
        return None
    if ci[0] <= 0 <= ci[1]:
        return "can't be told apart"
    return "better" if measure.sign * ci[0] > 0 else "worse"


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> np.ndarray | None:
    """The differences of values on the same inputs; None where there are none."""
    first, second = a.get("sequences") or {}, b.get("sequences") or {}
    if key not in first or key not in second or first["inputs"] != second["inputs"]:
        return None
    if len(first[key]) != len(second[key]):
        return None
    return np.array(second[key], dtype=float) - np.array(first[key], dtype=float)


def _interval(
    a: Mapping[str, Any], b: Mapping[str, Any], measure: Measure, pairs: np.ndarray | None, resamples: int
) -> tuple[float, float] | None:
    if not measure.is_score:
        return None
    if pairs is not None:
        if len(pairs) == 1:
            return None  # one value says nothing about how much values vary
        if (pairs == pairs[0]).all():
            return float(pairs[0]), float(pairs[0])
        return mean_interval(pairs, resamples)
    old, new = _own_interval(a, measure.key, resamples), _own_interval(b, measure.key, resamples)
    if old is None or new is None:
        return None
    difference = b[measure.key] - a[measure.key]
    below = np.hypot(b[measure.key] - new[0], old[1] - a[measure.key])
    above = np.hypot(new[1] - b[measure.key], a[measure.key] - old[0])
    return float(difference - below), float(difference + above)


def _own_interval(row: Mapping[str, Any], key: str, resamples: int) -> Sequence[float] | None:
    """The interval of a single number: the one that the row has, or that of its values."""
    if row.get(f"{key}_ci") is not None:
        return row[f"{key}_ci"]
    values = (row.get("sequences") or {}).get(key)
    if not values:
        return None
    return mean_interval(np.array(values, dtype=float), resamples)


def in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the differences of one pair come to, as a sentence, e.g. ``B is worse in path KL.``"""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["verdict"] or "without an interval", []).append(row["number"].partition(" (")[0])
    forms = {
        "better": "is better in {}",
        "worse": "is worse in {}",
        "can't be told apart": "can't be told apart from A in {}",
        "equal": "is equal to A in {}",
        "smaller": "needs less: {}",
        "larger": "needs more: {}",
        "without an interval": "differs without a known interval in {}",
    }
    parts = [form.format(", ".join(found[verdict])) for verdict, form in forms.items() if verdict in found]
    return f"B {'; '.join(parts)}." if parts else "A and B have no number in common."

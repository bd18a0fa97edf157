"""Bootstrap intervals, verdicts and paired ratios of times."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

RESAMPLES = 2000
Verdict = Literal["met", "not met", "inconclusive"]


def interval(
    statistic: Callable[[np.ndarray], Any],
    count: int,
    resamples: int = RESAMPLES,
    seed: int = 0,
    *,
    vectorized: bool = False,
) -> tuple[float, float]:
    """A 95 % bootstrap percentile interval.

    Args:
        statistic: of an int array of row indices, drawn with replacement; a number.
        count: number of rows.
        resamples: number of bootstrap samples.
        seed: seeds them.
        vectorized: ``statistic`` gets the indices of all samples at once, ``(resamples, count)``, and returns float64
            ``(resamples,)``, which is many times faster.

    Returns:
        ``(low, high)``; equal seeds and inputs give equal intervals.

    Raises:
        ValueError: fewer than two rows.
    """
    if count < 2:
        raise ValueError(f"interval: found {count} rows (sequences, puzzles or rounds), allowed are 2 or more")
    from scipy.stats import bootstrap  # takes half a second to import

    result = bootstrap(
        (np.arange(count),),
        lambda index, axis=-1: statistic(index.astype(int)),
        vectorized=vectorized,
        n_resamples=resamples,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(result.low), float(result.high)


def mean_interval(values: Sequence[float] | np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % interval of the mean of some values, see ``interval``."""
    array = np.asarray(values)
    return interval(lambda index: array[index].mean(-1).astype(float), len(array), resamples, vectorized=True)


def side_of_zero(ci: Sequence[float], below: str, above: str, between: str) -> str:
    """One of three words: for an interval below 0, above it, or one that holds it."""
    low, high = ci
    return below if high < 0 else above if low > 0 else between


def verdict(ci: tuple[float, float], target: float, *, at_least: bool) -> Verdict:
    """Whether a target is met, from the interval of the measured value.

    Args:
        ci: ``(low, high)``; equal ends for a value without uncertainty.
        target: the bound.
        at_least: True where the value should be at or above the target, False where it should be below.

    Returns:
        ``met`` or ``not met`` where the whole interval is on one side, ``inconclusive`` where it straddles the target.

    Raises:
        ValueError: the interval's ends are not numbers in order.
    """
    low, high = ci
    if not low <= high:
        raise ValueError(f"ci: found {ci}, expected low <= high")
    if at_least:
        return "met" if low >= target else "not met" if high < target else "inconclusive"
    return "met" if high < target else "not met" if low >= target else "inconclusive"


def paired_ratio(
    candidate: Callable[[], object], baseline: Callable[[], object], rounds: int, *, progress: str | None = None
) -> dict[str, Any]:
    """Time two functions in turns and compare them round by round.

    Args:
        candidate, baseline: called once a round each, the order swapped from round to round; one round warms up.
        rounds: number of counted rounds, at least 2.
        progress: label of a progress bar; None for none.

    Returns:
        ``ratio`` (median of candidate / baseline), ``ci`` (95 %, bootstrap over rounds) and median seconds of both.
    """
    if rounds < 2:
        raise ValueError(f"rounds: found {rounds}, allowed is at least 2")
    seconds: dict[str, list[float]] = {"candidate": [], "baseline": []}
    calls = {"candidate": candidate, "baseline": baseline}
    for turn in tqdm(range(rounds + 1), desc=progress, disable=progress is None, leave=False):
        for name in sorted(calls, reverse=bool(turn % 2)):
            start = time.perf_counter()
            calls[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    ratios = np.array(seconds["candidate"]) / np.array(seconds["baseline"])
    return {
        "ratio": float(np.median(ratios)),
        "ci": list(interval(lambda index: np.median(ratios[index], axis=-1), rounds, vectorized=True)),
        "rounds": rounds,
        "candidate_seconds": statistics.median(seconds["candidate"]),
        "baseline_seconds": statistics.median(seconds["baseline"]),
    }

"""Markov smoothness: a score of how little time-dependent parameters jump at the boundaries of time groups."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from thermo_lib.time_aware.groups import TimeGroupParams, check_contiguous

VIOLATION_THRESHOLD = 0.30
_MEDIUM, _HIGH = 0.3, 0.5


@dataclass(frozen=True)
class Violation:
    """A boundary where the scale jumps by more than the threshold."""

    layer: str
    boundary: int
    scale_jump: float
    severity: Literal["low", "medium", "high"]


@dataclass(frozen=True)
class MarkovReport:
    """Markov smoothness of time-dependent parameters.

    Attributes:
        score: over the boundaries, 1 is smooth; 1 where there is no boundary.
        score_all_steps: the same over all adjacent timesteps.
        boundary_scores: first timestep after a boundary to the score of that boundary.
        violations: boundaries whose mean relative scale jump exceeds the threshold.
        max_jump: largest relative scale jump at a boundary, between adjacent timesteps.
        mean_jump: mean relative scale jump at the boundaries.
    """

    score: float
    score_all_steps: float
    boundary_scores: dict[int, float]
    violations: list[Violation]
    max_jump: float
    mean_jump: float


def _severity(jump: float) -> Literal["low", "medium", "high"]:
    return "low" if jump <= _MEDIUM else "medium" if jump <= _HIGH else "high"


def markov_report(
    params: Mapping[str, Sequence[TimeGroupParams]] | Sequence[TimeGroupParams],
    boundaries: Sequence[int],
    bits: int,
    threshold: float = VIOLATION_THRESHOLD,
) -> MarkovReport:
    """Markov smoothness: ``1 - mean over boundaries of (min(1, ds) + min(1, dz)) / 2``.

    ``ds = |s_R - s_L| / s_L`` and ``dz = |z_R - z_L| / (2^bits - 1)`` between the two timesteps next to a boundary,
    after smoothing; for parameters that are tensors, their mean over the elements.

    Args:
        params: one ``TimeGroupParams`` a timestep (what ``smooth`` returns), or such a list for each layer.
        boundaries: the first timestep of every group but the first (``TimeGroups.boundaries``).
        bits: bits of the codes that the zero points belong to.
        threshold: mean relative scale jump above which a boundary is a violation.

    Raises:
        ValueError: no layer, a boundary outside the timesteps, or parameters that aren't one a timestep.
    """
    layers = dict(params) if isinstance(params, Mapping) else {"": params}
    if not layers:
        raise ValueError("params: found no layer, allowed is at least one")
    at_boundaries: dict[int, list[float]] = {b: [] for b in boundaries}
    everywhere: list[float] = []
    violations: list[Violation] = []
    largest, jumps = 0.0, []
    for name, steps in layers.items():
        check_contiguous(steps)
        if any(len(step) != 1 for step in steps):
            raise ValueError("params: found a range of several timesteps, expected one TimeGroupParams a timestep")
        inside = range(steps[0].time_range[0] + 1, steps[-1].time_range[1])
        outside = [b for b in boundaries if b not in inside]
        if outside:
            raise ValueError(f"boundaries: found {outside[0]}, allowed are {inside.start}..{inside.stop - 1}")
        for left, right in itertools.pairwise(steps):
            boundary = right.time_range[0]
            ds = (right.scale.double() - left.scale.double()).abs() / left.scale.double()
            dz = (right.zero_point.double() - left.zero_point.double()).abs() / (2**bits - 1)
            score = 1 - float(ds.clamp(max=1).mean() + dz.clamp(max=1).mean()) / 2
            everywhere.append(score)
            if boundary not in at_boundaries:
                continue
            at_boundaries[boundary].append(score)
            jump = float(ds.mean())
            jumps.append(jump)
            largest = max(largest, float(ds.max()))
            if jump > threshold:
                violations.append(Violation(name, boundary, jump, _severity(jump)))
    scores = {boundary: sum(values) / len(values) for boundary, values in at_boundaries.items()}
    return MarkovReport(
        score=sum(scores.values()) / len(scores) if scores else 1.0,
        score_all_steps=sum(everywhere) / len(everywhere) if everywhere else 1.0,
        boundary_scores=scores,
        violations=violations,
        max_jump=largest,
        mean_jump=sum(jumps) / len(jumps) if jumps else 0.0,
    )

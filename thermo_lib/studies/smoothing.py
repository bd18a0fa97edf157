"""The smoothing study: which points it measures, and the tables and verdicts that come from them."""

import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from thermo_lib.evaluation.report import table
from thermo_lib.evaluation.smoothing import CLAIMED, Targets, target_row
from thermo_lib.evaluation.statistics import interval, mean_interval
from thermo_lib.pipeline.about import words
from thermo_lib.studies.grid import Grid, Point, PointRow, point

_POINT_COLUMNS = {
    "point": ("name", "{}"),
    "seed": ("calibration_seed", "{}"),
    "recipe": ("recipe", "{}"),
    "accuracy": ("accuracy", "{:.6f}"),
    "path KL": ("path_kl", "{:.6f}"),
}


def command(fields: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """The command that measures a configuration anew; ``fields`` is what ``point`` takes."""
    given = [f"{name}={value}" for name, value in fields.items() if value is not None]
    quoted = [shlex.quote(word) for word in given]
    return " ".join(["python -m thermo_lib point", *quoted, "--seeds", *map(str, seeds)])


def verdicts(
    grid: Grid,
    fields: Mapping[str, Any],
    methods: Sequence[str],
    seeds: Sequence[int],
    claims: Targets = CLAIMED,
) -> list[dict[str, Any]]:
    """The earlier project's claims about one configuration against itself unsmoothed, seeds averaged.

    Args:
        grid: the measured points.
        fields: what ``point`` takes, without a method.
        methods: smoothing methods.
        seeds: seeds of the calibration data.
        claims: the bounds of the verdicts.

    Returns:
        Rows of a table of targets. The accuracy's intervals are over sequences, the others' over seeds, low to high.
    """
    rough = [grid[point(seed, **fields)] for seed in seeds]
    rows = []
    for method in methods:
        smooth = [grid[point(seed, method, **fields)] for seed in seeds]
        found = [_smoothness(row) for row in smooth]
        config = smooth[0].point.config
        value, ci = gain(smooth, rough)
        rows.append(target_row("relative accuracy gain", config, method, claims.accuracy_gain, value, ci))
        cuts = [1 - jump / _smoothness(row)[1] for (_, jump), row in zip(found, rough, strict=True)]
        for name, values, bound in (
            ("Markov score", [score for score, _ in found], claims.markov_score),
            ("cut of the mean parameter jump", cuts, claims.jump_cut),
        ):
            spread = (min(values), max(values))
            rows.append(target_row(name, config, method, bound, float(np.mean(values)), spread))
    return rows


def _smoothness(row: PointRow) -> tuple[float, float]:
    """Markov score and mean jump of a point with time groups."""
    assert row.markov_score is not None
    assert row.mean_jump is not None
    return row.markov_score, row.mean_jump


def summary(
    grid: Grid, configurations: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], baseline: str
) -> list[dict[str, Any]]:
    """Rows of a table: scores averaged over seeds, each compared with a baseline.

    Args:
        grid: the measured points.
        configurations: name to what ``point`` takes.
        seeds: seeds of the calibration data.
        baseline: one of the names.
    """
    found = {name: [grid[point(seed, **fields)] for seed in seeds] for name, fields in configurations.items()}
    rows = []
    for name, measured in found.items():
        accuracies = [row.accuracy for row in measured]
        compared = name != baseline
        change, change_ci = gain(measured, found[baseline]) if compared else (0.0, ())
        kl_change, kl_ci = path_kl_change(measured, found[baseline]) if compared else (0.0, ())
        scores = [row.markov_score for row in measured if row.markov_score is not None]
        rows.append(
            {
                "name": name,
                "accuracy": float(np.mean(accuracies)),
                "seeds": [min(accuracies), max(accuracies)] if len(seeds) > 1 else None,
                "path_kl": float(np.mean([row.path_kl for row in measured])),
                "markov_score": float(np.mean(scores)) if scores else None,
                "gain": 100 * change if compared else None,
                "gain_ci": [100 * end for end in change_ci] if compared else None,
                "path_kl_change": kl_change if compared else None,
                "path_kl_change_ci": list(kl_ci) if compared else None,
            }
        )
    return rows


def measured(
    grid: Grid, configurations: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """Which configurations the grid has with every seed, and the names of those that it hasn't.

    Args:
        grid: the measured points.
        configurations: name to what ``point`` takes.
        seeds: seeds of the calibration data.
    """
    found = {
        name: fields
        for name, fields in configurations.items()
        if all(point(seed, **fields).key in grid.rows for seed in seeds)
    }
    return found, [name for name in configurations if name not in found]


@contextmanager
def printed_if_lost(grid: Grid) -> Iterator[None]:
    """Print the points that this run has measured where the disk doesn't take them."""
    try:
        yield
    except OSError:
        found = [grid.rows[key] for key in grid.measured]
        rows = [
            {"name": words(row.point.config), "accuracy": row.accuracy, "path_kl": row.path_kl} | row.point.to_dict()
            for row in found
        ]
        if rows:
            print(table(rows, _POINT_COLUMNS))
        raise


def over_seeds(grid: Grid, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every configuration that was measured with all of the seeds: its point with the first and its mean scores."""
    found = []
    for row in grid.rows.values():
        keys = [replace(row.point, calibration_seed=seed).key for seed in seeds]
        if row.point.calibration_seed != seeds[0] or any(k not in grid.rows for k in keys):
            continue
        rows = [grid.rows[k] for k in keys]
        scores = [r.markov_score for r in rows if r.markov_score is not None]
        found.append(
            {
                "point": row.point,
                "accuracy": float(np.mean([r.accuracy for r in rows])),
                "path_kl": float(np.mean([r.path_kl for r in rows])),
                "markov_score": float(np.mean(scores)) if len(scores) == len(rows) else None,
            }
        )
    return found


SUMMARY_COLUMNS = {
    "configuration": ("name", "{}"),
    "accuracy": ("accuracy", "{:.4f}"),
    "seeds": ("seeds", "{0[0]:.4f}..{0[1]:.4f}"),
    "gain, %": ("gain", "{:+z.2f}"),
    "95 %": ("gain_ci", "{0[0]:+z.2f}..{0[1]:+z.2f}"),
    "path KL": ("path_kl", "{:.2f}"),
    "change": ("path_kl_change", "{:+z.2f}"),
    "95 % ": ("path_kl_change_ci", "{0[0]:+z.2f}..{0[1]:+z.2f}"),
    "Markov": ("markov_score", "{:.3f}"),
}


class Scored(Protocol):
    """What can be compared by sequence and by trajectory, see ``PointRow``."""

    @property
    def accuracy_per_sequence(self) -> Sequence[float]:
        """Each sequence's share of the accuracy."""

    @property
    def path_kl_per_sequence(self) -> Sequence[float]:
        """Nats."""


def gain(rows: Sequence[Scored], baselines: Sequence[Scored]) -> tuple[float, tuple[float, float]]:
    """Relative accuracy gain over baselines, seeds averaged, with a paired 95 % interval over sequences.

    Args:
        rows, baselines: the same seeds in the same order.
    """
    new, old = (np.mean([row.accuracy_per_sequence for row in side], 0) for side in (rows, baselines))
    ci = interval(lambda index: new[index].mean(-1) / old[index].mean(-1) - 1, len(new), vectorized=True)
    return float(new.mean() / old.mean() - 1), ci


def path_kl_change(rows: Sequence[Scored], baselines: Sequence[Scored]) -> tuple[float, tuple[float, float]]:
    """Change of path KL in nats, seeds averaged, with a paired 95 % interval over trajectories."""
    new, old = (np.mean([row.path_kl_per_sequence for row in side], 0) for side in (rows, baselines))
    return float((new - old).mean()), mean_interval(new - old)


def slices(axes: Mapping[str, Any]) -> dict[str, list[Point]]:
    """The points of a study by question; a full cross of all axes would be far too many.

    Args:
        axes: a section of ``params.yaml``, ``study.full`` or ``study.reduced``.
    """
    low, side = axes["low_bits"], axes["side_seeds"]

    def cross(*, seeds: Sequence[int] = axes["seeds"], **values: Sequence[Any]) -> list[Point]:
        combinations = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
        return [point(seed, **fields) for seed in seeds for fields in combinations if _makes_sense(fields)]

    def crosses(granularities: Sequence[dict[str, Any]], **values: Sequence[Any]) -> list[Point]:
        return [
            p
            for fields in granularities
            for p in cross(**{"activation_bits": [low], **values, **{name: [value] for name, value in fields.items()}})
        ]

    few, linear = axes["few_groups"], [None, "linear"]
    return {
        "dynamic per-token ranges": cross(
            activation_bits=[bits for bits in axes["activation_bits"] if bits < 16], activation_ranges=["dynamic"]
        ),
        "precision": cross(
            activation_bits=axes["activation_bits"], num_time_groups=few, method=[None, *axes["methods"]]
        ),
        "groups": cross(
            activation_bits=[low], num_time_groups=axes["num_time_groups"], method=[None, *axes["methods"]]
        ),
        "window": cross(
            seeds=side,
            activation_bits=[low],
            num_time_groups=axes["num_time_groups"],
            method=["linear"],
            smoothing_window=axes["windows"],
        ),
        "granularity": crosses(axes["granularities"], num_time_groups=few, method=linear),
        "timesteps": [
            p
            for axis in axes["timesteps"]
            for smoothing in ({}, {"method": ["linear"], "smoothing_window": axes["wide_windows"]})
            for p in cross(
                seeds=axis["seeds"], activation_bits=[low], timesteps=[axis["steps"]], num_time_groups=few, **smoothing
            )
        ],
        "quantizer": cross(
            seeds=side, activation_bits=[low], quantizer=axes["quantizers"], num_time_groups=few, method=linear
        ),
        "calibration mix": [
            p
            for mix in axes["mixes"]
            for p in cross(activation_bits=[low], **{name: [value] for name, value in mix.items()})
        ],
        "recipe": [
            *cross(activation_bits=[low], recipe=["best starts"], num_time_groups=axes["recipe_groups"], method=linear),
            *cross(
                activation_bits=[low],
                recipe=["best per layer", "best per layer by path KL"],
                num_time_groups=axes["layer_groups"],
            ),
        ],
        "objective": [
            p
            for objective in ("output", "path_kl")
            for fields in axes["objectives"][objective]
            for p in crosses(
                [fields],
                **{"activations.fit_to": [objective]},
                num_time_groups=few,
                method=[*linear, "spline"] if fields == {} else linear,
            )
        ],
        "transitions": crosses(axes["transitions"], **{"path_kl.what": ["parameters"]}),
        "markov": cross(
            activation_bits=[low],
            num_time_groups=axes["markov"]["num_time_groups"],
            **{"path_kl.markov_weight": axes["markov"]["weights"]},
        ),
        "ceiling": crosses(
            [{}], num_time_groups=axes["ceiling_groups"], **{"activations.fit_to": ["output", "path_kl"]}
        ),
    }


def _makes_sense(fields: dict[str, Any]) -> bool:
    """One time group has nothing to smooth and no start to choose."""
    return fields.get("num_time_groups", 1) > 1 or (fields.get("method") is None and fields.get("recipe") is None)

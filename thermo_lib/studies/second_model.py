"""What was measured of the second model and of time-aware norms: ``reports/witness.json``.

``python -m thermo_lib.studies.second_model`` measures what is missing in ``reports/witness_points.json`` and, of
time-aware norms of the reference model, in ``reports/norms_points.json``, one point after the other, and writes the
report. A run that is stopped goes on where it was.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from thermo_lib.evaluation.report import versions
from thermo_lib.evaluation.smoothing import CLAIMED, target_row
from thermo_lib.evaluation.statistics import mean_interval
from thermo_lib.files.locks import locked
from thermo_lib.files.printing import to_its_end
from thermo_lib.files.reading import read_object
from thermo_lib.files.text import write_json
from thermo_lib.models.lm import DiffusionLM, load_model
from thermo_lib.pipeline.parts import SmoothingMethod
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.studies.grid import Grid, Inputs, Point, PointRow
from thermo_lib.studies.peers import WITNESS_REPORT, PeerRow, read_earlier
from thermo_lib.studies.smoothing import gain, path_kl_change, verdicts
from thermo_lib.studies.variance import FACTORS, variance_shares
from thermo_lib.studies.witness import (
    FIRST,
    METHODS,
    NORMS,
    NORMS_OF,
    PRECISIONS,
    SEEDS,
    TIMESTEPS,
    WHEEL,
    NormSetting,
    WitnessInputs,
    at_precision,
    fetch,
    method_points,
    norm_points,
    norms_plan,
    plan,
    public_accuracy,
    question_points,
)

POINTS = Path("reports/witness_points.json")
NORMS_POINTS = Path("reports/norms_points.json")
REPORT = Path("reports/witness.json")
COLUMNS = {
    "method": ("method", "{}"),
    "bpw": ("bits_per_weight", "{:.3f}"),
    "A": ("activation_bits", "{}"),
    "seeds": ("seeds", "{}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "95 %": ("accuracy_ci", "{0[0]:.3f}..{0[1]:.3f}"),
    "path KL": ("path_kl", "{:.1f}"),
    "path KL, 95 %": ("path_kl_ci", "{0[0]:.1f}..{0[1]:.1f}"),
    "of seeds": ("path_kl_of_seeds", "{0[0]:.1f}..{0[1]:.1f}"),
    "gain": ("gain", "{:+z.1%}"),
    "change": ("change", "{:+z.2f}"),
    "change, 95 %": ("change_ci", "{0[0]:+z.2f}..{0[1]:+z.2f}"),
}
BOTH_COLUMNS = {
    "method": ("method", "{}"),
    "reference": ("reference", "{:.1f}"),
    "witness": ("witness", "{:.1f}"),
    "reference, share": ("reference_share", "{:.3f}"),
    "witness, share": ("witness_share", "{:.3f}"),
}
PUBLIC_COLUMNS = {name: COLUMNS[name] for name in ("method", "accuracy", "95 %")}
NORM_COLUMNS = {
    "model": ("model", "{}"),
    "weights": ("quantizer", "{}"),
    "sets": ("count", "{}"),
    "smoothing": ("smoothing", "{}"),
    "seeds": ("seeds", "{}"),
    "bpw": ("bits_per_weight", "{:.3f}"),
    "accuracy": ("accuracy", "{:.4f}"),
    "path KL": ("path_kl", "{:.2f}"),
    "change": ("change", "{:+z.3f}"),
    "95 %": ("change_ci", "{0[0]:+z.3f}..{0[1]:+z.3f}"),
}
FULL = "full precision"
SMOOTHED: tuple[SmoothingMethod, ...] = ("linear", "sigmoid", "spline")  # norms with a target
# Methods that were measured on the reference model: what they are called in ``reports/peers.json``.
_ON_REFERENCE = {
    "round-to-nearest": ("round-to-nearest", "group 128"),
    "GPTQ": ("thermo_lib GPTQ", "group 128"),
    "trellis, even": ("thermo_lib trellis", "2 bits a column"),
    "trellis, spread": ("thermo_lib trellis", "spread bits"),
    "trellis, sequential": ("thermo_lib trellis", "spread bits, sequential"),
    "trellis, sequential, network": ("thermo_lib trellis", "all phases"),
}


def _complete(grid: Grid, bits: int | None) -> tuple[int, ...]:
    """The seeds with which everything was measured at one precision."""
    every = {seed: question_points(bits, (seed,)).values() for seed in SEEDS}
    return tuple(s for s, found in every.items() if all(p.key in grid.rows for points in found for p in points))


def _row(rows: Sequence[PointRow], method: str, activation_bits: int) -> dict[str, Any]:
    """A row of ``witness.json``: means over seeds, intervals over sequences, the least and the most of the seeds."""
    each = [row.path_kl for row in rows]
    accuracies, paths = (
        np.mean([getattr(row, name) for row in rows], axis=0)
        for name in ("accuracy_per_sequence", "path_kl_per_sequence")
    )
    return {
        "method": method,
        "bits_per_weight": rows[0].bits_per_weight,
        "activation_bits": activation_bits,
        "seeds": len(rows),
        "accuracy": float(accuracies.mean()),
        "accuracy_ci": list(mean_interval(accuracies)),
        "path_kl": float(paths.mean()),
        "path_kl_ci": list(mean_interval(paths)),
        "path_kl_of_seeds": [min(each), max(each)],
    }


def _of_same_seeds(grid: Grid) -> dict[str, list[Point]]:
    """The points of each method, of those seeds with which every calibrated method was measured that has any."""
    points = {name: [p for p in method_points(name) if p.key in grid.rows] for name in FIRST}
    calibrated = [found for found in points.values() if found and found[0].config.needs_calibration]
    common = set(SEEDS).intersection(*({p.calibration_seed for p in found} for found in calibrated))
    return {
        name: [p for p in found if p.calibration_seed in common or not p.config.needs_calibration]
        for name, found in points.items()
    }


def _peer(row: PeerRow, activation_bits: int) -> dict[str, Any]:
    """Another project's method as a row of ``witness.json``; 4-bit activations are in ranges of each token."""
    suffix = {16: "", 4: "_a4"}[activation_bits]
    scores = {f"{name}{ci}": row[f"{name}{suffix}{ci}"] for name in ("accuracy", "path_kl") for ci in ("", "_ci")}
    return {
        "method": f"{row['method']}, {row['setting']}",
        "bits_per_weight": row["bits_per_weight"],
        "activation_bits": activation_bits,
        "seeds": 1,
        **scores,
        "path_kl_of_seeds": [scores["path_kl"]] * 2,
    }


def _available(grid: Grid, points: Iterable[Point]) -> list[PointRow]:
    return [grid[p] for p in points if p.key in grid.rows]


def public_rows(
    lm: DiffusionLM, inputs: WitnessInputs, kept: Iterable[Mapping[str, Any]] = (), *, progress: bool = True
) -> Iterator[list[dict[str, Any]]]:
    """Accuracy on the two published sequences: of full precision, and of the methods that train nothing, seed 0.

    Args:
        lm: the model.
        inputs: what methods are calibrated on.
        kept: rows that were measured before.
        progress: show a bar.

    Yields:
        After each measurement, all rows that there are: ``method``, ``accuracy`` (0-1) and ``accuracy_ci``, a 95 %
        interval over the masks that are drawn.
    """
    rows = {row["method"]: dict(row) for row in kept}
    names = [FULL, *(name for name, fields in FIRST.items() if "training" not in fields)]
    missing = [name for name in names if name not in rows]
    calibration = inputs.calibration(lm, TIMESTEPS, SEEDS[0]) if missing else None
    for name in tqdm(missing, desc="public sequences", unit="model", disable=not progress):
        model = lm if name == FULL else quantize(lm, method_points(name)[0].config, calibration)
        found = public_accuracy(model).numpy()
        row = {"accuracy": float(found.mean()), "accuracy_ci": list(mean_interval(found))}
        rows[name] = {"method": name} | row
        yield [rows[name] for name in names if name in rows]


def report(
    grid: Grid,
    reference: Grid,
    variance: Mapping[str, Any],
    public: Sequence[Mapping[str, Any]],
    peers: Sequence[PeerRow] = (),
) -> dict[str, Any]:
    """The content of ``reports/witness.json``, of what has been measured.

    Args:
        grid: of the witness.
        reference: of time-aware norms of the reference model.
        variance: model to what ``variances`` returns.
        public: see ``public_rows``.
        peers: other projects' methods on the witness, rows of ``peers.score_all``.
    """
    rows, targets, norms = [], [], []
    for name, points in _of_same_seeds(grid).items():
        if found := _available(grid, points):
            rows.append(_row(found, name, 16))
    rows += [_peer(row, bits) for bits in (16, 4) for row in peers]
    for bits in sorted(PRECISIONS, key=lambda bits: -(bits or 16)):
        if seeds := _complete(grid, bits):
            question = {name: [grid[p] for p in points] for name, points in question_points(bits, seeds).items()}
            for name, found in question.items():
                rows.append(_row(found, f"GPTQ, {name}", bits or 16) | _against(question["one"], found))
            rough = at_precision(bits, time_groups={"count": 3, "smoothing": None})
            targets += verdicts(grid, rough, METHODS[1:], seeds)
    for model, measured in {"reference": reference, WHEEL: grid}.items():
        for weights in NORMS_OF:
            for setting in NORMS:
                norms += _norm_rows(measured, model, weights, *setting)
            for smoothing in SMOOTHED:
                targets += _norm_target(measured, model, weights, smoothing)
    return {
        "model": WHEEL,
        "versions": versions(),
        "seeds": list(SEEDS),
        "timesteps": TIMESTEPS,
        "rows": rows,
        "public": list(public),
        "targets": targets,
        "time_norms": norms,
        "variance": variance,
    }


def variances(lm: DiffusionLM, inputs: Inputs | WitnessInputs) -> dict[str, Any]:
    """Where the variance of activations' ranges lies, see ``variance_shares``.

    Returns:
        ``shares``: factor to its share with each seed; ``tokens``: layer to what time and token state explain of a
        token's range, mean over seeds.
    """
    found = [variance_shares(lm, inputs.calibration(lm, TIMESTEPS, seed)) for seed in SEEDS]
    layers = {
        layer: {factor: float(np.mean([one["tokens"][layer][factor] for one in found])) for factor in factors}
        for layer, factors in found[0]["tokens"].items()
    }
    return {"shares": {factor: [one["shares"][factor] for one in found] for factor in FACTORS}, "tokens": layers}


def _against(one: Sequence[PointRow], found: Sequence[PointRow]) -> dict[str, Any]:
    """What differs from one range or scale for all timesteps, relative accuracy and nats, paired by sequence."""
    if found == one:
        return {}
    gained, gained_ci = gain(found, one)
    change, change_ci = path_kl_change(found, one)
    return {"gain": gained, "gain_ci": list(gained_ci), "change": change, "change_ci": list(change_ci)}


def _norm_rows(
    grid: Grid, model: str, weights: str, count: int, smoothing: SmoothingMethod | None
) -> list[dict[str, Any]]:
    """A row of ``time_norms``, of the seeds that were measured; none without any."""
    found, twins = _norm_pairs(grid, weights, (count, smoothing), (1, None))
    if not found:
        return []
    change, change_ci = (0.0, (0.0, 0.0)) if count == 1 else path_kl_change(found, twins)
    return [
        {
            "model": model,
            "quantizer": weights,
            "activation_bits": 16,
            "count": count,
            "smoothing": smoothing,
            "seeds": len(found),
            "bits_per_weight": found[0].bits_per_weight,
            "accuracy": float(np.mean([row.accuracy for row in found])),
            "path_kl": float(np.mean([row.path_kl for row in found])),
            "change": change,
            "change_ci": list(change_ci),
        }
    ]


def _norm_target(grid: Grid, model: str, weights: str, smoothing: SmoothingMethod) -> list[dict[str, Any]]:
    """The earlier project's claim of accuracy about smoothed norms against as many sets that aren't smoothed."""
    smooth, rough = _norm_pairs(grid, weights, (3, smoothing), (3, None))
    if not smooth:
        return []
    value, ci = gain(smooth, rough)
    name = f"relative accuracy gain, norms of {weights} ({model})"
    return [target_row(name, smooth[0].point.config, smoothing, CLAIMED.accuracy_gain, value, ci)]


def _norm_pairs(
    grid: Grid, weights: str, setting: NormSetting, twin: NormSetting
) -> tuple[list[PointRow], list[PointRow]]:
    """The rows of two settings of time-aware norms, of the seeds with which both were measured."""
    pairs = zip(norm_points(weights, *setting), norm_points(weights, *twin), strict=True)
    both = [(grid[a], grid[b]) for a, b in pairs if a.key in grid.rows and b.key in grid.rows]
    return [a for a, _ in both], [b for _, b in both]


def both_models(
    peers: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], baseline: str
) -> list[dict[str, Any]]:
    """Path KL of the methods that were measured on both models, in nats and as a share of a baseline's.

    Args:
        peers: the rows of ``reports/peers.json``, of the reference model.
        rows: of ``reports/witness.json``.
        baseline: a method that was measured on both.
    """
    by_name = {(row["method"], row["setting"]): row["path_kl"] for row in peers}
    ours = {row["method"]: row["path_kl"] for row in rows if row["activation_bits"] == 16}
    names = _ON_REFERENCE | {", ".join(named): named for named in by_name}
    both = {m: (by_name[named], ours[m]) for m, named in names.items() if named in by_name and m in ours}
    if baseline not in both:
        raise ValueError(f"baseline: found {baseline!r}, allowed are {', '.join(map(repr, both))}")
    return [
        {
            "method": method,
            "reference": reference,
            "witness": witness,
            "reference_share": reference / both[baseline][0],
            "witness_share": witness / both[baseline][1],
        }
        for method, (reference, witness) in both.items()
    ]


@to_its_end
def main() -> None:
    """Measure what is missing, and write the report after each part of the plan; what it has already is kept."""
    with locked(REPORT):
        grid = Grid(POINTS, load_model(str(fetch())), WitnessInputs())
        reference = Grid(NORMS_POINTS, load_model("reference"))
        earlier = read_object(REPORT) if REPORT.is_file() else {}
        variance = earlier.get("variance") or {
            "reference": variances(reference.reference, Inputs(code_sequences=8, puzzles=4)),
            WHEEL: variances(grid.reference, WitnessInputs(calibration_sequences=4)),
        }
        public = earlier.get("public", [])
        peers = read_earlier(WITNESS_REPORT)["rows"] if WITNESS_REPORT.is_file() else []
        for rows in public_rows(grid.reference, WitnessInputs(), public):
            public = rows
            write_json(REPORT, report(grid, reference, variance, public, peers))
        work = [(grid, points) for points in plan()] + [(reference, points) for points in norms_plan()]
        for measured, points in work:
            measured.run(points)
            write_json(REPORT, report(grid, reference, variance, public, peers))


if __name__ == "__main__":
    sys.exit(main())

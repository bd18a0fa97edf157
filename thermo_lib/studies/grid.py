"""A grid of configurations on the reference model, resumable, every point with paired scores.

A point is a set of ``ThermoConfig`` fields and the seed of its calibration data. All points see the same evaluation
inputs, so any two can be compared sequence by sequence.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor
from tqdm import tqdm

from thermo_lib.diffusion.path_kl import path_kl
from thermo_lib.diffusion.states import Calibration, calibrate
from thermo_lib.evaluation.scores import Suite, accuracy_per_sequence, build_suite, markov, masked_token_scores
from thermo_lib.files.snapshots import digest
from thermo_lib.files.text import read_json, write_json
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.params import default
from thermo_lib.pipeline.activations import requantize_activations, resmooth, site_samples, smooth_each_layer
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import QuantizedLM
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.training import optimize_transitions
from thermo_lib.time_aware.groups import TimeGroups
from thermo_lib.time_aware.ranges import best_starts

Point = dict[str, Any]
Recipe = Literal["best starts", "best per layer", "best per layer by path KL"]
SEED, RECIPE = "calibration_seed", "recipe"


def point(seed: int = 0, method: str | None = None, recipe: Recipe | None = None, **fields: Any) -> Point:
    """A point of the grid: what ``study.base`` of ``params.yaml`` says, without smoothing, changed by ``fields``.

    Args:
        seed: seed of the calibration data.
        method: smoothing method, None for none.
        recipe: ``best starts`` puts the time groups where the activations change, ``best per layer`` lets every
            layer choose method and window on the calibration states for its output's error, ``best per layer by
            path KL`` for the model's path KL.
        fields: ``ThermoConfig`` fields.
    """
    config = ThermoConfig(
        **{
            **default("study.base"),
            "enable_boundary_smoothing": method is not None,
            "smoothing_method": method or "linear",
            **fields,
        }
    )
    return {SEED: seed, RECIPE: recipe, **config.model_dump()}


def key(point: Point) -> str:
    """A point as text; two points that mean the same have the same."""
    relevant = dict(point)
    windowed = point["smoothing_method"] != "spline"
    if windowed and point[RECIPE] is None:  # a window takes at most half of a group
        groups = TimeGroups(point["timesteps"], point["num_time_groups"], point["time_group_starts"])
        longest = max(stop - start for start, stop in groups.ranges)
        relevant["smoothing_window"] = min(point["smoothing_window"], longest // 2)
    if not point["enable_boundary_smoothing"] or point["num_time_groups"] == 1 or relevant["smoothing_window"] == 0:
        relevant |= {"enable_boundary_smoothing": False, "smoothing_method": None, "smoothing_window": None}
    if not windowed or (point[RECIPE] or "").startswith("best per layer"):
        relevant["smoothing_window"] = None
    if point["activation_bits"] == 16 or point["activation_ranges"] == "dynamic":
        for name in ("activation_group_size", "activation_token_states", "range_objective"):
            relevant[name] = None
    if point["activation_bits"] == 16:
        relevant["activation_clip"] = None
    if point["transitions"] == "none" or point["num_time_groups"] == 1:
        relevant["markov_weight"] = None
    return json.dumps(relevant, sort_keys=True)


@dataclass(frozen=True)
class Row:
    """The scores of one point.

    Attributes:
        point: what was measured.
        accuracy_per_sequence: each sequence's share of the masked-token accuracy; the mean is the accuracy.
        accuracy_per_timestep: masked-token accuracy at each timestep, 0-1.
        path_kl_per_sequence: nats.
        path_kl_per_timestep: nats per sequence.
        markov_score, mean_jump: None where nothing depends on the timestep.
        bits_per_weight: everything stored for the quantized layers.
    """

    point: Point
    accuracy_per_sequence: list[float]
    accuracy_per_timestep: list[float]
    path_kl_per_sequence: list[float]
    path_kl_per_timestep: list[float]
    markov_score: float | None
    mean_jump: float | None
    bits_per_weight: float

    @property
    def accuracy(self) -> float:
        """Masked-token accuracy, mean over timesteps, 0-1."""
        return float(np.mean(self.accuracy_per_sequence))

    @property
    def path_kl(self) -> float:
        """Nats per sequence."""
        return float(np.mean(self.path_kl_per_sequence))


def score(lm: DiffusionLM, point: Point, suite: Suite) -> Row:
    """Measure a model on a suite."""
    correct, masked, _ = masked_token_scores(lm, suite.held_out, suite.timesteps)
    path = path_kl(suite.reference, lm, suite.trajectories, suite.timesteps, reference_outputs=suite.reference_outputs)
    quantized = isinstance(lm, QuantizedLM)
    smoothness = markov(lm) if quantized else None

    def numbers(values: Tensor) -> list[float]:
        return values.double().round(decimals=6).tolist()

    return Row(
        point=point,
        accuracy_per_sequence=numbers(accuracy_per_sequence(correct, masked)),
        accuracy_per_timestep=numbers(correct.sum(0) / masked.sum(0)),
        path_kl_per_sequence=numbers(path.per_sequence.sum(1)),
        path_kl_per_timestep=numbers(path.per_timestep),
        markov_score=round(smoothness.score, 6) if smoothness else None,
        mean_jump=round(smoothness.mean_jump, 6) if smoothness else None,
        bits_per_weight=round(lm.bits_per_weight, 6) if quantized else 32.0,
    )


# Points are measured in this order, so that neighbours share calibration data, weights and ranges.
_SHARED = (
    "timesteps",
    SEED,
    "quantizer",
    "activation_bits",
    "transitions",
    "range_objective",
    "activation_ranges",
    "activation_group_size",
    "activation_token_states",
    RECIPE,
)
_ACTIVATIONS = (
    "activation_bits",
    "activation_ranges",
    "activation_group_size",
    "activation_token_states",
    "range_objective",
)


class Grid:
    """Measured points, kept in a JSON file that is rewritten whole after every point.

    Args:
        path: the file; points that it holds are not measured again.
        reference: the full-precision model.

    Attributes:
        rows: the points by key.
        current: whether they were measured on this model with the present parameters.
    """

    def __init__(self, path: str | Path, reference: DiffusionLM):
        self.path, self.reference = Path(path), reference
        self.made_of = {
            "weights": digest(reference.model.state_dict()),
            "evaluation": default("evaluation"),
            "ranges": default("ranges"),
            "transition": default("transition"),
            "calibration": default("calibration"),
            "quantizers": [default("quant.damping"), default("quant.ridge")],
        }
        self.rows: dict[str, Row] = {}
        self.current = True
        if self.path.is_file():
            content = read_json(self.path)
            self.current = content["made_of"] == self.made_of
            for row in content["rows"]:
                row["point"] = point() | row["point"]  # a field that is newer than the file had its default
            self.rows = {key(row["point"]): Row(**row) for row in content["rows"]}

    def save(self) -> None:
        """Write all rows; the earlier file stays whole until the new one is."""
        rows = [vars(self.rows[k]) for k in sorted(self.rows)]
        write_json(self.path, {"made_of": self.made_of, "rows": rows})

    def __getitem__(self, point: Point) -> Row:
        if key(point) not in self.rows:
            raise ValueError(f"{self.path}: the point {key(point)} has not been measured")
        return self.rows[key(point)]

    def run(self, points: Iterable[Point], *, progress: bool = True) -> None:
        """Measure the points that are missing.

        Raises:
            ValueError: the file holds points of another model or of other parameters.
        """
        if not self.current:
            raise ValueError(f"{self.path}: found points of other weights or parameters, delete it to start anew")
        missing = list({key(p): p for p in points if key(p) not in self.rows}.values())
        missing.sort(key=lambda p: (*(str(p[name]) for name in _SHARED), p["num_time_groups"], key(p)))
        models = _Models(self.reference)
        for p in tqdm(missing, desc="grid", unit="point", disable=not progress):
            suite = models.suite(p["timesteps"])
            self.rows[key(p)] = score(models.build(p), p, suite)
            self.save()


@dataclass
class _Models:
    """Builds the models of points; what neighbouring points share is made once."""

    reference: DiffusionLM
    made: dict[str, Any] = field(default_factory=dict)

    def _once(self, kind: str, what: Any, make: Callable[[], Any]) -> Any:
        if self.made.get(kind, (None,))[0] != what:
            self.made[kind] = (what, make())
        return self.made[kind][1]

    def suite(self, timesteps: int) -> Suite:
        return self._once("suite", timesteps, lambda: build_suite(self.reference, timesteps=timesteps))

    def calibration(self, p: Point) -> Calibration:
        make = lambda: calibrate(self.reference, timesteps=p["timesteps"], seed=p[SEED], progress=False)  # noqa: E731
        return self._once("calibration", (p["timesteps"], p[SEED]), make)

    def build(self, p: Point) -> QuantizedLM:
        if p["transitions"] != "none":
            start = self.build({**p, "transitions": "none"})
            return optimize_transitions(start, self.reference, self.calibration(p), what=p["transitions"])
        config = configuration(p)
        plain = {"enable_boundary_smoothing": False, "smoothing_method": "linear", "smoothing_window": 1}
        unsmoothed = config.model_dump() | plain
        weights_only = {"num_time_groups": 1, "time_group_starts": None}
        calibration = self.calibration(p)
        what = (p["timesteps"], p[SEED])

        def make(fields: dict[str, Any]) -> QuantizedLM:
            return quantize(self.reference, ThermoConfig(**fields), calibration)

        if config.activation_bits == 16:
            grouped = self._once("grouped", (*what, unsmoothed), lambda: make(unsmoothed))
            return resmooth(grouped, config.method, config.smoothing_window)
        base = unsmoothed | weights_only | {name: default("study.base")[name] for name in _ACTIVATIONS}
        weights = self._once("weights", (*what, base), lambda: make(base))

        def fit(fields: dict[str, Any]) -> QuantizedLM:
            changes = {name: value for name, value in fields.items() if value != weights.config.model_dump()[name]}
            return requantize_activations(weights, calibration, reference=self.reference, **changes)

        if p[RECIPE] == "best starts":
            starts = self._once(
                "starts",
                (*what, base, config.num_time_groups, config.activation_bits),
                lambda: self._starts(weights, calibration, config),
            )
            unsmoothed["time_group_starts"] = starts
        if config.range_objective != "activation" or config.activation_ranges == "dynamic":
            return fit(config.model_dump() | {"time_group_starts": unsmoothed["time_group_starts"]})
        ranges = self._once("ranges", (*what, unsmoothed), lambda: fit(unsmoothed))
        if p[RECIPE] in ("best per layer", "best per layer by path KL"):
            return smooth_each_layer(
                ranges,
                calibration,
                default("study.full.methods"),
                default("study.full.windows"),
                reference=self.reference if p[RECIPE].endswith("path KL") else None,
            )
        return resmooth(ranges, config.method, config.smoothing_window)

    @staticmethod
    def _starts(weights: QuantizedLM, calibration: Calibration, config: ThermoConfig) -> tuple[int, ...]:
        samples = [sample for _, sample in site_samples(weights, calibration)]
        return best_starts(samples, config.timesteps, config.num_time_groups, config.activation_bits)


def configuration(point: Point) -> ThermoConfig:
    """How the model of a point is quantized."""
    return ThermoConfig(**{name: value for name, value in point.items() if name not in (SEED, RECIPE)})

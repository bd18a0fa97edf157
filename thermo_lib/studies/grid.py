"""A grid of configurations on the reference model, resumable, every point with paired scores.

A point is a configuration and the seed of its calibration data. All points see the same evaluation inputs, so any two
can be compared sequence by sequence.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor
from tqdm import tqdm

from thermo_lib.diffusion.path_kl import path_kl
from thermo_lib.diffusion.states import Calibration, calibrate, calibration_batches
from thermo_lib.evaluation.scores import Suite, accuracy_per_sequence, build_suite, masked_token_scores
from thermo_lib.evaluation.summary import markov, stored_bits
from thermo_lib.files.locks import locked
from thermo_lib.files.reading import brief, field_of, is_number, read_report, shown
from thermo_lib.files.snapshots import digest
from thermo_lib.files.text import write_json
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.activations import requantize_activations, resmooth, shared_input_samples, smooth_each_layer
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import QuantizedLM
from thermo_lib.pipeline.parts import PathKL, SmoothingMethod, Static, TimeGrouping, TimeNorms
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.training import optimize_transitions, train_time_norms
from thermo_lib.quant.layers import keeping_weights
from thermo_lib.time_aware.ranges import best_starts

Recipe = Literal["best starts", "best per layer", "best per layer by path KL"]
RECIPE_METHODS: tuple[SmoothingMethod, ...] = ("linear", "cubic", "sigmoid")  # what a layer chooses from
RECIPE_WINDOWS = (1, 2, 3, 5)


@dataclass(frozen=True)
class Mix:
    """Which states a point is calibrated on where they aren't the grid's; None leaves what the grid has.

    Attributes:
        code_sequences, puzzles: see ``calibration_batches``.
        source: see ``calibrate``.
    """

    code_sequences: int | None = None
    puzzles: int | None = None
    source: Literal["forward", "trajectory"] | None = None

    def of(self, inputs: "Inputs") -> "Inputs":
        """A grid's inputs with what this names in the place of theirs."""
        return replace(inputs, **{name: value for name, value in vars(self).items() if value is not None})


MixName = Literal["mix.code_sequences", "mix.puzzles", "mix.source"]


@dataclass(frozen=True)
class Point:
    """A configuration on the grid.

    Attributes:
        config: how the model is quantized.
        calibration_seed: seed of the calibration data.
        mix: what it is calibrated on; None for what the grid has.
        recipe: ``best starts`` puts the time groups where the activations change, ``best per layer`` lets every layer
            choose method and window on the calibration states for its output's error, ``best per layer by path KL`` for
            the model's path KL.

    Raises:
        ValueError: a seed that isn't a whole number in 0..2^63 - 1, another recipe, or ``best starts`` without groups.
    """

    config: ThermoConfig
    calibration_seed: int = 0
    recipe: Recipe | None = None
    mix: Mix | None = None

    def __post_init__(self) -> None:
        if type(self.calibration_seed) is not int or not 0 <= self.calibration_seed < 2**63:
            found = f"found {self.calibration_seed!r:.80}"
            raise ValueError(f"calibration_seed: {found}, allowed are whole numbers in 0..{2**63 - 1}")
        if self.recipe not in (None, *get_args(Recipe)):
            allowed = f"allowed are {', '.join(get_args(Recipe))} and null"
            raise ValueError(f"recipe: found {self.recipe!r:.80}, {allowed}")
        if self.recipe == "best starts" and self.config.time_groups is None:
            raise ValueError("recipe: found 'best starts', expected time_groups, whose starts it chooses")

    @property
    def key(self) -> str:
        """A text that is equal for points that mean the same."""
        return json.dumps([self.config.digest(), self.calibration_seed, self.recipe, self.mix and vars(self.mix)])

    def to_dict(self) -> dict[str, Any]:
        """As the JSON file holds it."""
        mix = {} if self.mix is None else {"mix": vars(self.mix)}
        seeds = {"calibration_seed": self.calibration_seed, "recipe": self.recipe}
        return {"config": self.config.model_dump(mode="json"), **seeds, **mix}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Point":
        """The inverse of ``to_dict``.

        Raises:
            ValueError: a field that is missing or wrong.
        """
        for name in ("config", "calibration_seed", "recipe"):
            if name not in content:
                raise ValueError(f"{name}: found none, allowed is what a point has")
        if not isinstance(content["config"], dict):
            raise ValueError(f"config: found {content['config']!r:.80}, allowed is an object")
        mix = field_of(content, "mix", dict, "point", default={})
        if found := sorted(mix.keys() - Mix.__annotations__.keys()):
            raise ValueError(f"mix.{brief(found[0])}: unknown, allowed are {', '.join(get_args(MixName))}")
        return cls(
            ThermoConfig(**content["config"]),
            content["calibration_seed"],
            content["recipe"],
            Mix(**mix) if mix else None,
        )


def point(seed: int = 0, method: str | None = None, recipe: Recipe | None = None, **fields: Any) -> Point:
    """A point of the grid: the default configuration, changed by ``fields``, without smoothing unless it is asked for.

    Args:
        seed: seed of the calibration data.
        method: smoothing method, None for none.
        recipe: see ``Point``.
        fields: of ``ThermoConfig``, nested or flat, or dotted as in ``{"activations.fit_to": "output"}``; those of
            ``Mix`` as ``mix.puzzles`` and so on.

    Raises:
        ValueError: a wrong field, seed or recipe, or a method with one time group.
    """
    mix = {name.partition(".")[2]: fields.pop(name) for name in get_args(MixName) if name in fields}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "time_groups.window")  # the study asks for windows that are cut
        config = ThermoConfig(**fields)
        if config.time_groups is None and method is not None:
            raise ValueError(f"method: found {method!r}, allowed is None with one time group, which has no boundary")
        if config.time_groups is not None:
            window = fields.get("smoothing_window") if method not in (None, "spline") else None
            groups = config.time_groups
            settings: dict[str, Any] = {"smoothing": method, "window": window}  # the method is checked there
            config = config.replace(time_groups=TimeGrouping(count=groups.count, starts=groups.starts, **settings))
    return Point(config, seed, recipe, Mix(**mix) if mix else None)


def preset_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What ``point`` takes instead of ``preset=NAME`` and settings that differ from it; others stay as they are.

    Raises:
        ValueError: no such preset, or a wrong setting.
    """
    rest = dict(fields)
    if "preset" not in rest:
        return rest
    kept = ("method", "recipe", "smoothing_window", *get_args(MixName))
    own = {name: rest.pop(name) for name in kept if name in rest}
    config = ThermoConfig.preset(rest.pop("preset"), **rest)
    content = config.model_dump(mode="json", exclude={"seed"})  # ``point`` has one of the calibration data
    return {name: value for name, value in content.items() if value is not None} | own


@dataclass(frozen=True)
class PointRow:
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


_LISTS = ("accuracy_per_sequence", "accuracy_per_timestep", "path_kl_per_sequence", "path_kl_per_timestep")
_COLUMNS = {"point": dict, **dict.fromkeys(_LISTS, list), "bits_per_weight": float}


def _read_rows(path: Path) -> tuple[Any, dict[str, PointRow]]:
    """What the points of a file were measured on, and the points by key.

    Raises:
        ValueError: not the JSON of a grid; names the file, the row and the field.
    """
    content = read_report(path, rows=_COLUMNS)
    made_of = field_of(content, "made_of", dict, shown(path))
    rows: dict[str, PointRow] = {}
    for number, row in enumerate(content["rows"]):
        where = f"{shown(path)}: rows: row {number}"
        for name in ("markov_score", "mean_jump"):
            if row.get(name) is not None:
                field_of(row, name, float, where)
        for name in _LISTS:
            if not all(map(is_number, row[name])):
                raise ValueError(f"{where}: {name}: found {row[name]!r:.80}, allowed is a list of numbers")
        if found := sorted(row.keys() ^ PointRow.__annotations__.keys()):
            problem = "unknown" if found[0] in row else "missing"
            allowed = ", ".join(PointRow.__annotations__)
            raise ValueError(f"{where}: {brief(found[0])}: {problem}, allowed are {allowed}")
        try:
            read = PointRow(**row | {"point": Point.from_dict(row["point"])})
        except ValueError as error:
            raise ValueError(f"{where}: point: {error}") from error
        rows[read.point.key] = read
    return made_of, rows


def score(lm: DiffusionLM, point: Point, suite: Suite) -> PointRow:
    """Measure the model of a point on a suite."""
    return PointRow(point=point, **scores(lm, suite))


def scores(lm: DiffusionLM, suite: Suite) -> dict[str, Any]:
    """What a ``PointRow`` has beside its point."""
    quantized = lm if isinstance(lm, QuantizedLM) else None
    trajectories, outputs = suite.trajectories, suite.reference_outputs
    with keeping_weights(quantized.quantized_layers().values() if quantized else ()):
        correct, masked, _ = masked_token_scores(lm, suite.held_out, suite.timesteps)
        path = path_kl(suite.reference, lm, trajectories, suite.timesteps, reference_outputs=outputs)
    smoothness = markov(quantized) if quantized else None

    def numbers(values: Tensor) -> list[float]:
        return values.double().round(decimals=6).tolist()

    return {
        "accuracy_per_sequence": numbers(accuracy_per_sequence(correct, masked)),
        "accuracy_per_timestep": numbers(correct.sum(0) / masked.sum(0)),
        "path_kl_per_sequence": numbers(path.per_sequence.sum(1)),
        "path_kl_per_timestep": numbers(path.per_timestep),
        "markov_score": round(smoothness.score, 6) if smoothness else None,
        "mean_jump": round(smoothness.mean_jump, 6) if smoothness else None,
        "bits_per_weight": round(stored_bits(lm), 6),
    }


@dataclass(frozen=True)
class Inputs:
    """What every point of a grid is calibrated and evaluated on.

    Attributes:
        sequences, trajectories: see ``build_suite``.
        source: see ``calibrate``.
        code_sequences, puzzles: see ``calibration_batches``.
    """

    sequences: int = 40
    trajectories: int = 16
    source: Literal["forward", "trajectory"] = "trajectory"
    code_sequences: int = 32
    puzzles: int = 16

    def suite(self, reference: DiffusionLM, timesteps: int) -> Suite:
        """What points are evaluated on."""
        return build_suite(
            reference, timesteps=timesteps, sequences=self.sequences, trajectories=self.trajectories, sudoku=0
        )

    def calibration(self, reference: DiffusionLM, timesteps: int, seed: int) -> Calibration:
        """What points of a seed are calibrated on."""
        size = {"sequences": self.code_sequences, "puzzles": self.puzzles}
        batches = [pair for pair in calibration_batches(reference, seed, **size) if len(pair[0])]
        return calibrate(reference, batches, timesteps=timesteps, source=self.source, seed=seed, progress=False)


class Grid:
    """Measured points, kept in a JSON file that is rewritten whole after every point.

    Args:
        path: the file; points that it holds are not measured again.
        reference: the full-precision model.
        inputs: what the points are calibrated and evaluated on: an ``Inputs``, or another dataclass with its methods.

    Attributes:
        rows: the points by key.
        measured: keys of those that were measured here, in this order.
        current: whether they were measured on this model with these inputs.

    Raises:
        ValueError: the file is damaged, or holds something else; names the row and the field.
    """

    def __init__(self, path: str | Path, reference: DiffusionLM, inputs: Any = Inputs()):
        self.path, self.reference, self.inputs = Path(path), reference, inputs
        self._models = _Models(self.reference, self.inputs)
        about = {"weights": digest(reference.model.state_dict()), "inputs": asdict(inputs)}
        self.made_of = json.loads(json.dumps(about))  # as the file has it
        self.rows: dict[str, PointRow] = {}
        self.measured: list[str] = []
        self.current = True
        self._read()

    def _read(self) -> None:
        """Take over the points in the file; those that are known stay as they are."""
        if self.path.is_file():
            made_of, found = _read_rows(self.path)
            self.current = made_of == self.made_of
            self.rows = found | self.rows

    def save(self) -> None:
        """Write all rows, with those that others have written meanwhile; the earlier file stays whole until then.

        Raises:
            ValueError: the file holds points of another model or of other inputs.
            OSError: no space left, or no right to write.
        """
        with locked(self.path, wait=True):
            self._read()
            self._check()
            rows = [vars(self.rows[key]) | {"point": self.rows[key].point.to_dict()} for key in sorted(self.rows)]
            write_json(self.path, {"made_of": self.made_of, "rows": rows})

    def _check(self) -> None:
        if not self.current:
            raise ValueError(f"{self.path}: found points of other weights or inputs, delete it to start anew")

    def __getitem__(self, point: Point) -> PointRow:
        if point.key not in self.rows:
            raise ValueError(f"{self.path}: the point {json.dumps(point.to_dict())} has not been measured")
        return self.rows[point.key]

    def run(self, points: Iterable[Point], *, progress: bool = True) -> None:
        """Measure the points that are missing; another run may measure points into the same file meanwhile.

        Raises:
            ValueError: the file holds points of another model or of other inputs.
            OSError: no space left, or no right to write; ``rows`` has what was measured.
        """
        self._check()
        missing = list({p.key: p for p in points if p.key not in self.rows}.values())
        if missing:
            self.save()  # finds out before the work whether that can be done
        missing.sort(key=_shared)
        models = self._models
        for p in tqdm(missing, desc="grid", unit="point", disable=not (progress and missing)):
            if p.key not in self.rows:
                suite = models.suite(p.config.timesteps)
                self.rows[p.key] = score(models.build(p), p, suite)
                self.measured.append(p.key)
                self.save()


def _shared(point: Point) -> tuple[str, ...]:
    """Sorts points so that neighbours share calibration data, weights and ranges."""
    config = point.config.model_dump(mode="json")
    parts = (config[name] for name in ("timesteps", "weights", "training", "activations"))
    data = str(point.mix), str(point.calibration_seed)
    return (*map(json.dumps, parts), *data, str(point.recipe), json.dumps(config["time_groups"]))


@dataclass
class _Models:
    """Builds the models of points; what neighbouring points share is made once."""

    reference: DiffusionLM
    inputs: Inputs = Inputs()
    made: dict[str, Any] = field(default_factory=dict)

    def _once(self, kind: str, what: Any, make: Callable[[], Any]) -> Any:
        if self.made.get(kind, (None,))[0] != what:
            self.made[kind] = (what, make())
        return self.made[kind][1]

    def suite(self, timesteps: int) -> Suite:
        """See ``Inputs``."""
        return self._once("suite", timesteps, lambda: self.inputs.suite(self.reference, timesteps))

    def calibration(self, p: Point) -> Calibration:
        """See ``Inputs``."""
        inputs = self.inputs if p.mix is None else p.mix.of(self.inputs)
        about = p.config.timesteps, p.calibration_seed
        return self._once("calibration", (inputs, about), lambda: inputs.calibration(self.reference, *about))

    def build(self, p: Point) -> QuantizedLM:
        """The model of a point."""
        last = p.config.training[-1] if p.config.training else None
        if isinstance(last, PathKL | TimeNorms):
            *before, phase = p.config.training
            config = p.config.replace(
                training=tuple(before), time_groups=p.config.time_groups and p.config.time_groups.model_copy()
            )
            start = self.build(replace(p, config=config))
            train = optimize_transitions if isinstance(phase, PathKL) else train_time_norms
            return train(start, self.reference, self.calibration(p), **phase.model_dump(exclude={"phase"}))
        calibration, groups = self.calibration(p), p.config.time_groups
        unsmoothed = p.config.replace(enable_boundary_smoothing=False) if groups else p.config
        seed = p.calibration_seed, p.mix

        def make(config: ThermoConfig) -> QuantizedLM:
            return quantize(self.reference, config, calibration)

        if p.config.activations is None:
            plain = self._once("grouped" if groups else "weights", (seed, unsmoothed), lambda: make(unsmoothed))
            return resmooth(plain, p.config.smoothing_method, p.config.smoothing_window)
        base = p.config.replace(activations=None, time_groups=None)
        weights = self._once("weights", (seed, base), lambda: make(base))

        def fit(config: ThermoConfig) -> QuantizedLM:
            changes: dict[str, Any] = {"activations": config.activations, "time_groups": config.time_groups}
            return requantize_activations(weights, calibration, reference=self.reference, **changes)

        if p.recipe == "best starts":
            assert groups is not None  # or there is no such point
            count = groups.count
            about = (seed, base, count, p.config.activation_bits)
            starts = self._once("starts", about, lambda: self._starts(weights, calibration, p.config, count))
            unsmoothed = unsmoothed.replace(time_groups={"starts": starts})
        if not isinstance(p.config.activations, Static) or p.config.activations.fit_to != "activation":
            rough = unsmoothed.time_groups
            grouping = groups and rough and groups.model_copy(update={"starts": rough.starts})
            return fit(p.config.replace(time_groups=grouping))
        ranges = self._once("ranges", (seed, unsmoothed), lambda: fit(unsmoothed))
        if p.recipe in ("best per layer", "best per layer by path KL"):
            reference = self.reference if p.recipe.endswith("path KL") else None
            return smooth_each_layer(ranges, calibration, RECIPE_METHODS, RECIPE_WINDOWS, reference=reference)
        return resmooth(ranges, p.config.smoothing_method, p.config.smoothing_window)

    @staticmethod
    def _starts(weights: QuantizedLM, calibration: Calibration, config: ThermoConfig, count: int) -> tuple[int, ...]:
        samples = [sample for _, sample in shared_input_samples(weights, calibration)]
        return best_starts(samples, config.timesteps, count, config.activation_bits)

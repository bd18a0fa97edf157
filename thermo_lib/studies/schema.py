"""What ``params.yaml`` may hold: every key, the kind of its value, and its bounds."""

import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from thermo_lib.diffusion.tokens import SAMPLERS
from thermo_lib.files.reading import brief
from thermo_lib.files.schema import Section, Where, errors, in_words, place_of
from thermo_lib.pipeline.flat import is_single, nearest
from thermo_lib.pipeline.parts import SmoothingMethod
from thermo_lib.studies.grid import MixName

_MOST = 2**20
Count = Annotated[int, Field(ge=1, le=_MOST)]
Length = Annotated[int, Field(ge=1, le=2**16)]
Window = Annotated[int, Field(ge=1, le=20)]
Seed = Annotated[int, Field(ge=0, le=10**12)]  # a million times as large, it still seeds a generator
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Finite, Field(gt=0)]
Share = Annotated[Finite, Field(ge=0, le=1)]
Bits = Literal[8, 7, 6, 5, 4, 3, 2]
InputBits = Literal[16, 8, 7, 6, 5, 4, 3, 2]
Quantizer = Literal["rtn", "least_squares", "gptq", "trellis"]
if TYPE_CHECKING:  # a list that is read while the program runs is no type
    Sampler = str
else:
    Sampler = Literal[SAMPLERS]


def _whole(value: Any) -> Any:
    if isinstance(value, bool | float):  # for a literal 8.0 and True are whole numbers
        raise ValueError("a whole number")
    return value


def _setting(name: str) -> str:
    if not (is_single(name) or name in ("embedding_bits", "timesteps", "method", "recipe")):
        raise ValueError("settings of ThermoConfig, method and recipe")
    return name


def _scalar(value: Any) -> Any:
    if isinstance(value, list | dict):
        raise ValueError("a number, true, false, null or a word")
    return value


Mix = dict[MixName, Annotated[int, Field(ge=0, le=_MOST)] | Literal["forward", "trajectory"]]
Settings = dict[Annotated[str, AfterValidator(_setting)], Annotated[Any, AfterValidator(_scalar)]]
Text = Annotated[str, Field(min_length=1)]


class Data(Section):
    """``data``: of the reference model's training."""

    packages: dict[Text, Text] = Field(min_length=1)
    vocab_size: Annotated[int, Field(ge=300, le=_MOST)]
    sequence_length: Length
    task_length: Length


class Train(Section):
    """``train``: the reference model and its training."""

    hidden_size: Length
    intermediate_size: Length
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)]
    num_attention_heads: Length
    steps: Annotated[int, Field(ge=1, le=10**9)]
    cycles: Count
    decay_steps: Count
    warmup_steps: Count
    muon_lr: Positive
    adamw_lr: Positive
    weight_decay: Annotated[Finite, Field(ge=0)]
    code_batch: Length
    sudoku_batch: Length
    countdown_batch: Length
    checkpoint_every: Count

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.hidden_size % (2 * self.num_attention_heads):
            allowed = f"allowed is a multiple of twice num_attention_heads ({self.num_attention_heads})"
            raise ValueError(f"hidden_size: found {self.hidden_size}, {allowed}")
        if self.steps % self.cycles:
            raise ValueError(f"steps: found {self.steps}, allowed is a multiple of cycles ({self.cycles})")
        return self


class Quant(Section):
    """``quant``: the configuration of the notebooks."""

    bit_width: Annotated[Literal[2, 4, 8], BeforeValidator(_whole)]
    group_size: Count
    timesteps: Length
    num_time_groups: Length
    smoothing_window: Window

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.num_time_groups > self.timesteps:
            allowed = f"allowed is at most timesteps ({self.timesteps})"
            raise ValueError(f"num_time_groups: found {self.num_time_groups}, {allowed}")
        return self


class Calibration(Section):
    """``calibration``: see ``calibration_batches``."""

    source: Literal["forward", "trajectory"]
    sequences: Count
    puzzles: Count


class Evaluation(Section):
    """``evaluation``: see ``build_suite``."""

    sequences: Count
    trajectories: Count
    sudoku: Annotated[int, Field(ge=0, le=_MOST)]
    sampler: Sampler
    temperature: Annotated[Finite, Field(ge=0, le=1000)]
    resamples: Count


class Reference(Section):
    """``reference``: puzzles that the reference model is scored on."""

    sudoku: Count
    countdown: Count


class Overhead(Section):
    """``overhead``: see ``smoothing_overhead``."""

    rounds: Annotated[int, Field(ge=2, le=10_000)]
    sequences: Count


class Targets(Section):
    """``targets``: see ``evaluation.smoothing.Targets``."""

    accuracy_gain: Finite
    markov_score: Finite
    jump_cut: Finite
    overhead: Finite


class Peers(Section):
    """``peers``: the goals of the comparison with other methods."""

    bits: Positive
    accuracy_kept: Positive
    accuracy_kept_a4: Positive
    share: Positive
    seconds: Positive


class Smoothing(Section):
    """``smoothing``: what its notebook compares."""

    activation_bits: list[Annotated[InputBits, BeforeValidator(_whole)]] = Field(min_length=1)
    overhead_bits: list[Annotated[InputBits, BeforeValidator(_whole)]] = Field(min_length=1)
    methods: list[SmoothingMethod] = Field(min_length=1)


class Steps(Section):
    """An entry of ``study.*.timesteps``."""

    steps: Length
    seeds: list[Seed] = Field(min_length=1)


class Objectives(Section):
    """``study.*.objectives``."""

    output: list[Settings]
    path_kl: list[Settings]


class Markov(Section):
    """``study.*.markov``."""

    num_time_groups: list[Length]
    weights: list[Annotated[Finite, Field(ge=0)]]


class Axes(Section):
    """``study.full`` and ``study.reduced``: see ``studies.smoothing.slices``."""

    seeds: list[Seed] = Field(min_length=1)
    side_seeds: list[Seed]
    low_bits: Annotated[Bits, BeforeValidator(_whole)]
    activation_bits: list[Annotated[InputBits, BeforeValidator(_whole)]]
    num_time_groups: list[Length]
    few_groups: list[Length]
    methods: list[SmoothingMethod]
    windows: list[Window]
    timesteps: list[Steps]
    quantizers: list[Quantizer]
    wide_windows: list[Window]
    mixes: list[Mix]
    granularities: list[Settings]
    recipe_groups: list[Length]
    layer_groups: list[Length]
    objectives: Objectives
    ceiling_groups: list[Length]
    transitions: list[Settings]
    markov: Markov


class Study(Section):
    """``study``: what the pipeline measures again, and what is measured once."""

    reduced: Axes
    full: Axes


class Params(Section):
    """The whole file."""

    seed: Seed
    data: Data
    train: Train
    quant: Quant
    calibration: Calibration
    evaluation: Evaluation
    reference: Reference
    overhead: Overhead
    targets: Targets
    peers: Peers
    smoothing: Smoothing
    study: Study


def problems(content: Mapping[str, Any]) -> list[tuple[Where, str]]:
    """What is wrong with the file's content: the place of each wrong value, and a message on one line."""
    return [(place_of(each), _in_words(each)) for each in errors(Params, content)]


def _in_words(error: Mapping[str, Any]) -> str:
    if error["type"] != "extra_forbidden":
        return in_words(error)
    place = place_of(error)
    field, allowed = brief(".".join(map(str, place))), _keys(place[:-1])
    return f"{field}: found it, allowed are {', '.join(allowed)}{nearest(str(place[-1]), allowed)}"


def _keys(place: Where) -> list[str]:
    """The keys of the section at a place."""
    owner: Any = Params
    for part in place:
        if isinstance(part, str) and isinstance(owner, type) and issubclass(owner, BaseModel):
            owner = owner.model_fields[part].annotation
        elif typing.get_origin(owner) is list:
            (owner,) = typing.get_args(owner)
    return list(owner.model_fields)

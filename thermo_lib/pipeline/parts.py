"""The parts of a configuration: how weights and activations are coded, time groups, and phases of training.

Each part holds the settings of its own method only, so that a setting without meaning can't be written.
"""

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from thermo_lib.files.reading import brief
from thermo_lib.pipeline.flat import FLAT, nearest
from thermo_lib.pipeline.scalars import (
    KINDS,
    ActivationBits,
    Count,
    Flag,
    Number,
    Rate,
    Share,
    WeightBits,
    Whole,
)
from thermo_lib.quant.trellis import MOST_BITS
from thermo_lib.time_aware.groups import TimeGroups
from thermo_lib.time_aware.smoothing import WINDOWED

SmoothingMethod = Literal["linear", "cubic", "sigmoid", "spline"]
StateSource = Literal["calibration", "fresh"]
TokenWeights = Literal["uniform", "path_kl"]


class _Part(BaseModel):
    """A part of a configuration; what isn't given is filled in and so is saved with the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any):
        with OneLine(type(self)):
            super().__init__(**fields)

    def _fill(self, **defaults: Any) -> None:
        """Give values to fields that are None; unlike fields that were given, these follow what they depend on."""
        self.__dict__.update({name: value for name, value in defaults.items() if getattr(self, name) is None})

    def _refuse(self, because: str, **allowed: Any) -> None:
        """Raise ValueError for a field that has another value than the only one with a meaning."""
        for name, value in allowed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}: found {getattr(self, name)!r:.80}, allowed is {value!r} with {because}")


class RoundToNearest(_Part):
    """Round each weight to the nearest code in its group's min-max range; needs no data.

    Attributes:
        bits: number of bits of a code.
        group_size: number of neighbours in a row that share scale and zero point; None for the whole row.
    """

    method: Literal["rtn"] = "rtn"
    bits: WeightBits = 2
    group_size: Count | None = 128


class LeastSquares(_Part):
    """Fit each group's scale and zero point for least squared weight error; needs no data.

    Attributes:
        bits, group_size: see ``RoundToNearest``.
    """

    method: Literal["least_squares"] = "least_squares"
    bits: WeightBits = 2
    group_size: Count | None = 128


class GPTQ(_Part):
    """GPTQ (arXiv 2210.17323), its scales and zero points refitted to the finished codes; needs calibration.

    Attributes:
        bits, group_size: see ``RoundToNearest``.
        token_weights: ``uniform`` counts all tokens the same, ``path_kl`` by what an error there costs in path KL, see
            ``transition.loss.token_importance``.
        damping: share of the Hessian's mean diagonal that is added to its diagonal.
        ridge: how strongly the refit pulls towards the parameters it starts from, as a share of its system's diagonal.
    """

    method: Literal["gptq"] = "gptq"
    bits: WeightBits = 2
    group_size: Count | None = 128
    token_weights: TokenWeights = "uniform"
    damping: Number = Field(default=0.01, ge=0)
    ridge: Number = Field(default=0.001, ge=0)


class Trellis(_Part):
    """Trellis-coded weights, see ``quant.trellis``; needs calibration.

    Attributes:
        bits: mean number of bits of a code, 1 to 6; a whole number unless they are spread.
        spread: give each column as many bits as it is worth, instead of the same number to all.
        group_size: number of neighbours in a row that share a scale; None for the whole row.
        token_weights, damping: see ``GPTQ``.
        beam: number of partial rows that the search keeps at each column.
    """

    method: Literal["trellis"] = "trellis"
    bits: Number = Field(default=2.17, ge=1, le=MOST_BITS)
    spread: Flag = True
    group_size: Count | None = None
    token_weights: TokenWeights = "path_kl"
    damping: Number = Field(default=0.01, ge=0)
    beam: Count = 64

    @model_validator(mode="after")
    def _whole_bits(self) -> Self:
        if not self.spread and self.bits % 1:
            raise ValueError(f"bits: found {self.bits}, allowed are whole numbers with spread=False")
        return self


class Static(_Part):
    """Activations in ranges that are fitted on calibration states.

    Attributes:
        bits: number of bits of an activation code.
        group_size: number of neighbouring input channels that share a range; None for all of them.
        by_token_state: fit one range for masked and one for unmasked tokens.
        fit_to: what the ranges are fitted to: the ``activation``'s squared error (each time group for itself), the
            squared error of the layers' ``output``, or the model's ``path_kl`` (both after smoothing).
        tokens: number of tokens that are sampled of each timestep and part of the calibration.
        steps, batch, lr: of the descent for ``output`` (150 steps of 1024 tokens, 0.01) and ``path_kl`` (150 steps of
            8 states, 0.03); None for ``activation``, which is a search.
    """

    ranges: Literal["static"] = "static"
    bits: ActivationBits = 8
    group_size: Count | None = None
    by_token_state: Flag = False
    fit_to: Literal["activation", "output", "path_kl"] = "activation"
    tokens: Count = 128
    steps: Count | None = None
    batch: Count | None = None
    lr: Rate | None = None

    @model_validator(mode="after")
    def _descent(self) -> Self:
        if self.fit_to == "activation":
            self._refuse("fit_to='activation'", steps=None, batch=None, lr=None)
        elif self.fit_to == "output":
            self._fill(steps=150, batch=1024, lr=0.01)
        else:
            self._fill(steps=150, batch=8, lr=0.03)
        return self


class Dynamic(_Part):
    """Activations in the min-max range of each token; nothing is stored or fitted.

    Attributes:
        bits: number of bits of an activation code.
        clip: how far the range reaches, as a share of the way from zero to the token's extremes; what lies beyond is
            clipped (to 0.9 of it in QuaRot, arXiv 2404.00456).
    """

    ranges: Literal["dynamic"] = "dynamic"
    bits: ActivationBits = 8
    clip: Number = Field(default=1.0, gt=0, le=1)


class _Grouping(_Part):
    """Groups of neighbouring timesteps, see ``TimeGrouping``."""

    count: Count = 3
    starts: tuple[Whole, ...] | None = None
    smoothing: SmoothingMethod | None = "linear"
    window: Annotated[Whole, Field(ge=1, le=20)] | None = None

    @model_validator(mode="after")
    def _window_has_meaning(self) -> Self:
        if self.count == 1:
            if "smoothing" not in self.model_fields_set:
                self.__dict__["smoothing"] = None
            self._refuse("count=1, which has no boundary", smoothing=None, window=None)
        if self.smoothing not in WINDOWED:
            self._refuse(f"smoothing={self.smoothing!r}", window=None)
        return self

    def over(self, timesteps: int) -> TimeGroups:
        """The groups of ``timesteps`` timesteps; raises ValueError where they don't fit."""
        return TimeGroups(timesteps, self.count, self.starts)

    def acting_window(self, timesteps: int) -> int | None:
        """The window that acts: a window takes at most half of a group. None without a windowed method."""
        if self.smoothing not in WINDOWED:
            return None
        longest = max(stop - start for start, stop in self.over(timesteps).intervals)
        return min(5 if self.window is None else self.window, longest // 2)

    def acting(self, timesteps: int, name: str) -> Self:
        """The same with the window that acts, and no smoothing where every group is a single timestep.

        Args:
            timesteps: ``T``.
            name: of the part, for the warning about a window that is cut.

        Raises:
            ValueError: groups that don't fit.
        """
        acting = self.acting_window(timesteps)
        if self.window is not None and self.window != acting:
            used = f"used is {acting}: a window takes at most half of a group"
            warnings.warn(f"{name}.window: found {self.window}, {used}", stacklevel=6)
        if acting == 0:  # nothing is left to smooth
            return self.model_copy(update={"smoothing": None, "window": None})
        if self.window == acting:
            return self
        stored = self.model_copy()
        stored.__dict__["window"] = acting
        return stored


class TimeGrouping(_Grouping):
    """Groups of neighbouring timesteps with parameters of their own, perhaps smoothed across their boundaries.

    The groups hold static activation ranges, or where activations aren't quantized the weights' scales and zero points.

    Attributes:
        count: number of groups, at least 2.
        starts: the first timestep of every group but the first; None for groups of equal width.
        smoothing: ``linear``, ``cubic``, ``sigmoid``, ``spline`` (over all timesteps, without a window) or None.
        window: number of timesteps smoothed on each side of a boundary, 1-20, at most half of the longest group. It is
            stored as the one that acts: a longer one is cut, with a warning, and where none is given it is 5.
    """

    count: Whole = Field(default=3, ge=2)


class _Phase(_Part):
    """A phase of training on calibration states, or on fresh ones that the full-precision model makes itself.

    Attributes:
        states: ``calibration`` or ``fresh``.
        num_texts, num_prompts: number of fresh sequences that start from nothing, and from prompts; None for
            calibration states.
    """

    states: StateSource = "calibration"
    num_texts: Count | None = None
    num_prompts: Annotated[Whole, Field(ge=0)] | None = None
    scale_lr: Rate = 0.005
    zero_point_lr: Rate = 0.01

    def _fill_states(self, num_texts: int, num_prompts: int) -> None:
        if self.states == "fresh":
            self._fill(num_texts=num_texts, num_prompts=num_prompts)
        else:
            self._refuse("states='calibration'", num_texts=None, num_prompts=None)


class _OnPathKL(_Phase):
    """A phase that trains the whole model at once for least path KL.

    Attributes:
        states, num_texts, num_prompts: see ``_Phase``; fresh states are those of as many chains, a step of each at a
            time.
        steps: Adam steps: 300 on calibration states, 900 on fresh ones.
        batch: calibration states a step, 8; None for fresh ones.
        own_share: share of the fresh texts that follow the quantized model, as it is then, instead of the
            full-precision one.
        scale_lr, zero_point_lr, range_lr, network_lr: learning rates at the start, which fall to zero.
    """

    steps: Count | None = None
    batch: Count | None = None
    own_share: Share = 0.0
    range_lr: Rate = 0.03
    network_lr: Rate = 0.0003

    @model_validator(mode="after")
    def _defaults(self) -> Self:
        self._fill_states(num_texts=8, num_prompts=4)
        if self.states == "fresh":
            self._refuse("states='fresh'", batch=None)
            self._fill(steps=900)
        else:
            self._refuse("states='calibration'", own_share=0.0)
            self._fill(steps=300, batch=8)
        return self


class Sequential(_Phase):
    """Quantize the linears one after the other, each time training the rest of the block for the block's output.

    Attributes:
        states, num_texts, num_prompts: see ``_Phase``.
        steps, batch: Adam steps after each set of linears with the same input, and states a step.
        scale_lr, zero_point_lr, weight_lr: learning rates at the start, which fall to zero.
    """

    phase: Literal["sequential"] = "sequential"
    steps: Count = 50
    batch: Count = 16
    weight_lr: Rate = 0.0003

    @model_validator(mode="after")
    def _defaults(self) -> Self:
        self._fill_states(num_texts=64, num_prompts=32)
        return self


class Blocks(_Phase):
    """Train the scales, zero points and codes of each block for the block's output (BRECQ, arXiv 2102.05426).

    Attributes:
        states, num_texts, num_prompts: see ``_Phase``.
        steps, batch: Adam steps for each block, and states a step.
        scale_lr, zero_point_lr, code_lr: learning rates at the start, which fall to zero.
    """

    phase: Literal["blocks"] = "blocks"
    steps: Count = 300
    batch: Count = 16
    code_lr: Rate = 0.005

    @model_validator(mode="after")
    def _defaults(self) -> Self:
        self._fill_states(num_texts=128, num_prompts=64)
        return self


class PathKL(_OnPathKL):
    """Train all layers together for least path KL, once everything is quantized.

    Attributes:
        what: the ``parameters`` (weights' scales and zero points, static activation ranges), the weights' ``codes``
            too, or with the parameters the rest of the ``network`` that isn't quantized (norms, biases, embeddings,
            head).
        states, num_texts, num_prompts, steps, batch, own_share: see ``_OnPathKL``.
        markov_weight: weight of the Markov term, the squared steps of static ranges from group to group, in nats.
        scale_lr, zero_point_lr, code_lr, range_lr, network_lr: learning rates at the start, which fall to zero.
    """

    phase: Literal["path_kl"] = "path_kl"
    what: Literal["parameters", "codes", "network"] = "parameters"
    markov_weight: Number = Field(default=0.0, ge=0)
    code_lr: Rate = 0.01


class TimeNorms(_OnPathKL, _Grouping):
    """Give every norm a set of weights (and biases) for each time group, and train them for least path KL.

    The sets are smoothed across the boundaries between groups, and stored before smoothing. The linears' codes stay.
    ``TimeNorms(count=1)`` is one set, trained in the same way: what the others are compared with.

    Attributes:
        count: number of time groups, from 1 to the number of timesteps.
        starts, smoothing, window: see ``TimeGrouping``; none of them with one group.
        what: train the ``norms`` alone, or with them the rest of the ``network``: what
            ``PathKL(what="network")`` trains.
        states, num_texts, num_prompts, steps, batch, own_share: see ``_OnPathKL``.
        norm_lr: learning rate of the norms at the start; with several groups of what they share.
        group_lr: that of what each group deviates by, 0.0003; None with one group.
        scale_lr, zero_point_lr, range_lr, network_lr: those of the rest with ``what="network"``; all fall to zero.
    """

    phase: Literal["time_norms"] = "time_norms"
    what: Literal["norms", "network"] = "norms"
    norm_lr: Rate = 0.003
    group_lr: Rate | None = None

    @model_validator(mode="after")
    def _groups_deviate(self) -> Self:
        if self.count == 1:
            self._refuse("count=1, which deviates from nothing", group_lr=None)
        self._fill(group_lr=None if self.count == 1 else 0.0003)
        return self


Weights = Annotated[RoundToNearest | LeastSquares | GPTQ | Trellis, Field(discriminator="method")]
Activations = Annotated[Static | Dynamic, Field(discriminator="ranges")]
Phase = Annotated[Sequential | Blocks | PathKL | TimeNorms, Field(discriminator="phase")]
WEIGHTS = {part.model_fields["method"].default: part for part in (RoundToNearest, LeastSquares, GPTQ, Trellis)}
PHASES = {part.model_fields["phase"].default: part for part in (Sequential, Blocks, PathKL, TimeNorms)}
_MOST_TOLD = 8  # wrong fields
_TAGS = frozenset({*WEIGHTS, *PHASES, "static", "dynamic"})


class OneLine:
    """While it is entered (``with``), errors of pydantic become one line in this library's form.

    Args:
        owner: the class whose fields are set.
        names: path of a nested field to the flat name that it was given by.
    """

    def __init__(self, owner: type[BaseModel], names: Mapping[str, str] | None = None):
        self.owner, self.names = owner, names or {}

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValidationError):
            found = list(dict.fromkeys(map(self._in_words, error.errors(include_url=False))))
            more = f"; {len(found) - _MOST_TOLD} more" if len(found) > _MOST_TOLD else ""
            raise ValueError("; ".join(found[:_MOST_TOLD]) + more) from None

    def _in_words(self, error: Mapping[str, Any]) -> str:
        path = [part for part in error["loc"] if part not in _TAGS] or list(error["loc"][-1:])
        field = ".".join(map(str, path))
        field = brief(self.names.get(field, field))
        if error["type"] == "value_error" and str(error["ctx"]["error"]) not in KINDS:
            message = str(error["ctx"]["error"])  # of a validator of this module, which names the field
            name, _, rest = (f"{field}.{message}" if field else message).partition(": ")
            return f"{self.names.get(name, name)}: {rest}"
        if error["type"] == "extra_forbidden":
            allowed = self._fields(error["loc"][:-1])
            found = f"allowed are the fields {', '.join(allowed)}{nearest(str(path[-1]), [*allowed, *FLAT])}"
        elif error["type"] == "value_error":
            found = f"allowed is {error['ctx']['error']}"
        elif error["type"] == "union_tag_invalid":
            found = f"allowed are {error['ctx']['expected_tags']}{nearest(str(error['ctx']['tag']), _TAGS)}"
            name = f"{field}.{error['ctx']['discriminator'].strip(chr(39))}"
            return f"{self.names.get(name, name)}: found {error['ctx']['tag']!r:.80}, {found}"
        else:
            kinds = {"tuple_type": "a list", "model_type": "an object", "model_attributes_type": "an object"}
            found = error["msg"].replace("Input should be", "allowed is")
            if error["type"] in kinds:
                found = f"allowed is {kinds[error['type']]}"
        return f"{field}: found {error['input']!r:.80}, {found}"

    def _fields(self, loc: tuple[Any, ...]) -> list[str]:
        parts = {**WEIGHTS, **PHASES, "static": Static, "dynamic": Dynamic, "time_groups": TimeGrouping}
        owner = next((parts[part] for part in reversed(loc) if part in parts), self.owner)
        return list(owner.model_fields)

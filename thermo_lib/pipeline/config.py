"""Configuration of a quantized model; every default comes from ``params.yaml``."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from transformers.utils.quantization_config import QuantizationConfigMixin

from thermo_lib.params import default
from thermo_lib.quant.trellis import MOST_BITS
from thermo_lib.time_aware.groups import TimeGroups

Quantizer = Literal["rtn", "least_squares", "gptq", "trellis"]
SmoothingMethod = Literal["linear", "cubic", "sigmoid", "spline"]
RangeObjective = Literal["activation", "output", "path_kl"]
Reconstruction = Literal["none", "blocks", "sequential"]
Transitions = Literal["none", "parameters", "codes", "network"]
TrainingStates = Literal["calibration", "chains"]
MOST_TIMESTEPS = 2**16


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a whole number")  # what is allowed; the field and what was found are known later
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]  # to Python and pydantic, True is 1


def _from_params(key: str, **limits: Any) -> Any:
    return Field(default_factory=lambda: default(f"quant.{key}"), validate_default=True, **limits)


class ThermoConfig(BaseModel, QuantizationConfigMixin):
    """How to quantize a diffusion language model; also a ``quantization_config`` of ``transformers``.

    Attributes:
        bit_width: bits of a weight code: 2, 4 or 8.
        quantizer: ``rtn`` (round to nearest), ``least_squares`` (scale and zero point of each group fitted for least
            squared weight error), ``gptq`` (arXiv 2210.17323; needs calibration) or ``trellis`` (see ``trellis``; needs
            calibration).
        average_bits: for ``trellis``, the mean number of bits of a code, each column having as many as it is worth;
            None gives every column ``bit_width`` bits.
        hessian: tokens count in ``gptq`` and ``trellis`` all the same (``uniform``) or by what an error there costs in
            path KL (``transition``, see ``transition.token_importance``).
        group_size: weights along the input dimension that share scale and zero point; a row's last group may be
            shorter.
        embedding_bits: 16 leaves embeddings and head as they are; 8 stores codes in groups of ``group_size``, by
            ``rtn`` where that is the quantizer and else by ``least_squares``, once everything else is done.
        activation_bits: 16 leaves activations as they are; 2-8 quantizes the inputs of the quantized linears.
        activation_ranges: ``static`` (fitted on calibration states, per time group) or ``dynamic`` (per token,
            min-max).
        activation_clip: how far a ``dynamic`` range reaches, as a share of the way from zero to the token's extremes;
            what lies beyond is clipped (to 0.9 of it in QuaRot, arXiv 2404.00456).
        activation_group_size: neighbouring input channels that share a static range; None for all of them.
        activation_token_states: static ranges of their own for masked and for unmasked tokens.
        range_objective: what static ranges are fitted to: the ``activation``'s squared error (each time group for
            itself), the squared error of the layer's ``output``, or the model's ``path_kl`` (both after smoothing).
        reconstruction: ``none``, or training for the output of each block, see ``reconstruction``: in ``blocks``, of
            the scales, zero points and codes of all its weights, in ``sequential``, of its weights that are not
            quantized yet, each time after some of them are.
        transitions: ``none``, or what is trained for least path KL once everything is quantized: the ``parameters``
            (weights' scales and zero points, static activation ranges), the weights' ``codes`` too, or with the
            parameters the unquantized rest of the ``network`` (norms, biases, embeddings, head), as precise as before.
        markov_weight: of the Markov term that is added to path KL, in nats, where ``transitions`` trains static ranges
            of several time groups: the squared steps of their parameters from group to group.
        training_states: what reconstruction and transitions are trained on: the ``calibration`` states, or fresh
            ``chains``, which the full-precision model makes itself.
        own_share: share of the chains of code in ``transitions`` that take the steps of the quantized model, as it is
            then, instead of the full-precision model's.
        timesteps: number of denoising steps ``T`` that the time groups divide, at most 65536.
        num_time_groups: contiguous groups of timesteps with parameters of their own. They hold the activation
            parameters where activations are quantized, otherwise the weights' scales and zero points.
        time_group_starts: the first timestep of every time group but the first; None for groups of equal width.
        enable_boundary_smoothing: interpolate the parameters across the edges of time groups.
        smoothing_method: ``linear``, ``cubic``, ``sigmoid``, or ``spline`` (over all timesteps, without a window).
        smoothing_window: timesteps smoothed on each side of a boundary, 1-20.

    Raises:
        ValueError: in one line, names every wrong field, what was found and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    quant_method: ClassVar[str] = "thermo"
    format_version: ClassVar[int] = 2  # of quantized folders; 1 had neighbours in a byte

    bit_width: Literal[2, 4, 8] = _from_params("bit_width")
    quantizer: Quantizer = _from_params("quantizer")
    average_bits: float | None = _from_params("average_bits", ge=1, le=MOST_BITS)
    hessian: Literal["uniform", "transition"] = _from_params("hessian")
    group_size: Whole = _from_params("group_size", ge=1)
    embedding_bits: Literal[16, 8] = _from_params("embedding_bits")
    activation_bits: Literal[16, 8, 7, 6, 5, 4, 3, 2] = _from_params("activation_bits")
    activation_ranges: Literal["static", "dynamic"] = _from_params("activation_ranges")
    activation_clip: float = _from_params("activation_clip", gt=0, le=1)
    activation_group_size: Whole | None = _from_params("activation_group_size", ge=1)
    activation_token_states: bool = _from_params("activation_token_states")
    range_objective: RangeObjective = _from_params("range_objective")
    reconstruction: Reconstruction = _from_params("reconstruction")
    transitions: Transitions = _from_params("transitions")
    markov_weight: float = _from_params("markov_weight", ge=0)
    training_states: TrainingStates = _from_params("training_states")
    own_share: float = _from_params("own_share", ge=0, le=1)
    timesteps: Whole = _from_params("timesteps", ge=1, le=MOST_TIMESTEPS)
    num_time_groups: Whole = _from_params("num_time_groups", ge=1)
    time_group_starts: tuple[Whole, ...] | None = _from_params("time_group_starts")
    enable_boundary_smoothing: bool = _from_params("enable_boundary_smoothing")
    smoothing_method: SmoothingMethod = _from_params("smoothing_method")
    smoothing_window: Whole = _from_params("smoothing_window", ge=1, le=20)

    def __init__(self, **fields: Any):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            lines = (_in_words(found) for found in error.errors(include_url=False))
            raise ValueError("; ".join(lines)) from None

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if self.num_time_groups > self.timesteps:
            raise ValueError(
                f"num_time_groups: found {self.num_time_groups}, allowed is at most the number of timesteps, "
                f"{self.timesteps}"
            )
        if self.activation_ranges == "dynamic" and self.num_time_groups > 1:
            raise ValueError(
                f"num_time_groups: found {self.num_time_groups}, allowed is 1 with activation_ranges='dynamic', "
                "which has no parameters to group"
            )
        if self.activation_ranges == "static" and self.activation_clip != 1:
            raise ValueError(
                f"activation_clip: found {self.activation_clip}, allowed is 1 with activation_ranges='static', "
                "whose ranges are fitted"
            )
        if self.num_time_groups > 1 and self.activation_bits == 16:
            for name in ("reconstruction", "transitions"):
                if getattr(self, name) != "none":
                    raise ValueError(
                        f"{name}: found {getattr(self, name)!r}, allowed is 'none' with weights that depend on the "
                        f"timestep (num_time_groups={self.num_time_groups} at activation_bits=16)"
                    )
        if self.quantizer == "trellis":
            self._check_trellis()
        elif self.average_bits is not None:
            raise ValueError(
                f"average_bits: found {self.average_bits}, allowed is None with quantizer={self.quantizer!r}"
            )
        _ = self.time_groups  # refuses starts that don't fit
        return self

    def _check_trellis(self) -> None:
        time_dependent = self.num_time_groups > 1 and self.activation_bits == 16
        for name, wrong, allowed in (
            ("bit_width", self.bit_width > MOST_BITS, "2 and 4"),
            ("num_time_groups", time_dependent, "1 at activation_bits=16"),
            ("reconstruction", self.reconstruction == "blocks", "none and sequential"),
            ("transitions", self.transitions == "codes", "none, parameters and network"),
        ):
            if wrong:
                found = f"found {getattr(self, name)!r}, allowed are {allowed} with quantizer='trellis'"
                raise ValueError(f"{name}: {found}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as ``config.json`` holds them, with ``quant_method`` and ``format_version``."""
        head = {"quant_method": self.quant_method, "format_version": self.format_version}
        return head | self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The inverse of ``to_dict``; other arguments are given back, if asked for.

        Raises:
            ValueError: another method, another version of the format, or a wrong field.
        """
        if not isinstance(config_dict, dict) or config_dict.get("quant_method") != cls.quant_method:
            expected = f"expected an object with quant_method {cls.quant_method!r}"
            raise ValueError(f"quantization_config: found {config_dict!r:.80}, {expected}")
        fields = dict(config_dict)
        del fields["quant_method"]
        if (version := fields.pop("format_version", 1)) != cls.format_version:
            found = f"found {version!r}, allowed is {cls.format_version}: quantize the model again"
            raise ValueError(f"quantization_config.format_version: {found}")
        config = cls(**fields)
        return (config, kwargs) if return_unused_kwargs else config

    @property
    def time_groups(self) -> TimeGroups:
        """The time groups."""
        return TimeGroups(self.timesteps, self.num_time_groups, self.time_group_starts)

    @property
    def weight_groups(self) -> TimeGroups:
        """The time groups of the weights' parameters: a single one where the activations' depend on the timestep."""
        return self.time_groups if self.activation_bits == 16 else TimeGroups(self.timesteps, 1)

    @property
    def method(self) -> SmoothingMethod | None:
        """The smoothing method, None where smoothing is off."""
        return self.smoothing_method if self.enable_boundary_smoothing else None

    @property
    def has_static_ranges(self) -> bool:
        """Whether ranges of activations are stored."""
        return self.activation_bits < 16 and self.activation_ranges == "static"

    @property
    def needs_calibration(self) -> bool:
        """Whether any part of this configuration is fitted on calibration states."""
        trained = self.reconstruction != "none" or self.transitions != "none"
        return self.quantizer in ("gptq", "trellis") or self.num_time_groups > 1 or self.has_static_ranges or trained

    @property
    def precision(self) -> str:
        """For example ``W2A16``."""
        return f"W{self.bit_width}A{self.activation_bits}"


def _in_words(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors in this library's form."""
    if not error["loc"]:
        return str(error["ctx"]["error"])  # of ``_groups_fit``
    field = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        allowed = f"allowed are the fields {', '.join(ThermoConfig.model_fields)}"
    elif error["type"] == "value_error":
        allowed = f"allowed is {error['ctx']['error']}"
    else:
        allowed = error["msg"].replace("Input should be", "allowed is")
    return f"{field}: found {error['input']!r:.80}, {allowed}"

"""How to quantize a diffusion language model: everything that decides the result, and nothing that doesn't.

``parts`` has the parts of a configuration, ``presets`` named ones, and ``flat`` the flat names of earlier versions.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers.utils.quantization_config import QuantizationConfigMixin

from thermo_lib.pipeline.flat import FLAT, is_single, nearest, nested
from thermo_lib.pipeline.parts import (
    GPTQ,
    Activations,
    Blocks,
    Dynamic,
    OneLine,
    PathKL,
    Phase,
    Sequential,
    SmoothingMethod,
    Static,
    TimeGrouping,
    TimeNorms,
    Trellis,
    Weights,
)
from thermo_lib.pipeline.presets import DEFAULT, PRESETS
from thermo_lib.pipeline.scalars import EmbeddingBits, Whole
from thermo_lib.time_aware.groups import TimeGroups

MOST_TIMESTEPS = 2**16


class ThermoConfig(BaseModel, QuantizationConfigMixin):
    """How to quantize a diffusion language model; also a ``quantization_config`` of ``transformers``.

    Without arguments it is the preset ``gptq``. The flat names of earlier versions still work, for example
    ``ThermoConfig(bit_width=2, activation_bits=4, num_time_groups=3, smoothing_method="linear")``.

    Attributes:
        weights: ``RoundToNearest``, ``LeastSquares``, ``GPTQ`` or ``Trellis``.
        activations: ``Static``, ``Dynamic``, or None to leave the inputs of the quantized linears as they are.
        time_groups: a ``TimeGrouping``, or None for parameters that don't depend on the timestep.
        training: phases in order: ``Sequential`` or ``Blocks``, then ``PathKL`` and, once, ``TimeNorms``.
        embedding_bits: 16 leaves embeddings and head as they are; 8 stores codes in groups of the weights' size, by
            ``rtn`` where that is the method and else by ``least_squares``, once everything else is done.
        timesteps: number of denoising steps ``T`` that the time groups divide, at most 65536.
        seed: seeds every random choice.

    Raises:
        ValueError: in one line, names every wrong field, what was found and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    # transformers declares an instance's, one of its own methods; without ClassVar pydantic would make it a field.
    quant_method: ClassVar[str] = "thermo"  # type: ignore[misc, assignment]
    format_version: ClassVar[int] = 3  # of quantized folders; 2 had flat fields, 1 had neighbours in a byte

    weights: Weights = Field(default_factory=GPTQ)
    activations: Activations | None = None
    time_groups: TimeGrouping | None = None
    training: tuple[Phase, ...] = ()
    embedding_bits: EmbeddingBits = 16
    timesteps: Whole = Field(16, ge=1, le=MOST_TIMESTEPS)
    seed: Whole = Field(0, ge=0, lt=2**63)

    def __init__(self, **fields: Any):
        names = {FLAT[name]: name for name in fields if name in FLAT}
        with OneLine(type(self), names):
            single = any(map(is_single, fields))
            super().__init__(**_tagged(nested(fields) if single else fields))

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        phases = [phase.phase for phase in self.training]
        if any(phase not in ("path_kl", "time_norms") for phase in phases[1:]) or phases.count("time_norms") > 1:
            allowed = "allowed are sequential or blocks, then path_kl and, once, time_norms"
            raise ValueError(f"training: found {', '.join(phases)}, {allowed}")
        if isinstance(self.weights, Trellis):
            self._check_trellis()
        if self.time_groups is not None:
            self._check_time_groups(self.time_groups)
        if self.time_norms is not None:
            self._check_time_norms(self.time_norms)
        heaviest = max((phase.markov_weight for phase in self.training if isinstance(phase, PathKL)), default=0)
        if heaviest > 0 and not (self.has_static_ranges and self.time_groups):
            found = f"found {heaviest}"
            raise ValueError(f"training.markov_weight: {found}, allowed is 0 without static ranges in time groups")
        return self

    def _check_trellis(self) -> None:
        if self.phase("blocks") is not None:
            raise ValueError("training: found blocks, allowed are sequential and path_kl with trellis weights")
        if any(isinstance(phase, PathKL) and phase.what == "codes" for phase in self.training):
            raise ValueError(
                "training.what: found 'codes', allowed are 'parameters' and 'network' with trellis weights"
            )
        if self.time_groups is not None and self.activations is None:
            raise ValueError(
                "time_groups: found some, allowed is None with trellis weights and no quantized activations"
            )

    def _check_time_groups(self, grouping: TimeGrouping) -> None:
        if isinstance(self.activations, Dynamic):
            found = f"found {grouping.count} groups"
            raise ValueError(f"time_groups: {found}, allowed is None with dynamic ranges, which have no parameters")
        if self.activations is None and self.training:
            raise ValueError(
                "training: found "
                + ", ".join(phase.phase for phase in self.training)
                + ", allowed is none with weights that depend on the timestep (time_groups without activations)"
            )
        self.__dict__["time_groups"] = grouping.acting(self.timesteps, "time_groups")  # refuses starts that don't fit

    def _check_time_norms(self, norms: TimeNorms) -> None:
        try:
            acting = norms.acting(self.timesteps, "time_norms")
        except ValueError as error:
            message = str(error).replace("num_time_groups", "count", 1).replace("time_group_starts", "starts", 1)
            raise ValueError(f"time_norms.{message}") from error
        self.__dict__["training"] = tuple(acting if isinstance(phase, TimeNorms) else phase for phase in self.training)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A named configuration, perhaps with changes.

        Args:
            name: one of ``presets.PRESETS``.
            changes: see ``replace``.

        Raises:
            ValueError: no preset of that name (the nearest is offered), or a wrong change.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: found {name!r}, allowed are {', '.join(PRESETS)}{nearest(name, PRESETS)}")
        return cls(**PRESETS[name]).replace(**changes)

    def replace(self, **changes: Any) -> Self:
        """The same configuration with other fields.

        Args:
            changes: fields; a mapping changes single settings of a part (``weights={"bits": 4}``), unless it names
                another method, which starts from that method's defaults. Flat names are taken too.

        Raises:
            ValueError: as the configuration itself.
        """
        if not changes:
            return self
        single = {name: value for name, value in changes.items() if is_single(name)}
        fields = {name: value for name, value in changes.items() if name not in single}
        merged = self.model_dump(exclude_unset=True)
        for name, tag in (("weights", "method"), ("activations", "ranges"), ("time_groups", None)):
            present = getattr(self, name)
            if present is not None:
                merged[name] = present.model_dump(exclude_unset=True) | ({tag: getattr(present, tag)} if tag else {})
            if isinstance(fields.get(name), Mapping):
                change = dict(fields[name])
                same = present is not None and (tag is None or change.get(tag, merged[name][tag]) == merged[name][tag])
                fields[name] = merged[name] | change if same else change
        if self.training:
            merged["training"] = tuple(p.model_dump(exclude_unset=True) | {"phase": p.phase} for p in self.training)
        merged |= fields
        return type(self)(**(nested(single, merged) if single else merged))

    def to_dict(self) -> dict[str, Any]:
        """The fields as ``config.json`` holds them, with ``quant_method`` and ``format_version``."""
        head = {"quant_method": self.quant_method, "format_version": self.format_version}
        return head | self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The inverse of ``to_dict``; other arguments are given back, if asked for. Version 2 is read too.

        Raises:
            ValueError: another method, another version of the format, or a wrong field.
        """
        if not isinstance(config_dict, dict) or config_dict.get("quant_method") != cls.quant_method:
            expected = f"expected an object with quant_method {cls.quant_method!r}"
            raise ValueError(f"quantization_config: found {config_dict!r:.80}, {expected}")
        fields = dict(config_dict)
        del fields["quant_method"]
        version = fields.pop("format_version", 1)
        if version not in (2, cls.format_version):
            found = f"found {version!r:.80}, allowed are 2 and {cls.format_version}: quantize the model again"
            raise ValueError(f"quantization_config.format_version: {found}")
        config = cls.from_flat(fields) if version == 2 else cls(**fields)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def from_flat(cls, fields: Mapping[str, Any]) -> Self:
        """The configuration that version 0.1 wrote as these flat fields, without those that had no meaning."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # windows were cut in silence then
            return cls(**nested(fields, lenient=True))

    def digest(self) -> str:
        """What this configuration decides, in 16 hexadecimal digits: equal for equal configurations."""
        text = json.dumps([self.format_version, self.model_dump(mode="json")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def phase(self, name: str) -> Sequential | Blocks | PathKL | TimeNorms | None:
        """The phase of training of that name, None where there is none."""
        return next((phase for phase in self.training if phase.phase == name), None)

    @property
    def time_norms(self) -> TimeNorms | None:
        """The phase that gives norms a set of weights for each time group, None where there is none."""
        return next((phase for phase in self.training if isinstance(phase, TimeNorms)), None)

    @property
    def groups(self) -> TimeGroups:
        """The time groups, a single one where nothing depends on the timestep."""
        return TimeGroups(self.timesteps, 1) if self.time_groups is None else self.time_groups.over(self.timesteps)

    @property
    def weight_groups(self) -> TimeGroups:
        """The time groups of the weights' parameters: a single one where the activations' depend on the timestep."""
        return self.groups if self.activations is None else TimeGroups(self.timesteps, 1)

    @property
    def has_static_ranges(self) -> bool:
        """Whether ranges of activations are stored."""
        return isinstance(self.activations, Static)

    @property
    def needs_calibration(self) -> str:
        """The parts that are fitted on calibration states, in words; empty where there are none."""
        needs = [repr(self.weights.method)] if isinstance(self.weights, GPTQ | Trellis) else []
        needs += ["static activation ranges"] if self.has_static_ranges else []
        needs += ["time groups"] if self.time_groups else []
        return ", ".join([*needs, *(f"training {phase.phase!r}" for phase in self.training)])

    @property
    def precision(self) -> str:
        """For example ``W2A16``."""
        return f"W{self.bit_width}A{self.activation_bits}"

    @property
    def bit_width(self) -> int:
        """Whole bits of a weight code."""
        return int(self.weights.bits)

    @property
    def quantizer(self) -> str:
        """The method of the weights."""
        return self.weights.method

    @property
    def group_size(self) -> int | None:
        """Weights that share a scale; None for a whole row."""
        return self.weights.group_size

    @property
    def activation_bits(self) -> int:
        """Bits of an activation code, 16 where activations aren't quantized."""
        return 16 if self.activations is None else self.activations.bits

    @property
    def num_time_groups(self) -> int:
        """Number of time groups."""
        return 1 if self.time_groups is None else self.time_groups.count

    @property
    def smoothing_method(self) -> SmoothingMethod | None:
        """The smoothing method, None where nothing is smoothed."""
        return None if self.time_groups is None else self.time_groups.smoothing

    @property
    def smoothing_window(self) -> int | None:
        """The window that acts, None where there is none."""
        return None if self.time_groups is None else self.time_groups.window

    @property
    def enable_boundary_smoothing(self) -> bool:
        """Whether parameters are smoothed across boundaries."""
        return self.smoothing_method is not None


def _tagged(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with the default method where a mapping doesn't name any."""
    result = dict(fields)
    for name, tag, default in (("weights", "method", DEFAULT), ("activations", "ranges", "static")):
        if isinstance(result.get(name), Mapping):
            result[name] = {tag: default, **result[name]}
    return result

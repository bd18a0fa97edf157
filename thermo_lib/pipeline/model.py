"""A quantized diffusion language model, and how quantized layers get into it."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.parts import Dynamic
from thermo_lib.pipeline.quantizers import quantizer_of
from thermo_lib.quant.input_ranges import DynamicRanges, StaticRanges
from thermo_lib.quant.layers import QuantizedEmbedding, QuantizedLinear
from thermo_lib.quant.time_norms import TimeNorm, is_norm, time_norms
from thermo_lib.time_aware.groups import TimeGroupParams
from thermo_lib.time_aware.smoothing import WINDOWS, BoundarySmoother

Part = TypeVar("Part", bound=nn.Module)

_NUMBER = re.compile(r"\.\d+(?=\.)")  # the first in the name of what is in a block is the block's


@dataclass
class QuantizedLM(DiffusionLM):
    """A quantized diffusion language model.

    Attributes:
        config: how it was quantized.
        weight_params: layer name to the weight parameters of its time groups, before smoothing; one entry where
            they don't depend on the timestep.
        activation_params: the same for static activation ranges; empty where there are none.
        losses: what was trained to the loss of each step, path KL in nats per sequence, estimated; not saved.
    """

    config: ThermoConfig
    weight_params: dict[str, list[TimeGroupParams]] = field(default_factory=dict)
    activation_params: dict[str, list[TimeGroupParams]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)

    @property
    def time_params(self) -> dict[str, list[TimeGroupParams]]:
        """The parameters that depend on the timestep, per layer and time group; empty with one time group."""
        if self.config.time_groups is None:
            return {}
        return self.weight_params if self.config.activations is None else self.activation_params

    def smoothed_params(self, layers: Iterable[str] | None = None) -> dict[str, list[TimeGroupParams]]:
        """The time-dependent parameters after smoothing: per layer, of all or of some, one entry a timestep."""
        whole, params = self.config.activations is not None, self.time_params
        names = params if layers is None else [name for name in layers if name in params]
        return {name: _smooth(params[name], self.config, whole) for name in names}

    def stored_bits(self, name: str) -> int:
        """Bits stored for the weights of a quantized layer: codes and parameters, of every time group."""
        layer = self.quantized_layers()[name]
        bits = sum(getattr(layer, key).numel() * 8 for key in layer.STORED)
        parameters = quantizer_of(self.config).parameters
        return bits + sum(len(parameters) * params.scale.numel() * 16 for params in self.weight_params[name])

    def quantized_layers(self) -> dict[str, QuantizedLinear]:
        """The quantized linears inside the blocks by name."""
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, QuantizedLinear)}
        return {name: layer for name, layer in layers.items() if name not in tables(self.model)}

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for the quantized linears, codes and all their parameters, for each weight.

        With time-aware norms all sets but one are counted too, in the type in which the model has them.
        """
        bits, weights = 0, 0
        for name, layer in self.quantized_layers().items():
            weights += layer.in_features * layer.out_features
            bits += self.stored_bits(name)
            for params in self.activation_params.get(name, []):
                bits += (params.scale.numel() + params.zero_point.numel()) * 32
        for norm in time_norms(self.model).values():
            sets = [norm.time_weight] if norm.time_bias is None else [norm.time_weight, norm.time_bias]
            bits += sum(8 * values[1:].numel() * values.itemsize for values in sets)
        return bits / weights


def part_as(kind: type[Part], model: nn.Module, name: str) -> Part:
    """The part of a model that has a name, and that is known to be of a kind."""
    part = model.get_submodule(name)
    assert isinstance(part, kind)
    return part


def tables(model: MaskPredictor) -> tuple[str, str]:
    """Names of embeddings and head."""
    return model.parts.embeddings, model.parts.head


def norm_names(model: MaskPredictor) -> list[str]:
    """Names of the norms that can be time-aware, all of them, in order.

    Raises:
        ValueError: a norm of a kind that isn't known.
    """
    return [name for name, module in model.named_modules() if is_norm(module)]


def install_time_norms(model: MaskPredictor, config: ThermoConfig) -> None:
    """Put a time-aware norm in the place of every norm, if the configuration has a phase ``TimeNorms``.

    Every time group starts with the norm's own weight and bias, so that the model computes what it did.

    Raises:
        ValueError: a norm of a kind that isn't known, or no norm.
    """
    phase = config.time_norms
    if phase is None:
        return
    names = norm_names(model)
    if not names:
        raise ValueError("training: found time_norms, allowed is a model with norms that aren't time-aware yet")
    intervals = phase.over(config.timesteps).intervals
    with torch.device("cpu"):  # transformers loads a model under the meta device
        matrix = BoundarySmoother(phase.smoothing, phase.window or WINDOWS[0]).weights(intervals)
    for name in names:
        model.set_submodule(name, TimeNorm(model.get_submodule(name), matrix))


def linear_names(model: MaskPredictor) -> list[str]:
    """Names of the linears that are quantized: all inside the blocks, in order."""
    inside = f"{model.parts.blocks}."
    return [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n.startswith(inside)]


def names_by_block(names: list[str]) -> dict[str, list[str]]:
    """Block name, e.g. ``model.layers.0``, to the names of its layers."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        number = _NUMBER.search(name)
        assert number is not None  # it is the name of what is in a block
        blocks.setdefault(name[: number.end()], []).append(name)
    return blocks


def install_layer(lm: QuantizedLM, name: str, stored: Mapping[str, Tensor]) -> None:
    """Put a quantized layer with these codes in the place of a linear; its weight parameters are known.

    Args:
        lm: the model.
        name: of the layer.
        stored: the layer's buffers that hold the codes.
    """
    linear = part_as(nn.Linear, lm.model, name)
    layer = quantizer_of(lm.config).layer(
        linear.in_features,
        linear.out_features,
        bits=lm.config.bit_width,
        group_size=lm.config.group_size or linear.in_features,
        bias=linear.bias is not None,
        timesteps=lm.config.timesteps,
    )
    for key, tensor in stored.items():
        setattr(layer, key, tensor)
    if linear.bias is not None:
        layer.bias = linear.bias.detach().clone()
    install_weights(layer, lm.weight_params[name], lm.config)
    lm.model.set_submodule(name, layer)


def install_weights(layer: QuantizedLinear, params: list[TimeGroupParams], config: ThermoConfig) -> None:
    """Give a layer its scales and zero points, smoothed, as tables of distinct rows."""
    device = layer.packed.device
    layer.scale, layer.zero_point, layer.row_of_step = (part.to(device) for part in weight_table(params, config))


def weight_table(params: list[TimeGroupParams], config: ThermoConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Smoothed scale and zero point, float16 ``(rows, out_features, groups)``, and the row of each timestep."""
    scale, zero_point, row_of_step = _rows_by_timestep(params, config, whole_zero_points=False)
    return scale.to(torch.float16), zero_point.to(torch.float16), row_of_step


def range_table(params: list[TimeGroupParams], config: ThermoConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Smoothed static ranges, float32 ``(rows, token states, channel groups)``, and the row of each timestep."""
    scale, zero_point, row_of_step = _rows_by_timestep(params, config, whole_zero_points=True)
    return scale.float(), zero_point.float(), row_of_step


def input_quantizer(params: list[TimeGroupParams], config: ThermoConfig) -> StaticRanges | DynamicRanges | None:
    """What quantizes a layer's input; ``params`` are the static ranges of the time groups, before smoothing."""
    how = config.activations
    if how is None:
        return None
    if isinstance(how, Dynamic):
        return DynamicRanges(how.bits, how.clip)
    return StaticRanges(how.bits, *range_table(params, config), how.group_size)


def install_activations(layer: QuantizedLinear, params: list[TimeGroupParams], config: ThermoConfig) -> None:
    """Let a layer quantize its input as the configuration says; arguments as for ``input_quantizer``."""
    found = input_quantizer(params, config)
    layer.input_quantizer = None if found is None else found.to(layer.packed.device)


def install_dynamic_ranges(lm: QuantizedLM) -> None:
    """Quantize the inputs of all quantized linears in ranges of each token, if the configuration says so."""
    if isinstance(lm.config.activations, Dynamic):
        for layer in lm.quantized_layers().values():
            install_activations(layer, [], lm.config)


def _smooth(params: list[TimeGroupParams], config: ThermoConfig, whole_zero_points: bool) -> list[TimeGroupParams]:
    """One entry a timestep, as the layer uses it.

    Activations keep whole zero points after smoothing, so that an activation of zero stays exactly zero: with a
    fraction, every one of the many near-zero activations is off by the same amount, which more than doubled path KL.
    """
    steps = smoother(config).smooth(params)
    return _rounded_zero_points(steps) if whole_zero_points else steps


def smoother(config: ThermoConfig) -> BoundarySmoother:
    """The boundary smoothing of a configuration."""
    return BoundarySmoother(config.smoothing_method, config.smoothing_window or WINDOWS[0])


def _rounded_zero_points(params: list[TimeGroupParams]) -> list[TimeGroupParams]:
    return [replace(group, zero_point=group.zero_point.round()) for group in params]


def _rows_by_timestep(
    params: list[TimeGroupParams], config: ThermoConfig, *, whole_zero_points: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct scales and zero points after smoothing, ``(rows, ...)``, and the row of each timestep."""
    if len(params) == 1:
        rows = _rounded_zero_points(params) if whole_zero_points else params
        row_of_step = [0] * config.timesteps
    else:
        rows, row_of_step = [], []
        for step in _smooth(params, config, whole_zero_points):
            same = rows and rows[-1].scale.equal(step.scale) and rows[-1].zero_point.equal(step.zero_point)
            if not same:
                rows.append(step)
            row_of_step.append(len(rows) - 1)
    scale, zero_point = (torch.stack([getattr(row, name) for row in rows]) for name in ("scale", "zero_point"))
    return scale, zero_point, torch.tensor(row_of_step, dtype=torch.int32)


def install_table(lm: QuantizedLM, name: str, stored: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Put a coded table in the place of the embeddings, of a head that is tied to them, or of the head."""
    rows, columns = lm.model.config.vocab_size, lm.model.config.hidden_size
    how: dict[str, Any] = {"bits": lm.config.embedding_bits, "group_size": lm.config.group_size or columns}
    module: QuantizedLinear | QuantizedEmbedding
    for table in tables(lm.model) if lm.model.config.tie_word_embeddings else (name,):
        if table == lm.model.parts.head:
            bias = part_as(nn.Linear, lm.model, table).bias
            module = QuantizedLinear(columns, rows, bias=bias is not None, **how)
            module.bias = None if bias is None else bias.detach().float()
        else:
            module = QuantizedEmbedding(rows, columns, dtype=dtype, **how)
        module.packed = stored["packed"]
        module.scale, module.zero_point = stored["weight_scale"], stored["weight_zero_point"]
        lm.model.set_submodule(table, module.to(module.packed.device))


def copied(
    lm: QuantizedLM,
    config: ThermoConfig,
    activation_params: dict[str, list[TimeGroupParams]],
    *,
    in_place: bool = False,
) -> QuantizedLM:
    """A copy of a quantized model, with another configuration and other static activation ranges.

    Args:
        lm: the model.
        config, activation_params: of the copy.
        in_place: let it have the given model's layers instead of copies.
    """
    return replace(
        lm,
        model=lm.model if in_place else copy.deepcopy(lm.model),
        config=config,
        weight_params=dict(lm.weight_params),
        activation_params=dict(activation_params),
        losses=dict(lm.losses),
    )


def dequantized(lm: QuantizedLM) -> DiffusionLM:
    """A model whose plain weights are the values of a quantized model's codes.

    It computes what the quantized model does, as fast as one in full precision, and takes the memory of one.

    Args:
        lm: the quantized model, which stays as it is.

    Raises:
        ValueError: quantized activations, or weights that depend on the timestep: no plain weight does what they do.
    """
    if lm.config.activations is not None:
        raise ValueError(
            f"dense: found quantized activations ({lm.config.precision}), allowed are quantized weights only"
        )
    if any(len(layer.scale) > 1 for layer in lm.quantized_layers().values()):
        raise ValueError("dense: found weights that depend on the timestep, allowed are those of one time group")
    model = copy.deepcopy(lm.model)
    dtype = model.norm.weight.dtype
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            dense.weight = nn.Parameter(module.weight().to(dtype), requires_grad=False)
            if module.bias is not None:
                dense.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
        elif isinstance(module, QuantizedEmbedding):
            weight = module(torch.arange(len(module.packed), device=module.packed.device)).to(dtype)
            dense = nn.Embedding.from_pretrained(weight)
        else:
            continue
        model.set_submodule(name, dense)
    model.tie_weights()
    about = lm.tokenizer, lm.mask_token_id, lm.name
    return DiffusionLM(model, *about, chat_template=lm.chat_template, carried=lm.carried)


def head_bias(model: MaskPredictor) -> str:
    """What the head's bias is stored as, if it has one: BERT's is that of the layer around it, where they are tied."""
    name = f"{model.parts.head}.bias"
    return model.parts.tied.get(name, name) if model.config.tie_word_embeddings else name


def coded_tables(model: MaskPredictor, config: ThermoConfig) -> tuple[str, ...]:
    """Which of embeddings and head have codes of their own; a tied head shares those of the embeddings."""
    if config.embedding_bits == 16:
        return ()
    return tables(model)[:1] if model.config.tie_word_embeddings else tables(model)

"""Quantize the weights of a model: its linears block after block, and its tables of embeddings.

Where calibration is needed the blocks are quantized in order, each on the inputs that the blocks before it, already
quantized, give it."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from tqdm import tqdm

from thermo_lib.diffusion.inputs import run_states, shared_inputs
from thermo_lib.diffusion.states import Calibration
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import (
    QuantizedLM,
    coded_tables,
    install_layer,
    install_table,
    linear_names,
    names_by_block,
)
from thermo_lib.pipeline.parts import GPTQ, Trellis
from thermo_lib.quant.codes import check_weight, pack
from thermo_lib.quant.gptq import gptq, refit
from thermo_lib.quant.rounding import least_squares, round_to_nearest
from thermo_lib.quant.trellis import allocate_bits, column_costs, trellis
from thermo_lib.time_aware.groups import TimeGroupParams, TimeGroups
from thermo_lib.transition.loss import token_importance

_ROUNDING = {"rtn": round_to_nearest, "least_squares": least_squares}


def _coded_layer(
    weight: Tensor, name: str, hessians: Tensor | None, config: ThermoConfig, column_bits: Tensor | None = None
) -> tuple[dict[str, Tensor], list[TimeGroupParams]]:
    """What a layer stores as codes, and its parameters for each time group.

    Args:
        weight: of the layer.
        name: of the layer.
        hessians: of the time groups, ``(groups, in_features, in_features)``; None for a data-free quantizer and a
            single time group.
        config: how to quantize.
        column_bits: of the trellis.
    """
    check_weight(weight, name)
    how, intervals = config.weights, config.weight_groups.intervals
    group_size = how.group_size or weight.shape[1]
    if isinstance(how, Trellis):
        coded = trellis(weight, hessians.sum(0), column_bits, group_size, how.damping, how.beam)
        params = TimeGroupParams(intervals[0], coded.scale, torch.zeros_like(coded.scale), coded.group_size)
        return {"packed": coded.packed, "packed_column_bits": pack(coded.column_bits, 4)}, [params]
    if isinstance(how, GPTQ):
        base = gptq(weight, hessians.sum(0), how.bits, group_size, how.damping, how.ridge)
    else:
        base = _ROUNDING[how.method](weight, how.bits, group_size)
    ridge = how.ridge if isinstance(how, GPTQ) else GPTQ().ridge
    fitted = [base] if len(intervals) == 1 else [refit(weight, base, hessian, ridge) for hessian in hessians]
    stored = {"packed": pack(base.codes, how.bits, group_size)}
    return stored, [
        TimeGroupParams(time_range, f.scale, f.zero_point, f.group_size)
        for time_range, f in zip(intervals, fitted, strict=True)
    ]


def coded_weight(weight: Tensor, name: str, config: ThermoConfig, bits: int) -> dict[str, Tensor]:
    """What is stored of a weight that is quantized without calibration.

    Args:
        weight: some rows of it, ``(rows, in_features)``.
        name: for errors.
        config: how to quantize.
        bits: number of bits of a code.

    Returns:
        ``packed`` ``(rows, bytes)``, ``weight_scale`` and ``weight_zero_point`` ``(1, rows, groups)``.
    """
    check_weight(weight, name)
    group_size = config.group_size or weight.shape[1]
    found = _ROUNDING.get(config.quantizer, least_squares)(weight, bits, group_size)
    parameters = {"weight_scale": found.scale[None], "weight_zero_point": found.zero_point[None]}
    return {"packed": pack(found.codes, bits, group_size), **parameters}


def code_tables(lm: QuantizedLM) -> None:
    """Put codes in the place of embeddings and head, if the configuration says so."""
    for name in coded_tables(lm.model, lm.config):
        weight = lm.model.get_submodule(name).weight.detach()
        stored = coded_weight(weight, f"{name}.weight", lm.config, lm.config.embedding_bits)
        install_table(lm, name, stored, lm.model.model.norm.weight.dtype)


def input_hessians(
    lm: DiffusionLM,
    calibration: Calibration,
    names: list[str],
    groups: TimeGroups,
    importance: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """``sum x x^T`` of the inputs of some linears, by time group.

    Args:
        lm: the model, some of whose blocks may be quantized already.
        calibration: the states.
        names: the linears.
        groups: the time groups.
        importance: name to the weights of the sum's tokens, ``(states, length)`` for each part of the calibration; of
            the linears that it doesn't name all tokens count 1.

    Returns:
        Name to float64 ``(groups, in_features, in_features)``.
    """
    hessians = {
        name: torch.zeros((groups.num_groups, *[lm.model.get_submodule(name).in_features] * 2), dtype=torch.float64)
        for name in names
    }

    weights = {name: _in_batches(importance[name], calibration) for name in names if name in importance}

    def accumulate(name: str, x: Tensor, is_masked: Tensor, timestep: int) -> None:
        x = x.float()  # float16 doesn't reach the squares of its numbers
        weighted = x * next(weights[name]) if name in weights else x
        hessians[name][groups.group_of(timestep * groups.timesteps // calibration.timesteps)] += x.T @ weighted

    run_states(lm, calibration, names, accumulate)
    return hessians


def _in_batches(importance: Sequence[Tensor], calibration: Calibration) -> Iterator[Tensor]:
    """Tokens' weights as ``run_states`` brings the tokens, ``(tokens, 1)``."""
    return (importance[number][rows].reshape(-1, 1) for number, _, rows in calibration.batches())


def quantize_weights(lm: QuantizedLM, calibration: Calibration | None, progress: bool) -> None:
    config = lm.config
    names = linear_names(lm.model)
    label = f"{config.quantizer} {config.precision}"
    if config.quantizer in _ROUNDING and config.weight_groups.num_groups == 1:
        for name in tqdm(names, desc=label, disable=not progress, leave=False):
            quantize_layer(lm, name, None, {})
        return

    importance: dict[str, list[Tensor]] = {}
    sites = shared_inputs(lm, names)
    if counts_tokens(config):
        importance = token_importance(lm, calibration, names, config.seed, "importance" if progress else None)
        sites = [[name] for name in names]  # the same input counts by what the output is worth
    column_bits = bits_by_column(lm, calibration, importance)
    for block in tqdm(names_by_block(names).values(), desc=label, disable=not progress, leave=False):
        site_of = {site[0]: site for site in sites if site[0] in block}
        hessians = input_hessians(lm, calibration, list(site_of), config.weight_groups, importance)
        for first, site in site_of.items():
            for name in site:
                quantize_layer(lm, name, hessians[first], column_bits)


def quantize_layer(lm: QuantizedLM, name: str, hessians: Tensor | None, column_bits: Mapping[str, Tensor]) -> None:
    """Quantize one linear, under the Hessians of its time groups if any, and put the quantized layer in its place."""
    weight = lm.model.get_submodule(name).weight.detach()
    stored, lm.weight_params[name] = _coded_layer(weight, name, hessians, lm.config, column_bits.get(name))
    install_layer(lm, name, stored)


def bits_by_column(
    lm: DiffusionLM, calibration: Calibration, importance: Mapping[str, Sequence[Tensor]]
) -> dict[str, Tensor]:
    """The bits of every column of a model that is to be trellis-coded; empty for the other quantizers.

    Args:
        lm: the model, not quantized yet, with the configuration.
        calibration: the states.
        importance: of the tokens, as for ``input_hessians``.
    """
    how = lm.config.weights
    if not isinstance(how, Trellis):
        return {}
    linears = {name: lm.model.get_submodule(name) for name in linear_names(lm.model)}
    if not how.spread:
        return {n: torch.full((linear.in_features,), int(how.bits)) for n, linear in linears.items()}
    hessians = input_hessians(lm, calibration, list(linears), lm.config.weight_groups, importance)
    costs = {n: column_costs(linear.weight, hessians[n][0], how.damping) for n, linear in linears.items()}
    return allocate_bits(costs, {n: linear.out_features for n, linear in linears.items()}, how.bits)


def counts_tokens(config: ThermoConfig) -> bool:
    """Whether the tokens of the Hessians count by what an error there costs in path KL."""
    return getattr(config.weights, "token_weights", "uniform") == "path_kl"

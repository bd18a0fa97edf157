"""Quantize the weights of a model: its linears block after block, and its tables of embeddings.

Where calibration is needed the blocks are quantized in order, each on the inputs that the blocks before it, already
quantized, give it."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn
from tqdm import tqdm

from thermo_lib.diffusion.inputs import run_states
from thermo_lib.diffusion.states import Calibration
from thermo_lib.files.snapshots import Snapshot
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.models.streamed import keep
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import (
    QuantizedLM,
    coded_tables,
    install_layer,
    install_table,
    linear_names,
    names_by_block,
    part_as,
)
from thermo_lib.pipeline.progress import BlockSnapshots
from thermo_lib.pipeline.quantizers import ROUNDING, Quantizer, quantizer_of
from thermo_lib.quant.codes import check_weight, pack
from thermo_lib.quant.hessians import Hessians
from thermo_lib.quant.rounding import least_squares
from thermo_lib.time_aware.groups import TimeGroups
from thermo_lib.transition.blocks import BlockStream, decisive_dtype
from thermo_lib.transition.loss import token_importance


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
    found = ROUNDING.get(type(config.weights), least_squares)(weight, bits, group_size)
    parameters = {"weight_scale": found.scale[None], "weight_zero_point": found.zero_point[None]}
    return {"packed": pack(found.codes, bits, group_size), **parameters}


def code_tables(lm: QuantizedLM) -> None:
    """Put codes in the place of embeddings and head, if the configuration says so."""
    for name in coded_tables(lm.model, lm.config):
        weight = lm.model.get_parameter(f"{name}.weight").detach()
        stored = coded_weight(weight, f"{name}.weight", lm.config, lm.config.embedding_bits)
        install_table(lm, name, stored, lm.model.norm.weight.dtype)


def input_hessians(
    lm: DiffusionLM,
    calibration: Calibration,
    names: list[str],
    groups: TimeGroups,
    token_weights: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """``sum x x^T`` of the inputs of some linears, by time group.

    Args:
        lm: the model, some of whose blocks may be quantized already.
        calibration: the states.
        names: the linears.
        groups: the time groups.
        token_weights: name to what each token counts, ``(states, length)`` for each part of the calibration; the tokens
            of linears that it doesn't name count 1.

    Returns:
        Name to float64 ``(groups, in_features, in_features)``.
    """
    calibration = calibration.to(lm.device)
    found = Hessians({name: lm.model.get_submodule(name) for name in names}, groups.num_groups)
    weights = {name: _in_batches(token_weights[name], calibration) for name in names if name in token_weights}

    def receive(name: str, x: Tensor, is_masked: Tensor, timestep: int) -> None:
        group = groups.group_of(timestep * groups.timesteps // calibration.timesteps)
        found.add(name, x, group, next(weights[name]) if name in weights else None)

    run_states(lm, calibration, names, receive)
    return found.sums


def _in_batches(token_weights: Sequence[Tensor], calibration: Calibration) -> Iterator[Tensor]:
    """Tokens' weights as ``run_states`` brings the tokens, ``(states, length)``."""
    return (token_weights[number][rows] for number, _, rows in calibration.batches())


def quantize_weights(
    lm: QuantizedLM, calibration: Calibration | None, snapshot: Snapshot | None, progress: bool
) -> None:
    """Quantize all linears.

    Args:
        lm: a copy of the full-precision model, with the configuration; it is quantized in place.
        calibration: the states; None for data-free weights.
        snapshot: where finished blocks are kept, by name and digest; None for nowhere.
        progress: show a bar.
    """
    config, quantizer = lm.config, quantizer_of(lm.config)
    names = linear_names(lm.model)
    label = f"{config.quantizer} {config.precision}"
    if not quantizer.needs_hessians:
        for block, linears in tqdm(names_by_block(names).items(), desc=label, disable=not progress, leave=False):
            keep(lm.model.get_submodule(block))
            for name in linears:
                quantize_layer(lm, quantizer, name, None)
        return

    assert calibration is not None  # what needs Hessians needs calibration
    importance: dict[str, list[Tensor]] = {}
    if counts_tokens(config):
        importance = token_importance(lm, calibration, names, config.seed, "importance" if progress else None)
    prepare_quantizer(lm, quantizer, calibration, importance)
    stream, snapshots = BlockStream(lm, calibration, decisive_dtype(lm)), BlockSnapshots(snapshot)
    for block, linears in tqdm(names_by_block(names).items(), desc=label, disable=not progress, leave=False):
        keep(stream.block)
        if not snapshots.restore(lm, block):
            hessians = stream.hessians(linears, config.weight_groups, importance)
            for name in linears:
                quantize_layer(lm, quantizer, name, hessians[name])
            snapshots.save(lm, block, {})
        if not stream.is_last:
            stream.advance()


def quantize_layer(lm: QuantizedLM, quantizer: Quantizer, name: str, hessians: Tensor | None) -> None:
    """Quantize one linear, under the Hessians of its time groups if any, and put the quantized layer in its place."""
    weight = lm.model.get_parameter(f"{name}.weight").detach()
    stored, lm.weight_params[name] = quantizer.code(name, weight, hessians)
    install_layer(lm, name, stored)


def prepare_quantizer(
    lm: QuantizedLM, quantizer: Quantizer, calibration: Calibration, token_weights: Mapping[str, Sequence[Tensor]]
) -> None:
    """Let a quantizer decide what depends on the whole model, which isn't quantized yet.

    Args:
        lm: the model, with the configuration.
        quantizer: its method.
        calibration: the states.
        token_weights: see ``input_hessians``.
    """
    if not quantizer.needs_all_hessians:
        return
    stream = BlockStream(lm, calibration, decisive_dtype(lm))
    for linears in names_by_block(linear_names(lm.model)).values():
        for name, hessians in stream.hessians(linears, lm.config.weight_groups, token_weights).items():
            quantizer.see(name, part_as(nn.Linear, lm.model, name), hessians.sum(0))
        stream.advance()
    quantizer.decide()


def counts_tokens(config: ThermoConfig) -> bool:
    """Whether the tokens of the Hessians count by what an error there costs in path KL."""
    return getattr(config.weights, "token_weights", "uniform") == "path_kl"

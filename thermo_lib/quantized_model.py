"""Quantize a diffusion language model, save it and load it again.

The linear layers of the blocks are quantized; embeddings, head and norms stay as they are. Where calibration
is needed the blocks are quantized in order, each on the inputs that the blocks before it, already quantized,
give it.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig

from thermo_lib.architectures import MaskPredictor, config_json, read_config, read_object, skeleton, tensor_name
from thermo_lib.calibration import Calibration, calibrate, run_states, shared_inputs
from thermo_lib.config import ThermoConfig, TrainingStates, Transitions
from thermo_lib.data import TASKS, encode_puzzles, knows_tasks, make_puzzles
from thermo_lib.models import (
    HEAD,
    WEIGHTS_NAME,
    DiffusionLM,
    check_full_precision,
    fill,
    load_model,
    model_folder,
    read_tensors,
    take_expected,
    write_folder,
)
from thermo_lib.params import default
from thermo_lib.quant import (
    QuantizedEmbedding,
    QuantizedLinear,
    check_weight,
    gptq,
    least_squares,
    pack,
    refit,
    round_to_nearest,
    unpack,
)
from thermo_lib.ranges import InputSample, TrainableRanges, clipped_ranges, fit_to_output, input_samples, output_error
from thermo_lib.reconstruction import BlockStream, fit_block
from thermo_lib.snapshots import Snapshot, digest, named, part_of
from thermo_lib.time_aware import BoundarySmoother, TimeGroupParams, TimeGroups
from thermo_lib.tokenization import read_chat_template, read_tokenizer, save_tokenizer
from thermo_lib.transition import (
    Batch,
    CalibrationDraws,
    Chains,
    TrainableLayers,
    TrainableWeight,
    TransitionLoss,
    fit_to_path_kl,
    token_importance,
)
from thermo_lib.trellis import MOST_BITS, TrellisLinear, allocate_bits, column_costs, trellis

TABLES = ("model.embed_tokens", "lm_head")
_ROUNDING = {"rtn": round_to_nearest, "least_squares": least_squares}


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
        if self.config.num_time_groups == 1:
            return {}
        return self.activation_params if self.config.activation_bits < 16 else self.weight_params

    def smoothed_params(self) -> dict[str, list[TimeGroupParams]]:
        """The time-dependent parameters after smoothing: per layer one entry a timestep."""
        whole = self.config.activation_bits < 16
        return {name: _smooth(params, self.config, whole) for name, params in self.time_params.items()}

    def stored_bits(self, name: str) -> int:
        """Bits stored for the weights of a quantized layer: codes and parameters, of every time group."""
        layer = self.quantized_layers()[name]
        bits = sum(getattr(layer, key).numel() * 8 for key in layer.STORED)
        parameters = len(_parameter_names("weight", self.config))
        return bits + sum(parameters * params.scale.numel() * 16 for params in self.weight_params[name])

    def quantized_layers(self) -> dict[str, QuantizedLinear]:
        """The quantized linears inside the blocks by name."""
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, QuantizedLinear)}
        return {name: layer for name, layer in layers.items() if name not in TABLES}

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for the quantized linears, codes and all their parameters, for each weight."""
        bits, weights = 0, 0
        for name, layer in self.quantized_layers().items():
            weights += layer.in_features * layer.out_features
            bits += self.stored_bits(name)
            for params in self.activation_params.get(name, []):
                bits += (params.scale.numel() + params.zero_point.numel()) * 32
        return bits / weights


def linear_names(model: MaskPredictor) -> list[str]:
    """Names of the linears that are quantized: all inside the blocks, in order."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]


def _blocks(names: list[str]) -> dict[str, list[str]]:
    """Block name, e.g. ``model.layers.0``, to the names of its layers."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(".".join(name.split(".")[:3]), []).append(name)
    return blocks


def _layer_type(config: ThermoConfig) -> type[QuantizedLinear]:
    return TrellisLinear if config.quantizer == "trellis" else QuantizedLinear


def _install(lm: QuantizedLM, name: str, stored: Mapping[str, Tensor]) -> None:
    """Put a quantized layer with these codes in the place of a linear; its weight parameters are known.

    Args:
        lm: the model.
        name: of the layer.
        stored: the layer's buffers that hold the codes.
    """
    linear = lm.model.get_submodule(name)
    layer = _layer_type(lm.config)(
        linear.in_features,
        linear.out_features,
        bits=lm.config.bit_width,
        group_size=lm.config.group_size,
        bias=linear.bias is not None,
        timesteps=lm.config.timesteps,
    )
    for key, tensor in stored.items():
        setattr(layer, key, tensor)
    if linear.bias is not None:
        layer.bias = linear.bias.detach().clone()
    _install_weights(layer, lm.weight_params[name], lm.config)
    parent, _, child = name.rpartition(".")
    setattr(lm.model.get_submodule(parent), child, layer)


def _install_weights(layer: QuantizedLinear, params: list[TimeGroupParams], config: ThermoConfig) -> None:
    rows, row_of_step = _table(params, config, whole_zero_points=False)
    like = {"device": layer.packed.device, "dtype": torch.float16}
    layer.scale = torch.stack([row.scale for row in rows]).to(**like)
    layer.zero_point = torch.stack([row.zero_point for row in rows]).to(**like)
    layer.weight_row = row_of_step.to(layer.packed.device)


def _install_activations(layer: QuantizedLinear, params: list[TimeGroupParams], config: ThermoConfig) -> None:
    layer.activation_bits, layer.activation_clip = config.activation_bits, config.activation_clip
    layer.activation_group_size = config.activation_group_size or layer.in_features
    if config.activation_ranges == "static":
        rows, row_of_step = _table(params, config, whole_zero_points=True)
        like = {"device": layer.packed.device, "dtype": torch.float32}
        layer.activation_scale = torch.stack([row.scale for row in rows]).to(**like)
        layer.activation_zero_point = torch.stack([row.zero_point for row in rows]).to(**like)
        layer.activation_row = row_of_step.to(layer.packed.device)


def install_dynamic_ranges(lm: QuantizedLM) -> None:
    """Quantize the inputs of all quantized linears in ranges of each token, if the configuration says so."""
    if lm.config.activation_bits < 16 and not lm.config.has_static_ranges:
        for layer in lm.quantized_layers().values():
            _install_activations(layer, [], lm.config)


def _smooth(params: list[TimeGroupParams], config: ThermoConfig, whole_zero_points: bool) -> list[TimeGroupParams]:
    """One entry a timestep, as the layer uses it.

    Activations keep whole zero points after smoothing, so that an activation of zero stays exactly zero: with a
    fraction, every one of the many near-zero activations is off by the same amount, which more than doubled path KL.
    """
    steps = BoundarySmoother(config.method, config.smoothing_window).smooth(params)
    return _whole(steps) if whole_zero_points else steps


def _whole(params: list[TimeGroupParams]) -> list[TimeGroupParams]:
    return [replace(group, zero_point=group.zero_point.round()) for group in params]


def _table(
    params: list[TimeGroupParams], config: ThermoConfig, *, whole_zero_points: bool
) -> tuple[list[TimeGroupParams], Tensor]:
    """Distinct parameters after smoothing, and the row of each timestep."""
    if len(params) == 1:
        rows = _whole(params) if whole_zero_points else params
        return rows, torch.zeros(config.timesteps, dtype=torch.int32)
    rows: list[TimeGroupParams] = []
    row_of_step = []
    for step in _smooth(params, config, whole_zero_points):
        same = rows and rows[-1].scale.equal(step.scale) and rows[-1].zero_point.equal(step.zero_point)
        if not same:
            rows.append(step)
        row_of_step.append(len(rows) - 1)
    return rows, torch.tensor(row_of_step, dtype=torch.int32)


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
    ridge, damping = default("quant.ridge"), default("quant.damping")
    ranges = config.weight_groups.ranges
    if config.quantizer == "trellis":
        coded = trellis(weight, hessians.sum(0), column_bits, config.group_size, damping, default("trellis.beam"))
        params = TimeGroupParams(ranges[0], coded.scale, torch.zeros_like(coded.scale), coded.group_size)
        return {"packed": coded.packed, "packed_column_bits": pack(coded.column_bits, 4)}, [params]
    if config.quantizer == "gptq":
        base = gptq(weight, hessians.sum(0), config.bit_width, config.group_size, damping, ridge)
    else:
        base = _ROUNDING[config.quantizer](weight, config.bit_width, config.group_size)
    fitted = [base] if len(ranges) == 1 else [refit(weight, base, hessian, ridge) for hessian in hessians]
    stored = {"packed": pack(base.codes, config.bit_width, config.group_size)}
    return stored, [
        TimeGroupParams(time_range, f.scale, f.zero_point, f.group_size)
        for time_range, f in zip(ranges, fitted, strict=True)
    ]


def coded_weight(weight: Tensor, name: str, config: ThermoConfig, bits: int) -> dict[str, Tensor]:
    """What is stored of a weight that is quantized without calibration.

    Args:
        weight: some rows of it, ``(rows, in_features)``.
        name: for errors.
        config: how to quantize.
        bits: of a code.

    Returns:
        ``packed`` ``(rows, bytes)``, ``weight_scale`` and ``weight_zero_point`` ``(1, rows, groups)``.
    """
    check_weight(weight, name)
    found = _ROUNDING.get(config.quantizer, least_squares)(weight, bits, config.group_size)
    parameters = {"weight_scale": found.scale[None], "weight_zero_point": found.zero_point[None]}
    return {"packed": pack(found.codes, bits, config.group_size), **parameters}


def code_tables(lm: QuantizedLM) -> None:
    """Put codes in the place of embeddings and head, if the configuration says so."""
    for name in coded_tables(lm.model, lm.config):
        weight = lm.model.get_submodule(name).weight.detach()
        stored = coded_weight(weight, f"{name}.weight", lm.config, lm.config.embedding_bits)
        _install_table(lm, name, stored, lm.model.model.norm.weight.dtype)


def _install_table(lm: QuantizedLM, name: str, stored: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Put a coded table in the place of the embeddings, of a head that is tied to them, or of the head."""
    how = {"bits": lm.config.embedding_bits, "group_size": lm.config.group_size}
    rows, columns = lm.model.config.vocab_size, lm.model.config.hidden_size
    for table in TABLES if lm.model.config.tie_word_embeddings else (name,):
        if table == "lm_head":
            module = QuantizedLinear(columns, rows, bias=False, **how)
        else:
            module = QuantizedEmbedding(rows, columns, dtype=dtype, **how)
        module.packed = stored["packed"]
        module.scale, module.zero_point = stored["weight_scale"], stored["weight_zero_point"]
        parent, _, child = table.rpartition(".")
        setattr(lm.model.get_submodule(parent), child, module)


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
        weighted = x * next(weights[name]) if name in weights else x
        hessians[name][groups.group_of(timestep * groups.timesteps // calibration.timesteps)] += x.T @ weighted

    run_states(lm, calibration, names, accumulate)
    return hessians


def _in_batches(importance: Sequence[Tensor], calibration: Calibration) -> Iterator[Tensor]:
    """Tokens' weights as ``run_states`` brings the tokens, ``(tokens, 1)``."""
    return (importance[number][rows].reshape(-1, 1) for number, _, rows in calibration.batches())


def _quantize_weights(lm: QuantizedLM, calibration: Calibration | None, progress: bool) -> None:
    config = lm.config
    names = linear_names(lm.model)
    label = f"{config.quantizer} {config.precision}"
    if config.quantizer in _ROUNDING and config.weight_groups.num_groups == 1:
        for name in tqdm(names, desc=label, disable=not progress, leave=False):
            quantize_layer(lm, name, None, {})
        return

    importance: dict[str, list[Tensor]] = {}
    sites = shared_inputs(lm, names)
    if config.hessian == "transition":
        importance = token_importance(lm, calibration, names, default("seed"), "importance" if progress else None)
        sites = [[name] for name in names]  # the same input counts by what the output is worth
    column_bits = _column_bits(lm, calibration, importance)
    for block in tqdm(_blocks(names).values(), desc=label, disable=not progress, leave=False):
        site_of = {site[0]: site for site in sites if site[0] in block}
        hessians = input_hessians(lm, calibration, list(site_of), config.weight_groups, importance)
        for first, site in site_of.items():
            for name in site:
                quantize_layer(lm, name, hessians[first], column_bits)


def quantize_layer(lm: QuantizedLM, name: str, hessians: Tensor | None, column_bits: Mapping[str, Tensor]) -> None:
    """Quantize one linear, under the Hessians of its time groups if any, and put the quantized layer in its place."""
    weight = lm.model.get_submodule(name).weight.detach()
    stored, lm.weight_params[name] = _coded_layer(weight, name, hessians, lm.config, column_bits.get(name))
    _install(lm, name, stored)


def _column_bits(
    lm: DiffusionLM, calibration: Calibration, importance: Mapping[str, Sequence[Tensor]]
) -> dict[str, Tensor]:
    """The bits of every column of a model that is to be trellis-coded; empty for the other quantizers.

    Args:
        lm: the model, not quantized yet, with the configuration.
        calibration: the states.
        importance: of the tokens, as for ``input_hessians``.
    """
    config = lm.config
    if config.quantizer != "trellis":
        return {}
    linears = {name: lm.model.get_submodule(name) for name in linear_names(lm.model)}
    if config.average_bits is None:
        return {n: torch.full((linear.in_features,), config.bit_width) for n, linear in linears.items()}
    hessians = input_hessians(lm, calibration, list(linears), config.weight_groups, importance)
    costs = {n: column_costs(linear.weight, hessians[n][0], default("quant.damping")) for n, linear in linears.items()}
    return allocate_bits(costs, {n: linear.out_features for n, linear in linears.items()}, config.average_bits)


def _quantize_sequentially(
    lm: QuantizedLM, reference: DiffusionLM, calibration: Calibration, snapshot: Snapshot | None, progress: bool
) -> None:
    """Quantize site after site, each time training the rest of the block for the block's output.

    A site are the linears that share an input. What isn't quantized yet of the block, and the scales of what is, make
    up for the errors so far.
    """
    config = lm.config
    names = linear_names(reference.model)
    blocks = _blocks(names)
    importance = token_importance(
        reference, calibration, [*names, *blocks], default("seed"), "importance" if progress else None
    )
    counted = importance if config.hessian == "transition" else {}
    column_bits = _column_bits(lm, calibration, counted)
    stream = BlockStream(reference, lm, calibration)
    _go_on(lm, snapshot)
    install_dynamic_ranges(lm)
    for site in tqdm(
        shared_inputs(reference, names), desc=f"sequential {config.precision}", disable=not progress, leave=False
    ):
        number, (block, linears) = next((i, b) for i, b in enumerate(blocks.items()) if site[0] in b[1])
        if site[0] == linears[0]:
            stream.enter(number)
        phase = f"block {number}: {', '.join(name.rpartition('.')[2] for name in site)}"
        if phase not in lm.losses:
            for name, hessian in stream.hessians(number, {name: counted.get(name) for name in site}).items():
                quantize_layer(lm, name, hessian[None], column_bits)
                if config.activation_ranges == "dynamic":
                    _install_activations(lm.model.get_submodule(name), [], config)
            lm.losses[phase] = _fit_rest(lm, stream, number, linears, importance[block])
            _keep(lm, snapshot)
        if site[-1] == linears[-1]:
            stream.leave(number)
    for layer in lm.quantized_layers().values():
        layer.activation_bits = 16


def _fit_rest(
    lm: QuantizedLM, stream: BlockStream, number: int, linears: Sequence[str], importance: Sequence[Tensor]
) -> list[float]:
    """Train a block's linears that aren't quantized yet, and the scales of those that are; the loss of each step."""
    settings, sequential = default("reconstruction"), default("sequential")
    layers = lm.quantized_layers()
    weights = _trainable_weights({name: layers[name] for name in linears if name in layers})
    rest = [lm.model.get_submodule(name).weight.requires_grad_() for name in linears if name not in layers]
    with TrainableLayers(lm, {}, weights):
        losses = fit_block(
            stream,
            number,
            importance,
            _weight_rates(weights.values(), settings) | dict.fromkeys(rest, sequential["weight_lr"]),
            steps=sequential["steps"],
            batch=settings["batch"],
            seed=default("seed"),
        )
    for tensor in rest:
        tensor.requires_grad_(False)
    _store_weights(lm, weights)
    return losses


def _snapshot(
    resume: str | Path | None,
    phase: str,
    config: ThermoConfig,
    reference: DiffusionLM,
    calibration: Calibration | None,
    start: DiffusionLM | None = None,
) -> Snapshot | None:
    """Where a phase of training is kept, under a digest of all that it depends on; None without a folder."""
    if resume is None:
        return None
    sections = ("quant", "trellis", "reconstruction", "sequential", "chains", "transition", "seed")
    run = digest(
        config.model_dump(mode="json"),
        {section: default(section) for section in sections},
        *(lm.model.state_dict() for lm in (reference, start) if lm is not None),
        calibration.tensors() if calibration is not None else None,
    )
    return Snapshot(Path(resume) / f"{phase}.safetensors", run)


def _keep(lm: QuantizedLM, snapshot: Snapshot | None) -> None:
    """Take a snapshot of a model some of whose sites or blocks have been trained."""
    if snapshot is not None:
        losses = {phase: torch.tensor(values, dtype=torch.float64) for phase, values in lm.losses.items()}
        snapshot.save(named("model", lm.model.state_dict()) | named("losses", losses))


def _go_on(lm: QuantizedLM, snapshot: Snapshot | None) -> None:
    """Bring a model to where the last snapshot was taken."""
    state = snapshot.load() if snapshot is not None else {}
    if not state:
        return
    model = part_of(state, "model")
    for name, layer in list(lm.model.named_modules()):
        if f"{name}.packed" not in model:
            continue
        scale, zero_point = (model[f"{name}.{key}"][0] for key in ("scale", "zero_point"))
        lm.weight_params[name] = [TimeGroupParams((0, lm.config.timesteps), scale, zero_point, lm.config.group_size)]
        if not isinstance(layer, QuantizedLinear):
            _install(lm, name, {key: model[f"{name}.{key}"] for key in _layer_type(lm.config).STORED})
    lm.model.load_state_dict(model)
    lm.losses |= {phase: values.tolist() for phase, values in part_of(state, "losses").items()}


def site_samples(lm: QuantizedLM, calibration: Calibration) -> list[tuple[list[str], InputSample]]:
    """The quantized layers, those that share an input together, with a random sample of that input.

    Args:
        lm: a quantized model.
        calibration: the states.
    """
    sites = shared_inputs(lm, list(lm.quantized_layers()))
    tokens, seed = default("ranges.tokens"), default("seed")
    samples = input_samples(lm, calibration, [site[0] for site in sites], lm.config.timesteps, tokens, seed)
    return [(site, samples[site[0]]) for site in sites]


def _trainable_ranges(scale: Tensor, zero_point: Tensor, config: ThermoConfig) -> TrainableRanges:
    matrix = BoundarySmoother(config.method, config.smoothing_window).weights(config.time_groups.ranges)
    return TrainableRanges(scale, zero_point, matrix, config.activation_bits, config.activation_group_size)


def _present_ranges(lm: QuantizedLM) -> dict[str, TrainableRanges]:
    """The static ranges of every layer's input, trainable; layers that share an input share them."""
    ranges = {}
    for site in shared_inputs(lm, list(lm.activation_params)):
        params = lm.activation_params[site[0]]
        start = torch.stack([p.scale for p in params]), torch.stack([p.zero_point for p in params])
        ranges |= dict.fromkeys(site, _trainable_ranges(*start, lm.config))
    return ranges


def _clip_ranges(lm: QuantizedLM, calibration: Calibration, progress: bool) -> dict[str, TrainableRanges]:
    """Static activation ranges for least squared error of the activations, or then of the layers' outputs.

    Layers that share an input share them.
    """
    config, settings = lm.config, default("ranges")
    layers = lm.quantized_layers()
    sites = site_samples(lm, calibration)
    ranges: dict[str, TrainableRanges] = {}
    for site, sample in tqdm(sites, desc=f"ranges {config.precision}", disable=not progress, leave=False):
        start = clipped_ranges(
            sample,
            config.time_groups,
            config.activation_bits,
            token_states=config.activation_token_states,
            group_size=config.activation_group_size,
        )
        fitted = _trainable_ranges(*start, config)
        if config.range_objective == "output":
            weight = torch.cat([layers[name].weight() for name in site])
            fit_to_output(
                fitted,
                sample,
                weight,
                steps=settings["output_steps"],
                batch=settings["output_batch"],
                lr=settings["output_lr"],
                seed=default("seed"),
            )
        ranges |= dict.fromkeys(site, fitted)
    return ranges


def _quantize_activations(
    lm: QuantizedLM, reference: DiffusionLM | None, calibration: Calibration | None, progress: bool
) -> None:
    if lm.config.activation_ranges == "static":
        ranges, settings = _clip_ranges(lm, calibration, progress), default("ranges")
        if lm.config.range_objective == "path_kl":
            loss = TransitionLoss(reference, lm, calibration.timesteps, ranges)
            fit_to_path_kl(
                loss,
                {p: rate for r in ranges.values() for p, rate in r.rates(settings["path_kl_lr"]).items()},
                CalibrationDraws(loss, calibration, settings["path_kl_batch"], default("seed")),
                steps=settings["path_kl_steps"],
                progress=f"path KL {lm.config.precision}" if progress else None,
            )
        lm.activation_params |= {name: fitted.params(lm.config.time_groups) for name, fitted in ranges.items()}
    for name, layer in lm.quantized_layers().items():
        _install_activations(layer, lm.activation_params.get(name, []), lm.config)


def quantize(
    lm: DiffusionLM,
    config: ThermoConfig,
    calibration: Calibration | None = None,
    *,
    resume: str | Path | None = None,
    progress: bool = False,
) -> QuantizedLM:
    """Quantize a full-precision model into a new one; the given model stays as it is.

    Args:
        lm: the full-precision model.
        config: how to quantize.
        calibration: states to fit on; needed by ``gptq``, ``trellis``, time groups and static activation ranges.
        resume: folder where training (reconstruction and transitions) keeps snapshots; the same call goes on from
            them, with the same result. They stay when it is done.
        progress: show bars.

    Raises:
        ValueError: the model is quantized already or not on the CPU, the configuration needs calibration and there is
            none, a weight holds NaN or infinity, or ``resume`` has a snapshot of another run.
    """
    if config.needs_calibration and calibration is None:
        raise ValueError(
            f"calibration: found None, required by quantizer={config.quantizer!r}, "
            f"num_time_groups={config.num_time_groups}, activation_bits={config.activation_bits} "
            f"({config.activation_ranges}); without it use rtn or least_squares at activation_bits=16"
        )
    if isinstance(lm, QuantizedLM):
        raise ValueError(f"lm: found a model quantized to {lm.config.precision}, expected a full-precision one")
    if lm.model.device.type != "cpu":
        raise ValueError(f"lm: found a model on {lm.model.device}, allowed is cpu; what is quantized can be moved")
    sequential = config.reconstruction == "sequential"
    untrained = {**config.model_dump(), "transitions": "none"} | ({} if sequential else {"reconstruction": "none"})
    # Weights are fitted without smoothing, which then starts from the groups' original parameters.
    rough = ThermoConfig(**{**untrained, "enable_boundary_smoothing": False})
    quantized = QuantizedLM(
        copy.deepcopy(lm.model), lm.tokenizer, lm.mask_token_id, lm.name, rough, chat_template=lm.chat_template
    )
    with torch.no_grad():
        if sequential:
            fresh = config.training_states == "chains"
            states = _fresh_states(lm, "sequential", config.timesteps, progress) if fresh else calibration
            snapshot = _snapshot(resume, "sequential", config, lm, calibration)
            _quantize_sequentially(quantized, lm, states, snapshot, progress)
        else:
            _quantize_weights(quantized, calibration, progress)
        if config.activation_bits < 16:
            quantized.config = ThermoConfig(**untrained)
            _quantize_activations(quantized, lm, calibration, progress)
        elif config.method:
            quantized = resmooth(quantized, config.method)
    how = {"states": config.training_states, "resume": resume, "progress": progress}
    if config.reconstruction == "blocks":
        quantized = reconstruct_blocks(quantized, lm, calibration, **how)
    if config.transitions != "none":
        quantized = optimize_transitions(quantized, lm, calibration, what=config.transitions, **how)
    code_tables(quantized)
    return quantized


_ACTIVATIONS = frozenset(
    {
        "activation_bits",
        "activation_ranges",
        "activation_clip",
        "activation_group_size",
        "activation_token_states",
        "range_objective",
        "num_time_groups",
        "time_group_starts",
    }
)


def requantize_activations(
    lm: QuantizedLM,
    calibration: Calibration | None = None,
    *,
    reference: DiffusionLM | None = None,
    progress: bool = False,
    **changes: object,
) -> QuantizedLM:
    """The same quantized weights with other activation settings; the given model stays as it is.

    Args:
        lm: a quantized model whose weights don't depend on the timestep.
        calibration: states to fit static ranges on.
        reference: the full-precision model, needed to fit to path KL.
        progress: show a bar.
        changes: new values of the activation settings, the time groups and smoothing.

    Raises:
        ValueError: a field that belongs to the weights, time-dependent weights, missing calibration or reference.
    """
    _check_changes(changes, _ACTIVATIONS | _SMOOTHING)
    config = ThermoConfig(**{**lm.config.model_dump(), **changes})
    _check_constant_weights(lm)
    if config.activation_bits == 16 and config.num_time_groups > 1:
        raise ValueError(_TIME_DEPENDENT)
    if config.activation_bits < 16 and config.activation_ranges == "static" and calibration is None:
        raise ValueError("calibration: found None, required by static activation ranges")
    if config.activation_bits < 16 and config.range_objective == "path_kl" and reference is None:
        raise ValueError("reference: found None, required by range_objective='path_kl'")
    changed = _copy(lm, config, {})
    for layer in changed.quantized_layers().values():
        layer.activation_bits = 16
        layer.activation_scale = layer.activation_zero_point = torch.empty((0, 1, 1))
    if config.activation_bits < 16:
        with torch.no_grad():
            _quantize_activations(changed, reference, calibration, progress)
    return changed


_TIME_DEPENDENT = "num_time_groups: found time-dependent weights, expected weights of one time group"


def _check_constant_weights(lm: QuantizedLM) -> None:
    if any(len(params) > 1 for params in lm.weight_params.values()):
        raise ValueError(_TIME_DEPENDENT)


_SMOOTHING = frozenset({"enable_boundary_smoothing", "smoothing_method", "smoothing_window"})


def _check_changes(changes: dict[str, object], allowed: Iterable[str]) -> None:
    other = sorted(changes.keys() - set(allowed))
    if other:
        raise ValueError(f"{other[0]}: can't change without quantizing again, allowed are {', '.join(sorted(allowed))}")


def _copy(lm: QuantizedLM, config: ThermoConfig, activation_params: dict[str, list[TimeGroupParams]]) -> QuantizedLM:
    model = copy.deepcopy(lm.model)
    parameters = dict(lm.weight_params), dict(activation_params)
    return QuantizedLM(
        model,
        lm.tokenizer,
        lm.mask_token_id,
        lm.name,
        config,
        *parameters,
        dict(lm.losses),
        chat_template=lm.chat_template,
    )


def resmooth(lm: QuantizedLM, method: str | None, window: int | None = None) -> QuantizedLM:
    """The same quantized model with other boundary smoothing, nothing fitted again.

    Args:
        lm: a quantized model.
        method: ``linear``, ``cubic``, ``sigmoid`` or None.
        window: timesteps on each side; by default as before.

    Raises:
        ValueError: unknown method or window out of range.
    """
    changes = {
        "enable_boundary_smoothing": method is not None,
        "smoothing_method": method or lm.config.smoothing_method,
        "smoothing_window": lm.config.smoothing_window if window is None else window,
    }
    config = ThermoConfig(**{**lm.config.model_dump(), **changes})
    changed = _copy(lm, config, lm.activation_params)
    for name, layer in changed.quantized_layers().items():
        _install_weights(layer, lm.weight_params[name], config)
        if config.activation_bits < 16:
            _install_activations(layer, lm.activation_params.get(name, []), config)
    return changed


@torch.no_grad()
def smooth_each_layer(
    lm: QuantizedLM,
    calibration: Calibration,
    methods: Sequence[str],
    windows: Sequence[int],
    *,
    reference: DiffusionLM | None = None,
    progress: bool = False,
) -> QuantizedLM:
    """Give every layer input the method and window, or no smoothing, that costs least.

    The choice is stored as parameters of every timestep, so the model has as many time groups as timesteps.

    Args:
        lm: a model with static activation ranges in time groups, smoothing off.
        calibration: states to choose on.
        methods, windows: what to choose from.
        reference: the full-precision model: what costs least path KL is chosen, layer after layer, on
            ``ranges.choice_states`` states of each part of the calibration. Without it, what costs the layers'
            output least.
        progress: show a bar.
    """
    config, layers, ranges = lm.config, lm.quantized_layers(), _present_ranges(lm)
    smoothers = [
        BoundarySmoother(None, 1),
        *(BoundarySmoother(method, window) for method in methods for window in windows),
    ]
    matrices = [smoother.weights(config.time_groups.ranges).float() for smoother in smoothers]
    distinct = [i for i, m in enumerate(matrices) if not any(m.equal(earlier) for earlier in matrices[:i])]
    samples = site_samples(lm, calibration)
    if reference is not None:
        loss = TransitionLoss(reference, lm, calibration.timesteps, ranges)
        generator = torch.Generator().manual_seed(default("seed"))
        states = [
            part[torch.randperm(len(part.ids), generator=generator)[: default("ranges.choice_states")]]
            for part in calibration.parts
        ]
        targets = [loss.targets(drawn) for drawn in states]
    chosen: dict[str, list[TimeGroupParams]] = {}
    for site, sample in tqdm(samples, desc="smoothing by layer", disable=not progress, leave=False):
        fitted = ranges[site[0]]
        weight = torch.cat([layers[name].weight() for name in site])

        def cost(index: int, fitted=fitted, sample=sample, weight=weight) -> float:
            fitted.weights = matrices[index]
            if reference is None:
                return output_error(fitted, sample, weight)
            with loss:
                return sum(float(loss(drawn, aim)) for drawn, aim in zip(states, targets, strict=True))

        best = min(distinct, key=cost)
        fitted.weights = matrices[best]
        chosen |= dict.fromkeys(site, smoothers[best].smooth(lm.activation_params[site[0]]))
    every = {"num_time_groups": config.timesteps, "time_group_starts": None, "enable_boundary_smoothing": False}
    changed = _copy(lm, ThermoConfig(**{**config.model_dump(), **every}), chosen)
    for name, layer in changed.quantized_layers().items():
        _install_activations(layer, chosen[name], changed.config)
    return changed


def _trainable_weights(
    layers: Mapping[str, QuantizedLinear], targets: MaskPredictor | None = None
) -> dict[str, TrainableWeight]:
    """The layers' weights, their codes too where the full-precision model is given."""
    return {
        name: TrainableWeight(layer, targets.get_submodule(name).weight if targets is not None else None)
        for name, layer in layers.items()
    }


def _weight_rates(weights: Iterable[TrainableWeight], settings: Mapping[str, float]) -> dict[nn.Parameter, float]:
    """The learning rates of what is trained of the weights, from a section of ``params.yaml``."""
    rates: dict[nn.Parameter, float] = {}
    for weight in weights:
        rates[weight.log_scale] = settings["scale_lr"]
        rates |= {weight.zero_point: settings["zero_point_lr"]} if weight.zero_point.requires_grad else {}
        rates |= {weight.position: settings["code_lr"]} if isinstance(weight.position, nn.Parameter) else {}
    return rates


def _store_weights(lm: QuantizedLM, weights: Mapping[str, TrainableWeight]) -> None:
    layers = lm.quantized_layers()
    for name, weight in weights.items():
        params = TimeGroupParams((0, lm.config.timesteps), *weight.stored(), weight.group_size)
        lm.weight_params[name] = [params]
        codes = weight.packed()
        layers[name].packed = layers[name].packed if codes is None else codes
        _install_weights(layers[name], [params], lm.config)


def reconstruct_blocks(
    lm: QuantizedLM,
    reference: DiffusionLM,
    calibration: Calibration | None = None,
    *,
    states: TrainingStates = "calibration",
    resume: str | Path | None = None,
    progress: bool = False,
) -> QuantizedLM:
    """Train scales, zero points and codes of the weights block by block for the block's output.

    Static activation ranges are left out of account, dynamic ones are not. Settings are the ``reconstruction`` section
    of ``params.yaml``. The given model stays as it is.

    Args:
        lm: a quantized model whose weights don't depend on the timestep.
        reference: the full-precision model.
        calibration: states to train on; not needed with chains.
        states: ``calibration``, or the states of fresh ``chains``, as many as the section says.
        resume: see ``quantize``.
        progress: show bars.

    Raises:
        ValueError: time-dependent weights, unknown ``states``, missing calibration, or a snapshot of another run in
            ``resume``.
    """
    config = _trained_config(lm, calibration, states, reconstruction="blocks")
    settings = default("reconstruction")
    snapshot = _snapshot(resume, "blocks", config, reference, calibration, lm)
    changed = _copy(lm, config, lm.activation_params)
    if states == "chains":
        calibration = _fresh_states(reference, "reconstruction", config.timesteps, progress)
    blocks = _blocks(linear_names(reference.model))
    importance = token_importance(
        reference, calibration, list(blocks), default("seed"), "importance" if progress else None
    )
    _go_on(changed, snapshot)
    layers = changed.quantized_layers()
    static = changed.config.activation_ranges == "static"
    for layer in layers.values():
        layer.activation_bits = 16 if static else changed.config.activation_bits
    stream = BlockStream(reference, changed, calibration)
    for number, (block, linears) in enumerate(blocks.items()):
        stream.enter(number)
        phase = f"block {number}"
        if phase not in changed.losses:
            weights = _trainable_weights({name: layers[name] for name in linears}, reference.model)
            with TrainableLayers(changed, {}, weights):
                changed.losses[phase] = fit_block(
                    stream,
                    number,
                    importance[block],
                    _weight_rates(weights.values(), settings),
                    steps=settings["steps"],
                    batch=settings["batch"],
                    seed=default("seed"),
                    progress=f"{phase} of {len(blocks)}" if progress else None,
                )
            _store_weights(changed, weights)
            _keep(changed, snapshot)
        stream.leave(number)
    for layer in layers.values():
        layer.activation_bits = changed.config.activation_bits
    return changed


def _trained_config(
    lm: QuantizedLM, calibration: Calibration | None, states: TrainingStates, **phase: str
) -> ThermoConfig:
    """The configuration after a phase of training, what it needs checked."""
    _check_constant_weights(lm)
    config = ThermoConfig(**{**lm.config.model_dump(), **phase, "training_states": states})
    if states == "calibration" and calibration is None:
        raise ValueError("calibration: found None, required by states='calibration'")
    return config


def _prompts(lm: DiffusionLM, count: int, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Training puzzles, ``count`` of each task, answers masked: ids and the masks, ``(puzzles, length)``."""
    puzzles = [puzzle for task in TASKS for puzzle in make_puzzles(task, count, seed, test=False)]
    ids, is_answer = encode_puzzles(puzzles, lm.tokenizer, default("data.task_length"))
    return ids.masked_fill(is_answer, lm.mask_token_id), is_answer


def _fresh_states(lm: DiffusionLM, section: str, timesteps: int, progress: bool) -> Calibration:
    """States that no seed of evaluation or calibration makes, of as many trajectories as a section says."""
    settings, seed = default(section), default("seed") + 2
    empty = torch.full((settings["code"], default("data.sequence_length")), lm.mask_token_id)
    batches: list[tuple[Tensor, Tensor | None]] = [(empty, None)]
    if knows_tasks(lm.tokenizer):
        batches.append(_prompts(lm, settings["puzzles"], (seed,)))
    return calibrate(lm, batches, timesteps=timesteps, source="trajectory", seed=seed, progress=progress)


class _FreshChains:
    """Chains of code, and of puzzles where the model knows them, a step of all at a time; see ``transition.Draws``.

    Args:
        loss: the two models.
        own_share: see ``ThermoConfig``.
    """

    def __init__(self, loss: TransitionLoss, own_share: float):
        lm, settings, seed = loss.reference, default("chains"), default("seed")
        empty = torch.full((default("data.sequence_length"),), lm.mask_token_id)
        self.chains = [Chains(loss, lambda _: empty, settings["code"], round(own_share * settings["code"]), seed)]
        if knows_tasks(lm.tokenizer):

            def prompt(number: int) -> Tensor:
                turn, task = divmod(number, len(TASKS))
                return _prompts(lm, 1, (seed, turn))[0][task]

            self.chains.append(Chains(loss, prompt, settings["puzzles"], 0, seed))

    def step(self) -> Batch:
        """The present states of all chains and their targets."""
        return [chain.step() for chain in self.chains]

    def state(self) -> dict[str, Tensor]:
        """Of all chains."""
        states = (named(str(number), chain.state()) for number, chain in enumerate(self.chains))
        return {key: value for state in states for key, value in state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` returned."""
        for number, chain in enumerate(self.chains):
            chain.restore(part_of(state, str(number)))


def optimize_transitions(
    lm: QuantizedLM,
    reference: DiffusionLM,
    calibration: Calibration | None = None,
    *,
    what: Transitions = "parameters",
    states: TrainingStates = "calibration",
    resume: str | Path | None = None,
    progress: bool = False,
) -> QuantizedLM:
    """Train the quantization parameters of all layers together for least path KL; the given model stays as it is.

    What is trained: scales and zero points of the weights, static activation ranges through their smoothing, and where
    asked for the weights' codes, or the norms, biases, embeddings and head. Settings are the sections ``transition``
    and ``chains`` of ``params.yaml``.

    Args:
        lm: a quantized model whose weights don't depend on the timestep.
        reference: the full-precision model.
        calibration: states to train on; not needed with chains.
        what: ``parameters``, ``codes`` or ``network``, see ``ThermoConfig.transitions``.
        states: ``calibration`` or fresh ``chains``.
        resume: see ``quantize``.
        progress: show a bar.

    Raises:
        ValueError: time-dependent weights, an unknown ``what`` or ``states``, missing calibration, or a snapshot of
            another run in ``resume``.
    """
    if what == "none":
        raise ValueError("what: found 'none', allowed are parameters, codes, network")
    config = _trained_config(lm, calibration, states, transitions=what)
    settings = default("transition")
    changed = _copy(lm, config, lm.activation_params)
    layers, ranges = changed.quantized_layers(), _present_ranges(changed)
    weights = _trainable_weights(layers, reference.model if what == "codes" else None)
    rates = {p: rate for r in ranges.values() for p, rate in r.rates(settings["range_lr"]).items()}
    rates |= _weight_rates(weights.values(), settings)
    network = [tensor.requires_grad_() for tensor in _network(changed)] if what == "network" else []
    rates |= dict.fromkeys(network, default("chains.network_lr"))
    fresh = states == "chains"
    steps = default("chains.steps" if fresh else "transition.steps")
    loss = TransitionLoss(reference, changed, config.timesteps if fresh else calibration.timesteps, ranges, weights)
    inputs = list({id(r): r for r in ranges.values()}.values())  # layers that share an input share its ranges
    draws = (
        _FreshChains(loss, config.own_share)
        if fresh
        else CalibrationDraws(loss, calibration, settings["batch"], default("seed"))
    )
    changed.losses["transitions"] = fit_to_path_kl(
        loss,
        rates,
        draws,
        steps=steps,
        penalty=lambda: config.markov_weight * sum(r.roughness() for r in inputs),
        snapshot=_snapshot(resume, "transitions", config, reference, calibration, lm),
        progress=f"transitions {config.precision}" if progress else None,
    )
    for tensor in network:
        tensor.requires_grad_(False)
    _store_weights(changed, weights)
    for name, fitted in ranges.items():
        changed.activation_params[name] = fitted.params(config.time_groups)
        _install_activations(layers[name], changed.activation_params[name], config)
    return changed


def _network(lm: QuantizedLM) -> list[Tensor]:
    """What isn't quantized: norms, embeddings, head and the biases of the quantized linears."""
    biases = [layer.bias for layer in lm.quantized_layers().values() if layer.bias is not None]
    return [*lm.model.parameters(), *biases]


def _parameter_names(kind: str, config: ThermoConfig) -> tuple[str, ...]:
    """The parameters of weights or activations that are stored."""
    symmetric = kind == "weight" and config.quantizer == "trellis"
    return ("scale",) if symmetric else ("scale", "zero_point")


def _group_tensors(kind: str, layers: dict[str, list[TimeGroupParams]], config: ThermoConfig) -> dict[str, Tensor]:
    return {
        f"{name}.{kind}_{key}": torch.stack([getattr(p, key) for p in params]).contiguous()
        for name, params in layers.items()
        for key in _parameter_names(kind, config)
    }


def stored_tensors(lm: QuantizedLM, name: str) -> dict[str, Tensor]:
    """What is stored of a quantized layer's weights: codes, and parameters of the time groups before smoothing."""
    layer = lm.model.get_submodule(name)
    codes = named(name, {key: getattr(layer, key) for key in layer.STORED})
    return codes | _group_tensors("weight", {name: lm.weight_params[name]}, lm.config)


def model_tensors(lm: QuantizedLM) -> dict[str, Tensor]:
    """All that is stored of a quantized model, by the library's names."""
    layers = lm.quantized_layers()
    coded = TABLES if lm.config.embedding_bits < 16 else ()
    inside = {f"{n}.{key}" for n in [*layers, *coded] for key in lm.model.get_submodule(n).state_dict()}
    tensors = {k: v.contiguous() for k, v in lm.model.state_dict().items() if k not in inside}
    if lm.model.config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    for name, layer in layers.items():
        tensors |= stored_tensors(lm, name)
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
    for name in coded_tables(lm.model, lm.config):
        table = lm.model.get_submodule(name)
        values = {"packed": table.packed, "weight_scale": table.scale, "weight_zero_point": table.zero_point}
        tensors |= named(name, values)
    return tensors | _group_tensors("activation", lm.activation_params, lm.config)


def quantized_config_json(config: PreTrainedConfig, thermo: ThermoConfig, dtype: torch.dtype) -> str:
    """``config.json`` of a quantized folder.

    Args:
        config: of the model.
        thermo: how it was quantized.
        dtype: of its norms, in which ``from_pretrained`` computes unless it is told another; the first tensor of the
            file, where it would look otherwise, may be a scale.
    """
    return config_json(config, torch_dtype=str(dtype).removeprefix("torch."), quantization_config=thermo.to_dict())


def save_quantized(lm: QuantizedLM, folder: str | Path) -> None:
    """Write a quantized model: packed codes, time-group parameters before smoothing, config and tokenizer.

    An earlier folder of that name stays as it was until the new one is complete.
    """

    def write(target: Path) -> None:
        tensors = model_tensors(lm)
        stored = {tensor_name(lm.model.config, name): tensor.clone() for name, tensor in tensors.items()}
        save_file(stored, target / WEIGHTS_NAME, metadata={"format": "pt"})
        (target / WEIGHTS_NAME).chmod(0o644)
        text = quantized_config_json(lm.model.config, lm.config, lm.model.model.norm.weight.dtype)
        (target / "config.json").write_text(text, encoding="utf-8")
        save_tokenizer(lm.tokenizer, lm.chat_template, target)

    write_folder(Path(folder), write)


def load_quantized(path: str | Path, *, dtype: torch.dtype = torch.float32) -> QuantizedLM:
    """Load what ``save_quantized`` or ``quantize_checkpoint`` wrote, computing bit for bit what was saved.

    Args:
        path: the folder.
        dtype: of what isn't quantized, and of the computation.

    Raises:
        ValueError: not a folder of a quantized model, or damaged; the message says where and why.
    """
    folder = model_folder(str(path))
    config = read_config(folder)
    try:
        thermo = ThermoConfig.from_dict(read_object(folder / "config.json").get("quantization_config"))
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from error
    found = read_tensors(folder)
    model = skeleton(config)
    lm = QuantizedLM(
        model,
        read_tokenizer(folder),
        config.mask_token_id,
        str(path),
        thermo,
        chat_template=read_chat_template(folder),
    )
    tensors = take_expected(found, config, expected_tensors(model, thermo, found, folder), folder)
    check_types({name: tensor.dtype for name, tensor in found.items()}, folder)
    install(lm, tensors, folder, dtype)
    fill(model, tensors, dtype)
    return lm


def is_quantized(name: str) -> bool:
    """Whether a model is quantized, by its ``config.json``; without that file it isn't."""
    path = model_folder(name) / "config.json"
    return path.is_file() and "quantization_config" in read_object(path)


def load_any(name: str, *, dtype: torch.dtype = torch.float32) -> DiffusionLM:
    """A model, full precision or quantized; raises what ``load_model`` and ``load_quantized`` raise."""
    load = load_quantized if is_quantized(name) else load_model
    return load(name, dtype=dtype)


def coded_tables(model: MaskPredictor, config: ThermoConfig) -> tuple[str, ...]:
    """Which of embeddings and head have codes of their own; a tied head shares those of the embeddings."""
    if config.embedding_bits == 16:
        return ()
    return TABLES[:1] if model.config.tie_word_embeddings else TABLES


def expected_tensors(
    model: MaskPredictor, thermo: ThermoConfig, found: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """What is stored of a quantized model.

    Args:
        model: the model, not quantized.
        thermo: how it was quantized.
        found: stored tensors by the checkpoint's names; of a trellis the sizes depend on ``packed_column_bits``.
        folder: for errors.

    Returns:
        The library's name to a tensor of the right shape, on the meta device.
    """
    names, tables = linear_names(model), coded_tables(model, thermo)
    coded = {*names, *(TABLES if tables else ())}
    expected = {k: v for k, v in model.state_dict().items() if k.removesuffix(".weight") not in coded}
    for name in tables:
        sizes = model.config.vocab_size, model.config.hidden_size
        expected |= _expected_codes(name, *sizes, thermo, thermo.embedding_bits)
    for name in names:
        expected |= _expected_tensors(name, model.get_submodule(name), thermo, thermo.has_static_ranges)
        if thermo.quantizer == "trellis":
            expected |= _expected_streams(name, model.get_submodule(name), model.config, found, folder)
    return expected


def stored_type(name: str) -> torch.dtype | None:
    """The type of a tensor of a quantized folder; None where it may be any of full precision."""
    key = name.rpartition(".")[2]
    if key in ("packed", "packed_column_bits"):
        return torch.uint8
    if key in ("weight_scale", "weight_zero_point"):
        return torch.float16
    return torch.float32 if key in ("activation_scale", "activation_zero_point") else None


def check_types(found: Mapping[str, torch.dtype], where: Path) -> None:
    """Raise ValueError unless tensors of a quantized folder, name to type, have the types of the format."""
    for name, dtype in found.items():
        expected = stored_type(name)
        if expected is None:
            check_full_precision(dtype, name, where)
        elif dtype != expected:
            raise ValueError(f"{where}: tensor {name}: found {dtype}, expected {expected}")


def _check_positive(scales: Tensor, name: str, where: Path) -> None:
    if (scales <= 0).any():
        raise ValueError(f"{where}: tensor {name}: found {scales.min().item():.3g}, allowed is above 0")


def install(lm: QuantizedLM, tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Put what is stored of quantized linears and tables into a model that isn't quantized yet.

    Args:
        lm: the model, with the configuration.
        tensors: by the library's name; those that are installed are taken out.
        folder: for errors.
        dtype: of what isn't quantized, and of the computation.

    Raises:
        ValueError: a scale that isn't positive.
    """
    config, thermo = lm.model.config, lm.config
    kinds = {"weight": lm.weight_params} | ({"activation": lm.activation_params} if thermo.has_static_ranges else {})
    for name in linear_names(lm.model):
        linear, stored_name = lm.model.get_submodule(name), tensor_name(config, name)
        for kind, layers in kinds.items():
            ranges = (thermo.weight_groups if kind == "weight" else thermo.time_groups).ranges
            values = {key: tensors.pop(f"{name}.{kind}_{key}") for key in _parameter_names(kind, thermo)}
            scales = values["scale"]
            _check_positive(scales, f"{stored_name}.{kind}_scale", folder)
            zeros = values.get("zero_point", torch.zeros_like(scales))
            layers[name] = [
                TimeGroupParams(time_range, scale, zero, thermo.group_size if kind == "weight" else None)
                for time_range, scale, zero in zip(ranges, scales, zeros, strict=True)
            ]
        stored = {key: tensors.pop(f"{name}.{key}") for key in _layer_type(thermo).STORED}
        if linear.bias is not None:
            linear.bias = nn.Parameter(tensors.pop(f"{name}.bias").to(dtype), requires_grad=False)
        _install(lm, name, stored)
        if thermo.activation_bits < 16:
            _install_activations(lm.model.get_submodule(name), lm.activation_params.get(name, []), thermo)
    for name in coded_tables(lm.model, thermo):
        stored = {key: tensors.pop(f"{name}.{key}") for key in ("packed", "weight_scale", "weight_zero_point")}
        _check_positive(stored["weight_scale"], f"{tensor_name(config, name)}.weight_scale", folder)
        _install_table(lm, name, stored, dtype)


def _expected_tensors(name: str, linear: nn.Linear, config: ThermoConfig, static: bool) -> dict[str, Tensor]:
    rows, columns = linear.weight.shape
    expected = _expected_codes(name, rows, columns, config, config.bit_width)
    if linear.bias is not None:
        expected[f"{name}.bias"] = linear.bias
    if static:
        channel_groups = -(-columns // (config.activation_group_size or columns))
        shape = (config.num_time_groups, 1 + config.activation_token_states, channel_groups)
        per_group = torch.empty(shape, device="meta")
        expected |= {f"{name}.activation_scale": per_group, f"{name}.activation_zero_point": per_group}
    return expected


def _expected_codes(name: str, rows: int, columns: int, config: ThermoConfig, bits: int) -> dict[str, Tensor]:
    groups = config.weight_groups.num_groups if name not in TABLES else 1
    names = _parameter_names("weight", config) if name not in TABLES else ("scale", "zero_point")
    parameters = torch.empty((groups, rows, -(-columns // config.group_size)), device="meta")
    packed = torch.empty((rows, -(-columns * bits // 8)), device="meta")
    return {f"{name}.packed": packed, **{f"{name}.weight_{key}": parameters for key in names}}


def _expected_streams(
    name: str, linear: nn.Linear, config: PreTrainedConfig, found: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """The codes of a trellis-coded layer, whose size depends on the bits of its columns."""
    rows, columns = linear.weight.shape
    key = f"{name}.packed_column_bits"
    expected = {key: torch.empty(-(-columns // 2), device="meta")}
    named = tensor_name(config, key)
    packed = found.get(named)
    if packed is not None and packed.shape == expected[key].shape:
        check_types({named: packed.dtype}, folder)
        column_bits = unpack(packed, 4, columns)
        if column_bits.max() > MOST_BITS:
            raise ValueError(f"{folder}: tensor {named}: found {column_bits.max()}, allowed are 0..{MOST_BITS}")
        width = -(-int(column_bits.sum()) // 8)
        expected[f"{name}.packed"] = torch.empty((rows, width), device="meta")
    return expected

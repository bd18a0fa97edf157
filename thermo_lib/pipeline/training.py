"""The phases that train a quantized model: sequential quantization, block reconstruction, path KL, time-aware norms."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from thermo_lib.diffusion.inputs import shared_inputs
from thermo_lib.diffusion.prompts import Prompts
from thermo_lib.diffusion.states import Calibration
from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.models.streamed import StreamedLM, held, keep
from thermo_lib.pipeline.activations import check_constant_weights, present_ranges
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import (
    QuantizedLM,
    copied,
    install_activations,
    install_dynamic_ranges,
    install_time_norms,
    install_weights,
    linear_names,
    names_by_block,
    norm_names,
)
from thermo_lib.pipeline.parts import Blocks, PathKL, Phase, Sequential, TimeNorms
from thermo_lib.pipeline.phases import FreshChains, PhaseRun, alone_in_resume
from thermo_lib.pipeline.progress import BlockSnapshots
from thermo_lib.pipeline.quantizers import quantizer_of
from thermo_lib.pipeline.weights import counts_tokens, prepare_quantizer, quantize_layer
from thermo_lib.quant.input_ranges import StaticRanges
from thermo_lib.quant.layers import QuantizedLinear
from thermo_lib.quant.time_norms import refresh_time_norms, time_norms
from thermo_lib.time_aware.groups import TimeGroupParams
from thermo_lib.transition.blocks import BlockStream
from thermo_lib.transition.chains import CalibrationDraws, Draws
from thermo_lib.transition.fit import fit_block, fit_to_path_kl
from thermo_lib.transition.loss import TransitionLoss, token_importance
from thermo_lib.transition.parameters import FixedWeight, TrainableLayers, TrainableWeight


def quantize_sequentially(lm: QuantizedLM, run: PhaseRun[Sequential]) -> None:
    """Quantize shared input after shared input, each time training the rest of the block for the block's output.

    Linears with one input, such as q, k and v, are quantized together. After that the weights still in full precision
    and the scales of the quantized ones are trained to absorb the error made so far.

    Args:
        lm: a copy of the full-precision model, with the configuration; it is quantized in place.
        run: of a phase ``Sequential``.
    """
    config, calibration = lm.config, run.states()
    names = linear_names(run.reference.model)
    blocks = names_by_block(names)
    importance = token_importance(run.reference, calibration, [*names, *blocks], config.seed, run.label("importance"))
    token_weights = importance if counts_tokens(config) else {}
    quantizer = quantizer_of(config)
    prepare_quantizer(lm, quantizer, calibration, token_weights)
    targets, stream = BlockStream(run.reference, calibration), BlockStream(lm, calibration)
    snapshots = BlockSnapshots(run.snapshot)
    shared = shared_inputs(run.reference, names)
    bar = tqdm(total=len(shared), desc=f"sequential {config.precision}", disable=not run.progress, leave=False)
    for number, (block, linears) in enumerate(blocks.items()):
        targets.advance()
        keep(stream.block)
        inside, losses = [names for names in shared if names[0] in linears], {}
        if snapshots.restore(lm, block):
            install_dynamic_ranges(lm)
            bar.update(len(inside))
        else:
            for together in inside:
                hessians = stream.hessians(together, config.weight_groups, token_weights)
                for name in together:
                    quantize_layer(lm, quantizer, name, hessians[name])
                install_dynamic_ranges(lm)
                label = f"block {number}: {', '.join(name.rpartition('.')[2] for name in together)}"
                losses[label] = _fit_rest(lm, run.phase, stream, targets.hidden, linears, importance[block])
                bar.update()
            lm.losses |= losses
            snapshots.save(lm, block, losses)
        if not stream.is_last:
            stream.advance()
    bar.close()


def _fit_rest(
    lm: QuantizedLM,
    phase: Sequential,
    stream: BlockStream,
    targets: Sequence[Tensor],
    linears: Sequence[str],
    importance: Sequence[Tensor],
) -> list[float]:
    """Train a block's linears that aren't quantized yet, and the scales of those that are; the loss of each step."""
    layers = lm.quantized_layers()
    weights = _trainable_weights({name: layers[name] for name in linears if name in layers})
    rest = [lm.model.get_parameter(f"{name}.weight") for name in linears if name not in layers]
    for tensor in rest:
        tensor.requires_grad_()
    with TrainableLayers(lm, {}, weights):
        losses = fit_block(
            stream,
            targets,
            importance,
            _weight_rates(weights.values(), phase) | dict.fromkeys(rest, phase.weight_lr),
            steps=phase.steps,
            batch=phase.batch,
            seed=lm.config.seed,
        )
    for tensor in rest:
        tensor.requires_grad_(False)
    _store_weights(lm, weights)
    return losses


def _trainable_weights(
    layers: Mapping[str, QuantizedLinear], targets: MaskPredictor | None = None, *, holds_codes: bool = True
) -> dict[str, TrainableWeight]:
    """The layers' weights, their codes too where the full-precision model is given."""
    if targets is None:
        return {name: TrainableWeight(layer, holds_codes=holds_codes) for name, layer in layers.items()}
    found: dict[str, TrainableWeight] = {}
    for block, names in names_by_block(list(layers)).items():
        with held(targets.get_submodule(block)):
            found |= {name: TrainableWeight(layers[name], targets.get_parameter(f"{name}.weight")) for name in names}
    return found


def _weight_rates(weights: Iterable[TrainableWeight], phase: Phase) -> dict[nn.Parameter, float]:
    """The learning rates of what is trained of the weights."""
    rates: dict[nn.Parameter, float] = {}
    for weight in weights:
        rates[weight.log_scale] = phase.scale_lr
        rates |= {weight.zero_point: phase.zero_point_lr} if weight.zero_point.requires_grad else {}
        if isinstance(phase, Blocks | PathKL) and isinstance(weight.position, nn.Parameter):
            rates[weight.position] = phase.code_lr
    return rates


def _store_weights(lm: QuantizedLM, weights: Mapping[str, TrainableWeight]) -> None:
    layers = lm.quantized_layers()
    for name, weight in weights.items():
        params = TimeGroupParams((0, lm.config.timesteps), *weight.stored(), weight.group_size)
        lm.weight_params[name] = [params]
        codes = weight.packed()
        layers[name].packed = layers[name].packed if codes is None else codes
        install_weights(layers[name], [params], lm.config)


@alone_in_resume
def reconstruct_blocks(
    lm: QuantizedLM,
    reference: DiffusionLM,
    calibration: Calibration | None = None,
    *,
    prompts: Sequence[Prompts] | None = None,
    resume: str | Path | None = None,
    in_place: bool = False,
    progress: bool = False,
    **settings: Any,
) -> QuantizedLM:
    """Train scales, zero points and codes of the weights block by block for the block's output.

    Static activation ranges are left out of account, dynamic ones are not. The given model stays as it is, unless
    ``in_place``.

    Args:
        lm: a quantized model whose weights don't depend on the timestep.
        reference: the full-precision model.
        calibration: states to train on; not needed for fresh states with prompts.
        prompts: what fresh states start from; by default what the calibration states do.
        resume: see ``quantize``.
        in_place: train the given model's layers instead of those of a copy, which takes the memory of another model.
        progress: show bars.
        settings: fields of ``config.Blocks``.

    Raises:
        ValueError: time-dependent weights, a wrong setting, missing calibration, or a snapshot of another run in
            ``resume``.
    """
    phase = Blocks(**settings)
    config = _trained_config(lm, phase)
    how: dict[str, Any] = {"prompts": prompts, "resume": resume, "progress": progress}
    run = PhaseRun.of(phase, config, reference, calibration, name="blocks", start=lm, **how)
    changed = copied(lm, config, lm.activation_params, in_place=in_place)
    states = run.states()
    blocks = names_by_block(linear_names(reference.model))
    importance = token_importance(reference, states, list(blocks), config.seed, run.label("importance"))
    targets, stream = BlockStream(reference, states), BlockStream(changed, states)
    snapshots = BlockSnapshots(run.snapshot)
    with _without_static_ranges(changed):
        for number, (block, linears) in enumerate(blocks.items()):
            targets.advance()
            label = f"block {number}"
            if not snapshots.restore(changed, block):
                layers = changed.quantized_layers()
                weights = _trainable_weights({name: layers[name] for name in linears}, reference.model)
                with TrainableLayers(changed, {}, weights):
                    changed.losses[label] = fit_block(
                        stream,
                        targets.hidden,
                        importance[block],
                        _weight_rates(weights.values(), phase),
                        steps=phase.steps,
                        batch=phase.batch,
                        seed=config.seed,
                        progress=run.label(f"{label} of {len(blocks)}"),
                    )
                _store_weights(changed, weights)
                snapshots.save(changed, block, {label: changed.losses[label]})
            if not stream.is_last:
                stream.advance()
    return changed


@contextmanager
def _without_static_ranges(lm: QuantizedLM) -> Iterator[None]:
    """While it is entered (``with``), inputs that have static ranges aren't quantized."""
    layers = [layer for layer in lm.quantized_layers().values() if isinstance(layer.input_quantizer, StaticRanges)]
    held = [layer.input_quantizer for layer in layers]
    for layer in layers:
        layer.input_quantizer = None
    try:
        yield
    finally:
        for layer, ranges in zip(layers, held, strict=True):
            layer.input_quantizer = ranges


def _trained_config(lm: QuantizedLM, phase: Phase) -> ThermoConfig:
    """The configuration after a phase of training, what it needs checked."""
    check_constant_weights(lm)
    return lm.config.replace(training=(*lm.config.training, phase))


@alone_in_resume
def optimize_transitions(
    lm: QuantizedLM,
    reference: DiffusionLM,
    calibration: Calibration | None = None,
    *,
    prompts: Sequence[Prompts] | None = None,
    resume: str | Path | None = None,
    in_place: bool = False,
    progress: bool = False,
    **settings: Any,
) -> QuantizedLM:
    """Train the quantization parameters of all layers together for least path KL.

    The given model stays as it is, unless ``in_place``.

    What is trained: scales and zero points of the weights, static activation ranges through their smoothing, and where
    asked for the weights' codes, or the norms, biases, embeddings and head.

    Args:
        lm: a quantized model whose weights don't depend on the timestep.
        reference: the full-precision model.
        calibration: states to train on; not needed for fresh states with prompts.
        prompts: what fresh states start from; by default what the calibration states do.
        resume: see ``quantize``.
        in_place: train the given model's layers instead of those of a copy, which takes the memory of another model.
        progress: show a bar.
        settings: fields of ``config.PathKL``, e.g. ``what="network"``.

    Raises:
        ValueError: time-dependent weights, a wrong setting, missing calibration, or a snapshot of another run in
            ``resume``.
    """
    phase = PathKL(**settings)
    config = _trained_config(lm, phase)
    earlier = sum(isinstance(before, PathKL) for before in lm.config.training)
    how: dict[str, Any] = {"prompts": prompts, "resume": resume, "progress": progress}
    run = PhaseRun.of(phase, config, reference, calibration, name=f"transitions{earlier or ''}", start=lm, **how)
    changed = copied(lm, config, lm.activation_params, in_place=in_place)
    network = dict.fromkeys(_network(changed), phase.network_lr) if phase.what == "network" else {}
    targets = reference.model if phase.what == "codes" else None
    changed.losses["transitions"] = fit_quantized(changed, run, network, "transitions", targets=targets)
    return changed


def fit_quantized(
    lm: QuantizedLM,
    run: PhaseRun[PathKL] | PhaseRun[TimeNorms],
    network: Mapping[Tensor, float],
    name: str,
    *,
    targets: MaskPredictor | None = None,
    parameters: bool = True,
) -> list[float]:
    """Train what isn't quantized, and perhaps the quantization parameters, for least path KL, in place.

    Args:
        lm: the model, with the configuration after the phase.
        run: of a phase that trains on path KL.
        network: what is trained of what isn't quantized, to its learning rate at the start.
        name: of the phase, for the bar.
        targets: the full-precision model, to train the codes of its linears too; None keeps them.
        parameters: train the scales and zero points of weights and the static ranges.

    Returns:
        The loss of each step, see ``fit_to_path_kl``.
    """
    phase, config, layers, ranges = run.phase, lm.config, lm.quantized_layers(), present_ranges(lm)
    is_streamed, source = isinstance(run.reference, StreamedLM), run.source
    weights: dict[str, TrainableWeight] = {}
    rates: dict[Tensor, float] = {}
    if parameters:
        weights = _trainable_weights(layers, targets, holds_codes=not is_streamed)
        rates.update(pair for r in ranges.values() for pair in r.rates(phase.range_lr).items())
        rates.update(_weight_rates(weights.values(), phase).items())
    else:
        for held in ranges.values():
            held.requires_grad_(False)
    fixed = {} if parameters or is_streamed else {key: FixedWeight(layer) for key, layer in layers.items()}
    for tensor in network:
        tensor.requires_grad_()
    rates |= network
    timesteps = source.timesteps if isinstance(source, Calibration) else config.timesteps
    loss = TransitionLoss(run.reference, lm, timesteps, ranges, weights or fixed)
    inputs = list({id(r): r for r in ranges.values()}.values())  # layers that share an input share its ranges
    markov_weight = phase.markov_weight if isinstance(phase, PathKL) else 0.0
    draws: Draws
    if isinstance(source, Calibration):
        assert phase.batch is not None  # with calibration states it is filled in
        draws = CalibrationDraws(loss, source, phase.batch, config.seed)
    else:
        draws = FreshChains(loss, source, phase, config.seed)
    assert phase.steps is not None  # it is filled in
    losses = fit_to_path_kl(
        loss,
        rates,
        draws,
        steps=phase.steps,
        penalty=lambda: markov_weight * sum(r.roughness() for r in inputs),
        snapshot=run.snapshot,
        progress=run.label(f"{name} {config.precision}"),
    )
    for tensor in network:
        tensor.requires_grad_(False)
    refresh_time_norms(lm.model)
    if parameters:
        _store_weights(lm, weights)
        for key, fitted in ranges.items():
            lm.activation_params[key] = fitted.params(config.groups)
            install_activations(layers[key], lm.activation_params[key], config)
    return losses


@alone_in_resume
def train_time_norms(
    lm: QuantizedLM,
    reference: DiffusionLM,
    calibration: Calibration | None = None,
    *,
    prompts: Sequence[Prompts] | None = None,
    resume: str | Path | None = None,
    in_place: bool = False,
    progress: bool = False,
    **settings: Any,
) -> QuantizedLM:
    """Give every norm a set of weights (and biases) for each time group, and train them for least path KL.

    Every set starts with the norm's own weights, so that the model computes at first what it did. The given model
    stays as it is, unless ``in_place``.

    Args:
        lm: a quantized model whose weights don't depend on the timestep, without time-aware norms.
        reference: the full-precision model.
        calibration: states to train on; not needed for fresh states with prompts.
        prompts: what fresh states start from; by default what the calibration states do.
        resume: see ``quantize``.
        in_place: train the given model's layers instead of those of a copy, which takes the memory of another model.
        progress: show a bar.
        settings: fields of ``config.TimeNorms``, e.g. ``count=4``.

    Raises:
        ValueError: time-aware norms already, time-dependent weights, a wrong setting, a norm of a kind that isn't
            known, missing calibration, or a snapshot of another run in ``resume``.
    """
    config = _trained_config(lm, TimeNorms(**settings))
    phase = config.time_norms
    assert phase is not None  # it has just been added
    norm_names(lm.model)  # refuses kinds that aren't known
    how: dict[str, Any] = {"prompts": prompts, "resume": resume, "progress": progress}
    run = PhaseRun.of(phase, config, reference, calibration, name="time_norms", start=lm, **how)
    changed = copied(lm, config, lm.activation_params, in_place=in_place)
    install_time_norms(changed.model, config)
    norms = time_norms(changed.model).values()
    of_groups = [p for norm in norms for p in norm.parameters()]
    shared = [p for norm in norms for p in norm.share()]
    is_network = phase.what == "network"
    network = dict.fromkeys(_network(changed), phase.network_lr) if is_network else {}
    network |= dict.fromkeys(of_groups, phase.norm_lr if phase.group_lr is None else phase.group_lr)
    network |= dict.fromkeys(shared, phase.norm_lr)
    changed.losses["time_norms"] = fit_quantized(changed, run, network, "time norms", parameters=is_network)
    for norm in norms:
        norm.merge()
    return changed


def _network(lm: QuantizedLM) -> list[Tensor]:
    """What isn't quantized: norms, embeddings, head and the biases of the quantized linears."""
    biases = [layer.bias for layer in lm.quantized_layers().values() if layer.bias is not None]
    return [*lm.model.parameters(), *biases]

"""The phases that train a quantized model: sequential quantization, block reconstruction, transitions."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from thermo_lib.diffusion.inputs import shared_inputs
from thermo_lib.diffusion.prompts import Prompts, prompts_of
from thermo_lib.diffusion.states import Calibration, calibrate
from thermo_lib.files.snapshots import Snapshot, digest, named, part_of
from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.activations import check_constant_weights, present_ranges
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import (
    QuantizedLM,
    copied,
    install_activations,
    install_dynamic_ranges,
    install_layer,
    install_weights,
    layer_type,
    linear_names,
    names_by_block,
)
from thermo_lib.pipeline.parts import Blocks, Dynamic, PathKL, Phase, Sequential
from thermo_lib.pipeline.weights import bits_by_column, counts_tokens, quantize_layer
from thermo_lib.quant.layers import QuantizedLinear
from thermo_lib.time_aware.groups import TimeGroupParams
from thermo_lib.transition.blocks import BlockStream
from thermo_lib.transition.chains import Batch, CalibrationDraws, Chains
from thermo_lib.transition.fit import fit_block, fit_to_path_kl
from thermo_lib.transition.loss import TransitionLoss, token_importance
from thermo_lib.transition.parameters import TrainableLayers, TrainableWeight


def quantize_sequentially(
    lm: QuantizedLM,
    reference: DiffusionLM,
    phase: Sequential,
    calibration: Calibration,
    snapshot: Snapshot | None,
    progress: bool,
) -> None:
    """Quantize site after site, each time training the rest of the block for the block's output.

    A site is a set of linears with the same input, such as q, k and v. After each site is quantized, the weights still
    in full precision and the scales of the quantized ones are trained to absorb the error made so far.
    """
    config = lm.config
    names = linear_names(reference.model)
    blocks = names_by_block(names)
    importance = token_importance(
        reference, calibration, [*names, *blocks], config.seed, "importance" if progress else None
    )
    counted = importance if counts_tokens(config) else {}
    column_bits = bits_by_column(lm, calibration, counted)
    stream = BlockStream(reference, lm, calibration)
    _resume(lm, snapshot)
    install_dynamic_ranges(lm)
    for site in tqdm(
        shared_inputs(reference, names), desc=f"sequential {config.precision}", disable=not progress, leave=False
    ):
        number, (block, linears) = next((i, b) for i, b in enumerate(blocks.items()) if site[0] in b[1])
        if site[0] == linears[0]:
            stream.enter(number)
        label = f"block {number}: {', '.join(name.rpartition('.')[2] for name in site)}"
        if label not in lm.losses:
            for name, hessian in stream.hessians(number, {name: counted.get(name) for name in site}).items():
                quantize_layer(lm, name, hessian[None], column_bits)
                if isinstance(config.activations, Dynamic):
                    install_activations(lm.model.get_submodule(name), [], config)
            lm.losses[label] = _fit_rest(lm, phase, stream, number, linears, importance[block])
            _save_progress(lm, snapshot)
        if site[-1] == linears[-1]:
            stream.leave(number)
    for layer in lm.quantized_layers().values():
        layer.activation_bits = 16


def _fit_rest(
    lm: QuantizedLM,
    phase: Sequential,
    stream: BlockStream,
    number: int,
    linears: Sequence[str],
    importance: Sequence[Tensor],
) -> list[float]:
    """Train a block's linears that aren't quantized yet, and the scales of those that are; the loss of each step."""
    layers = lm.quantized_layers()
    weights = _trainable_weights({name: layers[name] for name in linears if name in layers})
    rest = [lm.model.get_submodule(name).weight.requires_grad_() for name in linears if name not in layers]
    with TrainableLayers(lm, {}, weights):
        losses = fit_block(
            stream,
            number,
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


def training_snapshot(
    resume: str | Path | None,
    phase: str,
    config: ThermoConfig,
    reference: DiffusionLM,
    states: Calibration | Sequence[Prompts],
    start: DiffusionLM | None = None,
) -> Snapshot | None:
    """Where a phase of training is kept, under a digest of all that it depends on; None without a folder."""
    if resume is None:
        return None
    seen = states.tensors() if isinstance(states, Calibration) else _first_starts(states, config)
    models = (lm.model.state_dict() for lm in (reference, start) if lm is not None)
    run = digest(config.digest(), str(torch.__version__), *models, seen)
    return Snapshot(Path(resume) / f"{phase}.safetensors", run)


def _save_progress(lm: QuantizedLM, snapshot: Snapshot | None) -> None:
    """Take a snapshot of a model some of whose sites or blocks have been trained."""
    if snapshot is not None:
        losses = {phase: torch.tensor(values, dtype=torch.float64) for phase, values in lm.losses.items()}
        snapshot.save(named("model", lm.model.state_dict()) | named("losses", losses))


def _resume(lm: QuantizedLM, snapshot: Snapshot | None) -> None:
    """Bring a model to where the last snapshot was taken."""
    state = snapshot.load() if snapshot is not None else {}
    if not state:
        return
    model = part_of(state, "model")
    for name, layer in list(lm.model.named_modules()):
        if f"{name}.packed" not in model:
            continue
        scale, zero_point = (model[f"{name}.{key}"][0] for key in ("scale", "zero_point"))
        group_size = lm.config.group_size or layer.in_features
        lm.weight_params[name] = [TimeGroupParams((0, lm.config.timesteps), scale, zero_point, group_size)]
        if not isinstance(layer, QuantizedLinear):
            install_layer(lm, name, {key: model[f"{name}.{key}"] for key in layer_type(lm.config).STORED})
    lm.model.load_state_dict(model)
    lm.losses |= {phase: values.tolist() for phase, values in part_of(state, "losses").items()}


def _trainable_weights(
    layers: Mapping[str, QuantizedLinear], targets: MaskPredictor | None = None
) -> dict[str, TrainableWeight]:
    """The layers' weights, their codes too where the full-precision model is given."""
    return {
        name: TrainableWeight(layer, targets.get_submodule(name).weight if targets is not None else None)
        for name, layer in layers.items()
    }


def _weight_rates(weights: Iterable[TrainableWeight], phase: Phase) -> dict[nn.Parameter, float]:
    """The learning rates of what is trained of the weights."""
    rates: dict[nn.Parameter, float] = {}
    for weight in weights:
        rates[weight.log_scale] = phase.scale_lr
        rates |= {weight.zero_point: phase.zero_point_lr} if weight.zero_point.requires_grad else {}
        rates |= {weight.position: phase.code_lr} if isinstance(weight.position, nn.Parameter) else {}
    return rates


def _store_weights(lm: QuantizedLM, weights: Mapping[str, TrainableWeight]) -> None:
    layers = lm.quantized_layers()
    for name, weight in weights.items():
        params = TimeGroupParams((0, lm.config.timesteps), *weight.stored(), weight.group_size)
        lm.weight_params[name] = [params]
        codes = weight.packed()
        layers[name].packed = layers[name].packed if codes is None else codes
        install_weights(layers[name], [params], lm.config)


def reconstruct_blocks(
    lm: QuantizedLM,
    reference: DiffusionLM,
    calibration: Calibration | None = None,
    *,
    prompts: Sequence[Prompts] | None = None,
    resume: str | Path | None = None,
    progress: bool = False,
    **settings: object,
) -> QuantizedLM:
    """Train scales, zero points and codes of the weights block by block for the block's output.

    Static activation ranges are left out of account, dynamic ones are not. The given model stays as it is.

    Args:
        lm: a quantized model whose weights don't depend on the timestep.
        reference: the full-precision model.
        calibration: states to train on; not needed for fresh states with prompts.
        prompts: what fresh states start from; by default what the calibration states do.
        resume: see ``quantize``.
        progress: show bars.
        settings: fields of ``config.Blocks``.

    Raises:
        ValueError: time-dependent weights, a wrong setting, missing calibration, or a snapshot of another run in
            ``resume``.
    """
    phase = Blocks(**settings)
    config = _trained_config(lm, phase)
    source = training_source(phase, reference, calibration, prompts)
    snapshot = training_snapshot(resume, "blocks", config, reference, source, lm)
    changed = copied(lm, config, lm.activation_params)
    states = training_states(phase, reference, source, config, progress)
    blocks = names_by_block(linear_names(reference.model))
    importance = token_importance(reference, states, list(blocks), config.seed, "importance" if progress else None)
    _resume(changed, snapshot)
    layers = changed.quantized_layers()
    for layer in layers.values():
        layer.activation_bits = 16 if config.has_static_ranges else config.activation_bits
    stream = BlockStream(reference, changed, states)
    for number, (block, linears) in enumerate(blocks.items()):
        stream.enter(number)
        label = f"block {number}"
        if label not in changed.losses:
            weights = _trainable_weights({name: layers[name] for name in linears}, reference.model)
            with TrainableLayers(changed, {}, weights):
                changed.losses[label] = fit_block(
                    stream,
                    number,
                    importance[block],
                    _weight_rates(weights.values(), phase),
                    steps=phase.steps,
                    batch=phase.batch,
                    seed=config.seed,
                    progress=f"{label} of {len(blocks)}" if progress else None,
                )
            _store_weights(changed, weights)
            _save_progress(changed, snapshot)
        stream.leave(number)
    for layer in layers.values():
        layer.activation_bits = config.activation_bits
    return changed


def _trained_config(lm: QuantizedLM, phase: Phase) -> ThermoConfig:
    """The configuration after a phase of training, what it needs checked."""
    check_constant_weights(lm)
    return lm.config.replace(training=(*lm.config.training, phase))


def training_source(
    phase: Phase, lm: DiffusionLM, calibration: Calibration | None, prompts: Sequence[Prompts] | None
) -> Calibration | Sequence[Prompts]:
    """What a phase takes its states from: the calibration, or what fresh states start from.

    Args:
        phase: says which.
        lm: the full-precision model.
        calibration: its states.
        prompts: what fresh states start from; None for what the calibration states do.

    Raises:
        ValueError: neither is there.
    """
    if phase.states == "fresh" and prompts is not None:
        return prompts
    if calibration is None:
        raise ValueError(f"calibration: found None, required by states={phase.states!r}")
    return calibration if phase.states == "calibration" else prompts_of(calibration, lm.mask_token_id)


def training_states(
    phase: Phase, lm: DiffusionLM, source: Calibration | Sequence[Prompts], config: ThermoConfig, progress: bool
) -> Calibration:
    """The states that a phase trains on: those of the calibration, or fresh ones, which no other seed makes."""
    if isinstance(source, Calibration):
        return source
    seed = config.seed + 2
    counted = ((starts, phase.num_texts if starts.is_empty else phase.num_prompts) for starts in source)
    ids = [starts.draw(count, seed) for starts, count in counted if count]
    batches = [(starts, starts == lm.mask_token_id) for starts in ids]
    return calibrate(lm, batches, timesteps=config.timesteps, source="trajectory", seed=seed, progress=progress)


def _first_starts(source: Sequence[Prompts], config: ThermoConfig) -> dict[str, Tensor]:
    """What tells one source of prompts from another."""
    return {str(number): starts.draw(64, config.seed) for number, starts in enumerate(source)}


class _FreshChains:
    """Chains of every source of prompts, a step of all at a time; see ``transition.chains.Draws``.

    Args:
        loss: the two models.
        source: what the chains start from.
        phase: how many there are, and whose steps they take.
        seed: seeds the steps.
    """

    def __init__(self, loss: TransitionLoss, source: Sequence[Prompts], phase: PathKL, seed: int):
        self.chains = []
        for starts in source:
            count = phase.num_texts if starts.is_empty else phase.num_prompts
            own = round(phase.own_share * count) if starts.is_empty else 0
            if count:
                start = lambda number, starts=starts: starts.start(number, seed)  # noqa: E731
                self.chains.append(Chains(loss, start, count, own, seed))

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
    prompts: Sequence[Prompts] | None = None,
    resume: str | Path | None = None,
    progress: bool = False,
    **settings: object,
) -> QuantizedLM:
    """Train the quantization parameters of all layers together for least path KL; the given model stays as it is.

    What is trained: scales and zero points of the weights, static activation ranges through their smoothing, and where
    asked for the weights' codes, or the norms, biases, embeddings and head.

    Args:
        lm: a quantized model whose weights don't depend on the timestep.
        reference: the full-precision model.
        calibration: states to train on; not needed for fresh states with prompts.
        prompts: what fresh states start from; by default what the calibration states do.
        resume: see ``quantize``.
        progress: show a bar.
        settings: fields of ``config.PathKL``, e.g. ``what="network"``.

    Raises:
        ValueError: time-dependent weights, a wrong setting, missing calibration, or a snapshot of another run in
            ``resume``.
    """
    phase = PathKL(**settings)
    config = _trained_config(lm, phase)
    source = training_source(phase, reference, calibration, prompts)
    changed = copied(lm, config, lm.activation_params)
    layers, ranges = changed.quantized_layers(), present_ranges(changed)
    weights = _trainable_weights(layers, reference.model if phase.what == "codes" else None)
    rates = {p: rate for r in ranges.values() for p, rate in r.rates(phase.range_lr).items()}
    rates |= _weight_rates(weights.values(), phase)
    network = [tensor.requires_grad_() for tensor in _network(changed)] if phase.what == "network" else []
    rates |= dict.fromkeys(network, phase.network_lr)
    earlier = sum(isinstance(before, PathKL) for before in lm.config.training)
    is_fresh = phase.states == "fresh"
    timesteps = config.timesteps if is_fresh else source.timesteps
    loss = TransitionLoss(reference, changed, timesteps, ranges, weights)
    inputs = list({id(r): r for r in ranges.values()}.values())  # layers that share an input share its ranges
    draws = (
        _FreshChains(loss, source, phase, config.seed)
        if is_fresh
        else CalibrationDraws(loss, source, phase.batch, config.seed)
    )
    changed.losses["transitions"] = fit_to_path_kl(
        loss,
        rates,
        draws,
        steps=phase.steps,
        penalty=lambda: phase.markov_weight * sum(r.roughness() for r in inputs),
        snapshot=training_snapshot(resume, f"transitions{earlier or ''}", config, reference, source, lm),
        progress=f"transitions {config.precision}" if progress else None,
    )
    for tensor in network:
        tensor.requires_grad_(False)
    _store_weights(changed, weights)
    for name, fitted in ranges.items():
        changed.activation_params[name] = fitted.params(config.groups)
        install_activations(layers[name], changed.activation_params[name], config)
    return changed


def _network(lm: QuantizedLM) -> list[Tensor]:
    """What isn't quantized: norms, embeddings, head and the biases of the quantized linears."""
    biases = [layer.bias for layer in lm.quantized_layers().values() if layer.bias is not None]
    return [*lm.model.parameters(), *biases]

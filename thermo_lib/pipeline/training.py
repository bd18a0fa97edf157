"""The phases that train a quantized model: sequential quantization, block reconstruction, transitions."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from thermo_lib.data.puzzles import TASKS, encode_puzzles, knows_tasks, make_puzzles
from thermo_lib.diffusion.inputs import shared_inputs
from thermo_lib.diffusion.states import Calibration, calibrate
from thermo_lib.files.snapshots import Snapshot, digest, named, part_of
from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.params import default
from thermo_lib.pipeline.activations import check_constant_weights, present_ranges
from thermo_lib.pipeline.config import ThermoConfig, TrainingStates, Transitions
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
from thermo_lib.pipeline.weights import bits_by_column, quantize_layer
from thermo_lib.quant.layers import QuantizedLinear
from thermo_lib.time_aware.groups import TimeGroupParams
from thermo_lib.transition.blocks import BlockStream
from thermo_lib.transition.chains import Batch, CalibrationDraws, Chains
from thermo_lib.transition.fit import fit_block, fit_to_path_kl
from thermo_lib.transition.loss import TransitionLoss, token_importance
from thermo_lib.transition.parameters import TrainableLayers, TrainableWeight


def quantize_sequentially(
    lm: QuantizedLM, reference: DiffusionLM, calibration: Calibration, snapshot: Snapshot | None, progress: bool
) -> None:
    """Quantize site after site, each time training the rest of the block for the block's output.

    A site are the linears that share an input. What isn't quantized yet of the block, and the scales of what is, make
    up for the errors so far.
    """
    config = lm.config
    names = linear_names(reference.model)
    blocks = names_by_block(names)
    importance = token_importance(
        reference, calibration, [*names, *blocks], default("seed"), "importance" if progress else None
    )
    counted = importance if config.hessian == "transition" else {}
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
        phase = f"block {number}: {', '.join(name.rpartition('.')[2] for name in site)}"
        if phase not in lm.losses:
            for name, hessian in stream.hessians(number, {name: counted.get(name) for name in site}).items():
                quantize_layer(lm, name, hessian[None], column_bits)
                if config.activation_ranges == "dynamic":
                    install_activations(lm.model.get_submodule(name), [], config)
            lm.losses[phase] = _fit_rest(lm, stream, number, linears, importance[block])
            _save_progress(lm, snapshot)
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


def training_snapshot(
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
        lm.weight_params[name] = [TimeGroupParams((0, lm.config.timesteps), scale, zero_point, lm.config.group_size)]
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
        install_weights(layers[name], [params], lm.config)


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
    snapshot = training_snapshot(resume, "blocks", config, reference, calibration, lm)
    changed = copied(lm, config, lm.activation_params)
    if states == "chains":
        calibration = fresh_states(reference, "reconstruction", config.timesteps, progress)
    blocks = names_by_block(linear_names(reference.model))
    importance = token_importance(
        reference, calibration, list(blocks), default("seed"), "importance" if progress else None
    )
    _resume(changed, snapshot)
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
            _save_progress(changed, snapshot)
        stream.leave(number)
    for layer in layers.values():
        layer.activation_bits = changed.config.activation_bits
    return changed


def _trained_config(
    lm: QuantizedLM, calibration: Calibration | None, states: TrainingStates, **phase: str
) -> ThermoConfig:
    """The configuration after a phase of training, what it needs checked."""
    check_constant_weights(lm)
    config = ThermoConfig(**{**lm.config.model_dump(), **phase, "training_states": states})
    if states == "calibration" and calibration is None:
        raise ValueError("calibration: found None, required by states='calibration'")
    return config


def _prompts(lm: DiffusionLM, count: int, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Training puzzles, ``count`` of each task, answers masked: ids and the masks, ``(puzzles, length)``."""
    puzzles = [puzzle for task in TASKS for puzzle in make_puzzles(task, count, seed, test=False)]
    ids, is_answer = encode_puzzles(puzzles, lm.tokenizer, default("data.task_length"))
    return ids.masked_fill(is_answer, lm.mask_token_id), is_answer


def fresh_states(lm: DiffusionLM, section: str, timesteps: int, progress: bool) -> Calibration:
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
    changed = copied(lm, config, lm.activation_params)
    layers, ranges = changed.quantized_layers(), present_ranges(changed)
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
        snapshot=training_snapshot(resume, "transitions", config, reference, calibration, lm),
        progress=f"transitions {config.precision}" if progress else None,
    )
    for tensor in network:
        tensor.requires_grad_(False)
    _store_weights(changed, weights)
    for name, fitted in ranges.items():
        changed.activation_params[name] = fitted.params(config.time_groups)
        install_activations(layers[name], changed.activation_params[name], config)
    return changed


def _network(lm: QuantizedLM) -> list[Tensor]:
    """What isn't quantized: norms, embeddings, head and the biases of the quantized linears."""
    biases = [layer.bias for layer in lm.quantized_layers().values() if layer.bias is not None]
    return [*lm.model.parameters(), *biases]

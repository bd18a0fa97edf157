"""Quantize the inputs of a model's quantized linears, and change that or its smoothing later."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from thermo_lib.diffusion.inputs import shared_inputs
from thermo_lib.diffusion.states import Calibration
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import QuantizedLM, copied, install_activations, install_weights, smoother
from thermo_lib.pipeline.parts import SmoothingMethod, Static, TimeGrouping
from thermo_lib.time_aware.groups import TimeGroupParams
from thermo_lib.time_aware.ranges import InputSample, clipped_ranges, input_samples
from thermo_lib.time_aware.smoothing import WINDOWED, BoundarySmoother
from thermo_lib.transition.blocks import deciding
from thermo_lib.transition.chains import CalibrationDraws
from thermo_lib.transition.fit import fit_to_output, fit_to_path_kl, output_error
from thermo_lib.transition.loss import TransitionLoss
from thermo_lib.transition.parameters import TrainableRanges

Samples = list[tuple[list[str], InputSample]]


def shared_input_samples(
    lm: QuantizedLM, calibration: Calibration, tokens: int | None = None, *, decisive: bool = True
) -> Samples:
    """The quantized layers, those that share an input together, with a random sample of that input.

    Args:
        lm: a quantized model.
        calibration: the states.
        tokens: see ``Static``; None for those of the model's own static ranges, or the default.
        decisive: let the passes run in ``decisive_dtype``, so that ranges are the same on every processor; False for
            the model's type, which takes two thirds of the time.
    """
    shared = shared_inputs(lm, list(lm.quantized_layers()))
    config, how = lm.config, lm.config.activations
    tokens = tokens or (how if isinstance(how, Static) else Static()).tokens
    with deciding(lm) if decisive else nullcontext():
        samples = input_samples(lm, calibration, [names[0] for names in shared], config.timesteps, tokens, config.seed)
    return [(names, samples[names[0]]) for names in shared]


def _trainable_ranges(scale: Tensor, zero_point: Tensor, config: ThermoConfig, how: Static) -> TrainableRanges:
    matrix = smoother(config).weights(config.groups.intervals)
    return TrainableRanges(scale, zero_point, matrix, how.bits, how.group_size)


def present_ranges(lm: QuantizedLM) -> dict[str, TrainableRanges]:
    """The static ranges of every layer's input, trainable; layers that share an input share them."""
    ranges: dict[str, TrainableRanges] = {}
    how = lm.config.activations
    if not isinstance(how, Static):
        return ranges
    for names in shared_inputs(lm, list(lm.activation_params)):
        params = lm.activation_params[names[0]]
        start = torch.stack([p.scale for p in params]), torch.stack([p.zero_point for p in params])
        ranges |= dict.fromkeys(names, _trainable_ranges(*start, lm.config, how))
    return ranges


def _descent(how: Static) -> tuple[int, int, float]:
    """Steps, batch and learning rate of ranges that are fitted by descent, where none of them is None."""
    assert how.steps is not None
    assert how.batch is not None
    assert how.lr is not None
    return how.steps, how.batch, how.lr


def _clip_ranges(lm: QuantizedLM, how: Static, samples: Samples, progress: bool) -> dict[str, TrainableRanges]:
    """Static activation ranges for least squared error of the activations, or then of the layers' outputs.

    Layers that share an input share them.
    """
    config, layers = lm.config, lm.quantized_layers()
    ranges: dict[str, TrainableRanges] = {}
    for names, sample in tqdm(samples, desc=f"ranges {config.precision}", disable=not progress, leave=False):
        start = clipped_ranges(
            sample,
            config.groups,
            how.bits,
            token_states=how.by_token_state,
            group_size=how.group_size,
        )
        fitted = _trainable_ranges(*start, config, how)
        if how.fit_to == "output":
            steps, batch, lr = _descent(how)
            weight = torch.cat([layers[name].weight() for name in names])
            fit_to_output(
                fitted,
                sample,
                weight,
                steps=steps,
                batch=batch,
                lr=lr,
                seed=config.seed,
            )
        ranges |= dict.fromkeys(names, fitted)
    return ranges


def quantize_activations(
    lm: QuantizedLM,
    reference: DiffusionLM | None,
    calibration: Calibration | None,
    progress: bool,
    samples: Samples | None = None,
) -> None:
    how = lm.config.activations
    if isinstance(how, Static):
        if not samples:
            assert calibration is not None  # quantize and requantize_activations refuse to go on without
            samples = shared_input_samples(lm, calibration)
        ranges = _clip_ranges(lm, how, samples, progress)
        if how.fit_to == "path_kl":
            assert calibration is not None  # they refuse that here too
            assert reference is not None
            steps, batch, lr = _descent(how)
            loss = TransitionLoss(reference, lm, calibration.timesteps, ranges)
            fit_to_path_kl(
                loss,
                {p: rate for r in ranges.values() for p, rate in r.rates(lr).items()},
                CalibrationDraws(loss, calibration, batch, lm.config.seed),
                steps=steps,
                progress=f"path KL {lm.config.precision}" if progress else None,
            )
        lm.activation_params |= {name: fitted.params(lm.config.groups) for name, fitted in ranges.items()}
    for name, layer in lm.quantized_layers().items():
        install_activations(layer, lm.activation_params.get(name, []), lm.config)


_ACTIVATIONS = frozenset(
    {
        "activations",
        "time_groups",
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
    samples: Samples | None = None,
    reference: DiffusionLM | None = None,
    progress: bool = False,
    **changes: Any,
) -> QuantizedLM:
    """The same quantized weights with other activation settings; the given model stays as it is.

    Args:
        lm: a quantized model whose weights don't depend on the timestep.
        calibration: states to fit static ranges on.
        samples: what ``shared_input_samples`` returned for these weights and states; None to sample anew.
        reference: the full-precision model, needed to fit to path KL.
        progress: show a bar.
        changes: ``activations`` and ``time_groups`` of ``ThermoConfig``, or flat names of their settings.

    Raises:
        ValueError: a field that belongs to the weights, time-dependent weights, missing calibration or reference.
    """
    _check_changes(changes, _ACTIVATIONS | _SMOOTHING)
    check_constant_weights(lm)
    config = lm.config.replace(**changes)
    if config.activations is None and config.time_groups is not None:
        raise ValueError(_TIME_DEPENDENT)
    fits_to_path_kl = isinstance(config.activations, Static) and config.activations.fit_to == "path_kl"
    needs_states = config.has_static_ranges and (samples is None or fits_to_path_kl)
    if needs_states and calibration is None:
        raise ValueError("calibration: found None, required by static activation ranges")
    if fits_to_path_kl and reference is None:
        raise ValueError("reference: found None, required by fit_to='path_kl'")
    changed = copied(lm, config, {})
    for layer in changed.quantized_layers().values():
        layer.input_quantizer = None
    if config.activations is not None:
        with torch.no_grad():
            quantize_activations(changed, reference, calibration, progress, samples)
    return changed


_TIME_DEPENDENT = "num_time_groups: found time-dependent weights, expected weights of one time group"


def check_constant_weights(lm: QuantizedLM) -> None:
    """Raise ValueError if the parameters of the weights depend on the timestep."""
    if any(len(params) > 1 for params in lm.weight_params.values()):
        raise ValueError(_TIME_DEPENDENT)


_SMOOTHING = frozenset({"enable_boundary_smoothing", "smoothing_method", "smoothing_window"})


def _check_changes(changes: dict[str, Any], allowed: Iterable[str]) -> None:
    other = sorted(changes.keys() - set(allowed))
    if other:
        raise ValueError(f"{other[0]}: can't change without quantizing again, allowed are {', '.join(sorted(allowed))}")


def resmooth(lm: QuantizedLM, method: str | None, window: int | None = None) -> QuantizedLM:
    """The same quantized model with other boundary smoothing, nothing fitted again.

    Args:
        lm: a quantized model.
        method: ``linear``, ``cubic``, ``sigmoid``, ``spline`` or None.
        window: number of timesteps on each side; by default as before, or 5 where nothing was smoothed.

    Raises:
        ValueError: a model without time groups, an unknown method or a window out of range.
    """
    config = resmoothed(lm.config, method, window)
    changed = copied(lm, config, lm.activation_params)
    for name, layer in changed.quantized_layers().items():
        install_weights(layer, lm.weight_params[name], config)
        if config.activations is not None:
            install_activations(layer, lm.activation_params.get(name, []), config)
    return changed


def resmoothed(config: ThermoConfig, method: str | None, window: int | None = None) -> ThermoConfig:
    """The configuration with other boundary smoothing; arguments as for ``resmooth``."""
    grouping = config.time_groups
    if grouping is None:
        if method is None:
            return config
        raise ValueError(f"smoothing: found {method!r}, allowed is None without time groups")
    windowed = method in WINDOWED
    kept = grouping.window if windowed and window is None else window if windowed else None
    smoothing: dict[str, Any] = {"smoothing": method, "window": kept}  # a method that isn't known is refused
    return config.replace(time_groups=TimeGrouping(count=grouping.count, starts=grouping.starts, **smoothing))


@torch.no_grad()
def smooth_each_layer(
    lm: QuantizedLM,
    calibration: Calibration,
    methods: Sequence[SmoothingMethod],
    windows: Sequence[int],
    *,
    reference: DiffusionLM | None = None,
    most_states: int = 48,
    progress: bool = False,
) -> QuantizedLM:
    """Give every layer input the method and window, or no smoothing, that costs least.

    The choice is stored as parameters of every timestep, so the model has as many time groups as timesteps.

    Args:
        lm: a model with static activation ranges in time groups, smoothing off.
        calibration: states to choose on.
        methods, windows: what to choose from.
        reference: the full-precision model: what costs least path KL is chosen, layer after layer, on
            some states of each part of the calibration. Without it, what costs the layers' output least.
        most_states: number of these states at most.
        progress: show a bar.
    """
    config, layers, ranges = lm.config, lm.quantized_layers(), present_ranges(lm)
    smoothers = [
        BoundarySmoother(None, 1),
        *(BoundarySmoother(method, window) for method in methods for window in windows),
    ]
    device = lm.device
    matrices = [each.weights(config.groups.intervals).float().to(device) for each in smoothers]
    distinct = [i for i, m in enumerate(matrices) if not any(m.equal(earlier) for earlier in matrices[:i])]
    samples = shared_input_samples(lm, calibration)
    if reference is not None:
        loss = TransitionLoss(reference, lm, calibration.timesteps, ranges)
        generator = torch.Generator().manual_seed(config.seed)
        parts = calibration.to(lm.device).parts
        orders = [torch.randperm(len(part.ids), generator=generator)[:most_states] for part in parts]
        states = [part[order.to(part.ids.device)] for part, order in zip(parts, orders, strict=True)]
        targets = [loss.targets(drawn) for drawn in states]
    chosen: dict[str, list[TimeGroupParams]] = {}
    for names, sample in tqdm(samples, desc="smoothing by layer", disable=not progress, leave=False):
        fitted = ranges[names[0]]
        weight = torch.cat([layers[name].weight() for name in names])

        def cost(
            index: int, fitted: TrainableRanges = fitted, sample: InputSample = sample, weight: Tensor = weight
        ) -> float:
            fitted.weights = matrices[index]
            if reference is None:
                return output_error(fitted, sample, weight)
            with loss:
                return sum(float(loss(drawn, aim)) for drawn, aim in zip(states, targets, strict=True))

        best = min(distinct, key=cost)
        fitted.weights = matrices[best]
        chosen |= dict.fromkeys(names, smoothers[best].smooth(lm.activation_params[names[0]]))
    every = TimeGrouping(count=config.timesteps, smoothing=None)
    changed = copied(lm, config.replace(time_groups=every), chosen)
    for name, layer in changed.quantized_layers().items():
        install_activations(layer, chosen[name], changed.config)
    return changed

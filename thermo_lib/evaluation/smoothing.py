"""The earlier project's claims about boundary smoothing, measured on one quantized model, each with a verdict."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from thermo_lib.diffusion.states import Calibration
from thermo_lib.evaluation.scores import Evaluation, Suite, evaluate, relative_accuracy_gain
from thermo_lib.evaluation.statistics import paired_ratio, verdict
from thermo_lib.evaluation.summary import markov, summarize
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.activations import requantize_activations, resmooth
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import QuantizedLM


@dataclass(frozen=True)
class Targets:
    """What the earlier project claimed of smoothing.

    Attributes:
        accuracy_gain: relative gain of accuracy, at least.
        markov_score: Markov smoothness, at least.
        jump_cut: share by which the mean parameter jump shrinks, at least.
        overhead: relative cost in time, below.
    """

    accuracy_gain: float = 0.02
    markov_score: float = 0.82
    jump_cut: float = 0.5
    overhead: float = 0.1


CLAIMED = Targets()


def check_comparable(config: ThermoConfig) -> None:
    """Refuse a configuration that has nothing to smooth.

    Raises:
        ValueError: a single time group.
    """
    if config.time_groups is None:
        raise ValueError("num_time_groups: found 1, allowed is at least 2; one group has no boundary to smooth")


def compare_smoothing(
    unsmoothed: QuantizedLM,
    suite: Suite,
    methods: Sequence[str],
    *,
    window: int | None = None,
    claims: Targets = CLAIMED,
    measure: Callable[..., Evaluation] = evaluate,
    progress: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, QuantizedLM]]:
    """Evaluate one quantized model without smoothing and with each method.

    Args:
        unsmoothed: a model with time groups and smoothing off.
        suite: the evaluation inputs.
        methods: some of ``linear``, ``cubic``, ``sigmoid``.
        window: see ``resmooth``.
        claims: the bounds of the verdicts.
        measure: evaluates a model, as ``evaluate`` does.
        progress: show bars.

    Returns:
        The configurations' rows, the targets with verdicts, and the models by method (``none`` for no smoothing).

    Raises:
        ValueError: the model has a single time group.
    """
    config = unsmoothed.config
    check_comparable(config)
    label = f"{config.precision} {config.quantizer}, time groups"
    models = {"none": unsmoothed} | {method: resmooth(unsmoothed, method, window) for method in methods}
    scores = {
        method: measure(model, suite, progress=progress)
        for method, model in tqdm(models.items(), desc=label, disable=not progress, leave=False)
    }
    names = {method: label if method == "none" else f"{label}, {method}" for method in models}
    rows = [summarize(names[method], models[method], scores[method]) for method in models]
    targets = [
        row
        for method in methods
        for row in smoothing_targets(models[method], scores[method], unsmoothed, scores["none"], claims)
    ]
    return rows, targets, models


def smoothing_overhead(
    unsmoothed: QuantizedLM,
    calibration: Calibration,
    suite: Suite,
    method: str,
    *,
    rounds: int = 9,
    sequences: int = 2,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """What smoothing costs, as paired ratios of times with and without it.

    Args:
        unsmoothed: a model with time groups and smoothing off.
        calibration: states to fit on; a few are enough, smoothing's work doesn't grow with them.
        suite: the denoised sequences are its first.
        method: the smoothing method.
        rounds: number of counted rounds.
        sequences: number of sequences that are denoised.
        progress: show bars.

    Returns:
        ``inference`` (a forward pass at every timestep) and, where activation ranges are static, ``quantization``
        (fitting them); each what ``paired_ratio`` returns, the candidate with smoothing.
    """
    smoothed = resmooth(unsmoothed, method)
    ids = suite.trajectories.ids[:sequences]

    def fit(smoothing: bool) -> None:
        requantize_activations(unsmoothed, calibration, enable_boundary_smoothing=smoothing)

    def run(lm: QuantizedLM) -> None:
        denoise_once(lm, ids, range(suite.timesteps), suite.timesteps)

    def measure(label: str, work: Callable[[bool], object]) -> dict[str, Any]:
        return paired_ratio(lambda: work(True), lambda: work(False), rounds, progress=label if progress else None)

    measured = {"inference": measure("inference", lambda smoothing: run(smoothed if smoothing else unsmoothed))}
    if unsmoothed.config.has_static_ranges:
        measured["quantization"] = measure("quantization", fit)
    return measured


def target_row(
    name: str,
    config: ThermoConfig,
    method: str | None,
    target: float,
    value: float,
    ci: tuple[float, float] | None = None,
    *,
    at_least: bool = True,
) -> dict[str, Any]:
    """One target's row of the report; without ``ci`` the value has no uncertainty."""
    ci = (value, value) if ci is None else ci
    return {
        "name": name,
        "precision": config.precision,
        "activation_bits": config.activation_bits,
        "smoothing_method": method,
        "target": target,
        "value": value,
        "ci": list(ci),
        "verdict": verdict(ci, target, at_least=at_least),
    }


def overhead_targets(
    overhead: dict[str, dict[str, Any]], config: ThermoConfig, method: str, claims: Targets = CLAIMED
) -> list[dict[str, Any]]:
    """The targets on smoothing's cost, from what ``smoothing_overhead`` returned."""
    return [
        target_row(
            f"overhead of {work}",
            config,
            method,
            claims.overhead,
            measured["ratio"] - 1,
            (measured["ci"][0] - 1, measured["ci"][1] - 1),
            at_least=False,
        )
        for work, measured in overhead.items()
    ]


@torch.no_grad()
def same_outputs(a: DiffusionLM, b: DiffusionLM, suite: Suite, sequences: int = 2) -> bool:
    """Whether two models give bit-identical logits on the suite's first sequences at every timestep."""
    equal = True
    for timestep in range(suite.timesteps):
        ids = suite.trajectories.ids[suite.trajectories.timestep == timestep][:sequences]
        for lm in (a, b):
            lm.set_timestep(timestep, suite.timesteps)
        first, second = (lm.model.predict(lm.model.hidden(ids)) for lm in (a, b))
        equal = equal and torch.equal(first, second)
    return equal


def identity_target(same: bool, config: ThermoConfig) -> dict[str, Any]:
    """The target that smoothing, switched off, leaves every bit as it was."""
    return target_row("bit-identical with smoothing off", config, None, 1.0, float(same))


def smoothing_targets(
    lm: QuantizedLM,
    evaluation: Evaluation,
    unsmoothed: QuantizedLM,
    baseline: Evaluation,
    claims: Targets = CLAIMED,
) -> list[dict[str, Any]]:
    """The earlier project's claims about one smoothed model against the same groups unsmoothed, each with a verdict.

    Args:
        lm, evaluation: the smoothed model and its scores.
        unsmoothed, baseline: the same quantized model without smoothing and its scores.
        claims: the bounds of the verdicts.
    """
    config, method = lm.config, lm.config.smoothing_method
    gain = relative_accuracy_gain(evaluation, baseline)
    smooth, rough = markov(lm), markov(unsmoothed)
    assert smooth is not None  # both models have time groups
    assert rough is not None
    rows = [
        target_row("relative accuracy gain", config, method, claims.accuracy_gain, *gain),
        target_row("Markov score", config, method, claims.markov_score, smooth.score),
    ]
    if rough.mean_jump > 0:
        cut = 1 - smooth.mean_jump / rough.mean_jump
        rows.append(target_row("cut of the mean parameter jump", config, method, claims.jump_cut, cut))
    return rows


@torch.no_grad()
def denoise_once(lm: DiffusionLM, ids: Tensor, timesteps: Iterable[int], total: int) -> None:
    """One forward pass at each of some timesteps: the work whose time smoothing might change."""
    for timestep in timesteps:
        lm.set_timestep(timestep, total)
        lm.model.hidden(ids)

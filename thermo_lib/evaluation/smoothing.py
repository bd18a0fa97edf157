"""The earlier project's claims about boundary smoothing, measured on one quantized model, each with a verdict."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from thermo_lib.diffusion.states import Calibration
from thermo_lib.evaluation.display import between, verdicts
from thermo_lib.evaluation.scores import Evaluation, Suite, evaluate, relative_accuracy_gain
from thermo_lib.evaluation.statistics import paired_ratio, verdict
from thermo_lib.evaluation.summary import markov, summarize
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.activations import requantize_activations, resmooth
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import QuantizedLM

Rows = Sequence[Mapping[str, Any]]


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
        unsmoothed: a model with time groups and smoothing off; without time groups there is nothing to smooth.
        suite: the evaluation inputs.
        methods: some of ``linear``, ``cubic``, ``sigmoid``; none without time groups.
        window: see ``resmooth``.
        claims: the bounds of the verdicts.
        measure: evaluates a model, as ``evaluate`` does.
        progress: show bars.

    Returns:
        The configurations' rows, the targets with verdicts, and the models by method (``none`` for no smoothing).

    Raises:
        ValueError: methods for a model with a single time group.
    """
    config = unsmoothed.config
    if methods:
        check_comparable(config)
    label = f"{config.precision} {config.quantizer}, {'one group' if config.time_groups is None else 'time groups'}"
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


def answer(
    rows: Mapping[int, Rows], targets: Rows, fixed: Mapping[str, Any], dynamic: Mapping[str, Any], claims: Targets
) -> str:
    """What there is to say of the claims, in at most three sentences.

    Args:
        rows: activation bits to what ``compare_smoothing`` returned of them, the row without smoothing first.
        targets: the targets of all of them; none where there is one time group.
        fixed, dynamic: the rows with one static range and with ranges of each token's own, at the fewest bits.
        claims: the bounds of the verdicts.
    """
    low = min(rows)
    if not targets:
        return (
            "With one time group (`num_time_groups` is 1) there is no boundary to smooth, so nothing is compared with "
            f"the claims. At W2A{low} one range for all steps leaves {fixed['path_kl']:.1f} nats of path KL (the "
            f"distance to full-precision denoising), and ranges of each token's own leave {dynamic['path_kl']:.1f}."
        )
    about = {row["name"]: [each for each in targets if each["name"] == row["name"]] for row in targets}
    said = {name: verdicts(found) for name, found in about.items()}
    gain, jumps = about["relative accuracy gain"], about.get("cut of the mean parameter jump", [])
    moves = path_kl_moves(rows)
    before = [found[0]["markov_score"] for found in rows.values()]
    cut = between([row["value"] for row in jumps], "{:.1%}") if jumps else "nothing, for there are none"
    return (
        f"The claim on accuracy (at least {claims.accuracy_gain:+.1%}) is {said['relative accuracy gain']}: smoothing "
        f"changes it by {between([row['value'] for row in gain], '{:+.1%}')}, and path KL (the distance to "
        f"full-precision denoising) by {between(moves, '{:+.2f}', ' nats')}. The Markov score (at least "
        f"{claims.markov_score}) is {said['Markov score']}, but it is {between(before, '{:.2f}')} without smoothing "
        f"too; jumps are cut by {cut}, by construction. At W2A{low} time groups bring path KL from "
        f"{fixed['path_kl']:.1f} (one range for all steps) to {rows[low][0]['path_kl']:.1f} nats, and ranges of each "
        f"token's own bring it to {dynamic['path_kl']:.1f}."
    )


def path_kl_moves(rows: Mapping[int, Rows]) -> list[float]:
    """By how many nats each smoothing changes path KL, see ``answer``."""
    return [row["path_kl"] - found[0]["path_kl"] for found in rows.values() for row in found[1:]]


@torch.no_grad()
def denoise_once(lm: DiffusionLM, ids: Tensor, timesteps: Iterable[int], total: int) -> None:
    """One forward pass at each of some timesteps: the work whose time smoothing might change."""
    for timestep in timesteps:
        lm.set_timestep(timestep, total)
        lm.model.hidden(ids)

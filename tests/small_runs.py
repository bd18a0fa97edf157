"""The library's functions with arguments under which a command takes a moment."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from thermo_lib.diffusion.states import Calibration, calibrate, calibration_batches
from thermo_lib.evaluation.scores import build_suite
from thermo_lib.evaluation.smoothing import smoothing_overhead
from thermo_lib.models.lm import DiffusionLM

Run = Callable[..., tuple[int, str, str]]

small_suite = partial(build_suite, sequences=12, trajectories=4, sudoku=2, length=24, resamples=20)
small_overhead = partial(smoothing_overhead, rounds=2, sequences=2)


def small_calibration(
    lm: DiffusionLM, *, timesteps: int = 16, source: str = "trajectory", seed: int = 0
) -> Calibration:
    """What ``calibrate`` draws, of few and short sequences."""
    batches = calibration_batches(lm, seed, sequences=4, puzzles=2, length=24)
    return calibrate(lm, batches, timesteps=timesteps, source=source, seed=seed, progress=False)


def every_nth(calibration: Calibration, n: int) -> Calibration:
    """The states of every ``n``-th timestep, as those of as many fewer; the model runs for each timestep anew."""
    some = [part[(part.timestep % n == 0).nonzero()[:, 0]] for part in calibration.parts]
    parts = tuple(replace(part, timestep=part.timestep // n) for part in some)
    return Calibration(parts, calibration.timesteps // n, calibration.source)


def shortest(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of a configuration, with the least of what is searched and trained: for what any result shows."""
    few: dict[str, Any] = {}
    if "reconstruction" in changes:
        few[f"{changes['reconstruction']}.steps"] = 2
    if "range_objective" in changes:
        few["activations.steps"] = 2
    if changes.get("quantizer") == "trellis":
        few["weights.beam"] = 2
    return {**changes, **few}

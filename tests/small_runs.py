"""The library's functions with arguments under which a command takes a moment."""

from collections.abc import Callable
from functools import partial

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

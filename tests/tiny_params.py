"""Settings under which a command takes a moment."""

from collections.abc import Callable

TINY_PARAMS = {
    "data.sequence_length": 24,
    "quant.timesteps": 4,
    "quant.group_size": 16,
    "calibration.code_sequences": 4,
    "calibration.puzzles": 2,
    "ranges.tokens": 16,
    "evaluation.sequences": 12,
    "evaluation.trajectories": 4,
    "evaluation.sudoku": 2,
    "evaluation.resamples": 20,
    "evaluation.overhead_rounds": 2,
    "evaluation.overhead_sequences": 2,
}

Run = Callable[..., tuple[int, str, str]]

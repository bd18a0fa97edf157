"""A small evaluation and a quantized model that the tests of this folder share."""

import pytest
import torch

from thermo_lib import Calibration, ThermoConfig, quantize
from thermo_lib.data.puzzles import make_puzzles
from thermo_lib.diffusion.states import forward_states, trajectory_states
from thermo_lib.evaluation.scores import Suite
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.model import QuantizedLM

TIMESTEPS = 6


@pytest.fixture(scope="module")
def suite(tiny: DiffusionLM) -> Suite:
    """Six sequences that the tiny model wrote itself, on six timesteps, and two puzzles."""
    start = torch.full((6, 16), tiny.mask_token_id)
    trajectories = trajectory_states(tiny, start, None, TIMESTEPS, seed=1)
    return Suite(
        reference=tiny,
        held_out=forward_states(trajectories.clean[:6], None, TIMESTEPS, tiny.mask_token_id, seed=0),
        trajectories=trajectories,
        puzzles=make_puzzles("sudoku", 2, 0, test=True),
        timesteps=TIMESTEPS,
        resamples=100,
    )


@pytest.fixture(scope="module")
def unsmoothed(tiny: DiffusionLM, calibration: Calibration) -> QuantizedLM:
    """Eight-bit weights, four-bit activations in three time groups without smoothing."""
    config = ThermoConfig(
        bit_width=8,
        quantizer="rtn",
        group_size=20,
        activation_bits=4,
        activation_ranges="static",
        timesteps=TIMESTEPS,
        num_time_groups=3,
        enable_boundary_smoothing=False,
    )
    return quantize(tiny, config, calibration)

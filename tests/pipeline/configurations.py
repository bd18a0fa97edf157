"""The configurations that the tests of quantized models share."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from thermo_lib import ThermoConfig
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.model import QuantizedLM

TIMESTEPS = 6
# Neither 32 nor 48 input features are a multiple of 20, so that the last group of every row is shorter.
BASE = {
    "bit_width": 2,
    "transitions": "none",
    "reconstruction": "none",
    "quantizer": "rtn",
    "group_size": 20,
    "activation_bits": 16,
    "activation_ranges": "static",
    "timesteps": TIMESTEPS,
    "num_time_groups": 1,
    "enable_boundary_smoothing": False,
    "smoothing_method": "linear",
    "smoothing_window": 1,
}
SMOOTH = {"num_time_groups": 3, "enable_boundary_smoothing": True}
CONFIGURATIONS = {
    "W2A16": {},
    "W4A16 gptq": {"bit_width": 4, "quantizer": "gptq"},
    "W8A16 least squares": {"bit_width": 8, "quantizer": "least_squares"},
    "W2A16, 3 groups": {"num_time_groups": 3},
    "W2A16, 3 groups, smoothed": SMOOTH,
    "W2A8, 3 groups, smoothed": {"activation_bits": 8, **SMOOTH},
    "W2A4, 3 groups, smoothed": {"activation_bits": 4, "smoothing_method": "sigmoid", **SMOOTH},
    "W2A4, 1 group": {"activation_bits": 4},
    "W2A4, by token state and channel group": {
        "activation_bits": 4,
        "activation_token_states": True,
        "activation_group_size": 20,
        **SMOOTH,
    },
    "W2A4 spline over chosen groups": {
        "activation_bits": 4,
        **SMOOTH,
        "smoothing_method": "spline",
        "time_group_starts": (1, 4),
    },
    "W2A4 fitted to the output": {"activation_bits": 4, "range_objective": "output", **SMOOTH},
    "W2A4 fitted to path KL": {"activation_bits": 4, "range_objective": "path_kl", **SMOOTH},
    "W2A8 dynamic": {"activation_bits": 8, "activation_ranges": "dynamic"},
    "W2A4 dynamic, clipped": {"activation_bits": 4, "activation_ranges": "dynamic", "activation_clip": 0.9},
    "W2A16 gptq for transitions": {"quantizer": "gptq", "hessian": "transition"},
    "W2A8 reconstructed": {"activation_bits": 8, "reconstruction": "blocks"},
    "W2A16 trellis": {"quantizer": "trellis"},
    "W2.3A8 trellis, 3 groups, smoothed": {
        "quantizer": "trellis",
        "hessian": "transition",
        "average_bits": 2.3,
        "activation_bits": 8,
        **SMOOTH,
    },
    "W2A4 trellis sequential, dynamic": {
        "quantizer": "trellis",
        "average_bits": 2.0,
        "activation_bits": 4,
        "activation_ranges": "dynamic",
        "reconstruction": "sequential",
    },
    "W2A16 gptq sequential": {"quantizer": "gptq", "hessian": "transition", "reconstruction": "sequential"},
}
every_configuration = pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS)

RandomIds = Callable[..., Tensor]
Quantize = Callable[..., QuantizedLM]
Outputs = Callable[[DiffusionLM], Tensor]


FEW = 20  # steps of training


def config_of(**changes: Any) -> ThermoConfig:
    """The tests' configuration with changes; what is trained is trained for a moment."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # flat names are what these tests are written in
        config = ThermoConfig(**{**BASE, **changes})
    few: dict[str, Any] = {}
    if config.has_static_ranges and config.activations.fit_to != "activation":
        few["activations.steps"] = FEW
    for phase in config.training:
        few[f"{phase.phase}.steps"] = FEW // 2 if phase.phase == "sequential" else FEW
        if phase.states == "fresh" and phase.phase != "path_kl":
            few[f"{phase.phase}.num_texts"] = 5
    if config.quantizer == "trellis":
        few["weights.beam"] = 8
    return config.replace(**{name: value for name, value in few.items() if name not in changes})

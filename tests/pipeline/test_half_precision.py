"""A model in half precision can be quantized, and is refused where training would lose its steps in rounding."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from thermo_lib import Calibration, ThermoConfig, optimize_transitions, quantize
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.parts import Blocks, PathKL, RoundToNearest, Sequential, Static, TimeNorms

TIMESTEPS = 6  # of the fixture ``calibration``
SHORT: dict[str, Any] = {"steps": 1, "batch": 2}
TRAINED: dict[str, dict[str, Any]] = {
    "sequential": {"training": (Sequential(**SHORT),)},
    "blocks": {"training": (Blocks(**SHORT),)},
    "path KL": {"training": (PathKL(**SHORT),)},
    "norms": {"training": (TimeNorms(**SHORT),)},
    "ranges": {"activations": Static(bits=4, fit_to="path_kl", **SHORT)},
}


def cast(lm: DiffusionLM, dtype: torch.dtype) -> DiffusionLM:
    return replace(lm, model=copy.deepcopy(lm.model).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("what", TRAINED)
def test_training_is_refused_before_any_work(
    tiny: DiffusionLM, calibration: Calibration, what: str, dtype: torch.dtype
) -> None:
    config = ThermoConfig(timesteps=TIMESTEPS, weights=RoundToNearest(group_size=16), **TRAINED[what])
    lm = cast(tiny, dtype)
    with pytest.raises(ValueError, match=f"lm: found a model in {dtype}, allowed with training is float32"):
        quantize(lm, config, calibration)
    quantize(lm, config.replace(training=(), activations=None), calibration)
    quantize(tiny, config, calibration)


def test_phases_refuse_each_model(tiny: DiffusionLM, calibration: Calibration) -> None:
    config = ThermoConfig(timesteps=TIMESTEPS, weights=RoundToNearest(group_size=16))
    half = cast(tiny, torch.bfloat16)
    for lm, reference in ((quantize(half, config), tiny), (quantize(tiny, config), half)):
        with pytest.raises(ValueError, match=r"lm: found a model in torch\.bfloat16"):
            optimize_transitions(lm, reference, calibration, **SHORT)

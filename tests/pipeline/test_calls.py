"""Timestep and token state belong to a call: threads don't disturb each other, and a new model has a defined step."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from thermo_lib import Calibration, ThermoConfig, generate, load_quantized, quantize, save_quantized
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.model import QuantizedLM
from thermo_lib.quant.calls import CurrentStep

TIME_AWARE = {
    "time groups": {"num_time_groups": 3, "enable_boundary_smoothing": False},
    "token states": {"activations.by_token_state": True},
}


def time_aware(tiny: DiffusionLM, calibration: Calibration, fields: dict[str, Any]) -> QuantizedLM:
    config = ThermoConfig(bit_width=4, group_size=16, activation_bits=4, timesteps=6, **fields)
    return quantize(tiny, config, calibration)


@pytest.mark.slow
@pytest.mark.parametrize("fields", TIME_AWARE.values(), ids=TIME_AWARE)
def test_two_threads_write_what_each_writes_alone(
    tiny: DiffusionLM, calibration: Calibration, fields: dict[str, Any]
) -> None:
    lm = time_aware(tiny, calibration, fields)
    starts = [torch.tensor([[9, 9] + [tiny.mask_token_id] * count]) for count in (24, 12)]

    def write(number: int) -> Tensor:
        return generate(lm, starts[number], timesteps=(6, 24)[number])

    alone = [write(0), write(1)]
    for _ in range(5):
        found: dict[int, Tensor] = {}
        errors: list[BaseException] = []

        def run(number: int, found: dict = found, errors: list = errors) -> None:
            try:
                found[number] = write(number)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert all(found[number].equal(alone[number]) for number in (0, 1))


def test_a_new_model_stands_at_the_first_timestep(tiny: DiffusionLM, calibration: Calibration, tmp_path: Path) -> None:
    lm = time_aware(tiny, calibration, TIME_AWARE["time groups"])
    save_quantized(lm, tmp_path / "q")
    loaded, ids = load_quantized(tmp_path / "q"), calibration.parts[0].ids[:2]
    fresh = lm.model(ids).logits
    assert fresh.equal(loaded.model(ids).logits)
    lm.set_timestep(0, 6)
    assert fresh.equal(lm.model(ids).logits)
    lm.set_timestep(5, 6)
    assert not fresh.equal(lm.model(ids).logits)
    assert fresh.equal(loaded.model(ids).logits), "another model stays where it is"


def test_a_step_belongs_to_its_thread() -> None:
    step = CurrentStep()
    step.value = 3, 4
    seen = []
    thread = threading.Thread(target=lambda: seen.append(step.value))
    thread.start()
    thread.join()
    assert seen == [(0, 1)]
    assert step.value == (3, 4)
    assert copy.deepcopy(step).value == (0, 1)


@pytest.mark.parametrize(("timestep", "timesteps"), [(-1, 4), (4, 4)])
def test_a_timestep_out_of_range_is_named(tiny: DiffusionLM, timestep: int, timesteps: int) -> None:
    with pytest.raises(ValueError, match=rf"timestep: found {timestep}, allowed are 0\.\.3"):
        tiny.set_timestep(timestep, timesteps)

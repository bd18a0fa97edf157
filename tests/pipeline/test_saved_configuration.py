"""A saved folder holds all that decided its bits: quantizing again from it gives the same bytes."""

from pathlib import Path

import pytest

from thermo_lib import Calibration, ThermoConfig, load_quantized, quantize, save_quantized
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.presets import PRESETS


def short(config: ThermoConfig) -> ThermoConfig:
    """The configuration for a tiny model: trained for a moment, searched narrowly."""
    few = {f"{phase.phase}.steps": 3 for phase in config.training}
    few |= {f"{phase.phase}.num_texts": 3 for phase in config.training if phase.states == "fresh"}
    beam = {"weights.beam": 4} if config.quantizer == "trellis" else {}
    return config.replace(timesteps=6, **few, **beam)


@pytest.mark.parametrize("name", PRESETS)
def test_quantizing_again_from_the_folder_gives_the_same_bytes(
    tiny: DiffusionLM, calibration: Calibration, tmp_path: Path, name: str
) -> None:
    config = short(ThermoConfig.preset(name))
    given = calibration if config.needs_calibration else None
    save_quantized(quantize(tiny, config, given), tmp_path / "first")
    loaded = load_quantized(tmp_path / "first")
    assert loaded.config == config
    save_quantized(quantize(tiny, loaded.config, given), tmp_path / "second")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert first == second


def test_another_seed_is_another_result(tiny: DiffusionLM, calibration: Calibration) -> None:
    config = short(ThermoConfig.preset("w2a4-static"))
    one, two = (quantize(tiny, config.replace(seed=seed), calibration) for seed in (0, 1))
    scales = [[params[0].scale.tolist() for params in lm.activation_params.values()] for lm in (one, two)]
    assert scales[0] != scales[1]


def test_a_preset_s_name_is_enough(tiny: DiffusionLM) -> None:
    assert quantize(tiny, "fast").config == ThermoConfig.preset("fast")
    with pytest.raises(ValueError, match=r"preset: found 'fasst', .*did you mean 'fast'"):
        quantize(tiny, "fasst")
    with pytest.raises(ValueError, match="calibration: found None, required by 'gptq'; calibrate"):
        quantize(tiny)


class TestWhatIsSavedIsWhatTheLayersHold:
    """After ``load_state_dict`` from another model a folder would mix two models; it is refused instead."""

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"activation_bits": 4},
            {"activation_bits": 4, "num_time_groups": 3},
            {"num_time_groups": 3},
            {"quantizer": "trellis", "bit_width": 2, "weights.beam": 2},
        ],
        ids=str,
    )
    def test_parameters_of_another_model_are_refused(
        self, tiny: DiffusionLM, calibration: Calibration, tmp_path: Path, fields: dict[str, object]
    ) -> None:
        config = ThermoConfig(**{"group_size": 16, "timesteps": 6, **fields})
        half = Calibration((calibration.parts[0][calibration.parts[0].timestep.argsort()[::2]],), 6, "trajectory")
        one, two = (quantize(tiny, config, states) for states in (calibration, half))
        save_quantized(one, tmp_path / "one")
        one.model.load_state_dict(two.model.state_dict())
        with pytest.raises(ValueError, match=r"layers\.\d\..*: found .*scale of other .* than this model"):
            save_quantized(one, tmp_path / "mixed")
        assert not (tmp_path / "mixed").exists()

    def test_its_own_state_may_be_loaded(self, tiny: DiffusionLM, calibration: Calibration, tmp_path: Path) -> None:
        lm = quantize(tiny, ThermoConfig(group_size=16, timesteps=6), calibration)
        save_quantized(lm, tmp_path / "before")
        lm.model.load_state_dict({name: tensor.clone() for name, tensor in lm.model.state_dict().items()})
        save_quantized(lm, tmp_path / "after")
        files = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("before", "after"))
        assert next(files) == next(files)

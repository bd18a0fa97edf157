"""A configuration takes its defaults from ``params.yaml`` and names every value that isn't allowed."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from thermo_lib import ThermoConfig
from thermo_lib.params import default

PLAIN = {"quantizer": "rtn", "activation_bits": 16, "num_time_groups": 1}


def test_every_default_is_the_value_in_params_yaml() -> None:
    config = ThermoConfig()
    assert {field: default(f"quant.{field}") for field in ThermoConfig.model_fields} == config.model_dump()


def test_a_changed_params_yaml_changes_the_default(override: Callable[[dict[str, Any]], None]) -> None:
    override({"quant.bit_width": 8, "quant.smoothing_method": "cubic"})
    config = ThermoConfig()
    assert (config.bit_width, config.smoothing_method) == (8, "cubic")


def test_a_default_is_checked_like_a_given_value(override: Callable[[dict[str, Any]], None]) -> None:
    override({"quant.bit_width": 5})
    with pytest.raises(ValueError, match="bit_width"):
        ThermoConfig()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bit_width", 3),
        ("bit_width", "two"),
        ("quantizer", "nearest"),
        ("group_size", 0),
        ("group_size", -128),
        ("group_size", 1.5),
        ("group_size", True),
        ("activation_group_size", True),
        ("smoothing_window", True),
        ("activation_bits", 1),
        ("activation_bits", 9),
        ("activation_bits", 32),
        ("activation_ranges", "per_token"),
        ("activation_clip", 0.0),
        ("activation_clip", 1.1),
        ("timesteps", 0),
        ("timesteps", True),
        ("timesteps", 65537),
        ("num_time_groups", 0),
        ("enable_boundary_smoothing", "perhaps"),
        ("smoothing_method", "quadratic"),
        ("smoothing_method", None),
        ("smoothing_window", 0),
        ("smoothing_window", 21),
        ("smoothing_windows", 5),
        ("average_bits", 0.9),
        ("average_bits", 6.5),
        ("markov_weight", -1.0),
        ("own_share", 1.5),
        ("hessian", "fisher"),
        ("reconstruction", "layers"),
        ("transitions", "everything"),
        ("training_states", "text"),
    ],
)
def test_a_bad_value_is_a_value_error_that_names_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{field}: found {value!r}, allowed')}[^\n]*$"):
        ThermoConfig(**{field: value})


def test_all_wrong_fields_are_named_in_one_line() -> None:
    expected = "bit_width: found 3, allowed is 2, 4 or 8; time_group_starts.1: found True, allowed is a whole number"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        ThermoConfig(bit_width=3, num_time_groups=3, time_group_starts=(1, True))


def test_more_groups_than_timesteps_are_refused() -> None:
    assert ThermoConfig(timesteps=4, num_time_groups=4).num_time_groups == 4
    with pytest.raises(ValueError, match="num_time_groups: found 5, allowed is at most the number of timesteps, 4"):
        ThermoConfig(timesteps=4, num_time_groups=5)


def test_dynamic_ranges_have_no_parameters_to_group() -> None:
    assert ThermoConfig(activation_ranges="dynamic", num_time_groups=1).activation_ranges == "dynamic"
    with pytest.raises(ValueError, match="num_time_groups: found 2, allowed is 1 with activation_ranges='dynamic'"):
        ThermoConfig(activation_ranges="dynamic", num_time_groups=2)


def test_only_dynamic_ranges_are_clipped() -> None:
    assert ThermoConfig(activation_ranges="dynamic", num_time_groups=1, activation_clip=0.9).activation_clip == 0.9
    with pytest.raises(ValueError, match=r"activation_clip: found 0\.9, allowed is 1 with activation_ranges='static'"):
        ThermoConfig(activation_ranges="static", activation_clip=0.9)


@pytest.mark.parametrize("field", [{"reconstruction": "blocks"}, {"transitions": "codes"}])
def test_what_is_trained_does_not_depend_on_the_timestep(field: dict[str, str]) -> None:
    (name,) = field
    assert ThermoConfig(**field, num_time_groups=3, activation_bits=4).num_time_groups == 3
    with pytest.raises(ValueError, match=f"{name}: found .* with weights that depend on the timestep"):
        ThermoConfig(**field, num_time_groups=3, activation_bits=16)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("bit_width", 8, "2 and 4"),
        ("num_time_groups", 3, "1 at activation_bits=16"),
        ("reconstruction", "blocks", "none and sequential"),
        ("transitions", "codes", "none, parameters and network"),
    ],
)
def test_a_trellis_has_no_codes_to_train_and_no_parameters_to_group(field: str, value: Any, allowed: str) -> None:
    plain = {"quantizer": "trellis", "activation_bits": 16, "num_time_groups": 1}
    assert ThermoConfig(**plain, reconstruction="sequential", average_bits=2.2).needs_calibration
    with pytest.raises(ValueError, match=f"{field}: found {value!r}, allowed are {allowed} with quantizer='trellis'"):
        ThermoConfig(**{**plain, field: value})


def test_only_a_trellis_spreads_its_bits() -> None:
    with pytest.raises(ValueError, match=r"average_bits: found 2\.2, allowed is None with quantizer='gptq'"):
        ThermoConfig(quantizer="gptq", average_bits=2.2)


def test_a_configuration_cannot_be_changed() -> None:
    config = ThermoConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.bit_width = 4


@pytest.mark.parametrize("method", ["linear", "cubic", "sigmoid"])
def test_method_is_none_where_smoothing_is_off(method: str) -> None:
    assert ThermoConfig(enable_boundary_smoothing=True, smoothing_method=method).method == method
    assert ThermoConfig(enable_boundary_smoothing=False, smoothing_method=method).method is None


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, False),
        ({"quantizer": "least_squares"}, False),
        ({"quantizer": "gptq"}, True),
        ({"num_time_groups": 2}, True),
        ({"activation_bits": 8, "activation_ranges": "static"}, True),
        ({"activation_bits": 8, "activation_ranges": "dynamic"}, False),
        ({"activation_bits": 16, "activation_ranges": "dynamic"}, False),
        ({"reconstruction": "blocks"}, True),
        ({"transitions": "parameters"}, True),
    ],
)
def test_calibration_is_needed_where_something_is_fitted_on_it(changes: dict[str, Any], needed: bool) -> None:
    assert ThermoConfig(**{**PLAIN, **changes}).needs_calibration is needed


def test_precision_names_both_bit_widths() -> None:
    assert ThermoConfig(bit_width=2, activation_bits=8).precision == "W2A8"

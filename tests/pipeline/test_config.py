"""A configuration holds what decides a result and nothing else, and names every value that isn't allowed."""

import json
import re
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from thermo_lib import ThermoConfig
from thermo_lib.pipeline import flat
from thermo_lib.pipeline.parts import (
    GPTQ,
    Blocks,
    Dynamic,
    LeastSquares,
    PathKL,
    RoundToNearest,
    Sequential,
    Static,
    TimeGrouping,
    Trellis,
)
from thermo_lib.pipeline.presets import DEFAULT, PRESETS

every_preset = pytest.mark.parametrize("name", PRESETS)
GROUPS = {"num_time_groups": 3, "activation_bits": 4}


def line(message: str) -> str:
    """A pattern for a message on one line that begins so."""
    return f"^{re.escape(message)}[^\n]*$"


class TestPresets:
    """One name for a whole configuration."""

    def test_without_arguments_it_is_the_default_preset(self) -> None:
        assert DEFAULT == "gptq"
        assert ThermoConfig() == ThermoConfig.preset("gptq") == ThermoConfig(weights=GPTQ(bits=2, group_size=128))

    def test_the_presets_are_what_they_are_called(self) -> None:
        assert ThermoConfig.preset("fast") == ThermoConfig(weights=LeastSquares(), embedding_bits=8)
        network = (Sequential(states="fresh"), PathKL(what="network", states="fresh"))
        assert ThermoConfig.preset("best") == ThermoConfig(weights=Trellis(bits=2.17), training=network)
        assert ThermoConfig.preset("small") == ThermoConfig(weights=Trellis(bits=2.02), training=network)
        clipped = Dynamic(bits=4, clip=0.9)
        assert ThermoConfig.preset("w2a4") == ThermoConfig.preset("best").replace(activations=clipped)
        static = ThermoConfig(weights=GPTQ(), activations=Static(bits=4), training=(PathKL(),))
        assert ThermoConfig.preset("w2a4-static") == static

    @every_preset
    def test_only_fast_needs_no_calibration(self, name: str) -> None:
        assert bool(ThermoConfig.preset(name).needs_calibration) == (name != "fast")

    def test_a_preset_may_be_changed(self) -> None:
        config = ThermoConfig.preset("best", embedding_bits=8, weights={"bits": 2.5})
        assert (config.embedding_bits, config.weights) == (8, Trellis(bits=2.5))
        assert config.training == ThermoConfig.preset("best").training

    def test_an_unknown_preset_is_an_error_that_offers_the_nearest(self) -> None:
        allowed = "fast, gptq, best, small, w2a4, w2a4-static; did you mean 'best'?"
        with pytest.raises(ValueError, match=line(f"preset: found 'bset', allowed are {allowed}")):
            ThermoConfig.preset("bset")


class TestFiles:
    """What decides a result is saved with it, and read back as it was."""

    @every_preset
    def test_config_json_gives_the_same_configuration(self, name: str) -> None:
        config = ThermoConfig.preset(name)
        content = json.loads(json.dumps(config.to_dict()))
        assert content["quant_method"] == "thermo"
        assert content["format_version"] == 3
        again = ThermoConfig.from_dict(content)
        assert again == config
        assert again.digest() == config.digest()

    def test_every_setting_is_in_it(self) -> None:
        """Also those that nobody has given: a later default changes no earlier result."""
        content = ThermoConfig.preset("best").to_dict()
        assert content["weights"] == {
            "method": "trellis",
            "bits": 2.17,
            "spread": True,
            "group_size": None,
            "token_weights": "path_kl",
            "damping": 0.01,
            "beam": 64,
        }
        assert content["training"][1]["steps"] == 900
        assert None not in (content["training"][0][key] for key in ("num_texts", "steps", "batch", "weight_lr"))

    def test_the_fields_of_version_2_are_read(self) -> None:
        fields = {
            "bit_width": 2,
            "quantizer": "trellis",
            "average_bits": 2.17,
            "hessian": "transition",
            "group_size": 768,
            "embedding_bits": 16,
            "activation_bits": 4,
            "activation_ranges": "dynamic",
            "activation_clip": 0.9,
            "activation_group_size": None,
            "activation_token_states": False,
            "range_objective": "activation",
            "reconstruction": "sequential",
            "transitions": "network",
            "markov_weight": 0.0,
            "training_states": "chains",
            "own_share": 0.5,
            "timesteps": 16,
            "num_time_groups": 1,
            "time_group_starts": None,
            "enable_boundary_smoothing": True,
            "smoothing_method": "linear",
            "smoothing_window": 5,
        }
        read = ThermoConfig.from_dict({"quant_method": "thermo", "format_version": 2, **fields})
        training = (Sequential(states="fresh"), PathKL(what="network", states="fresh", own_share=0.5))
        weights = Trellis(bits=2.17, group_size=768)
        assert read == ThermoConfig(weights=weights, activations=Dynamic(bits=4, clip=0.9), training=training)
        with pytest.raises(ValueError, match="format_version: found 1, allowed are 2 and 3: quantize the model again"):
            ThermoConfig.from_dict({"quant_method": "thermo", **fields})

    @given(st.sampled_from([2, 4, 8]), st.sampled_from([None, 32, 128]), st.integers(0, 3), st.sampled_from([16, 8]))
    def test_equal_configurations_have_equal_digests(
        self, bits: int, group_size: int | None, seed: int, embedding_bits: int
    ) -> None:
        fields = {"embedding_bits": embedding_bits, "seed": seed}
        first = ThermoConfig(weights=GPTQ(bits=bits, group_size=group_size), **fields)
        second = ThermoConfig(bit_width=bits, group_size=group_size, quantizer="gptq", **fields)
        assert first == second
        assert first.digest() == second.digest()
        assert first.replace(seed=seed + 1).digest() != first.digest()

    def test_a_default_that_is_written_out_is_the_same(self) -> None:
        assert ThermoConfig(weights=GPTQ(damping=0.01)).digest() == ThermoConfig().digest()
        assert ThermoConfig(**{"path_kl.steps": 300}).digest() == ThermoConfig(training=(PathKL(),)).digest()


class TestFlatNames:
    """The names of the first version still work, alone and beside the others."""

    def test_the_first_version_s_example(self) -> None:
        config = ThermoConfig(bit_width=2, activation_bits=4, num_time_groups=3, smoothing_method="linear")
        assert config == ThermoConfig(activations=Static(bits=4), time_groups=TimeGrouping(count=3))
        assert (config.bit_width, config.activation_bits, config.num_time_groups) == (2, 4, 3)
        assert (config.smoothing_method, config.smoothing_window, config.enable_boundary_smoothing) == (
            "linear",
            3,
            True,
        )
        assert (config.quantizer, config.group_size, config.timesteps) == ("gptq", 128, 16)

    def test_smoothing_alone_means_three_groups_as_it_did(self) -> None:
        assert ThermoConfig(smoothing_method="cubic").time_groups == TimeGrouping(smoothing="cubic", window=3)
        assert ThermoConfig(num_time_groups=3, enable_boundary_smoothing=False).smoothing_method is None
        assert ThermoConfig(enable_boundary_smoothing=False, smoothing_method="linear").time_groups is None

    @pytest.mark.parametrize(
        ("fields", "same"),
        [
            ({"quantizer": "rtn", "bit_width": 4}, ThermoConfig(weights=RoundToNearest(bits=4))),
            ({"quantizer": "trellis"}, ThermoConfig(weights=Trellis())),
            ({"quantizer": "trellis", "bit_width": 4}, ThermoConfig(weights=Trellis(bits=4, spread=False))),
            ({"activation_bits": 8, "activation_ranges": "dynamic"}, ThermoConfig(activations=Dynamic(bits=8))),
            ({"weights": {"bits": 8}, "group_size": 32}, ThermoConfig(weights=GPTQ(bits=8, group_size=32))),
            (
                {"weights.bits": 4, "path_kl.what": "codes"},
                ThermoConfig(weights=GPTQ(bits=4), training=(PathKL(what="codes"),)),
            ),
            ({"blocks.steps": 5}, ThermoConfig(training=(Blocks(steps=5),))),
            ({"activations.clip": 0.9, "activations.ranges": "dynamic"}, ThermoConfig(activations=Dynamic(clip=0.9))),
        ],
        ids=str,
    )
    def test_flat_and_dotted_names_set_the_nested_fields(self, fields: dict[str, Any], same: ThermoConfig) -> None:
        assert ThermoConfig(**fields) == same

    def test_a_name_that_has_another_now_warns_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flat, "_warned", set())
        with pytest.warns(DeprecationWarning, match=r"hessian: is weights\.token_weights of ThermoConfig now"):
            config = ThermoConfig(hessian="transition")
        assert config.weights.token_weights == "path_kl"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ThermoConfig(hessian="transition")


class TestReplace:
    """A changed copy, of which only what was asked for changes."""

    def test_a_mapping_changes_single_settings(self) -> None:
        config = ThermoConfig(weights=GPTQ(damping=0.5)).replace(weights={"bits": 4})
        assert config.weights == GPTQ(bits=4, damping=0.5)

    def test_another_method_starts_from_its_own_defaults(self) -> None:
        changed = ThermoConfig(weights=GPTQ(bits=4, damping=0.5)).replace(weights={"method": "trellis"})
        assert changed.weights == Trellis()

    def test_what_followed_from_another_setting_follows_the_new_one(self) -> None:
        config = ThermoConfig(activations=Static(bits=4, fit_to="output"))
        assert (config.activations.steps, config.activations.batch) == (150, 1024)
        assert config.replace(activations={"fit_to": "path_kl"}).activations.batch == 8

    def test_flat_names_change_parts_and_take_them_out(self) -> None:
        config = ThermoConfig(**GROUPS)
        assert config.replace(activation_bits=8).activations == Static(bits=8)
        assert config.replace(activation_bits=16).activations is None
        assert config.replace(num_time_groups=1).time_groups is None
        assert config.replace(enable_boundary_smoothing=False).time_groups == TimeGrouping(count=3, smoothing=None)
        dynamic = config.replace(activation_ranges="dynamic", num_time_groups=1)
        assert dynamic.activations == Dynamic(bits=4)

    def test_the_configuration_itself_cannot_be_changed(self) -> None:
        config = ThermoConfig()
        with pytest.raises(ValidationError, match="frozen"):
            config.seed = 4
        with pytest.raises(ValidationError, match="frozen"):
            config.weights.bits = 4


class TestWindow:
    """The window that is stored is the one that acts: at most half of the longest group."""

    @pytest.mark.parametrize(("count", "acting"), [(2, 4), (3, 3), (4, 2), (8, 1)])
    def test_a_longer_window_is_cut_with_a_warning(self, count: int, acting: int) -> None:
        with pytest.warns(UserWarning, match=f"time_groups.window: found 20, used is {acting}: a window takes at most"):
            config = ThermoConfig(**GROUPS | {"num_time_groups": count}, smoothing_window=20)
        assert config.smoothing_window == acting
        assert config.to_dict()["time_groups"]["window"] == acting

    def test_the_default_is_cut_in_silence(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ThermoConfig(**GROUPS).smoothing_window == 3
            assert ThermoConfig(**GROUPS, timesteps=64).smoothing_window == 5
            assert ThermoConfig(**GROUPS, smoothing_window=2).smoothing_window == 2

    def test_a_stored_window_warns_no_more(self) -> None:
        with pytest.warns(UserWarning, match="found 5, used is 3"):
            config = ThermoConfig(**GROUPS, smoothing_window=5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ThermoConfig.from_dict(config.to_dict()) == config == config.replace(seed=1).replace(seed=0)

    def test_groups_of_one_timestep_have_nothing_to_smooth(self) -> None:
        grouping = ThermoConfig(timesteps=4, num_time_groups=4, activation_bits=4).time_groups
        assert grouping == TimeGrouping(count=4, smoothing=None)

    @pytest.mark.parametrize("smoothing", [None, "spline"])
    def test_what_has_no_window_takes_none(self, smoothing: str | None) -> None:
        assert TimeGrouping(smoothing=smoothing).acting_window(16) is None
        with pytest.raises(ValueError, match=line(f"window: found 2, allowed is None with smoothing={smoothing!r}")):
            TimeGrouping(smoothing=smoothing, window=2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bit_width", 3),
        ("bit_width", "two"),
        ("group_size", 0),
        ("group_size", -128),
        ("group_size", 1.5),
        ("group_size", True),
        ("embedding_bits", 4),
        ("seed", -1),
        ("timesteps", 0),
        ("timesteps", True),
        ("timesteps", 65537),
    ],
)
def test_a_bad_value_is_an_error_that_names_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=line(f"{field}: found {value!r}, allowed")):
        ThermoConfig(**{field: value})


@pytest.mark.parametrize(
    ("fields", "field", "value"),
    [
        (GROUPS, "activation_bits", 1),
        (GROUPS, "activation_bits", 9),
        (GROUPS, "activation_bits", 32),
        (GROUPS, "activation_group_size", True),
        (GROUPS, "smoothing_window", True),
        (GROUPS, "smoothing_window", 0),
        (GROUPS, "smoothing_window", 21),
        (GROUPS, "smoothing_method", "quadratic"),
        (GROUPS, "num_time_groups", 0),
        ({"quantizer": "trellis"}, "average_bits", 0.9),
        ({"quantizer": "trellis"}, "average_bits", 6.5),
        ({"activation_bits": 4, "activation_ranges": "dynamic"}, "activation_clip", 0.0),
        ({"activation_bits": 4, "activation_ranges": "dynamic"}, "activation_clip", 1.1),
        ({}, "weights.damping", float("nan")),
        ({}, "weights.token_weights", "fisher"),
        ({}, "activations.fit_to", "logits"),
    ],
)
def test_a_bad_value_of_a_part_names_the_field_that_was_given(fields: dict[str, Any], field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=line(f"{field}: found {value!r}, allowed")):
        ThermoConfig(**{**fields, field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weigths": {}}, "weigths: found {}, allowed are the fields weights, activations, "),
        ({"weights": {"bitz": 2}}, "weights.bitz: found 2, allowed are the fields method, bits, "),
        ({"weights": {"method": "gptqq"}}, "weights.method: found 'gptqq', allowed are 'rtn', 'least_squares', "),
        ({"activation_bits": 4, "activation_ranges": "per_token"}, "activation_ranges: found 'per_token', allowed"),
        ({"training": ({"phase": "block"},)}, "training.0.phase: found 'block', allowed are 'sequential', 'blocks', "),
        ({"path_kl.what": "everything"}, "training.0.what: found 'everything', allowed is 'parameters', 'codes' or"),
        ({"path_kl.markov_weight": -1.0}, "training.0.markov_weight: found -1.0, allowed"),
        ({"path_kl.states": "text"}, "training.0.states: found 'text', allowed is 'calibration' or 'fresh'"),
        ({"blocks.steps": 0}, "training.0.steps: found 0, allowed"),
        ({"enable_boundary_smoothing": "perhaps", **GROUPS}, "enable_boundary_smoothing: found 'perhaps', allowed"),
    ],
    ids=str,
)
def test_a_wrong_name_or_value_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=line(message)):
        ThermoConfig(**fields)


@pytest.mark.parametrize(
    ("wrong", "right"), [("bit_widht", "bit_width"), ("weigths", "weights"), ("trainin", "training")]
)
def test_the_nearest_name_is_offered(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"; did you mean {right!r}?")):
        ThermoConfig(**{wrong: 2})


def test_all_wrong_fields_are_named_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^timesteps: found 0, [^\n]*; seed: found -1, [^\n]*$"):
        ThermoConfig(timesteps=0, seed=-1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantizer": "rtn", "hessian": "transition"}, "hessian: found 'path_kl', allowed is 'uniform' with quan"),
        ({"average_bits": 2.2}, "average_bits: found 2.2, allowed is None with quantizer='gptq'"),
        ({"quantizer": "gptq", "bit_width": 4, "average_bits": 2.2}, "average_bits: found 2.2, allowed is None"),
        (
            {"weights": {"method": "trellis", "bits": 2.5, "spread": False}},
            "weights.bits: found 2.5, allowed are whole",
        ),
        ({"own_share": 0.5}, "own_share: found 0.5, allowed is 0 with transitions='none'"),
        ({"path_kl.own_share": 0.5}, "training.0.own_share: found 0.5, allowed is 0.0 with states='calibration'"),
        ({"training_states": "chains"}, "training_states: found 'fresh', allowed is 'calibration' with nothing"),
        ({"blocks.num_texts": 5}, "training.0.num_texts: found 5, allowed is None with states='calibration'"),
        ({"markov_weight": 1.0}, "markov_weight: found 1.0, allowed is 0 with transitions='none'"),
        ({"path_kl.markov_weight": 1.0}, "training.markov_weight: found 1.0, allowed is 0 without static ranges in"),
        ({"path_kl.markov_weight": 1.0, "activation_bits": 4}, "training.markov_weight: found 1.0, allowed is 0 with"),
        ({"activation_group_size": 32}, "activation_group_size: found 32, allowed is None with activation_bits=16"),
        ({"activation_clip": 0.9}, "activation_clip: found 0.9, allowed is 1 with activation_bits=16"),
        (
            {"activation_bits": 4, "activation_clip": 0.9},
            "activation_clip: found 0.9, allowed is 1 with activation_ran",
        ),
        (
            {"activation_bits": 4, "activation_ranges": "dynamic", "range_objective": "output"},
            "range_objective: found 'output', allowed is 'activation' with activation_ranges='dynamic'",
        ),
        ({"activations": {"fit_to": "activation", "steps": 5}}, "activations.steps: found 5, allowed is None with fit"),
        (
            {"num_time_groups": 2, "activation_bits": 4, "activation_ranges": "dynamic"},
            "time_groups: found 2 groups, allowed is None with dynamic ranges",
        ),
        ({"num_time_groups": 1, "smoothing_method": "linear"}, "smoothing_method: found 'linear', allowed is None wi"),
        ({"num_time_groups": 17}, "num_time_groups: found 17, allowed are 1..16 (the number of timesteps)"),
        ({"num_time_groups": 3, "blocks.steps": 3}, "training: found blocks, allowed is none with weights that depend"),
        ({"num_time_groups": 3, "path_kl.steps": 3}, "training: found path_kl, allowed is none with weights that de"),
        ({"quantizer": "trellis", "blocks.steps": 3}, "training: found blocks, allowed are sequential and path_kl"),
        ({"quantizer": "trellis", "path_kl.what": "codes"}, "training.what: found 'codes', allowed are 'parameters'"),
        ({"quantizer": "trellis", "num_time_groups": 3}, "time_groups: found some, allowed is None with trellis"),
        ({"training": (PathKL(), Blocks())}, "training: found path_kl, blocks, allowed are sequential or blocks, then"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_combination_without_meaning_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=line(message)):
        ThermoConfig(**fields)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, ""),
        ({"quantizer": "least_squares"}, ""),
        ({"quantizer": "gptq"}, "'gptq'"),
        ({"num_time_groups": 2}, "time groups"),
        ({"activation_bits": 8}, "static activation ranges"),
        ({"activation_bits": 8, "activation_ranges": "dynamic"}, ""),
        ({"blocks.steps": 3}, "training 'blocks'"),
        ({"path_kl.steps": 3}, "training 'path_kl'"),
    ],
    ids=str,
)
def test_calibration_is_needed_where_something_is_fitted_on_it(changes: dict[str, Any], needed: str) -> None:
    assert ThermoConfig(**{"quantizer": "rtn", **changes}).needs_calibration == needed


def test_precision_names_both_bit_widths() -> None:
    assert ThermoConfig(bit_width=2, activation_bits=8).precision == "W2A8"
    assert ThermoConfig.preset("w2a4").precision == "W2A4"

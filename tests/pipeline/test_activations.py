"""Ranges of activations that are fitted or smoothed later are those of quantizing that way from the start."""

import itertools
from typing import Any, ClassVar

import pytest
import torch
from configurations import FEW, SMOOTH, TIMESTEPS, Outputs, Quantize, RandomIds

from thermo_lib import BoundarySmoother, Calibration
from thermo_lib.diffusion.inputs import watch_inputs
from thermo_lib.diffusion.path_kl import path_kl
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.activations import (
    requantize_activations,
    resmooth,
    shared_input_samples,
    smooth_each_layer,
)
from thermo_lib.quant import calls
from thermo_lib.quant.layers import QuantizedLinear


class TestSmoothing:
    """Boundary smoothing of a quantized model, from the start or afterwards."""

    GROUPS = pytest.mark.parametrize("activation_bits", [16, 4], ids=["weights", "activations"])

    @GROUPS
    def test_no_method_is_bit_identical_to_no_smoothing(
        self, quantized: Quantize, outputs: Outputs, activation_bits: int
    ) -> None:
        rough = quantized(num_time_groups=3, activation_bits=activation_bits)
        smooth = quantized(activation_bits=activation_bits, **SMOOTH)
        assert torch.equal(outputs(resmooth(rough, None)), outputs(rough))
        assert torch.equal(outputs(resmooth(smooth, None)), outputs(rough))
        assert not torch.equal(outputs(smooth), outputs(rough))

    @GROUPS
    @pytest.mark.parametrize("method", ["linear", "cubic", "sigmoid"])
    @pytest.mark.filterwarnings("ignore:time_groups.window")  # of 4, where half a group is 1
    def test_smoothing_afterwards_is_smoothing_from_the_start(
        self, quantized: Quantize, outputs: Outputs, activation_bits: int, method: str
    ) -> None:
        for window in (1, 4):
            start = quantized(
                activation_bits=activation_bits, **SMOOTH, smoothing_method=method, smoothing_window=window
            )
            afterwards = resmooth(quantized(num_time_groups=3, activation_bits=activation_bits), method, window)
            assert afterwards.config == start.config
            assert torch.equal(outputs(afterwards), outputs(start))

    @GROUPS
    def test_smoothing_changes_the_timesteps_at_the_boundaries_only(
        self, quantized: Quantize, outputs: Outputs, activation_bits: int
    ) -> None:
        # Groups 0-1, 2-3, 4-5 and a window of 1: timesteps 1 to 4 are next to a boundary.
        rough = outputs(quantized(num_time_groups=3, activation_bits=activation_bits))
        smooth = outputs(quantized(activation_bits=activation_bits, **SMOOTH))
        assert [torch.equal(a, b) for a, b in zip(rough, smooth, strict=True)] == [True, *[False] * 4, True]

    def test_smoothing_leaves_the_given_model_as_it_was(self, quantized: Quantize, outputs: Outputs) -> None:
        rough = quantized(num_time_groups=3)
        before = outputs(rough)
        resmooth(rough, "linear", 1)
        assert torch.equal(outputs(rough), before)
        assert rough.config.smoothing_method is None

    def test_smoothed_activations_keep_whole_zero_points(self, quantized: Quantize) -> None:
        lm = quantized(activation_bits=4, **SMOOTH)
        for name, steps in lm.smoothed_params().items():
            assert all(torch.equal(step.zero_point, step.zero_point.round()) for step in steps)
            layer = lm.quantized_layers()[name]
            ranges = layer.input_quantizer
            rows = ranges.row_of_step.long()
            assert torch.equal(ranges.scale[rows], torch.stack([step.scale for step in steps]))
            assert torch.equal(ranges.zero_point[rows], torch.stack([step.zero_point for step in steps]))

    def test_a_model_without_time_groups_has_nothing_to_smooth(self, quantized: Quantize, outputs: Outputs) -> None:
        lm = quantized()
        assert lm.time_params == lm.smoothed_params() == {}
        assert torch.equal(outputs(resmooth(lm, None)), outputs(lm))
        with pytest.raises(ValueError, match="smoothing: found 'linear', allowed is None without time groups"):
            resmooth(lm, "linear")

    @pytest.mark.parametrize(("method", "window"), [("step", 5), ("linear", 21), ("linear", 0)])
    def test_an_impossible_smoothing_is_refused(self, quantized: Quantize, method: str, window: int) -> None:
        with pytest.raises(ValueError, match=r"(smoothing|window): found"):
            resmooth(quantized(num_time_groups=3), method, window)


class TestRequantizeActivations:
    """Other activation settings for the same weights give the model that quantizing from the start gives."""

    STARTS: ClassVar[dict[str, dict[str, Any]]] = {
        "W2A16": {},
        "dynamic": {"activation_bits": 8, "activation_ranges": "dynamic"},
        "static": {"activation_bits": 8},
        "3 groups": {"activation_bits": 4, **SMOOTH},
    }
    ENDS: ClassVar[dict[str, dict[str, Any]]] = {
        "W2A16": {"activation_bits": 16, "num_time_groups": 1},
        "dynamic": {"activation_bits": 8, "num_time_groups": 1, "activation_ranges": "dynamic"},
        "static": {"activation_bits": 4, "num_time_groups": 1, "activation_ranges": "static"},
        "3 groups": {"activation_bits": 4, "activation_ranges": "static", **SMOOTH},
    }
    # Each start and each end meets another two or three times.
    WAYS: ClassVar[list[tuple[str, str]]] = [
        ("W2A16", "dynamic"),
        ("W2A16", "3 groups"),
        ("dynamic", "W2A16"),
        ("dynamic", "static"),
        ("static", "static"),
        ("static", "dynamic"),
        ("static", "3 groups"),
        ("3 groups", "W2A16"),
        ("3 groups", "static"),
    ]

    @pytest.mark.parametrize(("start", "end"), WAYS)
    def test_it_is_quantizing_with_the_new_settings(
        self,
        quantized: Quantize,
        outputs: Outputs,
        calibration: Calibration,
        start: str,
        end: str,
    ) -> None:
        before = quantized(**self.STARTS[start])
        kept = outputs(before)
        changed = requantize_activations(before, calibration, **self.ENDS[end])
        expected = quantized(**self.ENDS[end])
        assert changed.config == expected.config
        assert torch.equal(outputs(changed), outputs(expected))
        assert torch.equal(outputs(before), kept)

    @pytest.mark.parametrize(
        ("start", "changes", "message"),
        [
            ({}, {"bit_width": 4}, "bit_width: can't change without quantizing again"),
            ({}, {"activation_bits": 16, "num_time_groups": 3}, "found time-dependent weights"),
            ({"num_time_groups": 3}, {"activation_bits": 8}, "found time-dependent weights"),
            ({}, {"activation_bits": 9}, r"activations\.bits: found 9"),
        ],
    )
    def test_what_belongs_to_the_weights_is_refused(
        self,
        quantized: Quantize,
        calibration: Calibration,
        start: dict[str, Any],
        changes: dict[str, Any],
        message: str,
    ) -> None:
        with pytest.raises(ValueError, match=message):
            requantize_activations(quantized(**start), calibration, **changes)

    def test_static_ranges_need_calibration(self, quantized: Quantize) -> None:
        with pytest.raises(ValueError, match="calibration: found None, required by static activation ranges"):
            requantize_activations(quantized(), activation_bits=8)


@pytest.mark.parametrize(("decisive", "dtype"), [(True, torch.float64), (False, torch.float32)])
def test_samples_are_the_same_tokens_in_either_type(
    quantized: Quantize, calibration: Calibration, decisive: bool, dtype: torch.dtype
) -> None:
    lm, seen = quantized(activation_bits=16), set()
    with watch_inputs(lm.quantized_layers(), lambda _, x: seen.add((len(x) > 1, x.dtype))):
        samples = shared_input_samples(lm, calibration, 4, decisive=decisive)
    assert (True, dtype) in seen
    pairs = list(zip(samples, shared_input_samples(lm, calibration, 4), strict=True))
    for (names, sample), (others, other) in pairs:
        assert names == others
        assert torch.equal(sample.timestep, other.timestep)
        assert torch.equal(sample.is_masked, other.is_masked)
        assert sample.x.dtype == torch.float32
        torch.testing.assert_close(sample.x, other.x, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(sample.x, other.x) for (_, sample), (_, other) in pairs) == decisive


@pytest.mark.slow
class TestRangeObjectives:
    """Static ranges fitted to more than the activations' own error."""

    def test_fitting_to_path_kl_lowers_it_on_the_calibration_states(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize
    ) -> None:
        (states,) = calibration.parts
        totals = {
            objective: path_kl(
                tiny, quantized(bit_width=8, activation_bits=3, range_objective=objective, **SMOOTH), states, TIMESTEPS
            ).total
            for objective in ("activation", "path_kl")
        }
        assert totals["path_kl"] < 0.9 * totals["activation"]

    def test_fitting_to_path_kl_leaves_the_given_models_as_they_were(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize, outputs: Outputs
    ) -> None:
        weights = quantized()
        before = outputs(weights), outputs(tiny)
        activations = {"bits": 4, "fit_to": "path_kl", "steps": FEW}
        fitted = requantize_activations(weights, calibration, reference=tiny, activations=activations)
        assert torch.equal(outputs(weights), before[0])
        assert torch.equal(outputs(tiny), before[1])
        assert torch.equal(outputs(fitted), outputs(quantized(activation_bits=4, range_objective="path_kl")))
        assert weights.quantized_layers().keys() == fitted.quantized_layers().keys() == set(weights.weight_params)

    def test_path_kl_needs_the_full_precision_model(self, quantized: Quantize, calibration: Calibration) -> None:
        with pytest.raises(ValueError, match="reference: found None, required by fit_to='path_kl'"):
            requantize_activations(quantized(), calibration, activations={"bits": 4, "fit_to": "path_kl"})

    def test_a_fitted_single_group_has_a_whole_zero_point(self, quantized: Quantize) -> None:
        lm = quantized(activation_bits=4, range_objective="path_kl")
        for layer in lm.quantized_layers().values():
            zero_point = layer.input_quantizer.zero_point
            assert torch.equal(zero_point, zero_point.round())

    def test_ranges_by_token_state_see_which_tokens_are_masked(
        self, quantized: Quantize, random_ids: RandomIds
    ) -> None:
        lm = quantized(activation_bits=8, activation_token_states=True)
        ids = random_ids(2, 8)
        ids[0, 3] = ids[1, 5] = lm.mask_token_id
        seen = []

        def look(layer: QuantizedLinear, _: object) -> None:
            seen.append(calls.CALL.is_masked.nonzero().tolist())

        found = list(lm.quantized_layers().values())
        handles = [layer.register_forward_pre_hook(look) for layer in found]
        lm.model.hidden(ids)
        for handle in handles:
            handle.remove()
        assert seen == [[[0, 3], [1, 5]]] * len(found)
        assert calls.CALL.is_masked is None  # it belongs to the call

    def test_each_layer_may_choose_its_smoothing(
        self, quantized: Quantize, calibration: Calibration, outputs: Outputs
    ) -> None:
        rough = quantized(activation_bits=4, num_time_groups=2)
        only = smooth_each_layer(rough, calibration, [], [])
        assert torch.equal(outputs(only), outputs(rough))  # nothing to choose from but no smoothing
        free = smooth_each_layer(rough, calibration, ["linear", "cubic", "sigmoid"], [1, 2])
        assert free.config.num_time_groups == TIMESTEPS
        for name, params in free.activation_params.items():
            found = torch.stack([p.scale for p in params])
            tables = [
                torch.stack([p.scale for p in BoundarySmoother(m, w).smooth(rough.activation_params[name])])
                for m, w in ((None, 1), *itertools.product(("linear", "cubic", "sigmoid"), (1, 2)))
            ]
            assert any(torch.equal(found, table) for table in tables), name

    def test_the_choice_by_path_kl_is_never_worse_than_no_smoothing(
        self, tiny: DiffusionLM, quantized: Quantize, calibration: Calibration, outputs: Outputs
    ) -> None:
        rough = quantized(activation_bits=3, num_time_groups=2)
        before = outputs(rough)
        free = smooth_each_layer(rough, calibration, ["linear"], [1], reference=tiny)
        assert torch.equal(outputs(rough), before)
        (states,) = calibration.parts  # fewer than most_states: it chose on all of them
        totals = [path_kl(tiny, lm, states, TIMESTEPS).total for lm in (rough, free)]
        assert totals[1] <= totals[0] + 1e-6
        assert len({name for name, params in free.activation_params.items() if params[1].scale != params[2].scale}) > 0

"""Quantizing a model changes the linears of its blocks as configured, and nothing else."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from configurations import CONFIGURATIONS, TIMESTEPS, Outputs, Quantize, RandomIds, config_of
from small_runs import shortest
from torch import nn

from thermo_lib import Calibration, quantize
from thermo_lib.diffusion.path_kl import path_kl
from thermo_lib.diffusion.states import States
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.model import linear_names
from thermo_lib.quant.buffers import TimestepTable

SHORT = {name: shortest(changes) for name, changes in CONFIGURATIONS.items()}
every_configuration = pytest.mark.parametrize("changes", SHORT.values(), ids=SHORT)
# What these do, others do, with more.
IN_OTHERS = {
    "W2A16",
    "W4A16 gptq",
    "W2A16, 3 groups",
    "W2A8, 3 groups, smoothed",
    "W2A4, 3 groups, smoothed",
    "W2A4, 1 group",
    "W2A8 dynamic",
    "W2A16 trellis",
}
AGAIN = {name: changes for name, changes in SHORT.items() if name not in IN_OTHERS}
# One of each kind of layers.
KINDS = [SHORT[name] for name in ("W2A16", "W2A4, by token state and channel group", "W2A8 dynamic", "W2A16 trellis")]


class TestQuantize:
    """All linears of the blocks are quantized, nothing else, and the given model stays as it was."""

    @every_configuration
    def test_linears_of_the_blocks_are_quantized_and_everything_else_is_kept(
        self, tiny: DiffusionLM, quantized: Quantize, changes: dict[str, Any]
    ) -> None:
        lm = quantized(**changes)
        names = linear_names(tiny.model)
        assert len(names) == 2 * 7
        assert list(lm.quantized_layers()) == names
        assert not [name for name in linear_names(lm.model)]
        state = lm.model.state_dict()
        for name, tensor in tiny.model.state_dict().items():
            if name.removesuffix(".weight") not in names:
                assert torch.equal(state[name], tensor), name

    @pytest.mark.slow
    @pytest.mark.parametrize("changes", AGAIN.values(), ids=AGAIN)
    def test_equal_inputs_give_equal_models_and_stay_as_they_were(
        self,
        build_tiny: Callable[[int], DiffusionLM],
        calibration: Calibration,
        quantized: Quantize,
        changes: dict[str, Any],
    ) -> None:
        lm = build_tiny(0)
        before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
        first, again = quantized(**changes), quantize(lm, config_of(**changes), calibration)
        a, b = first.model.state_dict(), again.model.state_dict()
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in a)
        after = lm.model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert all(type(lm.model.get_submodule(name)) is nn.Linear for name in linear_names(lm.model))
        assert not any(module._forward_pre_hooks for module in lm.model.modules())

    @pytest.mark.parametrize("changes", [*SHORT.values(), {"embedding_bits": 8}], ids=[*SHORT, "8-bit embeddings"])
    def test_everything_is_computed_where_the_model_is(
        self,
        quantized: Quantize,
        random_ids: RandomIds,
        one_device: AbstractContextManager[None],
        monkeypatch: pytest.MonkeyPatch,
        changes: dict[str, Any],
    ) -> None:
        # The device without numbers stands for a GPU; one block is like the other.
        lm = copy.deepcopy(quantized(**changes))
        del lm.model.model.layers[1:]
        lm.set_timestep(TIMESTEPS - 1, TIMESTEPS)
        rows = {module: module.row() for module in lm.model.modules() if isinstance(module, TimestepTable)}
        monkeypatch.setattr(TimestepTable, "row", lambda table: rows[table])
        ids = random_ids(2, 10, seed=5).to("meta")
        for dtype in (torch.float32, torch.bfloat16) if changes in KINDS else (torch.bfloat16,):
            model = lm.model.to(device="meta", dtype=dtype)
            with one_device:
                logits = model(ids, attention_mask=ids != 0).logits
            assert logits.shape[:2] == ids.shape
            assert (logits.device.type, logits.dtype) == ("meta", dtype)

    @pytest.mark.parametrize("quantizer", ["rtn", "least_squares", "gptq"])
    def test_eight_bits_are_close_and_two_bits_are_not(
        self, tiny: DiffusionLM, quantized: Quantize, outputs: Outputs, quantizer: str
    ) -> None:
        exact = outputs(tiny)
        errors = [
            float((outputs(quantized(quantizer=quantizer, bit_width=bits)) - exact).square().mean() / exact.var())
            for bits in (8, 4, 2)
        ]
        assert errors[0] < 0.001 < errors[1] < errors[2]

    def test_gptq_is_closer_to_the_model_on_its_states_than_rounding(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize
    ) -> None:
        (states,) = calibration.parts
        kl = {q: path_kl(tiny, quantized(quantizer=q, bit_width=4), states, TIMESTEPS).total for q in ("gptq", "rtn")}
        assert kl["gptq"] < 0.7 * kl["rtn"]

    def test_weights_of_time_groups_share_their_codes_and_differ_in_their_parameters(self, quantized: Quantize) -> None:
        one, three = quantized(quantizer="gptq"), quantized(quantizer="gptq", num_time_groups=3)
        first = "model.layers.0.self_attn.q_proj"
        assert torch.equal(one.quantized_layers()[first].packed, three.quantized_layers()[first].packed)
        assert [p.time_range for p in three.weight_params[first]] == [(0, 2), (2, 4), (4, 6)]
        scales = [p.scale for p in three.weight_params[first]]
        assert not torch.equal(scales[0], scales[1])
        assert not torch.equal(scales[1], scales[2])

    @pytest.mark.parametrize("activation_bits", [16, 4])
    def test_only_time_groups_make_the_output_depend_on_the_timestep(
        self, quantized: Quantize, outputs: Outputs, activation_bits: int
    ) -> None:
        for groups, distinct in ((1, [0] * 6), (3, [0, 0, 2, 2, 4, 4])):
            logits = outputs(quantized(num_time_groups=groups, activation_bits=activation_bits))
            same_as = [next(j for j in range(6) if torch.equal(logits[i], logits[j])) for i in range(6)]
            assert same_as == distinct

    def test_a_calibration_of_another_number_of_steps_is_taken_at_the_same_mask_ratio(
        self, tiny: DiffusionLM, calibration: Calibration
    ) -> None:
        coarse, fine = (
            quantize(tiny, config_of(num_time_groups=3, timesteps=timesteps), calibration) for timesteps in (3, 6)
        )
        for name, params in fine.weight_params.items():
            assert [p.time_range for p in coarse.weight_params[name]] == [(0, 1), (1, 2), (2, 3)]
            assert all(torch.equal(a.scale, b.scale) for a, b in zip(params, coarse.weight_params[name], strict=True))

    @pytest.mark.parametrize(
        "changes",
        [{"quantizer": "gptq"}, {"num_time_groups": 2}, {"activation_bits": 8}],
        ids=["gptq", "time groups", "static activations"],
    )
    def test_missing_calibration_is_an_error_that_says_what_needs_it(
        self, tiny: DiffusionLM, changes: dict[str, Any]
    ) -> None:
        with pytest.raises(ValueError, match=r"calibration: found None, required by .*; calibrate"):
            quantize(tiny, config_of(**changes))

    def test_a_time_group_without_states_is_named(self, tiny: DiffusionLM, random_ids: RandomIds) -> None:
        ids = random_ids(2, 8)
        states = States(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([0, 5]), ids)
        with pytest.raises(ValueError, match=r"calibration: found no state in timesteps 2\.\.3"):
            quantize(
                tiny, config_of(activation_bits=8, num_time_groups=3), Calibration((states,), TIMESTEPS, "forward")
            )

    @pytest.mark.parametrize("quantizer", ["rtn", "least_squares", "gptq"])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_weight_that_is_not_finite_is_named(
        self,
        build_tiny: Callable[[int], DiffusionLM],
        calibration: Calibration,
        quantizer: str,
        value: float,
    ) -> None:
        lm = build_tiny(0)
        lm.model.model.layers[1].self_attn.v_proj.weight[3, 4] = value
        with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.v_proj: found NaN or infinity"):
            quantize(lm, config_of(quantizer=quantizer), calibration)

    def test_a_model_without_weights_is_refused(self, tiny: DiffusionLM) -> None:
        elsewhere = DiffusionLM(copy.deepcopy(tiny.model).to("meta"), tiny.tokenizer, tiny.mask_token_id, "elsewhere")
        with pytest.raises(ValueError, match="lm: found a model on meta, without weights"):
            quantize(elsewhere, config_of())

    def test_a_quantized_model_is_not_quantized_again(self, quantized: Quantize) -> None:
        with pytest.raises(ValueError, match="quantized"):
            quantize(quantized(), config_of(bit_width=4))

"""Quantized models: what is quantized, what is stored, and that a saved model computes what it computed before."""

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thermo_lib import BoundarySmoother, Calibration, ThermoConfig, load_model, load_quantized, quantize, save_quantized
from thermo_lib.diffusion.path_kl import path_kl
from thermo_lib.diffusion.states import States
from thermo_lib.files.snapshots import Snapshot
from thermo_lib.models.lm import DiffusionLM, save_model
from thermo_lib.pipeline.activations import requantize_activations, resmooth, smooth_each_layer
from thermo_lib.pipeline.model import QuantizedLM, linear_names
from thermo_lib.pipeline.training import optimize_transitions, reconstruct_blocks
from thermo_lib.pipeline.weights import input_hessians
from thermo_lib.quant.codes import unpack
from thermo_lib.quant.layers import QuantizedLinear
from thermo_lib.time_aware.groups import TimeGroups
from thermo_lib.transition import fit

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


def config_of(**changes: Any) -> ThermoConfig:
    """The tests' configuration with changes."""
    return ThermoConfig(**{**BASE, **changes})


@pytest.fixture(autouse=True)
def few_steps(override: Callable[[dict[str, Any]], None]) -> None:
    """What is trained is trained for a second."""
    steps = {"ranges.path_kl_steps": 40, "ranges.output_steps": 40, "transition.steps": 40, "reconstruction.steps": 40}
    steps |= {"sequential.steps": 20, "chains.steps": 40, "trellis.beam": 8}
    override(steps | {"sequential.code": 5, "reconstruction.code": 5, "data.sequence_length": 16})


@pytest.fixture(scope="module")
def quantized(tiny: DiffusionLM, calibration: Calibration) -> Quantize:
    """Quantizes the tiny model; equal configurations share a model, which tests don't change."""
    made: dict[ThermoConfig, QuantizedLM] = {}

    def make(**changes: Any) -> QuantizedLM:
        config = config_of(**changes)
        if config not in made:
            made[config] = quantize(tiny, config, calibration if config.needs_calibration else None)
        return made[config]

    return make


@pytest.fixture(scope="module")
def outputs(random_ids: RandomIds) -> Callable[[DiffusionLM], Tensor]:
    """A model's logits at every timestep, ``(timesteps, batch, length, vocabulary)``."""
    ids = random_ids(2, 10, seed=5)

    def run(lm: DiffusionLM) -> Tensor:
        found = []
        for timestep in range(TIMESTEPS):
            lm.set_timestep(timestep, TIMESTEPS)
            with torch.no_grad():
                found.append(lm.model(ids))
        return torch.stack(found)

    return run


Outputs = Callable[[DiffusionLM], Tensor]


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

    @every_configuration
    def test_the_given_model_stays_as_it_was(
        self, build_tiny: Callable[[int], DiffusionLM], calibration: Calibration, changes: dict[str, Any]
    ) -> None:
        lm = build_tiny(0)
        before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
        quantize(lm, config_of(**changes), calibration)
        after = lm.model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert all(type(lm.model.get_submodule(name)) is nn.Linear for name in linear_names(lm.model))
        assert not any(module._forward_pre_hooks for module in lm.model.modules())

    @pytest.mark.parametrize(
        "changes", [*CONFIGURATIONS.values(), {"embedding_bits": 8}], ids=[*CONFIGURATIONS, "8-bit embeddings"]
    )
    def test_everything_is_computed_where_the_model_is(
        self,
        quantized: Quantize,
        random_ids: RandomIds,
        one_device: AbstractContextManager[None],
        monkeypatch: pytest.MonkeyPatch,
        changes: dict[str, Any],
    ) -> None:
        # The device without numbers stands for a GPU.
        lm = copy.deepcopy(quantized(**changes))
        lm.set_timestep(TIMESTEPS - 1, TIMESTEPS)
        layers = [module for module in lm.model.modules() if isinstance(module, QuantizedLinear)]
        tables = {layer: {name: layer._row(name) for name in ("weight_row", "activation_row")} for layer in layers}
        monkeypatch.setattr(QuantizedLinear, "_row", lambda layer, table: tables[layer][table])
        ids = random_ids(2, 10, seed=5).to("meta")
        for dtype in (torch.float32, torch.bfloat16):
            model = lm.model.to(device="meta", dtype=dtype)
            with one_device:
                logits = model(ids, attention_mask=ids != 0)
            assert logits.shape[:2] == ids.shape
            assert (logits.device.type, logits.dtype) == ("meta", dtype)

    @every_configuration
    def test_equal_inputs_give_equal_models(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize, changes: dict[str, Any]
    ) -> None:
        first, again = quantized(**changes), quantize(tiny, config_of(**changes), calibration)
        a, b = first.model.state_dict(), again.model.state_dict()
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in a)

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
        with pytest.raises(ValueError, match="calibration: found None, required by quantizer="):
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

    def test_a_model_elsewhere_than_on_the_cpu_is_refused(self, tiny: DiffusionLM) -> None:
        elsewhere = DiffusionLM(copy.deepcopy(tiny.model).to("meta"), tiny.tokenizer, tiny.mask_token_id, "elsewhere")
        with pytest.raises(ValueError, match="lm: found a model on meta, allowed is cpu"):
            quantize(elsewhere, config_of())

    def test_a_quantized_model_is_not_quantized_again(self, quantized: Quantize) -> None:
        with pytest.raises(ValueError, match="quantized"):
            quantize(quantized(), config_of(bit_width=4))


class TestBitsPerWeight:
    """Bits of codes and parameters for each weight, worked out by hand.

    A block has q, k, v, o of 32 rows and columns, gate and up of 48 rows and 32 columns, down of 32 rows and 48
    columns: 4 * 1024 + 3 * 1536 = 8704 weights. In groups of 20, 32 columns have 2 groups and 48 have 3:
    4 * 32 * 2 + 2 * 48 * 2 + 32 * 3 = 544 groups of two float16: 544 * 32 = 17408 bits, 2 bits a weight.
    """

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, 2 + 2),
            ({"bit_width": 4}, 4 + 2),
            ({"bit_width": 8}, 8 + 2),
            ({"num_time_groups": 3}, 2 + 3 * 2),
            (SMOOTH, 2 + 3 * 2),  # smoothing stores nothing
            # 7 linears, each with 3 groups of a float32 scale and zero point: 7 * 3 * 64 = 1344 bits a block
            ({"activation_bits": 8, "num_time_groups": 3}, 2 + 2 + 1344 / 8704),
            ({"activation_bits": 8, "activation_ranges": "dynamic"}, 2 + 2),
            # One group a row: 4 * 32 + 2 * 48 + 32 = 256 groups, 256 * 32 / 8704 bits a weight
            ({"group_size": 64}, 2 + 256 * 32 / 8704),
            # Trellis: a float16 scale a group, no zero point, 4 bits a column: (6 * 32 + 48) * 4 bits
            ({"quantizer": "trellis", "group_size": 64}, 2 + (256 * 16 + 240 * 4) / 8704),
        ],
    )
    def test_golden(self, quantized: Quantize, changes: dict[str, Any], expected: float) -> None:
        assert quantized(**changes).bits_per_weight == pytest.approx(expected, rel=1e-12)

    def test_the_last_byte_of_a_row_counts_whole(self, build_tiny: Callable[[int], DiffusionLM]) -> None:
        # 3 input features at 2 bits take a byte a row; 4 rows: 32 bits of codes and 4 * 32 of parameters, 12 weights.
        lm = build_tiny(0)
        block = lm.model.model.layers[0]
        lm.model.model.layers = nn.ModuleList([nn.ModuleDict({"only": nn.Linear(3, 4, bias=False)})])
        assert quantize(lm, config_of()).bits_per_weight == (32 + 128) / 12
        assert block.self_attn.q_proj.weight.shape == (32, 32)


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
        resmooth(rough, "linear", 2)
        assert torch.equal(outputs(rough), before)
        assert rough.config.method is None

    def test_smoothed_activations_keep_whole_zero_points(self, quantized: Quantize) -> None:
        lm = quantized(activation_bits=4, **SMOOTH)
        for name, steps in lm.smoothed_params().items():
            assert all(torch.equal(step.zero_point, step.zero_point.round()) for step in steps)
            layer = lm.quantized_layers()[name]
            rows = layer.activation_row.long()
            assert torch.equal(layer.activation_scale[rows], torch.stack([step.scale for step in steps]))
            assert torch.equal(layer.activation_zero_point[rows], torch.stack([step.zero_point for step in steps]))

    def test_a_model_without_time_groups_has_nothing_to_smooth(self, quantized: Quantize, outputs: Outputs) -> None:
        lm = quantized()
        assert lm.time_params == lm.smoothed_params() == {}
        assert torch.equal(outputs(resmooth(lm, "linear")), outputs(lm))

    @pytest.mark.parametrize(("method", "window"), [("step", 5), ("linear", 21), ("linear", 0)])
    def test_an_impossible_smoothing_is_refused(self, quantized: Quantize, method: str, window: int) -> None:
        with pytest.raises(ValueError, match="smoothing_"):
            resmooth(quantized(num_time_groups=3), method, window)


class TestRequantizeActivations:
    """Other activation settings for the same weights give the model that quantizing from the start gives."""

    @pytest.mark.parametrize(
        "start",
        [
            {},
            {"activation_bits": 8, "activation_ranges": "dynamic"},
            {"activation_bits": 8},
            {"activation_bits": 4, **SMOOTH},
        ],
        ids=["from W2A16", "from dynamic", "from static", "from 3 groups"],
    )
    @pytest.mark.parametrize(
        "end",
        [
            {"activation_bits": 16, "num_time_groups": 1},
            {"activation_bits": 8, "num_time_groups": 1, "activation_ranges": "dynamic"},
            {"activation_bits": 4, "num_time_groups": 1, "activation_ranges": "static"},
            {"activation_bits": 4, "activation_ranges": "static", **SMOOTH},
        ],
        ids=["to W2A16", "to dynamic", "to static", "to 3 groups"],
    )
    def test_it_is_quantizing_with_the_new_settings(
        self,
        quantized: Quantize,
        outputs: Outputs,
        calibration: Calibration,
        start: dict[str, Any],
        end: dict[str, Any],
    ) -> None:
        before = quantized(**start)
        kept = outputs(before)
        changed = requantize_activations(before, calibration, **end)
        expected = quantized(**{**start, **end})
        assert changed.config == expected.config
        assert torch.equal(outputs(changed), outputs(expected))
        assert torch.equal(outputs(before), kept)

    @pytest.mark.parametrize(
        ("start", "changes", "message"),
        [
            ({}, {"bit_width": 4}, "bit_width: can't change without quantizing again"),
            ({}, {"activation_bits": 16, "num_time_groups": 3}, "found time-dependent weights"),
            ({"num_time_groups": 3}, {"activation_bits": 8}, "found time-dependent weights"),
            ({}, {"activation_bits": 9}, "activation_bits"),
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


class TestSaveAndLoad:
    """A saved model computes bit for bit what it computed before; a damaged folder is refused."""

    @every_configuration
    def test_logits_at_every_timestep_are_bit_identical(
        self, quantized: Quantize, outputs: Outputs, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        lm = quantized(**changes)
        save_quantized(lm, tmp_path / "q")
        loaded = load_quantized(tmp_path / "q")
        assert torch.equal(outputs(loaded), outputs(lm))
        assert loaded.config == lm.config
        assert loaded.bits_per_weight == lm.bits_per_weight
        assert loaded.mask_token_id == lm.mask_token_id
        assert loaded.tokenizer.to_str() == lm.tokenizer.to_str()
        for method in ("cubic", None):  # the parameters before smoothing are there too
            assert torch.equal(outputs(resmooth(loaded, method)), outputs(resmooth(lm, method)))

    def test_codes_are_stored_packed(self, quantized: Quantize, tmp_path: Path) -> None:
        save_quantized(quantized(), tmp_path / "q")
        stored = load_file(tmp_path / "q" / "model.safetensors")
        packed = {name: tensor for name, tensor in stored.items() if name.endswith(".packed")}
        assert len(packed) == 14
        # Four two-bit codes a byte: 8704 weights a block in 2176 bytes.
        assert sum(tensor.numel() * tensor.element_size() for tensor in packed.values()) == 2 * 2176
        assert not [name for name in stored if name.endswith("_proj.weight")]

    def test_saving_a_loaded_model_writes_the_same_bytes(self, quantized: Quantize, tmp_path: Path) -> None:
        save_quantized(quantized(activation_bits=4, **SMOOTH), tmp_path / "q")
        save_quantized(load_quantized(tmp_path / "q"), tmp_path / "again")
        for path in (tmp_path / "q").iterdir():
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
            assert path.stat().st_mode & 0o777 == 0o644

    def test_a_failing_write_leaves_the_earlier_folder(
        self, quantized: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_quantized(quantized(), tmp_path / "q")
        before = {p.name: p.read_bytes() for p in (tmp_path / "q").iterdir()}
        monkeypatch.setattr("thermo_lib.pipeline.storage.config_json", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_quantized(quantized(bit_width=4), tmp_path / "q")
        assert {p.name: p.read_bytes() for p in (tmp_path / "q").iterdir()} == before
        assert [p.name for p in tmp_path.iterdir()] == ["q"]

    def test_a_folder_of_a_full_precision_model_is_refused(self, tiny: DiffusionLM, tmp_path: Path) -> None:
        save_model(tiny, tmp_path / "m")
        with pytest.raises(ValueError, match="quantization_config: found None, expected an object"):
            load_quantized(tmp_path / "m")

    def test_a_folder_of_a_quantized_model_is_no_full_precision_model(
        self, quantized: Quantize, tmp_path: Path
    ) -> None:
        save_quantized(quantized(), tmp_path / "q")
        with pytest.raises(ValueError, match=r"found a quantized model in .*load_quantized"):
            load_model(str(tmp_path / "q"))

    def test_a_missing_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"model: found .*absent"):
            load_quantized(tmp_path / "absent")


Q_PROJ = "model.layers.0.self_attn.q_proj"


def refused(folder: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    """Change the tensors of a saved model and see it refused with the message."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        load_quantized(folder)


class TestDamagedFolders:
    """Each kind of damage is named."""

    @pytest.fixture
    def folder(self, quantized: Quantize, tmp_path: Path) -> Path:
        """A saved model with time-dependent activation parameters."""
        save_quantized(quantized(activation_bits=4, **SMOOTH), tmp_path / "q")
        return tmp_path / "q"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param(lambda t: t.pop(f"{Q_PROJ}.packed"), f"missing tensors {Q_PROJ}.packed", id="codes missing"),
            pytest.param(
                lambda t: t.pop(f"{Q_PROJ}.weight_scale"), f"missing tensors {Q_PROJ}.weight_scale", id="scale missing"
            ),
            pytest.param(
                lambda t: t.pop(f"{Q_PROJ}.activation_zero_point"),
                f"missing tensors {Q_PROJ}.activation_zero_point",
                id="activation zero point missing",
            ),
            pytest.param(lambda t: t.pop("model.norm.weight"), "missing tensors model.norm.weight", id="norm missing"),
            pytest.param(
                lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(32, 32)}),
                f"unexpected tensors {Q_PROJ}.weight",
                id="extra tensor",
            ),
            pytest.param(
                lambda t: t.update({f"{Q_PROJ}.packed": t[f"{Q_PROJ}.packed"][:, :-1].contiguous()}),
                f"tensor {Q_PROJ}.packed: found shape",
                id="codes too short",
            ),
            pytest.param(
                lambda t: t.update({f"{Q_PROJ}.packed": t[f"{Q_PROJ}.packed"].float()}),
                f"{Q_PROJ}.packed",
                id="codes of another type",
            ),
            pytest.param(
                lambda t: t.update({f"{Q_PROJ}.weight_scale": t[f"{Q_PROJ}.weight_scale"].float()}),
                f"tensor {Q_PROJ}.weight_scale: found torch.float32, expected torch.float16",
                id="scale of another type",
            ),
            pytest.param(
                lambda t: t.update({f"{Q_PROJ}.activation_scale": t[f"{Q_PROJ}.activation_scale"].double()}),
                f"tensor {Q_PROJ}.activation_scale: found torch.float64, expected torch.float32",
                id="range of another type",
            ),
            pytest.param(
                lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}),
                "tensor model.norm.weight: found torch.int8, allowed are",
                id="norm of another type",
            ),
            pytest.param(
                lambda t: t[f"{Q_PROJ}.weight_scale"].fill_(torch.nan),
                f"tensor {Q_PROJ}.weight_scale: found NaN",
                id="scale NaN",
            ),
            pytest.param(lambda t: t[f"{Q_PROJ}.weight_scale"].fill_(0), f"{Q_PROJ}.*scale: found 0", id="scale zero"),
            pytest.param(
                lambda t: t[f"{Q_PROJ}.activation_scale"].fill_(-1), f"{Q_PROJ}.*scale: found -1", id="scale negative"
            ),
        ],
    )
    def test_a_damaged_tensor_is_named(
        self, folder: Path, change: Callable[[dict[str, Tensor]], object], message: str
    ) -> None:
        refused(folder, change, message)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param(
                lambda t: t.pop(f"{Q_PROJ}.packed_column_bits"),
                f"missing tensors {Q_PROJ}.packed_column_bits",
                id="bits missing",
            ),
            pytest.param(
                lambda t: t[f"{Q_PROJ}.packed_column_bits"].fill_(0x72),
                f"tensor {Q_PROJ}.packed_column_bits: found 7, allowed are 0..6",
                id="seven bits",
            ),
            pytest.param(
                lambda t: t[f"{Q_PROJ}.packed_column_bits"].fill_(0x33),
                f"tensor {Q_PROJ}.packed: found shape",
                id="other bits than the codes have",
            ),
            pytest.param(
                lambda t: t.update({f"{Q_PROJ}.packed_column_bits": t[f"{Q_PROJ}.packed_column_bits"].float()}),
                f"tensor {Q_PROJ}.packed",
                id="bits of another type",
            ),
            pytest.param(
                lambda t: t.update({f"{Q_PROJ}.weight_zero_point": torch.zeros(1, 32, 2)}),
                f"unexpected tensors {Q_PROJ}.weight_zero_point",
                id="zero points",
            ),
        ],
    )
    def test_damaged_streams_are_named(
        self, quantized: Quantize, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
    ) -> None:
        save_quantized(quantized(quantizer="trellis"), tmp_path / "q")
        refused(tmp_path / "q", change, message)

    @pytest.mark.parametrize("table", ["model.embed_tokens", "lm_head"])
    def test_damaged_tables_are_named(self, quantized: Quantize, tmp_path: Path, table: str) -> None:
        save_quantized(quantized(embedding_bits=8), tmp_path / "q")
        name = f"{table}.weight_scale"
        refused(tmp_path / "q", lambda t: t[name].neg_(), f"tensor {name}: found -.*, allowed is above 0")
        save_quantized(quantized(embedding_bits=8), tmp_path / "q")
        refused(tmp_path / "q", lambda t: t.update({name: t[name].double()}), f"tensor {name}: found torch.float64")

    def test_a_truncated_file_is_named(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"model\.safetensors: not a complete safetensors file"):
            load_quantized(folder)

    @pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
    def test_a_missing_file_is_named(self, folder: Path, file: str) -> None:
        (folder / file).unlink()
        with pytest.raises(ValueError, match=f"found no {file}"):
            load_quantized(folder)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({**BASE, "bit_width": 3}, "bit_width"),
            ({**BASE, "surplus": 1}, "surplus"),
            ({**BASE, "timesteps": 10**10}, "config.json: timesteps: found 10000000000, allowed is"),
            ([1], r"config.json: quantization_config: found \[1\]"),
            ({**BASE, "num_time_groups": 7}, "num_time_groups: found 7"),
            ({**BASE, "bit_width": 4}, "missing tensors|unexpected tensors|found shape"),
            ({**BASE, "quant_method": "gptq"}, "quantization_config: found .*gptq.*expected .*'thermo'"),
            ({**BASE, "format_version": 1}, "format_version: found 1, allowed is 2: quantize the model again"),
            ([], "quantization_config: found "),
            (None, "quantization_config: found None"),
        ],
    )
    def test_a_configuration_that_is_not_the_model_s_is_refused(
        self, folder: Path, changed: object, message: str
    ) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(changed, dict):
            changed = {"quant_method": "thermo", "format_version": 2, **changed}
        path.write_text(json.dumps({**content, "quantization_config": changed}), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_quantized(folder)

    def test_a_copy_elsewhere_loads(self, folder: Path, tmp_path: Path, outputs: Outputs) -> None:
        copy = shutil.copytree(folder, tmp_path / "elsewhere")
        assert torch.equal(outputs(load_quantized(copy)), outputs(load_quantized(folder)))


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
        fitted = requantize_activations(
            weights, calibration, reference=tiny, activation_bits=4, range_objective="path_kl"
        )
        assert torch.equal(outputs(weights), before[0])
        assert torch.equal(outputs(tiny), before[1])
        assert torch.equal(outputs(fitted), outputs(quantized(activation_bits=4, range_objective="path_kl")))
        assert weights.quantized_layers().keys() == fitted.quantized_layers().keys() == set(weights.weight_params)

    def test_path_kl_needs_the_full_precision_model(self, quantized: Quantize, calibration: Calibration) -> None:
        with pytest.raises(ValueError, match="reference: found None, required by range_objective='path_kl'"):
            requantize_activations(quantized(), calibration, activation_bits=4, range_objective="path_kl")

    def test_a_fitted_single_group_has_a_whole_zero_point(self, quantized: Quantize) -> None:
        lm = quantized(activation_bits=4, range_objective="path_kl")
        for layer in lm.quantized_layers().values():
            assert torch.equal(layer.activation_zero_point, layer.activation_zero_point.round())

    def test_ranges_by_token_state_see_which_tokens_are_masked(
        self, quantized: Quantize, random_ids: RandomIds
    ) -> None:
        lm = quantized(activation_bits=8, activation_token_states=True)
        ids = random_ids(2, 8)
        ids[0, 3] = ids[1, 5] = lm.mask_token_id
        lm.model.hidden(ids)
        for layer in lm.quantized_layers().values():
            assert layer.is_masked.nonzero().tolist() == [[0, 3], [1, 5]]

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
        (states,) = calibration.parts  # fewer than ranges.choice_states: it chose on all of them
        totals = [path_kl(tiny, lm, states, TIMESTEPS).total for lm in (rough, free)]
        assert totals[1] <= totals[0] + 1e-6
        assert len({name for name, params in free.activation_params.items() if params[1].scale != params[2].scale}) > 0


class TestOptimizeTransitions:
    """Weights' parameters, ranges and codes trained together for least path KL."""

    every_way = pytest.mark.parametrize(
        "changes",
        [
            {},
            {"activation_bits": 4, "activation_ranges": "dynamic"},
            {"activation_bits": 4, "activation_token_states": True, **SMOOTH},
        ],
        ids=["W2A16", "dynamic", "static"],
    )

    @every_way
    @pytest.mark.parametrize("what", ["parameters", "codes", "network"])
    def test_it_lowers_path_kl_and_leaves_the_given_models(
        self,
        tiny: DiffusionLM,
        calibration: Calibration,
        quantized: Quantize,
        outputs: Outputs,
        changes: dict[str, Any],
        what: str,
    ) -> None:
        start = quantized(**changes)
        before = outputs(start), outputs(tiny)
        trained = optimize_transitions(start, tiny, calibration, what=what)
        assert torch.equal(outputs(start), before[0])
        assert torch.equal(outputs(tiny), before[1])
        (states,) = calibration.parts
        totals = [path_kl(tiny, lm, states, TIMESTEPS).total for lm in (start, trained)]
        assert totals[1] < 0.95 * totals[0]
        assert trained.bits_per_weight == start.bits_per_weight
        same_codes = [
            torch.equal(layer.packed, trained.quantized_layers()[name].packed)
            for name, layer in start.quantized_layers().items()
        ]
        assert all(same_codes) == (what != "codes")
        same_norm = torch.equal(trained.model.model.norm.weight, start.model.model.norm.weight)
        assert same_norm == (what != "network")
        assert not any(p.requires_grad for p in trained.model.parameters())

    def test_the_markov_term_keeps_the_ranges_of_neighbouring_groups_together(self, quantized: Quantize) -> None:
        def jumps(weight: float) -> float:
            changes = {"activation_bits": 4, "num_time_groups": 3, "transitions": "parameters"}
            lm = quantized(**changes, markov_weight=weight)
            steps = [
                torch.stack([p.scale for p in params]).log().diff(dim=0) for params in lm.activation_params.values()
            ]
            return float(torch.cat(steps).square().mean())

        assert jumps(10.0) < 0.2 * jumps(0.0)

    def test_without_time_groups_the_markov_term_changes_nothing(self, quantized: Quantize, outputs: Outputs) -> None:
        changes = {"activation_bits": 4, "transitions": "parameters"}
        free, held = (quantized(**changes, markov_weight=weight) for weight in (0.0, 10.0))
        assert torch.equal(outputs(free), outputs(held))

    def test_fresh_chains_need_no_calibration(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize, outputs: Outputs, tmp_path: Path
    ) -> None:
        start = quantized()
        trained = optimize_transitions(start, tiny, what="network", states="chains")
        again = optimize_transitions(start, tiny, calibration, what="network", states="chains")
        assert torch.equal(outputs(trained), outputs(again))
        (states,) = calibration.parts
        totals = [path_kl(tiny, lm, states, TIMESTEPS).total for lm in (start, trained)]
        assert totals[1] < 0.95 * totals[0]
        save_quantized(trained, tmp_path / "q")
        assert torch.equal(outputs(load_quantized(tmp_path / "q")), outputs(trained))

    @pytest.mark.parametrize("share", [0.0, 0.5])
    def test_chains_may_be_the_quantized_model_s_own(
        self,
        tiny: DiffusionLM,
        quantized: Quantize,
        outputs: Outputs,
        override: Callable[[dict[str, Any]], None],
        share: float,
    ) -> None:
        override({"chains.steps": 4, "data.sequence_length": 16})
        trained, other = (optimize_transitions(quantized(own_share=own), tiny, states="chains") for own in (share, 1.0))
        assert not torch.equal(outputs(trained), outputs(other))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"what": "none"}, "what: found 'none', allowed are parameters, codes, network"),
            ({"what": "all"}, "'all'"),
            ({"states": "text"}, "'text'"),
            ({}, "calibration: found None, required by states='calibration'"),
        ],
    )
    def test_what_is_not_allowed_is_named(
        self, tiny: DiffusionLM, quantized: Quantize, arguments: dict[str, str], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            optimize_transitions(quantized(), tiny, **arguments)

    @every_way
    def test_it_is_the_last_phase_of_quantizing_and_survives_saving(
        self,
        tiny: DiffusionLM,
        calibration: Calibration,
        quantized: Quantize,
        outputs: Outputs,
        tmp_path: Path,
        changes: dict[str, Any],
    ) -> None:
        whole = quantized(transitions="parameters", **changes)
        trained = optimize_transitions(quantized(**changes), tiny, calibration)
        assert torch.equal(outputs(whole), outputs(trained))
        assert whole.config == trained.config
        save_quantized(whole, tmp_path / "q")
        assert torch.equal(outputs(load_quantized(tmp_path / "q")), outputs(whole))

    def test_weights_that_depend_on_the_timestep_are_refused(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize
    ) -> None:
        with pytest.raises(ValueError, match="num_time_groups: found time-dependent weights"):
            optimize_transitions(quantized(**SMOOTH), tiny, calibration)


class TestTransitionHessian:
    """GPTQ whose tokens count by what their error costs in path KL."""

    def test_weights_of_one_are_the_uniform_hessian(self, tiny: DiffusionLM, calibration: Calibration) -> None:
        names, groups = linear_names(tiny.model)[:2], TimeGroups(TIMESTEPS, 2)
        ones = {name: [torch.ones(part.ids.shape) for part in calibration.parts] for name in names}
        uniform = input_hessians(tiny, calibration, names, groups)
        weighted = input_hessians(tiny, calibration, names, groups, ones)
        for name in names:
            assert torch.equal(uniform[name], weighted[name])

    def test_each_token_counts_by_its_weight(self, tiny: DiffusionLM, calibration: Calibration) -> None:
        name = linear_names(tiny.model)[0]
        (part,) = calibration.parts
        with torch.no_grad():
            x = tiny.model.model.layers[0].input_layernorm(tiny.model.model.embed_tokens(part.ids)).double()
        weight = torch.rand(part.ids.shape, generator=torch.Generator().manual_seed(0))
        expected = torch.einsum("sl,sli,slj->ij", weight.double(), x, x)
        found = input_hessians(tiny, calibration, [name], TimeGroups(TIMESTEPS, 1), {name: [weight]})
        torch.testing.assert_close(found[name][0], expected, rtol=1e-4, atol=1e-4)

    def test_it_changes_the_codes(self, quantized: Quantize) -> None:
        layers = [quantized(quantizer="gptq", hessian=h).quantized_layers() for h in ("uniform", "transition")]
        assert any(not torch.equal(layers[0][name].packed, layers[1][name].packed) for name in layers[0])


class TestReconstructBlocks:
    """Weights trained block by block for the block's output."""

    every_way = pytest.mark.parametrize(
        "changes",
        [{}, {"activation_bits": 4, "activation_ranges": "dynamic"}, {"activation_bits": 8, **SMOOTH}],
        ids=["W2A16", "dynamic", "static"],
    )

    @every_way
    def test_it_lowers_path_kl_and_leaves_the_given_models(
        self,
        tiny: DiffusionLM,
        calibration: Calibration,
        quantized: Quantize,
        outputs: Outputs,
        changes: dict[str, Any],
    ) -> None:
        start = quantized(**changes)
        before = outputs(start), outputs(tiny)
        trained = reconstruct_blocks(start, tiny, calibration)
        assert torch.equal(outputs(start), before[0])
        assert torch.equal(outputs(tiny), before[1])
        (states,) = calibration.parts
        totals = [path_kl(tiny, lm, states, TIMESTEPS).total for lm in (start, trained)]
        assert totals[1] < 0.9 * totals[0]
        assert trained.bits_per_weight == start.bits_per_weight
        assert trained.config.reconstruction == "blocks"
        bits = {layer.activation_bits for layer in trained.quantized_layers().values()}
        assert bits == {start.config.activation_bits}

    def test_fresh_states_need_no_calibration(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize, outputs: Outputs
    ) -> None:
        start = quantized()
        trained = reconstruct_blocks(start, tiny, states="chains")
        assert trained.config.training_states == "chains"
        again, on_calibration = (
            reconstruct_blocks(start, tiny, calibration, states=states) for states in ("chains", "calibration")
        )
        assert torch.equal(outputs(trained), outputs(again))
        assert not torch.equal(outputs(trained), outputs(on_calibration))
        (states,) = calibration.parts
        totals = [path_kl(tiny, lm, states, TIMESTEPS).total for lm in (start, trained)]
        assert totals[1] < 0.9 * totals[0]
        with pytest.raises(ValueError, match="calibration: found None, required by states='calibration'"):
            reconstruct_blocks(start, tiny)

    @every_way
    def test_it_comes_before_the_transitions(
        self,
        tiny: DiffusionLM,
        calibration: Calibration,
        quantized: Quantize,
        outputs: Outputs,
        changes: dict[str, Any],
    ) -> None:
        whole = quantized(reconstruction="blocks", transitions="parameters", **changes)
        parts = optimize_transitions(quantized(reconstruction="blocks", **changes), tiny, calibration)
        assert torch.equal(outputs(whole), outputs(parts))
        assert whole.config == parts.config

    def test_weights_that_depend_on_the_timestep_are_refused(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize
    ) -> None:
        with pytest.raises(ValueError, match="num_time_groups: found time-dependent weights"):
            reconstruct_blocks(quantized(**SMOOTH), tiny, calibration)


class TestSequential:
    """The linears of a block quantized one after another, the rest trained for the block's output."""

    GPTQ: ClassVar[dict[str, str]] = {"quantizer": "gptq", "hessian": "transition"}
    TRELLIS: ClassVar[dict[str, str]] = {"quantizer": "trellis", "hessian": "transition"}

    @pytest.mark.parametrize("how", [GPTQ, TRELLIS], ids=["gptq", "trellis"])
    def test_it_lowers_path_kl_and_leaves_the_given_model(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize, how: dict[str, str]
    ) -> None:
        before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
        plain, trained = quantized(**how), quantized(**how, reconstruction="sequential")
        (states,) = calibration.parts
        totals = [path_kl(tiny, lm, states, TIMESTEPS).total for lm in (plain, trained)]
        assert totals[1] < 0.9 * totals[0]
        assert trained.bits_per_weight == plain.bits_per_weight
        assert all(torch.equal(before[name], tensor) for name, tensor in tiny.model.state_dict().items())
        assert not any(p.requires_grad for lm in (tiny, trained) for p in lm.model.parameters())

    def test_without_training_it_is_quantizing_block_by_block(
        self, tiny: DiffusionLM, calibration: Calibration, override: Callable[[dict[str, Any]], None]
    ) -> None:
        # Inside a block the plain quantizer takes all Hessians before any linear is quantized, so only the first site
        # of the first block is the same; later ones see what is quantized already.
        override({"sequential.weight_lr": 0.0, "reconstruction.scale_lr": 0.0, "reconstruction.zero_point_lr": 0.0})
        plain, stepped = (
            quantize(tiny, config_of(**self.GPTQ, reconstruction=r), calibration) for r in ("none", "sequential")
        )
        same = [
            name
            for name, layer in plain.quantized_layers().items()
            if torch.equal(layer.packed, stepped.quantized_layers()[name].packed)
        ]
        first = "model.layers.0.self_attn"
        assert {f"{first}.{linear}_proj" for linear in "qkv"} <= set(same)
        assert "model.layers.1.mlp.down_proj" not in same

    def test_fresh_states_need_no_calibration_to_train_on(self, tiny: DiffusionLM, calibration: Calibration) -> None:
        config = config_of(**self.TRELLIS, reconstruction="sequential", training_states="chains")
        other = Calibration((calibration.parts[0][torch.arange(0, 36, 2)],), TIMESTEPS, "forward")
        fresh = [quantize(tiny, config, given).quantized_layers() for given in (calibration, other)]
        assert all(torch.equal(layer.packed, fresh[1][name].packed) for name, layer in fresh[0].items())

    def test_the_losses_of_every_site_are_kept(self, quantized: Quantize) -> None:
        losses = quantized(**self.TRELLIS, reconstruction="sequential").losses
        assert len(losses) == 2 * 4
        assert all(len(values) == 20 for values in losses.values())


class Stopped(Exception):
    """Stands for what ends a process."""


class TestResume:
    """Training that was stopped goes on from its snapshots."""

    every_way = pytest.mark.parametrize(
        "changes",
        [
            {"reconstruction": "blocks", "transitions": "codes", "activation_bits": 4, "activation_token_states": True},
            {
                "quantizer": "trellis",
                "average_bits": 2.3,
                "activation_bits": 4,
                "activation_ranges": "dynamic",
                "reconstruction": "sequential",
                "transitions": "network",
                "training_states": "chains",
                "own_share": 0.5,
            },
        ],
        ids=["blocks and codes", "sequential and network on chains"],
    )

    @staticmethod
    def stop_at(monkeypatch: pytest.MonkeyPatch, turn: int, *, written: bool) -> list[str]:
        """Makes the snapshot of every ``turn``-th time end the run, before or after it is written; who was saved."""
        saved: list[str] = []
        save = Snapshot.save

        def save_or_stop(self: Snapshot, state: dict[str, Tensor]) -> None:
            saved.append(self.path.stem)
            if len(saved) % turn or written:
                save(self, state)
            if not len(saved) % turn:
                raise Stopped

        monkeypatch.setattr(fit, "_SNAPSHOT_STEPS", 15)
        monkeypatch.setattr(Snapshot, "save", save_or_stop)
        return saved

    @every_way
    @pytest.mark.parametrize("written", [True, False])
    def test_the_result_is_that_of_a_run_that_was_not_stopped(
        self,
        tiny: DiffusionLM,
        calibration: Calibration,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        changes: dict[str, Any],
        written: bool,
    ) -> None:
        config = config_of(**changes)
        whole = quantize(tiny, config, calibration)
        saved, stops, trained = self.stop_at(monkeypatch, 2, written=written), 0, None
        while trained is None:
            try:
                trained = quantize(tiny, config, calibration, resume=tmp_path)
            except Stopped:
                stops += 1
        assert stops >= 2
        assert {"transitions", "sequential" if config.reconstruction == "sequential" else "blocks"} <= set(saved)
        states = whole.model.state_dict(), trained.model.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
        assert trained.losses == whole.losses
        assert trained.config == whole.config

    @every_way
    def test_what_is_done_is_not_done_again(
        self,
        tiny: DiffusionLM,
        calibration: Calibration,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        changes: dict[str, Any],
    ) -> None:
        first = quantize(tiny, config_of(**changes), calibration, resume=tmp_path)
        saved = self.stop_at(monkeypatch, 1, written=True)
        again = quantize(tiny, config_of(**changes), calibration, resume=tmp_path)
        assert saved == []
        assert again.losses == first.losses

    def test_a_snapshot_of_another_run_is_refused(
        self, tiny: DiffusionLM, calibration: Calibration, tmp_path: Path, override: Callable[[dict[str, Any]], None]
    ) -> None:
        override({"transition.steps": 2})
        config = config_of(transitions="parameters")
        quantize(tiny, config, calibration, resume=tmp_path)
        override({"transition.steps": 3})
        with pytest.raises(ValueError, match=r"resume: found a run of other .* in .*transitions.safetensors"):
            quantize(tiny, config, calibration, resume=tmp_path)

    def test_a_damaged_snapshot_is_named(self, tiny: DiffusionLM, calibration: Calibration, tmp_path: Path) -> None:
        path = tmp_path / "transitions.safetensors"
        path.write_bytes(b"half a snapsh")
        with pytest.raises(ValueError, match=r"resume: .*transitions.safetensors is not a complete snapshot"):
            quantize(tiny, config_of(transitions="parameters"), calibration, resume=tmp_path)


def test_average_bits_are_kept_over_all_layers_and_differ_between_them(quantized: Quantize) -> None:
    layers = quantized(quantizer="trellis", average_bits=2.3).quantized_layers()
    column_bits = {name: unpack(layer.packed_column_bits, 4, layer.in_features) for name, layer in layers.items()}
    spent = sum(layers[name].out_features * int(counts.sum()) for name, counts in column_bits.items())
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    assert 2.29 < spent / weights <= 2.3
    assert len({float(counts.float().mean()) for counts in column_bits.values()}) > 3

"""The phase that gives norms a set of weights for each time group: trained, stored, resumed and refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import TIMESTEPS, Outputs, Quantize, config_of
from layouts import DREAM, KINDS, Layout
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModel

from thermo_lib import (
    Calibration,
    ThermoConfig,
    TimeNorms,
    calibrate,
    load_quantized,
    optimize_transitions,
    quantize,
    quantize_checkpoint,
    save_quantized,
    train_time_norms,
)
from thermo_lib.diffusion.path_kl import path_kl
from thermo_lib.diffusion.prompts import EmptyTexts
from thermo_lib.files.snapshots import Snapshot
from thermo_lib.models.lm import DiffusionLM, save_model, stored_dtype
from thermo_lib.models.streamed import load_streamed
from thermo_lib.pipeline.about import about
from thermo_lib.pipeline.compiled import GraphedPass
from thermo_lib.pipeline.model import QuantizedLM, dequantized, norm_names
from thermo_lib.pipeline.parts import PathKL
from thermo_lib.quant.calls import denoising
from thermo_lib.quant.time_norms import time_norms
from thermo_lib.transition import fit

STEPS = 15
NORMS = 5  # two in each of two blocks and the last

Train = Callable[..., QuantizedLM]


@pytest.fixture(scope="module")
def train(tiny: DiffusionLM, calibration: Calibration, quantized: Quantize) -> Train:
    """Trains time-aware norms of a quantized tiny model for a moment; equal settings share a model."""
    made: dict[str, QuantizedLM] = {}

    def run(changes: dict[str, Any] | None = None, **settings: Any) -> QuantizedLM:
        key = json.dumps([changes, settings])
        if key not in made:
            start = quantized(**(changes or {}))
            made[key] = train_time_norms(start, tiny, calibration, **{"steps": STEPS, "norm_lr": 0.02, **settings})
        return made[key]

    return run


def total(reference: DiffusionLM, lm: DiffusionLM, calibration: Calibration) -> float:
    (states,) = calibration.parts
    return path_kl(reference, lm, states, TIMESTEPS).total


@pytest.mark.slow
class TestTraining:
    """Norms of time groups, trained for least path KL."""

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({}, "norms"),
            ({}, "network"),
            ({"activation_bits": 4, "activation_token_states": True, "num_time_groups": 2}, "norms"),
            ({"activation_bits": 4, "activation_ranges": "dynamic"}, "network"),
        ],
    )
    def test_it_lowers_path_kl_and_leaves_the_given_models(
        self,
        tiny: DiffusionLM,
        calibration: Calibration,
        quantized: Quantize,
        outputs: Outputs,
        train: Train,
        changes: dict[str, Any],
        what: str,
    ) -> None:
        start = quantized(**changes)
        before = outputs(start), outputs(tiny)
        trained = train(changes, what=what)
        assert torch.equal(outputs(start), before[0])
        assert torch.equal(outputs(tiny), before[1])
        assert total(tiny, trained, calibration) < 0.97 * total(tiny, start, calibration)
        norms = time_norms(trained.model)
        assert list(norms) == norm_names(start.model)
        assert len(norms) == NORMS
        for norm in norms.values():
            assert norm.is_current
            assert not any(norm.time_weight[g].equal(norm.time_weight[g + 1]) for g in range(2))
        same = [
            torch.equal(layer.scale, trained.quantized_layers()[name].scale)
            for name, layer in start.quantized_layers().items()
        ]
        assert all(same) == (what == "norms")
        assert torch.equal(trained.model.lm_head.weight, start.model.lm_head.weight) == (what == "norms")
        assert not any(p.requires_grad for p in trained.model.parameters())
        assert len(trained.losses["time_norms"]) == STEPS

    @pytest.mark.parametrize("settings", [{}, {"count": 1}, {"count": TIMESTEPS}, {"smoothing": "spline"}])
    def test_before_training_it_is_the_model_bit_for_bit(
        self, quantized: Quantize, outputs: Outputs, train: Train, settings: dict[str, Any]
    ) -> None:
        rates = {"norm_lr": 1e-30} | ({} if settings.get("count") == 1 else {"group_lr": 1e-30})
        untrained = train(**settings, steps=1, **rates)
        assert len(time_norms(untrained.model)) == NORMS
        assert torch.equal(outputs(untrained), outputs(quantized()))

    def test_one_group_is_a_plain_norm_trained_alike(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize, outputs: Outputs, train: Train
    ) -> None:
        start, one = quantized(), train(count=1)
        plain = copy.deepcopy(start)
        for name, norm in time_norms(one.model).items():
            plain.model.get_submodule(name).weight = torch.nn.Parameter(norm.time_weight[0])
        assert torch.equal(outputs(one), outputs(plain))
        assert one.bits_per_weight == start.bits_per_weight
        assert total(tiny, one, calibration) < total(tiny, start, calibration)
        assert one.config.time_norms.smoothing is one.config.time_norms.window is None

    def test_groups_that_do_not_deviate_stay_equal(self, quantized: Quantize, train: Train) -> None:
        start = quantized()
        for name, norm in time_norms(train(count=3, group_lr=1e-30).model).items():
            assert norm.time_weight.equal(norm.time_weight[:1].expand_as(norm.time_weight))
            assert not norm.time_weight[0].equal(start.model.get_submodule(name).weight)

    def test_fresh_chains_need_only_prompts(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize, outputs: Outputs
    ) -> None:
        how = {"states": "fresh", "own_share": 0.5, "steps": 8, "norm_lr": 0.02}
        trained = train_time_norms(quantized(), tiny, prompts=[EmptyTexts(16, tiny.mask_token_id)], **how)
        again = train_time_norms(quantized(), tiny, calibration, **how)
        assert torch.equal(outputs(trained), outputs(again))
        assert not torch.equal(outputs(trained)[0], outputs(quantized())[0])

    def test_other_phases_come_before_and_after_it(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize, outputs: Outputs, tmp_path: Path
    ) -> None:
        phases = (PathKL(steps=4), TimeNorms(steps=4, count=2), PathKL(what="network", steps=4, network_lr=0.01))
        whole = quantize(tiny, config_of().replace(training=phases), calibration)
        first = optimize_transitions(quantized(), tiny, calibration, steps=4)
        second = train_time_norms(first, tiny, calibration, steps=4, count=2)
        third = optimize_transitions(second, tiny, calibration, what="network", steps=4, network_lr=0.01)
        assert whole.config == third.config
        assert torch.equal(outputs(whole), outputs(third))
        for name, norm in time_norms(third.model).items():
            before = second.model.get_submodule(name)
            assert all((norm.time_weight[g] != before.time_weight[g]).any() for g in range(2))
            assert norm.is_current
        save_quantized(whole, tmp_path / "q")
        assert torch.equal(outputs(load_quantized(tmp_path / "q")), outputs(whole))

    def test_rows_of_several_timesteps_are_those_of_calls_of_their_own(
        self, tiny: DiffusionLM, train: Train, outputs: Outputs
    ) -> None:
        lm = train()
        ids = torch.full((TIMESTEPS, 7), tiny.mask_token_id)
        with torch.no_grad():
            with denoising((0, 1), rows=(torch.arange(TIMESTEPS), TIMESTEPS)):
                together = lm.model(ids).logits
            for step in range(TIMESTEPS):
                lm.set_timestep(step, TIMESTEPS)
                assert torch.allclose(lm.model(ids[:1]).logits, together[step : step + 1], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(together[0], together[-1], rtol=1e-3, atol=1e-3)

    def test_a_graph_for_each_timestep(self, train: Train) -> None:
        for settings, depends in (({}, True), ({"count": 1}, False)):
            assert GraphedPass(train(**settings).model, 8)._depends_on_timestep == depends


class TestStored:
    """What is saved is the groups' parameters before smoothing."""

    @pytest.mark.parametrize("settings", [{}, {"count": 1}, {"smoothing": None}, {"what": "network"}])
    def test_it_loads_bit_for_bit(
        self, tmp_path: Path, train: Train, outputs: Outputs, settings: dict[str, Any]
    ) -> None:
        lm = train(**settings)
        count = lm.config.time_norms.count
        save_quantized(lm, tmp_path / "q")
        stored = load_file(tmp_path / "q" / "model.safetensors")
        assert stored["model.norm.time_weight"].shape == (count, 32)
        assert not [name for name in stored if name.endswith("norm.weight")]
        loaded = load_quantized(tmp_path / "q")
        assert torch.equal(outputs(loaded), outputs(lm))
        assert loaded.config == lm.config
        assert loaded.bits_per_weight == lm.bits_per_weight
        save_quantized(loaded, tmp_path / "again")
        for path in (tmp_path / "q").iterdir():
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
        assert stored_dtype(str(tmp_path / "q")) == torch.float32

    def test_transformers_loads_and_saves_it(self, tmp_path: Path, train: Train, outputs: Outputs) -> None:
        lm = train()
        save_quantized(lm, tmp_path / "q")
        model = AutoModel.from_pretrained(tmp_path / "q")
        found = DiffusionLM(model, lm.tokenizer, lm.mask_token_id, "q")
        assert torch.equal(outputs(found), outputs(lm))
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(outputs(load_quantized(tmp_path / "again")), outputs(lm))
        low = AutoModel.from_pretrained(tmp_path / "q", dtype=torch.bfloat16)
        ours = load_quantized(tmp_path / "q", dtype=torch.bfloat16).model
        for name, norm in time_norms(ours).items():
            assert torch.equal(low.get_submodule(name).table, norm.table)
            assert norm.table.dtype == torch.bfloat16

    @KINDS
    def test_every_kind_of_blocks(self, layout: Layout, tmp_path: Path, tokenizer: Tokenizer) -> None:
        lm = layout.load(layout.write(tmp_path / "source", tokenizer))
        lm.model.float()
        states = calibrate(lm, [(torch.arange(4, 28).reshape(2, 12), None)], timesteps=4, progress=False)
        phase = TimeNorms(count=2, smoothing=None, steps=2, norm_lr=0.05)
        config = ThermoConfig(weights={"method": "rtn"}, training=(phase,), timesteps=4)
        trained = quantize(lm, config, states)
        assert len(time_norms(trained.model)) == 5 + 4 * layout.has_head_norms
        save_quantized(trained, tmp_path / "q")
        stored = load_file(tmp_path / "q" / "model.safetensors")
        assert stored[f"{layout.name('norm')}.time_weight"].shape == (2, 32)
        ids = torch.full((2, 6), lm.mask_token_id)
        loaded, theirs = load_quantized(tmp_path / "q"), AutoModel.from_pretrained(tmp_path / "q")
        for step in range(4):
            for model in (trained.model, loaded.model, theirs):
                model.set_timestep(step, 4)
            with torch.no_grad():
                expected = trained.model(ids).logits
                assert torch.equal(loaded.model(ids).logits, expected)
                assert torch.equal(theirs(ids).logits, expected)

    def test_all_sets_but_one_count_as_bits(self, tmp_path: Path, quantized: Quantize, train: Train) -> None:
        lm, weights = train(), sum(x.in_features * x.out_features for x in quantized().quantized_layers().values())
        extra = (3 - 1) * NORMS * 32 * 32 / weights
        assert lm.bits_per_weight == pytest.approx(quantized().bits_per_weight + extra)
        save_quantized(lm, tmp_path / "q")
        found = about(str(tmp_path / "q"))
        assert found["bits_per_weight"] == pytest.approx(lm.bits_per_weight)
        assert found["time_norms"] == "3 sets for each of 5, smoothing linear, window 1"
        assert "time_norms.count=3" in found["quantized"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("model.norm.time_weight"), "missing tensors model.norm.time_weight"),
            (lambda t: t.update({"model.norm.weight": torch.ones(32)}), "unexpected tensors model.norm.weight"),
            (
                lambda t: t.update({"model.norm.time_weight": torch.ones(2, 32)}),
                r"tensor model.norm.time_weight: found shape \(2, 32\), expected \(3, 32\)",
            ),
            (lambda t: t["model.norm.time_weight"].fill_(torch.nan), "tensor model.norm.time_weight: found NaN"),
            (
                lambda t: t.update({"model.norm.time_weight": torch.ones(3, 32, dtype=torch.int8)}),
                "tensor model.norm.time_weight: found torch.int8",
            ),
        ],
    )
    def test_damage_is_named(
        self, tmp_path: Path, train: Train, change: Callable[[dict[str, Tensor]], object], message: str
    ) -> None:
        save_quantized(train(), tmp_path / "q")
        path = tmp_path / "q" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        for load in (load_quantized, AutoModel.from_pretrained):
            with pytest.raises(ValueError, match=message):
                load(tmp_path / "q")

    def test_other_parameters_than_the_rows_are_not_stored(self, tmp_path: Path, train: Train) -> None:
        lm = copy.deepcopy(train())
        lm.model.model.norm.time_weight += 1
        with pytest.raises(ValueError, match=r"model\.norm: found rows of other parameters"):
            save_quantized(lm, tmp_path / "q")

    def test_a_dense_copy_computes_and_is_not_saved(self, tmp_path: Path, train: Train, outputs: Outputs) -> None:
        lm = train()
        dense = dequantized(lm)
        assert torch.allclose(outputs(dense), outputs(lm), rtol=1e-4, atol=1e-4)
        for save in (lambda: save_model(dense, tmp_path / "m"), lambda: dense.model.save_pretrained(tmp_path / "m")):
            with pytest.raises(ValueError, match="model: found time-aware norms"):
                save()

    def test_layerwise_gives_what_the_model_in_memory_does(
        self, tmp_path: Path, tokenizer: Tokenizer, outputs: Outputs
    ) -> None:
        source = DREAM.write(tmp_path / "source", tokenizer)
        lm = load_streamed(str(source))
        states = calibrate(lm, [(torch.arange(4, 28).reshape(2, 12), None)], timesteps=4, progress=False)
        phase = TimeNorms(count=2, steps=3, what="network", norm_lr=0.05)
        config = ThermoConfig(weights={"method": "rtn"}, training=(phase,), timesteps=4)
        quantize_checkpoint(source, tmp_path / "q", config, states)
        whole = quantize(DREAM.load(source), config, states)
        loaded = load_quantized(tmp_path / "q")
        assert loaded.config == config
        for name, norm in time_norms(whole.model).items():
            assert torch.equal(norm.time_weight, loaded.model.get_submodule(name).time_weight)


class TestConfiguration:
    """The phase as a part of a configuration."""

    @pytest.mark.parametrize(
        "phase",
        [
            TimeNorms(),
            TimeNorms(count=1),
            TimeNorms(count=16),
            TimeNorms(count=3, starts=(2, 9), smoothing="spline", what="network"),
            TimeNorms(states="fresh", own_share=0.5),
        ],
    )
    def test_it_goes_through_json(self, phase: TimeNorms) -> None:
        config = ThermoConfig(training=(PathKL(), phase))
        again = ThermoConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert again.time_norms.over(16) == phase.over(16)
        assert config.replace() == config.replace(seed=0) == config

    def test_single_settings_reach_it(self) -> None:
        config = ThermoConfig(**{"time_norms.count": 4, "path_kl.steps": 7})
        assert [phase.phase for phase in config.training] == ["path_kl", "time_norms"]
        assert config.time_norms.count == 4
        assert config.time_norms.group_lr == 0.0003
        assert config.time_norms.window == 2, "the one that acts, at most half of a group"
        twice = ThermoConfig(training=(PathKL(steps=1), TimeNorms(), PathKL(steps=2)))
        changed = twice.replace(**{"time_norms.steps": 9, "weights.bits": 4})
        assert [phase.steps for phase in changed.training] == [1, 9, 2]
        assert config.replace(**{"time_norms.count": 1}).time_norms.smoothing is None

    def test_a_phase_as_a_field_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"^time_norms: found \{'count': 3\}, allowed are the fields weights"):
            ThermoConfig(time_norms={"count": 3})

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"count": 1, "smoothing": "linear"}, "smoothing: found 'linear', allowed is None with count=1"),
            ({"count": 1, "window": 2}, "window: found 2, allowed is None with count=1"),
            ({"count": 1, "group_lr": 0.1}, r"group_lr: found 0\.1, allowed is None with count=1"),
            ({"count": 0}, "count: found 0, allowed is greater than or equal to 1"),
            ({"smoothing": "spline", "window": 2}, "window: found 2, allowed is None with smoothing='spline'"),
            ({"what": "codes"}, "what: found 'codes', allowed is 'norms' or 'network'"),
            ({"states": "fresh", "batch": 8}, "batch: found 8, allowed is None with states='fresh'"),
            ({"count": 1, "group_lr": 0.1}, "group_lr: found 0.1, allowed is None with count=1"),
            ({"own_share": 0.5}, r"own_share: found 0\.5, allowed is 0\.0 with states='calibration'"),
            ({"norm_lrs": 1}, "norm_lrs: found 1, allowed are the fields .*; did you mean 'norm_lr'"),
        ],
    )
    def test_wrong_settings_are_named(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TimeNorms(**fields)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"training": (TimeNorms(), TimeNorms())}, "training: found time_norms, time_norms, allowed are"),
            ({"training": (TimeNorms(), {"phase": "blocks"})}, "training: found time_norms, blocks, allowed are"),
            ({"training": (TimeNorms(count=17),)}, r"time_norms\.count: found 17, allowed are 1\.\.16"),
            ({"training": (TimeNorms(starts=(9, 2)),)}, r"time_norms\.starts: found \[9, 2\], allowed are 2 rising"),
            ({"training": (TimeNorms(),), "time_groups": {"count": 2}}, "training: found time_norms, allowed is none"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ThermoConfig(**fields)

    def test_a_window_that_is_cut_is_said(self) -> None:
        with pytest.warns(UserWarning, match=r"time_norms\.window: found 9, used is 3"):
            assert ThermoConfig(training=(TimeNorms(window=9),)).time_norms.window == 3

    def test_what_is_missing_is_said_before_any_work(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize, train: Train
    ) -> None:
        with pytest.raises(ValueError, match="calibration: found None, required by training 'time_norms'"):
            quantize(tiny, config_of().replace(training=(TimeNorms(),)))
        with pytest.raises(ValueError, match="calibration: found None, required by states='calibration'"):
            train_time_norms(quantized(), tiny)
        with pytest.raises(ValueError, match="training: found time_norms, time_norms, allowed"):
            train_time_norms(train(), tiny, calibration)
        odd = copy.deepcopy(tiny)
        odd.model.model.norm = torch.nn.GroupNorm(1, 32)
        with pytest.raises(ValueError, match="norm: found GroupNorm"):
            quantize(odd, config_of().replace(training=(TimeNorms(),)), calibration)


class Stopped(Exception):
    """Stands for what ends a process."""


def test_a_stopped_run_goes_on_with_the_same_result(
    tiny: DiffusionLM,
    calibration: Calibration,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config = config_of().replace(training=(TimeNorms(steps=10, states="fresh"),))
    whole, save, saved = quantize(tiny, config, calibration), Snapshot.save, []

    def save_and_stop(self: Snapshot, state: dict[str, Tensor]) -> None:
        save(self, state)
        saved.append(self.path.stem)
        if len(saved) == 1:
            raise Stopped

    monkeypatch.setattr(fit, "_SNAPSHOT_STEPS", 4)
    monkeypatch.setattr(Snapshot, "save", save_and_stop)
    with pytest.raises(Stopped):
        quantize(tiny, config, calibration, resume=tmp_path)
    resumed = quantize(tiny, config, calibration, resume=tmp_path)
    assert saved == ["time_norms"] * 3
    states = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert resumed.losses == whole.losses
    with pytest.raises(ValueError, match=r"resume: found a run of other .*time_norms\.safetensors"):
        quantize(tiny, config.replace(**{"time_norms.steps": 11}), calibration, resume=tmp_path)

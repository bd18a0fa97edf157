"""Each phase of training lowers path KL, leaves the given models as they were, and goes on after a stop."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from configurations import FEW, SMOOTH, TIMESTEPS, Outputs, Quantize, config_of
from torch import Tensor

from thermo_lib import Calibration, load_quantized, quantize, save_quantized
from thermo_lib.diffusion.path_kl import path_kl
from thermo_lib.diffusion.prompts import EmptyTexts
from thermo_lib.files.locks import locked
from thermo_lib.files.snapshots import Snapshot
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.training import optimize_transitions, reconstruct_blocks
from thermo_lib.transition import fit

pytestmark = pytest.mark.slow


# What the activations are while the weights are trained.
WAYS: dict[str, dict[str, Any]] = {
    "W2A16": {},
    "dynamic": {"activation_bits": 4, "activation_ranges": "dynamic"},
    "static": {"activation_bits": 4, "activation_token_states": True, **SMOOTH},
}


class TestOptimizeTransitions:
    """Weights' parameters, ranges and codes trained together for least path KL."""

    every_way = pytest.mark.parametrize("changes", WAYS.values(), ids=WAYS)

    @pytest.mark.parametrize(
        ("what", "changes"),
        [
            pytest.param(what, WAYS[way], id=f"{what}-{way}")
            for what, ways in {
                "parameters": ("dynamic", "static"),
                "codes": ("W2A16", "static"),
                "network": ("W2A16", "dynamic"),
            }.items()
            for way in ways
        ],
    )
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
        trained = optimize_transitions(start, tiny, calibration, what=what, steps=FEW)
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

    def test_fresh_chains_need_only_prompts(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize, outputs: Outputs, tmp_path: Path
    ) -> None:
        start = quantized()
        how = {"what": "network", "states": "fresh", "steps": FEW}
        trained = optimize_transitions(start, tiny, prompts=[EmptyTexts(16, tiny.mask_token_id)], **how)
        again = optimize_transitions(start, tiny, calibration, **how)  # whose states start from nothing too
        assert torch.equal(outputs(trained), outputs(again))
        (states,) = calibration.parts
        totals = [path_kl(tiny, lm, states, TIMESTEPS).total for lm in (start, trained)]
        assert totals[1] < 0.95 * totals[0]
        save_quantized(trained, tmp_path / "q")
        assert torch.equal(outputs(load_quantized(tmp_path / "q")), outputs(trained))

    @pytest.mark.parametrize("share", [0.0, 0.5])
    def test_chains_may_be_the_quantized_model_s_own(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize, outputs: Outputs, share: float
    ) -> None:
        how = {"states": "fresh", "steps": 4}
        trained, other = (
            optimize_transitions(quantized(), tiny, calibration, own_share=own, **how) for own in (share, 1.0)
        )
        assert not torch.equal(outputs(trained), outputs(other))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"what": "none"}, "what: found 'none', allowed is 'parameters', 'codes' or 'network'"),
            ({"what": "all"}, "what: found 'all'"),
            ({"states": "text"}, "states: found 'text'"),
            ({"stepz": 3}, "stepz: found 3, allowed are the fields .*; did you mean 'steps'"),
            ({"own_share": 0.5}, r"own_share: found 0\.5, allowed is 0\.0 with states='calibration'"),
            ({"states": "fresh", "batch": 8}, "batch: found 8, allowed is None with states='fresh'"),
            ({"states": "fresh"}, "calibration: found None, required by states='fresh'"),
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
        whole = quantized(**{"transitions": "parameters", "path_kl.steps": 3}, **changes)
        trained = optimize_transitions(quantized(**changes), tiny, calibration, steps=3)
        assert torch.equal(outputs(whole), outputs(trained))
        assert whole.config == trained.config
        save_quantized(whole, tmp_path / "q")
        assert torch.equal(outputs(load_quantized(tmp_path / "q")), outputs(whole))

    def test_weights_that_depend_on_the_timestep_are_refused(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize
    ) -> None:
        with pytest.raises(ValueError, match="num_time_groups: found time-dependent weights"):
            optimize_transitions(quantized(**SMOOTH), tiny, calibration)


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
        trained = reconstruct_blocks(start, tiny, calibration, steps=FEW)
        assert torch.equal(outputs(start), before[0])
        assert torch.equal(outputs(tiny), before[1])
        (states,) = calibration.parts
        totals = [path_kl(tiny, lm, states, TIMESTEPS).total for lm in (start, trained)]
        assert totals[1] < 0.9 * totals[0]
        assert trained.bits_per_weight == start.bits_per_weight
        assert [phase.phase for phase in trained.config.training] == ["blocks"]
        bits = {layer.activation_bits for layer in trained.quantized_layers().values()}
        assert bits == {start.config.activation_bits}

    def test_fresh_states_need_only_prompts(
        self, tiny: DiffusionLM, calibration: Calibration, quantized: Quantize, outputs: Outputs
    ) -> None:
        start = quantized()
        fresh = {"states": "fresh", "num_texts": 5, "steps": FEW}
        trained = reconstruct_blocks(start, tiny, prompts=[EmptyTexts(16, tiny.mask_token_id)], **fresh)
        assert trained.config.phase("blocks").states == "fresh"
        again = reconstruct_blocks(start, tiny, calibration, **fresh)
        on_calibration = reconstruct_blocks(start, tiny, calibration, steps=1)
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
        blocks = {"reconstruction": "blocks", "blocks.steps": 3, **changes}
        whole = quantized(**{"transitions": "parameters", "path_kl.steps": 3}, **blocks)
        parts = optimize_transitions(quantized(**blocks), tiny, calibration, steps=3)
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

    def test_without_training_it_is_quantizing_block_by_block(self, quantized: Quantize) -> None:
        # Inside a block the plain quantizer takes all Hessians before any linear is quantized, so only the first
        # linears of the first block are the same; later ones see what is quantized already.
        still = {f"sequential.{name}": 1e-30 for name in ("weight_lr", "scale_lr", "zero_point_lr")}
        plain, stepped = (quantized(**self.GPTQ, **how) for how in ({}, still | {"sequential.steps": 1}))
        same = [
            name
            for name, layer in plain.quantized_layers().items()
            if torch.equal(layer.packed, stepped.quantized_layers()[name].packed)
        ]
        first = "model.layers.0.self_attn"
        assert {f"{first}.{linear}_proj" for linear in "qkv"} <= set(same)
        assert "model.layers.1.mlp.down_proj" not in same

    def test_fresh_states_are_made_from_what_the_calibration_starts_from(
        self, tiny: DiffusionLM, calibration: Calibration
    ) -> None:
        few = {"weights.beam": 2, "sequential.steps": 2, "sequential.num_texts": 2}
        config = config_of(**self.TRELLIS, reconstruction="sequential", training_states="chains", **few)
        other = Calibration((calibration.parts[0][torch.arange(0, 36, 2)],), TIMESTEPS, "forward")
        fresh = [quantize(tiny, config, given).quantized_layers() for given in (calibration, other)]
        assert all(torch.equal(layer.packed, fresh[1][name].packed) for name, layer in fresh[0].items())

    def test_the_losses_of_every_site_are_kept(self, quantized: Quantize) -> None:
        losses = quantized(**self.TRELLIS, reconstruction="sequential").losses
        assert len(losses) == 2 * 4
        assert all(len(values) == FEW // 2 for values in losses.values())


class Stopped(Exception):
    """Stands for what ends a process."""


class TestResume:
    """Training that was stopped goes on from its snapshots."""

    every_way = pytest.mark.parametrize(
        "changes",
        [
            {
                "reconstruction": "blocks",
                "blocks.steps": 3,
                "transitions": "codes",
                "path_kl.steps": 7,
                "activation_bits": 4,
                "activation_token_states": True,
            },
            {
                "quantizer": "trellis",
                "average_bits": 2.3,
                "weights.beam": 4,
                "activation_bits": 4,
                "activation_ranges": "dynamic",
                "reconstruction": "sequential",
                "sequential.steps": 2,
                "transitions": "network",
                "path_kl.steps": 7,
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

        monkeypatch.setattr(fit, "_SNAPSHOT_STEPS", 3)
        monkeypatch.setattr(Snapshot, "save", save_or_stop)
        return saved

    @every_way
    @pytest.mark.parametrize("written", [True, False])
    def test_the_result_is_that_of_a_run_that_was_not_stopped(
        self,
        tiny: DiffusionLM,
        calibration: Calibration,
        quantized: Quantize,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        changes: dict[str, Any],
        written: bool,
    ) -> None:
        config, whole = config_of(**changes), quantized(**changes)
        saved, stops, trained = self.stop_at(monkeypatch, 2, written=written), 0, None
        while trained is None:
            try:
                trained = quantize(tiny, config, calibration, resume=tmp_path)
            except Stopped:
                stops += 1
        assert stops >= 2
        assert {"transitions", config.training[0].phase} <= {name.partition("-")[0] for name in saved}
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
        self, tiny: DiffusionLM, calibration: Calibration, tmp_path: Path
    ) -> None:
        config = config_of(**{"path_kl.steps": 2})
        quantize(tiny, config, calibration, resume=tmp_path)
        config = config.replace(**{"path_kl.steps": 3})
        with pytest.raises(ValueError, match=r"resume: found a run of other .* in .*transitions.safetensors"):
            quantize(tiny, config, calibration, resume=tmp_path)

    def test_a_damaged_snapshot_is_named(self, tiny: DiffusionLM, calibration: Calibration, tmp_path: Path) -> None:
        path = tmp_path / "transitions.safetensors"
        path.write_bytes(b"half a snapsh")
        with pytest.raises(ValueError, match=r"resume: .*transitions.safetensors is not a complete snapshot"):
            quantize(tiny, config_of(transitions="parameters"), calibration, resume=tmp_path)

    def test_of_two_runs_in_one_folder_the_second_is_refused(
        self, tiny: DiffusionLM, calibration: Calibration, tmp_path: Path
    ) -> None:
        """Before its work, and what a killed one has left goes."""
        (tmp_path / ".tmpAb3dEf").touch()
        with (
            locked(tmp_path / "snapshots"),
            pytest.raises(ValueError, match=r"resume: found another run keeping .*snapshots, allowed is one at a time"),
        ):
            quantize(tiny, config_of(), calibration, resume=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".tmpAb3dEf"]
        quantize(tiny, config_of(), calibration, resume=tmp_path)
        assert ".tmpAb3dEf" not in [path.name for path in tmp_path.iterdir()]

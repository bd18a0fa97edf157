"""Other projects' quantized weights are checked, scored like our own models, and compared in pairs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from thermo_lib.diffusion.states import forward_states, trajectory_states
from thermo_lib.evaluation.scores import Suite, evaluate
from thermo_lib.files.reading import read_json
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import linear_names
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.studies import peers
from thermo_lib.studies.peers import full_size

ENTRY = {
    "method": "A",
    "setting": "group 128",
    "version": "1.0",
    "bits_per_weight": 2.25,
    "seconds": 1.5,
    "peak_mib": 10.0,
    "made_of": "0123",
    "activation_clip": 1.0,
    "losses": {},
}


@pytest.fixture(scope="module")
def suite(tiny, random_ids) -> Suite:
    """Four sequences of 16 tokens and three trajectories over 6 timesteps; no puzzles."""
    code = random_ids(4, 16, seed=3)
    start = torch.full((3, 16), tiny.mask_token_id)
    trajectories = trajectory_states(tiny, start, None, 6, 1)
    held_out = forward_states(code, None, 6, tiny.mask_token_id, 0)
    return Suite(tiny, held_out, trajectories, [], 6, resamples=20)


@pytest.fixture(scope="module")
def rounded(tiny):
    """The tiny model, its weights rounded to nearest in 2 bits."""
    config = ThermoConfig(quantizer="rtn", group_size=16)
    return quantize(tiny, config)


def weights_of(lm) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": layer.weight() for name, layer in lm.quantized_layers().items()}


def write_result(folder: Path, name: str, weights: dict[str, torch.Tensor], **fields: Any) -> None:
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.clone() for key, tensor in weights.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps({**ENTRY, **fields}))


class TestEntry:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text(json.dumps(ENTRY))
        assert asdict(peers.read_entry(path)) == ENTRY

    @pytest.mark.parametrize("field", ENTRY)
    def test_a_missing_field_is_named(self, field: str, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text(json.dumps({k: v for k, v in ENTRY.items() if k != field}))
        with pytest.raises(ValueError, match=f"{field}: missing, allowed are"):
            peers.read_entry(path)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("method", ""),
            ("version", None),
            ("bits_per_weight", 0.5),
            ("bits_per_weight", "2"),
            ("bits_per_weight", True),
            ("seconds", -1),
            ("peak_mib", float("inf")),
            ("seconds", float("nan")),
        ],
    )
    def test_a_wrong_value_is_named_with_what_is_allowed(self, field: str, value: Any, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text(json.dumps(ENTRY | {field: value}))
        with pytest.raises(ValueError, match=rf"a\.json: {field}: found .*, allowed is"):
            peers.read_entry(path)

    @pytest.mark.parametrize(
        ("text", "problem"),
        [("{", "invalid JSON"), ("[]", "found a list"), (None, "found no")],
    )
    def test_a_damaged_file_is_refused(self, text: str | None, problem: str, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(ValueError, match=problem):
            peers.read_entry(path)

    def test_an_unknown_field_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text(json.dumps({**ENTRY, "colour": 1}))
        with pytest.raises(ValueError, match="colour: unknown, allowed are"):
            peers.read_entry(path)


class TestWeights:
    @pytest.fixture
    def weights(self, tiny) -> dict[str, torch.Tensor]:
        return {f"{n}.weight": tiny.model.get_submodule(n).weight.clone() for n in linear_names(tiny.model)}

    def load(self, weights: dict[str, torch.Tensor], tiny, folder: Path) -> dict[str, torch.Tensor]:
        save_file(weights, folder / "w.safetensors")
        return peers.load_weights(folder / "w.safetensors", tiny.model)

    def test_round_trip(self, weights, tiny, tmp_path: Path) -> None:
        loaded = self.load(weights, tiny, tmp_path)
        assert loaded.keys() == weights.keys()
        assert all(loaded[name].equal(weights[name]) for name in weights)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, value: float, weights, tiny, tmp_path: Path) -> None:
        name = list(weights)[3]
        weights[name][1, 2] = value
        with pytest.raises(ValueError, match=f"tensor {name}: found NaN or infinity, expected finite"):
            self.load(weights, tiny, tmp_path)

    def test_other_names_shapes_and_dtypes(self, weights, tiny, tmp_path: Path) -> None:
        name = next(iter(weights))
        for changed, problem in (
            ({k: v for k, v in weights.items() if k != name}, f"missing tensors {name}"),
            (weights | {"head.weight": torch.zeros(2, 2)}, "unexpected tensors head.weight"),
            (weights | {"lm_head.weight": torch.zeros(2, 2)}, "tensor lm_head.weight: found shape"),
            (weights | {name: weights[name][:-1].clone()}, f"tensor {name}: found shape"),
            (weights | {name: weights[name].half()}, f"tensor {name}: found torch.float16, allowed is torch.float32"),
        ):
            with pytest.raises(ValueError, match=problem):
                self.load(changed, tiny, tmp_path)

    def test_damaged_file(self, tiny, tmp_path: Path) -> None:
        (tmp_path / "w.safetensors").write_bytes(b"no")
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            peers.load_weights(tmp_path / "w.safetensors", tiny.model)


class TestModel:
    def test_computes_what_the_quantized_model_computes(self, tiny, rounded, random_ids) -> None:
        ids = random_ids(2, 16)
        lm = peers.with_weights(tiny, weights_of(rounded), "copy")
        assert lm.model(ids).logits.equal(rounded.model(ids).logits)
        assert not lm.model(ids).logits.equal(tiny.model(ids).logits)

    def test_other_parameters_may_be_trained_too(self, tiny, rounded, random_ids, tmp_path: Path) -> None:
        trained = tiny.model.model.norm.weight.detach() * 1.5
        tensors = weights_of(rounded) | {"model.norm.weight": trained}
        save_file(tensors, tmp_path / "w.safetensors")
        lm = peers.with_weights(tiny, peers.load_weights(tmp_path / "w.safetensors", tiny.model), "copy")
        assert lm.model.model.norm.weight.equal(trained)
        ids = random_ids(2, 16)
        assert not lm.model(ids).logits.equal(rounded.model(ids).logits)

    @pytest.mark.parametrize(("bits", "clip"), [(4, 1.0), (4, 0.9), (8, 1.0)])
    def test_activations_are_quantized_as_in_our_own_layers(
        self, bits: int, clip: float, tiny, rounded, random_ids
    ) -> None:
        activations = {"activation_bits": bits, "activation_ranges": "dynamic", "activation_clip": clip}
        dynamic = rounded.config.replace(**activations)
        ids = random_ids(2, 16)
        ours = quantize(tiny, dynamic)
        lm = peers.with_weights(tiny, weights_of(rounded), "copy", activation_bits=bits, activation_clip=clip)
        assert lm.model(ids).logits.equal(ours.model(ids).logits)

    def test_leaves_the_reference_as_it_was(self, tiny, rounded) -> None:
        before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
        peers.with_weights(tiny, weights_of(rounded), "copy", activation_bits=4)
        assert all(tensor.equal(before[name]) for name, tensor in tiny.model.state_dict().items())


class TestScores:
    def test_row_agrees_with_the_evaluation(self, tiny, rounded, suite) -> None:
        row = peers.score_peer(peers.Entry(**ENTRY), weights_of(rounded), suite)
        expected = evaluate(rounded, suite)
        assert row["accuracy"] == pytest.approx(expected.accuracy)
        assert row["path_kl"] == pytest.approx(expected.path.total)
        assert row["nelbo"] == pytest.approx(expected.nelbo)
        for key in ("accuracy", "path_kl", "accuracy_a4", "path_kl_a4"):
            low, high = row[f"{key}_ci"]
            assert low <= row[key] <= high
            mean = sum(row[f"{key}_per_sequence"]) / len(row[f"{key}_per_sequence"])
            assert mean == pytest.approx(row[key], abs=1e-5)
        assert row["path_kl_a4"] != row["path_kl"]
        assert row["sudoku_solved"] is None

    def test_the_full_precision_weights_lose_nothing(self, tiny, suite) -> None:
        own = {f"{n}.weight": tiny.model.get_submodule(n).weight for n in linear_names(tiny.model)}
        row = peers.score_peer(peers.Entry(**ENTRY), own, suite)
        assert row["path_kl"] == pytest.approx(0, abs=1e-6)
        assert row["path_kl_a4"] > 0.001

    @settings(max_examples=2)  # each takes 8 bootstraps
    @given(st.lists(st.floats(0.1, 1), min_size=2, max_size=5), st.floats(0.1, 5))
    def test_comparison_is_paired(self, accuracies: list[float], shift: float) -> None:
        row = {"accuracy_per_sequence": accuracies, "path_kl_per_sequence": [10 * a for a in accuracies]}
        row |= {f"{key[:-13]}_a4_per_sequence": values for key, values in row.items()}
        worse = row | {"path_kl_per_sequence": [value + shift for value in row["path_kl_per_sequence"]]}
        worse |= {"accuracy_per_sequence": [a / 2 for a in accuracies]}
        for new, old, sign in ((row, row, 0), (worse, row, 1), (row, worse, -1)):
            change = peers.compare(new, old)
            assert change["path_kl_change"] == pytest.approx(sign * shift)
            assert change["path_kl_change_ci"] == pytest.approx([sign * shift] * 2)  # a constant shift has no spread
            assert change["gain"] == pytest.approx({0: 0.0, 1: -0.5, -1: 1.0}[sign])
            assert change["gain_ci"] == pytest.approx([change["gain"]] * 2)
        assert peers.compare(worse, row, activation_bits=4)["path_kl_change"] == 0

    def test_comparison_refuses_other_bits_and_other_sequences(self) -> None:
        row = {"accuracy_per_sequence": [0.1, 0.2], "path_kl_per_sequence": [1.0]}
        with pytest.raises(ValueError, match="activation_bits: found 8, allowed are 16 and 4"):
            peers.compare(row, row, activation_bits=8)
        with pytest.raises(ValueError, match="accuracy_per_sequence: found 2 sequences, the baseline has 1"):
            peers.compare(row, row | {"accuracy_per_sequence": [0.1]})


class TestGoals:
    """Verdicts on the project's goals, from paired values."""

    FULL: ClassVar = {"accuracy_per_sequence": [0.5, 0.4, 0.6]}

    def row(self, kept: float, path_kl: float, suffix: str = "") -> dict[str, Any]:
        return {
            "method": "P",
            "setting": "s",
            "bits_per_weight": 2.25,
            f"accuracy{suffix}_per_sequence": [kept * a for a in self.FULL["accuracy_per_sequence"]],
            f"path_kl{suffix}_per_sequence": [path_kl, 2 * path_kl, 3 * path_kl],
        }

    @pytest.mark.parametrize(("bits", "suffix", "bound"), [(16, "", 0.99), (4, "_a4", 0.97)])
    def test_accuracy_kept(self, bits: int, suffix: str, bound: float) -> None:
        for kept, expected in ((bound + 0.001, "met"), (bound - 0.001, "not met")):
            goal = peers.accuracy_kept(self.row(kept, 1, suffix), self.FULL, bound, bits)
            assert goal["value"] == pytest.approx(kept)
            assert goal["ci"] == pytest.approx((kept, kept))
            assert (goal["bound"], goal["verdict"]) == (bound, expected)

    def test_shares_of_a_peer(self) -> None:
        ours, peer = self.row(0.98, 2.0), self.row(0.9, 8.0)
        divergence, drop = peers.shares_of(ours, peer, self.FULL, 1 / 3)
        assert divergence["value"] == pytest.approx(0.25)
        assert drop["value"] == pytest.approx(0.2)
        assert {divergence["verdict"], drop["verdict"]} == {"met"}
        assert [goal["verdict"] for goal in peers.shares_of(peer, ours, self.FULL, 1 / 3)] == ["not met", "not met"]

    def test_an_interval_over_the_bound_is_inconclusive(self) -> None:
        ours, peer = self.row(0.98, 2.0), self.row(0.9, 2.0)
        ours["path_kl_per_sequence"] = [1.0, 5.0, 6.1]
        goal = peers.ahead_of(ours, peer)
        assert goal["value"] == pytest.approx(0.1 / 3)
        assert goal["ci"][0] < 0 < goal["ci"][1]
        assert goal["verdict"] == "inconclusive"
        assert peers.ahead_of(self.row(0.98, 1.9), peer)["verdict"] == "met"
        assert peers.ahead_of(self.row(0.9, 2.1, "_a4"), self.row(0.9, 2.0, "_a4"), 4)["verdict"] == "not met"


class TestReport:
    @pytest.fixture
    def folder(self, tiny, rounded, tmp_path: Path) -> Path:
        folder = tmp_path / "peers"
        write_result(folder, "a", weights_of(rounded))
        write_result(folder, "b", weights_of(rounded), method="B", made_of="4567")
        failed = {"method": "C", "setting": "s", "error": "RuntimeError: no", "made_of": "x"}
        (folder / "c.json").write_text(json.dumps(failed))
        return folder

    @pytest.fixture(autouse=True)
    def small(self, suite, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peers, "build_suite", lambda reference: suite)

    def test_rows_and_errors(self, tiny, folder: Path, tmp_path: Path) -> None:
        report = tmp_path / "peers.json"
        peers.score_all(tiny, folder, report, progress=False)
        content = read_json(report)
        assert [row["method"] for row in content["rows"]] == ["A", "B"]
        assert [error["error"] for error in content["errors"]] == ["RuntimeError: no"]
        assert content["hardware"]
        assert content["full_precision"]["path_kl"] == 0
        assert 0 < content["full_precision"]["accuracy"] < 1
        assert content["versions"]["torch"]
        assert list(tmp_path.glob(".*.tmp")) == []

    def test_only_what_is_new_is_scored(self, tiny, folder: Path, tmp_path: Path, monkeypatch) -> None:
        report, scored = tmp_path / "peers.json", []
        real = peers.score_peer
        monkeypatch.setattr(peers, "score_peer", lambda entry, *rest: scored.append(entry) or real(entry, *rest))
        peers.score_all(tiny, folder, report, progress=False)
        halved = {name: tensor / 2 for name, tensor in peers.load_weights(folder / "b.safetensors", tiny.model).items()}
        write_result(folder, "b", halved, method="B", made_of="new")
        path = folder / "a.json"
        path.write_text(json.dumps(read_json(path) | {"seconds": 9.0}))
        peers.score_all(tiny, folder, report, progress=False)
        assert [entry.made_of for entry in scored] == ["0123", "4567", "new"]
        assert [row["seconds"] for row in read_json(report)["rows"]] == [9.0, 1.5]

    def test_an_interrupted_write_leaves_the_earlier_report(self, tiny, folder: Path, tmp_path, monkeypatch) -> None:
        report = tmp_path / "peers.json"
        peers.score_all(tiny, folder, report, progress=False)
        before = report.read_bytes()
        write_result(folder, "d", {}, method="D", made_of="8")
        (folder / "d.safetensors").write_bytes(b"damaged")
        with pytest.raises(ValueError, match=r"d\.safetensors: not a complete safetensors file"):
            peers.score_all(tiny, folder, report, progress=False)
        assert report.read_bytes() == before

    def test_a_run_that_stops_keeps_what_is_known(self, tiny, folder: Path, tmp_path: Path, monkeypatch) -> None:
        report = tmp_path / "peers.json"
        peers.score_all(tiny, folder, report, progress=False)
        (folder / "a.safetensors").write_bytes(b"damaged")
        write_result(folder, "0", {}, method="0", made_of="8")
        (folder / "0.safetensors").write_bytes((folder / "b.safetensors").read_bytes())
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            peers.score_all(tiny, folder, report, progress=False)
        assert [row["method"] for row in read_json(report)["rows"]] == ["0", "B"]

    def test_rows_whose_files_are_gone_stay(self, tiny, folder: Path, tmp_path: Path) -> None:
        report = tmp_path / "peers.json"
        peers.score_all(tiny, folder, report, progress=False)
        before = read_json(report)
        for path in [*folder.glob("a.*"), *folder.glob("c.*")]:
            path.unlink()
        write_result(folder, "d", load_file(folder / "b.safetensors"), method="D", made_of="8")
        peers.score_all(tiny, folder, report, progress=False)
        after = read_json(report)
        assert after["rows"][:2] == before["rows"]
        assert [row["method"] for row in after["rows"]] == ["A", "B", "D"]
        assert after["errors"] == before["errors"]

    def test_an_empty_folder_is_refused(self, tiny, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="found no results, `make peers` makes them"):
            peers.score_all(tiny, tmp_path, tmp_path / "r.json", progress=False)


def test_a_block_takes_the_time_of_all_its_linears() -> None:
    rows = [
        row
        for number, size in enumerate(full_size.SIZES)
        for row in full_size.rows_of(
            "{} -> {}".format(*size),
            size[0] * size[1],
            {
                name: [10.0**number * (2 if name.startswith("HQQ") else 1)] * full_size.ROUNDS
                for name in full_size.FULL_SIZE_METHODS
            },
            dict.fromkeys(full_size.FULL_SIZE_METHODS, 0.1),
        )
    ]
    ours, *others = full_size.whole_block(rows)
    assert ours["seconds"] == [2 + 20 + 200 + 1000] * full_size.ROUNDS
    assert ours["speed"] == pytest.approx((2 * 3584 * (3584 + 512 + 18944) + 18944 * 3584) / 1e6 / 1222)
    assert [row["times_as_fast"] for row in others] == [2, 2]
    assert all(row["error"] == pytest.approx(0.1) for row in (ours, *others))

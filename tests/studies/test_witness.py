"""The second model: what is taken out of the wheel, what denoising starts from, and the report of what is measured."""

import io
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from thermo_lib import load_model
from thermo_lib.diffusion.states import forward_states
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.studies import second_model, witness
from thermo_lib.studies.grid import Grid, Point, PointRow

LETTERS = [*witness._SPECIAL, "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]
SMALL = witness.WitnessInputs(
    sequences=2, trajectories=2, residues=6, calibration_sequences=1, calibration_residues=(5, 7)
)


def _published(blocks: int) -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(LETTERS),
        hidden_size=32,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=20,
    )
    model = BertForMaskedLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return model


def _converted(root: Path, published: BertForMaskedLM) -> Path:
    """A wheel in the layout of the published one, converted."""
    state, pickle = published.state_dict(), io.BytesIO()
    more = {"bert.embeddings.position_ids": torch.arange(20)[None], "bert.pooler.dense.weight": torch.zeros(32, 32)}
    torch.save(state | more | {"cls.species.weight": torch.zeros(6, 32)}, pickle)
    inside = "antiberty/trained_models"
    with zipfile.ZipFile(root / "x.whl", "w") as file:
        file.writestr(f"{inside}/AntiBERTy_md_smooth/pytorch_model.bin", pickle.getvalue())
        file.writestr(f"{inside}/AntiBERTy_md_smooth/config.json", json.dumps(published.config.to_dict()))
        file.writestr(f"{inside}/vocab.txt", "\n".join(LETTERS))
    witness.convert(root / "x.whl", root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def published() -> BertForMaskedLM:
    return _published(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, published: BertForMaskedLM) -> Path:
    return _converted(tmp_path_factory.mktemp("witness"), published)


@pytest.fixture(scope="module")
def lm(folder: Path) -> DiffusionLM:
    return load_model(str(folder))


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> DiffusionLM:
    """A model of one block, for what is measured of quantized ones."""
    return load_model(str(_converted(tmp_path_factory.mktemp("shallow"), _published(1))))


def test_the_folder_is_the_published_model(lm: DiffusionLM, published: BertForMaskedLM) -> None:
    ids = torch.tensor([lm.tokenizer.encode("QVEL").ids])
    assert ids.tolist() == [[2, *(LETTERS.index(letter) for letter in "QVEL"), 3]]
    with torch.no_grad():
        assert torch.allclose(lm.model(ids).logits, published(ids).logits, atol=1e-5)


def test_special_tokens_are_never_drawn(lm: DiffusionLM) -> None:
    assert lm.suppressed == (0, 1, 2, 3)
    assert lm.writable.tolist() == list(range(5, 25))
    ids, allowed = witness.starts(lm, 3, 6)
    assert ids[0].tolist() == [2, 4, 4, 4, 4, 4, 4, 3]
    assert allowed.sum(1).tolist() == [6, 6, 6]
    drawn = SMALL.suite(lm, 4).trajectories.clean[:, 1:-1]
    assert drawn.min() >= 5


def test_a_folder_that_is_there_is_not_fetched_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert witness.fetch(folder) == folder


def test_a_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append((command, Path(command[-1]).read_text()))
        return SimpleNamespace(returncode=1, stderr="no such host\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"^pip download antiberty==0\.1\.3: no such host$"):
        witness.fetch(tmp_path / "model")
    ((command, wanted),) = commands
    assert {"--require-hashes", "--no-deps"} <= set(command)
    assert witness.SHA256 in wanted
    assert not (tmp_path / "model").exists()


def test_a_part_of_the_plan_names_a_point_once() -> None:
    for points in witness.plan():
        assert len({p.key for p in points}) == len(points)
    seeds = {p.calibration_seed for points in witness.plan() for p in points}
    assert seeds == set(witness.SEEDS)


@pytest.fixture(scope="module")
def measured(shallow: DiffusionLM, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """A grid with round-to-nearest, and with the question of W2A16 for one seed."""
    grid = Grid(tmp_path_factory.mktemp("points") / "points.json", shallow, SMALL)
    question = witness.question_points(None, (0,))
    grid.run([*witness.method_points("round-to-nearest"), *(p for points in question.values() for p in points)])
    return grid


@pytest.mark.slow
class TestReport:
    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, measured: Grid) -> dict[str, Any]:
        return second_model.report(measured, Grid("none.json", measured.reference), {}, [])

    def test_rows_are_those_that_are_measured(self, found: dict[str, Any]) -> None:
        names = [row["method"] for row in found["rows"]]
        assert names[:2] == ["round-to-nearest", "GPTQ"]  # GPTQ is the question's one scale for all timesteps
        assert "GPTQ, 3 groups, linear" in names
        one = next(row for row in found["rows"] if row["method"] == "GPTQ, one")
        smoothed = next(row for row in found["rows"] if row["method"] == "GPTQ, 3 groups, linear")
        assert "change" not in one
        assert smoothed["change"] == pytest.approx(smoothed["path_kl"] - one["path_kl"], abs=1e-9)
        assert smoothed["path_kl_ci"][0] <= smoothed["path_kl"] <= smoothed["path_kl_ci"][1]
        assert smoothed["path_kl_of_seeds"] == [smoothed["path_kl"]] * 2  # one seed

    def test_methods_are_compared_on_the_same_seeds(self, measured: Grid) -> None:
        row = next(iter(measured.rows.values()))
        grid = Grid("none.json", measured.reference, SMALL)
        seeds = {"round-to-nearest": (0,), "GPTQ": (0, 1, 2), "trellis, even": (1, 2), "trellis, spread": ()}
        for name, of in seeds.items():
            for p in witness.method_points(name, of):
                grid.rows[p.key] = replace(row, point=p)
        found = second_model._of_same_seeds(grid)
        assert {name: [p.calibration_seed for p in points] for name, points in found.items() if points} == {
            "round-to-nearest": [0],
            "GPTQ": [1, 2],
            "trellis, even": [1, 2],
        }

    def test_other_projects_rows_have_both_precisions(self, measured: Grid) -> None:
        scores = {"accuracy": 0.5, "accuracy_ci": [0.4, 0.6], "path_kl": 9.0, "path_kl_ci": [8.0, 10.0]}
        low = {"accuracy_a4": 0.3, "accuracy_a4_ci": [0.2, 0.4], "path_kl_a4": 19.0, "path_kl_a4_ci": [18.0, 20.0]}
        peer = {"method": "HQQ", "setting": "group 64", "bits_per_weight": 2.5, **scores, **low}
        content = second_model.report(measured, Grid("none.json", measured.reference), {}, [], [peer])
        found = [row for row in content["rows"] if row["method"] == "HQQ, group 64"]
        assert [row["activation_bits"] for row in found] == [16, 4]
        assert [(row["accuracy"], row["path_kl"], row["path_kl_ci"]) for row in found] == [
            (0.5, 9.0, [8.0, 10.0]),
            (0.3, 19.0, [18.0, 20.0]),
        ]
        keys = next(row for row in content["rows"] if row["method"] == "GPTQ, one").keys()
        assert all(row.keys() == keys for row in found)

    def test_targets_have_verdicts(self, found: dict[str, Any]) -> None:
        targets = found["targets"]
        assert {row["smoothing_method"] for row in targets} == {"linear", "cubic", "sigmoid"}
        assert {row["verdict"] for row in targets} <= {"met", "not met", "inconclusive"}

    def test_a_seed_counts_when_all_of_it_is_measured(self, measured: Grid) -> None:
        assert second_model._complete(measured, None) == (0,)
        assert second_model._complete(measured, 4) == ()

    def test_norms_are_compared_with_one_set_of_the_same_seed(self, measured: Grid) -> None:
        (three,), (one,) = witness.norm_points("GPTQ", 3, "linear", (1,)), witness.norm_points("GPTQ", 1, None, (1,))
        row = next(iter(measured.rows.values()))

        def of(p: Point, nats: float) -> object:
            return type(row)(**vars(row) | {"point": p, "path_kl_per_sequence": [nats, nats + 1]})

        grid = SimpleNamespace(rows={three.key: of(three, 2.0), one.key: of(one, 5.0)}, __getitem__=None)
        table = type("Table", (SimpleNamespace,), {"__getitem__": lambda self, p: self.rows[p.key]})
        (found,) = second_model._norm_rows(table(**vars(grid)), "m", "GPTQ", 3, "linear")
        assert (found["change"], found["change_ci"], found["seeds"]) == (-3.0, [-3.0, -3.0], 1)
        assert second_model._norm_rows(table(rows={}), "m", "GPTQ", 3, "linear") == []

    @pytest.mark.parametrize(
        ("accuracy", "verdict"), [(0.55, "met"), (0.505, "not met"), (None, None)], ids=["met", "not met", "missing"]
    )
    def test_smoothed_norms_have_a_verdict_of_their_own(
        self, measured: Grid, accuracy: float | None, verdict: str | None
    ) -> None:
        row = next(iter(measured.rows.values()))
        (smooth,), (rough,) = (witness.norm_points("GPTQ", 3, s, (2,)) for s in ("linear", None))

        def of(p: Point, share: float) -> PointRow:
            return replace(row, point=p, accuracy_per_sequence=[share, share])

        grid = Grid("none.json", measured.reference, SMALL)
        grid.rows = {rough.key: of(rough, 0.5)} | ({smooth.key: of(smooth, accuracy)} if accuracy else {})
        found = second_model._norm_target(grid, "m", "GPTQ", "linear")
        assert [(t["verdict"], t["smoothing_method"], t["target"]) for t in found] == (
            [(verdict, "linear", 0.02)] if accuracy else []
        )


def test_published_sequences_are_masked_and_filled(
    lm: DiffusionLM, shallow: DiffusionLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(witness, "PUBLIC", ("ACDEFG", "KLMNP"))
    shares = []
    for letters in witness.PUBLIC:
        ids = torch.tensor([lm.tokenizer.encode(letters).ids])
        allowed = torch.tensor([[False, *(True for _ in letters), False]])
        states = forward_states(ids, allowed, 4, lm.mask_token_id, 1_002)
        right = (lm.model(states.ids).logits[..., lm.writable].argmax(-1) == states.clean - 5) & states.is_masked
        masked = states.is_masked.sum(1).double()
        shares.append((right.sum(1) / masked).mean())
    assert witness.public_accuracy(lm, 4, masks=1).tolist() == pytest.approx([float(sum(shares) / 2)])
    assert len(set(witness.public_accuracy(lm, 4, masks=8).tolist())) > 1
    few = {name: witness.FIRST[name] for name in ("round-to-nearest", "GPTQ", "trellis, sequential")}
    monkeypatch.setattr(second_model, "FIRST", few)
    first = next(second_model.public_rows(shallow, SMALL, progress=False))
    assert [row["method"] for row in first] == ["full precision"]  # a run that is stopped goes on from here
    *_, rows = second_model.public_rows(shallow, SMALL, first, progress=False)
    assert [row["method"] for row in rows] == ["full precision", "round-to-nearest", "GPTQ"]
    assert rows[:1] == first
    monkeypatch.setattr(second_model, "public_accuracy", None)
    assert not list(second_model.public_rows(shallow, SMALL, rows, progress=False))
    assert all(row["accuracy_ci"][0] <= row["accuracy"] <= row["accuracy_ci"][1] for row in rows)


def test_both_models_are_compared_by_share() -> None:
    peers = [
        {"method": "round-to-nearest", "setting": "group 128", "path_kl": 80.0},
        {"method": "thermo_lib GPTQ", "setting": "group 128", "path_kl": 20.0},
        {"method": "HQQ", "setting": "group 64", "path_kl": 40.0},
        {"method": "HQQ", "setting": "group 16", "path_kl": 40.0},
    ]
    nats = {"round-to-nearest": 150.0, "GPTQ": 30.0, "HQQ, group 64": 75.0, "alone": 1.0}
    rows = [{"method": name, "activation_bits": 16, "path_kl": value} for name, value in nats.items()]
    rows.append({"method": "HQQ, group 64", "activation_bits": 4, "path_kl": 90.0})
    found = second_model.both_models(peers, rows, "round-to-nearest")
    assert [(row["method"], row["reference_share"], row["witness_share"]) for row in found] == [
        ("round-to-nearest", 1.0, 1.0),
        ("GPTQ", 0.25, 0.2),
        ("HQQ, group 64", 0.5, 0.5),
    ]
    allowed = "'round-to-nearest', 'GPTQ', 'HQQ, group 64'"
    with pytest.raises(ValueError, match=f"^baseline: found 'AWQ', allowed are {allowed}$"):
        second_model.both_models(peers, rows, "AWQ")

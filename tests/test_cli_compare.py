"""``compare``: two models on the same inputs, two files of results, and what isn't comparable."""

import json
import shutil
from pathlib import Path

import pytest
from small_runs import Run

FAST = ("preset=fast", "group_size=16", "timesteps=4")
T = ("--timesteps", 4)


def read(path: str) -> dict[str, object]:
    """A JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


@pytest.mark.slow
class TestModels:
    """Full precision against a quantized model."""

    def test_the_differences_are_those_of_evaluate(self, run: Run, folder: Path) -> None:
        assert run("quantize", "--model", folder, "--output", "small", *FAST)[0] == 0
        assert run("evaluate", "--model", folder, "--output", "a.json", *T)[0] == 0
        assert run("evaluate", "--model", "small", "--reference", folder, "--output", "b.json", *T)[0] == 0
        status, out, err = run("compare", folder, "small", "--output", "models.json", *T)
        assert status == 0
        assert "compare" in err
        found, a, b = read("models.json"), read("a.json"), read("b.json")
        assert found["scores"][0]["sequences"] == a["sequences"]
        assert found["scores"][1]["sequences"] == b["sequences"]
        rows = {row["key"]: row for row in found["differences"]}
        for key in ("accuracy", "nelbo", "path_kl", "bits_per_weight"):
            assert rows[key]["difference"] == b[key] - a[key]
        assert rows["path_kl"]["verdict"] == "worse"
        assert rows["bits_per_weight"]["verdict"] == rows["megabytes"]["verdict"] == "smaller"
        assert out.splitlines()[:2] == [f"A: {folder}", "B: small"]
        assert "is worse in" in out
        # The files of both evaluations say the same, paired too.
        assert run("compare", "a.json", "b.json", "--output", "files.json")[0] == 0
        pairs = {row["key"]: (row["difference"], row["pairs"]) for row in read("files.json")["differences"]}
        assert pairs == {key: (rows[key]["difference"], rows[key]["pairs"]) for key in pairs}

    def test_a_preset_is_the_reference_quantized_so(self, run: Run, folder: Path) -> None:
        assert run("compare", folder, "preset=fast", "--output", "preset.json", *T)[0] == 0
        (bits,) = [row for row in read("preset.json")["differences"] if row["key"] == "bits_per_weight"]
        assert bits["b"] < 8 < bits["a"]

    def test_two_quantized_models_need_their_reference(self, run: Run, folder: Path) -> None:
        assert run("quantize", "--model", folder, "--output", "small", *FAST)[0] == 0
        shutil.copytree("small", "other")
        status, _, err = run("compare", "small", "other", *T)
        assert status == 2
        assert "reference: found none, expected the full-precision model" in err
        status, out, _ = run("compare", "small", "other", "--reference", folder, *T)
        assert status == 0
        assert "B is equal to A in accuracy, NELBO, path KL, Sudoku solved, bits per weight" in out


class TestResults:
    """Files of results."""

    @pytest.fixture
    def report(self) -> dict[str, object]:
        """What a report needs to be compared."""
        numbers = {"bits_per_weight": 2.25, "activation_bits": 16, "accuracy": 0.3, "accuracy_ci": [0.28, 0.32]}
        numbers |= {"path_kl": 50.0, "path_kl_ci": [45.0, 55.0], "path_kl_per_timestep": [50.0]}
        target = {"name": "gain", "verdict": "not met", "value": 0.0, "ci": [0.0, 0.0], "target": 0.1}
        rows = [numbers | {"name": "one"}, numbers | {"name": "two"}]
        return {"full_precision": numbers | {"name": "full"}, "configurations": rows, "targets": [target]}

    def test_only_what_moved_is_shown(self, run: Run, report: dict[str, object]) -> None:
        Path("a.json").write_text(json.dumps(report))
        report["configurations"][1] |= {"accuracy": 0.4, "accuracy_ci": [0.38, 0.42], "path_kl": 49.0}
        report["targets"][0]["verdict"] = "met"
        Path("b.json").write_text(json.dumps(report))
        status, out, _ = run("compare", "a.json", "b.json", "--output", "c.json")
        assert status == 0
        moved = [line.split()[0] for line in out.splitlines() if line.startswith(("one", "two", "full"))]
        assert moved == ["two", "two"]
        assert "9 numbers are in both, 2 of them differ, 1 better, 1 can't be told apart." in out
        assert "Target gain: not met in A, met in B." in out
        assert read("c.json")["targets"] == [{"name": "gain", "a": "not met", "b": "met"}]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("a.json", "reference"), "allowed are two models, or two JSON files of results"),
            (("a.json", "other.json"), "other.json: found an object with 'x', allowed is a file that evaluate, point"),
            (("a.json", "absent.json"), "absent.json: found no such file"),
            (("a.json", "a.json", "--sequences", 3), "sequences: found it with files of results"),
            (("reference", "preset=fastest"), "preset: found 'fastest', allowed are fast, gptq"),
            (("reference", ""), "b: found '', allowed is a text that isn't empty"),
            (("a.json", "scores.json"), "compare: found report and scores, allowed are two files of one kind"),
            (("a.json", "broken.json"), "broken.json: accuracy: found 'x', allowed is a number"),
        ],
    )
    def test_what_cannot_be_compared_is_one_line(
        self, run: Run, report: dict[str, object], words: tuple[object, ...], message: str
    ) -> None:
        Path("a.json").write_text(json.dumps(report))
        Path("other.json").write_text('{"x": 1}')
        Path("scores.json").write_text('{"name": "m", "accuracy": 0.5}')
        Path("broken.json").write_text('{"name": "m", "accuracy": "x"}')
        status, out, err = run("compare", *words)
        assert (status, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1

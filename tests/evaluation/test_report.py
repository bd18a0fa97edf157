"""Reports: text and JSON that are written whole or not at all, and say what was measured with what."""

import copy
import csv
import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermo_lib.evaluation import report
from thermo_lib.files.reading import read_json
from thermo_lib.files.text import write_json, write_text
from thermo_lib.studies.params import default

ROW = {
    "name": "W4A16 gptq",
    "bits": 4,
    "bits_per_weight": 2.25,
    "accuracy": 0.4567,
    "accuracy_ci": [0.44, 0.47],
    "nelbo": 1.2345,
    "path_kl": 12.345,
    "markov_score": None,
    "max_jump": None,
    "cosine_similarity": 0.9,
    "sudoku_solved": 0.85,
}
TARGET = {
    "name": "Markov score",
    "precision": "W4A8",
    "activation_bits": 8,
    "smoothing_method": "linear",
    "value": 0.9,
    "ci": [0.9, 0.9],
    "target": 0.82,
    "verdict": "met",
}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


class TestFiles:
    """Files are replaced as a whole."""

    @given(content=json_values)
    def test_reading_written_json_gives_the_content(
        self, tmp_path_factory: pytest.TempPathFactory, content: Any
    ) -> None:
        path = tmp_path_factory.mktemp("json") / "made on the way" / "content.json"
        write_json(path, content)
        assert read_json(path) == content
        assert [p.name for p in path.parent.iterdir()] == ["content.json"]

    def test_the_order_of_keys_does_not_change_the_file(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", {"x": 1, "y": {"b": 2, "a": 3}})
        write_json(tmp_path / "b.json", {"y": {"a": 3, "b": 2}, "x": 1})
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_number_that_json_does_not_know_is_refused_and_the_earlier_file_stays(
        self, tmp_path: Path, value: float
    ) -> None:
        path = tmp_path / "content.json"
        write_json(path, {"x": 1})
        with pytest.raises(ValueError, match="JSON"):
            write_json(path, {"x": [value]})
        assert read_json(path) == {"x": 1}
        assert [p.name for p in tmp_path.iterdir()] == ["content.json"]

    def test_a_failing_write_leaves_the_earlier_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "text.txt"
        write_text(path, "first")

        def fail(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_text(path, "second")
        assert path.read_text(encoding="utf-8") == "first"

    def test_a_missing_file_is_named_with_what_writes_it(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"found no .*absent\.json: an earlier stage .* `make repro`"):
            read_json(tmp_path / "absent.json")
        with pytest.raises(ValueError, match=r"found no .*report\.json: `thermo benchmark` writes one, "):
            read_json(tmp_path / "report.json")


class TestTable:
    """Rows as aligned text."""

    def test_golden(self) -> None:
        rows = [{"name": "a", "x": 0.5}, {"name": "longer", "x": None}, {"name": "b", "x": 12.345}]
        columns = {"row": ("name", "{}"), "value": ("x", "{:.2f}"), "nowhere": ("y", "{}")}
        assert report.table(rows, columns).splitlines() == [
            "row     value",
            "------  -----",
            "a        0.50",
            "longer      -",
            "b       12.35",
        ]

    def test_a_row_of_the_report_is_formatted_by_column(self) -> None:
        heading, _, line = report.table([ROW]).splitlines()
        assert heading.split() == [
            "configuration", "bpw", "accuracy", "95", "%", "NELBO", "path", "KL", "cosine", "Sudoku"
        ]  # fmt: skip
        assert line.split() == ["W4A16", "gptq", "2.25", "0.457", "0.440..0.470", "1.23", "12.35", "0.900", "0.85"]


class TestReport:
    """The report names its inputs, and says everything that it measured."""

    def test_versions_are_those_installed(self) -> None:
        found = report.versions()
        assert found.pop("python") == platform.python_version()
        assert found == {name: importlib.metadata.version(name) for name in report.REPORTED_PACKAGES}
        assert {"torch", "transformers"} <= found.keys()

    def test_what_isnt_installed_has_no_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As without the extra ``pipeline``."""
        monkeypatch.setattr(report, "REPORTED_PACKAGES", ("torch", "a-package-that-nobody-has"))
        assert report.versions().keys() == {"python", "torch"}

    def test_the_content_is_complete_and_json(self) -> None:
        content = report.build_report("model", ROW, [ROW], [TARGET])
        assert content.keys() == {
            "model",
            "versions",
            "hardware",
            "seeds",
            "full_precision",
            "configurations",
            "targets",
        }
        assert content["seeds"] == {"all": 0}
        assert report.build_report("model", ROW, [ROW], [TARGET], seed=3)["seeds"] == {"all": 3}
        assert content["hardware"]["machine"] == platform.machine()
        assert content["hardware"]["threads"] >= 1
        assert json.loads(json.dumps(content, allow_nan=False)) == content

    def test_the_text_shows_every_configuration_and_verdict(self) -> None:
        rows = [{**ROW, "name": f"configuration {i}"} for i in range(3)]
        targets = [{**TARGET, "verdict": v} for v in ("met", "not met", "inconclusive")]
        text = report.report_text(report.build_report("some/model", {**ROW, "name": "full precision"}, rows, targets))
        lines = text.splitlines()
        assert "'some/model'" in lines[0]
        for name in ("full precision", *(row["name"] for row in rows)):
            assert [line for line in lines if line.startswith(name)], name
        assert [line.split("0.82")[1].strip() for line in lines if line.startswith("Markov score")] == [
            "met",
            "not met",
            "inconclusive",
        ]
        assert len([line for line in lines if line.startswith("Markov score") and "W4A8" in line]) == 3
        assert f"torch {importlib.metadata.version('torch')}" in text
        assert text.endswith(" threads.\n")


class TestPipelineFiles:
    """What DVC shows: metrics and plots."""

    def test_metrics_are_scores_by_configuration_and_verdicts_by_target(self) -> None:
        full = {**ROW, "name": "full precision"}
        smoothed = {**ROW, "name": "smoothed", "markov_score": 0.9}
        found = report.metrics(full, [smoothed], [TARGET, {**TARGET, "smoothing_method": None, "verdict": "not met"}])
        assert found["configurations"].keys() == {"full precision", "smoothed"}
        assert "markov_score" not in found["configurations"]["full precision"]
        assert found["configurations"]["smoothed"]["markov_score"] == 0.9
        assert found["configurations"]["smoothed"]["accuracy"] == ROW["accuracy"]
        assert found["verdicts"] == {"Markov score": {"W4A8 linear": "met", "W4A8 none": "not met"}}

    def test_the_plot_s_table_has_a_line_a_timestep_and_a_column_a_configuration(self, tmp_path: Path) -> None:
        rows = [{"name": "full precision", "x": [0.5, 0.25]}, {"name": 'W2A16, "time" groups', "x": [0.125, 1.0]}]
        report.write_per_timestep(tmp_path / "plot.csv", rows, "x")
        with (tmp_path / "plot.csv").open(encoding="utf-8", newline="") as file:
            assert list(csv.reader(file)) == [
                ["timestep", "full precision", 'W2A16, "time" groups'],
                ["0", "0.5", "0.125"],
                ["1", "0.25", "1.0"],
            ]

    def test_the_plot_s_table_needs_as_many_timesteps_of_each(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="zip"):
            report.write_per_timestep(tmp_path / "p.csv", [{"name": "a", "x": [1]}, {"name": "b", "x": [1, 2]}], "x")
        assert list(tmp_path.iterdir()) == []


def record_of(points: int) -> dict[str, Any]:
    """A training record with a number of points on its loss curves."""
    settings = {**default("train"), **default("data"), "seed": 0}
    return {
        "parameters": 3_934_720,
        "steps": 5500,
        "code_tokens": 19_712_000,
        "puzzles": 220_000,
        "loss_every": 50,
        "code_loss": [3.0 - 0.01 * i for i in range(points)],
        "planning_loss": [2.0 - 0.01 * i for i in range(points)],
        "settings": settings,
    }


class TestFewNumbers:
    """What `dvc metrics` shows, what stands in for missing files of the stages, and what moved between two runs."""

    @staticmethod
    def row(name: str, bits: int, groups: int, accuracy: float, path_kl: float) -> dict[str, Any]:
        settings = {"bits": 2, "activation_bits": bits, "num_time_groups": groups, "quantizer": name.split()[1]}
        ends = {"accuracy_ci": [accuracy - 0.02, accuracy + 0.02], "path_kl_ci": [path_kl - 2, path_kl + 2]}
        return {"name": name, **settings, "accuracy": accuracy, "path_kl": path_kl, **ends}

    @pytest.fixture
    def rows(self) -> list[dict[str, Any]]:
        return [
            self.row("W2A16 rtn", 16, 1, 0.31, 84.0),
            self.row("W2A16 gptq", 16, 1, 0.38, 24.0),
            self.row("W2A16 gptq, time groups", 16, 3, 0.39, 23.0),
            self.row("W2A4 gptq, one group", 4, 1, 0.34, 53.0),
            self.row("W2A4 gptq, dynamic per token", 4, 1, 0.37, 31.0),
        ]

    def test_the_headline_has_few_numbers_and_each_is_that_of_its_row(self, rows: list[dict[str, Any]]) -> None:
        targets = [{"verdict": "met"}, {"verdict": "not met"}, {"verdict": "met"}]
        assert report.headline({"accuracy": 0.41}, rows, targets) == {
            "accuracy": {"full": 0.41, "gptq": 0.38, "W2A4": 0.37},
            "path_kl": {"gptq": 24.0, "W2A4": 31.0},
            "targets": {"met/3": 2},
        }

    def test_what_the_stages_left_is_found_again_in_the_report(self, rows: list[dict[str, Any]]) -> None:
        """The report is made of what the stages left, in this order."""
        full, of_smoothing = {"name": "full precision"}, [{"name": "Markov score"}]
        of_time = [{"name": "overhead of inference"}]
        timings = {"int2": {"seconds_to_quantize": {"rtn": 0.1}}, "smoothing": {"W2A4": {"inference": {"ratio": 1.0}}}}
        found = report.stage_results(
            report.build_report("m", full, rows, [*of_smoothing, *of_time]), copy.deepcopy(timings)
        )
        assert found == {
            "reference.json": {"full_precision": full},
            "int2.json": rows[:2],
            "smoothing.json": {"configurations": rows[2:], "targets": of_smoothing},
            "timings/int2.json": timings["int2"],
            "timings/smoothing.json": {**timings["smoothing"], "targets": of_time},
        }

    def test_only_what_differs_has_moved_and_by_its_share_of_the_interval(self, rows: list[dict[str, Any]]) -> None:
        assert report.moved(rows, rows) == []
        changed = [*rows[:1], {**rows[1], "path_kl": 27.0, "path_kl_ci": [20.0, 30.0]}, *rows[2:]]
        (found,) = report.moved(changed, rows)
        assert found == {
            "name": "W2A16 gptq",
            "number": "path KL (nats)",
            "committed": 24.0,
            "ci": [22.0, 26.0],
            "value": 27.0,
            "change": 3.0,
            "of_interval": 1.5,
        }

    def test_a_number_without_an_interval_moves_without_a_share(self) -> None:
        (found,) = report.moved([{"name": "a", "nelbo": 3.5}], [{"name": "a", "nelbo": 3.0}])
        assert (found["change"], found["ci"], found["of_interval"]) == (0.5, None, None)

    def test_a_configuration_that_is_not_committed_is_shown_without_a_change(self, rows: list[dict[str, Any]]) -> None:
        found = report.moved(rows[:1], rows[1:])
        assert [(row["number"], row["value"]) for row in found] == [("accuracy (0-1)", 0.31), ("path KL (nats)", 84.0)]
        assert {row["committed"] for row in found} == {row["change"] for row in found} == {None}
        assert report.table(found, report.MOVED_COLUMNS).splitlines()[0].split() == [
            "configuration",
            "number",
            "this",
            "run",
        ]


class TestModelCard:
    """The README of the reference model, written from its record and its scores."""

    SCORES = {  # noqa: RUF012
        "full_precision": {**ROW, "accuracy_per_timestep": [0.5] * 16},
        "unigram": [0.1234, 4.56],
        "copying": [0.2345, 3.45],
        "solved": {"sudoku": 0.987, "countdown": 0.321},
        "rounded_loss": -0.25,
    }

    def test_it_has_the_numbers_of_record_and_scores(self) -> None:
        card = report.model_card(record_of(110), self.SCORES)
        for number in ("3,934,720", "5,500", "19,712,000", "220,000", "0.123", "4.56", "0.234", "0.987", "0.321"):
            assert number in card, number
        assert "-25.0 %" in card
        assert "sympy 1.14.0" in card

    @pytest.mark.parametrize("points", [1, 2, 5, 8, 9, 110])
    def test_at_most_eight_points_of_the_loss_and_the_last_are_shown(self, points: int) -> None:
        curve = [
            line.split("|")[1:4]
            for line in report.model_card(record_of(points), self.SCORES).splitlines()
            if line.count("|") == 4 and line[2].isdigit()
        ]
        assert len(curve) == min(points, 8)
        assert curve[-1][0].strip() == f"{50 * points:,}"
        assert float(curve[-1][1]) == pytest.approx(3.0 - 0.01 * (points - 1), abs=1e-3)

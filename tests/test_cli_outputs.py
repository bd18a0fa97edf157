"""What commands write: refused before the work where it can't be, by one run at a time or merged, and never lost."""

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_runs import Run

from thermo_lib import commands, compare
from thermo_lib.evaluation import report
from thermo_lib.files import whole
from thermo_lib.files.locks import locked
from thermo_lib.files.text import read_json, write_json
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.notebooks import ROOT
from thermo_lib.studies import grid
from thermo_lib.studies.grid import Grid, Inputs, PointRow, point

SMALL = Inputs(sequences=2, trajectories=1, code_sequences=1, puzzles=0)
POINTS = [point(seed, quantizer="rtn", timesteps=4) for seed in range(6)]
ROW = {"name": "a", "accuracy": 0.5}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that takes long may begin."""
    for name in ("load_model", "load_any", "build_suite", "kernel_speeds", "calibrate", "stored_dtype"):
        monkeypatch.setattr(commands, name, lambda *_, **__: pytest.fail("the work has begun"))
    monkeypatch.setattr(commands.gpu, "gpu_check", lambda *_, **__: pytest.fail("the work has begun"))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch, tiny: DiffusionLM) -> None:
    """Points are scored without models."""

    def score(_: object, measured: grid.Point, __: object) -> PointRow:
        number = 0.1 * measured.calibration_seed
        return PointRow(measured, [number], [number], [number], [number], None, None, 2.0)

    monkeypatch.setattr(grid, "score", score)
    monkeypatch.setattr(grid._Models, "build", lambda *_: None)
    monkeypatch.setattr(grid._Models, "suite", lambda *_: None)
    monkeypatch.setattr(commands, "load_model", lambda name: tiny)


WRITERS = [
    ("evaluate", "--timesteps", 4, "--output"),
    ("point", "--output"),
    ("study", "--output"),
    ("speed", "--output"),
    ("gpu-check", "--device", "cpu", "--output"),
]


class TestBeforeTheWork:
    @pytest.mark.usefixtures("no_work")
    @pytest.mark.parametrize("words", WRITERS, ids=lambda words: words[0])
    def test_an_output_that_is_no_file_is_refused(self, run: Run, words: tuple[object, ...]) -> None:
        Path("folder").mkdir()
        Path("file").write_text("thesis")
        for output, found in (
            ("folder", "a folder"),
            ("/dev/null", "something else than"),
            ("file/x", "isn't a folder"),
        ):
            status, out, err = run(*words, output)
            assert (status, out) == (2, "")
            assert f"output: found {output!r}, {found}" in err or "file', which isn't a folder" in err
            assert len(err.splitlines()) == 1
        assert sorted(path.name for path in Path.cwd().iterdir()) == ["file", "folder"]

    @pytest.mark.usefixtures("no_work")
    @pytest.mark.parametrize(
        "words", [w for w in WRITERS if w[0] not in ("point", "study")], ids=lambda words: words[0]
    )
    def test_another_file_is_refused_and_so_is_a_second_run(self, run: Run, words: tuple[object, ...]) -> None:
        Path("thesis.tex").write_text("thesis")
        status, _, err = run(*words, "thesis.tex")
        assert status == 2
        assert "output: found 'thesis.tex', a file with something else than such a report" in err
        assert Path("thesis.tex").read_text() == "thesis"
        with locked("new.json"):
            status, _, err = run(*words, "new.json")
        assert status == 2
        assert f"found another run writing {Path.cwd()}/new.json, allowed is one at a time" in err
        assert sorted(path.name for path in Path.cwd().iterdir()) == ["thesis.tex"]

    def test_a_page_replaces_a_page_and_nothing_else(self, run: Run) -> None:
        whole_report = (ROOT / "reports" / "report.json").read_text(encoding="utf-8")
        Path("r.json").write_text(whole_report, encoding="utf-8")
        Path("thesis.tex").write_text("thesis")
        for output in ("thesis.tex", "r.json"):
            status, _, err = run("report", "r.json", "--output", output)
            assert (status, len(err.splitlines())) == (2, 1)
            assert f"output: found {output!r}, a file with something else than such a page" in err
        assert Path("thesis.tex").read_text() == "thesis"
        assert Path("r.json").read_text(encoding="utf-8") == whole_report
        pages = []
        for _ in range(2):
            assert run("report", "r.json", "--output", "page.html")[0] == 0
            pages.append(Path("page.html").read_bytes())
        assert pages[0] == pages[1]
        with locked("page.html"):
            assert "found another run writing" in run("report", "r.json", "--output", "page.html")[2]

    @pytest.mark.usefixtures("scored")
    @pytest.mark.parametrize("text", ["thesis", "[]", '{"rows": 1}', '{"rows": [{}], "made_of": 1}'])
    def test_a_file_without_points_is_refused_by_what_measures_points(self, run: Run, text: str) -> None:
        Path("thesis.json").write_text(text)
        status, _, err = run("point", "quantizer=rtn", "--output", "thesis.json")
        assert status == 2
        assert err.startswith("error: thesis.json")
        assert "found " in err
        assert len(err.splitlines()) == 1
        assert Path("thesis.json").read_text() == text

    @pytest.mark.usefixtures("no_work")
    @pytest.mark.parametrize(
        ("name", "text", "found"),
        [
            ("report.txt", "mine", "found report.txt without report.json"),
            ("timings.json", "{}", "found timings.json without report.json"),
            ("report.json", "{}", "something else than such a report (no configurations, targets)"),
        ],
    )
    def test_a_benchmark_replaces_its_own_files_only(self, run: Run, name: str, text: str, found: str) -> None:
        Path("out").mkdir()
        Path("out", name).write_text(text)
        status, _, err = run("benchmark", "--output", "out")
        assert status == 2
        assert found in err
        assert [path.name for path in Path("out").iterdir()] == [name]

    @pytest.mark.usefixtures("no_work")
    def test_a_benchmark_finds_a_folder_in_the_place_of_a_file(self, run: Run) -> None:
        Path("out", "report.txt").mkdir(parents=True)
        status, _, err = run("benchmark", "--output", "out")
        assert status == 2
        assert "report.txt', a folder; allowed is" in err


def _measure(path: Path, seeds: list[int], ready: Callable[[], object], tiny: DiffusionLM) -> None:
    measured = Grid(path, tiny, SMALL)
    ready()  # both have read the file before any writes
    measured.run([POINTS[seed] for seed in seeds], progress=False)


@pytest.mark.usefixtures("scored")
class TestAtOnce:
    def test_two_runs_in_one_file_end_with_the_points_of_both(self, tiny: DiffusionLM, tmp_path: Path) -> None:
        path, both = tmp_path / "grid.json", multiprocessing.get_context("fork").Barrier(2)
        runs = [
            multiprocessing.get_context("fork").Process(target=_measure, args=(path, seeds, both.wait, tiny))
            for seeds in ([0, 1, 2], [2, 3, 4])
        ]
        for each in runs:
            each.start()
        for each in runs:
            each.join()
        assert [each.exitcode for each in runs] == [0, 0]
        found = Grid(path, tiny, SMALL)
        assert found.rows.keys() == {p.key for p in POINTS[:5]}
        assert [found[p].accuracy for p in POINTS[:5]] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
        assert [each.name for each in tmp_path.iterdir()] == ["grid.json"]

    def test_what_another_run_has_measured_is_not_measured_again(
        self, tiny: DiffusionLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine, other = (Grid(tmp_path / "grid.json", tiny, SMALL) for _ in range(2))
        other.run(POINTS, progress=False)
        mine.run(POINTS, progress=False)
        assert (len(other.measured), mine.measured) == (len(POINTS), [])

    def test_a_run_of_other_inputs_is_refused_before_its_work(self, tiny: DiffusionLM, tmp_path: Path) -> None:
        """Also where the file came after it was looked for."""
        mine = Grid(tmp_path / "grid.json", tiny, SMALL)
        Grid(tmp_path / "grid.json", tiny, Inputs()).run(POINTS[:1], progress=False)
        before = (tmp_path / "grid.json").read_bytes()
        with pytest.raises(ValueError, match="found points of other weights or inputs"):
            mine.run(POINTS, progress=False)
        assert mine.measured == []
        assert (tmp_path / "grid.json").read_bytes() == before

    def test_readers_and_writers_of_a_lock_take_turns(self, tmp_path: Path) -> None:
        """A number that many change at once ends where it should."""
        write_json(tmp_path / "n.json", 0)

        def count() -> None:
            for _ in range(10):
                with locked(tmp_path / "n.json", wait=True):
                    write_json(tmp_path / "n.json", read_json(tmp_path / "n.json") + 1)

        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert read_json(tmp_path / "n.json") == 40


class TestFullDisk:
    """What was measured is printed where it can't be written."""

    def test_points_that_were_measured_are_printed(
        self, run: Run, scored: None, tiny: DiffusionLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls, write = [], grid.write_json

        def full(path: Path, content: object) -> None:
            calls.append(path)
            if len(calls) > 2:
                raise OSError(f"output: could not write {path} (No space left on device)")
            write(path, content)

        monkeypatch.setattr(grid, "write_json", full)
        status, out, err = run("point", "quantizer=rtn", "--seeds", 1, 2, 3, "--output", "points.json")
        assert status == 2
        assert "No space left" in err
        assert [line.split()[-2] for line in out.splitlines()[2:]] == ["0.100000", "0.200000"]
        assert "weights.method=rtn" in out or "preset=fast" in out
        assert len(json.loads(Path("points.json").read_text())["rows"]) == 1

    def test_scores_and_speeds_are_printed(self, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError("output: could not write it (No space left on device)")

        monkeypatch.setattr(commands, "write_json", full)
        monkeypatch.setattr(commands, "write_speeds", full)
        monkeypatch.setattr(commands, "kernel_speeds", lambda **_: [{"tokens": 7}])
        monkeypatch.setattr(commands, "build_suite", lambda *_, **__: None)
        monkeypatch.setattr(commands, "scores", lambda *_: {"name": "the model", "accuracy": 0.123})
        for words, shown in ((("evaluate", "--model", folder, "--timesteps", 4), "0.123"), (("speed",), "7")):
            status, out, err = run(*words, "--output", "out.json")
            assert status == 2
            assert shown in out
            assert "No space left" in err

    def test_parts_of_a_gpu_check_are_printed(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError("output: could not write it (No space left on device)")

        monkeypatch.setattr(commands.gpu, "write_json", full)
        monkeypatch.setattr(commands.gpu, "PARTS", {"kernels": lambda *_: iter(())})

        def broken(*_: object) -> None:
            raise RuntimeError("no compiler")

        monkeypatch.setitem(commands.gpu.PARTS, "kernels", broken)
        status, out, err = run("gpu-check", "--device", "cpu", "--quick", "--output", "gpu.json")
        assert status == 2
        assert "kernels: RuntimeError: no compiler" in out
        assert "No space left" in err

    def test_a_benchmark_leaves_its_files_as_they_were(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for number in (1, 2):
            content = {"configurations": [], "targets": [], "number": number}
            monkeypatch.setattr(commands, "_benchmark", lambda *_, content=content: (content, {"seconds": 1}))
            monkeypatch.setattr(report, "report_text", lambda content: f"number {content['number']}")
            if number == 2:
                monkeypatch.setattr(whole.os, "replace", _full)
            status, out, err = run("benchmark", "--output", "out")
            assert status == 2 * (number == 2)
            assert f"number {number}" in out
        assert "could not write" in err
        assert Path("out/report.txt").read_text() == "number 1"
        assert read_json("out/report.json")["number"] == 1
        assert sorted(path.name for path in Path("out").iterdir()) == ["report.json", "report.txt", "timings.json"]


class TestNobodyReads:
    """What was found is on the disk where it can't be printed, and nothing is said."""

    @pytest.mark.parametrize(
        ("words", "name"),
        [
            (("evaluate", "--timesteps", 4, "--output", "out.json"), "out.json"),
            (("compare", "reference", "reference", "--output", "out.json"), "out.json"),
            (("speed", "--output", "out.json"), "out.json"),
            (("benchmark", "--output", "out"), "out/report.json"),
        ],
        ids=lambda words: words[0] if isinstance(words, tuple) else "",
    )
    @pytest.mark.parametrize("buffering", [-1, 1])
    def test_results_are_written_first(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], name: str, buffering: int
    ) -> None:
        row = {"name": "the model", "accuracy": 0.123}
        lm = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=dict))
        for module, stand_ins in (
            (commands, {"load": lm, "scores": row, "inputs": None, "kernel_speeds": [{"tokens": 7}]}),
            (commands, {"_benchmark": ({"configurations": [], "targets": []}, {})}),
            (compare, {"_models": {"differences": [], "summary": "none", "kind": "models", "a": "", "b": ""}}),
            (report, {"report_text": "text"}),
        ):
            for each, found in stand_ins.items():
                monkeypatch.setattr(module, each, lambda *_, found=found, **__: found)
        reader, writer = os.pipe()
        os.close(reader)
        output = os.fdopen(writer, "w", buffering=buffering)
        monkeypatch.setattr(sys, "stdout", output)
        status, _, err = run(*words)
        output.flush()  # as Python does at its end
        assert (status, err) == (141, "")
        assert read_json(name)


def _full(*_: object) -> None:
    raise OSError("No space left on device")

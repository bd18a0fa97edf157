"""``tidy`` leaves in an executed notebook what two runs have in common; where a notebook reads and writes."""

import contextlib
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbformat import v4

from thermo_lib import notebooks
from thermo_lib.notebooks import (
    THREADS,
    among,
    earlier,
    in_pipeline,
    is_aside,
    processor,
    reproducible,
    results,
    tidy,
    whole,
)

TIMES = {"start_time": "2026-01-01T00:00:00", "duration": 1.5}


def notebook(run: int, *more: Any) -> nbformat.NotebookNode:
    """An executed notebook whose times and progress bars depend on the run."""
    outputs = [
        v4.new_output("stream", name="stderr", text=f"  0%| {run} s"),
        v4.new_output("stream", name="stdout", text="a result\n"),
        v4.new_output("stream", name="stderr", text="100%|"),
        v4.new_output("execute_result", data={"text/plain": "42"}, execution_count=1),
        v4.new_output("display_data", data={"image/png": "aGVsbG8="}),
        *more,
    ]
    cells = [
        v4.new_markdown_cell("# Title", metadata={"papermill": {**TIMES, "duration": run}}),
        v4.new_code_cell(
            "steps = 1",
            metadata={
                "tags": ["parameters"],
                "papermill": TIMES,
                "execution": {"iopub.status.busy": f"2026-01-0{run}"},
            },
        ),
        v4.new_code_cell("print('a result')", outputs=outputs, execution_count=1),
    ]
    made = v4.new_notebook(cells=cells)
    made.metadata.update(
        {
            "kernelspec": {"name": "python3", "display_name": "Python 3"},
            "language_info": {"name": "python", "version": "3.11.99"},
            "papermill": {**TIMES, "duration": run},
        }
    )
    return made


def write(path: Path, content: nbformat.NotebookNode) -> Path:
    """Write a notebook."""
    nbformat.write(content, path)
    return path


class TestTidy:
    """Run times and progress bars go, results and tags stay."""

    def test_two_runs_leave_the_same_file(self, tmp_path: Path) -> None:
        paths = [write(tmp_path / f"{run}.ipynb", notebook(run)) for run in (1, 2)]
        assert paths[0].read_bytes() != paths[1].read_bytes()
        for path in paths:
            tidy(path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert paths[0].stat().st_mode & 0o777 == 0o644

    def test_results_sources_tags_and_kernel_stay(self, tmp_path: Path) -> None:
        path = write(tmp_path / "n.ipynb", notebook(1))
        tidy(path)
        text, parameters, code = nbformat.read(path, as_version=4).cells
        assert (text.source, parameters.source, code.source) == ("# Title", "steps = 1", "print('a result')")
        assert text.metadata == {}
        assert parameters.metadata == {"tags": ["parameters"]}
        assert [output.output_type for output in code.outputs] == ["stream", "execute_result", "display_data"]
        assert code.outputs[0].text == "a result\n"
        assert code.outputs[1].data == {"text/plain": "42"}
        metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
        assert metadata.keys() == {"kernelspec", "language_info", "processor"}
        assert metadata["language_info"] == {"name": "python"}

    @pytest.mark.parametrize(
        ("jupyter", "kept"),
        [
            ({"source_hidden": True}, {"jupyter": {"source_hidden": True}}),
            ({"source_hidden": True, "outputs_hidden": True}, {"jupyter": {"source_hidden": True}}),
            ({"source_hidden": False}, {}),
            ({"outputs_hidden": True}, {}),
        ],
    )
    def test_code_stays_folded_and_outputs_are_never(
        self, jupyter: dict[str, bool], kept: dict[str, Any], tmp_path: Path
    ) -> None:
        content = notebook(1)
        content.cells[2].metadata["jupyter"] = jupyter
        path = write(tmp_path / "n.ipynb", content)
        tidy(path)
        assert nbformat.read(path, as_version=4).cells[2].metadata == kept

    def test_no_trace_of_times_or_bars_is_left(self, tmp_path: Path) -> None:
        path = write(tmp_path / "n.ipynb", notebook(1))
        tidy(path)
        content = path.read_text(encoding="utf-8")
        assert [word for word in ("papermill", "duration", "start_time", "stderr", "%|") if word in content] == []

    def test_a_tidy_notebook_stays_as_it_is(self, tmp_path: Path) -> None:
        path = write(tmp_path / "n.ipynb", notebook(1))
        tidy(path)
        before = path.read_bytes()
        tidy(path)
        assert path.read_bytes() == before

    def test_a_notebook_of_an_older_minor_version_stays_valid(self, tmp_path: Path) -> None:
        old = notebook(1)
        old.nbformat_minor = 4  # before cells had ids
        for cell in old.cells:
            del cell["id"]
        path = write(tmp_path / "n.ipynb", old)
        tidy(path)
        nbformat.validate(json.loads(path.read_text(encoding="utf-8")))

    def test_the_output_of_an_error_is_refused_and_the_file_stays(self, tmp_path: Path) -> None:
        error = v4.new_output("error", ename="ValueError", evalue="wrong", traceback=[])
        path = write(tmp_path / "n.ipynb", notebook(1, error))
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"n\.ipynb: cell 2 holds the output of an error"):
            tidy(path)
        assert path.read_bytes() == before

    def test_a_failing_write_leaves_the_file_and_nothing_beside_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write(tmp_path / "n.ipynb", notebook(1))
        before = path.read_bytes()

        def fail(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(nbformat, "write", fail)
        with pytest.raises(OSError, match="disk full"):
            tidy(path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["n.ipynb"]

    def test_the_processor_is_that_of_the_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write(tmp_path / "n.ipynb", notebook(1))
        tidy(path)
        assert nbformat.read(path, as_version=4).metadata["processor"] == processor() != ""
        monkeypatch.setattr(notebooks, "processor", lambda: "another")
        tidy(path)  # papermill has left no trace: it wasn't executed again
        assert nbformat.read(path, as_version=4).metadata["processor"] == processor()
        tidy(write(path, notebook(1)))
        assert nbformat.read(path, as_version=4).metadata["processor"] == "another"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("text", "line 1: found invalid JSON"),
            ("[]", "found a list, expected an object"),
            ("{}", "nbformat: found none, allowed is a whole number"),
            ('{"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "cells": []}', "nbformat: found 3, allowed is 4"),
            ('{"nbformat": 4, "nbformat_minor": 5}', "metadata: found none, allowed is an object"),
            ('{"nbformat": 4, "nbformat_minor": 5, "metadata": []}', "metadata: found [], allowed is an object"),
            ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "cells: found none, allowed is a list"),
            ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [3]}', "cell 0: found a int"),
            (
                '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "code", "id": "a"}]}',
                "cells.0: found no notebook of format 4 ('metadata' is a required property)",
            ),
            ('{"nbformat": 4, "nbformat_minor": -1, "metadata": {}, "cells": []}', "found no notebook of format 4"),
            (None, "found no such file"),
        ],
        ids=str,
    )
    def test_what_is_no_notebook_is_named_and_stays(self, text: str | None, message: str, tmp_path: Path) -> None:
        path = tmp_path / "n.ipynb"
        if text is not None:
            path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"n\.ipynb") as error:
            tidy(path)
        assert message in str(error.value)
        assert len(str(error.value).splitlines()) == 1
        assert text is None or path.read_text(encoding="utf-8") == text


class TestWhereANotebookReadsAndWrites:
    """Only the pipeline writes what is committed; elsewhere what is missing is made."""

    @pytest.mark.parametrize("stage", [None, ""])
    def test_a_persons_run_writes_to_a_scratch_folder(
        self, stage: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("DVC_STAGE", raising=False)
        if stage is not None:
            monkeypatch.setenv("DVC_STAGE", stage)
        assert not in_pipeline()
        assert results(tmp_path) == tmp_path / "artifacts" / "scratch"

    def test_a_stage_writes_to_the_checkout(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DVC_STAGE", "report")
        assert in_pipeline()
        assert results(tmp_path) == tmp_path

    @pytest.mark.parametrize("stage", ["", "report"])
    def test_what_is_there_is_read(
        self, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("DVC_STAGE", stage)
        (tmp_path / "artifacts").mkdir()
        (tmp_path / "artifacts" / "int2.json").write_text("rows")
        assert earlier("int2.json", Path.read_text, lambda: "made", root=tmp_path) == "rows"
        assert capsys.readouterr() == ("", "")

    def test_what_is_missing_is_made_and_a_line_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delenv("DVC_STAGE", raising=False)
        assert earlier("int2.json", Path.read_text, lambda: "made", "taken from x", root=tmp_path) == "made"
        out, err = capsys.readouterr()
        assert out == "`artifacts/int2.json` isn't there (`make repro` writes it): taken from x for this run.\n"
        assert err == ""
        assert list(tmp_path.iterdir()) == []

    def test_what_an_own_run_left_is_read_before_it_is_made(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delenv("DVC_STAGE", raising=False)
        own = results(tmp_path) / "artifacts" / "int2.json"
        own.parent.mkdir(parents=True)
        own.write_text("own rows")
        assert earlier("int2.json", Path.read_text, lambda: "made", root=tmp_path) == "own rows"
        place = "artifacts/scratch/artifacts/int2.json"
        assert capsys.readouterr().out == f"`artifacts/int2.json` isn't there: `{place}` of an earlier run is used.\n"

    def test_what_is_missing_in_the_pipeline_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DVC_STAGE", "report")
        with pytest.raises(ValueError, match=r"^artifacts/int2\.json: found none, needed is what an earlier stage"):
            earlier("int2.json", Path.read_text, lambda: "made", root=tmp_path)

    def test_dvc_names_the_stage_to_its_commands(self, tmp_path: Path) -> None:
        """The variable that tells the pipeline from a person is one that DVC sets, and no other program here."""
        from dvc.env import DVC_STAGE
        from dvc.repo import Repo

        command = 'python3 -c \'import os; open("seen", "w").write(os.environ["DVC_STAGE"])\''
        (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"report": {"cmd": command, "outs": ["seen"]}}}))
        Repo.init(str(tmp_path), no_scm=True).close()
        with contextlib.chdir(tmp_path), Repo() as repo:
            repo.reproduce()
        assert DVC_STAGE == "DVC_STAGE"
        assert (tmp_path / "seen").read_text() == "report"


def test_reproducible_sets_threads_deterministic_kernels_and_portable_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    try:
        reproducible()
        assert torch.get_num_threads() == THREADS == 2
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["ATEN_CPU_CAPABILITY"] == "avx2"
        assert {"MKL_CBWR", "ONEDNN_MAX_CPU_ISA"} <= os.environ.keys()
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        for name in ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA"):
            os.environ.pop(name, None)


READABLE = [
    "from tqdm import tqdm\nfrom thermo_lib.notebooks import aside, readable\nreadable()",
    "for _ in tqdm(range(3), desc='a bar', leave=False):\n    pass\naside('a remark')\nprint('a result')\n"
    "import warnings\nwarnings.warn('take care')",
    "def inner():\n    raise ValueError('bits: found 9, allowed is 2')\ninner()",
    "from pathlib import Path\nPath('missing').read_text()",
    "{}['x']",
]


@pytest.fixture(scope="module")
def executed() -> nbformat.NotebookNode:
    """The cells, run by a kernel as papermill runs them."""
    made = v4.new_notebook(cells=[v4.new_code_cell(source) for source in READABLE])
    return NotebookClient(made, allow_errors=True).execute()


@pytest.mark.slow
def test_an_error_of_a_value_or_a_file_is_one_line_and_one_of_the_code_keeps_its_traceback(
    executed: nbformat.NotebookNode,
) -> None:
    shown = [cell.outputs[0] for cell in executed.cells[2:]]
    assert [output.output_type for output in shown] == ["error"] * 3
    assert [len(output.traceback) for output in shown[:2]] == [1, 1]
    assert shown[0].traceback == ["ValueError: bits: found 9, allowed is 2"]
    assert "missing" in shown[1].traceback[0]
    assert len(shown[2].traceback) > 2


@pytest.mark.slow
def test_bars_and_remarks_are_no_stderr_and_stay_in_no_executed_copy(
    executed: nbformat.NotebookNode, tmp_path: Path
) -> None:
    outputs = executed.cells[1].outputs
    assert [output.get("name") for output in outputs] == [None, None, "stdout", None]
    assert [is_aside(output) for output in outputs] == [True, True, False, True]
    assert outputs[0].data["text/plain"] == ""  # the bar has gone
    assert [output.data["text/markdown"] for output in (outputs[1], outputs[3])] == ["a remark", "Warning: take care"]
    kept = v4.new_notebook(cells=executed.cells[:2])
    path = write(tmp_path / "n.ipynb", kept)
    tidy(path)
    assert [output.text for output in nbformat.read(path, as_version=4).cells[1].outputs] == ["a result\n"]


@pytest.mark.parametrize(
    ("check", "found", "message"),
    [
        (partial(whole, 2), 1, "found 1, allowed are whole numbers from 2"),
        (partial(whole, 1, 20), 21, "found 21, allowed are whole numbers from 1 to 20"),
        (partial(whole, 0), True, "found True, allowed are whole numbers from 0"),
        (partial(whole, 0), 1.5, "found 1.5, allowed are whole numbers from 0"),
        (partial(whole, 1), [1, 0], "found 0, allowed are whole numbers from 1"),
        (partial(whole, 1), [], "found none, allowed are whole numbers from 1"),
        (partial(among, (2, 4)), 3, "found 3, allowed are 2, 4"),
        (partial(among, (0, 1)), [0, 9], "found 9, allowed are 0, 1"),
        (partial(among, (0, 1)), [True], "found True, allowed are 0, 1"),
    ],
    ids=range(9),
)
def test_a_parameter_that_cannot_be_is_named(check: Callable[..., None], found: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'tokens: {message}')}$"):
        check(tokens=found)


def test_parameters_that_can_be_are_taken() -> None:
    whole(1, 3, one=1, three=3, some=[1, 2, 3])
    among(("a", 1), word="a", number=1, both=[1, "a"])

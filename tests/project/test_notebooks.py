"""The notebooks: sources and executed copies belong together, and nbval notices a changed number.

Run after nbval has passed on the executed notebooks: what one notebook reads, an earlier one has written.
"""

import copy
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode, v4

from thermo_lib.evaluation.display import MOST_SENTENCES, sentences
from thermo_lib.notebooks import processor

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for path in (ROOT / "notebooks").glob("*.ipynb") if path.stem != "workbench")  # a person's
EXECUTED = ROOT / "notebooks" / "executed"
STAGES = [path for path in SOURCES if path.stem[0].isdigit()]  # the pipeline's; the rest are nobody's inputs
LONGEST_CELL = 18  # lines
CHANGED = "00_training"  # which takes little time up to its answer


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def text_of(cell: NotebookNode) -> str:
    """What a cell printed and showed, in all its forms that nbval compares."""
    return "\n".join(
        text
        for output in cell.outputs
        for kind, text in [("text/plain", output.get("text", "")), *output.get("data", {}).items()]
        if kind.startswith("text/")
    )


def is_folded(cell: NotebookNode) -> bool:
    return cell.metadata.get("jupyter", {}).get("source_hidden", False)


def visible(notebook: NotebookNode) -> list[NotebookNode]:
    """The outputs that a reader sees, in their order."""
    return [output for cell in code(notebook) for output in cell.outputs if output.get("name") != "stderr"]


def test_there_is_an_executed_copy_of_every_notebook() -> None:
    assert SOURCES
    assert [path.name for path in SOURCES] == sorted(path.name for path in EXECUTED.glob("*.ipynb"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_source_has_no_outputs_and_one_parameters_cell(path: Path) -> None:
    notebook = read(path)
    assert all(not cell.outputs and cell.execution_count is None for cell in code(notebook))
    assert [tagged(cell, "parameters") for cell in notebook.cells].index(True) == 1
    assert [tagged(cell, "parameters") for cell in notebook.cells].count(True) == 1
    assert max(len(cell.source.splitlines()) for cell in code(notebook)) <= LONGEST_CELL


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_question_and_no_answer_is_typed(path: Path) -> None:
    notebook = read(path)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert "**Question.**" in notebook.cells[0].source
    assert not [cell.id for cell in notebook.cells if "**Answer.**" in cell.source]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_all_code_but_the_parameters_is_folded(path: Path) -> None:
    for cell in [*code(read(path)), *code(read(EXECUTED / path.name))]:
        is_open = tagged(cell, "parameters") or tagged(cell, "injected-parameters")
        assert is_folded(cell) != is_open, cell.source


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_parameter_says_what_it_means(path: Path) -> None:
    (parameters,) = (cell for cell in code(read(path)) if tagged(cell, "parameters"))
    lines = parameters.source.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\w+(: [^=]+)? = ", line):
            assert "  # " in line or (number and lines[number - 1].startswith("# ")), line


WRITES = re.compile(r"\b(write_json|write_text|save|save_svg|save_quantized|write_per_timestep|export)\(")


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_notebook_leaves_the_pipeline_s_files_alone_and_does_without_them(path: Path) -> None:
    """It reads `artifacts` by `earlier`, which makes what is missing, and writes below `results()`."""
    for cell in code(read(path)):
        for line in cell.source.splitlines():
            assert "artifacts" not in line or "results()" in line, line
            assert not (WRITES.search(line) and ("ROOT" in line or "REFERENCE_DIR" in line)), line
        if "evaluations.save()" in cell.source:
            assert "if in_pipeline():\n    evaluations.save()" in cell.source


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_reader_sees_the_answer_first_and_then_the_figure_that_shows_it(path: Path) -> None:
    first, second, *_ = visible(read(EXECUTED / path.name))
    found = first.get("data", {}).get("text/markdown", "")
    assert found.startswith("**Answer.** ")
    assert 1 <= sentences(found.removeprefix("**Answer.** ")) <= MOST_SENTENCES
    assert any(kind.startswith("image/") for kind in second.get("data", {}))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_an_executed_copy_is_that_of_its_source(path: Path) -> None:
    executed = read(EXECUTED / path.name)
    kept = [cell.source for cell in executed.cells if not tagged(cell, "injected-parameters")]
    assert kept == [cell.source for cell in read(path).cells]
    outputs = [output for cell in code(executed) for output in cell.outputs]
    assert outputs
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_cell_whose_output_is_not_compared_says_so_in_its_first_line(path: Path) -> None:
    executed = read(EXECUTED / path.name)
    hidden = ("nbval-skip", "nbval-ignore-output", "nbval-raises-exception", "raises-exception", "nbval-test-listed")
    assert not [cell.id for cell in executed.cells for tag in hidden if tagged(cell, tag)]
    markers = {line for cell in code(executed) for line in cell.source.splitlines() if line.startswith("# NBVAL")}
    assert markers <= {"# NBVAL_SKIP", "# NBVAL_IGNORE_OUTPUT"}
    assert any(text_of(cell) and "# NBVAL" not in cell.source for cell in code(executed))


def changed_copy(path: Path) -> tuple[NotebookNode, int]:
    """A notebook up to its answer, with the last digit of its first number changed; and the position of the cell."""
    notebook = copy.deepcopy(read(path))
    for number, cell in enumerate(code(notebook)):
        for output in cell.outputs:
            text = output.get("data", {}).get("text/markdown", "")
            match = re.search(r"\d+(?:\.\d+)?", text)
            if "NBVAL_SKIP" in cell.source or match is None:
                continue
            digit = str((int(text[match.end() - 1]) + 1) % 10)
            output.data["text/markdown"] = text[: match.end() - 1] + digit + text[match.end() :]
            notebook.cells = notebook.cells[: notebook.cells.index(cell) + 1]
            return notebook, number
    raise AssertionError(f"{path.name} has no number in its answer")


STORED = "path KL  23.57  0.357..0.404  16 of 17\n-------  met\n"
PRINTED = {  # and whether it agrees with what is stored, on another processor
    STORED: True,
    "path KL   23.6  0.4..0.4  16 of 17\n-----  met\n": True,
    STORED.replace("23.57", "21.30"): True,
    STORED.replace("23.57", "21.10"): False,
    STORED.replace("0.357", "0.250"): False,
    STORED.replace("0.357", "-0.357"): False,
    STORED.replace("16", "15"): False,
    STORED.replace("met", "not met"): False,
    STORED.replace("..0.404", ""): False,
}
TABLE = '<style>#T_1 {background: 25.0%}</style><table id="T_1"><td><strong>23.57</strong></td><td>met</td></table>'
SHOWN = {  # the same of what is shown as HTML: its style follows from its numbers
    TABLE: True,
    TABLE.replace("23.57", "21.30").replace("25.0%", "75.0%"): True,
    TABLE.replace("23.57", "21.10"): False,
    TABLE.replace("met", "not met"): False,
    TABLE.replace("<strong>", "").replace("</strong>", ""): False,
}
AGREES = [*PRINTED.values(), *SHOWN.values()]


@pytest.fixture(scope="module")
def changed() -> tuple[NotebookNode, int]:
    return changed_copy(EXECUTED / f"{CHANGED}.ipynb")


@pytest.fixture(scope="module")
def failing(changed: tuple[NotebookNode, int], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Which cells of which notebook fail in nbval, all in one run, compared as the project's notebooks are."""
    folder = tmp_path_factory.mktemp("nbval")
    output = v4.new_output("stream", name="stdout", text=STORED)
    cells = [v4.new_code_cell(f"print({text!r}, end='')", outputs=[output], execution_count=1) for text in PRINTED]
    table = v4.new_output("display_data", data={"text/html": TABLE})
    for text in SHOWN:
        source = f"display({{'text/html': {text!r}}}, raw=True)"
        cells.append(v4.new_code_cell(source, outputs=[table], execution_count=1))
    for name, model in (("this", processor()), ("another", "another")):
        nbformat.write(v4.new_notebook(cells=cells, metadata={"processor": model}), folder / f"{name}.ipynb")
    notebook, _ = changed
    notebook.metadata["processor"] = processor()  # where every character counts
    nbformat.write(notebook, folder / f"{CHANGED}.ipynb")
    shutil.copy(ROOT / "notebooks" / "conftest.py", folder)
    results = folder / "results.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(folder)]
    options = ["--nbval", "--nbval-current-env", f"--junitxml={results}", str(folder)]
    run = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout
    failed: dict[str, list[int]] = {path.stem: [] for path in folder.glob("*.ipynb")}
    for case in ElementTree.parse(results).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            name = case.get("classname", "").removesuffix(".ipynb")
            failed[name].append(int(re.search(r"\d+", case.get("name", "")).group()))
    return failed


def test_nbval_fails_at_a_changed_number(changed: tuple[NotebookNode, int], failing: dict[str, list[int]]) -> None:
    """One digit of one stored output is changed in a notebook: just that cell fails, everything before passes."""
    _, number = changed
    assert failing[CHANGED] == [number]


def test_on_another_processor_numbers_may_differ_by_little_and_nothing_else(failing: dict[str, list[int]]) -> None:
    assert failing["another"] == [number for number, agrees in enumerate(AGREES) if not agrees]
    assert failing["this"] == [number for number in range(len(AGREES)) if number not in (0, len(PRINTED))]

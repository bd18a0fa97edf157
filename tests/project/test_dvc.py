"""The DVC pipeline: complete dependencies, and a changed parameter reruns just the stages that depend on it."""

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.cli import main as dvc_main
from dvc.repo import Repo
from scmrepo.git import Git

ROOT = Path(__file__).resolve().parents[2]
PIPELINE: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES: dict[str, Any] = PIPELINE["stages"]
COLUMNS = 120  # of a terminal

# Stands in for a stage's notebook: every output depends on the parameters, so a change reaches what is downstream.
STAND_IN = """
for name in "$@"; do
    mkdir -p "$(dirname "$name")"
    { echo "$name"; cat params.yaml; } > "$name"
done
"""


def outputs(stage: dict[str, Any]) -> list[str]:
    """The paths that a stage writes."""
    entries = [*stage.get("outs", []), *stage.get("metrics", [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def repro(folder: Path) -> set[str]:
    """Bring the pipeline up to date; the names of the stages that ran."""
    with contextlib.chdir(folder), Repo() as repo:
        return {stage.name for stage in repo.reproduce()}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's stages and parameters with a stand-in for each notebook and each other file, run once."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "stand_in.sh").write_text(STAND_IN)
    shutil.copy(ROOT / "params.yaml", folder)
    written = {path for stage in STAGES.values() for path in outputs(stage)}
    stages = {}
    for name, stage in STAGES.items():
        stages[name] = {**stage, "cmd": f"sh stand_in.sh {' '.join(outputs(stage))}"}
        for dep in set(stage["deps"]) - written:
            file = folder / dep / "file" if (ROOT / dep).is_dir() else folder / dep
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(dep)
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    Repo.init(str(folder), no_scm=True).close()
    assert repro(folder) == set(STAGES)
    return folder


def change(text: str, key: str) -> str:
    """``params.yaml`` with another value at a dotted key."""
    params = yaml.safe_load(text)
    *sections, last = key.split(".")
    section = params
    for part in sections:
        section = section[part]
    value = section[last]
    section[last] = value[:-1] if isinstance(value, list) else value + 1
    return yaml.safe_dump(params)


ALL_BUT_TRAINING = {
    "reference_model",
    "calibration",
    "int2_baseline",
    "boundary_smoothing",
    "report",
    "smoothing_study",
}
COMMITTED_WHOLE = ("train", "peers", "cluster", "speed", "second_model")


REACHED = {
    "quant.smoothing_window": {"boundary_smoothing", "report"},
    "quant.num_time_groups": {"boundary_smoothing", "report"},
    "study.reduced.seeds": {"smoothing_study"},
    "peers.share": {"peers"},
    "targets.accuracy_gain": {"boundary_smoothing", "report", "smoothing_study"},
    "calibration.sequences": ALL_BUT_TRAINING - {"reference_model"},
    "overhead.rounds": {"boundary_smoothing", "report"},
    "reference.sudoku": {"reference_model", "int2_baseline", "boundary_smoothing", "report", "smoothing_study"},
    "evaluation.sequences": ALL_BUT_TRAINING - {"calibration"},
    "quant.timesteps": ALL_BUT_TRAINING | {"peers"},
    "train.steps": {"train", *ALL_BUT_TRAINING},
}


def reached(key: str) -> set[str]:
    """The stages that a parameter reaches, by what ``dvc.yaml`` says: its own, and those that read what they write."""
    found = {
        name
        for name, stage in STAGES.items()
        if any(f"{key}.".startswith(f"{param}.") or param.startswith(f"{key}.") for param in stage.get("params", []))
    }
    while True:
        written = {path for name in found for path in outputs(STAGES[name])}
        more = {name for name, stage in STAGES.items() if written & set(stage["deps"])} - found
        if not more:
            return found
        found |= more


@pytest.mark.parametrize(("key", "expected"), REACHED.items())
def test_a_parameter_reaches_the_stages_that_depend_on_it(key: str, expected: set[str]) -> None:
    assert reached(key) == expected


@pytest.mark.slow
def test_a_changed_parameter_reruns_the_stages_that_depend_on_it_and_then_nothing(pipeline: Path) -> None:
    key = "quant.timesteps"
    (pipeline / "params.yaml").write_text(change((pipeline / "params.yaml").read_text(), key))
    assert repro(pipeline) == REACHED[key]
    assert repro(pipeline) == set()


PUBLIC = {
    alias.name: node.module
    for node in ast.walk(ast.parse((ROOT / "thermo_lib" / "__init__.py").read_text()))
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}


def source_of(module: str) -> Path | None:
    """The file of one of the project's modules, None where there is no such module."""
    path = ROOT.joinpath(*module.split("."))
    found = (file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file())
    return next(found, None)


def project_imports(source: str) -> set[str]:
    """The project's modules that Python source imports, with their full names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "thermo_lib":
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                public = PUBLIC.get(alias.name) if node.module == "thermo_lib" else None
                found.add(public or (inside if source_of(inside) else node.module))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "thermo_lib":
            found.add(PUBLIC.get(node.attr, f"thermo_lib.{node.attr}"))
    return {module for module in found if source_of(module)}


def closure(modules: set[str]) -> set[str]:
    """The modules and all that they import."""
    seen: set[str] = set()
    while modules - seen:
        name = (modules - seen).pop()
        seen.add(name)
        modules |= project_imports(source_of(name).read_text())
    return seen


@pytest.mark.parametrize("name", sorted(STAGES.keys() - {"train"}))
def test_a_stage_depends_on_every_folder_that_its_notebook_uses(name: str) -> None:
    stage = STAGES[name]
    notebook = json.loads((ROOT / stage["deps"][0]).read_text())
    source = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    # params.py reads params.yaml, which DVC follows by itself; the other two hold no computation.
    aside = {"thermo_lib.studies.params", "thermo_lib.notebooks", "thermo_lib.extras"}
    used = {module.split(".")[1] for module in closure(project_imports(source) - aside)} - {"extras"}
    assert {f"thermo_lib/{folder}" for folder in used} == {
        dep for dep in stage["deps"] if dep.startswith("thermo_lib/") and (ROOT / dep).is_dir()
    }


@pytest.mark.parametrize("name", sorted(ALL_BUT_TRAINING))
def test_a_fresh_clone_runs_every_stage_but_training(name: str) -> None:
    """An output that git ignores is missing in a fresh clone, or times that differ from run to run are read."""
    missing = any(path.startswith("artifacts/") for path in outputs(STAGES[name]))
    assert missing or any(path.startswith("artifacts/timings/") for path in STAGES[name]["deps"])


@pytest.mark.parametrize("name", COMMITTED_WHOLE)
def test_what_a_fresh_clone_does_not_run_is_committed_whole(name: str) -> None:
    assert not any(path.startswith("artifacts/") for path in [*outputs(STAGES[name]), *STAGES[name]["deps"]])
    assert STAGES.keys() == ALL_BUT_TRAINING | set(COMMITTED_WHOLE)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's metrics and plots in a repository without stages."""
    folder = tmp_path_factory.mktemp("shown")
    metrics = [path for stage in STAGES.values() for entry in stage.get("metrics", []) for path in entry]
    for path in [*metrics, *PIPELINE["plots"]]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"metrics": metrics, "plots": PIPELINE["plots"]}))
    Repo.init(str(folder), no_scm=True).close()
    return folder


def test_metrics_fit_into_a_terminal(
    shown: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(shown)
    assert dvc_main(["metrics", "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "path_kl.gptq" in lines[0]
    assert max(map(len, lines)) <= COLUMNS


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's pipeline in a repository of two commits: another window of smoothing, and other scores."""
    folder = tmp_path_factory.mktemp("compared")
    for name in ("dvc.yaml", "dvc.lock", "params.yaml", "reports/scores.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    with contextlib.chdir(folder):
        git = Git.init(".")
        Repo.init(".").close()
        git.add([".dvc", "dvc.yaml", "dvc.lock", "params.yaml", "reports/scores.json"])
        git.commit("First")
        params, scores = Path("params.yaml"), Path("reports/scores.json")
        params.write_text(re.sub(r"(smoothing_window:) \d+", r"\1 1", params.read_text()))
        scores.write_text(scores.read_text().replace("0.3", "0.2"))
        git.add(["params.yaml", "reports/scores.json"])
        git.commit("Second")
        git.close()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["metrics", "diff", "HEAD~1"], ["exp", "show", "--only-changed", "-n", "2"]], ids=str
)
def test_comparisons_fit_into_a_terminal(compared: Path, words: list[str]) -> None:
    """In a process of its own, since the width of a terminal is asked once; what doesn't fit would end in dots."""
    environment = {**os.environ, "COLUMNS": str(COLUMNS)}
    command = [sys.executable, "-m", "dvc", *words, *(["--no-pager"] if words[0] == "exp" else [])]
    run = subprocess.run(command, cwd=compared, env=environment, capture_output=True, text=True, check=True)
    assert max(map(len, run.stdout.splitlines())) <= COLUMNS
    assert "accuracy.W2A4" in run.stdout
    assert ("quant.smoothing_window" in run.stdout) == (words[0] == "exp")
    assert "\u2026" not in run.stdout


@pytest.mark.slow
def test_plots_are_shown_without_a_network(shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shown)
    assert dvc_main(["plots", "show", "--out", "plots"]) == 0
    page = (shown / "plots" / "index.html").read_text()
    assert "<script" not in page
    pictures = re.findall(r'<img src="([^"]+)"', page)
    assert len(pictures) == len(PIPELINE["plots"]) > 0
    assert all((shown / "plots" / picture).is_file() for picture in pictures)
    assert "http" not in page


def test_what_metrics_and_plots_show_is_written_by_the_report() -> None:
    assert [name for name, stage in STAGES.items() if "metrics" in stage] == ["report"]
    assert set(PIPELINE["plots"]) < set(outputs(STAGES["report"]))
    assert "reports/metrics.json" in outputs(STAGES["report"])

"""``--json``: stdout is one JSON object with what the text says, or empty where the command fails."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_runs import Run

from thermo_lib import load_model
from thermo_lib.usage import tell

FAST = ("preset=fast", "group_size=16", "timesteps=4")
GENERATE = ("--prompt", "for i in", "--max-new-tokens", 6, "--timesteps", 3)


def told(run: Run, *words: object) -> dict[str, object]:
    """What a command that succeeds says with ``--json``."""
    status, out, err = run(*words, "--json")
    assert status == 0, err
    content = json.loads(out)
    assert isinstance(content, dict)
    assert out.count("\n") == 1
    return content


def test_info_has_numbers(run: Run, folder: Path) -> None:
    content = told(run, "info", folder)
    assert content["parameters"] == sum(p.numel() for p in load_model(str(folder)).model.parameters())
    assert content["bits_per_weight"] == 16
    assert content["files"] == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert (content["quantized"], content["is_shifted"]) == (None, True)


def test_generate_has_the_text_and_its_tokens(run: Run, folder: Path) -> None:
    _, out, _ = run("generate", "--model", folder, *GENERATE)
    content = told(run, "generate", "--model", folder, *GENERATE)
    assert content["text"] + "\n" == out
    assert len(content["tokens"]) == 6


def test_quantize_names_the_folder_and_its_size(run: Run, folder: Path) -> None:
    content = told(run, "quantize", "--model", folder, "--output", "small", *FAST)
    size = sum(path.stat().st_size for path in Path("small").glob("*.safetensors"))
    assert (content["output"], content["megabytes"]) == ("small", size / 1e6)


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_scores_are_what_output_has(run: Run, folder: Path, command: str) -> None:
    models = ("--model", folder) if command == "evaluate" else (folder, "preset=fast")
    content = told(run, command, *models, "--timesteps", 2, "--output", "scores.json")
    assert content == json.loads(Path("scores.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_benchmark_prints_its_report(run: Run, folder: Path) -> None:
    words = (
        "--smoothing-method",
        "linear",
        "--timesteps",
        3,
        "--quantizer",
        "rtn",
        "--group-size",
        16,
        "--output",
        "b",
    )
    content = told(run, "benchmark", "--model", folder, *words)
    assert content == json.loads(Path("b/report.json").read_text(encoding="utf-8"))


def test_a_number_that_json_has_no_word_for_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    tell(SimpleNamespace(json=True), "text", {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": 2}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.0, None], "c": {"d": 2}}


def test_an_error_leaves_stdout_empty(run: Run) -> None:
    status, out, err = run("info", "/no/such/folder", "--json")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1

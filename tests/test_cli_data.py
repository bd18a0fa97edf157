"""The commands on a user's own text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from thermo_lib import ThermoConfig, calibrate, quantize
from thermo_lib.diffusion.states import text_batches
from thermo_lib.models.lm import load_model
from thermo_lib.pipeline.storage import load_quantized

TEXTS = [f"def f{number}(x):\n    return x + {number}\n" for number in range(40)]
FIELDS = {"weights.group_size": 16, "timesteps": 4}
SIZE = ("--sequences", 4, "--length", 12)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    """The logits of what is calibrated on the file."""
    lm = load_model(str(folder))
    states = calibrate(lm, text_batches(lm, TEXTS, sequences=4, length=12), timesteps=4, progress=False)
    return quantize(lm, ThermoConfig(**FIELDS), states).model(torch.arange(12)[None]).logits


@pytest.mark.parametrize("layerwise", [False, True])
def test_quantize_calibrates_on_a_file(
    run: Any, folder: Path, lines: Path, monkeypatch: Any, expected: torch.Tensor, layerwise: bool
) -> None:
    from thermo_lib import commands

    monkeypatch.setattr(commands, "calibrate", calibrate)
    words = ("--layerwise", "all") if layerwise else ()
    settings = [f"{name}={value}" for name, value in FIELDS.items()]
    status, _, err = run(
        "quantize", "--model", folder, "--output", "q", "--calibration", lines, *SIZE, *words, *settings
    )
    assert (status, err.count("error")) == (0, 0)
    assert torch.equal(load_quantized("q").model(torch.arange(12)[None]).logits, expected)


def test_evaluate_scores_a_file(run: Any, folder: Path, lines: Path, monkeypatch: Any) -> None:
    from thermo_lib import commands
    from thermo_lib.evaluation.scores import build_suite

    monkeypatch.setattr(commands, "build_suite", build_suite)
    words = ("--data", lines, *SIZE, "--trajectories", 2, "--timesteps", 4, "--output", "scores.json")
    status, out, _ = run("evaluate", "--model", folder, *words)
    assert status == 0
    found = json.loads(Path("scores.json").read_text())
    assert 0 < found["accuracy"] < 1
    assert found["sudoku_solved"] is None
    assert "path KL" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--calibration", "missing.txt"), "data: found no file missing.txt"),
        (("--calibration", "short.txt"), "sequences: found 128 of 512 tokens, the texts hold 0"),
        (
            ("--calibration", "short.txt", "preset=fast"),
            "calibration: found 'short.txt' with weights.method='least_squares'",
        ),
        (("--sequences", 3), "sequences, length: found a size without --calibration"),
    ],
)
def test_what_has_no_meaning_is_refused(run: Any, folder: Path, words: tuple[Any, ...], message: str) -> None:
    Path("short.txt").write_text("def f(x):\n")
    status, _, err = run("quantize", "--model", folder, "--output", "q", *words)
    assert status == 2
    assert message in err
    assert not Path("q").exists()

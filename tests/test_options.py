"""A wrong option is one line before anything heavy is imported."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from thermo_lib import __main__ as command_line
from thermo_lib import commands, options
from thermo_lib.pipeline.parts import SmoothingMethod
from thermo_lib.studies.grid import MixName, Recipe

GENERATE = ("generate", "--prompt", "a")


def one_line(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    """What a wrong command says on stderr, where no command may run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "run", lambda _: pytest.fail("a command ran"))
        assert command_line.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.isascii()
    return err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*GENERATE, "--seed", "-1"), "seed: found -1, allowed is at least 0"),
        ((*GENERATE, "--seed", str(2**63)), f"seed: found {2**63}, allowed is at most {2**63 - 1}"),
        ((*GENERATE, "--timesteps", "65537"), "timesteps: found 65537, allowed is at most 65536"),
        ((*GENERATE, "--max-new-tokens", "0"), "max-new-tokens: found 0, allowed is at least 1"),
        ((*GENERATE, "--suppress-tokens", "3", "-3"), "suppress-tokens: found -3, allowed is at least 0"),
        ((*GENERATE, "--model", ""), "model: found '', allowed is a text that isn't empty"),
        ((*GENERATE, "--device", ""), "device: found '', allowed is a text that isn't empty"),
        (("generate", "--prompt", "a\udcff"), r"prompt: found 'a\udcff', allowed is text in UTF-8"),
        (("info", "a\0b"), r"model: found 'a\x00b', allowed is text in UTF-8 without a zero byte"),
        (("evaluate", "--sequences", "1"), "sequences: found 1, allowed is at least 2"),
        (("compare", "a", "b", "--trajectories", "1"), "trajectories: found 1, allowed is at least 2"),
        (("quantize", "--output", "q", "--sequences", "0"), "sequences: found 0, allowed is at least 1"),
        (("evaluate", "--data", "absent.txt"), "data: found no file absent.txt"),
        (("evaluate", "--data", "two\nlines"), r"data: found no file 'two\nlines'"),
        (("evaluate", "--output", "a" * 5000), "output: found 5000 characters, allowed are at most 4096"),
        (("evaluate", "--output", "."), "output: found '.', a folder; allowed is a new file"),
        (("evaluate", "--output", "file/x.json"), "file', which isn't a folder; allowed is a path"),
        (("benchmark", "--output", "file"), "file', which isn't a folder; allowed is a path"),
        (("study", "--output", "."), "output: found '.', a folder; allowed is a new file"),
        (("point", "--seeds", "0", "-1"), "seeds: found -1, allowed is at least 0"),
        (("point", "method=foo"), "method: found 'foo', allowed are linear, cubic, sigmoid, spline, null"),
        (("point", "recipe=best"), "recipe: found 'best', allowed are best starts"),
        (("point", "weights.group_size=010"), "weights.group_size: found '010', allowed are a number as in JSON"),
        (("quantize", "--output", "q", "preset=bset"), "did you mean 'best'?"),
        (("speed", "--rounds", "1"), "rounds: found 1, allowed is at least 2"),
        (("speed", "--tokens", "1", "0"), "tokens: found 0, allowed is at least 1"),
    ],
    ids=lambda words: ascii(words[-1][:20]),
)
def test_a_wrong_value_is_one_line_before_any_work(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    assert message in one_line(words, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "words",
    [
        *((*GENERATE, "--seed", text) for text in ("1_0", "010", "0x1", "１", " 1", "+1", "1.0", "", "9" * 5000)),
        *((*GENERATE, "--temperature", text) for text in ("nan", "inf", "1e400", "1_0.0", "１", "", "1e", "0x1p3")),
        *(("quantize", "--output", "q", "--layerwise", text) for text in ("0", "-1", "４", "9" * 5000, "")),
    ],
    ids=lambda words: ascii(words[-1][:9]),
)
def test_what_is_no_number_ends_with_the_usage(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command_line.main(words)
    assert error.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert ": found '" in last
    assert len(last) < 250


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert "which can't be written in" in one_line(("study", "--output", str(tmp_path / "x")), capsys)


def test_an_error_of_several_lines_is_printed_as_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise OSError("first\nsecond")

    monkeypatch.setattr(commands, "run", fail)
    assert command_line.main(["info"]) == 2
    assert capsys.readouterr().err == "error: first second\n"


@pytest.mark.parametrize("word", ["method=foo", "weights.group_size=010", "colour=1"])
def test_a_wrong_word_is_refused_without_torch(word: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "thermo_lib", "point", word]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    lines = [line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")]
    heavy = {"torch", "transformers", "numpy", "scipy", "pydantic", "tokenizers", "safetensors"}
    assert {"thermo_lib.options", "thermo_lib.pipeline.words"} < set(lines)
    assert {name for name in lines if name.partition(".")[0] in heavy} == set()


def test_names_that_are_written_again_to_import_nothing_are_those_of_the_library() -> None:
    point = options._WORDS["point"]
    assert get_args(SmoothingMethod) == options.SMOOTHING
    assert point["recipe"] == (*get_args(Recipe), None)
    assert [name for name in point if name.startswith("mix.")] == list(get_args(MixName))

"""Help fits a screen, its examples run, and words that nobody knows are one line that says what is allowed."""

import importlib.metadata
from pathlib import Path

import pytest
from small_runs import Run

from thermo_lib import __main__ as command_line
from thermo_lib.options import SMOOTHING
from thermo_lib.pipeline.presets import PRESETS
from thermo_lib.pipeline.words import read_words
from thermo_lib.usage import EXAMPLES, example_words

COMMANDS = tuple(EXAMPLES)


def exits(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Status, stdout and stderr of words that end in the parser."""
    with pytest.raises(SystemExit) as error:
        command_line.main(words)
    return error.value.code, *capsys.readouterr()


def test_alone_it_shows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = [line.split()[0] for line in lines if line.startswith("    ") and len(line.split()) > 1]
    assert first == list(COMMANDS)
    assert len(lines) <= 40


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_ends_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = exits([command, "--help"], capsys)
    assert status == 0
    lines = out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert lines[-3:] == ["examples:", *(f"  {line}" for line in EXAMPLES[command])]


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_every_example_is_read(line: str) -> None:
    words = example_words(line)
    arguments = command_line._parser().parse_args(words)
    assert arguments.command == words[0]
    if arguments.command in ("quantize", "benchmark", "point"):
        assert len(read_words(words[0], arguments.fields, {"preset": PRESETS, "method": SMOOTHING})) == sum(
            "=" in word for word in words
        )


@pytest.mark.slow
def test_a_row_of_examples_runs(run: Run, folder: Path) -> None:
    """On a small model, in the place of the reference."""
    Path("texts.txt").write_text("def f(x):\n    return x\n\n" * 200, encoding="utf-8")
    model = ("--model", str(folder), "--timesteps", "4")
    quantize = (*example_words(EXAMPLES["quantize"][0]), "group_size=16", "timesteps=4", *model[:2])
    evaluate = [str(folder) if word == "reference" else word for word in example_words(EXAMPLES["evaluate"][1])]
    compare = [str(folder) if word == "reference" else word for word in example_words(EXAMPLES["compare"][0])]
    for words in (
        quantize,
        example_words(EXAMPLES["info"][1]),
        (*example_words(EXAMPLES["generate"][0]), *model[:2]),
        (*example_words(EXAMPLES["evaluate"][0]), *model),
        (*evaluate, *model[2:]),
        (*compare, *model[2:]),
        example_words(EXAMPLES["compare"][1]),
    ):
        status, out, err = run(*words)
        assert status == 0, err
        assert out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "COMMAND: found 'train', allowed are quantize, info"),
        (["quantise"], "did you mean 'quantize'?"),
        (["benchmark", "--bits", "two"], "bits: found 'two', allowed is a whole number"),
        (["benchmark", "--smoothing-method", "cubik"], "smoothing-method: found 'cubik', allowed are linear, cubic"),
        (["benchmark", "--all-methods", "--smoothing-method", "linear"], "smoothing-method: not allowed with"),
        (["--vershion"], "thermo: found '--vershion', allowed are --help, --version; did you mean '--version'?"),
        (["tidy"], "notebook is missing (see "),
        (["compare"], "A, B are missing (see "),
        (["generate", "--prompt", "a", "b"], "generate: found 'b', allowed are --alg-temp"),
        (["evaluate", "--modle", "x"], "evaluate: found '--modle', allowed are --attention-block"),
        (["evaluate", "--modle", "x"], "did you mean '--model'?"),
        (["compare", "a"], "B is missing (see "),
        (["info", "a", "b\nc"], "info: found 'b\\nc', allowed are"),
    ],
)
def test_an_unknown_word_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = exits(words, capsys)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_settings_may_stand_before_and_after_options() -> None:
    read = command_line._parser().parse_args(["quantize", "preset=fast", "--output", "q", "seed=1", "--json", "a=2"])
    assert read.fields == ["preset=fast", "seed=1", "a=2"]


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_checkout_that_is_not_installed_has_commands_too(
    is_installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not is_installed:
        monkeypatch.setattr(importlib.metadata.Distribution, "discover", lambda **_: iter(()))
    expected = importlib.metadata.version("thermo_lib") if is_installed else "of a checkout, not installed"
    assert exits(["--version"], capsys) == (0, f"thermo_lib {expected}\n", "")

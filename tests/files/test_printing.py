"""A program whose output nobody takes ends as others do: without a word or in one line, and never in a traceback."""

import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from thermo_lib.files.printing import to_its_end

LONG = "x" * 100_000  # more than a buffer or a pipe takes


def stream(path: int | str, *, buffered: bool = True, encoding: str = "utf-8") -> io.TextIOWrapper:
    """What Python makes of an output, also with ``python -u``."""
    raw = io.FileIO(path, "w")
    return io.TextIOWrapper(io.BufferedWriter(raw) if buffered else raw, encoding=encoding, write_through=not buffered)  # type: ignore[type-var]


def unread() -> int:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a program with an output of its own; gives its status and what it says on stderr."""

    def run(main: Callable[[], int | None], output: io.TextIOWrapper) -> tuple[int, str]:
        monkeypatch.setattr(sys, "stdout", output)
        status = to_its_end(main)()
        output.flush()  # as Python does at its end, where an error would be one more line
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("text", ["short", LONG])
class TestLost:
    def test_where_nobody_reads_the_pipe_nothing_is_said(
        self, ended: Callable[..., tuple[int, str]], buffered: bool, text: str
    ) -> None:
        assert ended(lambda: print(text), stream(unread(), buffered=buffered)) == (141, "")

    def test_nor_where_a_parser_ends_the_program(
        self, ended: Callable[..., tuple[int, str]], buffered: bool, text: str
    ) -> None:
        def main() -> None:
            with suppress(OSError):
                print(text)  # as argparse prints help, whatever comes of it
            raise SystemExit(0)

        if buffered and text == "short":
            assert ended(main, stream(unread(), buffered=buffered)) == (141, "")

    def test_a_full_disk_is_one_line(self, ended: Callable[..., tuple[int, str]], buffered: bool, text: str) -> None:
        def main() -> int:
            try:
                print(text)
            except OSError as error:  # as the command line does
                print(f"error: {error}", file=sys.stderr)
                return 2
            return 0

        status, said = ended(main, stream("/dev/full", buffered=buffered))
        assert (status, len(said.splitlines())) == (2, 1)
        assert "No space left" in said


def test_letters_that_an_encoding_lacks_are_escapes(ended: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    assert ended(lambda: print("é\ud800 = 1"), stream(str(tmp_path / "out"), encoding="ascii")) == (0, "")
    assert (tmp_path / "out").read_text() == "\\xe9\\ud800 = 1\n"


def test_another_broken_pipe_is_an_error_of_its_own(ended: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """As of a process that was asked to work."""
    (tmp_path / "out").touch()
    with pytest.raises(BrokenPipeError):
        ended(lambda: os.write(unread(), b"work"), stream(str(tmp_path / "out")))


def test_ctrl_c_is_one_line(ended: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    main = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
    assert ended(main, stream(str(tmp_path / "out"))) == (130, "error: interrupted\n")


def test_an_output_that_is_closed_before_the_start_is_no_hindrance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert to_its_end(lambda: print(sys.stdout.encoding))() == 0

"""What a program prints, where nobody takes it: a pipe that is closed, a full disk, an encoding without the letters."""

import os
import select
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TextIO

Arguments = ParamSpec("Arguments")
_INTERRUPTED, _UNREAD = 130, 141  # as shells have it for Ctrl-C and for a pipe that nobody reads any more


def to_its_end(main: Callable[Arguments, int | None]) -> Callable[Arguments, int]:
    """Let a program end as others do where its output isn't taken, or where the user ends it.

    Letters that the output's encoding doesn't have are printed as escapes. Where nobody reads a pipe any more, nothing
    is said; a full disk, or Ctrl-C, is one line on stderr.
    """

    @wraps(main)
    def run(*arguments: Arguments.args, **more: Arguments.kwargs) -> int:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed before the start
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (open until the end)
            elif getattr(sys, name).errors in ("strict", "surrogateescape"):
                getattr(sys, name).reconfigure(errors="backslashreplace")
        try:
            status = main(*arguments, **more) or 0
        except SystemExit as error:
            if lost := _flushed(0):
                return lost
            raise error
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            status = _INTERRUPTED
        except OSError as error:
            if not is_unread(error):
                raise
            _close()
            return _UNREAD
        return _flushed(status)

    return run


def _flushed(status: int) -> int:
    """A program's status once its output is printed, or another one where it can't be."""
    try:
        sys.stdout.flush()
    except OSError as error:
        is_silent = is_unread(error)
        _close()
        if is_silent:
            return _UNREAD
        if not status:  # or an error has been said
            print(f"error: output: could not print ({error})", file=sys.stderr)
        return status or 2
    return status


def is_unread(error: OSError) -> bool:
    """Whether an error says that nobody reads this program's output any more."""
    return isinstance(error, BrokenPipeError) and any(_is_unread(stream) for stream in (sys.stdout, sys.stderr))


def _is_unread(stream: TextIO) -> bool:
    poll = select.poll()
    try:
        poll.register(stream, 0)
    except (OSError, ValueError):  # no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _close() -> None:
    """Let what can't be printed go nowhere: Python would try once more at its end, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if _is_unread(stream) or stream is sys.stdout:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)

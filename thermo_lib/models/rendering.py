"""Chat templates in a process with limits: a template is a program that came with somebody's files.

Jinja's sandbox keeps it from the machine, but not from running for ever or taking all memory. So this file is also a
program: it reads templates and their variables from a socket, one after another, and ends with the socket, or with the
first template that doesn't end in time. It imports nothing of the library, and so it starts in a tenth of a second.
"""

import atexit
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SECONDS = 10.0  # published templates take milliseconds
_CHARACTERS = 2**24  # longer than any model's context
_BYTES = 2**30  # of the process
_START_SECONDS = 60  # of the process, on a machine that has much else to do
_DONE, _FAILED = b"+", b"-"


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text that a template makes.

    Args:
        source: the Jinja template.
        variables: what it may name, as JSON has it.

    Raises:
        ValueError: a template that is damaged, refuses its variables, does what the sandbox forbids, or goes beyond a
            limit of time, memory or text; or variables that aren't JSON.
        OSError: the process doesn't start.
    """
    try:
        request = json.dumps([_SECONDS, _CHARACTERS, source, variables]).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"chat template: found variables that aren't JSON ({error}), allowed are texts") from error
    with _State.lock:
        process = _State.process = _State.process or _Process()
        try:
            kind, text = process.ask(request)
        except BaseException:  # Ctrl-C too: a later request must not get this answer
            _forget()
            raise
    if kind == _DONE:
        return text
    raise ValueError(f"chat template: {text}")


class _Process:
    """The process that renders, from the parent's side."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join(filter(None, sys.path))
            self.child = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        try:
            self.socket.settimeout(_START_SECONDS)
            if self.socket.recv(1) != _DONE:
                raise OSError(f"chat template: the process that renders it ended with {self.child.wait()}")
        except BaseException:
            self.stop()
            raise
        self.socket.settimeout(None)  # the child has a clock

    def ask(self, request: bytes) -> tuple[bytes, str]:
        """Whether a request was done, and the text or why not."""
        answer = None
        with suppress(ConnectionError):
            _send(self.socket, request)
            answer = _receive(self.socket)
        if answer is not None:
            return answer[:1], answer[1:].decode("utf-8", "surrogatepass")
        status = self.child.wait()
        reason = f"found an end of the process that renders it (status {status}), allowed is a text"
        if status == -signal.SIGALRM:
            reason = f"found no end within {_SECONDS:g} s, allowed is one by then"
        raise ValueError(f"chat template: {reason}")

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.socket.close()
        self.child.kill()
        self.child.wait()


class _State:
    """The process that this one has, if any; one thread asks at a time."""

    process: _Process | None = None
    lock = threading.Lock()


def _forget() -> None:
    """End the process; the next request starts another one."""
    process, _State.process = _State.process, None
    if process is not None:
        process.stop()


def _start_anew() -> None:
    """In a fork: the process is the parent's, and its lock may be held by a thread that isn't here."""
    _State.process, _State.lock = None, threading.Lock()


atexit.register(_forget)
os.register_at_fork(after_in_child=_start_anew)


def _send(to: socket.socket, content: bytes) -> None:
    to.sendall(len(content).to_bytes(8, "little") + content)


def _receive(of: socket.socket) -> bytes | None:
    """What was sent; None where the other side has ended."""
    with of.makefile("rb", buffering=0) as file:
        parts: list[bytes] = []
        for left in (8, None):
            left = int.from_bytes(b"".join(parts), "little") if left is None else left
            parts = []
            while left:
                part = file.read(min(left, 2**20))
                if not part:
                    return None
                parts.append(part)
                left -= len(part)
    return b"".join(parts)


class _Generation(Extension):
    """The block ``{% generation %}``, which says what an assistant wrote; it is written as any other text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """What is in the block, with variables of its own, as ``transformers`` has it."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=4)
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    environment.filters["tojson"] = _to_json
    return environment.from_string(source)


def _answer(most: int, source: str, variables: dict[str, Any]) -> bytes:
    """What a template makes, or why it makes nothing."""
    try:
        pieces, size = [], 0
        for piece in _compiled(source).generate(variables):
            pieces.append(piece)
            size += len(piece)
            if size > most:
                return _FAILED + f"found more than {most} characters, allowed are {most}".encode()
        return _DONE + "".join(pieces).encode("utf-8", "surrogatepass")
    except MemoryError:
        return _FAILED + f"found a need of more than {_BYTES // 2**20} MiB, allowed is less".encode()
    except Exception as error:  # a template is a program, which may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return _FAILED + f"{reason:.500}".encode("utf-8", "surrogatepass")


def _serve() -> None:
    """Answer what comes through the socket that is this process's input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that is the parent's
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process
    for limit, most in ((resource.RLIMIT_AS, _BYTES), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    with socket.socket(fileno=sys.stdin.fileno()) as parent:
        parent.sendall(_DONE)
        while (request := _receive(parent)) is not None:
            seconds, most, source, variables = json.loads(request)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            answer = _answer(most, source, variables)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(parent, answer)


if __name__ == "__main__":
    _serve()

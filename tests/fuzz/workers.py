"""Cases in processes of their own, with a limit of memory and time: what is neither success nor a one-line error."""

import faulthandler
import linecache
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

PACKAGE = Path(__file__).resolve().parents[2] / "thermo_lib"
MEMORY = 2**30  # bytes above what a process has at its start
_LONGEST = 1500  # characters of a message


class Target(Protocol):
    """One kind of input: a valid one, what changes it, and what reads it."""

    def change(self, rngs: list[random.Random]) -> str:
        """Write an input with one change a generator; says in words what was changed."""

    def check(self) -> None:
        """Read the input; what is read must be right."""


@dataclass(frozen=True)
class Case:
    """An input, decided by its kind and its seed; ``edits`` are the numbers of the changes that are made."""

    kind: str
    seed: str
    edits: tuple[int, ...]

    @classmethod
    def drawn(cls, kind: str, seed: str) -> "Case":
        """A case with one change as a rule, and up to three."""
        count = random.Random(f"{kind} {seed}").choice((1, 1, 1, 1, 1, 2, 2, 3))
        return cls(kind, seed, tuple(range(count)))

    def parts(self) -> list["Case"]:
        """The same with a single one of its changes."""
        return [Case(self.kind, self.seed, (edit,)) for edit in self.edits] if len(self.edits) > 1 else []


@dataclass(frozen=True)
class Finding:
    """What went wrong.

    Attributes:
        case: the input.
        place: what is alike for findings of one cause.
        changes: the input in words.
        message: what was raised.
    """

    case: Case
    place: str
    changes: str
    message: str


def problem(error: BaseException) -> str | None:
    """Where an error comes from if it is no one-line ValueError or OSError of the library, else None."""
    if isinstance(error, SystemExit) and error.code == 2:  # of argparse, which has printed the usage
        return None
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    place = f"{Path(ours[-1].filename).relative_to(PACKAGE)}:{ours[-1].lineno}" if ours else "outside the library"
    if isinstance(error, ValueError | OSError):
        last = frames[-1]
        is_raised = linecache.getline(last.filename, last.lineno).strip().startswith("raise")
        is_ours = is_raised and Path(last.filename).is_relative_to(PACKAGE) and not isinstance(error, UnicodeError)
        of_the_disk = isinstance(error, OSError) and error.errno is not None
        text = str(error)
        if len(text.splitlines()) == 1 and len(text) <= _LONGEST and (is_ours or of_the_disk):
            return None
        if is_ours:
            return (
                f"{place}: a message of {len(text.splitlines())} lines, {'long' if len(text) > _LONGEST else 'short'}"
            )
    return f"{place}: {type(error).__name__}"


def _serve(pipe: Connection, start: Callable[[Path], Mapping[str, Target]], source: Path, memory: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    nowhere = os.open(os.devnull, os.O_RDWR)
    faulthandler.disable()  # a crash is told by the parent
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115 (for as long as the process)
    warnings.simplefilter("ignore")
    try:
        shutil.copytree(source, folder / "valid")
        os.chdir(folder)
        targets = start(folder / "valid")
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pipe.send(None)
        while True:
            case = pipe.recv()
            changes = ""
            try:
                target = targets[case.kind]
                changes = target.change([random.Random(f"{case.kind} {case.seed} {edit}") for edit in case.edits])
                pipe.send(changes)
                target.check()
                found = None
            except BaseException as error:  # of whatever kind: it is judged
                place, text = problem(error), f"{type(error).__name__}: {error!s:.300}"
                if isinstance(error, MemoryError) or "can't allocate memory" in text:
                    place = f"{place}: more than {memory / 2**20:.0f} MiB"
                found = place and (place, ascii(text)[1:-1])
            pipe.send((found,))
    except (EOFError, OSError, KeyboardInterrupt):
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Worker:
    def __init__(self, *arguments: Any):
        context = multiprocessing.get_context("fork")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, *arguments), daemon=True)
        self.process.start()
        other.close()
        self.pipe.recv()

    def run(self, case: Case, seconds: float) -> Finding | None:
        """The finding of a case, None for none; after a hang or a crash the process is gone."""
        changes = "(it was not written)"
        try:
            self.pipe.send(case)
            while wait([self.pipe], seconds):
                answer = self.pipe.recv()
                if isinstance(answer, tuple):
                    (found,) = answer
                    return found and Finding(case, found[0], changes, found[1])
                changes = answer
        except (EOFError, OSError):
            self.process.join()
            name = signal.Signals(-self.process.exitcode).name if self.process.exitcode < 0 else "an exit"
            return Finding(case, f"crash: {name}", changes, f"the process ended by {name}")
        self.close()
        return Finding(case, f"hang: {seconds:g} s", changes, "no end")

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive()

    def close(self) -> None:
        with suppress(OSError):
            self.pipe.close()
        self.process.kill()
        self.process.join()


class Fuzzer:
    """Runs cases one after the other in a process that is replaced when it is gone, and after some thousand cases.

    Args:
        start: what the targets are, from a copy of the folder.
        source: folder with the valid inputs.
        seconds: that a case may take.
        memory: bytes that a process may take beside what it has at its start.
    """

    def __init__(
        self, start: Callable[[Path], Mapping[str, Target]], source: Path, seconds: float, memory: int = MEMORY
    ):
        self._arguments, self._seconds = (start, source, memory), seconds
        self._worker: _Worker | None = None
        self._left = 0

    def __enter__(self) -> "Fuzzer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.close()

    def run(self, case: Case) -> Finding | None:
        """The finding of a case, None for none."""
        if self._worker is None or not self._worker.is_alive or not self._left:
            self.__exit__()
            self._worker, self._left = _Worker(*self._arguments), 2000
        self._left -= 1
        return self._worker.run(case, self._seconds)

    def findings(self, cases: Iterable[Case]) -> Iterator[Finding]:
        """The findings of cases, each with a single change if that is enough."""
        for case in cases:
            found = self.run(case)
            if found is not None:
                smaller = (self.run(part) for part in case.parts())
                yield next((each for each in smaller if each is not None and each.place == found.place), found)

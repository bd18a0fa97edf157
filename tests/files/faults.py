"""Every file operation of every command that writes fails once, and nothing is lost.

``make faults`` runs ``python tests/files/faults.py``, with names of commands for some of them; ``--some 40 --seed 0``
draws as many. Each command runs in a copy of an earlier output, in a process of its own, with ``faults.c`` before
the C library. Its n-th operation (to open for writing, write, rename, swap, sync, make, remove, change rights) finds no
space, has an I/O error, or is the last one. The law: each output is the earlier or the new one, whole; an error is
one line; and the same command succeeds afterwards, with the new output and nothing beside it.
"""

import argparse
import ctypes
import errno
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {"no space": errno.ENOSPC, "I/O error": errno.EIO, "killed": -1}
_HERE = Path(__file__).resolve().parent
_LIBRARY = "FAULTS_LIBRARY"  # the environment's variable that names what is preloaded


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        words: of the command line, in the folder where it runs.
        outputs: what it writes there.
        earlier: makes the earlier outputs there.
    """

    words: Sequence[str]
    outputs: Sequence[str]
    earlier: Callable[[], object]


def run(words: Sequence[str]) -> int:
    """A command in this process; its exit status."""
    from thermo_lib.__main__ import main

    return main(words)


def _commands() -> dict[str, Command]:
    """All that write; their models are tiny, and scores are numbers that need no model."""
    fast = ("quantize", "--model", "../model", "--output", "out", "preset=fast", "weights.group_size=16")
    states = (*fast[:5], "weights.method=gptq", "weights.group_size=16", "timesteps=4", "--calibration", "../text.txt")
    states += ("--sequences", "2", "--length", "16")
    point = ("point", "quantizer=rtn", "timesteps=4", "--output", "points.json", "--seeds")
    evaluate = ("evaluate", "--model", "../model", "--timesteps", "4", "--output", "row.json")
    benchmark = ("benchmark", "--model", "../model", "--output", "out")
    speed = ("speed", "--output", "speed.json")
    check = ("gpu-check", "--device", "cpu", "--output", "gpu.json")

    def points() -> None:
        run([*point, "1"])

    def study() -> None:
        run(["study", "--output", "points.json"])
        _drop_rows(Path("points.json"))

    def notebook() -> None:
        import nbformat

        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), "a.ipynb")

    coarse = [*fast, "weights.bits=4"]
    return {
        "quantize": Command(fast, ["out"], lambda: run(coarse)),
        "quantize in memory": Command(states, ["out"], lambda: run(coarse)),
        "quantize layerwise": Command([*states, "--layerwise", "all"], ["out"], lambda: run(coarse)),
        "point": Command([*point, "1", "2", "3"], ["points.json"], points),
        "study": Command(["study", "--output", "points.json"], ["points.json"], study),
        "evaluate": Command(evaluate, ["row.json"], lambda: run([*evaluate, "--length", "8"])),
        "benchmark": Command(benchmark, ["out"], lambda: run([*benchmark, "--bits", "4"])),
        "speed": Command(speed, ["speed.json"], lambda: run([*speed, "--rounds", "9"])),
        "gpu-check": Command(check, ["gpu.json"], lambda: run([*check, "--quick"])),
        "tidy": Command(["tidy", "a.ipynb"], ["a.ipynb"], notebook),
    }


def _drop_rows(path: Path) -> None:
    """Leave half of the points, so that the rest is measured."""
    from thermo_lib.files.text import read_json, write_json

    content = read_json(path)
    write_json(path, content | {"rows": content["rows"][::2]})


def _prepare(place: Path) -> None:
    """Write a tiny model and a text, and put what takes no time in the place of measurements."""
    import nbformat  # noqa: F401  # which every process of `tidy` would import otherwise
    import torch
    import transformers

    from thermo_lib import commands
    from thermo_lib.data.corpus import train_tokenizer
    from thermo_lib.data.puzzles import MASK
    from thermo_lib.models.lm import DiffusionLM, build_reference, save_model
    from thermo_lib.studies import grid, smoothing

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    text = "def f(x):\n    return x + 1\n" * 20
    (place / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer(iter([text]), 280)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    mask = tokenizer.token_to_id(MASK)
    lm = DiffusionLM(build_reference(tokenizer.get_vocab_size(), mask, sizes, 0).eval(), tokenizer, mask, "tiny")
    save_model(lm, place / "model")

    def score(_: Any, measured: grid.Point, __: Any) -> grid.PointRow:
        number = [0.1 * measured.calibration_seed]
        return grid.PointRow(measured, number, number, number, number, None, None, 2.0)

    def row(name: str, *_: Any) -> dict[str, Any]:
        return {"name": name, "accuracy": 0.5}

    def report(arguments: argparse.Namespace, *_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        full = {"name": "a", "accuracy": 0.1 * (arguments.bits or 2)}
        about = {"versions": {}, "hardware": {"processor": "", "logical_cores": 1, "threads": 1}}
        content = {"model": "m", "full_precision": full, "configurations": [], "targets": [], **about}
        return content, {"bits": arguments.bits or 2}

    def check(device: Any, extent: Any, output: Path, *, found: dict[str, Any], progress: bool) -> dict[str, Any]:
        found |= {"card": str(extent), "failed": {}, "versions": {}} | {part: [] for part in commands.gpu.PARTS}
        for _ in range(2):  # after each part
            commands.gpu.write_json(output, found)
        return found

    grid.score = score
    grid._Models.build = grid._Models.suite = lambda *_: None
    smoothing.slices = commands.slices = lambda _: {"all": [grid.point(seed, quantizer="rtn") for seed in range(4)]}
    commands.summary = lambda found, *_: [{"name": str(len(found.rows))}]
    commands.load_model = _first_of(commands.load_model, lm)
    commands.build_suite = lambda *_, length=0, **__: length
    commands.evaluate = lambda _, suite, **__: suite
    commands.summarize = lambda name, _, suite: row(f"{name} {suite}")
    commands.kernel_speeds = lambda rounds, **_: [{"tokens": rounds}]
    commands._benchmark = report
    commands.report.report_text = lambda content: str(content["full_precision"])
    commands.gpu.gpu_check = check
    commands.reproducible = lambda: None


def _first_of(load: Callable[..., Any], lm: Any) -> Callable[..., Any]:
    return lambda name, **more: lm if name == "reference" else load(name, **more)


def contents(outputs: Sequence[str]) -> dict[str, bytes]:
    """All files of the outputs here."""
    found = {}
    for output in map(Path, outputs):
        paths = [output] if output.is_file() else sorted(output.rglob("*"))
        found |= {str(path): path.read_bytes() for path in paths if path.is_file()}
    return found


class Faults:
    """Runs commands with faults.

    Args:
        place: an empty folder.
    """

    def __init__(self, place: Path):
        self.place = place
        self.shim = ctypes.CDLL(os.environ[_LIBRARY])
        _prepare(place)
        self.commands = _commands()
        self.counts: dict[str, int] = {}
        self.earlier: dict[str, dict[str, bytes]] = {}
        self.new: dict[str, dict[str, bytes]] = {}
        self.operations, self.outcomes, self.broken = Counter[str](), Counter[str](), list[str]()

    def learn(self, name: str) -> int:
        """How many operations a command has; its outputs before and after are kept."""
        command, home = self.commands[name], self.place / f"before {name}"
        home.mkdir()
        self._child(home, lambda: (command.earlier(), 0)[1])
        self._renew(name)
        work = self.place / "work"
        os.chdir(work)
        self.earlier[name] = contents(command.outputs)
        status, said, count, _ = self._child(work, lambda: run(command.words), 0, 0)
        self.new[name] = contents(command.outputs)
        if status or self.new[name] == self.earlier[name] or not self.earlier[name]:
            raise RuntimeError(f"{name}: found status {status} without a fault: {said}")
        self.counts[name] = count
        return count

    def one(self, name: str, number: int, kind: str) -> None:
        """Let one operation of a command fail, and check the law."""
        command, work = self.commands[name], self.place / "work"
        self._renew(name)
        os.chdir(work)
        status, said, _, failed = self._child(work, lambda: run(command.words), number, KINDS[kind])
        self.operations[failed or "killed"] += 1
        after, where = contents(command.outputs), f"{name}, operation {number} ({failed}), {kind}"
        errors = [line for line in said.splitlines() if "error" in line.lower() or "Traceback" in line]
        if kind != "killed" and (status not in (0, 2) or len(errors) != (status == 2)):
            self.broken.append(f"{where}: status {status}: {said[-600:]}")
        if name == "benchmark" and any(path.startswith("out/.") for path in after):
            from thermo_lib.files.whole import sweep_together  # as the next run of the command begins

            sweep_together(work / "out")
            after = contents(command.outputs)
        hidden = {path for path in after if path.endswith("/run.json") or "/." in path}
        state = {path: content for path, content in after.items() if path not in hidden}
        outcome = "earlier" if state == self.earlier[name] else "new" if state == self.new[name] else "between"
        if outcome == "between" and self._is_between(name, state):
            outcome = "some points more"
        if outcome == "between":
            self.broken.append(f"{where}: neither the earlier output nor the new one: {sorted(state)}")
        self.outcomes[f"{kind}: {outcome}"] += 1
        status, said, *_ = self._child(work, lambda: run(command.words))
        found = contents(command.outputs)
        if status or found != self.new[name]:
            self.broken.append(f"{where}: afterwards status {status}, {sorted(found)}: {said[-600:]}")
        locks = {f".{output}.lock" for output in (*command.outputs, "report.json")} if failed == "unlink" else set()
        left = [path.name for path in work.iterdir() if path.name not in {*command.outputs, *locks}]
        if left:
            self.broken.append(f"{where}: left {left}")

    def _is_between(self, name: str, state: dict[str, bytes]) -> bool:
        """Whether a file has some of the new points, as it has after each."""
        from thermo_lib.files.text import as_json

        if name not in ("point", "study"):
            return False
        try:
            files = [found["points.json"] for found in (self.earlier[name], state, self.new[name])]
            texts = [{as_json(row) for row in json.loads(file)["rows"]} for file in files]
        except (ValueError, KeyError):
            return False
        return texts[0] <= texts[1] <= texts[2]

    def _renew(self, name: str) -> None:
        os.chdir(self.place)
        shutil.rmtree(self.place / "work", ignore_errors=True)
        shutil.copytree(self.place / f"before {name}", self.place / "work")

    def _child(self, work: Path, call: Callable[[], int], number: int = 0, error: int = 0) -> tuple[int, str, int, str]:
        """Run a call in a process of its own: its status, what it said, its operations, and which one failed."""
        said, counted = self.place / "said", self.place / "counted"
        counted.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            status = 99
            try:
                os.chdir(work)
                handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                self.shim.faults_failed.restype = ctypes.c_char_p
                self.shim.faults_count.restype = ctypes.c_long
                self.shim.faults_arm(os.fsencode(work), ctypes.c_long(number), error)
                status = call()
                sys.stdout.flush()
                found = f"{self.shim.faults_count()} {self.shim.faults_failed().decode()}"
                self.shim.faults_arm(b"", ctypes.c_long(0), 0)
                counted.write_text(found)
            except BaseException as problem:
                print(f"Traceback of {type(problem).__name__}: {problem}", file=sys.stderr)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        count, _, failed = counted.read_text().partition(" ") if counted.is_file() else ("0", "", "")
        return os.waitstatus_to_exitcode(ended), said.read_text(errors="replace"), int(count), failed

    def report(self) -> str:
        """What was done and what came of it."""
        lines = [f"{name}: {count} operations" for name, count in self.counts.items()]
        lines += [f"failed: {', '.join(f'{name} {count}' for name, count in sorted(self.operations.items()))}"]
        lines += [f"{outcome}: {count}" for outcome, count in sorted(self.outcomes.items())]
        return "\n".join([*lines, f"{len(self.broken)} of {self.outcomes.total()} broke the law", *self.broken])


def _drawn(faults: Faults, names: Sequence[str], some: int | None, seed: int) -> Iterator[tuple[str, int, str]]:
    every = [(name, n, kind) for name in names for n in range(1, faults.learn(name) + 1) for kind in KINDS]
    yield from every if some is None else random.Random(seed).sample(every, min(some, len(every)))


def main() -> int:
    """Run the faults that were asked for; 0 if the law holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", help="all by default")
    parser.add_argument("--some", type=int, help="so many faults, drawn, instead of all")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    arguments = parser.parse_args()
    if _LIBRARY not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            library = str(Path(folder, "faults.so"))
            source = str(_HERE / "faults.c")
            subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
            environment = os.environ | {_LIBRARY: library, "LD_PRELOAD": library, "OMP_NUM_THREADS": "1"}
            return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(os.path.realpath(folder)))
        gc.freeze()  # or each of the processes would look through all that was imported
        for fault in _drawn(faults, arguments.commands or list(faults.commands), arguments.some, arguments.seed):
            faults.one(*fault)
        os.chdir("/")
        print(faults.report())
    return 1 if faults.broken else 0


if __name__ == "__main__":
    sys.exit(main())

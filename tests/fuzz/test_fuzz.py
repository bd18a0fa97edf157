"""The fuzzer finds what it is for, says how to see it again, and finds nothing in a few hundred cases."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mutations import as_json, change_bytes, change_json, change_words
from run import cases, collect
from targets import KINDS, build, targets
from workers import Case, Fuzzer

from thermo_lib.quant.calls import CurrentStep


def _forever() -> None:
    while True:
        pass


class _Lines(int):
    """A number that makes a message of two lines."""

    def __sub__(self, _: object) -> str:
        return "2\n3"


FAULTS: dict[str, Callable[[], object]] = {
    "right": lambda: None,
    "refused": lambda: CurrentStep().set(3, 2),  # a one-line ValueError of the library
    "no file": lambda: Path("absent").read_bytes(),
    "usage": lambda: exit(2),
    "traceback": lambda: {}["x"],
    "foreign": lambda: int("x"),
    "lines": lambda: CurrentStep().set(3, _Lines(2)),
    "crash": os.abort,
    "end": lambda: os._exit(3),
    "memory": lambda: bytearray(2**29),
    "hang": _forever,
}


class Planted:
    """A target that fails in the way of a case's first number."""

    def __init__(self, name: str):
        self.name = name

    def change(self, rngs: list[random.Random]) -> str:
        """See ``workers.Target``."""
        return f"{self.name} {len(rngs)}"

    def check(self) -> None:
        """See ``workers.Target``."""
        FAULTS[self.name]()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    """Runs planted faults, with little memory and time."""
    source = tmp_path_factory.mktemp("nothing")
    with Fuzzer(lambda _: {name: Planted(name) for name in FAULTS}, source, 0.5, memory=2**28) as fuzzer:
        yield fuzzer


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("right", None),
        ("refused", None),
        ("no file", None),
        ("usage", None),
        ("traceback", "outside the library: KeyError"),
        ("foreign", "outside the library: ValueError"),
        ("lines", "quant/calls.py:60: a message of 2 lines, short"),
        ("crash", "crash: SIGABRT"),
        ("end", "crash: an exit"),
        ("memory", "outside the library: MemoryError: more than 256 MiB"),
        ("hang", "hang: 0.5 s"),
    ],
)
def test_what_is_no_one_line_error_is_found(name: str, place: str | None, planted: Fuzzer) -> None:
    found = planted.run(Case(name, "0", (0,)))
    assert (None if found is None else (found.place, found.changes)) == (place and (place, f"{name} 1"))
    assert planted.run(Case("right", "0", (0,))) is None


def test_a_finding_is_told_with_the_fewest_changes(planted: Fuzzer) -> None:
    many = Case("traceback", "0", (0, 1, 2))
    found, counts = collect(planted, [many, Case("right", "0", (0, 1)), many])
    assert [(finding.case.edits, finding.changes) for finding in found.values()] == [((0,), "traceback 1")]
    assert counts == {"traceback outside the library: KeyError": 2}


def test_a_seed_gives_the_same_cases() -> None:
    some = cases(KINDS, 200, 3)
    assert some == cases(KINDS, 200, 3) != cases(KINDS, 200, 4)
    assert {case.kind for case in some} == set(KINDS)
    content = {"a": [1, {"b": "x"}], "c": None}
    for seed in range(200):
        one, two = (change_json(content, random.Random(seed)) for _ in range(2))
        assert repr(one) == repr(two)
        assert change_bytes(b"some bytes", random.Random(seed)) == change_bytes(b"some bytes", random.Random(seed))
        assert as_json(one[0], random.Random(seed)) == as_json(two[0], random.Random(seed))
        assert change_words(["a=1"], random.Random(seed), ["b"]) == change_words(["a=1"], random.Random(seed), ["b"])
    assert content == {"a": [1, {"b": "x"}], "c": None}


TYPED = ("params", "tasks", "words", "fields", "reports")  # what people type; `make fuzz` reads model folders too


def test_a_few_hundred_damaged_inputs_end_in_one_line(tmp_path: Path) -> None:
    build(tmp_path)
    with Fuzzer(targets, tmp_path, 20) as fuzzer:
        found, _ = collect(fuzzer, [Case(kind, "valid", ()) for kind in KINDS])
        assert found == {}, "what isn't changed is read"
        found, _ = collect(fuzzer, cases(TYPED, 300, 0))
        assert found == {}

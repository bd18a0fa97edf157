"""``params.yaml`` is read at its dotted keys, and what is wrong in it is named with line, key and what is allowed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from thermo_lib.studies.grid import Inputs
from thermo_lib.studies.params import PARAMS_FILE, default, grid_inputs, read_params
from thermo_lib.studies.schema import problems

CONTENT = yaml.safe_load(PARAMS_FILE.read_text(encoding="utf-8"))


def with_value(key: str, *value: Any) -> dict[str, Any]:
    """What the file says, with another value at a dotted key, or without that key."""
    content = copy.deepcopy(CONTENT)
    *sections, last = key.split(".")
    section = content
    for part in sections:
        section = section[part]
    if value:
        (section[last],) = value
    else:
        del section[last]
    return content


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """Writes the file with another value at a dotted key."""

    def write(key: str, value: Any) -> Path:
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump(with_value(key, value), sort_keys=False), encoding="utf-8")
        return path

    return write


def message(path: Path) -> str:
    """What is said of a wrong file, on one line."""
    with pytest.raises(ValueError, match=r"\.yaml") as error:
        read_params(path)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value).removeprefix(str(path))


def test_every_value_of_the_file_is_found_at_its_dotted_key() -> None:
    assert read_params() == CONTENT
    assert repr(read_params()) == repr(CONTENT), "numbers are of the same types"
    assert {"seed", "data", "train", "quant", "calibration", "evaluation", "targets"} <= CONTENT.keys()
    for section, values in CONTENT.items():
        assert default(section) == values
        for key, value in values.items() if isinstance(values, dict) else ():
            assert default(f"{section}.{key}") == value


def test_another_file_gives_its_own_values(changed: Callable[..., Path]) -> None:
    path = changed("quant.group_size", 77)
    assert default("quant.group_size", path) == 77
    assert default("quant.group_size") != 77


def test_the_inputs_of_a_grid_are_those_of_the_file(changed: Callable[..., Path]) -> None:
    calibration = {"source": "forward", "sequences": 5, "puzzles": 3}
    assert grid_inputs(changed("calibration", calibration)) == Inputs(
        sequences=CONTENT["evaluation"]["sequences"],
        trajectories=CONTENT["evaluation"]["trajectories"],
        source="forward",
        code_sequences=5,
        puzzles=3,
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", -1, "seed: found -1, allowed is greater than or equal to 0"),
        ("seed", True, "seed: found True, allowed is a whole number"),
        ("seed", 0.0, "seed: found 0.0, allowed is a whole number"),
        ("seed", "0", "seed: found '0', allowed is a whole number"),
        ("seed", 10**400, "seed: found 1000"),
        ("data", None, "data: found None, allowed is a mapping"),
        ("data.task_length", 2147483648, "data.task_length: found 2147483648, allowed is less than or equal to 65536"),
        ("data.packages", {"sympy": 1.14}, "data.packages.sympy: found 1.14, allowed is a text"),
        ("train.hidden_size", 250, "train.hidden_size: found 250, allowed is a multiple of twice num_attention_heads"),
        ("train.cycles", 3, "train.steps: found 11000, allowed is a multiple of cycles (3)"),
        ("train.cycles", 0, "train.cycles: found 0, allowed is greater than or equal to 1"),
        ("train.muon_lr", float("inf"), "train.muon_lr: found inf, allowed is a number"),
        ("quant.bit_width", 2.0, "quant.bit_width: found 2.0, allowed is a whole number"),
        ("quant.bit_width", 3, "quant.bit_width: found 3, allowed is 2, 4 or 8"),
        ("quant.num_time_groups", 17, "quant.num_time_groups: found 17, allowed is at most timesteps (16)"),
        ("quant.colour", 1, "quant.colour: found it, allowed are bit_width, group_size, timesteps, num_time_groups"),
        ("quant.groupsize", 1, "did you mean 'group_size'?"),
        ("quants", {}, "quants: found it, allowed are seed, data, train"),
        ("evaluation.sampler", "best", "evaluation.sampler: found 'best', allowed is 'origin', 'maskgit_plus'"),
        ("study.reduced.methods", True, "study.reduced.methods: found True, allowed is a list"),
        ("study.reduced.methods", ["linear", 3], "study.reduced.methods.1: found 3, allowed is 'linear', 'cubic'"),
        ("study.full.timesteps", [{"steps": 3}], "study.full.timesteps.0.seeds: found none, it must be there"),
        ("study.full.timesteps", [{"steps": 3, "seeds": [0], "x": 1}], "x: found it, allowed are steps, seeds"),
        ("study.full.transitions", [{"seed": 3}], "transitions.0.seed: found 'seed', allowed is settings of Thermo"),
        ("study.full.transitions", [{"method": []}], "transitions.0.method: found [], allowed is a number, true"),
        ("overhead.rounds", 1, "overhead.rounds: found 1, allowed is greater than or equal to 2"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(key: str, value: Any, expected: str) -> None:
    [(_, found)] = problems(with_value(key, value))
    assert expected in found
    assert len(found.splitlines()) == 1


def test_the_line_is_named_and_how_much_more_is_wrong(changed: Callable[..., Path]) -> None:
    path = changed("train", CONTENT["train"] | {"cycles": 0, "stepss": 1})
    lines = path.read_text(encoding="utf-8").splitlines()
    number = next(number for number, line in enumerate(lines, 1) if "stepss" in line)
    assert message(path).startswith(f", line {number}: train.stepss: found it, allowed are hidden_size")
    assert message(path).endswith("did you mean 'steps'? (1 more)")


def keys_of(content: Any, before: str = "") -> list[str]:
    """The dotted keys of all mappings, those of settings and packages aside, which may be left out."""
    if not isinstance(content, dict) or any("." in key for key in content):
        return []
    inside = [before + key for key in content]
    return inside + [each for key, value in content.items() for each in keys_of(value, f"{before}{key}.")]


def test_no_key_may_be_missing() -> None:
    keys = [key for key in keys_of(CONTENT) if not key.startswith("data.packages.")]
    assert {"seed", "peers.share", "study.reduced.markov.weights", "study.full.objectives.output"} < set(keys)
    for key in keys:
        assert [words for _, words in problems(with_value(key))] == [f"{key}: found none, it must be there"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 0\ndata: &a {x: 1}\n", ", line 2: found an anchor or alias, allowed is none"),
        ("seed: *a\n", ", line 1: found an anchor or alias, allowed is none"),
        ("a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]\n", ", line 1: found an anchor or alias, allowed is none"),
        ("seed: !!timestamp 2001-01-01\n", ", line 1: found the tag 'tag:yaml.org,2002:timestamp', allowed is none"),
        ("seed: !!python/object/apply:os.getcwd []\n", ", line 1: found the tag 'tag:yaml.org,2002:python/object"),
        ("seed: 0\nseed: 1\n", ", line 2: seed: found it twice, allowed is once"),
        ("quant:\n  timesteps: 1\n  timesteps: 1\n", ", line 3: quant.timesteps: found it twice, allowed is once"),
        ("? [seed]\n: 1\n", ", line 1: found a key that isn't a word, allowed are words"),
        ("seed: [\n", ", line 2: found invalid YAML ("),
        ("seed: \x07", ": found invalid YAML ("),
        ("seed: 1\n---\nseed: 2\n", ", line 2: found invalid YAML ("),
        ("seed: " + "\n" + "- " * 9000, ": found invalid YAML (nested too deep)"),
        ("#" * 200_000, ": found 200000 characters, allowed are at most 65536"),
        ("1: 2\n", ", line 1: 1: found it, allowed are seed, data"),
    ],
    ids=lambda text: ascii(text[:14]),
)
def test_what_is_no_plain_yaml_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    assert expected in message(path)


@pytest.mark.parametrize("text", [".nan", "010", "1_000", "1:30", "~", "'1'"])
def test_only_numbers_of_json_are_numbers(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(PARAMS_FILE.read_text(encoding="utf-8").replace("seed: 0\n", f"seed: {text}\n", 1), "utf-8")
    assert message(path) == f", line 3: seed: found '{text.strip(chr(39))}', allowed is a whole number"


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("quant.nothing", ["'quant.nothing'", "'nothing'", "group_size"]),
        ("nothing", ["'nothing'", "quant"]),
        ("seed.deeper", ["'seed.deeper'", "'deeper'", "no keys"]),
    ],
)
def test_a_missing_key_is_named_with_the_keys_that_are_there(key: str, named: list[str]) -> None:
    with pytest.raises(ValueError, match="is missing") as error:
        default(key)
    assert [word for word in named if word not in str(error.value)] == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no file at .*absent\.yaml"):
        default("seed", tmp_path / "absent.yaml")


@pytest.mark.parametrize(("text", "found"), [("[1, 2]", "list"), ("just text", "str"), ("", "NoneType")])
def test_a_file_without_sections_is_refused(text: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "flat.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"flat\.yaml: found {found}, expected a mapping"):
        default("seed", path)

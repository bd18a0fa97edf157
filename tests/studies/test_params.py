"""``params.yaml`` is read at its dotted keys, and a wrong file or key is named."""

from pathlib import Path

import pytest
import yaml

from thermo_lib.studies.grid import Inputs
from thermo_lib.studies.params import default, grid_inputs


def test_every_value_of_the_file_is_found_at_its_dotted_key() -> None:
    content = yaml.safe_load((Path(__file__).resolve().parents[2] / "params.yaml").read_text(encoding="utf-8"))
    assert {"seed", "data", "train", "quant", "calibration", "evaluation", "targets"} <= content.keys()
    for section, values in content.items():
        assert default(section) == values
        for key, value in values.items() if isinstance(values, dict) else ():
            assert default(f"{section}.{key}") == value


def test_another_file_gives_its_own_values(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("quant: {group_size: 77}\n", encoding="utf-8")
    assert default("quant.group_size", path) == 77
    assert default("quant.group_size") != 77


def test_the_inputs_of_a_grid_are_those_of_the_file(tmp_path: Path) -> None:
    content = {
        "calibration": {"source": "forward", "sequences": 5, "puzzles": 3},
        "evaluation": {"sequences": 7, "trajectories": 4, "sudoku": 9},
    }
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    expected = Inputs(sequences=7, trajectories=4, source="forward", code_sequences=5, puzzles=3)
    assert grid_inputs(path) == expected


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

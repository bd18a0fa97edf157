"""Defaults come from ``params.yaml`` and nowhere else, and a wrong file or key is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from thermo_lib import params
from thermo_lib.params import default


def test_every_value_of_the_file_is_found_at_its_dotted_key() -> None:
    content = yaml.safe_load((Path(__file__).resolve().parents[2] / "params.yaml").read_text(encoding="utf-8"))
    assert {"seed", "data", "train", "quant", "calibration", "evaluation", "targets"} <= content.keys()
    for section, values in content.items():
        assert default(section) == values
        for key, value in values.items() if isinstance(values, dict) else ():
            assert default(f"{section}.{key}") == value


def test_a_changed_file_changes_the_default(override: Callable[[dict[str, Any]], None]) -> None:
    override({"quant.group_size": 77})
    assert default("quant.group_size") == 77


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


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(params, "PARAMS_FILE", tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match=r"found no file at .*absent\.yaml"):
        default("seed")


@pytest.mark.parametrize(("text", "found"), [("[1, 2]", "list"), ("just text", "str"), ("", "NoneType")])
def test_a_file_without_sections_is_refused(
    text: str, found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "flat.yaml"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(params, "PARAMS_FILE", path)
    with pytest.raises(ValueError, match=rf"flat\.yaml: found {found}, expected a mapping"):
        default("seed")

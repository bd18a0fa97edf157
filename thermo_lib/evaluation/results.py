"""Files of results as rows that can be compared: those of ``evaluate``, ``point``, ``study`` and ``benchmark``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thermo_lib.evaluation.comparison import MEASURES
from thermo_lib.evaluation.page import CONFIGURATION_FIELDS, TARGET_FIELDS
from thermo_lib.files.reading import field_of, read_object, read_report, shown
from thermo_lib.files.snapshots import digest
from thermo_lib.pipeline.about import words
from thermo_lib.pipeline.config import ThermoConfig

_NUMBERS = {measure.key for measure in MEASURES}


@dataclass(frozen=True)
class Results:
    """What a file of results holds.

    Attributes:
        kind: ``scores`` (of ``evaluate``), ``points`` (of ``point`` and ``study``) or ``report`` (of ``benchmark``).
        rows: name of a configuration to its scores, with values to pair where the file has them, see ``differences``.
        verdicts: name of a target to its verdict; of a report only.
    """

    kind: str
    rows: dict[str, dict[str, Any]]
    verdicts: dict[str, str]


def read_results(path: str | Path) -> Results:
    """Read a file of results.

    Raises:
        ValueError: no such file, not one of these kinds, or a field that is missing or of another kind.
    """
    path, content = Path(path), read_object(path)
    if "configurations" in content:
        content = read_report(path, configurations=CONFIGURATION_FIELDS, targets=TARGET_FIELDS)
        every = [field_of(content, "full_precision", dict, shown(path)), *content["configurations"]]
        rows = {field_of(row, "name", str, shown(path)): _checked(row, path) for row in every}
        keys = ("name", "precision", "smoothing_method")
        targets = content["targets"]
        verdicts = {" ".join(str(row[key]) for key in keys if row.get(key)): row["verdict"] for row in targets}
        return Results("report", rows, verdicts)
    if "rows" in content and "made_of" in content:
        lists = {"accuracy_per_sequence": list, "path_kl_per_sequence": list}
        content = read_report(path, rows={"point": dict, **lists, "bits_per_weight": float})
        rows = {}
        for number, row in enumerate(content["rows"]):
            where = f"{shown(path)}: rows: row {number}"
            config = field_of(row["point"], "config", dict, where)
            inputs = digest(content["made_of"], field_of(config, "timesteps", int, where))
            rows[_name(row["point"])] = _point(row, inputs, where)
        return Results("points", rows, {})
    if "accuracy" in content:
        return Results("scores", {field_of(content, "name", str, shown(path)): _checked(content, path)}, {})
    found = ", ".join(sorted(content))[:100] or "nothing"
    allowed = "a file that evaluate, point, study or benchmark wrote"
    raise ValueError(f"{shown(path)}: found an object with {found!a}, allowed is {allowed}")


def _checked(row: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A row whose numbers, intervals and values are finite numbers."""
    where = shown(path)
    for key in _NUMBERS & row.keys():
        if row[key] is not None:
            _finite(field_of(row, key, float, where), key, where)
        if row.get(f"{key}_ci") is not None:
            ends = field_of(row, f"{key}_ci", list, where)
            if len(ends) != 2:
                raise ValueError(f"{where}: {key}_ci: found {len(ends)} numbers, allowed are 2")
            for end in ends:
                _finite(end, f"{key}_ci", where)
    values = field_of(row, "sequences", dict, where, default={})
    if values:
        field_of(values, "inputs", str, where)
        for key in _NUMBERS & values.keys():
            for value in field_of(values, key, list, where):
                _finite(value, key, where)
    return dict(row)


def _finite(value: Any, name: str, where: str) -> None:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{where}: {name}: found {value!r:.80}, allowed is a number")


def _point(row: Mapping[str, Any], inputs: str, where: str) -> dict[str, Any]:
    """The scores of a point, with its values to pair."""
    values = {"accuracy": row["accuracy_per_sequence"], "path_kl": row["path_kl_per_sequence"]}
    for key, numbers in values.items():
        if not numbers:
            raise ValueError(f"{where}: {key}_per_sequence: found no number, allowed is at least one")
        for value in numbers:
            _finite(value, f"{key}_per_sequence", where)
    means = {key: sum(numbers) / len(numbers) for key, numbers in values.items()}
    return {**means, "bits_per_weight": row["bits_per_weight"], "sequences": {"inputs": inputs, **values}}


def _name(point: Mapping[str, Any]) -> str:
    """A point's settings in one line, as the command ``point`` takes them."""
    more = {"calibration_seed": point.get("calibration_seed"), "recipe": point.get("recipe")}
    more |= {f"mix.{key}": value for key, value in (point.get("mix") or {}).items()}
    texts = [f"{key}={value}" for key, value in more.items() if value is not None]
    return " ".join([words(ThermoConfig(**point["config"])), *texts])

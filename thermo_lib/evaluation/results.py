"""Files of results as rows that can be compared: those of ``evaluate``, ``point``, ``study`` and ``benchmark``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thermo_lib.evaluation.schema import Evaluated, Points, Report, ReportRows
from thermo_lib.files.reading import MOST_BYTES, read_json, read_object, shown
from thermo_lib.files.schema import check
from thermo_lib.files.snapshots import digest
from thermo_lib.pipeline.about import words
from thermo_lib.pipeline.config import ThermoConfig


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


def read_report_json(path: str | Path) -> dict[str, Any]:
    """Read a ``report.json``.

    Raises:
        ValueError: what ``read_json`` raises, or a field that the page can't be made of; names it.
    """
    content = read_json(path)
    check(Report, content, shown(path))
    return content


def read_results(path: str | Path) -> Results:
    """Read a file of results.

    Raises:
        ValueError: no such file, not one of these kinds, or a field that is missing or of another kind; names it.
    """
    content, where = read_object(path, MOST_BYTES), shown(path)
    if "configurations" in content:
        check(ReportRows, content, where)
        rows = {row["name"]: row for row in (content["full_precision"], *content["configurations"])}
        keys = ("name", "precision", "smoothing_method")
        targets = content["targets"]
        verdicts = {" ".join(row[key] for key in keys if row.get(key)): row["verdict"] for row in targets}
        return Results("report", rows, verdicts)
    if "rows" in content and "made_of" in content:
        check(Points, content, where)
        rows = {}
        for number, row in enumerate(content["rows"]):
            inputs = digest(content["made_of"], row["point"]["config"]["timesteps"])
            try:
                rows[_name(row["point"])] = _point(row, inputs)
            except ValueError as error:
                raise ValueError(f"{where}: rows.{number}.point.config: {error}") from error
        return Results("points", rows, {})
    if "accuracy" in content:
        check(Evaluated, content, where)
        return Results("scores", {content["name"]: content}, {})
    found = ", ".join(sorted(content))[:100] or "nothing"
    allowed = "a file that evaluate, point, study or benchmark wrote"
    raise ValueError(f"{where}: found an object with {found!a}, allowed is {allowed}")


def _point(row: Mapping[str, Any], inputs: str) -> dict[str, Any]:
    """The scores of a point, with its values to pair."""
    values = {"accuracy": row["accuracy_per_sequence"], "path_kl": row["path_kl_per_sequence"]}
    means = {key: sum(numbers) / len(numbers) for key, numbers in values.items()}
    return {**means, "bits_per_weight": row["bits_per_weight"], "sequences": {"inputs": inputs, **values}}


def _name(point: Mapping[str, Any]) -> str:
    """A point's settings in one line, as the command ``point`` takes them."""
    more = {"calibration_seed": point.get("calibration_seed"), "recipe": point.get("recipe")}
    more |= {f"mix.{key}": value for key, value in (point.get("mix") or {}).items()}
    texts = [f"{key}={value}" for key, value in more.items() if value is not None]
    return " ".join([words(ThermoConfig(**point["config"])), *texts])

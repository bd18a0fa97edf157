"""``params.yaml``: what the pipeline varies. Only notebooks and the commands of the study read it."""

from functools import cache
from pathlib import Path
from typing import Any

from thermo_lib.extras import needs
from thermo_lib.studies.grid import Inputs

PARAMS_FILE = Path(__file__).resolve().parents[2] / "params.yaml"


@cache
def read_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """The sections of the file.

    Raises:
        ValueError: no such file, or something else than a mapping of sections.
    """
    if not path.is_file():
        raise ValueError(f"params file: found no file at {path}; the pipeline and the study run in a checkout")
    content = needs("yaml").safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"params file {path}: found {type(content).__name__}, expected a mapping of sections")
    return content


def default(key: str, path: Path = PARAMS_FILE) -> Any:
    """The value at a dotted key of ``params.yaml``, e.g. ``default("quant.group_size")``.

    Raises:
        ValueError: the key is not in the file; the message names it and the keys that are.
    """
    value: Any = read_params(path)
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            allowed = ", ".join(map(str, value)) if isinstance(value, dict) else "no keys"
            raise ValueError(f"params.yaml: {key!r} is missing at {part!r}; found {allowed}")
        value = value[part]
    return value


def grid_inputs(path: Path = PARAMS_FILE) -> Inputs:
    """What the points of the study are calibrated and evaluated on."""
    evaluation, calibration = default("evaluation", path), default("calibration", path)
    return Inputs(
        sequences=evaluation["sequences"],
        trajectories=evaluation["trajectories"],
        source=calibration["source"],
        code_sequences=calibration["sequences"],
        puzzles=calibration["puzzles"],
    )

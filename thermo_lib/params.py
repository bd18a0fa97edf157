"""The defaults of the project, read from ``params.yaml``, the only place where they are written.

DVC passes the same file to papermill, so a notebook, the command line and a Python session
start from the same values.
"""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

PARAMS_FILE = Path(__file__).resolve().parent.parent / "params.yaml"


@cache
def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"params file: found no file at {path}; run from a checkout of the project")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"params file {path}: found {type(content).__name__}, expected a mapping of sections")
    return content


def default(key: str) -> Any:
    """The value at a dotted key of ``params.yaml``, e.g. ``default("quant.group_size")``.

    Raises:
        ValueError: the key is not in the file; the message names it and the keys that are.
    """
    value: Any = _read(PARAMS_FILE)
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            allowed = ", ".join(map(str, value)) if isinstance(value, dict) else "no keys"
            raise ValueError(f"params.yaml: {key!r} is missing at {part!r}; found {allowed}")
        value = value[part]
    return value

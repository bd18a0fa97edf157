"""Text and JSON files, written whole or not at all; ``reading`` reads them."""

import json
import os
from pathlib import Path
from typing import Any

from thermo_lib.files.reading import read_json as read_json  # for the notebooks, which read and write JSON from here


def write_text(path: str | Path, text: str) -> None:
    """Write a file so that an earlier one stays whole until the new one is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON with sorted keys; NaN and infinity are refused.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    write_text(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")

"""Text and JSON files, written whole or not at all; ``reading`` reads them."""

import json
from pathlib import Path
from typing import Any

from thermo_lib.files.reading import read_json as read_json  # for the notebooks, which read and write JSON from here
from thermo_lib.files.whole import replacing


def write_text(path: str | Path, text: str) -> None:
    """Write a file so that an earlier one stays whole until the new one is complete.

    Raises:
        OSError: no space left, no right to write, and the like; an earlier file is as it was.
    """
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON with sorted keys; NaN and infinity are refused.

    Raises:
        ValueError: a number is NaN or infinite.
        OSError: what ``write_text`` raises.
    """
    write_text(path, as_json(content))


def as_json(content: Any) -> str:
    """The text that ``write_json`` writes; raises ValueError where a number is NaN or infinite."""
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"

"""``NAME=VALUE`` words: settings of ``ThermoConfig`` as the command line takes them.

A value is read as JSON reads it: a number, ``true``, ``false``, ``null``, a list of whole numbers, or else a plain
word. Nothing heavy is imported, so that a wrong word is an error at once.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from thermo_lib.pipeline.flat import FLAT, PARTS, nearest

# Of ``ThermoConfig``; ``flat`` has the names of single settings.
WHOLE_FIELDS = ("weights", "activations", "time_groups", "training", "embedding_bits", "timesteps", "seed")
WHOLE = "-?(0|[1-9][0-9]{0,18})"  # a pattern, of what JSON takes for one
NUMBER = re.compile(rf"{WHOLE}(\.[0-9]{{1,30}})?([eE][+-]?[0-9]{{1,3}})?")
_LIST = re.compile(rf"\[ *({WHOLE}( *, *{WHOLE})*)? *\]")
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]*( [A-Za-z0-9_-]+)*")
_SETTING = re.compile(rf"({'|'.join(PARTS)})\.[a-z_]+")


def read_value(name: str, text: str) -> Any:
    """A value as JSON reads it, or a plain word.

    Args:
        name: of the field, for errors.
        text: what stands after ``=``.

    Raises:
        ValueError: anything else, such as ``010``, ``1_000``, ``0x10``, ``.5``, ``~`` or YAML.
    """
    if _LIST.fullmatch(text) and len(text) < 10_000:
        return json.loads(text)
    if NUMBER.fullmatch(text):
        value = json.loads(text)
        if math.isfinite(value):
            return value
    elif _WORD.fullmatch(text):
        return {"true": True, "false": False, "null": None}.get(text, text)
    allowed = "allowed are a number as in JSON, true, false, null, a list of whole numbers, and a plain word"
    raise ValueError(f"{name}: found {text!r:.80}, {allowed}")


def _said(values: Sequence[str | None] | range, text: str) -> str:
    """What is allowed, in words, and the one nearest to what was found."""
    if isinstance(values, range):
        return f"whole numbers in {values[0]}..{values[-1]}"
    allowed = ", ".join("null" if each is None else each for each in values)
    return allowed + nearest(text, [each for each in values if each])


def read_words(command: str, words: Sequence[str], more: Mapping[str, Sequence[str | None] | range]) -> dict[str, Any]:
    """Names and values of ``NAME=VALUE`` words.

    Args:
        command: for errors.
        words: as they were typed.
        more: names that the command has beside the settings of ``ThermoConfig``, and their values.

    Raises:
        ValueError: no ``NAME=VALUE``, an unknown name, one that is there twice, or a value of another kind.
    """
    fields: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not (name in more or name in WHOLE_FIELDS or name in FLAT or _SETTING.fullmatch(name)):
            parts = ", ".join(f"{part}.SETTING" for part in PARTS)
            allowed = ", ".join([*more, "embedding_bits", "timesteps", "seed", parts, *FLAT])
            raise ValueError(f"{command}: found {word!r:.80}, expected NAME=VALUE, NAME one of {allowed}")
        if name in fields:
            raise ValueError(f"{name}: found it twice, allowed is once")
        fields[name] = value = read_value(name, text)
        if name in more and (isinstance(value, bool | float) or value not in more[name]):
            raise ValueError(f"{name}: found {text!r:.80}, allowed are {_said(more[name], text)}")
    return fields

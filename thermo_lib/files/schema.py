"""What a file's content must be, said by models of ``pydantic``, and what is wrong with it in one line."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from thermo_lib.files.reading import brief

_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a number",
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
Where = tuple[str | int, ...]


class Section(BaseModel):
    """A mapping with known keys and values of exactly the kinds that are said; others are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Row(BaseModel):
    """A mapping of which some keys are used, with values of exactly the kinds that are said; others may be there."""

    model_config = ConfigDict(extra="ignore", strict=True)


def errors(model: type[BaseModel], content: Any) -> list[dict[str, Any]]:
    """What is wrong with a content, as ``pydantic`` tells it: what is there and unknown, and then the rest."""
    try:
        model.model_validate(content)
    except ValidationError as error:
        found = [dict(each) for each in error.errors(include_url=False)]
        return sorted(found, key=lambda each: each["type"] != "extra_forbidden")  # what is missing may be misspelt
    return []


def check(model: type[BaseModel], content: Any, where: str) -> None:
    """Refuse a content.

    Args:
        model: what it must be.
        content: what JSON says.
        where: the file, for errors.

    Raises:
        ValueError: the first field that is wrong, what was found and what is allowed, and how many more there are.
    """
    if found := errors(model, content):
        more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
        raise ValueError(f"{where}: {in_words(found[0])}{more}")


def place_of(error: Mapping[str, Any]) -> Where:
    """Where in a content the wrong value is."""
    return tuple(part for part in error["loc"] if part != "[key]")


def in_words(error: Mapping[str, Any]) -> str:
    """An error of ``errors`` in one line: the field, what was found and what is allowed."""
    field, kind = brief(".".join(map(str, place_of(error)))), error["type"]
    start, found = f"{field}: " if field else "", f"found {error['input']!r:.80}"
    if kind == "missing":
        return f"{start}found none, it must be there"
    if kind == "value_error":
        reason = str(error["ctx"]["error"])
        if ": found" in reason:  # of a section, which names the key
            return f"{field}.{reason}" if field else reason
        return f"{start}{found}, allowed is {reason}"
    if kind in ("too_short", "too_long"):
        bound = "at least" if kind == "too_short" else "at most"
        allowed = error["ctx"]["min_length" if kind == "too_short" else "max_length"]
        return f"{start}found {error['ctx']['actual_length']} items, allowed are {bound} {allowed}"
    if kind in _KINDS:
        return f"{start}{found}, allowed is {_KINDS[kind]}"
    return f"{start}{found}, {error['msg'].replace('Input should be', 'allowed is')}"

"""``params.yaml``: what the pipeline varies. Only notebooks and the commands of the study read it.

Of YAML it takes mappings, lists and scalars, which are read as JSON reads them where they have no quotes: ``yes``,
``010``, ``1_000`` and ``.nan`` are texts. Anchors, aliases, tags and keys that are there twice are refused. What the
file says is checked as a whole, by ``schema``, when it is read.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from thermo_lib.extras import needs
from thermo_lib.files.reading import read_text, shown
from thermo_lib.files.schema import Where
from thermo_lib.pipeline.words import NUMBER
from thermo_lib.studies.grid import Inputs
from thermo_lib.studies.schema import problems

PARAMS_FILE = Path(__file__).resolve().parents[2] / "params.yaml"
_MOST_CHARACTERS = 2**16  # ten times the file
_CONSTANTS = {"true": True, "false": False, "null": None, "": None}


@cache
def read_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """The sections of the file.

    Raises:
        ValueError: no such file, not the YAML that is taken, or a key or value that ``schema`` doesn't allow; names the
            line, the key, what was found and what is allowed.
    """
    if not path.is_file():
        raise ValueError(f"params file: found no file at {shown(path)}; the pipeline and the study run in a checkout")
    content, lines = _read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"params file {shown(path)}: found {type(content).__name__}, expected a mapping of sections")
    found = problems(content)
    if found:
        place, message = found[0]
        more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
        while place not in lines:
            place = place[:-1]
        raise ValueError(f"{shown(path)}, line {lines[place]}: {message}{more}")
    return content


def _read_yaml(path: Path) -> tuple[Any, dict[Where, int]]:
    """What a YAML file says, and the line of each key and item."""
    yaml, text, where = needs("yaml"), read_text(path), shown(path)
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"{where}: found {len(text)} characters, allowed are at most {_MOST_CHARACTERS}")
    lines: dict[Where, int] = {}

    class Plain(yaml.SafeLoader):  # type: ignore[name-defined, misc]  # a module that is imported when it is needed
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
                raise ValueError(f"{where}, line {line}: found an anchor or alias, allowed is none")
            if event.tag is not None:
                raise ValueError(f"{where}, line {line}: found the tag {event.tag!r:.80}, allowed is none")
            return super().compose_node(parent, index)

    def value_of(node: Any, place: Where) -> Any:
        lines[place] = node.start_mark.line + 1
        if isinstance(node, yaml.SequenceNode):
            return [value_of(each, (*place, number)) for number, each in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node.value) if node.style is None else node.value
        content: dict[str, Any] = {}
        for key, value in node.value:
            line = f"{where}, line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{line}: found a key that isn't a word, allowed are words")
            if key.value in content:
                raise ValueError(f"{line}: {'.'.join(map(str, (*place, key.value)))}: found it twice, allowed is once")
            content[key.value] = value_of(value, (*place, key.value))
            lines[(*place, key.value)] = key.start_mark.line + 1
        return content

    try:
        node = yaml.compose(text, Plain)
        return (None, {}) if node is None else (value_of(node, ()), lines)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = str(problem or error).partition("\n")[0]
        raise ValueError(f"{where}{line}: found invalid YAML ({reason:.120})") from None
    except RecursionError:
        raise ValueError(f"{where}: found invalid YAML (nested too deep)") from None


def _scalar(text: str) -> Any:
    """A scalar without quotes, as JSON reads it; what JSON doesn't know is a text."""
    return json.loads(text) if NUMBER.fullmatch(text) else _CONSTANTS.get(text, text)


def default(key: str, path: Path = PARAMS_FILE) -> Any:
    """The value at a dotted key of ``params.yaml``, e.g. ``default("quant.group_size")``.

    Raises:
        ValueError: the key is not in the file; the message names it and the keys that are. Or what ``read_params``
            raises.
    """
    value: Any = read_params(path)
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            allowed = ", ".join(map(str, value)) if isinstance(value, dict) else "no keys"
            raise ValueError(f"params.yaml: {key!r} is missing at {part!r}; found {allowed}")
        value = value[part]
    return value


def calibration_sizes() -> dict[str, int]:
    """How much text the pipeline calibrates on, as ``calibration_batches`` takes it."""
    sizes = {key: default(f"calibration.{key}") for key in ("sequences", "puzzles")}
    return sizes | {"length": default("data.sequence_length"), "task_length": default("data.task_length")}


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

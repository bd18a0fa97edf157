"""How the command line explains itself: an overview, a page of help with examples for each command, one-line errors.

It also prints what a command found, as text or as JSON.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from thermo_lib.pipeline.flat import nearest

_COLUMNS = 100
EXAMPLES = {
    "quantize": (
        "thermo quantize --output small preset=fast",
        "thermo quantize --model DIR --output small --calibration texts.jsonl preset=gptq weights.bits=3",
    ),
    "info": ("thermo info", "thermo info small --json"),
    "generate": (
        'thermo generate --prompt "for i in" --max-new-tokens 16 --timesteps 16',
        'thermo generate --model DIR --chat --prompt "What is a prime?" --temperature 0.2 --top-p 0.95',
    ),
    "chat": ("thermo chat --raw", 'thermo chat --model DIR --system "Answer in one sentence."'),
    "evaluate": (
        "thermo evaluate --output full.json",
        "thermo evaluate --model small --reference reference --data texts.txt --output small.json",
    ),
    "compare": ("thermo compare reference small --output differences.json", "thermo compare full.json small.json"),
    "benchmark": (
        "thermo benchmark --smoothing-method linear",
        "thermo benchmark preset=w2a4-static time_groups.count=3",
    ),
    "study": ("thermo study --output points.json", "thermo study --axes full --output reports/study.json"),
    "point": ("thermo point activation_bits=4 num_time_groups=3 method=linear", "thermo point preset=gptq --seeds 0 1"),
    "speed": ("thermo speed --output speed.json", "thermo speed --tokens 1 32 --rounds 5 --output speed.json"),
    "gpu-check": ("thermo gpu-check --quick", "thermo gpu-check --device cuda:1 --output gpu.json"),
    "report": ("thermo report", "thermo report artifacts/benchmark/report.json --output benchmark.html"),
    "tidy": ("thermo tidy executed.ipynb", "thermo tidy notebooks/executed/dream_7b.ipynb"),
}
FIRST_STEPS = """first steps:
  thermo info                                    # what the embedded reference model is
  thermo quantize --output small preset=fast     # quantize it in seconds
  thermo compare reference small                 # what that costs
  thermo COMMAND --help                          # the options of a command, with examples"""


def program() -> str:
    """How the command line was called: ``thermo``, or ``python -m thermo_lib``."""
    return "thermo" if Path(sys.argv[0]).stem == "thermo" else "python -m thermo_lib"


class Form(argparse.RawDescriptionHelpFormatter):
    """Help as wide as a page, its options' explanations in one column."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=38, width=_COLUMNS)
        self._action_max_length = 14  # so that the names of all commands stand on the line of their text

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = getattr(action.type, "__name__", "")
        short = {"whole": "N", "number": "X", "Path": "PATH"}
        return short.get(kind, action.dest.rpartition("_")[2].upper())


class Parser(argparse.ArgumentParser):
    """A parser that takes ``NAME=VALUE`` words anywhere, and whose errors are one line."""

    def __init__(self, **how: Any):
        usual: dict[str, Any] = {"formatter_class": Form, "allow_abbrev": False}
        super().__init__(**usual | how)

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """What the words say; exits with status 2 and one line on stderr where they say nothing allowed."""
        arguments, rest = self.parse_known_args(args, namespace)
        takes_words = hasattr(arguments, "fields")
        for word in rest:
            if takes_words and not word.startswith("-"):
                arguments.fields.append(word)  # words after an option
            else:
                self._refuse(word, arguments.command)
        return arguments

    def _refuse(self, word: str, command: str | None) -> NoReturn:
        of_command = self._command(command)
        options = sorted(name for name in of_command._option_string_actions if name.startswith("--"))
        allowed = f"allowed are {', '.join(options)}"
        of_command.error(
            f"{command or 'thermo'}: found {word!a:.80}, {allowed}{nearest(word.partition('=')[0], options)}"
        )

    def _command(self, name: str | None) -> argparse.ArgumentParser:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and name in action.choices:
                return action.choices[name]
        return self

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(each) for each in action.choices]
            found = f"found {value!a:.80}, allowed are {', '.join(names)}{nearest(str(value), names)}"
            raise argparse.ArgumentError(action, found)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line on stderr."""
        said = message.removeprefix("argument ").removeprefix("--")
        missing = "the following arguments are required: "
        if said.startswith(missing):
            names = said.removeprefix(missing)
            said = f"{names} {'are' if ', ' in names else 'is'} missing"
        line = " ".join(said.splitlines())
        self.exit(2, f"error: {line} (see {self.prog} --help)\n")


def page(command: str) -> dict[str, Any]:
    """What a command's parser is made with: a short usage, and its examples below the options."""
    return {"epilog": "\n".join(["examples:", *(f"  {line}" for line in EXAMPLES[command])])}


def example_words(line: str) -> list[str]:
    """The arguments of an example."""
    return shlex.split(line)[1:]


def tell(arguments: argparse.Namespace, text: str, content: Mapping[str, Any]) -> None:
    """Print what was found: as text, or with ``--json`` as one JSON object, in which NaN and infinity are null."""
    if not arguments.json:
        print(text)
        return
    print(json.dumps(_without_nan(content), allow_nan=False))


def keep_and_tell(
    arguments: argparse.Namespace, text: str, content: Mapping[str, Any], write: Callable[[], object] | None
) -> None:
    """Write what was found, then print it; where the disk doesn't take it, it is printed all the same.

    Args:
        arguments, text, content: see ``tell``.
        write: writes it; None where it is kept nowhere.

    Raises:
        OSError: what ``write`` raises.
    """
    try:
        if write is not None:
            write()
    except OSError:
        with suppress(OSError):
            tell(arguments, text, content)
        raise
    tell(arguments, text, content)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What the options of ``python -m thermo_lib`` may be, checked before anything heavy is imported."""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

from thermo_lib.files.reading import shown
from thermo_lib.pipeline.presets import PRESETS
from thermo_lib.pipeline.words import WHOLE, read_words

SMOOTHING = ("linear", "cubic", "sigmoid", "spline")
_RECIPES = ("best starts", "best per layer", "best per layer by path KL")
# Commands that take NAME=VALUE, and their names beside the settings of ThermoConfig.
_WORDS: dict[str, dict[str, Sequence[str | None] | range]] = {
    "quantize": {"preset": tuple(PRESETS)},
    "benchmark": {"preset": tuple(PRESETS)},
    "point": {
        "preset": tuple(PRESETS),
        "method": (*SMOOTHING, None),
        "recipe": (*_RECIPES, None),
        "mix.code_sequences": range(2**20),
        "mix.puzzles": range(2**20),
        "mix.source": ("forward", "trajectory"),
    },
}
_MOST = 2**20
_LONGEST_PATH = 4096
_LIMITS = {
    "max_new_tokens": (1, _MOST),
    "timesteps": (1, 2**16),
    "top_k": (1, 2**31 - 1),
    "block_length": (0, _MOST),
    "attention_block": (1, _MOST),
    "suppress_tokens": (0, 2**31 - 1),
    "begin_suppress_tokens": (0, 2**31 - 1),
    "end_tokens": (0, 2**31 - 1),
    "seed": (0, 2**63 - 1),
    "seeds": (0, 2**63 - 1),
    "sequences": (1, _MOST),
    "trajectories": (1, _MOST),
    "length": (1, _MOST),
    "tokens": (1, _MOST),
    "rounds": (2, 10_000),
}
_NAMES = (
    "model",
    "reference",
    "family",
    "device",
    "scheduler",
    "sampler",
    "a",
    "b",
)  # texts that mean nothing when empty
_WITH_INTERVALS = ("evaluate", "compare")  # of scores, over sequences: more than one
_FILES = ("evaluate", "compare", "study", "point", "speed", "gpu-check", "report")  # commands whose output is a file


def whole(text: str) -> int:
    """A whole number as JSON has it, for ``argparse``."""
    if not re.fullmatch(WHOLE, text):
        raise argparse.ArgumentTypeError(f"found {text!r:.80}, allowed is a whole number such as 16")
    return int(text)


def number(text: str) -> float:
    """A finite decimal number, for ``argparse``."""
    if not re.fullmatch(r"-?([0-9]{1,30}\.?[0-9]{0,30}|\.[0-9]{1,30})([eE][+-]?[0-9]{1,3})?", text) or math.isinf(
        float(text)
    ):
        raise argparse.ArgumentTypeError(f"found {text!r:.80}, allowed is a number such as 0.5")
    return float(text)


def states(text: str) -> str:
    """How many calibration states: a whole number from 1 or ``all``, for ``argparse``."""
    if text != "all" and not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"found {text!r:.80}, allowed are a whole number from 1 and all")
    return text


def check(arguments: argparse.Namespace) -> None:
    """Refuse values that no run can have, and turn ``NAME=VALUE`` words into ``settings``.

    Raises:
        ValueError: in one line, the option, what was found and what is allowed.
        PermissionError: the output can't be written.
    """
    for name, value in vars(arguments).items():
        option = name.replace("_", "-")
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str | Path):
                _check_text(option, str(each), name in _NAMES)
            elif name in _LIMITS and each is not None:
                least, most = _LIMITS[name]
                if arguments.command in _WITH_INTERVALS and name in ("sequences", "trajectories"):
                    least = 2
                if each < least:
                    raise ValueError(f"{option}: found {each}, allowed is at least {least}")
                if each > most:
                    raise ValueError(f"{option}: found {each}, allowed is at most {most}")
    for name in ("calibration", "data"):
        path = getattr(arguments, name, None)
        if path is not None and not path.is_file():
            raise ValueError(f"data: found no file {shown(path)}")
    if arguments.command in _WORDS:
        arguments.settings = read_words(arguments.command, arguments.fields, _WORDS[arguments.command])
    is_file = arguments.command in _FILES and arguments.output is not None
    if is_file or arguments.command == "benchmark":
        from thermo_lib.files.outputs import output_file  # it imports more than a wrong word needs

        output_file(arguments.output if is_file else arguments.output / "report.json")


def _check_text(option: str, text: str, is_name: bool) -> None:
    if "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
        raise ValueError(f"{option}: found {text!a:.80}, allowed is text in UTF-8 without a zero byte")
    if len(text) > _LONGEST_PATH and option not in ("prompt", "system", "fields"):
        raise ValueError(f"{option}: found {len(text)} characters, allowed are at most {_LONGEST_PATH}")
    if is_name and not text:
        raise ValueError(f"{option}: found '', allowed is a text that isn't empty")

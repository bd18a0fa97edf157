"""The command ``compare``: two models, or two files of results, beside each other."""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from thermo_lib import commands
from thermo_lib.diffusion.states import calibrate
from thermo_lib.evaluation.comparison import DIFFERENCE_COLUMNS, differences, in_words
from thermo_lib.evaluation.report import table
from thermo_lib.evaluation.results import Results, read_results
from thermo_lib.evaluation.scores import Suite
from thermo_lib.files.outputs import alone_in
from thermo_lib.files.tensors import weight_files
from thermo_lib.files.text import write_json
from thermo_lib.models.lm import DiffusionLM, model_folder
from thermo_lib.notebooks import reproducible
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.presets import PRESETS
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.storage import is_quantized
from thermo_lib.usage import keep_and_tell

_PRESET = "preset="
_OF_MODELS = ("reference", "data", "sequences", "trajectories", "length", "device", "family", "attention_block")
_MOST_NAMES = 5


def run_compare(arguments: argparse.Namespace) -> None:
    """Print how B differs from A, number by number, and what that comes to."""
    are_files = [name.endswith(".json") for name in (arguments.a, arguments.b)]
    if are_files[0] != are_files[1]:
        found = f"found {arguments.a!r} and {arguments.b!r}"
        raise ValueError(f"compare: {found}, allowed are two models, or two JSON files of results")
    with alone_in(arguments.output, ["a", "b", "differences"]):
        content = (_results if are_files[0] else _models)(arguments)
        moved = [row for row in content["differences"] if content["kind"] == "models" or row["difference"] != 0]
        parts = [f"A: {arguments.a}\nB: {arguments.b}", content["summary"]]
        if moved:
            parts.insert(1, table(moved, DIFFERENCE_COLUMNS))
        write = None if arguments.output is None else partial(write_json, arguments.output, content)
        keep_and_tell(arguments, "\n\n".join(parts), content, write)


def _content(arguments: argparse.Namespace, kind: str, rows: list[dict[str, Any]], summary: str) -> dict[str, Any]:
    return {"a": arguments.a, "b": arguments.b, "kind": kind, "differences": rows, "summary": summary}


def _models(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both models scored on the same inputs, one after the other."""
    names = (arguments.a, arguments.b)
    for name in names:
        if name.startswith(_PRESET) and name.removeprefix(_PRESET) not in PRESETS:
            raise ValueError(f"preset: found {name.removeprefix(_PRESET)!r:.80}, allowed are {', '.join(PRESETS)}")
    reference_name = _reference(arguments)
    if arguments.data is not None:
        commands.check_texts(arguments.data)
    reproducible()
    reference = commands.load(reference_name, arguments)
    suite: Suite | None = None
    rows = []
    for name in tqdm(names, desc="compare", unit="model"):
        lm = reference if name == reference_name else _model(name, reference, arguments)
        if reference.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
            raise ValueError(f"reference: found a model with another vocabulary than {name!r} has")
        suite = commands.inputs(reference, arguments) if suite is None else suite
        rows.append(commands.scores(name, lm, lm, suite) | _size(name))
    assert suite is not None  # there are two names
    found = differences(*rows, resamples=suite.resamples)
    counts = {row["key"]: row["pairs"] for row in found}
    puzzles = f", {counts['sudoku_solved']} puzzles" if counts.get("sudoku_solved") else ""
    inputs = f"{counts['accuracy']} texts, {counts['path_kl']} trajectories of {reference_name}{puzzles}"
    said = f"{in_words(found)}\nBoth were scored on the same inputs ({inputs}); 95 %: bootstrap over these."
    return _content(arguments, "models", found, said) | {"reference": reference_name, "scores": rows}


def _reference(arguments: argparse.Namespace) -> str:
    """The full-precision model whose trajectories path KL is measured on.

    Raises:
        ValueError: none was named, and neither A nor B is one.
    """
    if arguments.reference is not None:
        return arguments.reference
    kept = [name for name in (arguments.a, arguments.b) if not name.startswith(_PRESET)]
    full = [name for name in kept if not is_quantized(name)]
    if full or not kept:
        return full[0] if full else "reference"
    raise ValueError("reference: found none, expected the full-precision model that the quantized ones were made from")


def _model(name: str, reference: DiffusionLM, arguments: argparse.Namespace) -> DiffusionLM:
    """A model that is loaded, or for ``preset=NAME`` the reference, quantized so."""
    if not name.startswith(_PRESET):
        return commands.load(name, arguments)
    config = ThermoConfig.preset(name.removeprefix(_PRESET), timesteps=arguments.timesteps)
    states = calibrate(reference, timesteps=config.timesteps) if config.needs_calibration else None
    return quantize(reference, config, states, progress=True)


def _size(name: str) -> dict[str, float]:
    """What a model's weights take on the disk, where they are on one."""
    if name.startswith(_PRESET):
        return {}
    return {"megabytes": sum(path.stat().st_size for path in weight_files(model_folder(name))) / 1e6}


def _results(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two files of results, configuration by configuration."""
    for name in _OF_MODELS:
        if getattr(arguments, name) is not None:
            raise ValueError(f"{name.replace('_', '-')}: found it with files of results, allowed is it with models")
    a, b = read_results(arguments.a), read_results(arguments.b)
    if a.kind != b.kind:
        raise ValueError(f"compare: found {a.kind} and {b.kind}, allowed are two files of one kind")
    if len(a.rows) == len(b.rows) == 1:  # whatever they are called
        (old,), (new,) = a.rows.values(), b.rows.values()
        found = differences(old, new)
        return _content(arguments, a.kind, found, in_words(found))
    common = [name for name in a.rows if name in b.rows]
    found = [row for name in common for row in differences(a.rows[name], b.rows[name], name=name)]
    return _content(arguments, a.kind, found, _summary(a, b, found)) | {"targets": _changed(a, b)}


def _changed(a: Results, b: Results) -> list[dict[str, str]]:
    """The targets whose verdicts differ."""
    both = [name for name in a.verdicts if name in b.verdicts and a.verdicts[name] != b.verdicts[name]]
    return [{"name": name, "a": a.verdicts[name], "b": b.verdicts[name]} for name in both]


def _summary(a: Results, b: Results, rows: Sequence[Mapping[str, Any]]) -> str:
    """How many numbers moved, which way, what only one file has, and which verdicts changed."""
    counts = Counter(row["verdict"] or "without an interval" for row in rows if row["difference"] != 0)
    said = "".join(f", {count} {verdict}" for verdict, count in sorted(counts.items()))
    lines = [f"{len(rows)} numbers are in both, {counts.total()} of them differ{said}."]
    for here, there, title in ((a, b, "A"), (b, a, "B")):
        alone = [name for name in here.rows if name not in there.rows]
        if alone:
            more = ", ..." if len(alone) > _MOST_NAMES else ""
            lines.append(f"Only {title} has {len(alone)} configurations: {', '.join(alone[:_MOST_NAMES])}{more}.")
    lines += [f"Target {row['name']}: {row['a']} in A, {row['b']} in B." for row in _changed(a, b)]
    return "\n".join(lines)

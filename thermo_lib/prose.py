"""Numbers in Markdown that come from the results files: ``python -m thermo_lib.prose`` fills them in.

A mark is a comment, which no Markdown renderer shows. Before a number in a sentence it says where that comes from, and
``<!--/-->`` ends it; in the first cell of a table's row it says where the other cells come from, cell by cell. No line
begins with one: a comment there would end the paragraph::

    `best` keeps <!--= best kept -->99.0 % (98.5 to 99.6)<!--/--> of the accuracy.
    | round-to-nearest <!--= rtn: bits accuracy kl --> | 2.25 | 0.316 | 84.3 |

The words before the last ones name a *source*:

- ``best``, a name of ``PEERS``: a row of ``reports/peers.json``; ``best/gptq`` compares two of them in pairs.
- ``study(activation_bits=4 num_time_groups=3)``, in the words of ``thermo point``: the three seeds of a configuration
  in ``reports/study.json``; ``study(... / ...)`` compares two, and ``+`` first adds words to those of the second.
- ``witness.rows[method=GPTQ]``: the records of a JSON file in ``reports/`` with these fields; ``~`` in place of ``=``
  takes a part of the field's text, ``!=`` another text. A name before or between the brackets may have ``*`` for any
  letters, and ``→`` stands for ``->``, which would end the comment: ``gpu.rows[linear=3584→512]``.
- ``variance(layer)``: the share of a factor in the variance of log ranges, a field for each model.
- ``dream_7b /(\\d+) s, /``: what an executed notebook printed and showed as text, the pattern's group; as a number in a
  format with ``dream_7b /(\\d+) MiB/*1e-3:.1f``.

The last word is a *quantity*: a name of ``QUANTITIES``, or a field with a format, such as ``seconds:.0f``. A field may
be multiplied and divided, ``seconds*28/60:.0f``, and has ``_`` for its spaces. ``min:``, ``max:``, ``mean:``,
``count:`` and ``range:`` (from the least to the largest) before a field take several records together. ``-`` leaves a
cell as it is. ``256@ms:.1f`` takes the source with 256 in the place of its ``*``, and ``1,256@ms:.1f`` fills two cells.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import filter as matching
from functools import cache
from pathlib import Path
from typing import Any

from thermo_lib.evaluation.statistics import verdict
from thermo_lib.files.printing import to_its_end
from thermo_lib.files.reading import read_json, read_text, shown
from thermo_lib.files.text import write_text
from thermo_lib.notebooks import ROOT
from thermo_lib.studies.grid import PointRow, point
from thermo_lib.studies.params import default
from thermo_lib.studies.peers import accuracy_kept, compare, path_kl_share
from thermo_lib.studies.smoothing import gain, path_kl_change

PAGES = (
    "README.md",
    "docs/choose.md",
    "docs/field.md",
    "docs/format.md",
    "docs/index.md",
    "docs/pipeline.md",
    "docs/presets.md",
    "docs/quantize.md",
    "docs/results.md",
    "docs/workbench.md",
)
PEERS = {  # a short name to method and setting
    "rtn": ("round-to-nearest", "group 128"),
    "quanto": ("quanto qint2", "HQQ optimizer"),
    "hqq64": ("HQQ", "group 64, axis 1"),
    "hqq16": ("HQQ", "group 16, axis 0"),
    "torchao": ("torchao int2", "group 32, asymmetric"),
    "gptqmodel": ("GPTQModel", "asymmetric, mse 2.4, desc_act, group 128"),
    "gptqmodel32": ("GPTQModel", "asymmetric, mse 2.4, group 32"),
    "autoround": ("AutoRound", "recommended, W2A16, best with alg_ext"),
    "autoround64": ("AutoRound", "W2A16G64, best with alg_ext"),
    "iq2xxs": ("llama.cpp", "IQ2_XXS, imatrix"),
    "iq2xs": ("llama.cpp", "IQ2_XS, imatrix"),
    "iq2s": ("llama.cpp", "IQ2_S, imatrix"),
    "q2k": ("llama.cpp", "Q2_K, imatrix"),
    "q2k_mix": ("llama.cpp", "Q2_K mixture, imatrix"),
    "gptq": ("thermo_lib GPTQ", "group 128"),
    "gptq_phases": ("thermo_lib", "all phases"),
    "even": ("thermo_lib trellis", "2 bits a column"),
    "spread": ("thermo_lib trellis", "spread bits"),
    "sequential": ("thermo_lib trellis", "spread bits, sequential"),
    "network": ("thermo_lib trellis", "spread bits, network"),
    "best": ("thermo_lib trellis", "all phases"),
    "small": ("thermo_lib trellis", "all phases, below 2.1 bits"),
    "w2a4": ("thermo_lib trellis", "all phases at W2A4"),
}
SEEDS = (0, 1, 2)

Record = Mapping[str, Any]
_MARK = re.compile(r"<!--= *(?P<spec>[^>]*?) *-->(?P<text>[^<]*)<!--/-->")
_ROW = re.compile(
    r"^\|(?P<first>[^|]*<!--= *(?P<spec>[^>]*?): (?P<quantities>[^>]*?) *-->[^|]*)\|(?P<cells>.*)\|$", re.MULTILINE
)
_CELL = re.compile(r"(?P<before>\s*(?:\*\*)?)(?P<value>.*?)(?P<after>(?:\*\*)?(?: [¹²³⁴⁵])?\s*)")
_FILTERED = re.compile(r"(?P<file>\w+)(?P<steps>(?:\.[^.\[\]]+|\[[^\]]*\])*)")
_STEP = re.compile(r"\.(?P<name>[^.\[\]]+)|\[(?P<filter>[^\]]*)\]")
_FACTOR = re.compile(r"([*/])([\d.e-]+)")


@cache
def _report(name: str) -> Any:
    return read_json(ROOT / "reports" / f"{name}.json")


@cache
def _study() -> dict[str, PointRow]:
    """The points of the study by what they are: seed, recipe, mix and configuration."""
    rows = _report("study")["rows"]
    return {_point_key(row["point"]): PointRow(**row) for row in rows}


def _point_key(content: Record) -> str:
    return json.dumps(content, sort_keys=True)


@cache
def _printed(notebook: str) -> str:
    """All that an executed notebook printed, and showed as text."""
    cells = read_json(ROOT / "notebooks" / "executed" / f"{notebook}.ipynb")["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join("".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs)


def _peer(name: str) -> Record:
    if name == "full":
        return _report("peers")["full_precision"]
    (row,) = (row for row in _report("peers")["rows"] if (row["method"], row["setting"]) == PEERS[name])
    return row


def _words(text: str) -> dict[str, Any]:
    """What ``thermo point`` takes, from its words."""
    fields = dict(word.split("=", 1) for word in text.split())
    read: dict[str, Any] = {name: value.replace("_", " ") for name, value in fields.items()}
    read |= {name: float(value) for name, value in fields.items() if re.fullmatch(r"\d+\.\d+", value)}
    read |= {name: int(value) for name, value in fields.items() if value.isdigit()}
    kept = ("path_kl", "least_squares")
    named = {name: fields[name] for name, value in fields.items() if value in kept}
    return read | named | {name: value == "true" for name, value in fields.items() if value in ("true", "false")}


def _points(text: str) -> list[PointRow]:
    keys = [_point_key(point(seed, **_words(text)).to_dict()) for seed in SEEDS]
    if missing := [key for key in keys if key not in _study()]:
        raise ValueError(f"study({text}): found {len(keys) - len(missing)} seeds, allowed is {len(keys)}")
    return [_study()[key] for key in keys]


def _studied(text: str) -> Record:
    new, _, old = (part.strip() for part in text.partition("/"))
    if new.startswith("+"):
        new = f"{old} {new[1:]}"
    rows = _points(new)
    scores = ("accuracy", "path_kl", "bits_per_weight")
    record: dict[str, Any] = {name: statistics.fmean(getattr(row, name) for row in rows) for name in scores}
    for name in scores:
        record |= {f"{name}_{end.__name__}": end(getattr(row, name) for row in rows) for end in (min, max)}
    if old:
        base = _points(old)
        record["gain"], record["gain_ci"] = gain(rows, base)
        record["path_kl_baseline"] = statistics.fmean(row.path_kl for row in base)
        record["path_kl_change"], record["path_kl_change_ci"] = path_kl_change(rows, base)
    return record


def _filtered(source: str) -> list[Record]:
    """The records of a file in reports/ that a path with filters leaves."""
    match = _FILTERED.fullmatch(re.sub(r" ?→ ?", " -> ", source))
    if match is None or not (ROOT / "reports" / f"{match['file']}.json").is_file():
        raise ValueError(f"source: found {source!r}, allowed are {', '.join(PEERS)}, study(...), a report, a notebook")
    found: list[Any] = [_report(match["file"])]
    for step in _STEP.finditer(match["steps"]):
        if step["name"] is not None:
            if not all(matching(record, step["name"]) for record in found):
                raise ValueError(f"{source}: found no {step['name']!r}")
            found = [record[name] for record in found for name in matching(record, step["name"])]
            found = [item for value in found for item in (value if isinstance(value, list) else [value])]
        else:
            found = [record for record in found if all(_fits(record, part) for part in step["filter"].split(";"))]
    return found


def _fits(record: Record, condition: str) -> bool:
    name, sign, wanted = re.split(r"(!=|=|~)", condition, maxsplit=1)
    value = "null" if record[name] is None else str(record[name])
    return wanted in value if sign == "~" else (value == wanted) == (sign == "=")


def records(source: str) -> list[Record]:
    """The records that a source names.

    Raises:
        ValueError: no such source, or nothing in it.
    """
    if source.startswith("study("):
        return [_studied(source[6:-1])]
    if source.startswith("variance("):
        models = _report("witness")["variance"]
        return [{name: statistics.fmean(model["shares"][source[9:-1]]) for name, model in models.items()}]
    new, _, old = source.partition("/")
    if {new, old} <= {*PEERS, "full", ""}:
        against = {**compare(_peer(new), _peer(old)), "of": _peer(old)} if old else {}
        return [{**_peer(new), **against}]
    if not (found := _filtered(source)):
        raise ValueError(f"{source}: found no such record")
    return found


def number(value: float, form: str) -> str:
    """A number in a format; a share in per cent has a space before its sign, and zero has no sign."""
    text = format(value, form.replace(".", "z.", 1) if "." in form else form)
    return re.sub(r"(\d)%$", r"\1 %", re.sub(r"^\+(?=0(\.0+)?%?$)", "", text))


def spread(ci: Sequence[float], form: str) -> str:
    """``low to high`` in a format, a sign of per cent once."""
    low, high = (number(end, form) for end in ci)
    return f"{low.removesuffix(' %')} to {high.removesuffix(' %')}"


def _with_ci(key: str, form: str, *, sign: int = 1, unit: str = "") -> Callable[[Record], str]:
    """The value with its 95 % interval in brackets; ``sign`` -1 turns a change into a lead."""

    def written(record: Record) -> str:
        ci = sorted(sign * end for end in record[f"{key}_ci"])
        return f"{number(sign * record[key], form)}{unit} ({spread(ci, form)})"

    return written


def _kept(record: Record) -> str:
    goal = accuracy_kept(record, _peer("full"), default("peers.accuracy_kept"))
    return f"{number(goal['value'], '.1%')} ({spread(goal['ci'], '.1%')})"


def _kept_verdict(record: Record) -> str:
    goal = accuracy_kept(record, _peer("full"), default("peers.accuracy_kept"))
    return f"{goal['verdict']} at {number(goal['bound'], '.0%')}"


def _verdict_of_gain(record: Record) -> str:
    return verdict(record["gain_ci"], default("targets.accuracy_gain"), at_least=True)


def _share(record: Record) -> str:
    """What is left of the path KL of the row that this one is compared with, with its paired interval."""
    share, ci = path_kl_share(record, record["of"])
    return f"{share:.2f} ({spread(ci, '.2f')})"


QUANTITIES: dict[str, Callable[[Record], str]] = {
    "bits": lambda record: number(record["bits_per_weight"], ".2f"),
    "accuracy": lambda record: number(record["accuracy"], ".3f"),
    "accuracy_ci": _with_ci("accuracy", ".3f"),
    "kl": lambda record: number(record["path_kl"], ".1f"),
    "kl2_baseline": lambda record: number(record["path_kl_baseline"], ".2f"),
    "kl_ci": _with_ci("path_kl", ".1f"),
    "a4": lambda record: f"{number(record['accuracy_a4'], '.3f')}, {number(record['path_kl_a4'], '.1f')}",
    "accuracy_a4": lambda record: number(record["accuracy_a4"], ".3f"),
    "kl_a4": lambda record: number(record["path_kl_a4"], ".1f"),
    "sudoku": lambda record: number(record["sudoku_solved"], ".2f"),
    "seconds": lambda record: number(record["seconds"], ".0f"),
    "gb": lambda record: number(record["peak_mib"] * 2**20 / 1e9, ".1f"),
    "gain": _with_ci("gain", "+.1%"),
    "change": _with_ci("path_kl_change", "+.1f"),
    "change2": _with_ci("path_kl_change", "+.2f"),
    "kl_change": lambda record: f"{number(record['path_kl'], '.1f')}, {_with_ci('path_kl_change', '+.1f')(record)}",
    "ahead": _with_ci("path_kl_change", ".1f", sign=-1, unit=" nats"),
    "lead": _with_ci("gain", ".1%"),
    "kept": _kept,
    "kept_verdict": _kept_verdict,
    "gain_verdict": _verdict_of_gain,
    "share": _share,
    "target": lambda record: _with_ci("value", "+.1%")({**record, "value_ci": record["ci"]}),
    "times": lambda record: _with_ci("times_dense", ".2f")({**record, "times_dense_ci": record["ci"]}),
    "norms_gain": _with_ci("change", ".2f", sign=-1),
    "kl_norms": lambda record: f"{record['path_kl']:.1f}, {_with_ci('change', '+.2f')(record)} against one set",
    "overhead": lambda record: f"{number(record['value'], '+.1%')}, {record['verdict']}",
    "groups_change": _with_ci("change", "+.1f"),
}
_TOGETHER: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "max": max,
    "mean": statistics.fmean,
    "count": len,
}


def _scaled(found: Any, field: str) -> Any:
    """What a field holds, multiplied and divided as the field's name says after it."""
    for sign, factor in _FACTOR.findall(field):
        found = found * float(factor) if sign == "*" else found / float(factor)
    return found


def _field(source: str, record: Record, field: str) -> Any:
    """A field of a record, multiplied and divided."""
    name = _FACTOR.sub("", field)
    for known in (name, name.replace("_", " ")):
        if known in record:
            return _scaled(record[known], field)
    allowed = ", ".join(QUANTITIES)
    raise ValueError(f"{source}: found quantity {field!r}, allowed are {allowed}, and a field with a format")


def value(source: str, quantity: str) -> str:
    """The text of a mark.

    Raises:
        ValueError: a source or a quantity that isn't known, or more than one record where one is asked for.
    """
    if quantity.startswith("/"):
        pattern, _, rest = quantity[1:].rpartition("/")
        texts = re.findall(pattern, _printed(source))
        if len(texts) != 1:
            raise ValueError(f"{source}: {quantity}: found {len(texts)} times, allowed is once")
        factors, _, form = rest.partition(":")
        return number(_scaled(float(texts[0].replace(",", "")), factors), form) if form else texts[0]
    rows = records(source)
    together, _, rest = quantity.partition(":")
    if together in (*_TOGETHER, "range"):
        field, _, form = rest.partition(":")
        found = [_field(source, row, field) for row in rows]
        if together != "range":
            return number(_TOGETHER[together](found), form)
        ends = min(found), max(found)
        return number(ends[0], form) if number(ends[0], form) == number(ends[1], form) else spread(ends, form)
    if len(rows) != 1:
        raise ValueError(f"{source}: found {len(rows)} records, allowed is one")
    if quantity in QUANTITIES:
        return QUANTITIES[quantity](rows[0])
    field, _, form = quantity.partition(":")
    one = _field(source, rows[0] if form else {}, field)  # without a format it is the name of a quantity
    if form == "s":
        return one
    return spread(one, form) if isinstance(one, list) else number(one, form)


def _filled_mark(match: re.Match[str]) -> str:
    spec = match["spec"]
    split = spec.index(" /") if re.match(r"\w+ /", spec) else spec.rindex(" ")
    return f"<!--= {spec} -->{value(spec[:split], spec[split + 1 :])}<!--/-->"


def _each(quantities: Sequence[str]) -> list[str]:
    """One quantity a cell: ``1,256@ms:.1f`` is that of two."""
    parts = [quantity.rpartition("@") for quantity in quantities]
    return [f"{one}{sign}{asked}" for put, sign, asked in parts for one in put.split(",")]


def _filled_row(match: re.Match[str]) -> str:
    cells, quantities = match["cells"].split("|"), _each(match["quantities"].split())
    if len(quantities) > len(cells):
        raise ValueError(f"{match['spec']}: found {len(quantities)} quantities, allowed are at most {len(cells)} cells")
    for place, quantity in enumerate(quantities):
        if quantity != "-":
            around = _CELL.fullmatch(cells[place])
            assert around is not None  # the pattern takes any text of a line
            before, after = around["before"] or " ", around["after"] or " "
            put, is_put, asked = quantity.rpartition("@")
            source = match["spec"].replace("*", put) if is_put else match["spec"]
            cells[place] = f"{before}{value(source, asked)}{after}"
    return f"|{match['first']}|{'|'.join(cells)}|"


def filled(text: str) -> str:
    """A page's text with the numbers that its marks ask for.

    Raises:
        ValueError: a mark that names nothing, or more than one thing.
    """
    return _MARK.sub(_filled_mark, _ROW.sub(_filled_row, text))


@to_its_end
def main(names: Sequence[str]) -> int:
    """Fill in the numbers of the pages, or with ``--check`` name those whose numbers are stale."""
    check = "--check" in names
    pages = [Path(name) for name in names if name != "--check"] or [ROOT / name for name in PAGES]
    stale = []
    for path in pages:
        text = read_text(path)
        try:
            new = filled(text)
        except ValueError as error:
            raise ValueError(f"{shown(path)}: {error}") from error
        if new != text:
            stale.append(path)
            if not check:
                write_text(path, new)
    for path in stale:
        print(f"{shown(path)}: {'its numbers are stale' if check else 'filled in'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")

"""The kinds of input: a tiny valid one of each, and what reads it."""

import argparse
import json
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from layouts import DREAM, LLADA, OPEN_DCODER
from mutations import as_json, change_bytes, change_json, change_words
from nbformat import v4, write
from safetensors.torch import load_file
from workers import Target

from thermo_lib import ThermoConfig, __main__, load_model, load_quantized, options, quantize, save_quantized
from thermo_lib.data.corpus import train_tokenizer
from thermo_lib.data.puzzles import Puzzle, is_solution, read_jsonl
from thermo_lib.data.texts import read_texts
from thermo_lib.diffusion.states import Calibration, calibrate
from thermo_lib.evaluation.comparison import differences
from thermo_lib.evaluation.page import report_page
from thermo_lib.evaluation.results import read_report_json, read_results
from thermo_lib.evaluation.smoothing import Targets
from thermo_lib.models.tokenization import read_tokenizer
from thermo_lib.notebooks import tidy
from thermo_lib.pipeline.about import about, words
from thermo_lib.pipeline.flat import FLAT
from thermo_lib.pipeline.parts import PHASES, WEIGHTS, Dynamic, Static, TimeGrouping
from thermo_lib.pipeline.presets import PRESETS
from thermo_lib.studies import params
from thermo_lib.studies.grid import Inputs, _read_rows, point
from thermo_lib.studies.smoothing import slices

TEXTS = ["def f(x):\n    return x + 1\n", "for i in range(10):\n    print(i, 2 * i)\n", "class A:\n    pass\n"] * 3
SIZE = 320  # of the vocabulary
TEMPLATE = """{%- for message in messages %}{{ '<' + message['role'] + '>' }}{{ message.content | trim }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
PIECES = (
    *("{% for i in range(10**9) %}x{% endfor %}", "{{ 'a' * 10**9 }}", "{{ messages }}", "{{ x.y.z }}", "{{ 1 / 0 }}"),
    *(
        "{% if %}",
        "{% endfor %}",
        "{{",
        "{%",
        "}}",
        "{# ",
        "{% raw %}",
        "{{ raise_exception('no') }}",
        "{{ 10**10**8 }}",
    ),
    *("{{ ''.__class__.__mro__ }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages[99].role }}"),
    *("{% set x = messages.append(1) %}", "{{ messages | tojson }}", "{{ '%s' % 1 }}", "{{ strftime_now('%Y') }}"),
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    *("{% include 'x' %}", "{% import 'x' as y %}", "{{ [1] | batch(0) | list }}", "{{ 'a' | center(10**9) }}"),
)


def _one_of(inputs: Sequence[Any], rngs: list[random.Random]) -> Any:
    """One of several inputs, the first where nothing is changed."""
    return rngs[0].choice(inputs) if rngs else inputs[0]


class File:
    """An input that is one file of JSON or text.

    Args:
        path: the valid file.
        check: reads it.
        folder: what is copied with it; None for the file alone.
    """

    share_of_bytes = 0.3

    def __init__(self, path: Path, check: Callable[[Path], None]):
        self.path, self._check, self.valid = path, check, path.read_bytes()

    def change(self, rngs: list[random.Random]) -> str:
        """See ``workers.Target``."""
        content, said = self.valid, []
        for rng in rngs:
            if rng.random() < self.share_of_bytes:
                content, text = change_bytes(content, rng)
            else:
                content, text = self.other(content, rng)
            said.append(text)
        self.path.write_bytes(content)
        return f"{self.path.name}: {'; '.join(said)}"

    def other(self, content: bytes, rng: random.Random) -> tuple[bytes, str]:
        """A change that knows the format."""
        try:
            changed, text = change_json(json.loads(content), rng)
        except (ValueError, RecursionError):  # an earlier change has damaged it
            return change_bytes(content, rng)
        return as_json(changed, rng), text

    def check(self) -> None:
        """See ``workers.Target``."""
        self._check(self.path)


class Lines(File):
    """A file of JSON lines, of which one is changed."""

    def other(self, content: bytes, rng: random.Random) -> tuple[bytes, str]:
        lines = content.split(b"\n")
        number = rng.randrange(len(lines))
        lines[number], text = super().other(lines[number] or b"{}", rng)
        return b"\n".join(lines), f"line {number + 1}: {text}"


class Header(File):
    """A safetensors file, of which the header is changed."""

    share_of_bytes = 0.0

    def other(self, content: bytes, rng: random.Random) -> tuple[bytes, str]:
        size = int.from_bytes(content[:8], "little")
        header, rest = content[8 : 8 + size], content[8 + size :]
        if rng.random() < 0.3:
            header, text = change_bytes(header, rng)
        else:
            header, text = super().other(header, rng)
        length = rng.choice((len(header), len(header), len(header), len(header), 0, 1, size, 2**40, 2**64 - 1))
        if rng.random() < 0.2:
            rest, more = change_bytes(rest, rng)
            text = f"{text}; tensors: {more}"
        return length.to_bytes(8, "little") + header + rest, f"header of {length} bytes: {text}"


class Yaml(File):
    """``params.yaml``."""

    def other(self, content: bytes, rng: random.Random) -> tuple[bytes, str]:
        try:
            changed, text = change_json(yaml.load(content, yaml.CSafeLoader), rng)
            written = yaml.dump(changed, Dumper=yaml.CSafeDumper, allow_unicode=True)
            return written.encode(errors="surrogatepass"), text
        except (yaml.YAMLError, ValueError, RecursionError):
            return change_bytes(content, rng)


class Template(File):
    """A chat template."""

    def other(self, content: bytes, rng: random.Random) -> tuple[bytes, str]:
        start = rng.randrange(len(content) + 1)
        piece = rng.choice(PIECES)
        return content[:start] + piece.encode() + content[start:], f"{piece} at {start}"


class Fields:
    """The fields of a configuration, as ``config.json`` holds them."""

    def __init__(self) -> None:
        static = {
            "activations.bits": 4,
            "activations.fit_to": "output",
            "num_time_groups": 3,
            "path_kl.markov_weight": 1,
        }
        configs = [*map(ThermoConfig.preset, PRESETS), ThermoConfig(**static), ThermoConfig(**{"time_norms.count": 2})]
        self._valid = [config.to_dict() for config in configs]
        flat = {
            "quant_method": "thermo",
            "format_version": 2,
            "bit_width": 2,
            "quantizer": "trellis",
            "average_bits": 2.5,
        }
        flat |= {"activation_bits": 4, "num_time_groups": 3, "smoothing_method": "linear", "reconstruction": "blocks"}
        self._valid.append(flat)

    def change(self, rngs: list[random.Random]) -> str:
        """See ``workers.Target``."""
        self._content, said = _one_of(self._valid, rngs), []
        for rng in rngs:
            self._content, text = change_json(self._content, rng)
            said.append(text)
        return f"fields: {'; '.join(said)}"

    def check(self) -> None:
        """See ``workers.Target``."""
        config = ThermoConfig.from_dict(self._content)
        content = json.loads(json.dumps(config.to_dict(), allow_nan=False))
        assert ThermoConfig.from_dict(content) == config
        assert ThermoConfig.from_dict(content).digest() == config.digest()
        words(config)


LINES = (
    "quantize --model m --output q preset=w2a4-static weights.bits=4 time_groups.count=3 seed=1",
    "quantize --output q --layerwise 8 preset=best activations.bits=4 path_kl.steps=3",
    "quantize --output q activations.bits=8",
    "quantize --output q num_time_groups=2 activation_bits=4",
    "point activation_bits=4 num_time_groups=3 method=linear recipe=null --seeds 0 1",
    "point weights.method=trellis",
    "point path_kl.steps=8 --seeds 3",
    "generate --prompt a --max-new-tokens 8 --timesteps 4 --top-p 0.9 --seed 3 --suppress-tokens 1 2",
    "evaluate --model m --sequences 4 --trajectories 2 --length 8 --output s.json --dtype float32",
    "benchmark --bits 4 --activation-bits 8 --num-time-groups 2 --smoothing-window 2 --output b",
    "speed --tokens 1 32 --rounds 3 --output s.json",
    "chat --raw --threshold 0.9 --sampler maskgit_plus --block-length 4",
    "study --axes full --output grid.json",
    "info --family Dream m",
    "compare a.json b.json --output c.json --json",
    "tidy n.ipynb",
)


class Words:
    """Words of the command line, as far as they are read before a model is."""

    def __init__(self) -> None:
        self._valid = [line.split() for line in LINES]
        parts = {"activations": (Static, Dynamic), "time_groups": (TimeGrouping,), "weights": tuple(WEIGHTS.values())}
        parts |= {name: (part,) for name, part in PHASES.items()}
        inside = {f"{name}.{key}" for name, owners in parts.items() for owner in owners for key in owner.model_fields}
        self._names = [*sorted(inside), *FLAT, "preset", "method", "recipe", "embedding_bits", "timesteps", "seed"]

    def change(self, rngs: list[random.Random]) -> str:
        """See ``workers.Target``."""
        self._words = _one_of(self._valid, rngs)
        for rng in rngs:
            self._words, _ = change_words(self._words, rng, self._names)
        return f"python -m thermo_lib {self._words!r:.200}"

    def check(self) -> None:
        """See ``workers.Target``."""
        arguments = __main__._parser().parse_args(self._words)
        options.check(arguments)
        config = self._config(arguments)
        if config is not None:
            assert ThermoConfig.from_dict(config.to_dict()) == config

    def _config(self, arguments: argparse.Namespace) -> ThermoConfig | None:
        if arguments.command == "quantize":
            fields = dict(arguments.settings)
            return ThermoConfig.preset(fields.pop("preset", "gptq"), **fields)
        if arguments.command == "point":
            arguments.settings.pop("seed", None)  # refused by the command
            points = [point(seed, **arguments.settings) for seed in arguments.seeds]
            return points[0].config
        return None


def _check_model(path: Path, family: str | None = None) -> None:
    about(str(path.parent), family)
    lm = load_model(str(path.parent), family=family)
    with torch.no_grad():
        lm.model(torch.tensor([[5, 6, 7, lm.mask_token_id]]))


def _check_quantized(path: Path) -> None:
    about(str(path.parent))
    load_quantized(path.parent).model(torch.tensor([[5, 6, 7]]))


def _check_index(expected: Mapping[str, torch.Tensor]) -> Callable[[Path], None]:
    def check(path: Path) -> None:
        found = load_model(str(path.parent), dtype=torch.bfloat16).model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    return check


def _check_tokenizer(path: Path) -> None:
    tokenizer = read_tokenizer(path.parent, SIZE)
    ids = tokenizer.encode("for i in range(3): é").ids
    assert all(0 <= i < SIZE for i in ids)
    tokenizer.decode(ids)


def _check_template(path: Path) -> None:
    lm = load_model(str(path.parent))
    text = lm.chat(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], add_generation_prompt=True
    )
    assert isinstance(text, str)


def _check_params(path: Path) -> None:
    content = params.read_params.__wrapped__(path)
    assert all(type(content[key]) is kind for key, kind in (("seed", int), ("study", dict)))
    Targets(**content["targets"])
    Inputs(source=content["calibration"]["source"])
    for axes in content["study"].values():
        if sum(len(values) for values in axes.values() if isinstance(values, list)) < 30:
            slices(axes)


def _check_tasks(path: Path) -> None:
    for task, pattern in (("countdown", r"[0-9,]+"), ("sudoku", r"[0-4\n]+")):
        if path.stem == task:
            for puzzle in read_jsonl(path, task):
                assert re.fullmatch(pattern, puzzle.input)
                is_solution(puzzle, puzzle.output)
    if path.stem == "countdown":
        is_solution(Puzzle("countdown", "1,2,3", ""), path.read_text(encoding="utf-8", errors="replace"))


def _check_texts(path: Path) -> None:
    for text in read_texts(path, lambda messages: "".join(each["role"] + each["content"] for each in messages)):
        text.encode()


def _check_report(path: Path) -> None:
    assert report_page(read_report_json(path)).startswith("<!DOCTYPE html>")


def _check_results(path: Path) -> None:
    for row in read_results(path).rows.values():
        assert not any(found["difference"] for found in differences(row, row))


TASKS = {
    "countdown": [{"input": "2,3,4,14", "output": "3*4=12,12+2=14"}, {"input": "1,2,3", "output": "1+2=3"}],
    "sudoku": [{"input": "1000\n0000\n0000\n0000", "output": "1234\n3412\n2143\n4321"}],
    "texts": [{"text": "def f(x):"}, {"messages": [{"role": "user", "content": "hi"}]}, {"text": "ü"}],
}


def build(root: Path) -> None:
    """Write the valid inputs into an empty folder."""
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    for name, layout in (("dream", DREAM), ("llada", LLADA), ("dcoder", OPEN_DCODER)):
        layout.write(root / name, tokenizer)
    (root / "dream/chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    lm = load_model(str(root / "dream"))
    fields = {"quantizer": "rtn", "group_size": 16, "activations.bits": 8, "num_time_groups": 2, "timesteps": 4}
    states = calibrate(lm, [(torch.arange(5, 17)[None], None)], timesteps=4, source="forward", progress=False)
    save_quantized(quantize(lm, ThermoConfig(**fields), states), root / "quantized")
    states.save(root / "states.safetensors")
    for name in ("header", "index", "tokenizer", "template"):
        shutil.copytree(root / "dream", root / name)
    shutil.copy(params.PARAMS_FILE, root)
    for name, rows in TASKS.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    row = {"accuracy_per_sequence": [0.5], "accuracy_per_timestep": [0.5], "path_kl_per_sequence": [2.0]}
    row |= {"path_kl_per_timestep": [2.0], "markov_score": None, "mean_jump": 0.5, "bits_per_weight": 2.25}
    content = {
        "made_of": {"weights": "x"},
        "rows": [row | {"point": point(3, num_time_groups=2, method="cubic").to_dict()}],
    }
    (root / "points.json").write_text(json.dumps(content), encoding="utf-8")
    report = json.loads((params.PARAMS_FILE.parent / "reports/report.json").read_text(encoding="utf-8"))
    report |= {name: report[name][:2] for name in ("configurations", "targets")}
    (root / "report.json").write_text(json.dumps(report), encoding="utf-8")
    numbers = {"name": "m", "accuracy": 0.5, "accuracy_ci": [0.4, 0.6], "nelbo": 3, "bits_per_weight": 2.25}
    pairs = {"inputs": "x", "accuracy": [0.4, 0.6], "nelbo": [2.5, 3.5]}
    (root / "scores.json").write_text(json.dumps(numbers | {"sequences": pairs}), encoding="utf-8")
    cell = v4.new_code_cell("1", outputs=[v4.new_output("stream", name="stdout", text="1\n")])
    with (root / "notebook.ipynb").open("w", encoding="utf-8") as file:
        write(v4.new_notebook(cells=[cell, v4.new_markdown_cell("text")]), file)


class _OneOf:
    """One of several inputs of a kind, chosen by the seed."""

    def __init__(self, *targets: Target):
        self._targets, self._chosen = targets, targets[0]

    def change(self, rngs: list[random.Random]) -> str:
        """See ``workers.Target``."""
        self._chosen = _one_of(self._targets, rngs)
        return self._chosen.change(rngs)

    def check(self) -> None:
        """See ``workers.Target``."""
        self._chosen.check()


class _Folder:
    """A model folder, of which a file is changed; it is whole again for the next case."""

    def __init__(self, target: File):
        self._target = target

    def change(self, rngs: list[random.Random]) -> str:
        """See ``workers.Target``."""
        return f"{self._target.path.parent.name}/{self._target.change(rngs)}"

    def check(self) -> None:
        """See ``workers.Target``."""
        try:
            self._target.check()
        finally:
            self._target.path.write_bytes(self._target.valid)


def targets(root: Path) -> dict[str, Target]:
    """The kinds, on a copy of what ``build`` wrote."""
    index = root / "index/model.safetensors.index.json"
    expected = load_model(str(index.parent), dtype=torch.bfloat16).model.state_dict()
    shard = sorted((root / "header").glob("*.safetensors"))[0]
    assert load_file(shard)
    plain = [File(root / name / "config.json", _check_model) for name in ("dream", "llada")]
    other = File(root / "dcoder/config.json", lambda path: _check_model(path, "open-dcoder"))
    quantized = File(root / "quantized/config.json", _check_quantized)
    return {
        "config": _OneOf(*map(_Folder, (*plain, other, quantized))),
        "index": _Folder(File(index, _check_index(expected))),
        "header": _OneOf(
            _Folder(Header(shard, _check_model)),
            Header(root / "states.safetensors", lambda path: Calibration.load(path)),
        ),
        "tokenizer": _Folder(File(root / "tokenizer/tokenizer.json", _check_tokenizer)),
        "template": _Folder(Template(root / "template/chat_template.jinja", _check_template)),
        "params": Yaml(root / "params.yaml", _check_params),
        "tasks": _OneOf(
            *(Lines(root / f"{name}.jsonl", _check_tasks) for name in ("countdown", "sudoku")),
            Lines(root / "texts.jsonl", _check_texts),
        ),
        "words": Words(),
        "fields": Fields(),
        "reports": _OneOf(
            File(root / "points.json", lambda path: _read_rows(path)),
            *(File(root / f"{name}.json", _check_results) for name in ("points", "scores", "report")),
            File(root / "notebook.ipynb", tidy),
        ),
        "report": File(root / "report.json", _check_report),
    }


KINDS: Sequence[str] = (
    *("config", "index", "header", "tokenizer", "template", "params", "tasks", "words", "fields", "reports", "report"),
)

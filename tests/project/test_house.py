"""The order of the library: which folder imports which, how long files get, and what an import brings along.

``python tests/project/test_house.py`` prints the arrows between the folders.
"""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import thermo_lib

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "thermo_lib"
# From the ground up. A folder imports from lower floors, and from its own as long as there is no circle.
FLOORS = (
    ("quant", "files", "extras", "notebooks"),
    ("models", "data"),
    ("diffusion",),
    ("time_aware",),
    ("transition",),
    ("pipeline",),
    ("evaluation", "integrations"),
    ("studies",),
    ("chat", "commands", "compare", "options", "prose", "usage", "workbench"),
    ("__main__",),
    ("__init__",),  # the names for users: nothing in the library imports them
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
GROUND = {
    "quant": {"extras"},
    "files": {"extras"},
    "extras": set(),
    "notebooks": {"extras", "files"},
}  # what they may import
MOST_LINES = 450
PARAMS = "thermo_lib.studies.params"

Arrows = dict[str, dict[str, list[str]]]


def imported(path: Path, package: Path) -> Iterator[str]:
    """The dotted names of the package that a file imports, also in functions, also relative ones."""
    parents = path.relative_to(package.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == package.name)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join((*parents[: len(parents) + 1 - node.level], node.module or "")) if node.level else ""
            module = (module or node.module).strip(".")
            if module.partition(".")[0] == package.name:
                yield from (f"{module}.{alias.name}" for alias in node.names)


def arrows(package: Path = PACKAGE) -> Arrows:
    """Folder (or single module) to each other one that it imports, to the files that do so."""
    places = {path.stem for path in package.iterdir() if path.is_dir() or path.suffix == ".py"} - {"__pycache__"}
    found: Arrows = {}
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        start = inside.parts[0].removesuffix(".py")
        found.setdefault(start, {})
        for name in imported(path, package):
            end = name.partition(".")[2].partition(".")[0]
            end = end if end in places else "__init__"  # the package itself, or a name of it
            if end != start:
                files = found[start].setdefault(end, [])
                files.extend({inside.as_posix()} - set(files))
    return found


def wrong_arrows(found: Arrows) -> list[str]:
    """What goes up, leaves the ground or goes round in a circle; every folder must have a floor."""
    unknown = sorted((found.keys() | {end for ends in found.values() for end in ends}) - LEVEL.keys())
    wrong = [f"{name} is on no floor" for name in unknown]
    inside = {start: ends for start, ends in found.items() if start in LEVEL and start != "__init__"}
    for start, ends in inside.items():
        for end, files in ends.items():
            if end not in LEVEL:
                continue
            if LEVEL[end] > LEVEL[start] or (start in GROUND and end not in GROUND[start]):
                wrong.append(f"{start} imports {end}: {', '.join(files)}")
    try:
        TopologicalSorter({start: list(ends) for start, ends in inside.items()}).prepare()
    except CycleError as error:
        wrong.append("circle: " + ", ".join(sorted(set(error.args[1]))))
    return wrong


def table(found: Arrows) -> str:
    """The arrows, a line a folder, from the ground up."""
    lines = []
    for start in sorted(found, key=lambda name: (LEVEL.get(name, len(FLOORS)), name)):
        ends = sorted(found[start], key=lambda name: (LEVEL.get(name, len(FLOORS)), name))
        lines.append(f"{LEVEL.get(start, '?'):>2}  {start:<12} -> {', '.join(ends) or '(nothing)'}")
    return "\n".join(lines)


def written(folder: Path, files: Mapping[str, str]) -> Path:
    """A package with these files."""
    for name, text in files.items():
        path = folder / "thermo_lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "thermo_lib"


def long_files(root: Path) -> dict[str, int]:
    """Python files of the library and the tests that have too many lines."""
    paths = [path for folder in ("thermo_lib", "tests") for path in sorted((root / folder).rglob("*.py"))]
    count = {path.relative_to(root).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    return {name: lines for name, lines in count.items() if lines > MOST_LINES}


def test_no_import_goes_up_or_round_in_a_circle() -> None:
    found = arrows()
    print(table(found))
    assert wrong_arrows(found) == []


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ({"models/lm.py": "from thermo_lib.quant.layers import X"}, []),
        ({"quant/gptq.py": "from thermo_lib.quant import codes"}, []),
        (
            {"quant/gptq.py": "def f():\n    import thermo_lib.models.lm"},
            ["quant imports models: quant/gptq.py"],
        ),
        ({"quant/a.py": "from ..files import text"}, ["quant imports files: quant/a.py"]),
        ({"pipeline/a.py": "from thermo_lib import studies"}, ["pipeline imports studies: pipeline/a.py"]),
        ({"commands.py": "from thermo_lib import load_model"}, ["commands imports __init__: commands.py"]),
        ({"plots/a.py": ""}, ["plots is on no floor"]),
        (
            {"models/a.py": "import thermo_lib.data", "data/a.py": "import thermo_lib.models"},
            ["circle: data, models"],
        ),
    ],
)
def test_wrong_imports_are_found(files: dict[str, str], wrong: list[str], tmp_path: Path) -> None:
    folders = ("quant", "files", "models", "data", "pipeline", "studies")
    package = written(tmp_path, {f"{name}/__init__.py": "" for name in folders} | files)
    assert wrong_arrows(arrows(package)) == wrong


def test_no_file_is_long() -> None:
    assert long_files(ROOT) == {}


def test_a_long_file_is_found(tmp_path: Path) -> None:
    long = "x = 1\n" * (MOST_LINES + 1)
    written(tmp_path, {"quant/long.py": long, "quant/short.py": long.removesuffix("x = 1\n"), "__init__.py": ""})
    assert long_files(tmp_path) == {"thermo_lib/quant/long.py": MOST_LINES + 1}


def test_params_are_read_in_one_place() -> None:
    """Only what stands above the studies, and they themselves, see ``params.yaml``; nothing else opens it."""
    importing, naming = set(), set()
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE).as_posix()
        if any(f"{name}.".startswith(f"{PARAMS}.") for name in imported(path, PACKAGE)):
            importing.add(inside)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and re.search(r"^\S*params\.yaml$", node.value)
            ):
                naming.add(inside)
    assert naming == {"studies/params.py"}
    below = {name for name in importing if LEVEL[name.partition("/")[0].removesuffix(".py")] < LEVEL["studies"]}
    assert importing
    assert below == set()


def extra_modules() -> set[str]:
    """The top-level modules of what the extras ask for, and some that those bring along."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    asked = {re.split(r"[<>=\[]", line)[0].lower().replace("_", "-") for lines in extras.values() for line in lines}
    provided = importlib.metadata.packages_distributions()
    modules = {m for m, names in provided.items() if {n.lower().replace("_", "-") for n in names} & asked}
    return modules - {"thermo_lib", "thermo_lm_eval"} | {"IPython", "pandas", "nbconvert", "tornado", "datasets"}


# Its ``__init__`` runs while Python still looks for the module that ``-m`` names.
PROGRAM = {
    "__init__.py": """
import json, sys
import torch
from transformers import AutoConfig, BertConfig, EsmConfig, LlamaConfig
from transformers import ModernBertConfig, Qwen2Config, Qwen3Config, RobertaConfig
before = set(sys.modules)
import thermo_lib
alone = set(sys.modules) - before
""",
    "main.py": """
from program import alone, json, sys, thermo_lib
assert "quantize" in dir(thermo_lib)
import jinja2.sandbox, numpy, pydantic, safetensors.torch, scipy, tokenizers, tqdm
from transformers import AutoModel, AutoModelForMaskedLM, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
before = set(sys.modules)
name = thermo_lib.quantize.__name__
from thermo_lib import *
print(json.dumps([name, sorted(alone), sorted(set(sys.modules) - before)]))
from transformers.quantizers.auto import AutoHfQuantizer
assert AutoHfQuantizer.supports_quant_method({"quant_method": "thermo"})
""",
}


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, set[str], set[str]]:
    """The name of a function that another package's program got, and the modules that came with ``thermo_lib`` alone
    and with all of its names, without what torch, transformers and the other dependencies import themselves."""
    folder = tmp_path_factory.mktemp("another")
    (folder / "program").mkdir()
    for name, text in PROGRAM.items():
        (folder / "program" / name).write_text(text)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-m", "program.main"]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=True)
    name, alone, everything = json.loads(run.stdout)
    return name, set(alone), set(everything)


@pytest.mark.slow
def test_program_of_another_package_gets_all_names(brought: tuple[str, set[str], set[str]]) -> None:
    assert brought[0] == "quantize"


@pytest.mark.slow
def test_import_brings_nothing_of_the_extras(brought: tuple[str, set[str], set[str]]) -> None:
    _, alone, everything = brought
    new = alone | everything
    assert {"thermo_lib.pipeline.config", "thermo_lib.quant.codes"} < new
    extras = extra_modules()
    assert {"matplotlib", "yaml", "dvc", "papermill", "distributed", "lm_eval", "nbformat", "hypothesis"} < extras
    assert {name for name in new if name.partition(".")[0] in extras} == set()
    # Nor what takes long to import and is needed now and then only.
    assert {name for name in new if name in ("scipy.stats", "scipy.interpolate", PARAMS)} == set()


@pytest.mark.slow
def test_import_brings_no_model_of_transformers(brought: tuple[str, set[str], set[str]]) -> None:
    """They take a second; what they are needed for comes with the first use of a name or of a configuration."""
    _, new, _ = brought
    assert {"thermo_lib", "thermo_lib.models.families", "thermo_lib.integrations.auto"} <= new
    assert {
        name for name in new if name.startswith(("transformers.mod", "scipy", "pydantic", "numpy", "tqdm"))
    } == set()
    assert len([name for name in new if name.startswith("thermo_lib")]) < 15


def test_public_names_are_listed_once_each() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    shown = {alias.name: node.module for node in typed.body for alias in node.names}
    assert shown == {name: f"thermo_lib.{module}" for name, module in thermo_lib._MODULES.items()}
    assert sorted(thermo_lib.__all__) == sorted(shown)
    with pytest.raises(AttributeError, match="module 'thermo_lib' has no attribute 'quantise'"):
        thermo_lib.quantise  # noqa: B018


def test_help_imports_neither_torch_nor_transformers() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "thermo_lib", "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0
    assert run.stdout.startswith("usage: python -m thermo_lib")
    names = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert {"argparse", "thermo_lib.pipeline.presets"} < names
    heavy = {"torch", "transformers", "numpy", "scipy", "pydantic", "tokenizers", "safetensors"}
    assert {name for name in names if name.partition(".")[0] in heavy} == set()


if __name__ == "__main__":
    print(table(arrows()))

"""What an extra of the package brings: where it is missing, the error names the ``pip install``."""

import ast
import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

from thermo_lib.__main__ import main
from thermo_lib.extras import EXTRAS, needs

ROOT = Path(__file__).resolve().parents[2]
# Where the name of the module isn't that of what is installed.
DISTRIBUTIONS = {"IPython": "ipython", "cuda": "cuda-bindings", "humming": "humming-kernels", "yaml": "pyyaml"}


def message(module: str, extra: str) -> str:
    return f'{module}: found none, needed for this; `pip install "thermo_lib[{extra}]"` brings it'


def hide(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a package be missing, also where it has been imported already."""
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)


def test_what_is_there_is_imported() -> None:
    assert needs("yaml").safe_load("a: 1") == {"a": 1}
    assert needs("matplotlib.ticker") is sys.modules["matplotlib.ticker"]


@pytest.mark.parametrize("inside", ["", ".anything"])
@pytest.mark.parametrize(("module", "extra"), EXTRAS.items())
def test_missing_extra_names_the_pip_install(
    module: str, extra: str, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(module, monkeypatch)
    with pytest.raises(ImportError, match=re.escape(message(module, extra))):
        needs(module + inside)


def test_another_missing_module_is_not_blamed_on_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lm_eval.py").write_text("import absent_package\n", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="absent_package"):
        needs("lm_eval")


def test_every_extra_that_is_named_brings_what_is_needed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for module, extra in EXTRAS.items():
        names = [re.split("[<>=]", requirement)[0] for requirement in project["optional-dependencies"][extra]]
        assert DISTRIBUTIONS.get(module, module) in names, f"{extra}: found {names}, expected also {module}"


def test_every_module_that_the_library_needs_belongs_to_an_extra() -> None:
    needed = set()
    for path in (ROOT / "thermo_lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "needs":
                needed.add(ast.literal_eval(node.args[0]).partition(".")[0])
    assert needed == EXTRAS.keys()


@pytest.mark.parametrize(
    ("module", "extra", "user"),
    [
        ("matplotlib", "pipeline", "thermo_lib.evaluation.figures"),
        ("lm_eval", "eval", "thermo_lib.integrations.lm_eval"),
    ],
)
def test_module_of_the_library_without_its_extra(
    module: str, extra: str, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(module, monkeypatch)
    monkeypatch.delitem(sys.modules, user, raising=False)
    with pytest.raises(ImportError, match=re.escape(message(module, extra))):
        importlib.import_module(user)


def test_scheduler_without_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide("distributed", monkeypatch)
    folder = tmp_path / "quantized"
    assert main(["quantize", "preset=fast", "--scheduler", "local", "--output", str(folder)]) == 2
    assert capsys.readouterr().err == f"error: {message('distributed', 'cluster')}\n"
    assert not folder.exists()

"""Triton's kernels under its interpreter, on the CPU."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from thermo_lib.quant import backends

NAMES = [f"thermo_lib.quant.{name}" for name in ("triton_kernels", "integer_kernels")]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[dict[str, ModuleType]]:
    """The modules of kernels by their last name, interpreted as long as a module's tests run."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1")
    for name in NAMES:
        patch.delitem(sys.modules, name, raising=False)
    backends._is_there.cache_clear()
    # What torch has imported before is for a GPU.
    language, interpreter = (importlib.import_module(f"triton.{name}") for name in ("language", "runtime.interpreter"))
    for name in ("sum", "min", "max"):
        function = getattr(language, name)
        if not isinstance(function, interpreter.InterpretedFunction):
            patch.setattr(language, name, interpreter.InterpretedFunction(function.fn))
    yield {name.rpartition(".")[2]: importlib.import_module(name) for name in NAMES}
    patch.undo()
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size is compared anew."""
    monkeypatch.setattr(backends, "_found", {})

"""The wheel by itself: built from the tracked files, installed where no checkout is in sight, and used there."""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tracked import ROOT, copy_tracked

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """The stdout of a command that succeeds, without what points Python at other packages."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environ |= {"PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    no_input = subprocess.DEVNULL
    done = subprocess.run(command, cwd=cwd, env=environ, stdin=no_input, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copy_tracked(source)
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment: the wheel's files first, then the packages of the running environment.

    A folder that a .pth file names is searched, but the .pth files in it aren't read: the editable install is unseen.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = ("-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps")
    run(sys.executable, *pip, wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    running = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (packages / "running_environment.pth").write_text("\n".join(running), encoding="utf-8")
    return python


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing in it."""
    return tmp_path_factory.mktemp("empty")


# README's snippets with arguments that take seconds. Not run: `make repro` and `make test`, which measure all and run
# this test, and `pip install`, which the fixture `installed` does without a network.
SHORT = {
    "calibration = thermo.calibrate(lm)": (
        "from thermo_lib.diffusion.states import calibration_batches\n"
        "few = calibration_batches(lm, sequences=2, puzzles=1)\n"
        "calibration = thermo.calibrate(lm, few, timesteps=4, progress=False)"
    ),
}
ARGUMENTS = {  # of a command line of README, by its verb
    "evaluate": ["--sequences", "2", "--trajectories", "2", "--timesteps", "2"],
}


def blocks(language: str) -> list[str]:
    """README's fenced blocks of a language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


@pytest.fixture(scope="module")
def after_snippets(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder in which README's Python ran, in its order, and what ``installed_library.look`` saw after it."""
    code = "\n".join(blocks("python"))
    for long, short in SHORT.items():
        assert long in code
        code = code.replace(long, short, 1)
    look = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
from installed_library import look
look(lm, calibration, quantized, "reference-2bit")
"""
    folder = tmp_path_factory.mktemp("snippets")
    return folder, json.loads(run(installed, "-c", code + look, cwd=folder).splitlines()[-1])


@pytest.fixture(scope="module")
def found(after_snippets: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """What the script saw."""
    return after_snippets[1]


def test_wheel_holds_every_tracked_file_of_the_library_and_the_plug_in(wheel: Path) -> None:
    tracked = run("git", "ls-files", "-z", "thermo_lib", cwd=ROOT).split("\0")
    expected = {name for name in tracked if (ROOT / name).is_file()}
    plug_in = {name for name in expected if "/lm_eval_plugin/" in name}
    assert {"thermo_lib/quant/kernels.cpp", "thermo_lib/reference/model.safetensors"} < expected
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    moved = {"thermo_lm_eval.pth", "thermo_lm_eval.py"}
    assert moved == {Path(name).name for name in plug_in}
    assert files - plug_in == expected - plug_in | moved


def test_help_of_the_command_line(installed: Path, empty: Path) -> None:
    text = run(installed, "-m", "thermo_lib", "--help", cwd=empty)
    assert "usage: python -m thermo_lib" in text
    assert "quantize" in text


def test_library_is_the_installed_one(installed: Path, found: dict[str, Any]) -> None:
    assert Path(found["file"]).is_relative_to(installed.parents[1])


def test_configuration_is_made_without_a_checkout(found: dict[str, Any]) -> None:
    assert found["default"] is True


def test_models_are_quantized(found: dict[str, Any]) -> None:
    assert found["states"] > 0
    assert 0 < found["gptq"] < 1
    assert 0 < found["data_free"] < 1


def test_saved_model_is_loaded_bit_for_bit(found: dict[str, Any]) -> None:
    assert found["loaded_is_the_same"] is True
    assert found["auto_model"] == "DreamModel"
    assert found["auto_model_is_the_same"] is True


def test_generation_fills_the_masks_and_keeps_the_prompt(found: dict[str, Any]) -> None:
    assert found["prompt_is_kept"] is True
    assert found["masks_left"] == 0


def test_plug_in_is_harmless_without_lm_eval(installed: Path, empty: Path) -> None:
    """Without the packages of the running environment: only the wheel's."""
    code = """
import importlib, sys, types
assert "thermo_lm_eval" in sys.modules
assert not {"torch", "thermo_lib", "lm_eval"} & sys.modules.keys()
sys.path[:] = [path for path in sys.path if not path.endswith("site-packages")]
for parent in (None, types.ModuleType("lm_eval")):
    if parent is not None:
        parent.__path__ = []  # another package of that name, without models
        sys.modules["lm_eval"] = parent
    try:
        importlib.import_module("lm_eval.models")
    except ModuleNotFoundError as error:
        print(error.name)
"""
    assert run(installed, "-c", code, cwd=empty).split() == ["lm_eval", "lm_eval.models"]


def test_readme_snippets_save_a_model(after_snippets: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = after_snippets
    assert {"config.json", "model.safetensors"} <= {path.name for path in (folder / "reference-2bit").iterdir()}


def test_readme_demonstration_prints_what_readme_shows(installed: Path, empty: Path) -> None:
    demonstration, shown = next(
        (one, other)
        for one, other in zip(blocks(""), blocks("")[1:], strict=False)
        if one.startswith("thermo generate --model reference")
    )
    environ_path = f"PATH={installed.parent}:{os.environ['PATH']}"
    assert run("env", environ_path, "bash", "-c", demonstration, cwd=empty) == shown


def test_readme_commands_run(installed: Path, tmp_path: Path) -> None:
    """In their order, on the embedded model, in one process; ``chat`` finds the end of the input."""
    (commands,) = (block for block in blocks("") if block.startswith("thermo quantize"))
    given = []
    for line in commands.replace("DIR", "reference").splitlines():
        name, *words = shlex.split(line)
        assert name == "thermo"
        given.append([*words, *ARGUMENTS.get(words[0], [])])
    code = f"""
from thermo_lib.__main__ import main
print([main(words) for words in {given}])
"""
    assert run(installed, "-c", code, cwd=tmp_path).splitlines()[-1] == str([0] * len(given))
    assert (tmp_path / "OUT" / "config.json").is_file()

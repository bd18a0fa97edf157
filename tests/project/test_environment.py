"""The environment that was locked is the one described for conda, the one installed and the one trained on.

Also checks the set-up in the Makefile: it refuses other platforms, and never takes a half-made environment for
a complete one.
"""

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^\s;+]+)")
ALLOWED = "Python 3.11 on Linux x86_64 or aarch64"


def normalized(name: str) -> str:
    """The one spelling of a distribution's name that PEP 503 compares by."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines: Iterable[str]) -> dict[str, str]:
    """Name to version, from lines of which each is one exact pin."""
    found: dict[str, str] = {}
    for line in lines:
        match = PIN.fullmatch(line)
        assert match, f"{line!r} is not NAME==VERSION with a public version"
        name = normalized(match["name"])
        assert name not in found, f"{name} is pinned twice"
        found[name] = match["version"]
    return found


@pytest.fixture(scope="module")
def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return pins(line for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def conda() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def fake_python(folder: Path, version: str) -> Path:
    """A command that says it is this Python; the Python of its virtual environments kills the make that runs it."""
    command = folder / "fake-python"
    command.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = -c ]; then echo {version}; exit; fi\n'
        "mkdir -p .venv/bin && printf '#!/bin/sh\\nkill -KILL 0\\n' > .venv/bin/python && chmod +x .venv/bin/python\n",
        encoding="utf-8",
    )
    command.chmod(0o755)
    return command


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run make as from a terminal: in its own process group, without what a make around the tests passes down."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments],
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )


def test_lock_and_conda_environment_have_the_same_pins(locked: dict[str, str], conda: dict) -> None:
    (from_pip,) = (entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    assert pins(from_pip) == locked


def test_python_is_3_11_everywhere(conda: dict) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sys.version_info[:2] == (3, 11)
    assert "python=3.11" in conda["dependencies"]
    assert project["requires-python"] == ">=3.11"  # the library itself also runs on later ones


def test_torch_is_2_13_0(locked: dict[str, str]) -> None:
    assert locked["torch"] == "2.13.0"


@pytest.fixture(scope="module")
def direct() -> dict[str, list[tuple[str, str]]]:
    """What pyproject.toml asks for: ``library`` or the name of an extra to pairs of name and oldest version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = {"library": project["dependencies"]} | project["optional-dependencies"]
    ours = normalized(project["name"])
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in lists}
    for name, requirements in lists.items():
        for requirement in requirements:
            if normalized(requirement.partition("[")[0]) == ours:
                named = requirement.partition("[")[2].removesuffix("]").split(",")
                assert set(named) < lists.keys() - {name}, f"{name}: found {requirement}, allowed are {sorted(lists)}"
                continue
            match = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+)", requirement)
            assert match, f"{name}: found {requirement!r}, allowed is NAME>=VERSION"
            found[name].append((normalized(match[1]), match[2]))
    return found


def test_the_library_needs_none_of_what_an_extra_brings(direct: dict[str, list[tuple[str, str]]]) -> None:
    named = [name for requirements in direct.values() for name, _ in requirements]
    assert sorted(set(named)) == sorted(named)


def test_every_direct_dependency_is_locked_at_a_version_that_is_allowed(
    locked: dict[str, str], direct: dict[str, list[tuple[str, str]]]
) -> None:
    def number(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    for extra, requirements in direct.items():
        for name, oldest in requirements:
            assert name in locked, f"{extra}: {name} isn't in requirements.lock"
            assert number(locked[name]) >= number(oldest), (
                f"{extra}: {name} is locked at {locked[name]}, below {oldest}"
            )


def test_what_is_locked_installs_with_the_first_python_3_11() -> None:
    found = importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    every = {each.name: each.metadata.get("Requires-Python") for each in found}
    needed = {name: versions for name, versions in every.items() if versions}
    assert {name for name, versions in needed.items() if "3.11.0" not in SpecifierSet(versions)} == set()
    assert len(needed) > 100


def test_installed_versions_are_the_locked_ones(locked: dict[str, str]) -> None:
    installed = {
        normalized(distribution.name): distribution.version.split("+")[0]
        for distribution in importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    }
    assert {name: installed.get(name, "not installed") for name in locked} == locked


def test_training_data_packages_are_the_locked_ones(locked: dict[str, str]) -> None:
    packages = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["data"]["packages"]
    assert packages.keys() == {"sympy", "networkx", "mpmath"}
    assert packages == {name: locked[name] for name in packages}


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_set_up_accepts_python_3_11_on_linux(arch: str, tmp_path: Path) -> None:
    run = make("check-platform", "OS=Linux", f"ARCH={arch}", f"PYTHON={fake_python(tmp_path, '3.11.9')}")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("version", "system", "arch"),
    [
        ("3.11.9", "Darwin", "x86_64"),
        ("3.11.9", "Darwin", "arm64"),
        ("3.11.9", "Linux", "riscv64"),
        ("3.12.1", "Linux", "x86_64"),
        ("3.1.1", "Linux", "aarch64"),
    ],
)
def test_set_up_rejects_anything_else(version: str, system: str, arch: str, tmp_path: Path) -> None:
    run = make("check-platform", f"OS={system}", f"ARCH={arch}", f"PYTHON={fake_python(tmp_path, version)}")
    assert run.returncode != 0
    message = run.stderr.splitlines()[0]
    assert message == f"thermo_lib needs {ALLOWED}, but found Python {version} on {system} {arch}."


def test_set_up_rejects_a_missing_python(tmp_path: Path) -> None:
    run = make("check-platform", "OS=Linux", "ARCH=x86_64", f"PYTHON={tmp_path / 'absent'}")
    assert run.returncode != 0
    assert f"needs {ALLOWED}, but found Python (none) on Linux x86_64." in run.stderr


@pytest.mark.parametrize("target", ["repro", "test", "lab"])
def test_every_target_checks_the_platform_before_anything(target: str, tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    run = make(target, "OS=Darwin", f"PYTHON={fake_python(tmp_path, '3.11.9')}", cwd=tmp_path)
    assert run.returncode != 0
    assert "found Python 3.11.9 on Darwin" in run.stderr
    assert not (tmp_path / ".venv").exists()


def test_killed_set_up_leaves_no_stamp(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = fake_python(tmp_path, "3.11.9")
    run = make(".venv/.stamp", "OS=Linux", "ARCH=x86_64", f"PYTHON={python}", cwd=tmp_path)
    assert run.returncode == -signal.SIGKILL
    assert "Setting up .venv" in run.stdout
    assert [path.name for path in (tmp_path / ".venv").iterdir()] == ["bin"]

"""Where nothing may be downloaded, a hub id that isn't there says so; and only what needs no network is set so."""

import os
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import constants

from thermo_lib.models.lm import model_folder

ROOT = Path(__file__).parents[2]


def test_a_hub_id_that_is_not_there_offline_says_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model: found 'nobody/nothing', .*; HF_HUB_OFFLINE is set\)"):
        model_folder("nobody/nothing")


def test_online_it_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"reachable hub id \(OSError\)"):
        model_folder("nobody/nothing")


@pytest.mark.parametrize(
    ("target", "expected"), [("repro", "1"), ("test", "1"), ("dream-7b", ""), ("lab", ""), ("peers", "")]
)
def test_make_is_offline_only_where_nothing_may_be_fetched(tmp_path: Path, target: str, expected: str) -> None:
    """Each target's recipe is replaced by one that prints its environment."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    settings = [line for line in lines if "HF_HUB_OFFLINE" in line]
    recipe = f'{target}:\n\t@echo "offline=$$HF_HUB_OFFLINE"'
    (tmp_path / "Makefile").write_text("\n".join([*settings, recipe]) + "\n", encoding="utf-8")
    inherited = ("HF_HUB_OFFLINE", "MAKE", "MFLAGS")  # of the make that runs the tests, where one does
    environment = {key: value for key, value in os.environ.items() if not key.startswith(inherited)}
    run = subprocess.run(["make", target], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"offline={expected}"

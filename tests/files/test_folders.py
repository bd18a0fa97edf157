"""A folder is replaced as a whole or not at all, by one writer at a time."""

import shutil
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from thermo_lib.files.folders import only_writer, write_folder
from thermo_lib.files.outputs import MARKER_NAME
from thermo_lib.models import lm
from thermo_lib.models.lm import DiffusionLM, save_model


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class TestAtomicWrite:
    """A folder is replaced as a whole: a write that fails leaves the earlier one, and nothing beside it."""

    def test_a_failing_write_leaves_the_earlier_folder(
        self, tiny: DiffusionLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_model(tiny, tmp_path / "m")
        before = contents(tmp_path)
        monkeypatch.setattr(lm, "config_json", lambda *_, **__: 1 / 0)  # after the weights are written
        with pytest.raises(ZeroDivisionError):
            save_model(tiny, tmp_path / "m")
        assert contents(tmp_path) == before
        assert [p.name for p in tmp_path.iterdir()] == ["m"]

    def test_a_failing_first_write_leaves_nothing(self, tmp_path: Path) -> None:
        def write(target: Path) -> None:
            (target / "half").write_text("done", encoding="utf-8")
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            write_folder(tmp_path / "m", write)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["m", "model.v1", ".hidden"])
    def test_a_new_folder_replaces_the_earlier_one(self, tmp_path: Path, name: str) -> None:
        def write(target: Path, text: str) -> None:
            for file in ("config.json", text):
                (target / file).write_text(text, encoding="utf-8")

        parent = tmp_path / "made on the way"
        for text in ("first", "second"):
            write_folder(parent / name, partial(write, text=text))
        found = contents(parent)
        assert found.pop(f"{name}/{MARKER_NAME}")
        assert found == {f"{name}/config.json": b"second", f"{name}/second": b"second"}

    def test_a_leftover_of_a_killed_run_does_not_block_the_next(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def write(target: Path) -> None:
            (target / "config.json").write_text("content", encoding="utf-8")

        write_folder(tmp_path / "model.v1", write)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed before the old folder is removed
            write_folder(tmp_path / "model.v1", write)
        write_folder(tmp_path / "model.v1", write)
        assert (tmp_path / "model.v1" / "config.json").read_text(encoding="utf-8") == "content"


class TestOutput:
    """What may be written, and by whom."""

    def test_of_many_writers_one_is_at_work(self, tmp_path: Path) -> None:
        """The lock's file goes and comes back with each of them."""
        working, most = 0, 0

        def write() -> None:
            nonlocal working, most
            for _ in range(20):
                with only_writer(tmp_path / "output", wait=True):
                    working += 1
                    most = max(most, working)
                    time.sleep(0.001)
                    working -= 1

        writers = [threading.Thread(target=write) for _ in range(8)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert most == 1
        assert list(tmp_path.iterdir()) == []

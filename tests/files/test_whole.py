"""Files are replaced whole, by as many writers as like, and killed ones leave nothing behind for long."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from thermo_lib.files.folders import write_folder
from thermo_lib.files.snapshots import Snapshot, remove_damaged
from thermo_lib.files.text import read_json, write_json, write_text
from thermo_lib.files.whole import is_leftover, replacing, replacing_together, sweep_inside, sweep_together

HALF = (500).to_bytes(8, "little") + b'{"x":{"dt'  # of a safetensors file


def killed(work: Callable[[], object]) -> None:
    """Do some work in a process of its own, which kills itself or ends."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestWriters:
    def test_of_many_writers_each_leaves_a_whole_file(self, tmp_path: Path) -> None:
        """A reader finds the content of one of them at every moment."""
        path, done = tmp_path / "content.json", threading.Event()
        contents = [[number] * 5000 for number in range(4)]
        write_json(path, contents[0])
        found, failed = [], []

        def write(content: list[int]) -> None:
            try:
                for _ in range(10):
                    write_json(path, content)
            except BaseException as error:
                failed.append(error)

        def read() -> None:
            while not done.is_set():
                found.append(read_json(path))

        writers = [threading.Thread(target=write, args=(content,)) for content in contents]
        reader = threading.Thread(target=read)
        for thread in (reader, *writers):
            thread.start()
        for writer in writers:
            writer.join()
        done.set()
        reader.join()
        assert failed == []
        assert found
        assert all(content in contents for content in found)
        assert names(tmp_path) == ["content.json"]

    def test_what_a_killed_writer_left_goes_with_the_next_and_what_a_living_one_has_stays(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"

        def half() -> None:
            with replacing(path) as new:
                new.write_text("half", encoding="utf-8")
                die()

        write_text(path, "first")
        killed(half)
        (left,) = set(names(tmp_path)) - {"a.txt"}
        assert path.read_text(encoding="utf-8") == "first"
        with replacing(path) as new:
            new.write_text("outer", encoding="utf-8")
            assert left not in names(tmp_path)
            write_text(path, "inner")
            assert new.read_text(encoding="utf-8") == "outer"
        assert path.read_text(encoding="utf-8") == "outer"
        assert names(tmp_path) == ["a.txt"]

    def test_a_writer_killed_inside_another_library_leaves_nothing_for_long(self, tmp_path: Path) -> None:
        """safetensors writes to a name of its own, and a folder of snapshots may hold such files from before."""
        path = tmp_path / "weights.safetensors"

        def half() -> None:
            with replacing(path) as new:
                new.with_name(".tmpAb3dEf").write_bytes(HALF)
                die()

        killed(half)
        assert len(names(tmp_path)) == 1
        (tmp_path / ".tmpXy1Z9k").write_bytes(HALF)
        (tmp_path / ".tmpfirst1").touch()
        sweep_inside(tmp_path)
        assert names(tmp_path) == []
        for name, content in ((".tmpXy1Z9k", HALF), (".tmpXy1Z9k", b"")):
            (tmp_path / name).write_bytes(content)
            assert is_leftover(tmp_path / name)
        for name in (".tmp", "tmpXy1Z9k.", ".tmpXy1Z9k7"):
            (tmp_path / name).write_bytes(HALF)
            assert not is_leftover(tmp_path / name)

    def test_another_s_files_under_such_names_stay(self, tmp_path: Path) -> None:
        """As far as what is in them tells them apart, also where a writer begins."""
        theirs = {
            ".tmpthesis": "Chapter 1",
            ".web.thermo-thesis.tmp/a": "x",
            ".web.thermo-0123abcd.tmp/chapter 1": "x",
            ".web.chapters.tmp/a": "x",
        }
        for name, text in theirs.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        sweep_inside(tmp_path)
        write_text(tmp_path / "web", "page")
        found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
        assert found == theirs | {"web": "page"}

    @pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
    def test_the_umask_decides_who_may_read(self, tmp_path: Path, umask: int) -> None:
        """Also of what safetensors writes, which only its owner may read."""
        before = os.umask(umask)
        try:
            write_text(tmp_path / "text", "x")
            Snapshot(tmp_path / "snapshot.safetensors", "run").save({"x": torch.zeros(2)})
            write_folder(tmp_path / "folder", lambda new: save_file({"x": torch.zeros(2)}, new / "config.json"))
        finally:
            os.umask(before)
        modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
        assert modes.pop("folder") == 0o777 & ~umask
        assert set(modes.values()) == {0o666 & ~umask}
        assert len(modes) == 4

    def test_through_a_link_the_file_is_replaced_and_the_link_stays(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "made" / "file")
        write_text(tmp_path / "link", "text")
        assert (tmp_path / "made" / "file").read_text(encoding="utf-8") == "text"
        assert (tmp_path / "link").is_symlink()

    def test_an_error_names_the_file_once(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=r"^output: could not write .*file/a.txt \([^;]*\)$"):
            write_text(tmp_path / "file" / "a.txt", "text")
        with pytest.raises(OSError, match=r"^output: could not write .*\); an earlier snapshot is kept"):
            Snapshot(tmp_path / "file" / "s.safetensors", "run").save({"x": torch.zeros(2)})


class TestTogether:
    """Of some files either all are new or none."""

    FILES = ("a.json", "b.txt", "in/c.json")

    def contents(self, folder: Path) -> set[str]:
        return {(folder / name).read_text(encoding="utf-8") for name in self.FILES}

    def write(self, folder: Path, text: str) -> None:
        with replacing_together(folder) as new:
            (new / "in").mkdir()
            for name in self.FILES:
                (new / name).write_text(text, encoding="utf-8")

    @pytest.mark.parametrize("kill", [True, False])
    def test_after_any_rename_all_are_new_or_all_old(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: bool
    ) -> None:
        rename, outcomes = os.replace, []
        for turn in range(5):
            self.write(tmp_path, "old")
            left = turn

            def limited(old: Path, new: Path) -> None:
                nonlocal left
                left -= 1
                if left == -1 and kill:
                    die()
                if left == -1:
                    raise OSError("disk full")
                rename(old, new)

            def attempt() -> None:
                with suppress(OSError):
                    self.write(tmp_path, "new")

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", limited)
                if kill:
                    killed(attempt)
                else:
                    attempt()
            sweep_together(tmp_path)
            (found,) = self.contents(tmp_path)
            outcomes.append(found)
            assert names(tmp_path) == ["a.json", "b.txt", "in"]
        assert outcomes == ["old", "new", "new", "new", "new"]


class TestDamaged:
    """A snapshot counts only if it is what was saved."""

    def test_zeros_in_the_content_are_found(self, tmp_path: Path) -> None:
        kept, damaged = (Snapshot(tmp_path / f"{name}.safetensors", "run") for name in ("kept", "damaged"))
        state = {"x": torch.arange(100.0), "empty": torch.zeros(0), "flag": torch.tensor(True)}
        for snapshot in (kept, damaged):
            snapshot.save(state)
        content = damaged.path.read_bytes()
        damaged.path.write_bytes(content[:-200] + bytes(200))
        assert load_file(damaged.path).keys() == state.keys(), "safetensors can't know"
        with pytest.raises(ValueError, match=r"damaged.safetensors is not a complete snapshot .*changed .*delete it"):
            damaged.load()
        remove_damaged(tmp_path)
        assert names(tmp_path) == ["kept.safetensors"]
        assert all(tensor.equal(state[name]) for name, tensor in kept.load().items())

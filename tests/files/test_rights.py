"""An output that another user's rights would spoil is refused before any work, with the path and its owner."""

import os
import pwd
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from thermo_lib import ThermoConfig, quantize_checkpoint
from thermo_lib.files import outputs
from thermo_lib.files.folders import write_folder
from thermo_lib.files.outputs import mark, may_remove, output_file, output_folder

NOBODY = 65534
LEFT = [".out.partial", ".out.partial.old"]


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder that every user can reach and write in."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def as_nobody(call: Callable[[], object]) -> str:
    """What a call by another user says or raises."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            said = str(call())
        except BaseException as error:  # whatever it is, the child must end here
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    os.wait()
    return said


def filled(folder: Path, mode: int = 0o755) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    mark(folder)
    folder.chmod(mode)
    return folder


class TestAnotherUser:
    @pytest.mark.parametrize("name", ["out", *LEFT])
    def test_a_folder_that_cannot_be_removed_is_named_with_its_owner(self, outside: Path, name: str) -> None:
        path = filled(outside / name)
        said = as_nobody(lambda: output_folder(outside / "out"))
        nobody = pwd.getpwuid(NOBODY).pw_name
        assert said.startswith(f"PermissionError: output: found {path} of user 'root', which can't be removed by")
        assert f"'{nobody}'; let its owner finish or delete it, or name another one" in said
        assert "\n" not in said

    def test_nothing_is_done_before_it_is_said(self, outside: Path) -> None:
        filled(outside / ".out.partial")
        config = ThermoConfig(quantizer="rtn", activation_bits=16, num_time_groups=1)
        assert "of user 'root'" in as_nobody(lambda: quantize_checkpoint("reference", outside / "out", config))
        assert "of user 'root'" in as_nobody(lambda: write_folder(outside / "out", lambda _: 1 / 0))
        assert [path.name for path in outside.iterdir()] == [".out.partial"]

    def test_a_lock_that_cannot_be_opened_is_named(self, outside: Path) -> None:
        (outside / ".out.lock").touch(0o644)
        assert f"found {outside}/.out.lock of user 'root'" in as_nobody(lambda: output_folder(outside / "out"))

    def test_a_folder_in_one_that_is_not_writable_is_refused(self, outside: Path) -> None:
        (outside / "theirs").mkdir()
        said = as_nobody(lambda: output_folder(outside / "theirs/new/out"))
        assert said.startswith(
            f"PermissionError: output: found {outside}/theirs of user 'root', which can't be written"
        )

    def test_a_sticky_folder_keeps_what_is_in_it(self, outside: Path) -> None:
        path = filled(outside / "out", 0o777)
        assert as_nobody(lambda: output_folder(path)) == str(path)
        outside.chmod(0o1777)
        assert f"found {path} of user 'root'" in as_nobody(lambda: output_folder(path))

    def test_what_can_be_removed_is_no_hindrance(self, outside: Path) -> None:
        for name in LEFT:
            filled(outside / name, 0o777)
        (outside / "out").mkdir()  # empty
        assert as_nobody(lambda: output_folder(outside / "out")) == str(outside / "out")

    def test_a_file_that_cannot_be_replaced_is_refused_as_a_folder_is(self, outside: Path) -> None:
        path = outside / "out.json"
        path.write_text("{}")
        assert as_nobody(lambda: output_file(path)) == str(path)  # to replace it, its folder's rights are enough
        outside.chmod(0o1777)
        assert f"PermissionError: output: found {path} of user 'root', which can't be removed" in as_nobody(
            lambda: output_file(path)
        )
        outside.chmod(0o755)
        assert f"PermissionError: output: found {outside} of user 'root', which can't be written in" in as_nobody(
            lambda: output_file(path)
        )


class TestWithoutAnother:
    """The same decisions where no other user can be had."""

    def test_a_folder_without_rights_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        partial = filled(tmp_path / ".out.partial")
        allowed = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != partial and allowed(path, mode))
        assert not may_remove(partial)
        with pytest.raises(
            PermissionError, match=r"output: found .*/\.out\.partial of user .*, which can't be removed"
        ):
            output_folder(tmp_path / "out")

    def test_an_owner_without_a_name_has_a_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(_: int) -> None:
            raise KeyError

        monkeypatch.setattr(pwd, "getpwuid", unknown)
        assert outputs._user(1234) == "user 1234"

    def test_a_mount_point_cannot_be_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
        with pytest.raises(ValueError, match=r"output: found .*, a mount point; allowed is"):
            output_folder(tmp_path / "out")

"""What this project wrote may be replaced; everything else is refused before any work, with what was found."""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoModel

from thermo_lib.files import folders
from thermo_lib.files.folders import write_folder
from thermo_lib.files.locks import locked
from thermo_lib.files.outputs import MARKER_NAME, RUN_NAME, output_file, output_folder
from thermo_lib.files.whole import settle
from thermo_lib.models.lm import DiffusionLM, load_model, save_model

OURS = {"config.json": '{"quantization_config": {"quant_method": "thermo"}}'}
RUN = '{"configuration": {}, "format version": 1, "shards": {}}'
TRAINED = {"training.json": '{"settings": {}, "code_loss": [], "planning_loss": []}'}


def written(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def saved(folder: Path) -> Path:
    """A folder with the marker, of a full-precision model."""
    write_folder(folder, lambda new: written(new, {"config.json": "{}", "model.safetensors": "x", "in/a.jinja": ""}))
    return folder


class TestFolders:
    @pytest.mark.parametrize(
        ("files", "found"),
        [
            ({"config.json": '{"name": "app"}', "thesis.tex": "x"}, "config.json, thesis.tex"),
            ({"config.json": '{"model_type": "qwen2"}', "model.safetensors": "x"}, "config.json, model.safetensors"),
            (OURS | {"thesis.tex": "x"}, "thesis.tex"),
            (OURS | {"notes/a": "x"}, "notes/a"),
            (OURS | {"model.safetensors.bak": "x", "b": "", "c": "", "d": ""}, "b, c, d and 1 more"),
            ({"config.json": '{"quantization_config": {"quant_method": "gptq"}}'}, "config.json"),
            ({"config.json": "not JSON"}, "config.json"),
            ({"training.json": "{}", "config.json": "{}"}, "config.json, training.json"),
            ({MARKER_NAME: "{}", "config.json": "{}"}, f"config.json, {MARKER_NAME}"),
            ({MARKER_NAME: '{"title": "my thesis"}'}, MARKER_NAME),
            (OURS | {RUN_NAME: '{"distance": "42 km"}'}, RUN_NAME),
            (OURS | {".tmpthesis": "Chapter 1"}, ".tmpthesis"),
            (OURS | {".config.json.thermo-0123abcd.tmp/thesis": "x"}, ".config.json.thermo-0123abcd.tmp/thesis"),
            (OURS | {"snapshots/a.safetensors": "x"}, "snapshots/a.safetensors"),
            ({MARKER_NAME: '{"files": ["a.tex"], "config": "0"}', "a.tex": "x"}, "a.tex"),
        ],
    )
    def test_what_this_project_did_not_write_is_refused(
        self, tmp_path: Path, files: Mapping[str, str], found: str
    ) -> None:
        folder = written(tmp_path / "out", files)
        with pytest.raises(ValueError, match="a folder with something else in it") as caught:
            output_folder(folder)
        assert f"something else in it ({found}); allowed is" in str(caught.value)
        with pytest.raises(ValueError, match="a folder with something else in it"):
            write_folder(folder, lambda _: pytest.fail("began to write"))
        assert {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()} == files

    @pytest.mark.parametrize(
        "files",
        [
            OURS,
            OURS | {"model-00001-of-00002.safetensors": "", "tokenizer.json": "", "run.json": "", ".tmpAb3dEf": ""},
            OURS | {"additional_chat_templates/rag.jinja": ""},
            TRAINED | {"config.json": "{}", "model.safetensors": "", "tokenizer.json": ""},
        ],
    )
    def test_folders_from_before_the_marker_are_known(self, tmp_path: Path, files: Mapping[str, str]) -> None:
        folder = written(tmp_path / "out", files)
        assert output_folder(folder) == folder

    @pytest.mark.parametrize("name", [".web.partial", ".web.partial.old"])
    def test_another_s_folder_under_a_reserved_name_is_refused_before_any_work(self, tmp_path: Path, name: str) -> None:
        for files, found in (
            ({"thesis.tex": "x"}, "thesis.tex"),
            ({RUN_NAME: '{"distance": "42 km"}'}, RUN_NAME),
            ({RUN_NAME: RUN, "notes/thesis.tex": "x"}, "notes/thesis.tex"),
            ({".hidden": "x"}, ".hidden"),
        ):
            folder = written(tmp_path / name, files)
            for call in (output_folder, partial(write_folder, write=lambda _: pytest.fail("began to write"))):
                with pytest.raises(
                    ValueError, match=r"output: found '.*', a folder with something else in it"
                ) as error:
                    call(tmp_path / "web")
                assert f"{name}', a folder with something else in it ({found}); allowed is" in str(error.value)
            assert {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()} == files
            shutil.rmtree(folder)
        (tmp_path / name).write_text("thesis")
        with pytest.raises(ValueError, match=f"{name}', something else than a folder; allowed is"):
            output_folder(tmp_path / "web")
        assert (tmp_path / name).read_text() == "thesis"

    @pytest.mark.parametrize(
        "files",
        [
            {".run.json.thermo-0123abcd.tmp/run.json": "{"},
            {RUN_NAME: RUN, "model-00001-of-00002.safetensors": "x", "snapshots/weights-0.safetensors": "x"},
            {RUN_NAME: "\0\0", "model-00001-of-00002.safetensors": "x", "snapshots/.snapshots.lock": ""},
        ],
    )
    def test_an_unfinished_folder_of_this_project_is_known(self, tmp_path: Path, files: Mapping[str, str]) -> None:
        written(tmp_path / ".web.partial", files)
        assert output_folder(tmp_path / "web") == tmp_path / "web"

    def test_another_s_file_in_the_place_of_the_lock_is_refused(self, tmp_path: Path) -> None:
        lock = tmp_path / ".web.lock"
        for make, remove in (
            (lambda: lock.write_text("thesis"), lock.unlink),
            (lambda: lock.symlink_to("/dev/null"), lock.unlink),
            (lock.mkdir, lock.rmdir),
        ):
            make()
            for call in (output_folder, output_file, lambda path: locked(path).__enter__()):
                with pytest.raises(ValueError, match=r"found '.*/\.web\.lock', which isn't a lock of this project"):
                    call(tmp_path / "web")
            assert [path.name for path in tmp_path.iterdir()] == [".web.lock"]
            remove()

    def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, listed = written(saved(tmp_path / "web"), {"private/thesis.tex": "x"}), os.scandir

        def scandir(path: str) -> object:
            if str(path).endswith("private"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return listed(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", scandir)
            with pytest.raises(PermissionError, match=r"found .*/web/private of user .*, which can't be listed by"):
                output_folder(folder)
            with pytest.raises(PermissionError, match="private"):
                settle(folder)
        assert (folder / "private" / "thesis.tex").read_text() == "x"

    @pytest.mark.parametrize("swaps", [True, False])
    def test_a_folder_keeps_its_rights_when_it_is_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
    ) -> None:
        """Those of its files are what the umask leaves."""
        if not swaps:
            monkeypatch.setattr(folders, "_exchange", lambda *_: False)
        folder = saved(tmp_path / "web")
        folder.chmod(0o2710)
        (folder / "config.json").chmod(0o600)
        before, modes = os.umask(0o022), []
        try:
            saved(folder)
            modes = [path.stat().st_mode & 0o7777 for path in (folder, folder / "config.json", folder / "in")]
        finally:
            os.umask(before)
        assert modes == [0o2710, 0o644, 0o755]

    def test_a_marked_folder_is_replaced_until_something_else_is_in_it(self, tmp_path: Path) -> None:
        folder = saved(saved(tmp_path / "out"))
        assert json.loads((folder / MARKER_NAME).read_text())["files"] == [
            "config.json",
            "in/a.jinja",
            "model.safetensors",
        ]
        (folder / "thesis.tex").touch()
        with pytest.raises(ValueError, match=r"something else in it \(thesis\.tex\)"):
            output_folder(folder)
        (folder / "thesis.tex").unlink()
        (folder / "empty").mkdir()
        with pytest.raises(ValueError, match=r"something else in it \(empty\)"):
            output_folder(folder)

    def test_what_comes_while_it_is_written_stays(self, tmp_path: Path) -> None:
        def write(new: Path) -> None:
            written(new, {"config.json": "{}"})
            (folder / "thesis.tex").touch()

        folder = saved(tmp_path / "out")
        with pytest.raises(ValueError, match=r"something else in it \(thesis\.tex\)"):
            write_folder(folder, write)
        assert (folder / "model.safetensors").read_text() == "x"

    def test_what_is_kept_stays(self, tmp_path: Path) -> None:
        folder = written(tmp_path / "out", TRAINED | {"config.json": "{}", "README.md": "about"})
        with pytest.raises(ValueError, match=r"something else in it \(README\.md\)"):
            output_folder(folder)
        write_folder(folder, lambda new: written(new, {"config.json": "{}"}), kept=["README.md", "absent"])
        assert {path.name for path in folder.iterdir()} == {"config.json", "README.md", MARKER_NAME}
        assert (folder / "README.md").read_text() == "about"

    def test_a_model_that_transformers_saved_over_ours_is_not_ours(self, tiny: DiffusionLM, tmp_path: Path) -> None:
        """Though the marker is still there."""
        save_model(tiny, tmp_path / "out")
        assert output_folder(tmp_path / "out")
        AutoModel.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "out")
        assert (tmp_path / "out" / MARKER_NAME).is_file()
        with pytest.raises(ValueError, match="a folder with something else in it"):
            save_model(tiny, tmp_path / "out")
        load_model(str(tmp_path / "out"))


class TestFiles:
    def test_what_is_no_file_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "folder").mkdir()
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "file").touch()
        for name, found in {
            "folder": "a folder",
            "pipe": "something else than a file",
            "": "a folder",
            "file/in": "which isn't a folder",
        }.items():
            with pytest.raises(ValueError, match=rf"output: found '.*', {found}; allowed is"):
                output_file(tmp_path / name if name else name)
        with pytest.raises(ValueError, match=r"output: found '/dev/null', something else than a file; allowed is"):
            output_file("/dev/null")
        assert output_file(tmp_path / "new" / "file") == tmp_path / "new" / "file"

    def test_a_part_of_the_same_file_system_that_is_mounted_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a container mounts a single file."""
        read, path = Path.read_bytes, tmp_path / "a file"
        path.touch()
        line = f"36 35 98:0 /mnt {tmp_path}/a\\040file rw,noatime - ext4 /dev/root rw\n"
        table = lambda self: line.encode() if str(self) == "/proc/self/mountinfo" else read(self)  # noqa: E731
        monkeypatch.setattr(Path, "read_bytes", table)
        with pytest.raises(ValueError, match=r"output: found '.*/a file', a mount point; allowed is"):
            output_file(path)

    def test_only_a_report_with_the_same_keys_is_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "report.json"
        for text in ("", '{"rows": 1, "more": 2}'):
            path.write_text(text)
            assert output_file(path, ["rows"]) == path
        for text in ("thesis", "[1]", '{"chapters": []}'):
            path.write_text(text)
            with pytest.raises(ValueError, match=r"something else than such a report \(no rows\); allowed is"):
                output_file(path, ["rows"])

    def test_only_a_file_that_begins_so_is_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "page.html"
        for text in ("", "<html><title>My report on", 990 * " " + "<title>My"):
            path.write_text(text)
            assert output_file(path, begins=b"<title>My") == path
        for text in ("thesis", 1000 * " " + "<title>My"):
            path.write_text(text)
            with pytest.raises(ValueError, match=r"a file with something else than such a page; allowed is"):
                output_file(path, begins=b"<title>My")

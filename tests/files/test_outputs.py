"""What this project wrote may be replaced; everything else is refused before any work, with what was found."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import AutoModel

from thermo_lib.files.folders import write_folder
from thermo_lib.files.outputs import MARKER_NAME, output_file, output_folder
from thermo_lib.models.lm import DiffusionLM, load_model, save_model

OURS = {"config.json": '{"quantization_config": {"quant_method": "thermo"}}'}
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
            ({MARKER_NAME: "{}", "config.json": "{}"}, "config.json"),
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

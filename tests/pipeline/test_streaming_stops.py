"""Whatever stops a streamed quantization, the next call goes on to the same bytes."""

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import ended_by
from safetensors.torch import load_file, save_file
from small_runs import every_nth
from streamed import EARLIER, _stop_at_second, configured, files, shard_of, states_of, unfinished
from torch import Tensor

from thermo_lib import Calibration, ThermoConfig
from thermo_lib.files import folders
from thermo_lib.models.lm import save_model
from thermo_lib.pipeline import streaming
from thermo_lib.pipeline.streaming import quantize_checkpoint

TRAINING = (
    {"phase": "sequential", "steps": 1, "batch": 4},
    {"phase": "path_kl", "what": "network", "steps": 2, "batch": 4},
)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("several_shards")]


GPTQ = {"quantizer": "gptq", "group_size": None, "timesteps": 2}  # a layer in one group, which takes the least time


def few_states(source: Path) -> Calibration:
    """At two timesteps, as a stopped run computes much again."""
    return every_nth(states_of(source), 4)


class TestInterrupted:
    def test_killed_after_a_shard_it_goes_on_with_the_same_bytes(
        self, write: Callable[..., Path], tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = write()
        quantize_checkpoint(source, tmp_path / "whole", configured())
        save, calls = streaming.save_file, []

        def killed(tensors: dict[str, Tensor], path: Path, **more: Any) -> None:
            """The process kills itself in the middle of its third shard, with half a file written."""
            calls.append(path)
            if len(calls) == 3:
                path.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            save(tensors, path, **more)

        with monkeypatch.context() as patch:
            patch.setattr(streaming, "save_file", killed)
            assert ended_by(lambda: quantize_checkpoint(source, output, configured())) == signal.SIGKILL
        assert files(output) == EARLIER
        kept = {path.name: path.stat().st_mtime_ns for path in unfinished(output).glob("*.safetensors")}
        assert len(kept) == 2
        quantize_checkpoint(source, output, configured())
        assert files(output) == files(tmp_path / "whole")
        assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept
        assert not unfinished(output).exists()

    @pytest.mark.parametrize(
        ("fields", "swaps"),
        [
            ({}, True),
            (GPTQ, False),
            ({"quantizer": "trellis", "timesteps": 2, "average_bits": 2.2, "training": TRAINING}, True),
        ],
    )
    def test_every_single_write_may_be_the_last(
        self,
        write: Callable[..., Path],
        tmp_path: Path,
        output: Path,
        monkeypatch: pytest.MonkeyPatch,
        fields: dict[str, Any],
        swaps: bool,
    ) -> None:
        """The same call goes on each time; its work is repeated at most for one shard, or one block."""
        if not swaps:
            monkeypatch.setattr(folders, "_exchange", lambda *_: False)
        source, config = write(), configured(**fields)
        calibration = few_states(source) if config.needs_calibration else None
        quantize_checkpoint(source, tmp_path / "whole", config, calibration)
        rename, left = os.replace, 0

        def limited(old: Any, new: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            rename(old, new)

        stops = 0
        for allowed in range(100):
            left = allowed
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", limited)
                try:
                    quantize_checkpoint(source, output, config, calibration)
                except KeyboardInterrupt:
                    stops += 1
                else:
                    break
            retired = output.with_name(f".{output.name}.partial.old")
            found = [files(path) for path in (output, retired) if path.exists()]
            for each in found:
                each.pop(streaming.RUN_NAME, None)  # of a new one, until its end
            assert EARLIER in found or files(tmp_path / "whole") in found
        assert stops > 3
        assert files(output) == files(tmp_path / "whole")

    @pytest.mark.parametrize("swaps", [True, False])
    def test_stopped_at_its_end_a_run_has_nothing_to_redo(
        self,
        write: Callable[..., Path],
        tmp_path: Path,
        output: Path,
        monkeypatch: pytest.MonkeyPatch,
        swaps: bool,
    ) -> None:
        """Whatever is renamed, swapped or removed in the end, the next call computes nothing."""
        source, config = write(), configured(**GPTQ)
        calibration = few_states(source)
        quantize_checkpoint(source, tmp_path / "whole", config, calibration)
        whole, stops, computed = files(tmp_path / "whole"), 0, tmp_path / "computed"
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "save_tokenizer", Steps(-1).limited(streaming.save_tokenizer))
            with pytest.raises(KeyboardInterrupt):
                quantize_checkpoint(source, output, config, calibration)
        unfinished(output).rename(computed)
        for allowed in range(100):
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir()
            (output / "config.json").write_bytes(EARLIER["config.json"])
            shutil.copytree(computed, unfinished(output))
            steps = Steps(allowed)
            with monkeypatch.context() as patch:
                if not swaps:
                    patch.setattr(folders, "_exchange", lambda *_: False)
                patch.setattr(streaming, "save_tokenizer", steps.begin(streaming.save_tokenizer))
                for module, name in ((os, "replace"), (shutil, "rmtree"), (folders, "_exchange")):
                    patch.setattr(module, name, steps.limited(getattr(module, name)))
                with suppress(KeyboardInterrupt):
                    quantize_checkpoint(source, output, config, calibration)
            found = files(output) if output.exists() else None
            if found:
                found.pop(streaming.RUN_NAME, None)
            assert found in (whole, EARLIER) or (found is None and not swaps)
            with monkeypatch.context() as patch:
                patch.setattr(streaming, "_stored", lambda *_: 1 / 0)
                patch.setattr(streaming, "quantize", lambda *_, **__: 1 / 0)
                if steps.left >= 0:
                    break
                quantize_checkpoint(source, output, config, calibration)
            stops += 1
            assert files(output) == whole
            assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        assert stops >= (2 if swaps else 3)

    def test_an_output_that_was_set_aside_is_back_whatever_comes_next(
        self, write: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, rename = write(), os.replace

        def stopped(old: Any, new: Any) -> None:
            if Path(new) == output:
                raise KeyboardInterrupt
            rename(old, new)

        with monkeypatch.context() as patch:
            patch.setattr(folders, "_exchange", lambda *_: False)
            patch.setattr(os, "replace", stopped)
            with suppress(KeyboardInterrupt):
                quantize_checkpoint(source, output, configured())
        assert not output.exists()
        (source / "tokenizer.json").unlink()
        with pytest.raises(ValueError, match=r"no tokenizer\.json"):
            quantize_checkpoint(source, output, configured())
        assert files(output) == EARLIER

    @pytest.mark.parametrize(
        "named",
        [
            "number of threads",
            "torch version",
            "tokenizer.json",
            "chat_template.jinja",
            "format version",
        ],
    )
    def test_whatever_else_the_result_depends_on_is_refused_by_its_name(
        self,
        write: Callable[..., Path],
        output: Path,
        monkeypatch: pytest.MonkeyPatch,
        named: str,
    ) -> None:
        source, config = write(), configured(**GPTQ)
        calibration = few_states(source)
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "_write", _stop_at_second(streaming._write))
            with suppress(KeyboardInterrupt):
                quantize_checkpoint(source, output, config, calibration)
        if named == "number of threads":
            monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
        elif named == "torch version":
            monkeypatch.setattr(torch, "__version__", "1.0.0")
        elif named == "format version":
            monkeypatch.setattr(ThermoConfig, "format_version", 1000)
        elif named == "tokenizer.json":
            path = source / named
            path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        else:
            (source / named).write_text("{{ messages }}", encoding="utf-8")
        with pytest.raises(ValueError, match=f"unfinished run of another {named} in"):
            quantize_checkpoint(source, output, config, calibration)

    @pytest.mark.parametrize("changed", ["configuration", "config.json", "shard"])
    def test_another_source_or_configuration_is_refused_until_the_folder_is_deleted(
        self, write: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch, changed: str
    ) -> None:
        source, config = write(), configured()
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "_stored", _stop_at_second(streaming._stored))
            with pytest.raises(KeyboardInterrupt):
                quantize_checkpoint(source, output, config)
        if changed == "configuration":
            config, named = configured(group_size=8), "configuration"
        elif changed == "config.json":
            path, named = source / "config.json", "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}), encoding="utf-8")
        else:
            path = shard_of(source, "model.norm.weight")
            named = path.name
            tensors = load_file(path)
            save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2}, path)
        kept = files(unfinished(output))
        with pytest.raises(ValueError, match=f"unfinished run of another {named} in .*delete that folder"):
            quantize_checkpoint(source, output, config)
        assert files(unfinished(output)) == kept
        assert files(output) == EARLIER

    def test_a_full_disk_leaves_what_was_there_and_the_next_call_goes_on(
        self, write: Callable[..., Path], tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = write()
        quantize_checkpoint(source, tmp_path / "whole", configured())

        def full(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(streaming, "save_file", full)
            with pytest.raises(OSError, match=r"output: could not write .*No space left on device.*goes on"):
                quantize_checkpoint(source, output, configured())
        assert files(output) == EARLIER
        assert [path.name for path in unfinished(output).iterdir()] == [streaming.RUN_NAME]
        quantize_checkpoint(source, output, configured())
        assert files(output) == files(tmp_path / "whole")

    def test_snapshots_that_cannot_be_removed_are_not_in_the_output(
        self, write: Callable[..., Path], tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = write()
        config = configured(**GPTQ)
        calibration = few_states(source)
        quantize_checkpoint(source, tmp_path / "whole", config, calibration=calibration)
        unlink = os.unlink

        def fail(path: Any, *more: Any, **named: Any) -> None:
            if str(path).endswith(".safetensors") and named.get("dir_fd") is not None:  # as a folder is removed
                raise OSError(errno.EIO, "Input/output error")
            unlink(path, *more, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", fail)
            with pytest.raises(OSError, match="Input/output error"):
                quantize_checkpoint(source, output, config, calibration=calibration)
        assert files(output) == EARLIER
        quantize_checkpoint(source, output, config, calibration=calibration)
        assert files(output) == files(tmp_path / "whole")

    @pytest.mark.parametrize("fields", [{}, GPTQ], ids=["least_squares", "gptq"])
    def test_no_file_may_be_larger_than_the_disk(
        self, write: Callable[..., Path], tmp_path: Path, output: Path, fields: dict[str, Any]
    ) -> None:
        """Each limit stops another file; the run goes on as the limit rises."""
        source, config = write(), configured(**fields)
        calibration = few_states(source) if config.needs_calibration else None
        quantize_checkpoint(source, tmp_path / "whole", config, calibration)
        largest = max(len(content) for content in files(tmp_path / "whole").values())
        stopped = set()
        for limit in (0, 1000, 2000, 3000, 4000, largest - 1):
            with pytest.raises(OSError, match=r"output: could not write .*; ") as caught, file_limit(limit):
                quantize_checkpoint(source, output, config, calibration)
            stopped.add(str(caught.value).split()[4])
            assert files(output) == EARLIER
            assert list(output.parent.glob("**/*.tmp")) == []
        assert len(stopped) > 2
        quantize_checkpoint(source, output, config, calibration)
        assert files(output) == files(tmp_path / "whole")

    def test_a_model_that_is_larger_than_the_disk_leaves_the_earlier_one(self, tiny: Any, tmp_path: Path) -> None:
        save_model(tiny, tmp_path / "m")
        earlier = files(tmp_path / "m")
        for limit in (0, len(earlier["tokenizer.json"]) - 1, len(earlier["model.safetensors"]) - 1):
            with pytest.raises(OSError, match=r"output: could not write .*/m .*; an earlier"), file_limit(limit):
                save_model(tiny, tmp_path / "m")
            assert files(tmp_path / "m") == earlier
            assert [path.name for path in tmp_path.iterdir()] == ["m"]


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Steps:
    """Counts calls from a moment on, and stops the run at the call after ``left``."""

    def __init__(self, left: int):
        self.left, self.counts = left, False

    def begin(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, after which calls count."""

        def called(*arguments: Any) -> None:
            function(*arguments)
            self.counts = True

        return called

    def limited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, a call of which counts; all that follow a stop are stopped too, as in a dead process."""

        def called(*arguments: Any, **more: Any) -> Any:
            self.left -= self.counts
            if self.left < 0:
                raise KeyboardInterrupt
            return function(*arguments, **more)

        return called

"""Streamed quantization: the same model as in memory, whatever stops it on the way."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
import pytest
import torch
from distributed import Client, LocalCluster
from layouts import BOTH, DREAM, DREAM_7B, LLADA_8B, Layout, stored
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from thermo_lib import Calibration, ThermoConfig, calibrate, load_model, load_quantized, quantize, save_quantized
from thermo_lib.files import folders
from thermo_lib.files.folders import only_writer, write_folder
from thermo_lib.models.architectures import build_model, read_config
from thermo_lib.models.lm import save_model
from thermo_lib.pipeline import streaming
from thermo_lib.pipeline.streaming import calibration_states, quantize_checkpoint

SMALL = {"group_size": 16, "activation_bits": 16, "num_time_groups": 1}
ALL_IN_TWO = 2**12  # bytes of a shard: every checkpoint here takes several


def configured(**fields: Any) -> ThermoConfig:
    return ThermoConfig(**(SMALL | {"quantizer": "least_squares"} | fields))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def state(folder: Path) -> dict[str, Tensor]:
    """All parameters and buffers of a quantized model."""
    model = load_quantized(folder).model
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.fixture(autouse=True)
def several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_SHARD_BYTES", ALL_IN_TWO)
    monkeypatch.setattr(streaming, "_ROWS_BYTES", 2**10)  # a tensor is read in several parts


@pytest.fixture
def write(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Writes a checkpoint of a layout with changed settings."""

    def make(layout: Layout = DREAM, **changes: Any) -> Path:
        return layout.write(tmp_path / "source", tokenizer, **changes)

    return make


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where an earlier output is, which only a complete new one may replace."""
    path = tmp_path / "output"
    path.mkdir()
    (path / "config.json").write_text("earlier", encoding="utf-8")
    return path


def states_of(source: Path) -> Calibration:
    """Random calibration states at all of 8 timesteps, in two lengths."""
    lm, generator = load_model(str(source)), torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(0, lm.model.config.vocab_size - 1, (3, length), generator=generator), None) for length in (7, 5)
    ]
    return calibrate(lm, batches, timesteps=8, source="forward", seed=0, progress=False)


def unfinished(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


def shard_of(source: Path, name: str) -> Path:
    index = json.loads((source / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return source / index["weight_map"][name]


class TestResult:
    @BOTH
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"quantizer": "rtn"},
            {"embedding_bits": 8},
            {"quantizer": "rtn", "embedding_bits": 8, "bit_width": 4},
            {"activation_bits": 4, "activation_ranges": "dynamic"},
        ],
        ids=str,
    )
    def test_it_is_the_model_that_is_quantized_in_memory(
        self, write: Callable[..., Path], tmp_path: Path, layout: Layout, fields: dict[str, Any]
    ) -> None:
        source, config = write(layout), configured(**fields)
        quantize_checkpoint(source, tmp_path / "streamed", config)
        save_quantized(quantize(load_model(str(source)), config), tmp_path / "in memory")
        streamed, expected = state(tmp_path / "streamed"), state(tmp_path / "in memory")
        assert streamed.keys() == expected.keys()
        for name, tensor in expected.items():
            assert streamed[name].dtype == tensor.dtype, name
            assert torch.equal(streamed[name], tensor), name
        found, wanted = (files(tmp_path / name) for name in ("streamed", "in memory"))
        assert found["tokenizer.json"] == wanted["tokenizer.json"]
        # The type of what isn't quantized: the checkpoint's own, or that of the model in memory.
        about = [{k: v for k, v in json.loads(f["config.json"]).items() if k != "torch_dtype"} for f in (found, wanted)]
        assert about[0] == about[1]
        assert not unfinished(tmp_path / "streamed").exists()

    @BOTH
    @pytest.mark.parametrize(
        "fields",
        [
            {"quantizer": "gptq"},
            {"quantizer": "gptq", "embedding_bits": 8, "activation_bits": 4, "activation_ranges": "dynamic"},
            {"quantizer": "gptq", "num_time_groups": 2, "enable_boundary_smoothing": True},
            {"quantizer": "least_squares", "num_time_groups": 2},
            {"quantizer": "trellis"},
        ],
        ids=str,
    )
    def test_block_by_block_it_is_the_model_that_is_calibrated_in_memory(
        self, write: Callable[..., Path], tmp_path: Path, layout: Layout, fields: dict[str, Any]
    ) -> None:
        source, config = write(layout), configured(timesteps=8, **fields)
        calibration = states_of(source)
        quantize_checkpoint(source, tmp_path / "streamed", config, calibration)
        save_quantized(quantize(load_model(str(source)), config, calibration), tmp_path / "in memory")
        streamed, expected = state(tmp_path / "streamed"), state(tmp_path / "in memory")
        assert streamed.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(streamed[name], tensor), name
        assert not unfinished(tmp_path / "streamed").exists()

    def test_a_tied_head_shares_the_codes(self, write: Callable[..., Path], tmp_path: Path) -> None:
        source = write(DREAM, tie_word_embeddings=True)
        quantize_checkpoint(source, tmp_path / "copy", configured(embedding_bits=8))
        head = shard_of(source, "lm_head.weight")
        tensors = load_file(head)
        del tensors["lm_head.weight"]
        save_file(tensors, head)
        quantize_checkpoint(source, tmp_path / "streamed", configured(embedding_bits=8))
        model = load_quantized(tmp_path / "streamed").model
        assert model.lm_head.packed is model.model.embed_tokens.packed
        assert files(tmp_path / "copy") == files(tmp_path / "streamed"), "a copy of the tied head is left out"

    def test_shards_hold_what_their_index_says(self, write: Callable[..., Path], tmp_path: Path) -> None:
        quantize_checkpoint(write(), tmp_path / "streamed", configured())
        index = json.loads((tmp_path / "streamed/model.safetensors.index.json").read_text(encoding="utf-8"))
        shards = sorted((tmp_path / "streamed").glob("*.safetensors"))
        assert len(shards) > 2
        assert [path.name for path in shards] == [
            f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
        ]
        assert index["weight_map"] == {name: path.name for path in shards for name in load_file(path)}
        assert index["metadata"]["total_size"] == sum(path.stat().st_size for path in shards)

    @pytest.mark.parametrize("released", [DREAM_7B, LLADA_8B], ids=["Dream", "LLaDA"])
    def test_the_size_at_two_bits(self, tmp_path: Path, released: dict[str, Any]) -> None:
        """Groups of 128, embeddings and head in 8 bits; what isn't coded in bfloat16."""
        (tmp_path / "config.json").write_text(json.dumps(released), encoding="utf-8")
        with torch.device("meta"):
            model = build_model(read_config(tmp_path))
        size = 0
        for module in model.modules():
            for name, tensor in module.named_parameters(recurse=False):
                if name == "weight" and isinstance(module, nn.Linear | nn.Embedding):
                    bits = 8 if len(tensor) == model.config.vocab_size else 2
                    size += tensor.numel() * bits // 8 + 2 * 2 * len(tensor) * -(-tensor.shape[1] // 128)
                else:
                    size += 2 * tensor.numel()
        assert 2.9e9 < size <= 3.2e9

    def test_bytes_are_those_of_the_shapes(self, write: Callable[..., Path], tmp_path: Path) -> None:
        """What the sizes above count."""
        source = write()
        quantize_checkpoint(source, tmp_path / "streamed", configured(embedding_bits=8))
        expected = 0
        for name, tensor in stored(source).items():
            bits = 8 if "embed" in name or "lm_head" in name else 2
            coded = tensor.ndim == 2
            codes = tensor.shape[0] * -(-tensor.shape[1] * bits // 8) if coded else 0
            expected += codes + 4 * len(tensor) * -(-tensor.shape[1] // 16) if coded else 2 * tensor.numel()
        found = stored(tmp_path / "streamed").values()
        assert sum(tensor.numel() * tensor.element_size() for tensor in found) == expected


class TestInterrupted:
    def test_killed_after_a_shard_it_goes_on_with_the_same_bytes(
        self, write: Callable[..., Path], tmp_path: Path, output: Path
    ) -> None:
        source = write()
        quantize_checkpoint(source, tmp_path / "whole", configured())
        # The process kills itself in the middle of its third shard, with half a file written.
        script = f"""
import os, signal
from thermo_lib import ThermoConfig, streaming
streaming._SHARD_BYTES, streaming._ROWS_BYTES = {ALL_IN_TWO}, {2**10}
save, calls = streaming.save_file, []
def killed(tensors, path, **more):
    calls.append(path)
    if len(calls) == 3:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(tensors, path, **more)
streaming.save_file = killed
streaming.quantize_checkpoint({str(source)!r}, {str(output)!r}, ThermoConfig(**{configured().model_dump()!r}))
"""
        process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert files(output) == {"config.json": b"earlier"}
        kept = {path.name: path.stat().st_mtime_ns for path in unfinished(output).glob("*.safetensors")}
        assert len(kept) == 2
        quantize_checkpoint(source, output, configured())
        assert files(output) == files(tmp_path / "whole")
        assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept
        assert not unfinished(output).exists()

    @pytest.mark.parametrize(("quantizer", "swaps"), [("least_squares", True), ("gptq", True), ("gptq", False)])
    def test_every_single_write_may_be_the_last(
        self,
        write: Callable[..., Path],
        tmp_path: Path,
        output: Path,
        monkeypatch: pytest.MonkeyPatch,
        quantizer: str,
        swaps: bool,
    ) -> None:
        """The same call goes on each time; its work is repeated at most for one shard, or one block."""
        if not swaps:
            monkeypatch.setattr(folders, "_exchange", lambda *_: False)
        source, config = write(), configured(quantizer=quantizer, timesteps=8)
        calibration = states_of(source) if config.needs_calibration else None
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
            assert {"config.json": b"earlier"} in found or files(tmp_path / "whole") in found
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
        source, config = write(), configured(quantizer="gptq", timesteps=8)
        calibration = states_of(source)
        quantize_checkpoint(source, tmp_path / "whole", config, calibration)
        whole, stops = files(tmp_path / "whole"), 0
        for allowed in range(100):
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir()
            (output / "config.json").write_text("earlier", encoding="utf-8")
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
            assert found in (whole, {"config.json": b"earlier"}) or (found is None and not swaps)
            with monkeypatch.context() as patch:
                patch.setattr(streaming, "_stored", lambda *_: 1 / 0)
                patch.setattr(streaming, "coded_blocks", lambda *_: 1 / 0)
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
        assert files(output) == {"config.json": b"earlier"}

    @pytest.mark.parametrize(
        "named",
        [
            "quant.damping",
            "trellis",
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
        override: Callable[[dict[str, Any]], None],
        named: str,
    ) -> None:
        source, config = write(), configured(quantizer="gptq", timesteps=8)
        calibration = states_of(source)
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "_stored", _stop_at_second(streaming._stored))
            with suppress(KeyboardInterrupt):
                quantize_checkpoint(source, output, config, calibration)
        if named in ("quant.damping", "trellis"):
            override({"quant.damping": 0.5} if named == "quant.damping" else {"trellis.beam": 3})
        elif named == "number of threads":
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
        assert files(output) == {"config.json": b"earlier"}

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
        assert files(output) == {"config.json": b"earlier"}
        assert [path.name for path in unfinished(output).iterdir()] == [streaming.RUN_NAME]
        quantize_checkpoint(source, output, configured())
        assert files(output) == files(tmp_path / "whole")

    @pytest.mark.parametrize("quantizer", ["least_squares", "gptq"])
    def test_no_file_may_be_larger_than_the_disk(
        self, write: Callable[..., Path], tmp_path: Path, output: Path, quantizer: str
    ) -> None:
        """Each limit stops another file; the run goes on as the limit rises."""
        source, config = write(), configured(quantizer=quantizer, timesteps=8)
        calibration = states_of(source) if config.needs_calibration else None
        quantize_checkpoint(source, tmp_path / "whole", config, calibration)
        largest = max(len(content) for content in files(tmp_path / "whole").values())
        stopped = set()
        for limit in (0, 1000, 2000, 3000, 4000, largest - 1):
            with pytest.raises(OSError, match=r"output: could not write .*; ") as caught, file_limit(limit):
                quantize_checkpoint(source, output, config, calibration)
            stopped.add(str(caught.value).split()[4])
            assert files(output) == {"config.json": b"earlier"}
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


class TestOutput:
    """What may be written, and by whom."""

    @pytest.mark.parametrize(
        ("named", "found"),
        [
            ("parent/source", "the source"),
            ("parent", "the source"),
            ("link to source", "the source"),
            ("notes", "a folder with something else"),
            ("project", "a folder with something else"),
            ("file", "something else than a folder"),
            ("pipe", "something else than a folder"),
            ("loop", "something else than a folder"),
            ("home", "the working directory"),
            ("", "the working directory"),
            (".", "the working directory"),
            ("..", "the working directory"),
            ("/", "the working directory"),
        ],
    )
    def test_what_it_would_destroy_is_refused(
        self, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, found: str
    ) -> None:
        place = tmp_path / "place"
        (place / "parent").mkdir(parents=True)
        (place / "parent" / "config.json").write_text("precious", encoding="utf-8")
        source = write().rename(place / "parent" / "source")
        for folder in ("notes", "home/here", "project/inside"):
            (place / folder).mkdir(parents=True)
        for file in ("file", "notes/note.txt", "project/config.json"):
            (place / file).write_text("precious", encoding="utf-8")
        (place / "link to source").symlink_to(source)
        (place / "loop").symlink_to(place / "loop")
        os.mkfifo(place / "pipe")
        monkeypatch.chdir(place / "home" / "here")
        output = named if named in ("", ".", "..", "/") else place / named
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=f"output: found .*, {found}.*; allowed is a new folder"):
            quantize_checkpoint(source, output, configured())
        if found != "the source":
            with pytest.raises(ValueError, match=f"output: found .*, {found}.*; allowed is a new folder"):
                write_folder(output, lambda _: pytest.fail("began to write"))
        assert sorted(tmp_path.rglob("*")) == before

    def test_behind_a_link_the_folder_is_replaced_and_the_link_stays(
        self, write: Callable[..., Path], tmp_path: Path, output: Path
    ) -> None:
        source, link = write(), tmp_path / "elsewhere" / "link"
        link.parent.mkdir()
        link.symlink_to(output)
        quantize_checkpoint(source, tmp_path / "whole", configured())
        quantize_checkpoint(source, link, configured())
        assert link.readlink() == output
        assert files(output) == files(tmp_path / "whole")
        assert [path.name for path in link.parent.iterdir()] == ["link"]

    def test_what_a_killed_writer_left_is_no_obstacle(
        self, write: Callable[..., Path], tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Files and folders with anything in them, under every name that is used beside an output."""
        source = write()
        quantize_checkpoint(source, tmp_path / "whole", configured())
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
        for is_folder in (True, False):
            for name in ("partial", "partial.old", "writing"):
                path = output.with_name(f".{output.name}.{name}")
                path.joinpath("in").mkdir(parents=True) if is_folder else path.write_text("left", encoding="utf-8")
            output.with_name(f".{output.name}.lock").touch()
            write_folder(output, lambda folder: (folder / "config.json").write_text("later", encoding="utf-8"))
            assert files(output) == {"config.json": b"later"}
            quantize_checkpoint(source, output, configured())
            assert files(output) == files(tmp_path / "whole")
            assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_a_second_run_is_refused_at_once(self, write: Callable[..., Path], output: Path) -> None:
        source = write()
        with only_writer(output), pytest.raises(ValueError, match=f"output: found another run writing {output}, "):
            quantize_checkpoint(source, output, configured())
        assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []
        quantize_checkpoint(source, output, configured())

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


def _stop_at_second(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def stopped(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise KeyboardInterrupt
        return function(*arguments)

    return stopped


class TestBadSource:
    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"quantizer": "gptq"}, "calibration: found None, required by quantizer='gptq'"),
            ({"num_time_groups": 2}, "calibration: found None, .*num_time_groups=2"),
            ({"activation_bits": 8}, "activation_ranges: found 'static', allowed block by block is dynamic"),
            ({"quantizer": "gptq", "hessian": "transition"}, "hessian: found 'transition'"),
            ({"quantizer": "trellis", "average_bits": 2.2}, "average_bits: found 2.2"),
            ({"reconstruction": "blocks"}, "reconstruction: found 'blocks'"),
            ({"transitions": "network"}, "transitions: found 'network'"),
        ],
        ids=str,
    )
    def test_what_needs_calibration_or_the_whole_model_is_refused(
        self, write: Callable[..., Path], output: Path, fields: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(ValueError, match=reason):
            quantize_checkpoint(write(), output, configured(**fields))
        assert not unfinished(output).exists()

    def test_another_calibration_is_refused(
        self, write: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, config = write(), configured(quantizer="gptq", timesteps=8)
        calibration = states_of(source)
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "_stored", _stop_at_second(streaming._stored))
            with pytest.raises(KeyboardInterrupt):
                quantize_checkpoint(source, output, config, calibration)
        (first, second), rows = calibration.parts, torch.arange(8)
        with pytest.raises(ValueError, match="output: found an unfinished run of another calibration"):
            quantize_checkpoint(source, output, config, Calibration((first[rows], second), 8, "forward"))
        quantize_checkpoint(source, output, config, calibration)

    def test_calibration_states_need_no_weights(self, write: Callable[..., Path]) -> None:
        source = write()
        for path in source.glob("*.safetensors"):
            path.unlink()
        states = calibration_states(source, 8, 12, seed=0)
        assert len(states) == 12
        assert states.parts[0].timestep.unique().tolist() == list(range(8))
        with pytest.raises(ValueError, match="states: found 0, allowed are 1"):
            calibration_states(source, 8, 0, seed=0)

    @BOTH
    def test_damaged_tensors_are_named_in_the_names_of_the_checkpoint(
        self, write: Callable[..., Path], output: Path, layout: Layout
    ) -> None:
        source, name = write(layout), f"{layout.name('down', 1)}.weight"
        path = shard_of(source, name)
        good = load_file(path)
        holed = good[name].clone()
        holed[3, 5] = float("nan")
        for bad, reason in (
            ({n: t for n, t in good.items() if n != name}, f"missing tensors {name}"),
            (good | {"more": torch.zeros(2)}, "unexpected tensors more"),
            (good | {name: good[name][:-1]}, rf"tensor {name}: found shape \(31, 40\), expected \(32, 40\)"),
            (good | {name: holed}, f"{name}: found NaN or infinity"),
        ):
            save_file({n: t.contiguous() for n, t in bad.items()}, path)
            with pytest.raises(ValueError, match=reason):
                quantize_checkpoint(source, output, configured())
            assert files(output) == {"config.json": b"earlier"}
            for leftover in unfinished(output).iterdir() if unfinished(output).exists() else ():
                leftover.unlink()

    def test_nan_in_what_is_only_copied_is_named(self, write: Callable[..., Path], output: Path) -> None:
        source = write()
        path = shard_of(source, "model.norm.weight")
        tensors = load_file(path)
        tensors["model.norm.weight"][1] = float("inf")
        save_file(tensors, path)
        with pytest.raises(ValueError, match=r"tensor model.norm.weight: found NaN or infinity"):
            quantize_checkpoint(source, output, configured())

    def test_a_truncated_shard_is_named(self, write: Callable[..., Path], output: Path) -> None:
        source = write()
        path = shard_of(source, "lm_head.weight")
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(ValueError, match=f"{path.name}: not a complete safetensors file"):
            quantize_checkpoint(source, output, configured())
        assert files(output) == {"config.json": b"earlier"}

    @pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing"])
    def test_a_shard_that_is_no_file_is_refused(self, write: Callable[..., Path], output: Path, kind: str) -> None:
        source = write()
        path = shard_of(source, "lm_head.weight")
        path.unlink()
        {"pipe": os.mkfifo, "folder": os.mkdir, "link to nothing": lambda p: p.symlink_to("nothing")}[kind](path)
        with pytest.raises(ValueError, match=f"model: found no {path.name}"):
            quantize_checkpoint(source, output, configured())

    def test_pickles_and_shards_outside_the_folder_are_refused(self, write: Callable[..., Path], output: Path) -> None:
        source = write()
        index = source / "model.safetensors.index.json"
        outside = json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}})
        index.write_text(outside, encoding="utf-8")
        with pytest.raises(ValueError, match=r"found shard '../model.safetensors' outside the folder"):
            quantize_checkpoint(source, output, configured())
        for path in (index, *source.glob("*.safetensors")):
            path.unlink()
        (source / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle, convert it"):
            quantize_checkpoint(source, output, configured())
        assert files(output) == {"config.json": b"earlier"}


@pytest.fixture(scope="class")
def cluster() -> Iterator[LocalCluster]:
    once = {"distributed.scheduler.allowed-failures": 1}  # other than 3, so that giving up takes less time
    with (
        dask.config.set(once),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
    ):
        yield cluster


class TestCluster:
    """The same files from several processes."""

    def test_the_files_are_those_of_one_process(
        self, cluster: LocalCluster, write: Callable[..., Path], tmp_path: Path, output: Path
    ) -> None:
        source, config = write(), configured(embedding_bits=8)
        quantize_checkpoint(source, tmp_path / "alone", config)
        with Client(cluster) as client:
            quantize_checkpoint(source, output, config, client=client)
        assert files(output) == files(tmp_path / "alone")
        assert not unfinished(output).exists()

    def test_a_killed_worker_costs_time_only(
        self,
        cluster: LocalCluster,
        write: Callable[..., Path],
        tmp_path: Path,
        output: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The first worker that begins the second shard dies in the middle of it, with half a file written."""
        source, config = write(), configured()
        quantize_checkpoint(source, tmp_path / "alone", config)
        monkeypatch.setattr(streaming, "_write_shard", KillsOnce(tmp_path / "killed"))
        with Client(cluster) as client:
            quantize_checkpoint(source, output, config, client=client)
        assert (tmp_path / "killed").exists()
        assert files(output) == files(tmp_path / "alone")

    def test_a_shard_that_kills_every_worker_is_an_error(
        self, cluster: LocalCluster, write: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, config = write(), configured()
        with monkeypatch.context() as patch, Client(cluster) as client:
            patch.setattr(streaming, "_write_shard", KillsOnce(None))
            with pytest.raises(OSError, match="scheduler: every worker that tried a shard was lost"):
                quantize_checkpoint(source, output, config, client=client)
        assert files(output) == {"config.json": b"earlier"}
        quantize_checkpoint(source, output, config)  # goes on alone

    def test_an_error_of_a_worker_is_the_callers(
        self, cluster: LocalCluster, write: Callable[..., Path], output: Path
    ) -> None:
        source = write()
        path = shard_of(source, "model.norm.weight")
        tensors = load_file(path)
        tensors["model.norm.weight"][0] = float("nan")
        save_file(tensors, path)
        with Client(cluster) as client, pytest.raises(ValueError, match=r"model\.norm\.weight: found NaN or infinity"):
            quantize_checkpoint(source, output, configured(), client=client)

    def test_a_cluster_without_workers_is_an_error(
        self, write: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(streaming, "_WORKER_SECONDS", 0.5)
        with (
            LocalCluster(n_workers=0, dashboard_address=None) as empty,
            Client(empty) as client,
            pytest.raises(OSError, match=r"scheduler: found no worker in 0\.5 s, allowed is at least one"),
        ):
            quantize_checkpoint(write(), output, configured(), client=client)
        assert files(output) == {"config.json": b"earlier"}

    def test_a_scheduler_that_is_lost_is_an_error(
        self, write: Callable[..., Path], tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It dies while the second shard is worked on."""
        source, address = write(), tmp_path / "scheduler.json"
        parts = {"dask_scheduler": ["--port", "0", "--no-dashboard"], "dask_worker": ["--no-nanny", "--no-dashboard"]}
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{part}", "--scheduler-file", str(address), *options],
                stderr=subprocess.DEVNULL,
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            for part, options in parts.items()
        ]
        monkeypatch.setattr(streaming, "_write_shard", KillsOther(processes[0].pid))
        try:
            with (
                dask.config.set({"distributed.comm.timeouts.connect": "2s"}),
                Client(scheduler_file=str(address), timeout="30s") as client,
                pytest.raises(OSError, match="scheduler: the scheduler was lost"),
            ):
                quantize_checkpoint(source, output, configured(), client=client)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        monkeypatch.undo()
        assert files(output) == {"config.json": b"earlier"}

    def test_with_calibration_it_is_refused(
        self, cluster: LocalCluster, write: Callable[..., Path], output: Path
    ) -> None:
        source = write()
        with Client(cluster) as client, pytest.raises(ValueError, match="client: found one, allowed is None"):
            quantize_checkpoint(
                source, output, configured(quantizer="gptq", timesteps=8), states_of(source), client=client
            )


class KillsOnce:
    """``_write_shard``, but the process dies at the second shard: the first time, or always if there is no marker."""

    def __init__(self, marker: Path | None):
        self.marker, self.write_shard = marker, streaming._write_shard

    def __call__(self, path: Path, *arguments: Any) -> None:
        if path.name.startswith("model-00002") and not (self.marker and self.marker.exists()):
            if self.marker:
                self.marker.touch()
            path.with_suffix(".half.tmp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        self.write_shard(path, *arguments)


class KillsOther:
    """``_write_shard``, but at the second shard another process dies, and the shard waits."""

    def __init__(self, process: int):
        self.process, self.write_shard = process, streaming._write_shard

    def __call__(self, path: Path, *arguments: Any) -> None:
        if path.name.startswith("model-00002"):
            os.kill(self.process, signal.SIGKILL)
            time.sleep(5)
        self.write_shard(path, *arguments)

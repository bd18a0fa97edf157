"""Streamed quantization gives the same model as in memory, and refuses what it can't read or would destroy."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import BOTH, DREAM, DREAM_7B, LLADA_8B, Layout, stored
from safetensors.torch import load_file, save_file
from streamed import EARLIER, configured, files, shard_of, state, unfinished
from torch import nn

from thermo_lib import load_model, load_quantized, quantize, save_quantized
from thermo_lib.files import folders
from thermo_lib.files.folders import only_writer, write_folder
from thermo_lib.files.outputs import MARKER_NAME, RUN_NAME
from thermo_lib.models.architectures import build_model
from thermo_lib.models.families import read_config
from thermo_lib.pipeline.streaming import quantize_checkpoint

pytestmark = pytest.mark.usefixtures("several_shards")


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

    def test_a_tied_head_shares_the_codes(self, write: Callable[..., Path], tmp_path: Path) -> None:
        source = write(DREAM, tie_word_embeddings=True)
        head = shard_of(source, "lm_head.weight")
        tensors = load_file(head)
        tensors["lm_head.weight"] = stored(source)["model.embed_tokens.weight"].clone()
        save_file(tensors, head)
        quantize_checkpoint(source, tmp_path / "copy", configured(embedding_bits=8))
        del tensors["lm_head.weight"]
        save_file(tensors, head)
        quantize_checkpoint(source, tmp_path / "streamed", configured(embedding_bits=8))
        model = load_quantized(tmp_path / "streamed").model
        assert model.lm_head.packed is model.model.embed_tokens.packed
        copy, streamed = files(tmp_path / "copy"), files(tmp_path / "streamed")
        assert copy.pop(MARKER_NAME) != streamed.pop(MARKER_NAME), "made of other files"
        assert copy == streamed, "a copy of the tied head is left out"

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
        """Folders as they are at any moment, under every name that is used beside an output."""
        source = write()
        quantize_checkpoint(source, tmp_path / "whole", configured())
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
        for run in (None, b"", b"{}\0\0"):  # nothing yet, or what a power cut leaves of the first file
            for name in ("partial", "partial.old"):
                path = output.with_name(f".{output.name}.{name}")
                path.mkdir()
                if run is not None:
                    path.joinpath(RUN_NAME).write_bytes(run)
            output.with_name(f".{output.name}.lock").touch()
            write_folder(output, lambda folder: (folder / "config.json").write_text("later", encoding="utf-8"))
            assert files(output).keys() == {"config.json", MARKER_NAME}
            assert (output / "config.json").read_text(encoding="utf-8") == "later"
            quantize_checkpoint(source, output, configured())
            assert files(output) == files(tmp_path / "whole")
            assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_a_second_run_is_refused_at_once(self, write: Callable[..., Path], output: Path) -> None:
        source = write()
        with only_writer(output), pytest.raises(ValueError, match=f"output: found another run writing {output}, "):
            quantize_checkpoint(source, output, configured())
        assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []
        quantize_checkpoint(source, output, configured())


class TestBadSource:
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
            assert files(output) == EARLIER
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
        assert files(output) == EARLIER

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
        assert files(output) == EARLIER

"""A full-precision folder that is damaged or ambiguous: from_pretrained refuses it as load_model does, by name."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layouts import BOTH, DREAM, NAMED, Layout, stored
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModel

import thermo_lib  # noqa: F401 - registers the architectures
from thermo_lib.files import tensors as files
from thermo_lib.models.lm import load_model
from thermo_lib.models.streamed import load_streamed

INDEX = "model.safetensors.index.json"
LOADERS: dict[str, Callable[[Path], object]] = {
    "load_model": lambda folder: load_model(str(folder)),
    "AutoModel": lambda folder: AutoModel.from_pretrained(folder, dtype=torch.float32),
    "AutoModel in a subfolder": lambda folder: AutoModel.from_pretrained(folder.parent, subfolder=folder.name),
}
EVERY_LOADER = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return DREAM.write(tmp_path / "model", tokenizer)


def one_file(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Puts these tensors into the folder's only file."""
    for path in folder.glob("model*"):
        path.unlink()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


@BOTH
@EVERY_LOADER
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, name: t.pop(name), "missing tensors {}"),
        (lambda t, name: t.update(more=torch.zeros(8)), "unexpected tensors more"),
        (lambda t, name: t.update({name: t[name][:-1]}), "tensor {}: found shape"),
        (lambda t, name: t.update({name: t[name].to(torch.int8)}), "tensor {}: found torch.int8, allowed are"),
        (lambda t, name: t.update({name: t[name].view(torch.uint16)}), "tensor {}: found torch.uint16, allowed are"),
        (lambda t, name: t[name][0, 0].fill_(torch.nan), "tensor {}( as .*)?: found NaN or infinity"),
        (lambda t, name: t[name][0, 0].fill_(-torch.inf), "tensor {}( as .*)?: found NaN or infinity"),
    ],
    ids=["missing", "unexpected", "of another shape", "int8", "uint16", "NaN", "infinity"],
)
def test_a_tensor_that_is_not_the_models_is_named(
    tmp_path: Path,
    tokenizer: Tokenizer,
    layout: Layout,
    load: Callable[[Path], object],
    change: Callable[[dict[str, Tensor], str], object],
    message: str,
) -> None:
    folder = layout.write(tmp_path / "model", tokenizer)
    tensors = stored(folder)
    for name in (f"{layout.name('up', 1)}.weight", f"{layout.name('head')}.weight"):
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        change(changed, name)
        one_file(folder, changed)
        with pytest.raises(ValueError, match=message.format(name)):
            load(folder)


@EVERY_LOADER
class TestFiles:
    def test_a_shard_that_was_cut_is_named(self, folder: Path, load: Callable[[Path], object]) -> None:
        shard = folder / "model-00002-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: not a complete safetensors file"):
            load(folder)

    def test_shards_without_an_index_are_not_taken_for_pickles(
        self, folder: Path, load: Callable[[Path], object]
    ) -> None:
        (folder / INDEX).unlink()
        with pytest.raises(ValueError, match=r"found model-00001.* but no index; .*index\.json") as caught:
            load(folder)
        assert "pickle" not in str(caught.value)

    def test_a_file_beside_an_index_is_ambiguous(self, folder: Path, load: Callable[[Path], object]) -> None:
        other = {name: torch.zeros_like(tensor) for name, tensor in stored(folder).items()}
        save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"found both model\.safetensors and model\.safetensors\.index\.json"):
            load(folder)

    def test_pickles_are_not_read(self, folder: Path, load: Callable[[Path], object]) -> None:
        tensors = stored(folder)
        for path in folder.glob("model*"):
            path.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
            load(folder)

    @pytest.mark.parametrize("where", ["absolute", "../"])
    def test_files_outside_the_folder_are_not_opened(
        self, folder: Path, load: Callable[[Path], object], where: str
    ) -> None:
        shard = folder.parent / "outside.safetensors"
        save_file(stored(folder), shard, metadata={"format": "pt"})
        index = json.loads((folder / INDEX).read_text())
        name = str(shard) if where == "absolute" else f"../{shard.name}"
        index["weight_map"] = dict.fromkeys(index["weight_map"], name)
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"found shard '.*outside\.safetensors' outside the folder"):
            load(folder)


@EVERY_LOADER
class TestSafetensors:
    """A file that isn't what it says, or too much, is refused in one line."""

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "not a complete safetensors file"),
            (b'{"__metadata__": ' + b'{"a":' * 10**5 + b"1" + b"}" * 10**5 + b"}", "not a complete safetensors file"),
            (b'{"a": {"dtype": "F32", "shape": [1099511627776, 1099511627776], "data_offsets": [0, 0]}}', "not a comp"),
            (b"{" + b" " * 2**22 + b"}", "found a header of 4194306 bytes, allowed are 4194304 at most"),
            (b'{"a": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}}', "tensor a: found (F4|torch.float4)"),
            (b'{"a": {"dtype": "F6_E2M3", "shape": [0], "data_offsets": [0, 0]}}', "F6_E2M3"),
            (b"{}", "missing tensors"),
        ],
        ids=["deep", "deep metadata", "overflow", "long", "four bits", "six bits", "empty"],
    )
    def test_headers(self, folder: Path, load: Callable[[Path], object], header: bytes, message: str) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
            load(folder)

    def test_a_file_larger_than_the_memory(
        self, folder: Path, load: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_room(path: Path, **_: object) -> None:
            raise RuntimeError(f"unable to mmap 9 bytes from file <{path}>: Cannot allocate memory (12)")

        monkeypatch.setattr(files, "safe_open", no_room)
        with pytest.raises(ValueError, match=r"model-00001.*: found 0\.0 GiB, more than this machine has memory for"):
            load(folder)


class TestAutoModelOnly:
    @pytest.mark.parametrize("metadata", [None, "x"], ids=["none", "text"])
    def test_an_index_without_metadata(self, folder: Path, metadata: object) -> None:
        content = json.loads((folder / INDEX).read_text()) | {"metadata": metadata}
        (folder / INDEX).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"index\.json: metadata: found {metadata!r}, expected an object"):
            AutoModel.from_pretrained(folder)
        load_model(str(folder))

    @pytest.mark.parametrize("text", ["[]", "{"])
    def test_settings_of_generation_are_an_object(self, folder: Path, text: str) -> None:
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"generation_config\.json(, line 1)?: found (a list|invalid JSON)"):
            AutoModel.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("key", "value"), [("dtype", 16), ("torch_dtype", "float99"), ("rms_norm_eps", 16), ("pad_token_id", [1])]
    )
    def test_settings_are_checked_as_load_model_checks_them(self, folder: Path, key: str, value: object) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        expected = re.escape(f"{path}: {key}: found {value!r}, allowed are ")
        with pytest.raises(ValueError, match=rf"^{expected}[^\n]*$"):
            AutoModel.from_pretrained(folder)

    def test_codes_without_a_configuration_are_said(self, folder: Path) -> None:
        one_file(folder, stored(folder) | {"model.layers.0.mlp.up_proj.packed": torch.zeros(1, dtype=torch.uint8)})
        with pytest.raises(ValueError, match=r"config\.json: quantization_config: found none, required by .*packed"):
            AutoModel.from_pretrained(folder)

    def test_pickles_are_not_asked_for(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="use_safetensors: found False, allowed is True"):
            AutoModel.from_pretrained(folder, use_safetensors=False)

    def test_parts_of_tensors_do_not_shadow_whole_ones(self, folder: Path) -> None:
        save_file({"x": torch.zeros(1)}, folder / "shard-00000-model-00001-of-00001.safetensors")
        with pytest.raises(ValueError, match="found shard-00000-model-00001-of-00001"):
            AutoModel.from_pretrained(folder)

    def test_a_number_too_large_for_the_type_is_refused(self, folder: Path) -> None:
        tensors = stored(folder)
        tensors["model.norm.weight"][0] = 1e6
        one_file(folder, tensors)
        AutoModel.from_pretrained(folder)
        with pytest.raises(ValueError, match=r"model\.norm\.weight as torch\.float16: found NaN or infinity"):
            AutoModel.from_pretrained(folder, dtype=torch.float16)

    def test_a_variant_is_checked_too(self, folder: Path) -> None:
        tensors = stored(folder)
        tensors.pop("model.norm.weight")
        save_file(tensors, folder / "model.small.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"missing tensors model\.norm\.weight"):
            AutoModel.from_pretrained(folder, variant="small")


@NAMED
@pytest.mark.parametrize("load", [*LOADERS.values(), load_streamed], ids=[*LOADERS, "load_streamed"])
def test_a_head_that_tying_would_drop_is_named(
    tmp_path: Path, tokenizer: Tokenizer, layout: Layout, load: Callable[[Path], object]
) -> None:
    folder = layout.write(tmp_path / "model", tokenizer, **{"mask_token_id": 3, layout.tying: True})
    tensors, head, embeddings = stored(folder), f"{layout.name('head')}.weight", f"{layout.name('embedding')}.weight"
    message = f"tensor {head}: found another than {embeddings}, allowed is the same with {layout.tying} true"
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder)
    one_file(folder, tensors | {head: tensors[embeddings].clone()})
    load(folder)

"""A saved model comes back as it was, and a damaged or unknown folder is refused with a message that says why."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from thermo_lib import ThermoConfig, quantize, save_quantized
from thermo_lib.files.outputs import MARKER_NAME
from thermo_lib.files.tensors import INDEX_NAME, WEIGHTS_NAME
from thermo_lib.models import lm
from thermo_lib.models.architectures import DreamModel
from thermo_lib.models.lm import DiffusionLM, load_model, save_model

RandomIds = Callable[..., Tensor]


@pytest.fixture(scope="module")
def saved(tiny: DiffusionLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(tiny, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved model to damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def edit_config(folder: Path, **changes: object) -> None:
    """Change keys of config.json; None removes a key."""
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of model.safetensors."""
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


def into_shards(folder: Path) -> None:
    """Put every second tensor of model.safetensors into a.safetensors, the others into b.safetensors."""
    tensors = load_file(folder / WEIGHTS_NAME)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / WEIGHTS_NAME).unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def edit_index(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the weight map of the index."""
    content = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    change(content["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(content), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class TestSaveAndLoad:
    """A saved model comes back with the same weights, settings and tokenizer."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_weights_come_back_exactly_as_stored(
        self, tiny: DiffusionLM, tmp_path: Path, dtype: torch.dtype, random_ids: RandomIds
    ) -> None:
        save_model(tiny, tmp_path / "m", dtype)
        loaded = load_model(str(tmp_path / "m"))
        for name, weight in tiny.model.state_dict().items():
            found = loaded.model.state_dict()[name]
            assert found.dtype == torch.float32
            assert torch.equal(found, weight.to(dtype).float()), name
        assert loaded.mask_token_id == tiny.mask_token_id
        assert loaded.tokenizer.to_str() == tiny.tokenizer.to_str()
        assert not loaded.model.training
        if dtype == torch.float32:
            ids = random_ids(2, 8)
            assert torch.equal(loaded.model(ids).logits, tiny.model(ids).logits)

    def test_saving_a_loaded_model_writes_the_same_bytes(self, saved: Path, tmp_path: Path) -> None:
        save_model(load_model(str(saved)), tmp_path / "again")
        assert contents(tmp_path / "again") == contents(saved)

    def test_every_setting_of_the_configuration_comes_back(self, folder: Path, tmp_path: Path) -> None:
        changes = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "max_position_embeddings": 77, "hidden_act": "gelu"}
        edit_config(folder, **changes)
        save_model(load_model(str(folder)), tmp_path / "again")
        again = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
        assert {key: again[key] for key in changes} == changes

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_a_model_with_tied_embeddings_comes_back(self, saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
        source = Path(shutil.copytree(saved, tmp_path / "tied"))
        edit_config(source, tie_word_embeddings=True)
        edit_tensors(source, lambda tensors: tensors.pop("lm_head.weight"))
        tied = load_model(str(source))
        assert tied.model.lm_head.weight is tied.model.model.embed_tokens.weight
        save_model(tied, tmp_path / "again", dtype)
        again = load_model(str(tmp_path / "again")).model
        assert torch.equal(again.lm_head.weight, tied.model.lm_head.weight)
        assert torch.equal(again.model.embed_tokens.weight, tied.model.lm_head.weight)

    def test_more_text_files_are_written_beside_the_weights(self, tiny: DiffusionLM, tmp_path: Path) -> None:
        save_model(tiny, tmp_path / "m", extra={"training.json": "{}\n"})
        assert {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "m").iterdir()} == dict.fromkeys(
            ["model.safetensors", "config.json", "tokenizer.json", "training.json", MARKER_NAME], 0o644
        )

    def test_shards_are_read_as_one_model(self, folder: Path, saved: Path) -> None:
        into_shards(folder)
        sharded, whole = load_model(str(folder)).model.state_dict(), load_model(str(saved)).model.state_dict()
        assert all(torch.equal(sharded[name], whole[name]) for name in whole)

    def test_a_single_file_beside_an_index_is_refused(self, folder: Path, saved: Path) -> None:
        into_shards(folder)
        shutil.copy(saved / WEIGHTS_NAME, folder)
        with pytest.raises(ValueError, match=r"found both model\.safetensors and model\.safetensors\.index\.json"):
            load_model(str(folder))

    def test_a_download_of_the_hub_is_read_through_its_links(self, folder: Path, tmp_path: Path) -> None:
        # huggingface_hub keeps the content in blobs/ and links to it from snapshots/<revision>/.
        blobs = tmp_path / "blobs"
        blobs.mkdir()
        for path in list(folder.iterdir()):
            path.rename(blobs / path.name)
            path.symlink_to(Path("..") / "blobs" / path.name)
        assert load_model(str(folder)).model.config.hidden_size == 32

    def test_code_that_the_configuration_names_is_not_run(self, folder: Path, tmp_path: Path) -> None:
        trace = tmp_path / "was run"
        (folder / "modeling_evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
        evil = "modeling_evil.Evil"
        edit_config(folder, auto_map={"AutoModel": evil, "AutoConfig": evil}, trust_remote_code=True)
        loaded = load_model(str(folder))
        assert type(loaded.model) is DreamModel
        assert not hasattr(loaded.model.config, "auto_map")
        assert not trace.exists()


class TestRefusals:
    """A folder that can't be loaded is refused with a ValueError that names what is wrong."""

    @pytest.mark.parametrize("name", ["no/such/model", "/no/such/folder", "a model", "no-such-model"])
    def test_an_unknown_name_is_an_error_that_lists_what_is_allowed(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"model: found .* allowed are 'reference', a folder") as error:
            load_model(name)
        assert repr(name) in str(error.value)

    def test_a_folder_without_configuration(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"found no config\.json in"):
            load_model(str(tmp_path))

    def test_a_model_type_that_is_not_supported_is_named_with_those_that_are(self, folder: Path) -> None:
        edit_config(folder, model_type="opt")
        with pytest.raises(ValueError, match=r"config\.json: model_type: found 'opt', supported are Dream"):
            load_model(str(folder))

    @pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "mask_token_id"])
    def test_a_missing_field_is_named(self, folder: Path, field: str) -> None:
        edit_config(folder, **{field: None})
        with pytest.raises(ValueError, match=rf"config\.json: missing {field}"):
            load_model(str(folder))

    @pytest.mark.parametrize(
        ("file", "text"),
        [
            pytest.param("config.json", "{", id="configuration that is no JSON"),
            pytest.param("config.json", "[]", id="configuration that is no object"),
            pytest.param("tokenizer.json", "{", id="tokenizer that is no JSON"),
            pytest.param("tokenizer.json", "{}", id="tokenizer without a model"),
            pytest.param("model.safetensors.index.json", "{", id="index that is no JSON"),
            pytest.param("model.safetensors.index.json", "{}", id="index without a weight map"),
        ],
    )
    def test_a_damaged_json_file_is_named(self, folder: Path, file: str, text: str) -> None:
        (folder / file).write_text(text, encoding="utf-8")
        if file == INDEX_NAME:
            (folder / WEIGHTS_NAME).unlink()  # an index beside it isn't read
        with pytest.raises(ValueError, match=file.replace(".", r"\.")):
            load_model(str(folder))

    def test_a_field_of_the_wrong_type_is_named(self, folder: Path) -> None:
        edit_config(folder, hidden_size="wide")
        with pytest.raises(ValueError, match="hidden_size"):
            load_model(str(folder))

    def test_a_missing_tokenizer(self, folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        with pytest.raises(ValueError, match=r"found no tokenizer\.json"):
            load_model(str(folder))

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    def test_a_truncated_file_is_named(self, folder: Path, share: float) -> None:
        path = folder / WEIGHTS_NAME
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match=r"model\.safetensors: not a complete safetensors file"):
            load_model(str(folder))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param(
                lambda t: t.pop("model.norm.weight"), r"missing tensors model\.norm\.weight \(1 in all\)", id="missing"
            ),
            pytest.param(
                lambda t: t.update(surplus=torch.zeros(1)), r"unexpected tensors surplus \(1 in all\)", id="extra"
            ),
            pytest.param(
                lambda t: t.update({"model.norm.weight": torch.zeros(31)}),
                r"tensor model\.norm\.weight: found shape \(31,\), expected \(32,\)",
                id="wrong shape",
            ),
            pytest.param(
                lambda t: t["model.norm.weight"].__setitem__(3, torch.nan),
                r"tensor model\.norm\.weight: found NaN or infinity",
                id="NaN",
            ),
            pytest.param(
                lambda t: t["model.norm.weight"].__setitem__(3, -torch.inf),
                r"tensor model\.norm\.weight: found NaN or infinity",
                id="infinity",
            ),
        ],
    )
    def test_a_damaged_tensor_is_named(
        self, folder: Path, change: Callable[[dict[str, Tensor]], object], message: str
    ) -> None:
        edit_tensors(folder, change)
        with pytest.raises(ValueError, match=message):
            load_model(str(folder))

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
    def test_pickled_weights_are_refused_with_a_way_to_convert_them(
        self, folder: Path, name: str, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.save(load_file(folder / WEIGHTS_NAME), folder / name)
        (folder / WEIGHTS_NAME).unlink()
        with pytest.raises(
            ValueError, match=rf"found no model\.safetensors in .*; {re.escape(name)} is a pickle, convert it: pickled"
        ) as error:
            load_model(str(folder))
        monkeypatch.chdir(folder)
        command = str(error.value).partition("trust them: ")[2]
        eval(command, {"safetensors": safetensors, "torch": torch, "FILE": name})  # the message's own way works
        converted, whole = load_model(str(folder)).model.state_dict(), load_model(str(saved)).model.state_dict()
        assert all(torch.equal(converted[tensor], whole[tensor]) for tensor in whole)

    def test_a_folder_without_weights_as_of_a_hub_id_with_pickles(self, folder: Path) -> None:
        (folder / WEIGHTS_NAME).unlink()
        with pytest.raises(ValueError, match=r"found no model\.safetensors in [^;]*; pickled weights are never read;"):
            load_model(str(folder))

    @pytest.mark.parametrize(
        "shard", ["../elsewhere.safetensors", "below/elsewhere.safetensors", "/elsewhere.safetensors"]
    )
    def test_a_shard_outside_the_folder_is_refused(self, folder: Path, shard: str) -> None:
        target = folder / shard
        if not shard.startswith("/"):
            target.parent.mkdir(exist_ok=True)
            shutil.copy(folder / WEIGHTS_NAME, target)
        names = load_file(folder / WEIGHTS_NAME)
        (folder / WEIGHTS_NAME).unlink()
        index = {"weight_map": dict.fromkeys(names, shard)}
        (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
        with pytest.raises(ValueError, match="outside the folder") as error:
            load_model(str(folder))
        assert repr(shard) in str(error.value)

    @pytest.mark.parametrize("entry", ["..", ".", "", None, 5, ["a.safetensors"], "config.json", "model.bin"], ids=str)
    def test_an_entry_of_the_index_that_is_no_shard_is_named(self, folder: Path, entry: object) -> None:
        into_shards(folder)
        edit_index(folder, lambda weight_map: weight_map.update({"model.norm.weight": entry}))
        message = re.escape(
            f"index.json: weight_map: model.norm.weight: found {entry!r}, allowed are files in {folder}"
        )
        with pytest.raises(ValueError, match=message):
            load_model(str(folder))

    def test_long_names_in_an_index_end_in_a_short_line(self, folder: Path) -> None:
        into_shards(folder)
        for name, shard, message in (
            ("model.norm.weight", "m" * 3000, "found 'mmm"),
            ("n\u2028" * 3000, 5, r"weight_map: 'n\\u2028n.*found 5"),
            ("model.norm.weight", "ä" * 130 + ".safetensors", "found a name of 272 bytes, allowed are 255 at most"),
        ):
            edit_index(folder, lambda weight_map, n=name, s=shard: weight_map.update({n: s}))
            with pytest.raises(ValueError, match=message) as error:
                load_model(str(folder))
            assert len(str(error.value)) < 600
            assert len(str(error.value).splitlines()) == 1
            edit_index(folder, lambda weight_map, n=name: weight_map.pop(n))

    def test_an_index_without_entries_says_so(self, folder: Path) -> None:
        into_shards(folder)
        edit_index(folder, lambda weight_map: weight_map.clear())
        with pytest.raises(ValueError, match=r"index\.json: weight_map: found an empty object"):
            load_model(str(folder))

    def test_a_missing_shard_is_named(self, folder: Path) -> None:
        into_shards(folder)
        (folder / "b.safetensors").unlink()
        with pytest.raises(
            ValueError, match=r"found no b\.safetensors in .*, which model\.safetensors\.index\.json names"
        ):
            load_model(str(folder))

    @pytest.mark.parametrize("is_listed", [True, False])
    def test_a_tensor_in_two_shards_is_refused(self, folder: Path, is_listed: bool) -> None:
        into_shards(folder)
        for file in ("a.safetensors", "b.safetensors"):
            save_file(load_file(folder / file) | {"model.norm.weight": torch.ones(32)}, folder / file)
        if not is_listed:
            edit_index(folder, lambda weight_map: weight_map.pop("model.norm.weight"))
        with pytest.raises(
            ValueError, match=r"weight_map: model\.norm\.weight: found it in '[ab].safetensors', allowed is"
        ):
            load_model(str(folder))

    def test_a_tensor_in_another_shard_than_the_index_says_is_refused(self, folder: Path) -> None:
        into_shards(folder)
        swap = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}
        edit_index(folder, lambda weight_map: weight_map.update({n: swap[f] for n, f in weight_map.items()}))
        with pytest.raises(ValueError, match=r"found it in 'a.safetensors', allowed is 'b.safetensors' alone"):
            load_model(str(folder))

    @pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64])
    def test_weights_of_another_type_are_named(self, folder: Path, dtype: torch.dtype) -> None:
        edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(32).to(dtype)}))
        message = (
            rf"tensor model\.norm\.weight: found {dtype}, allowed are torch\.float64, torch\.float32, torch\.float16"
        )
        with pytest.raises(ValueError, match=message):
            load_model(str(folder))

    @pytest.mark.parametrize(
        ("stored", "dtype", "value"),
        [(torch.float64, torch.float32, 1e300), (torch.float32, torch.float16, 1e5)],
    )
    def test_a_number_that_the_wanted_type_cannot_hold_is_named(
        self, folder: Path, stored: torch.dtype, dtype: torch.dtype, value: float
    ) -> None:
        edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.full((32,), value, dtype=stored)}))
        with pytest.raises(ValueError, match=rf"tensor model\.norm\.weight as {dtype}: found NaN or infinity"):
            load_model(str(folder), dtype=dtype)

    def test_a_missing_tokenizer_is_said_before_the_weights_are_read(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (folder / "tokenizer.json").unlink()
        monkeypatch.setattr(lm, "read_tensors", lambda _: 1 / 0)
        with pytest.raises(ValueError, match=r"found no tokenizer\.json"):
            load_model(str(folder))

    def test_a_tokenizer_with_more_ids_than_the_model_is_refused(self, folder: Path, tiny: DiffusionLM) -> None:
        larger = Tokenizer.from_str(tiny.tokenizer.to_str())
        size = tiny.model.config.vocab_size
        larger.add_tokens(["<more>"])
        larger.save(str(folder / "tokenizer.json"))
        with pytest.raises(
            ValueError, match=rf"tokenizer: found id {size} of '<more>', allowed is below vocab_size={size}"
        ):
            load_model(str(folder))

    def test_a_quantized_folder_is_refused_with_what_loads_it(self, tiny: DiffusionLM, tmp_path: Path) -> None:
        save_quantized(quantize(tiny, ThermoConfig(quantizer="rtn", num_time_groups=1, group_size=16)), tmp_path / "q")
        with pytest.raises(ValueError, match=r"model: found a quantized model in .*, load it with load_quantized"):
            load_model(str(tmp_path / "q"))

    @pytest.mark.parametrize(
        ("found", "method"), [({"quant_method": "gptq"}, "'gptq'"), ({}, "None"), ("fp8", "'fp8'")]
    )
    def test_a_model_quantized_by_others_is_refused_with_its_method(
        self, folder: Path, found: object, method: str
    ) -> None:
        edit_config(folder, quantization_config=found)
        with pytest.raises(
            ValueError, match=rf"config\.json: quantization_config: found quant_method {method}, allowed"
        ):
            load_model(str(folder))

    def test_no_name_is_not_the_working_directory(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)
        with pytest.raises(ValueError, match="model: found '', allowed are 'reference', a folder"):
            load_model("")

"""transformers' own from_pretrained and save_pretrained: the same models, bit for bit, as the library's functions."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import BOTH, DREAM, EVERY, LLADA, NAMED, Layout, stored
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, Qwen2ForCausalLM

from thermo_lib import (
    ThermoConfig,
    calibrate,
    load_model,
    load_quantized,
    quantize,
    quantize_checkpoint,
    save_quantized,
)
from thermo_lib.integrations import transformers as integration
from thermo_lib.models.architectures import MODELS, MaskPredictor
from thermo_lib.pipeline.weights import quantize_layer

FLOAT32 = {"dtype": torch.float32}
BIASED = "model.layers.0.self_attn.q_proj"
DATA_FREE = {"quantizer": "least_squares", "group_size": 16, "activation_bits": 16, "num_time_groups": 1}


@pytest.fixture
def write(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Writes a checkpoint of a layout with changed settings."""

    def make(layout: Layout = DREAM, *, tied: bool = False, **changes: Any) -> Path:
        return layout.write(tmp_path / "source", tokenizer, tied=tied, **changes)

    return make


def outputs(model: MaskPredictor, timesteps: Sequence[int] = range(8)) -> Tensor:
    """Logits at every one of 8 timesteps, or at some, some tokens masked."""
    ids = torch.arange(14).view(2, 7) % 5
    ids[:, ::3] = model.config.mask_token_id
    logits = []
    for timestep in timesteps:
        model.set_timestep(timestep, 8)
        with torch.no_grad():
            logits.append(model(ids).logits)
    return torch.stack(logits)


def saved(model: MaskPredictor, folder: Path, source: Path) -> Path:
    """A folder that ``save_pretrained`` wrote, with the tokenizer, which isn't the model's."""
    model.save_pretrained(folder)
    shutil.copy(source / "tokenizer.json", folder)
    return folder


def same_tensors(a: Path, b: Path) -> bool:
    first, second = stored(a), stored(b)
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and tensor.equal(second[name]) for name, tensor in first.items()
    )


class TestFullPrecision:
    @NAMED
    def test_it_is_the_model_that_the_library_loads(self, write: Callable[..., Path], layout: Layout) -> None:
        source = write(layout)
        expected = outputs(load_model(str(source)).model)
        model_type = json.loads((source / "config.json").read_text())["model_type"]
        for auto in (MODELS[model_type], AutoModel, AutoModelForMaskedLM):
            model = auto.from_pretrained(source, **FLOAT32)
            assert type(model) is MODELS[model_type]
            assert outputs(model).equal(expected)
        assert AutoModel.from_pretrained(source).dtype == torch.bfloat16  # as it is stored

    @NAMED
    def test_it_is_saved_in_the_published_layout(
        self, write: Callable[..., Path], tmp_path: Path, layout: Layout
    ) -> None:
        source = write(layout)
        again = saved(AutoModel.from_pretrained(source), tmp_path / "again", source)
        assert same_tensors(again, source)
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, again))
        assert {key: value for key, value in after.items() if key in before} == {
            key: value for key, value in before.items() if key in after and key != "transformers_version"
        } | {"transformers_version": after["transformers_version"]}
        assert outputs(load_model(str(again)).model).equal(outputs(load_model(str(source)).model))

    def test_a_wrong_setting_is_named(self, write: Callable[..., Path]) -> None:
        with pytest.raises(ValueError, match="layer_norm_type: found 'default', allowed is 'rms'"):
            AutoConfig.from_pretrained(write(LLADA, layer_norm_type="default"))


class TestQuantized:
    @EVERY
    @pytest.mark.parametrize(
        ("tied", "fields"),
        [
            (False, {}),
            (False, {"embedding_bits": 8}),
            (True, {"embedding_bits": 8}),
            (True, {"quantizer": "rtn", "bit_width": 4}),
        ],
        ids=str,
    )
    def test_a_streamed_folder_loads(
        self, write: Callable[..., Path], tmp_path: Path, layout: Layout, tied: bool, fields: dict[str, Any]
    ) -> None:
        source = write(layout, tied=tied)
        config = ThermoConfig(**DATA_FREE | fields)
        quantize_checkpoint(source, tmp_path / "quantized", config, family=layout.family)
        for dtype in (torch.float32, torch.bfloat16):
            expected = load_quantized(tmp_path / "quantized", dtype=dtype).model
            found = AutoModel.from_pretrained(tmp_path / "quantized", dtype=dtype)
            assert outputs(found, [7]).equal(outputs(expected, [7]))  # at all timesteps the same

    @BOTH
    @pytest.mark.parametrize(
        "fields",
        [
            {"quantizer": "gptq", "num_time_groups": 2},
            {"quantizer": "gptq", "num_time_groups": 2, "activation_bits": 4, "smoothing_method": "linear"},
            {"activation_bits": 8, "activation_group_size": 8, "activation_token_states": True},
            {"quantizer": "trellis", "average_bits": 2.3, "embedding_bits": 8},
            {"activation_bits": 4, "activation_ranges": "dynamic", "activation_clip": 0.9},
        ],
        ids=str,
    )
    def test_all_that_the_library_quantizes_loads_and_is_saved_again(
        self, write: Callable[..., Path], tmp_path: Path, layout: Layout, fields: dict[str, Any]
    ) -> None:
        source = write(layout)
        lm = load_model(str(source))
        batch = torch.arange(21).view(3, 7)
        calibration = calibrate(lm, [(batch, None)], timesteps=8, source="forward", progress=False)
        config = ThermoConfig(**DATA_FREE | {"timesteps": 8} | fields)
        quantized = quantize(lm, config, calibration)
        save_quantized(quantized, tmp_path / "quantized")
        model = AutoModel.from_pretrained(tmp_path / "quantized", **FLOAT32)
        assert model.config.quantization_config == config
        assert outputs(model).equal(outputs(quantized.model))
        again = saved(model, tmp_path / "again", source)
        assert same_tensors(again, tmp_path / "quantized")
        page = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
        coded = {name.rpartition(".")[2] for name in stored(again).keys() - stored(source).keys()}
        assert coded <= set(re.findall(r"`NAME\.(\w+)`", page)), "the page on the format names every tensor"
        assert outputs(load_quantized(again).model).equal(outputs(quantized.model))
        assert outputs(AutoModel.from_pretrained(again, **FLOAT32)).equal(outputs(quantized.model))

    @BOTH
    @pytest.mark.parametrize("fields", [{}, {"embedding_bits": 8}], ids=str)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_the_folder_says_what_to_compute_in(
        self, write: Callable[..., Path], tmp_path: Path, layout: Layout, fields: dict[str, Any], dtype: torch.dtype
    ) -> None:
        source = write(layout)
        quantized = quantize(load_model(str(source), dtype=dtype), ThermoConfig(**DATA_FREE | fields))
        save_quantized(quantized, tmp_path / "quantized")
        model = AutoModel.from_pretrained(tmp_path / "quantized")
        assert model.dtype == dtype
        assert outputs(model).equal(outputs(quantized.model))
        again = saved(model, tmp_path / "again", source)
        assert same_tensors(again, tmp_path / "quantized")
        assert outputs(AutoModel.from_pretrained(again)).equal(outputs(quantized.model))

    @BOTH
    @pytest.mark.parametrize(
        "fields",
        [{"embedding_bits": 8}, {"activation_bits": 8, "num_time_groups": 2, "timesteps": 8}, {"quantizer": "trellis"}],
        ids=str,
    )
    def test_a_model_that_is_cast_is_the_model_loaded_so(
        self, write: Callable[..., Path], tmp_path: Path, layout: Layout, fields: dict[str, Any]
    ) -> None:
        lm = load_model(str(write(layout)))
        calibration = calibrate(lm, [(torch.arange(21).view(3, 7), None)], timesteps=8, source="forward")
        save_quantized(quantize(lm, ThermoConfig(**DATA_FREE | fields), calibration), tmp_path / "quantized")
        cast = load_quantized(tmp_path / "quantized")
        cast.model.to(torch.bfloat16)
        loaded = load_quantized(tmp_path / "quantized", dtype=torch.bfloat16)
        assert outputs(cast.model).equal(outputs(loaded.model))
        for lm, name in ((cast, "cast"), (loaded, "loaded")):
            save_quantized(lm, tmp_path / name)
        assert same_tensors(tmp_path / "cast", tmp_path / "loaded")
        assert {t.dtype for n, t in stored(tmp_path / "cast").items() if n.endswith("weight_scale")} == {torch.float16}

    def test_only_what_from_pretrained_has_loaded_is_saved_by_save_pretrained(
        self, write: Callable[..., Path], tmp_path: Path
    ) -> None:
        quantized = quantize(load_model(str(write())), ThermoConfig(**DATA_FREE))
        with pytest.raises(ValueError, match=r"save_pretrained: found a quantized model.*use save_quantized"):
            quantized.model.save_pretrained(tmp_path / "quantized")
        assert not (tmp_path / "quantized").exists()

    def test_damaged_folders_are_refused(self, write: Callable[..., Path], tmp_path: Path) -> None:
        folder = tmp_path / "quantized"
        save_quantized(quantize(load_model(str(write())), ThermoConfig(**DATA_FREE)), folder)
        path, good = folder / "model.safetensors", stored(folder)
        name = "model.layers.1.mlp.up_proj"
        holed = good[f"{name}.weight_zero_point"].clone()
        holed[0, 0, 0] = torch.nan
        for bad, reason in (
            ({n: t for n, t in good.items() if n != f"{name}.packed"}, f"missing tensors {name}.packed"),
            (good | {"more": torch.zeros(2)}, "unexpected tensors more"),
            (good | {f"{name}.packed": good[f"{name}.packed"][:-1]}, f"tensor {name}.packed: found shape"),
            (good | {f"{name}.weight_scale": 0 * good[f"{name}.weight_scale"]}, "weight_scale: found 0, allowed"),
            (good | {f"{name}.weight_zero_point": holed}, "weight_zero_point: found NaN"),
        ):
            save_file({n: t.contiguous() for n, t in bad.items()}, path, metadata={"format": "pt"})
            with pytest.raises(ValueError, match=reason):
                AutoModel.from_pretrained(folder)


def edited(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Writes the tensors of a folder, changed, as its only file."""
    tensors = stored(folder)
    change(tensors)
    for path in folder.glob("model*"):
        path.unlink()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    tensors = stored(folder)
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def outside(folder: Path) -> None:
    """Moves the shards out of the folder, and lets the index name them there."""
    shard = folder.parent / "outside.safetensors"
    save_file(stored(folder), shard, metadata={"format": "pt"})
    names = dict.fromkeys(stored(folder), "../outside.safetensors")
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def truncated(folder: Path) -> None:
    edited(folder, lambda _: None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


class TestBadInput:
    """A folder is checked as the library's own functions check it, quantized already or while it is read."""

    @pytest.fixture(params=["quantized", "on the fly"])
    def load(
        self, request: pytest.FixtureRequest, write: Callable[..., Path], tmp_path: Path
    ) -> Callable[[Callable[[Path], None]], MaskPredictor]:
        """Changes a folder of a model and loads it."""
        folder, options = write(), {"quantization_config": ThermoConfig(**DATA_FREE)}
        if request.param == "quantized":
            lm = quantize(load_model(str(folder)), options.pop("quantization_config"))
            folder = tmp_path / "quantized"
            save_quantized(lm, folder)

        def changed(change: Callable[[Path], None]) -> MaskPredictor:
            change(folder)
            return AutoModel.from_pretrained(folder, **options)

        return changed

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (pickled, r"pytorch_model\.bin is a pickle"),
            (outside, r"found shard .*outside\.safetensors'? outside the folder"),
            (truncated, "safetensors file"),
        ],
        ids=lambda value: getattr(value, "__name__", ""),
    )
    def test_bad_files_are_refused(
        self, load: Callable[..., MaskPredictor], change: Callable[[Path], None], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            load(change)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t["model.norm.weight"].fill_(torch.nan), "tensor model.norm.weight: found NaN"),
            (lambda t: t["model.embed_tokens.weight"][1].fill_(torch.inf), "model.embed_tokens.weight: found NaN"),
            (lambda t: t[f"{BIASED}.bias"].fill_(torch.nan), f"tensor {BIASED}.bias: found NaN"),
            (lambda t: t.pop("model.norm.weight"), "missing tensors model.norm.weight"),
            (lambda t: [t.pop(name) for name in list(t) if BIASED in name], f"missing tensors {BIASED}"),
            (lambda t: t.update(more=torch.tensor(0.0)), "unexpected tensors more"),
            (lambda t: t.update({f"{BIASED}.bias": torch.zeros(3)}), f"tensor {BIASED}.bias: found shape"),
            (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}), "lm_head.weight: found torch"),
        ],
        ids=[
            "norm NaN",
            "embeddings infinite",
            "bias NaN",
            "norm missing",
            "linear missing",
            "extra",
            "bias of another shape",
            "head of another type",
        ],
    )
    def test_bad_tensors_are_named(
        self, load: Callable[..., MaskPredictor], change: Callable[[dict[str, Tensor]], object], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            load(lambda folder: edited(folder, change))

    def test_a_quantized_folder_says_how_it_was_quantized(self, write: Callable[..., Path], tmp_path: Path) -> None:
        save_quantized(quantize(load_model(str(write())), ThermoConfig(**DATA_FREE)), tmp_path / "quantized")
        path = tmp_path / "quantized/config.json"
        content = json.loads(path.read_text())
        del content["quantization_config"]
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"quantization_config: found none, required by tensors .*\.packed"):
            AutoModel.from_pretrained(tmp_path / "quantized")


class TestOnTheFly:
    @BOTH
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize(
        "fields", [{}, {"embedding_bits": 8, "activation_bits": 4, "activation_ranges": "dynamic"}], ids=str
    )
    def test_it_is_the_model_that_is_streamed(
        self, write: Callable[..., Path], tmp_path: Path, layout: Layout, tied: bool, fields: dict[str, Any]
    ) -> None:
        source = write(layout, tied=tied)
        config = ThermoConfig(**DATA_FREE | fields)
        quantize_checkpoint(source, tmp_path / "streamed", config)
        model = AutoModel.from_pretrained(source, quantization_config=config)
        expected = outputs(load_quantized(tmp_path / "streamed", dtype=torch.bfloat16).model)
        assert outputs(model).equal(expected)
        again = saved(model, tmp_path / "again", source)
        assert outputs(load_quantized(again, dtype=torch.bfloat16).model).equal(expected)
        single = AutoModel.from_pretrained(source, quantization_config=config, **FLOAT32)
        assert outputs(single).equal(outputs(load_quantized(tmp_path / "streamed").model))

    def test_no_two_weights_are_dense_at_a_time(
        self, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dense = []

        def watched(lm: Any, quantizer: Any, name: str, *more: Any) -> None:
            weights = [getattr(lm.model.get_submodule(n), "weight", None) for n in names]
            dense.append(sum(isinstance(w, Tensor) and w.device.type != "meta" for w in weights))
            original(lm, quantizer, name, *more)

        original, source = quantize_layer, write()
        names = [n for n, m in load_model(str(source)).model.named_modules() if n.endswith("_proj")]
        monkeypatch.setattr(integration, "quantize_layer", watched)
        AutoModel.from_pretrained(source, quantization_config=ThermoConfig(**DATA_FREE))
        assert len(dense) == len(names)
        assert set(dense) == {1}

    @pytest.mark.parametrize("fields", [{"quantizer": "gptq"}, {"num_time_groups": 2}, {"activation_bits": 8}], ids=str)
    def test_calibration_is_refused(self, write: Callable[..., Path], fields: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"quantization_config: found .* need calibration"):
            AutoModel.from_pretrained(write(), quantization_config=ThermoConfig(**DATA_FREE | fields))

    def test_a_causal_model_is_refused(self, write: Callable[..., Path]) -> None:
        source = write()
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "qwen2", "pad_token_id": 0}))
        with pytest.raises(ValueError, match="model: found Qwen2ForCausalLM, supported are DreamModel, LLaDAModel"):
            Qwen2ForCausalLM.from_pretrained(source, quantization_config=ThermoConfig(**DATA_FREE))


class TestConfig:
    def test_it_survives_its_dictionary(self) -> None:
        config = ThermoConfig(num_time_groups=3, time_group_starts=(2, 5))
        assert ThermoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert ThermoConfig.from_dict(config.to_dict(), return_unused_kwargs=True, more=1) == (config, {"more": 1})

    @pytest.mark.parametrize(
        ("found", "message"),
        [
            (None, "quantization_config: found None"),
            ([], r"quantization_config: found \[\]"),
            ({}, "quantization_config: found {}"),
            ({"quant_method": "gptq"}, "quantization_config: found .*gptq"),
            ({"quant_method": "thermo"}, "quantization_config.format_version: found 1, allowed are 2 and 3"),
            ({"quant_method": "thermo", "format_version": 4}, "format_version: found 4, allowed are 2 and 3"),
            ({"quant_method": "thermo", "format_version": 2, "bits": 2}, "bits"),
        ],
    )
    def test_anything_else_is_refused(self, found: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ThermoConfig.from_dict(found)

"""Settings that are damaged: from_pretrained of every family's class refuses them as load_model does, word for word."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_layouts import BERT, ESM2, MODERNBERT, ROBERTA
from layouts import DREAM, LLADA, Layout
from tokenizers import Tokenizer
from transformers import AutoModel

from thermo_lib import ThermoConfig, load_model, load_quantized, quantize, save_quantized
from thermo_lib.models.architectures import MODELS
from thermo_lib.models.lm import save_model
from thermo_lib.models.loaded import as_lm
from thermo_lib.pipeline.about import about
from thermo_lib.pipeline.storage import load_any

FAST = ThermoConfig(**{"weights.method": "rtn", "group_size": 16, "timesteps": 4})
EVERY = pytest.mark.parametrize(
    "layout", [BERT, ROBERTA, MODERNBERT, ESM2, DREAM, LLADA], ids=lambda layout: layout.model_type
)
WRONG: dict[str, Any] = {
    "layer_norm_eps": float("nan"),
    "norm_eps": float("nan"),
    "rms_norm_eps": float("nan"),
    "position_embedding_type": "relative_key",
    "is_decoder": True,
    "mask_token_id": 10**6,
    "local_attention": -5,
    "num_attention_heads": 0,
    "hidden_act": "bogus",
    "hidden_activation": "bogus",
    "activation_type": "bogus",
    "dtype": 16,
    "num_hidden_layers": 100_000,
    "n_layers": 100_000,
    "tie_word_embeddings": "no",
    "model_type": "gpt2",
    "deep": json.loads("[" * 100 + "]" * 100),
}


def message(load: Callable[[], object]) -> str | None:
    """What a call says when it refuses; None where it doesn't."""
    try:
        load()
    except ValueError as error:
        return str(error)
    return None


def change(folder: Path, name: str = "config.json", **fields: Any) -> None:
    """Sets fields of a JSON file, which needn't be there."""
    path = folder / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))


@EVERY
def test_a_setting_is_refused_in_the_same_words(tmp_path: Path, tokenizer: Tokenizer, layout: Layout) -> None:
    folder = layout.write(tmp_path / "model", tokenizer)
    model, whole = MODELS[layout.model_type], (folder / "config.json").read_text()
    assert model.from_pretrained(folder).config.mask_token_id == load_model(str(folder)).mask_token_id
    refused = []
    for key, value in WRONG.items():
        change(folder, **{key: value})
        expected = message(lambda: load_model(str(folder)))
        assert message(lambda: model.from_pretrained(folder)) == expected, key
        assert message(lambda: model.from_pretrained(folder.parent, subfolder=folder.name)) == expected, key
        if expected is not None:
            refused.append(key)
            assert expected.startswith(f"{folder / 'config.json'}: ")
            assert "\n" not in expected
        (folder / "config.json").write_text(whole)
    assert {"mask_token_id", "dtype", "model_type", "deep"} <= set(refused)
    assert {"num_hidden_layers", "n_layers"} & set(refused)
    assert {"layer_norm_eps", "norm_eps", "rms_norm_eps"} & set(refused)


def test_a_quantized_folder_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lm = load_model(str(BERT.write(tmp_path / "model", tokenizer)))
    folder = tmp_path / "quantized"
    save_quantized(quantize(lm, FAST), folder)
    whole = (folder / "config.json").read_text()
    for key in ("layer_norm_eps", "is_decoder", "mask_token_id", "num_attention_heads", "hidden_act", "dtype"):
        change(folder, **{key: WRONG[key]})
        expected = message(lambda: load_quantized(folder))
        assert expected is not None
        assert message(lambda: MODELS["bert"].from_pretrained(folder)) == expected
        (folder / "config.json").write_text(whole)


def test_no_quantization_is_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = DREAM.write(tmp_path / "model", tokenizer)
    change(folder, quantization_config=None)
    assert about(str(folder))["quantized"] is None
    expected = load_any(str(folder)).model.state_dict()
    found = AutoModel.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_files_of_a_variant_are_checked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = DREAM.write(tmp_path / "model", tokenizer)
    index = (folder / "model.safetensors.index.json").rename(folder / "model.safetensors.index.fp16.json")
    whole = index.read_text()
    assert message(lambda: AutoModel.from_pretrained(folder, variant="fp16")) is None
    assert "expected model.bf16.safetensors" in str(message(lambda: AutoModel.from_pretrained(folder, variant="bf16")))
    weight_map = json.loads(whole)["weight_map"]
    for content, problem in (
        ({"weight_map": weight_map}, "metadata: found None, expected an object"),
        ({"metadata": {}, "weight_map": weight_map | {"more": 3}}, "weight_map: more: found 3, allowed are files"),
        ({"metadata": {}}, "weight_map: found NoneType, expected an object from tensors to files"),
    ):
        index.write_text(json.dumps(content))
        assert f"{index}: {problem}" in str(message(lambda: AutoModel.from_pretrained(folder, variant="fp16")))
    expected = "variant: found 3, allowed are None and a word in the names of files"
    assert message(lambda: AutoModel.from_pretrained(folder, variant=3)) == expected


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"max_new_tokens": "x"}, "max_new_tokens: found 'x', which transformers refuses ('<=' not supported"),
        (
            {"temperature": 0.5, "early_stopping": []},
            "early_stopping: found [], which transformers refuses (unhashable",
        ),
        ({"watermarking_config": 3}, "watermarking_config: found 3, which transformers refuses ("),
        ({"cache_implementation": "x"}, "cache_implementation: found 'x', which transformers refuses (Invalid"),
        (
            {"do_sample": False, "num_return_sequences": 2},
            "num_return_sequences: found 2, which transformers refuses (",
        ),
        ({"top_p": float("nan")}, "found invalid JSON (top_p: NaN, which is no number of JSON)"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_settings_of_generation(tmp_path: Path, tokenizer: Tokenizer, fields: dict[str, Any], problem: str) -> None:
    folder = DREAM.write(tmp_path / "model", tokenizer)
    change(folder, "generation_config.json", **fields)
    said = str(message(lambda: AutoModel.from_pretrained(folder)))
    assert said.startswith(str(folder / "generation_config.json"))
    assert problem in said
    assert "\n" not in said


def test_nan_is_not_carried_over(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = DREAM.write(tmp_path / "model", tokenizer)
    change(folder, "generation_config.json", eos_token_id=2, temperature=float("inf"))
    expected = "generation_config.json, line 1: found invalid JSON (temperature: Infinity, which is no number of JSON)"
    assert expected in str(message(lambda: load_model(str(folder))))


def test_a_type_that_weights_cannot_have(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = DREAM.write(tmp_path / "model", tokenizer)
    lm = load_model(str(folder))
    save_quantized(quantize(lm, FAST), tmp_path / "quantized")
    expected = "dtype: found torch.int8, allowed are torch.float64, torch.float32, torch.float16, torch.bfloat16"
    for load in (
        lambda: load_model(str(folder), dtype=torch.int8),
        lambda: load_quantized(tmp_path / "quantized", dtype=torch.int8),
        lambda: AutoModel.from_pretrained(folder, dtype=torch.int8),
        lambda: AutoModel.from_pretrained(tmp_path / "quantized", dtype=torch.int8),
        lambda: save_model(lm, tmp_path / "saved", torch.int8),
    ):
        assert message(load) == expected
    assert not (tmp_path / "saved").exists()


def test_a_quantized_model_has_no_larger_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_quantized(quantize(load_model(str(DREAM.write(tmp_path / "model", tokenizer))), FAST), tmp_path / "quantized")
    larger = Tokenizer.from_file(str(tmp_path / "quantized/tokenizer.json"))
    larger.add_tokens([f"<more {number}>" for number in range(1000)])
    larger.save(str(tmp_path / "quantized/tokenizer.json"))
    for load in (load_quantized, lambda folder: as_lm(AutoModel.from_pretrained(folder))):
        said = str(message(lambda load=load: load(tmp_path / "quantized")))
        assert "tokenizer: found id " in said
        assert said.endswith(f"allowed is below vocab_size={load_model(str(tmp_path / 'model')).vocab_size}")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_template_that_has_no_end(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    folder = DREAM.write(tmp_path / "model", tokenizer)
    path = folder / "additional_chat_templates/rag.jinja"
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert message(lambda: load_model(str(folder))) == f"{path}: found no regular file"

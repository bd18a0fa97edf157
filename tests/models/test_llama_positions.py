"""Llama's positions as Llama 3.1 and 3.2 scale them: what models compute, what is refused, and what is saved."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import A2D_LLAMA, DREAM, VOCABULARY, Layout, stored
from tokenizers import Tokenizer

from thermo_lib import ThermoConfig, load_model, load_quantized, quantize, quantize_checkpoint, save_quantized
from thermo_lib.models.architectures import MODELS
from thermo_lib.models.families import read_config
from thermo_lib.models.lm import save_model

# Of four pairs of features the first stays, the last is slowed down by the factor, and two are in between.
SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
THETA = 100.0
OLD: dict[str, Any] = {"rope_theta": THETA, "rope_scaling": SCALING}
NEW: dict[str, Any] = {"rope_parameters": SCALING | {"rope_theta": THETA}}
WRITTEN = pytest.mark.parametrize("written", [OLD, NEW], ids=["transformers 4", "transformers 5"])


def scaled(written: dict[str, Any]) -> Layout:
    kept = {key: value for key, value in A2D_LLAMA.config.items() if not key.startswith("rope_")}
    return replace(A2D_LLAMA, config=kept | written, theta=THETA, scaling=SCALING)


@pytest.fixture
def text() -> torch.Tensor:
    """Two sequences of 48 tokens, so long that slow pairs of features turn too."""
    return torch.randint(5, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(4))


@WRITTEN
def test_logits_are_those_of_the_plain_implementation(
    written: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer, text: torch.Tensor
) -> None:
    layout = scaled(written)
    folder = layout.write(tmp_path / "llama", tokenizer)
    expected = torch.stack([layout.logits(stored(folder), ids) for ids in text])
    other = torch.stack([replace(layout, scaling=None).logits(stored(folder), ids) for ids in text])
    assert (expected - other).abs().max() > 0.1  # so that the scaling matters here
    for model in (layout.load(folder).model, MODELS["a2d-llama"].from_pretrained(folder, dtype=torch.float32)):
        torch.testing.assert_close(model(text).logits.double(), expected, rtol=0, atol=1e-4)


@WRITTEN
def test_it_is_saved_and_read_again(
    written: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer, text: torch.Tensor
) -> None:
    folder = scaled(written).write(tmp_path / "llama", tokenizer)
    lm = load_model(str(folder))
    expected = lm.model(text).logits
    save_model(lm, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8")).items() >= OLD.items()
    assert torch.equal(load_model(str(tmp_path / "again")).model(text).logits, expected)
    quantized = quantize(lm, ThermoConfig(weights={"method": "rtn", "bits": 4}))
    save_quantized(quantized, tmp_path / "q")
    assert torch.equal(load_quantized(tmp_path / "q").model(text).logits, quantized.model(text).logits)
    quantize_checkpoint(folder, tmp_path / "streamed", quantized.config)
    assert torch.equal(load_quantized(tmp_path / "streamed").model(text).logits, quantized.model(text).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.5}, "rope_scaling.factor: found 0.5, allowed are numbers from 1 to"),
        ({"factor": float("nan")}, "rope_scaling.factor: found nan, allowed are numbers from 1 to"),
        ({"factor": True}, "rope_scaling.factor: found True, allowed are numbers from 1 to"),
        ({"low_freq_factor": 0}, "rope_scaling.low_freq_factor: found 0, allowed are numbers"),
        ({"high_freq_factor": 1}, "rope_scaling.high_freq_factor: found 1, allowed are numbers above low_freq_factor"),
        ({"high_freq_factor": 10**300}, "rope_scaling.high_freq_factor: found 1000"),
        (
            {"original_max_position_embeddings": 64.0},
            "rope_scaling.original_max_position_embeddings: found 64.0, allowed are whole numbers from 1",
        ),
        ({"rope_type": "yarn"}, "rope_scaling: found {'factor': 8.0"),
        ({"beta_fast": 1}, "rope_scaling: found {'factor': 8.0"),
        (["llama3"], "rope_scaling: found ['llama3'], allowed are null and an object with rope_type 'llama3' and"),
        ("llama3", "rope_scaling: found 'llama3', allowed are null"),
        ({}, ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("read", [read_config, MODELS["a2d-llama"].config_class.from_pretrained], ids=["ours", "auto"])
def test_what_is_not_llama_3s_is_refused(
    changes: Any, message: str, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    scaling = SCALING | changes if isinstance(changes, dict) else changes
    config = scaled(OLD).config | {"rope_scaling": scaling, "mask_token_id": 3}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if not message:  # as it is published
        assert read(tmp_path).rope_parameters == SCALING | {"rope_theta": THETA}
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path)


def test_other_families_refuse_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DREAM.config | OLD), encoding="utf-8")
    with pytest.raises(ValueError, match=r"rope_scaling: found \{'factor': 8.0"):
        read_config(tmp_path)

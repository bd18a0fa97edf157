"""What a folder says of its family is enough to load it, or the error says what is missing or not supported yet."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from layouts import (
    A2D_LLAMA,
    A2D_QWEN2,
    A2D_QWEN3,
    DREAM,
    EVERY,
    FAST_DLLM,
    LLADA,
    OPEN_DCODER,
    SDAR,
    STABLE_DIFFCODER,
    Layout,
    stored,
)
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel

from thermo_lib import ThermoConfig, load_model, load_quantized, quantize, quantize_checkpoint, save_quantized
from thermo_lib.models.architectures import MODELS
from thermo_lib.models.families import read_config
from thermo_lib.models.lm import save_model
from thermo_lib.models.streamed import load_streamed
from thermo_lib.pipeline.storage import load_any

FAST = ThermoConfig(quantizer="rtn", activation_bits=16, num_time_groups=1, group_size=16)
MASK = "<|mask|>"


@pytest.fixture
def write(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Writes a checkpoint of a layout with changed settings."""
    return lambda layout, **changes: layout.write(tmp_path / "source", tokenizer, **changes)


def refused(folder: Path, config: dict[str, Any], message: str, family: str | None = None) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(f'{folder}/config.json: {message}')}$"):
        read_config(folder, family)


class TestMaskToken:
    """Its id is in config.json, or else the tokenizer's, of the text in tokenizer_config.json or the family's own."""

    def test_config_json_comes_first(self, write: Callable[..., Path]) -> None:
        folder = write(A2D_QWEN3, mask_token_id=17)
        assert load_model(str(folder)).mask_token_id == 17
        assert AutoConfig.from_pretrained(folder).mask_token_id == 17

    @pytest.mark.parametrize("text", [None, "<|endoftext|>", {"content": "<|endoftext|>"}], ids=str)
    def test_the_tokenizer_knows_it_otherwise(
        self, write: Callable[..., Path], tokenizer: Tokenizer, text: Any
    ) -> None:
        folder = write(A2D_LLAMA)
        if text is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": text}), encoding="utf-8")
        expected = tokenizer.token_to_id(MASK if text is None else "<|endoftext|>")
        assert load_model(str(folder)).mask_token_id == expected
        for config in (AutoConfig.from_pretrained(folder), AutoModel.from_pretrained(folder).config):
            assert config.mask_token_id == expected
        assert MODELS["a2d-llama"].from_pretrained(folder).config.mask_token_id == expected

    def test_a_tokenizer_without_it_is_refused(self, write: Callable[..., Path]) -> None:
        folder = write(A2D_QWEN2)
        (folder / "tokenizer_config.json").write_text('{"mask_token": "<other>"}', encoding="utf-8")
        message = (
            "mask_token: found no '<other>' in the tokenizer, expected that token, or mask_token_id in config.json"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            load_model(str(folder))

    def test_published_code_may_give_it(self, write: Callable[..., Path]) -> None:
        folder = write(STABLE_DIFFCODER)
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        published = {key: value for key, value in content.items() if key not in ("mask_token_id", "block_length")}
        (folder / "config.json").write_text(json.dumps(published), encoding="utf-8")
        with pytest.warns(UserWarning, match="block_length: found none in .*, 4 is assumed"):
            config = read_config(folder, "stable-diffcoder")
        assert (config.mask_token_id, config.block_length) == (5, 4)

    def test_that_of_a_hub_id_is_downloaded_with_it(
        self, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From a cache that has the models: none of their configurations says the token."""
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        for name, layout in (("a2d", A2D_QWEN3), ("sdar", SDAR), ("fast", FAST_DLLM)):
            commit, root = "a" * 40, tmp_path / f"models--x--{name}"
            (root / "refs").mkdir(parents=True)
            (root / "refs" / "main").write_text(commit, encoding="utf-8")
            (root / "snapshots").mkdir()
            layout.write(root / "snapshots" / commit, tokenizer)
            configs = [AutoConfig.from_pretrained(f"x/{name}"), AutoModel.from_pretrained(f"x/{name}").config]
            found = {*(config.mask_token_id for config in configs), load_model(f"x/{name}").mask_token_id}
            assert found == {tokenizer.token_to_id(MASK)}

    def test_a_configuration_without_a_folder_must_have_it(self) -> None:
        with pytest.raises(ValueError, match="mask_token_id: found none, and no tokenizer in 'None'"):
            MODELS["a2d-qwen2"].config_class.from_dict(dict(A2D_QWEN2.config))


class TestFamily:
    """A plain configuration says nothing of diffusion: the family is asked for, and saved."""

    @pytest.mark.parametrize(
        ("model_type", "allowed"),
        [
            ("qwen2", "Dream, a2d-qwen2, open-dcoder, Fast_dLLM_Qwen"),
            ("qwen3", "a2d-qwen3, sdar"),
            ("llama", "a2d-llama, stable-diffcoder"),
        ],
    )
    def test_it_is_asked_for(self, tmp_path: Path, model_type: str, allowed: str) -> None:
        config = A2D_QWEN2.config | {"model_type": model_type}
        blocks = f"{model_type!r} blocks, which say nothing of diffusion, are {allowed}"
        refused(tmp_path, config, f"family: found None, allowed with {blocks}")

    @pytest.mark.parametrize(
        ("layout", "family", "allowed"),
        [
            (OPEN_DCODER, "a2d-qwen3", "Dream, a2d-qwen2, open-dcoder, Fast_dLLM_Qwen"),
            (OPEN_DCODER, "llada", "Dream, a2d-qwen2, open-dcoder, Fast_dLLM_Qwen"),
            (OPEN_DCODER, "other", "Dream, a2d-qwen2, open-dcoder, Fast_dLLM_Qwen"),
            (DREAM, "open-dcoder", "Dream"),
            (A2D_QWEN3, "a2d-qwen2", "a2d-qwen3"),
        ],
    )
    def test_another_that_does_not_fit_is_refused(
        self, tmp_path: Path, layout: Layout, family: str, allowed: str
    ) -> None:
        found = f"family: found {family!r}, allowed with model_type {layout.config['model_type']!r} is {allowed}"
        refused(tmp_path, layout.config, found, family)

    def test_its_own_name_changes_nothing(self, write: Callable[..., Path]) -> None:
        folder = write(DREAM)
        assert read_config(folder, "Dream").to_dict() == read_config(folder).to_dict()

    @EVERY
    def test_what_is_made_from_it_loads_without_saying(
        self, write: Callable[..., Path], tmp_path: Path, layout: Layout
    ) -> None:
        source = write(layout, tied=True)
        lm = layout.load(source)
        save_model(lm, tmp_path / "saved")
        save_quantized(quantize(lm, FAST), tmp_path / "quantized")
        quantize_checkpoint(source, tmp_path / "streamed", FAST, family=layout.family)
        lm.model.save_pretrained(tmp_path / "by transformers")
        ids = torch.arange(12).view(2, 6)
        full = [load_model(str(tmp_path / "saved")).model, load_streamed(str(tmp_path / "saved")).model]
        full.append(AutoModel.from_pretrained(tmp_path / "by transformers", dtype=torch.float32))
        codes = [load_quantized(tmp_path / "quantized").model, load_any(str(tmp_path / "streamed")).model]
        codes.append(AutoModel.from_pretrained(tmp_path / "streamed", dtype=torch.float32))
        for models in (full, codes):
            for model in models:
                assert model.config.model_type == layout.model_type
                assert model.config.mask_token_id == lm.mask_token_id
                assert torch.equal(model(ids).logits, models[0](ids).logits)
        assert torch.equal(full[0](ids).logits, lm.model(ids).logits)
        assert stored(tmp_path / "quantized").keys() == stored(tmp_path / "streamed").keys()

    def test_an_unfinished_run_of_another_family_is_not_continued(
        self, write: Callable[..., Path], tmp_path: Path
    ) -> None:
        source = write(OPEN_DCODER)
        identities = [load_streamed(str(source), family=family).identity() for family in ("open-dcoder", "a2d-qwen2")]
        assert identities[0] == identities[1] | {"family": "open-dcoder"}


class TestUnsupported:
    """What these modules would compute wrongly is recognized, and the error says what it is."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"model_type": "llada2_moe", "num_experts": 256},
                "model_type: found 'llada2_moe', a mixture of experts (LLaDA2) with block-causal attention",
            ),
            (
                {"model_type": "sdar_moe", "num_experts": 128},
                "model_type: found 'sdar_moe', a mixture of experts (SDAR) with block-causal attention",
            ),
            ({"model_type": "rnd1", "num_experts": 128}, "model_type: found 'rnd1', a mixture of experts (RND1)"),
            ({"model_type": "llada", "num_experts": 64}, "num_experts: found 64, a mixture of experts"),
            ({"model_type": "qwen3_moe", "num_experts": 64}, "num_experts: found 64, a mixture of experts"),
            ({"expert_interval": 1}, "expert_interval: found 1, a mixture of experts"),
            *(
                (
                    {key: value},
                    f"{key}: found {value!r}, a Dream model with Qwen3 blocks and block-causal attention "
                    "(DreamReasoner)",
                )
                for key, value in {"block_size": 32, "head_dim": 128, "attention_bias": False}.items()
            ),
        ],
        ids=str,
    )
    def test_it_is_named(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        refused(tmp_path, DREAM.config | changes, f"{message}, which isn't supported yet")

    @pytest.mark.parametrize(
        ("layout", "changes", "message"),
        [
            (
                A2D_QWEN2,
                {"layer_types": ["full_attention", "chunked"]},
                "layer_types: found ['full_attention', 'chunked'], allowed is 'full_attention' for every layer",
            ),
            (A2D_QWEN2, {"use_sliding_window": True}, "use_sliding_window: found True, allowed is False"),
            (A2D_QWEN3, {"head_dim": 15}, "head_dim: found 15, allowed are even numbers"),
            (A2D_QWEN3, {"head_dim": None}, "missing head_dim"),
            (A2D_QWEN3, {"attention_bias": 1}, "attention_bias: found 1, allowed are false and true"),
            (A2D_LLAMA, {"head_dim": 0}, "head_dim: found 0, allowed are whole numbers from 1 to 16777216"),
            (A2D_LLAMA, {"pretraining_tp": 2}, "pretraining_tp: found 2, allowed is 1"),
            (LLADA, {"layer_types": 2}, "layer_types: found 2, allowed is 'full_attention' for every layer"),
        ],
        ids=str,
    )
    def test_a_setting_that_the_blocks_cannot_compute(
        self, tmp_path: Path, layout: Layout, changes: dict[str, Any], message: str
    ) -> None:
        refused(tmp_path, layout.config | {"mask_token_id": 3} | changes, message)

"""Checkpoints in the layouts that models are published in: names, settings, shards and what they compute.

Every expected number comes from ``Layout.logits``, the blocks written out in float64 without ``transformers``, on the
tensors as the checkpoint stores them.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_layouts import ANY, AnyLayout
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import (
    A2D_QWEN3,
    DREAM,
    DREAM_7B,
    EVERY,
    LLADA,
    LLADA_8B,
    MASK_TOKEN_ID,
    VOCABULARY,
    Layout,
    stored,
    write_shards,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from thermo_lib import ThermoConfig, calibrate, load_model, load_quantized, quantize, save_quantized
from thermo_lib.models import settings as published_settings
from thermo_lib.models.architectures import build_model
from thermo_lib.models.families import read_config
from thermo_lib.models.lm import DiffusionLM, save_model
from thermo_lib.models.published import DreamConfig
from thermo_lib.quant import calls


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Callable[[AnyLayout], Path]:
    """Gives a checkpoint of a layout; tests don't change it."""
    folder = tmp_path_factory.mktemp("published")

    def make(layout: AnyLayout) -> Path:
        path = folder / (layout.model_type if isinstance(layout, Layout) else layout.label)
        return path if path.exists() else layout.write(path, tokenizer)

    return make


@pytest.fixture
def random_text() -> Tensor:
    """Two sequences of 11 tokens, three of them masked."""
    ids = torch.randint(5, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(4))
    ids[0, [2, 10]] = ids[1, 0] = MASK_TOKEN_ID
    return ids


class TestForward:
    """A loaded checkpoint computes what its architecture says, to 1e-4 in float32."""

    @EVERY
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_logits_are_those_of_the_plain_implementation(
        self, layout: Layout, checkpoints: Callable[[Layout], Path], random_text: Tensor, attention: str
    ) -> None:
        folder = checkpoints(layout)
        expected = torch.stack([layout.logits(stored(folder), ids) for ids in random_text])
        model = layout.load(folder).model
        model.set_attn_implementation(attention)
        logits = model(random_text).logits
        assert logits.dtype == torch.float32
        assert expected.std() > 1  # so that 1e-4 says something
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)

    @EVERY
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_rows_of_different_length_padded_on_the_left_or_the_right(
        self, layout: Layout, tmp_path: Path, tokenizer: Tokenizer, random_text: Tensor, attention: str, tied: bool
    ) -> None:
        folder = layout.write(tmp_path / "padded", tokenizer, tied=tied)
        model, tensors = layout.load(folder).model, stored(folder)
        model.set_attn_implementation(attention)
        for start, stop in ((4, 11), (0, 7)):
            logits = model(random_text, torch.tensor([[True] * 11, [start <= n < stop for n in range(11)]])).logits
            for row, part in enumerate((slice(0, 11), slice(start, stop))):
                expected = layout.logits(tensors, random_text[row, part])
                torch.testing.assert_close(logits[row, part].double(), expected, rtol=0, atol=1e-4)

    @ANY
    def test_a_block_called_alone_sees_both_directions(
        self, layout: AnyLayout, checkpoints: Callable[[AnyLayout], Path]
    ) -> None:
        model = layout.load(checkpoints(layout)).model
        states = torch.randn(1, 4, layout.hidden, generator=torch.Generator().manual_seed(6))
        changed = states.clone()
        changed[:, -1] *= -1
        given = model.block_arguments(states)[0]
        outputs = [model.blocks[0](x, **given) for x in (states, changed)]
        assert ((outputs[0] - outputs[1]).abs().amax(-1) > 1e-3).all()

    @ANY
    def test_layers_are_told_which_tokens_are_masked_and_which_step_it_is(
        self, layout: AnyLayout, checkpoints: Callable[[AnyLayout], Path], random_text: Tensor
    ) -> None:
        lm = layout.load(checkpoints(layout))
        ids = random_text.where(random_text != MASK_TOKEN_ID, lm.mask_token_id)
        told: list[Any] = []
        layer = next(module for module in lm.model.blocks[1].modules() if isinstance(module, nn.Linear))
        layer.register_forward_pre_hook(lambda *_: told.append((calls.CALL.step, calls.CALL.is_masked)))
        for step in ((0, 1), (2, 7)):
            if step != (0, 1):  # which is the first until another is said
                lm.set_timestep(*step)
            lm.model.hidden(ids)
            assert told[-1][0] == step
            assert torch.equal(told[-1][1], random_text == MASK_TOKEN_ID)

    @pytest.mark.parametrize(
        ("config", "parameters"),
        [
            # embeddings and head, per block: attention, its biases, MLP, two norms; the last norm.
            (
                DREAM_7B,
                2 * 152064 * 3584
                + 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584)
                + 3584,
            ),
            (LLADA_8B, 2 * 126464 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 12288 + 2 * 4096) + 4096),
        ],
        ids=["Dream 7B", "LLaDA 8B"],
    )
    def test_the_published_sizes(self, tmp_path: Path, config: dict[str, Any], parameters: int) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with torch.device("meta"):
            model = build_model(read_config(tmp_path))
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model.config.rope_parameters["rope_theta"] == config["rope_theta"]
        assert model.config.rms_norm_eps == config["rms_norm_eps"]
        assert model.config.mask_token_id == config["mask_token_id"]
        assert model.lm_head.weight is not model.model.embed_tokens.weight


class TestTensors:
    """Every tensor of the files lands in the module it belongs to; one too many or too few is named as stored."""

    @EVERY
    def test_every_tensor_lands(self, layout: Layout, checkpoints: Callable[[Layout], Path]) -> None:
        # The names for Qwen3 are the library's; LLaDA's stand for them role by role.
        folder = checkpoints(layout)
        tensors, state = stored(folder), layout.load(folder).model.state_dict()
        assert len(state) == len(tensors)
        for role in layout.names:
            for block in range(2):
                for kind in ("weight", "bias"):
                    name, ours = f"{layout.name(role, block)}.{kind}", f"{A2D_QWEN3.name(role, block)}.{kind}"
                    assert (name in tensors) == (ours in state)
                    if name in tensors:
                        assert torch.equal(state[ours], tensors[name].float()), name

    @ANY
    @given(data=st.data())
    @settings(max_examples=6)
    def test_a_damaged_tensor_has_its_stored_name_in_the_message(
        self,
        layout: AnyLayout,
        checkpoints: Callable[[AnyLayout], Path],
        tmp_path_factory: pytest.TempPathFactory,
        data: Any,
    ) -> None:
        source = checkpoints(layout)
        folder = tmp_path_factory.mktemp("damaged")
        for path in source.glob("*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
        tensors = stored(source)
        name = data.draw(st.sampled_from(sorted(tensors)))
        shape = tuple(tensors[name].shape)
        damage = data.draw(st.sampled_from(["missing", "extra", "wrong shape", "NaN"]))
        if damage == "missing":
            del tensors[name]
            message = f"missing tensors {name} (1 in all)"
        elif damage == "extra":
            tensors[f"{name}_scale"] = torch.ones(1)
            message = f"unexpected tensors {name}_scale (1 in all)"
        elif damage == "wrong shape":
            tensors[name] = torch.zeros(7, dtype=torch.bfloat16)
            message = f"tensor {name}: found shape (7,), expected {shape}"
        else:
            tensors[name].view(-1)[-1] = torch.nan
            message = f"tensor {name}: found NaN or infinity, expected finite numbers"
        names = sorted(tensors)
        write_shards(folder, {n: tensors[n] for n in names[:9]}, {n: tensors[n] for n in names[9:]})
        with pytest.raises(ValueError, match=f"^{re.escape(f'{folder}: {message}')}$"):
            layout.load(folder)

    @ANY
    def test_a_tied_head_is_the_embedding(
        self, layout: AnyLayout, tmp_path: Path, tokenizer: Tokenizer, random_text: Tensor
    ) -> None:
        folder = layout.write(tmp_path / "tied", tokenizer, tied=True)
        lm, tensors = layout.load(folder), stored(folder)
        expected = torch.stack([layout.logits(tensors, ids) for ids in random_text])
        torch.testing.assert_close(lm.model(random_text).logits.double(), expected, rtol=0, atol=1e-4)
        save_model(lm, tmp_path / "again")
        assert stored(tmp_path / "again").keys() == tensors.keys()


class TestConfiguration:
    """Only what the modules compute is accepted: an option they'd ignore is refused, with field, found, allowed."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"include_bias": True}, "include_bias: found True, allowed is False"),
            ({"include_qkv_bias": True}, "include_qkv_bias: found True, allowed is False"),
            ({"block_type": "sequential"}, "block_type: found 'sequential', allowed is 'llama'"),
            ({"activation_type": "swiglu"}, "activation_type: found 'swiglu', allowed is 'silu'"),
            ({"layer_norm_type": "default"}, "layer_norm_type: found 'default', allowed is 'rms'"),
            ({"attention_layer_norm": True}, "attention_layer_norm: found True, allowed is False"),
            ({"alibi": True}, "alibi: found True, allowed is False"),
            ({"alibi": 0}, "alibi: found 0, allowed is False"),
            ({"rope": False}, "rope: found False, allowed is True"),
            ({"scale_logits": True}, "scale_logits: found True, allowed is False"),
            ({"block_group_size": 2}, "block_group_size: found 2, allowed is 1"),
            ({"n_kv_heads": 3}, "n_kv_heads: found 3, allowed are divisors of n_heads = 4"),
            ({"n_kv_heads": 0}, "n_kv_heads: found 0, allowed are whole numbers from 1 to 16777216"),
            ({"n_heads": 5}, "n_heads: found 5, allowed are divisors of d_model = 32"),
            ({"d_model": "wide"}, "d_model: found 'wide', allowed are whole numbers from 1 to 16777216"),
            ({"embedding_size": 384}, "embedding_size: found 384, allowed is vocab_size = 320"),
            ({"mask_token_id": 320}, "mask_token_id: found 320, allowed is below vocab_size = 320"),
            ({"n_layers": 0}, "n_layers: found 0, allowed are whole numbers from 1 to 512"),
            ({"n_layers": 2**31}, "n_layers: found 2147483648, allowed are whole numbers from 1 to 512"),
            (
                {"mlp_hidden_size": 2**31},
                "mlp_hidden_size: found 2147483648, allowed are whole numbers from 1 to 16777216",
            ),
            ({"mask_token_id": -1}, "mask_token_id: found -1, allowed are whole numbers from 0 to 16777216"),
            (
                {"n_heads": 32, "n_kv_heads": 32},
                "n_heads: found 32, which makes heads of 1, allowed are those of an even",
            ),
            ({"max_sequence_length": "long"}, "max_sequence_length: found 'long', allowed are whole numbers from 1 to"),
            ({"weight_tying": 1}, "weight_tying: found 1, allowed are false and true"),
            ({"rope_theta": 0}, "rope_theta: found 0, allowed are numbers above 0"),
            ({"rope_theta": 10**30}, "rope_theta: found 1000000000000000000000000000000, allowed are"),
            ({"rope_theta": float("inf")}, "rope_theta: found inf, allowed are numbers above 0"),
            ({"rms_norm_eps": "small"}, "rms_norm_eps: found 'small', allowed are numbers above 0"),
            ({"n_layers": None, "weight_tying": None}, "missing n_layers, weight_tying"),
        ],
        ids=str,
    )
    def test_unsupported_options_of_llada(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        self._assert_refused(tmp_path, LLADA.config | changes, message)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: found {'type': 'yarn', 'factor': 4.0}"),
            ({"use_sliding_window": True}, "use_sliding_window: found True, allowed is False"),
            (
                {"num_key_value_heads": 3},
                "num_key_value_heads: found 3, allowed are divisors of num_attention_heads = 4",
            ),
            ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: found {'rope_type': 'yarn'}, allowed is"),
            ({"rope_parameters": {"type": "linear"}}, "rope_parameters: found {'type': 'linear'}, allowed is"),
            ({"model_type": "opt"}, "model_type: found 'opt', supported are Dream, llada"),
            ({"model_type": ["Dream"]}, "model_type: found ['Dream'], supported are Dream, llada"),
            ({"hidden_act": "swish2"}, "hidden_act: found 'swish2', allowed are "),
            ({"hidden_act": ["silu"]}, "hidden_act: found ['silu'], allowed are "),
            ({"tie_word_embeddings": "no"}, "tie_word_embeddings: found 'no', allowed are false and true"),
            ({"max_position_embeddings": 2.5}, "max_position_embeddings: found 2.5, allowed are whole numbers from 1"),
            ({"rms_norm_eps": 16}, "rms_norm_eps: found 16, allowed are numbers above 0 and below 1"),
            ({"rms_norm_eps": 1e308}, "rms_norm_eps: found 1e+308, allowed are numbers above 0 and below 1"),
            ({"pad_token_id": [1]}, "pad_token_id: found [1], allowed are whole numbers from 0"),
            ({"dtype": 16}, "dtype: found 16, allowed are float32, bfloat16, float16, float64"),
            ({"torch_dtype": "float99"}, "torch_dtype: found 'float99', allowed are float32, bfloat16"),
            ({"auto_map": 2}, "auto_map: found 2, expected an object"),
        ],
        ids=str,
    )
    def test_unsupported_options_of_dream(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        self._assert_refused(tmp_path, DREAM.config | changes, message)

    def _assert_refused(self, folder: Path, config: dict[str, Any], message: str) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}"):
            read_config(folder)

    @pytest.mark.parametrize("text", ["[" * 100_000, f'{{"vocab_size": {10**400}}}'], ids=["deep", "long"])
    def test_what_python_cannot_read_is_no_json(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"config\.json(, line 1)?: found invalid JSON"):
            read_config(tmp_path)

    @pytest.mark.parametrize("levels", [65, 900])
    def test_nesting_is_bounded(self, tmp_path: Path, levels: int) -> None:
        text = '{"x": ' + "[" * (levels - 1) + "]" * (levels - 1) + "}"
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        for read in (read_config, DreamConfig.from_pretrained):
            with pytest.raises(ValueError, match=r"config\.json: found objects and lists nested deeper than 64"):
                read(tmp_path)

    def test_a_large_file_is_refused_before_it_is_read(self, tmp_path: Path) -> None:
        with (tmp_path / "config.json").open("wb") as file:
            file.truncate(2**40)
        with pytest.raises(ValueError, match=r"config\.json: found 1099511627776 bytes, allowed are 16777216 at most"):
            read_config(tmp_path)

    def test_what_transformers_refuses_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(published_settings, "_check_setting", lambda *_: None)  # of a new key
        (tmp_path / "config.json").write_text(json.dumps(DREAM.config | {"rms_norm_eps": 16}), encoding="utf-8")
        for read in (read_config, DreamConfig.from_pretrained):
            with pytest.raises(ValueError, match=r"^[^\n]*'rms_norm_eps' expected float, got int[^\n]*$"):
                read(tmp_path)

    @EVERY
    def test_the_place_where_transformers_5_writes_rope_theta(self, layout: Layout, tmp_path: Path) -> None:
        rope = {"rope_type": "default", "rope_theta": 123.0}
        config = layout.config | {"rope_parameters": rope, "mask_token_id": MASK_TOKEN_ID}
        del config["rope_theta"]
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert read_config(tmp_path, layout.family).rope_parameters["rope_theta"] == 123.0


class TestSave:
    """A saved model is in the layout that it was loaded from, quantized or not."""

    @ANY
    def test_settings_and_names_are_the_published_ones(
        self, layout: AnyLayout, checkpoints: Callable[[AnyLayout], Path], tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        source = checkpoints(layout)
        save_model(layout.load(source), tmp_path / "again")
        config = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
        published = {"mask_token_id": tokenizer.token_to_id("<|mask|>")} | layout.config
        published |= {"torch_dtype": "bfloat16", "model_type": layout.model_type}
        assert config.items() <= published.items()
        assert read_config(tmp_path / "again").to_dict() == read_config(source, layout.family).to_dict()
        tensors, again = stored(source), stored(tmp_path / "again")
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensors[name]) for name in tensors)

    @ANY
    def test_a_quantized_model_comes_back_bit_for_bit(
        self, layout: AnyLayout, checkpoints: Callable[[AnyLayout], Path], tmp_path: Path, random_text: Tensor
    ) -> None:
        lm = quantized(layout.load(checkpoints(layout)))
        save_quantized(lm, tmp_path / "q")
        loaded = load_quantized(tmp_path / "q")
        outputs = []
        for timestep in (0, 5):
            for model in (lm, loaded):
                model.set_timestep(timestep, 6)
                outputs.append(model.model(random_text).logits)
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[2], outputs[3])
        assert not torch.equal(outputs[0], outputs[2])
        modules = {name.rpartition(".")[0] for name in stored(tmp_path / "q")}
        assert modules == {name.rpartition(".")[0] for name in layout.shapes()}

    def test_a_damaged_quantized_tensor_has_its_stored_name_in_the_message(
        self, checkpoints: Callable[[AnyLayout], Path], tmp_path: Path
    ) -> None:
        save_quantized(quantized(load_model(str(checkpoints(LLADA)))), tmp_path / "q")
        whole = stored(tmp_path / "q")
        name = "model.transformer.blocks.1.attn_out"
        damages: dict[str, Callable[[Tensor], Tensor | None]] = {
            "packed": lambda codes: codes.int(),
            "weight_scale": lambda scale: -scale,
            "activation_scale": lambda _: None,
        }
        for kind, damage in damages.items():
            tensor = damage(whole[f"{name}.{kind}"])
            changed = {n: t for n, t in whole.items() if n != f"{name}.{kind}"}
            save_file(
                changed if tensor is None else changed | {f"{name}.{kind}": tensor},
                tmp_path / "q" / "model.safetensors",
            )
            with pytest.raises(ValueError, match=rf"tensors? {name}\.{kind}"):
                load_quantized(tmp_path / "q")


def quantized(lm: DiffusionLM) -> DiffusionLM:
    """W2A8 with static ranges that depend on the timestep and on whether the token is masked."""
    ids = torch.randint(5, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(5))
    calibration = calibrate(lm, [(ids, None)], timesteps=6, source="trajectory", seed=0, progress=False)
    config = ThermoConfig(
        bit_width=2,
        group_size=16,
        activation_bits=8,
        activation_token_states=True,
        num_time_groups=2,
        timesteps=6,
        quantizer="rtn",
    )
    return quantize(lm, config, calibration)

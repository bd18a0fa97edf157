"""Masked language models as absorbing diffusion: what they compute, accept and refuse, against blocks written out."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_layouts import (
    BERT,
    BIASED,
    ENCODERS,
    ESM1B,
    ESM2,
    EVERY_ENCODER,
    MODERNBERT,
    ROBERTA,
    EncoderLayout,
)
from layouts import MASK_TOKEN_ID, VOCABULARY, stored
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from thermo_lib import (
    ThermoConfig,
    calibrate,
    generate,
    load_model,
    load_quantized,
    quantize,
    quantize_checkpoint,
    save_quantized,
)
from thermo_lib.integrations.auto import Waiting
from thermo_lib.models.architectures import MODELS
from thermo_lib.models.families import read_config
from thermo_lib.models.lm import save_model, stored_dtype
from thermo_lib.models.streamed import load_streamed
from thermo_lib.pipeline.about import about, words
from thermo_lib.pipeline.model import dequantized, tables

LAYOUTS = [*ENCODERS, BIASED]
SMALL = ThermoConfig(quantizer="rtn", activation_bits=16, num_time_groups=1, group_size=16, timesteps=2)
OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
EXTRA = {
    "bert": {
        "bert.pooler.dense.weight": (32, 32),
        "bert.pooler.dense.bias": (32,),
        "cls.seq_relationship.weight": (2, 32),
        "cls.seq_relationship.bias": (2,),
        "bert.embeddings.position_ids": (1, 24),
    },
    "roberta": {"roberta.pooler.dense.weight": (32, 32), "roberta.embeddings.position_ids": (1, 26)},
    "esm1b": {"esm.contact_head.regression.weight": (1, 8), "esm.embeddings.position_ids": (1, 26)},
    "esm2": {
        "esm.contact_head.regression.weight": (1, 8),
        "esm.embeddings.position_embeddings.weight": (26, 32),
        "esm.encoder.layer.1.attention.self.rotary_embeddings.inv_freq": (4,),
    },
}


@pytest.fixture
def text() -> Tensor:
    """Two sequences of 15 tokens, some masked; longer than ModernBERT's window."""
    ids = torch.randint(5, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(4))
    ids[0, [2, 10, 11]] = ids[1, [0, 5, 14]] = MASK_TOKEN_ID
    return ids


@pytest.fixture
def write(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Writes a checkpoint of a layout with changed settings."""
    return lambda layout, **changes: layout.write(tmp_path / "source", tokenizer, **changes)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.label)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_with_and_without_padding(
    layout: EncoderLayout, write: Callable[..., Path], text: Tensor, attention: str, tied: bool
) -> None:
    folder = write(layout, tied=tied)
    model, tensors = layout.load(folder).model, stored(folder)
    model.set_attn_implementation(attention)
    expected = torch.stack([layout.logits(tensors, ids) for ids in text])
    assert expected.std() > 1  # so that 1e-4 says something
    torch.testing.assert_close(model(text).logits.double(), expected, rtol=0, atol=1e-4)
    for start, stop in ((4, 15), (0, 9)):
        logits = model(text, torch.tensor([[True] * 15, [start <= n < stop for n in range(15)]])).logits
        for row, part in enumerate((slice(0, 15), slice(start, stop))):
            alone = layout.logits(tensors, text[row, part])
            torch.testing.assert_close(logits[row, part].double(), alone, rtol=0, atol=1e-4)


@EVERY_ENCODER
def test_transformers_computes_the_same(layout: EncoderLayout, write: Callable[..., Path], text: Tensor) -> None:
    """Its own class, which reads the same files; ESM-2's is asked with a mask, since it needs one to count tokens."""
    folder = write(layout, tied=True)
    theirs = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(text, attention_mask=torch.ones_like(text)).logits
    torch.testing.assert_close(layout.load(folder).model(text).logits, expected, rtol=0, atol=1e-4)


@EVERY_ENCODER
def test_a_text_of_masks_alone_has_finite_logits(layout: EncoderLayout, write: Callable[..., Path]) -> None:
    lm = layout.load(write(layout))
    masks = torch.full((2, 7), lm.mask_token_id)
    assert lm.model(masks).logits.isfinite().all()


class TestFiles:
    """What older checkpoints call their tensors, and what they hold beside the model, is read; anything else isn't."""

    @pytest.mark.parametrize("layout", [BERT, ROBERTA, ESM2, ESM1B], ids=lambda layout: layout.label)
    def test_old_names_and_extra_tensors(
        self, layout: EncoderLayout, write: Callable[..., Path], tmp_path: Path, text: Tensor
    ) -> None:
        source = write(layout, tied=True)
        tensors = layout.tensors(tied=True)
        expected = layout.load(source).model(text).logits
        for now, then in OLD.items():
            tensors = {name.replace(now, then): tensor for name, tensor in tensors.items()}
        for name, shape in EXTRA[layout.label].items():
            tensors[name] = torch.arange(shape[-1]).expand(shape).contiguous() if "_ids" in name else torch.ones(shape)
        replace_tensors(source, tensors)
        assert layout.load(source).model(text).logits.equal(expected)
        assert load_streamed(str(source)).model(text).logits.equal(expected)
        assert about(str(source))["norms"] == "bfloat16"
        assert stored_dtype(str(source)) == torch.bfloat16
        save_model(layout.load(source), tmp_path / "again")
        assert stored(tmp_path / "again").keys() == layout.tensors(tied=True).keys()
        for function in (load_model, load_streamed, about):
            replace_tensors(source, tensors | {"more.weight": torch.ones(3)})
            with pytest.raises(ValueError, match=r"unexpected tensors more\.weight \(1 in all\)"):
                function(str(source))

    def test_embedded_positions_of_esm_1b_are_needed(self, write: Callable[..., Path]) -> None:
        source = write(ESM1B)
        name = "esm.embeddings.position_embeddings.weight"
        replace_tensors(source, {key: tensor for key, tensor in stored(source).items() if key != name})
        with pytest.raises(ValueError, match=re.escape(f"missing tensors {name} (1 in all)")):
            load_model(str(source))

    def test_a_head_bias_that_tying_would_drop_is_refused(self, write: Callable[..., Path]) -> None:
        source = write(BERT, tied=True)
        replace_tensors(source, stored(source) | {"cls.predictions.decoder.bias": torch.ones(VOCABULARY)})
        message = r"tensor cls\.predictions\.decoder\.bias: found another than cls\.predictions\.bias"
        with pytest.raises(ValueError, match=message):
            load_model(str(source))

    def test_settings_as_transformers_5_writes_them(self, write: Callable[..., Path], text: Tensor) -> None:
        source = write(MODERNBERT)
        expected, config = load_model(str(source)).model(text).logits, dict(MODERNBERT.config)
        thetas = [config.pop(f"{kind}_rope_theta") for kind in ("global", "local")]
        del config["global_attn_every_n_layers"]
        kinds = ["full_attention", "sliding_attention"]
        config["layer_types"] = kinds
        config["rope_parameters"] = {
            kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in zip(kinds, thetas, strict=True)
        }
        (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert load_model(str(source)).model(text).logits.equal(expected)


def replace_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put these tensors, all in one file, in the place of a checkpoint's."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (BERT, {"is_decoder": True}, "is_decoder: found True, allowed is False"),
        (ROBERTA, {"add_cross_attention": True}, "add_cross_attention: found True, allowed is False"),
        (
            BERT,
            {"position_embedding_type": "relative_key"},
            "position_embedding_type: found 'relative_key', allowed is 'absolute'",
        ),
        (
            ESM2,
            {"position_embedding_type": "relative_key"},
            "position_embedding_type: found 'relative_key', allowed are absolute, rotary",
        ),
        (ESM2, {"is_folding_model": True}, "is_folding_model: found True, allowed is False"),
        (ESM2, {"rope_theta": 5000.0}, "rope_theta: found 5000.0, allowed is 10000.0"),
        (ESM2, {"token_dropout": None}, "token_dropout: found None, allowed are false and true"),
        (ESM2, {"num_attention_heads": 32}, "num_attention_heads: found 32, which makes heads of 1, allowed are those"),
        (BERT, {"num_attention_heads": 5}, "num_attention_heads: found 5, allowed are divisors of hidden_size = 32"),
        (BERT, {"max_position_embeddings": None}, "missing max_position_embeddings"),
        (BERT, {"hidden_act": "swish2"}, "hidden_act: found 'swish2', allowed are "),
        (ROBERTA, {"pad_token_id": None}, "missing pad_token_id"),
        (MODERNBERT, {"num_attention_heads": 3}, "num_attention_heads: found 3, allowed are divisors of hidden_size"),
        (MODERNBERT, {"local_attention": 0}, "local_attention: found 0, allowed are whole numbers from 1"),
        (MODERNBERT, {"norm_bias": 1}, "norm_bias: found 1, allowed are false and true"),
        (MODERNBERT, {"rope_scaling": {"factor": 2}}, "rope_scaling: found {'factor': 2}, allowed is None"),
        (MODERNBERT, {"rope_parameters": 2}, "rope_parameters: found 2, allowed is an object for each kind of layer"),
        (MODERNBERT, {"layer_types": 2}, "layer_types: found 2, allowed is 'full_attention' for every n-th layer"),
        (
            MODERNBERT,
            {"layer_types": ["sliding_attention", "full_attention"]},
            "layer_types: found ['sliding_attention', 'full_attention'], allowed is 'full_attention' for every n-th",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_setting_that_the_modules_cannot_compute(
    write: Callable[..., Path], layout: EncoderLayout, changes: dict[str, Any], message: str
) -> None:
    folder = write(layout, **changes)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{folder}/config.json: {message}')}"):
        read_config(folder)


@pytest.mark.parametrize("layout", [BERT, ROBERTA, MODERNBERT], ids=lambda layout: layout.label)
def test_a_tokenizer_without_the_mask_token(write: Callable[..., Path], layout: EncoderLayout) -> None:
    folder = write(layout)
    (folder / "tokenizer_config.json").unlink()
    text = "<mask>" if layout is ROBERTA else "[MASK]"
    message = f"mask_token: found no '{text}' in the tokenizer, expected that token, or mask_token_id in config.json"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("layout", "most"), [(BERT, 24), (ROBERTA, 24), (ESM1B, 24), (ESM2, None), (MODERNBERT, None)], ids=str
)
def test_a_text_longer_than_the_table_of_positions(
    write: Callable[..., Path], layout: EncoderLayout, most: int | None
) -> None:
    lm = layout.load(write(layout))
    ids = torch.full((1, 25), 7)
    if most is None:
        assert lm.model(ids).logits.isfinite().all()
        return
    assert lm.model(ids[:, :most]).logits.isfinite().all()
    positions = layout.config["max_position_embeddings"]
    message = f"input_ids: found a length of 25, allowed is at most {most} with max_position_embeddings={positions}"
    for function in (lm.model, lm.model.hidden, lm.model.enter):
        with pytest.raises(ValueError, match=message):
            function(ids)


class TestQuantized:
    """They are quantized, trained, saved, streamed and sampled as the other families are."""

    @pytest.mark.slow
    @EVERY_ENCODER
    def test_block_by_block_it_is_the_model_that_is_quantized_in_memory(
        self, write: Callable[..., Path], tmp_path: Path, layout: EncoderLayout, text: Tensor
    ) -> None:
        source = write(layout, tied=True)
        lm = layout.load(source)
        ids = text.where(text != MASK_TOKEN_ID, 9)
        calibration = calibrate(lm, [(ids, None)], timesteps=2, source="trajectory", progress=False)
        config = SMALL.replace(
            training=[{"phase": "sequential", "steps": 1}, {"phase": "path_kl", "steps": 1}], quantizer="gptq"
        )
        in_memory = quantize(lm, config, calibration)
        assert all(torch.tensor(losses).isfinite().all() for losses in in_memory.losses.values())
        save_quantized(in_memory, tmp_path / "saved")
        quantize_checkpoint(source, tmp_path / "layerwise", config, calibration)
        names = {name.removesuffix(".packed") for name in stored(tmp_path / "saved") if name.endswith(".packed")}
        assert names == set(layout.linears)
        masked = text.where(text != MASK_TOKEN_ID, lm.mask_token_id)
        expected = generate(in_memory, masked, timesteps=2)
        assert not (expected == lm.mask_token_id).any()
        assert expected[masked != lm.mask_token_id].equal(masked[masked != lm.mask_token_id])
        for folder in ("saved", "layerwise"):
            loaded = load_quantized(tmp_path / folder)
            assert loaded.model(text).logits.equal(in_memory.model(text).logits)
            assert generate(loaded, masked, timesteps=2).equal(expected)
            assert about(str(tmp_path / folder))["quantized"] == words(config)

    @EVERY_ENCODER
    def test_tensor_by_tensor_it_is_that_too(
        self, write: Callable[..., Path], tmp_path: Path, layout: EncoderLayout, text: Tensor
    ) -> None:
        source = write(layout)
        quantize_checkpoint(source, tmp_path / "quantized", SMALL)
        expected = quantize(layout.load(source), SMALL).model(text).logits
        assert load_quantized(tmp_path / "quantized").model(text).logits.equal(expected)
        assert (expected - layout.load(source).model(text).logits).abs().max() > 0.1

    @EVERY_ENCODER
    def test_their_own_classes_save_and_load_as_transformers_does(
        self, write: Callable[..., Path], tmp_path: Path, tokenizer: Tokenizer, layout: EncoderLayout, text: Tensor
    ) -> None:
        source = write(layout, tied=True)
        lm = layout.load(source)
        lm.model.save_pretrained(tmp_path / "saved")
        tokenizer.save(str(tmp_path / "saved" / "tokenizer.json"))
        assert load_model(str(tmp_path / "saved")).model(text).logits.equal(lm.model(text).logits)
        quantize_checkpoint(source, tmp_path / "quantized", SMALL)
        loaded = MODELS[layout.model_type].from_pretrained(tmp_path / "quantized", dtype=torch.float32)
        assert loaded(text).logits.equal(load_quantized(tmp_path / "quantized").model(text).logits)

    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.label)
    def test_embeddings_and_head_have_codes_too(
        self, write: Callable[..., Path], tmp_path: Path, layout: EncoderLayout, text: Tensor, tied: bool
    ) -> None:
        source, config = write(layout, tied=tied), SMALL.replace(embedding_bits=8)
        lm = quantize(layout.load(source), config)
        expected = lm.model(text).logits
        plain = quantize(layout.load(source), SMALL).model(text).logits
        assert 0 < (expected - plain).abs().max() < 0.1 * plain.abs().max()
        save_quantized(lm, tmp_path / "saved")
        quantize_checkpoint(source, tmp_path / "streamed", config)
        for folder in ("saved", "streamed"):
            assert load_quantized(tmp_path / folder).model(text).logits.equal(expected)
            loaded = MODELS[layout.model_type].from_pretrained(tmp_path / folder, dtype=torch.float32)
            assert loaded(text).logits.equal(expected)
        coded = {name.removesuffix(".packed") for name in stored(tmp_path / "saved") if name.endswith(".packed")}
        assert coded == {*layout.linears, *(tables(lm.model)[: 1 if tied else 2])}
        assert stored(tmp_path / "streamed").keys() == stored(tmp_path / "saved").keys()
        assert (dequantized(lm).model(text).logits - expected).abs().max() < 1e-4

    @EVERY_ENCODER
    def test_the_auto_classes_of_transformers_refuse_the_codes(
        self, write: Callable[..., Path], tmp_path: Path, layout: EncoderLayout
    ) -> None:
        folder = tmp_path / "quantized"
        quantize_checkpoint(write(layout, tied=True), folder, SMALL)
        ours = MODELS[layout.model_type].__name__
        for auto in (AutoModel, AutoModelForMaskedLM):
            allowed = rf"allowed with '{layout.model_type}' is {ours}; "
            instead = rf"thermo_lib\.load_quantized\('{re.escape(str(folder))}'\) makes it"
            with pytest.raises(ValueError, match=rf"model: found \w+, {allowed}{instead}"):
                auto.from_pretrained(folder)

    def test_they_refuse_them_before_any_model_of_the_library_is_made(
        self, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        quantize_checkpoint(write(BERT, tied=True), tmp_path / "quantized", SMALL)
        monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "thermo", Waiting)  # as after the import
        with pytest.raises(ValueError, match="model: found BertModel, allowed with 'bert' is MaskedBertModel"):
            AutoModel.from_pretrained(tmp_path / "quantized")

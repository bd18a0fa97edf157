"""The layouts of masked language models that run as absorbing diffusion: tiny checkpoints and what these compute.

As in ``layouts``, nothing of ``transformers`` is used for the expected numbers.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import _EVERY, MASK_TOKEN_ID, VOCABULARY, Layout, rotate, write_shards
from tokenizers import Tokenizer
from torch import Tensor

from thermo_lib import load_model
from thermo_lib.models.lm import DiffusionLM

# What bert-base-uncased, roberta-base, ModernBERT-base, esm2_t6_8M_UR50D and esm1b_t33_650M_UR50S say, but for sizes.
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
}
_BERT: dict[str, Any] = _SIZES | {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 24,
    "model_type": "bert",
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "use_cache": True,
}
_ROBERTA: dict[str, Any] = _BERT | {
    "architectures": ["RobertaForMaskedLM"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 26,
    "model_type": "roberta",
    "pad_token_id": 1,
    "type_vocab_size": 1,
}
_ESM2: dict[str, Any] = _SIZES | {
    "architectures": ["EsmForMaskedLM"],
    "attention_probs_dropout_prob": 0.0,
    "emb_layer_norm_before": False,
    "eos_token_id": 2,  # not in the published files, but what transformers takes then
    "esmfold_config": None,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "is_folding_model": False,
    "layer_norm_eps": 1e-05,
    "mask_token_id": MASK_TOKEN_ID,
    "max_position_embeddings": 26,
    "model_type": "esm",
    "pad_token_id": 1,
    "position_embedding_type": "rotary",
    "token_dropout": True,
    "use_cache": True,
    "vocab_list": None,
}
_ESM1B: dict[str, Any] = _ESM2 | {
    "emb_layer_norm_before": True,
    "mask_token_id": MASK_TOKEN_ID,
    "position_embedding_type": "absolute",
    "token_dropout": False,
}
_MODERNBERT: dict[str, Any] = _SIZES | {
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_pooling": "mean",
    "cls_token_id": 1,
    "decoder_bias": True,
    "eos_token_id": 2,
    "global_attn_every_n_layers": 2,
    "global_rope_theta": 160000.0,
    "hidden_activation": "gelu",
    "local_attention": 8,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "sep_token_id": 2,
}

Weights = dict[str, Tensor]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def attend(q: Tensor, k: Tensor, v: Tensor, reach: int | None = None) -> Tensor:
    """Full attention of ``(length, heads, d)``; with a reach, of tokens that are at most so far from each other."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    if reach is not None:
        places = torch.arange(len(q))
        scores = scores.masked_fill((places[:, None] - places).abs() > reach, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


class Computing:
    """A checkpoint's tensors in float64, by which its plain implementation is written out."""

    def __init__(self, tensors: Weights, eps: float):
        self.weights, self.eps = {name: tensor.double() for name, tensor in tensors.items()}, eps

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def norm(self, x: Tensor, name: str) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights.get(f"{name}.bias", 0)


@dataclass(frozen=True)
class EncoderLayout:
    """A published layout at a small size, in what the tests use of ``layouts.Layout``."""

    config: dict[str, Any]
    label: str
    tokenizer_config: dict[str, Any] = field(default_factory=lambda: {"mask_token": "<|mask|>"})
    heads: int = 4
    kv_heads: int = 4
    head_size: int = 8
    is_shifted: bool = False
    family: str | None = None
    hidden: int = 32

    @property
    def model_type(self) -> str:
        """The family's name."""
        return self.config["model_type"]

    @property
    def linears(self) -> list[str]:
        """Names of the linears inside the blocks."""
        blocks = "model.layers." if self.model_type == "modernbert" else ".encoder.layer."
        return [name.removesuffix(".weight") for name, s in self.shapes().items() if blocks in name and len(s) == 2]

    def load(self, folder: Path) -> DiffusionLM:
        """A full-precision checkpoint of this layout."""
        return load_model(str(folder))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape, all of them."""
        return self._modernbert_shapes() if self.model_type == "modernbert" else self._bert_shapes()

    def _bert_shapes(self) -> dict[str, tuple[int, ...]]:
        c, shapes = self.config, {}
        hidden, mlp, kind = c["hidden_size"], c["intermediate_size"], c["model_type"]

        def linear(name: str, out: int, into: int) -> None:
            shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

        def norm(name: str) -> None:
            shapes.update({f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)})

        embeddings = f"{kind}.embeddings"
        shapes[f"{embeddings}.word_embeddings.weight"] = (VOCABULARY, hidden)
        if c["position_embedding_type"] == "absolute":
            shapes[f"{embeddings}.position_embeddings.weight"] = (c["max_position_embeddings"], hidden)
        if kind == "esm":
            norm("esm.encoder.emb_layer_norm_after")
            if c["emb_layer_norm_before"]:
                norm(f"{embeddings}.layer_norm")
        else:
            shapes[f"{embeddings}.token_type_embeddings.weight"] = (c["type_vocab_size"], hidden)
            norm(f"{embeddings}.LayerNorm")
        for number in range(2):
            block = f"{kind}.encoder.layer.{number}"
            for name in ("self.query", "self.key", "self.value", "output.dense"):
                linear(f"{block}.attention.{name}", hidden, hidden)
            linear(f"{block}.intermediate.dense", mlp, hidden)
            linear(f"{block}.output.dense", hidden, mlp)
            norm(f"{block}.attention.LayerNorm" if kind == "esm" else f"{block}.attention.output.LayerNorm")
            norm(f"{block}.LayerNorm" if kind == "esm" else f"{block}.output.LayerNorm")
        if kind == "bert":
            linear("cls.predictions.transform.dense", hidden, hidden)
            norm("cls.predictions.transform.LayerNorm")
        else:
            linear("lm_head.dense", hidden, hidden)
            norm("lm_head.layer_norm")
        head = "cls.predictions" if kind == "bert" else "lm_head"
        shapes |= {f"{head}.bias": (VOCABULARY,), f"{head}.decoder.weight": (VOCABULARY, hidden)}
        return shapes if kind == "esm" else shapes | {f"{head}.decoder.bias": (VOCABULARY,)}

    def _modernbert_shapes(self) -> dict[str, tuple[int, ...]]:
        c = self.config
        hidden, mlp = c["hidden_size"], c["intermediate_size"]
        linears = {
            **{f"model.layers.{n}.attn.Wqkv": (3 * hidden, hidden, "attention_bias") for n in range(2)},
            **{f"model.layers.{n}.attn.Wo": (hidden, hidden, "attention_bias") for n in range(2)},
            **{f"model.layers.{n}.mlp.Wi": (2 * mlp, hidden, "mlp_bias") for n in range(2)},
            **{f"model.layers.{n}.mlp.Wo": (hidden, mlp, "mlp_bias") for n in range(2)},
            "head.dense": (hidden, hidden, "classifier_bias"),
            "decoder": (VOCABULARY, hidden, "decoder_bias"),
        }
        norms = ["model.embeddings.norm", "model.layers.1.attn_norm", "model.final_norm", "head.norm"]
        norms += [f"model.layers.{n}.mlp_norm" for n in range(2)]
        shapes: dict[str, tuple[int, ...]] = {"model.embeddings.tok_embeddings.weight": (VOCABULARY, hidden)}
        shapes |= {f"{name}.weight": (out, into) for name, (out, into, _) in linears.items()}
        shapes |= {f"{name}.bias": (out,) for name, (out, _, flag) in linears.items() if c[flag]}
        shapes |= {f"{name}.weight": (hidden,) for name in norms}
        return shapes | ({f"{name}.bias": (hidden,) for name in norms} if c["norm_bias"] else {})

    @property
    def shared(self) -> dict[str, str]:
        """Tensors of the head that are others', by name, where embeddings are tied."""
        if self.model_type == "modernbert":
            return {"decoder.weight": "model.embeddings.tok_embeddings.weight"}
        head = "cls.predictions" if self.model_type == "bert" else "lm_head"
        shared = {f"{head}.decoder.weight": f"{self.model_type}.embeddings.word_embeddings.weight"}
        return shared if self.model_type == "esm" else shared | {f"{head}.decoder.bias": f"{head}.bias"}

    def tensors(self, *, tied: bool = False) -> Weights:
        """Random bfloat16 weights, as wide in their effects as trained ones."""
        generator, tensors = torch.Generator().manual_seed(0), {}
        for name, shape in self.shapes().items():
            values = torch.randn(shape, generator=generator)
            is_norm = "norm" in name.lower() and name.endswith("weight")
            matrix = 2 * values / shape[-1] ** 0.5
            tensors[name] = (1 + 0.2 * values if is_norm else matrix if len(shape) == 2 else values).to(torch.bfloat16)
        return {name: tensor for name, tensor in tensors.items() if not (tied and name in self.shared)}

    def write(self, folder: Path, tokenizer: Tokenizer, *, tied: bool = False, **changes: Any) -> Path:
        """A checkpoint of two shards."""
        folder.mkdir()
        tensors = self.tensors(tied=tied)
        names = sorted(tensors)
        write_shards(folder, {n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]})
        config = self.config | ({"tie_word_embeddings": True} if tied else {}) | changes
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(self.tokenizer_config), encoding="utf-8")
        return folder

    def logits(self, tensors: Weights, ids: Tensor) -> Tensor:
        """Logits ``(length, vocabulary)`` in float64 of one sequence ``(length,)``, nothing hidden from anything."""
        weights = tensors | {name: tensors[other] for name, other in self.shared.items() if name not in tensors}
        if self.model_type == "modernbert":
            return self._modernbert_logits(Computing(weights, self.config["norm_eps"]), ids)
        return self._bert_logits(Computing(weights, self.config["layer_norm_eps"]), ids)

    def _bert_logits(self, given: Computing, ids: Tensor) -> Tensor:
        linear, norm, weights, kind = given.linear, given.norm, given.weights, self.model_type
        embeddings = f"{kind}.embeddings"
        x = weights[f"{embeddings}.word_embeddings.weight"][ids]
        if self.config.get("token_dropout"):
            is_masked = ids == self.config["mask_token_id"]
            x = x.masked_fill(is_masked[:, None], 0) * 0.88 / (1 - is_masked.double().mean())
        if self.config["position_embedding_type"] == "absolute":
            first = 0 if kind == "bert" else self.config["pad_token_id"] + 1
            x = x + weights[f"{embeddings}.position_embeddings.weight"][first : first + len(ids)]
        if kind != "esm":
            x = norm(x + weights[f"{embeddings}.token_type_embeddings.weight"][0], f"{embeddings}.LayerNorm")
        elif self.config["emb_layer_norm_before"]:
            x = norm(x, f"{embeddings}.layer_norm")
        for number in range(2):
            block = f"{kind}.encoder.layer.{number}"
            attention = f"{block}.attention"
            h = norm(x, f"{attention}.LayerNorm") if kind == "esm" else x
            q, k, v = (linear(h, f"{attention}.self.{n}").view(len(ids), 4, 8) for n in ("query", "key", "value"))
            if self.config["position_embedding_type"] == "rotary":
                q, k = rotate(q, 1e4), rotate(k, 1e4)
            x = x + linear(attend(q, k, v), f"{attention}.output.dense")
            h = x = norm(x, f"{attention}.output.LayerNorm") if kind != "esm" else x
            h = norm(x, f"{block}.LayerNorm") if kind == "esm" else h
            x = x + linear(gelu(linear(h, f"{block}.intermediate.dense")), f"{block}.output.dense")
            x = norm(x, f"{block}.output.LayerNorm") if kind != "esm" else x
        if kind == "bert":
            x = norm(gelu(linear(x, "cls.predictions.transform.dense")), "cls.predictions.transform.LayerNorm")
            return linear(x, "cls.predictions.decoder")
        x = norm(x, "esm.encoder.emb_layer_norm_after") if kind == "esm" else x
        x = norm(gelu(linear(x, "lm_head.dense")), "lm_head.layer_norm")
        return linear(x, "lm_head.decoder") + (weights["lm_head.bias"] if kind == "esm" else 0)

    def _modernbert_logits(self, given: Computing, ids: Tensor) -> Tensor:
        linear, norm, c = given.linear, given.norm, self.config
        x = norm(given.weights["model.embeddings.tok_embeddings.weight"][ids], "model.embeddings.norm")
        for number in range(2):
            block = f"model.layers.{number}"
            h = x if number == 0 else norm(x, f"{block}.attn_norm")
            q, k, v = linear(h, f"{block}.attn.Wqkv").view(len(ids), 3, 4, 8).unbind(1)
            is_global = number % c["global_attn_every_n_layers"] == 0
            theta = c["global_rope_theta"] if is_global else c["local_rope_theta"]
            reach = None if is_global else c["local_attention"] // 2
            x = x + linear(attend(rotate(q, theta), rotate(k, theta), v, reach), f"{block}.attn.Wo")
            first, gate = linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.Wi").chunk(2, dim=-1)
            x = x + linear(gelu(first) * gate, f"{block}.mlp.Wo")
        return linear(norm(gelu(linear(norm(x, "model.final_norm"), "head.dense")), "head.norm"), "decoder")


BERT = EncoderLayout(_BERT, "bert")
ROBERTA = EncoderLayout(_ROBERTA, "roberta")
ESM2 = EncoderLayout(_ESM2, "esm2")
ESM1B = EncoderLayout(_ESM1B, "esm1b")
MODERNBERT = EncoderLayout(_MODERNBERT, "modernbert")
_BIASES = ("attention_bias", "classifier_bias", "mlp_bias", "norm_bias")
BIASED = replace(MODERNBERT, config=_MODERNBERT | dict.fromkeys(_BIASES, True), label="modernbert with biases")
ENCODERS = [BERT, ROBERTA, ESM2, ESM1B, MODERNBERT]
AnyLayout = Layout | EncoderLayout
_ANY: list[AnyLayout] = [*_EVERY, *ENCODERS]
EVERY_ENCODER = pytest.mark.parametrize("layout", ENCODERS, ids=[layout.label for layout in ENCODERS])
ANY = pytest.mark.parametrize(
    "layout", _ANY, ids=[layout.model_type if isinstance(layout, Layout) else layout.label for layout in _ANY]
)

"""The layouts that Dream and LLaDA are published in, and tiny checkpoints in them with random weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

# config.json of Dream-org/Dream-v0-Base-7B and -Instruct-7B, and of GSAI-ML/LLaDA-8B-Base and -Instruct.
DREAM_7B: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLADA_8B: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}


@dataclass(frozen=True)
class Layout:
    """A published layout at a small size, and how the plain implementation reads it."""

    config: dict[str, Any]
    names: dict[str, str]  # role to tensor name, without ``.weight``
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    theta: float
    eps: float
    has_bias: bool
    is_shifted: bool

    def name(self, role: str, block: int = 0) -> str:
        return self.names[role].format(block)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape, all of them."""
        kv = self.hidden // self.heads * self.kv_heads
        inside = {
            "q": (self.hidden, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate": (self.mlp, self.hidden),
            "up": (self.mlp, self.hidden),
            "down": (self.hidden, self.mlp),
            "attention_norm": (self.hidden,),
            "mlp_norm": (self.hidden,),
        }
        vocabulary = self.config["vocab_size"]
        shapes: dict[str, tuple[int, ...]] = {
            f"{self.name('embedding')}.weight": (vocabulary, self.hidden),
            f"{self.name('norm')}.weight": (self.hidden,),
            f"{self.name('head')}.weight": (vocabulary, self.hidden),
        }
        for block in range(2):
            shapes |= {f"{self.name(role, block)}.weight": shape for role, shape in inside.items()}
            if self.has_bias:
                shapes |= {f"{self.name(role, block)}.bias": inside[role][:1] for role in "qkv"}
        return shapes

    def write(self, folder: Path, tokenizer: Tokenizer, **changes: Any) -> Path:
        """A checkpoint of two bfloat16 shards with random weights, as wide in their effects as trained ones."""
        folder.mkdir()
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for name, shape in self.shapes().items():
            values = torch.randn(shape, generator=generator)
            matrix = 2 * values / shape[-1] ** 0.5
            value = 1 + 0.2 * values if "norm" in name or "ln_f" in name else matrix if len(shape) == 2 else values
            tensors[name] = value.to(torch.bfloat16)
        names = sorted(tensors)
        write_shards(folder, {n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]})
        (folder / "config.json").write_text(json.dumps(self.config | changes), encoding="utf-8")
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder


MASK_TOKEN_ID, VOCABULARY = 3, 320

DREAM = Layout(
    config=DREAM_7B
    | {
        "hidden_size": 32,
        "intermediate_size": 40,
        "mask_token_id": MASK_TOKEN_ID,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
    },
    names={
        "embedding": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
        "q": "model.layers.{}.self_attn.q_proj",
        "k": "model.layers.{}.self_attn.k_proj",
        "v": "model.layers.{}.self_attn.v_proj",
        "o": "model.layers.{}.self_attn.o_proj",
        "gate": "model.layers.{}.mlp.gate_proj",
        "up": "model.layers.{}.mlp.up_proj",
        "down": "model.layers.{}.mlp.down_proj",
        "attention_norm": "model.layers.{}.input_layernorm",
        "mlp_norm": "model.layers.{}.post_attention_layernorm",
    },
    hidden=32,
    mlp=40,
    heads=4,
    kv_heads=2,
    theta=1e6,
    eps=1e-6,
    has_bias=True,
    is_shifted=True,
)
LLADA = Layout(
    config=LLADA_8B
    | {
        "d_model": 32,
        "embedding_size": VOCABULARY,
        "mask_token_id": MASK_TOKEN_ID,
        "mlp_hidden_size": 40,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": 2,
        "vocab_size": VOCABULARY,
    },
    names={
        "embedding": "model.transformer.wte",
        "norm": "model.transformer.ln_f",
        "head": "model.transformer.ff_out",
        "q": "model.transformer.blocks.{}.q_proj",
        "k": "model.transformer.blocks.{}.k_proj",
        "v": "model.transformer.blocks.{}.v_proj",
        "o": "model.transformer.blocks.{}.attn_out",
        "gate": "model.transformer.blocks.{}.ff_proj",
        "up": "model.transformer.blocks.{}.up_proj",
        "down": "model.transformer.blocks.{}.ff_out",
        "attention_norm": "model.transformer.blocks.{}.attn_norm",
        "mlp_norm": "model.transformer.blocks.{}.ff_norm",
    },
    hidden=32,
    mlp=40,
    heads=4,
    kv_heads=4,
    theta=5e5,
    eps=1e-5,
    has_bias=False,
    is_shifted=False,
)
BOTH = pytest.mark.parametrize("layout", [DREAM, LLADA], ids=["Dream", "LLaDA"])


def write_shards(folder: Path, *parts: dict[str, Tensor]) -> None:
    """Shards and their index, named as ``transformers`` names them."""
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by the names in its files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}

"""The layouts that models are published in, tiny checkpoints in them with random weights, and what these compute."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from thermo_lib import load_model
from thermo_lib.models.lm import DiffusionLM

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
    head_size: int = 8
    has_head_norms: bool = False
    has_output_bias: bool = False
    family: str | None = None  # where config.json doesn't say it
    tying: str = "tie_word_embeddings"
    block_length: int | None = None  # of block-causal attention
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    scaling: dict[str, Any] | None = None  # of the positions, as in Llama 3.1

    @property
    def model_type(self) -> str:
        """The family's name."""
        return self.family or self.config["model_type"]

    def load(self, folder: Path) -> DiffusionLM:
        """A full-precision checkpoint of this layout."""
        return load_model(str(folder), family=self.family)

    def name(self, role: str, block: int = 0) -> str:
        return self.names[role].format(block)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape, all of them."""
        q, kv = self.head_size * self.heads, self.head_size * self.kv_heads
        inside: dict[str, tuple[int, ...]] = {
            "q": (q, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, q),
            "gate": (self.mlp, self.hidden),
            "up": (self.mlp, self.hidden),
            "down": (self.hidden, self.mlp),
            "attention_norm": (self.hidden,),
            "mlp_norm": (self.hidden,),
        }
        if self.has_head_norms:
            inside |= {"q_norm": (self.head_size,), "k_norm": (self.head_size,)}
        biased = "qkv" * self.has_bias + "o" * self.has_output_bias
        vocabulary = self.config["vocab_size"]
        shapes: dict[str, tuple[int, ...]] = {
            f"{self.name('embedding')}.weight": (vocabulary, self.hidden),
            f"{self.name('norm')}.weight": (self.hidden,),
            f"{self.name('head')}.weight": (vocabulary, self.hidden),
        }
        for block in range(2):
            shapes |= {f"{self.name(role, block)}.weight": shape for role, shape in inside.items()}
            shapes |= {f"{self.name(role, block)}.bias": inside[role][:1] for role in biased}
        return shapes

    def write(self, folder: Path, tokenizer: Tokenizer, *, tied: bool = False, **changes: Any) -> Path:
        """A checkpoint of two bfloat16 shards with random weights, as wide in their effects as trained ones."""
        folder.mkdir()
        if tied:
            changes[self.tying] = True
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for name, shape in self.shapes().items():
            values = torch.randn(shape, generator=generator)
            matrix = 2 * values / shape[-1] ** 0.5
            value = 1 + 0.2 * values if "norm" in name or "ln_f" in name else matrix if len(shape) == 2 else values
            tensors[name] = value.to(torch.bfloat16)
        if tied:
            del tensors[f"{self.name('head')}.weight"]
        names = sorted(tensors)
        write_shards(folder, {n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]})
        (folder / "config.json").write_text(json.dumps(self.config | changes), encoding="utf-8")
        tokenizer.save(str(folder / "tokenizer.json"))
        if self.tokenizer_config:
            (folder / "tokenizer_config.json").write_text(json.dumps(self.tokenizer_config), encoding="utf-8")
        return folder

    def logits(self, tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
        """Logits ``(length, vocabulary)`` in float64 of one sequence ``(length,)``; only later blocks are hidden.

        The blocks are written out here without ``transformers``, on the tensors as the checkpoint stores them.
        """
        weights = {name: tensor.double() for name, tensor in tensors.items()}

        def linear(x: Tensor, role: str, block: int = 0) -> Tensor:
            name = self.name(role, block)
            return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

        def norm(x: Tensor, role: str, block: int = 0) -> Tensor:
            return rms_norm(x, weights[f"{self.name(role, block)}.weight"], self.eps)

        embeddings = f"{self.name('embedding')}.weight"
        weights.setdefault(f"{self.name('head')}.weight", weights[embeddings])
        x = weights[embeddings][ids]
        number = torch.arange(len(ids)) // (self.block_length or len(ids))
        later = number > number[:, None]
        for block in range(2):
            h = norm(x, "attention_norm", block)
            q, k, v = (linear(h, role, block).view(len(ids), -1, self.head_size) for role in "qkv")
            if self.has_head_norms:
                q, k = norm(q, "q_norm", block), norm(k, "k_norm", block)
            q, k = rotate(q, self.theta, self.scaling), rotate(k, self.theta, self.scaling)
            attended = []
            for head in range(self.heads):
                shared = head * self.kv_heads // self.heads  # neighbouring query heads share keys and values
                scores = q[:, head] @ k[:, shared].T / self.head_size**0.5
                attended.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v[:, shared])
            x = x + linear(torch.cat(attended, dim=-1), "o", block)
            h = norm(x, "mlp_norm", block)
            gate = linear(h, "gate", block)
            x = x + linear(gate * gate.sigmoid() * linear(h, "up", block), "down", block)
        logits = linear(norm(x, "norm"), "head")
        return torch.cat([logits[:1], logits[:-1]]) if self.is_shifted else logits


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, theta: float, scaling: dict[str, Any] | None = None) -> Tensor:
    """Rotary embedding (arXiv 2104.09864): features i and i + d/2 of ``(length, heads, d)``.

    With ``scaling``, a pair that turns fewer than ``low_freq_factor`` times in the original context turns ``factor``
    times as slowly, one that turns more than ``high_freq_factor`` times stays, those between are in between.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    if scaling is not None:
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * torch.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * kept + frequency / scaling["factor"] * (1 - kept)
    angle = torch.arange(len(x), dtype=x.dtype)[:, None, None] * frequency
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


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
    tying="weight_tying",
)
# As transformers writes it for Qwen2 and its like, without what only training needs.
_PLAIN: dict[str, Any] = {
    "eos_token_id": 4,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
_QWEN: dict[str, Any] = _PLAIN | {
    "layer_types": ["full_attention", "full_attention"],
    "max_window_layers": 2,
    "sliding_window": None,
    "use_sliding_window": False,
}
A2D_QWEN2 = replace(
    DREAM, config=_QWEN | {"architectures": ["A2DQwen2LMHeadModel"], "model_type": "a2d-qwen2"}, is_shifted=False
)
A2D_QWEN3 = replace(
    A2D_QWEN2,
    config=_QWEN
    | {"architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3", "attention_bias": False, "head_dim": 16},
    names=DREAM.names | {f"{role}_norm": f"model.layers.{{}}.self_attn.{role}_norm" for role in "qk"},
    head_size=16,
    has_bias=False,
    has_head_norms=True,
)
A2D_LLAMA = replace(
    A2D_QWEN2,
    config=_PLAIN
    | {"architectures": ["A2DLlamaLMHeadModel"], "model_type": "a2d-llama", "attention_bias": True, "head_dim": 8}
    | {"mlp_bias": False, "pretraining_tp": 1},
    has_output_bias=True,
)
OPEN_DCODER = replace(
    DREAM,
    config=_QWEN | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    family="open-dcoder",
    tokenizer_config={"mask_token": "<|mask|>"},
)
# config.json of JetLM/SDAR-4B-Chat, which has no block_size, and of Efficient-Large-Model/Fast_dLLM_v2_7B, at a small
# size.
SDAR = replace(
    A2D_QWEN3,
    config=_PLAIN
    | {"architectures": ["SDARForCausalLM"], "model_type": "sdar", "attention_bias": False, "head_dim": 16}
    | {"attn_implementation": "flex_attention", "debug": False, "ep_size": 1, "fuse_cross_entropy": True}
    | {"max_window_layers": 2, "sliding_window": None, "use_sliding_window": False, "block_size": 4},
    block_length=4,
    tokenizer_config={"mask_token": "<|mask|>"},
)
FAST_DLLM = replace(
    DREAM,
    config=_QWEN
    | {"architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen", "bd_size": 5}
    | {"conplemenrary_mask": True},
    block_length=5,
    tokenizer_config={"mask_token": "<|mask|>"},
)
# Stable-DiffCoder is plain Llama to its config.json, which has neither of the two that are named here for the tests.
STABLE_DIFFCODER = replace(
    A2D_QWEN2,
    config=_PLAIN
    | {"architectures": ["StableDiffcoderForCausalLM"], "model_type": "llama", "attention_bias": False}
    | {"block_length": 4, "head_dim": 8, "mask_token_id": MASK_TOKEN_ID, "mlp_bias": False, "pretraining_tp": 1},
    family="stable-diffcoder",
    has_bias=False,
    block_length=4,
)
BOTH = pytest.mark.parametrize("layout", [DREAM, LLADA], ids=["Dream", "LLaDA"])
BLOCKS = {"Qwen2": DREAM, "Llama": LLADA, "Qwen3": A2D_QWEN3}
KINDS = pytest.mark.parametrize("layout", BLOCKS.values(), ids=BLOCKS)
# dllm's bd3lm models have the config.json of its mdlm ones; what is saved here says the length.
A2D_BLOCKS = replace(A2D_QWEN3, config=A2D_QWEN3.config | {"block_length": 5}, block_length=5)
BLOCK_CAUSAL = pytest.mark.parametrize(
    "layout", [SDAR, FAST_DLLM, A2D_BLOCKS], ids=["SDAR", "Fast-dLLM", "Tiny-A2D bd3lm"]
)
_SAYING = [DREAM, LLADA, A2D_QWEN2, A2D_QWEN3, A2D_LLAMA, SDAR, FAST_DLLM]
NAMED = pytest.mark.parametrize("layout", _SAYING, ids=[layout.model_type for layout in _SAYING])
_EVERY = [*_SAYING, OPEN_DCODER, STABLE_DIFFCODER]
EVERY = pytest.mark.parametrize("layout", _EVERY, ids=[layout.model_type for layout in _EVERY])


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

"""The families of models: their blocks, their ``config.json``, and what they call their tensors.

``ARCHITECTURES`` is the table. A family needs an entry there, and a configuration class with its ``model_type``.

A checkpoint's own names of settings and tensors are used at the files only: on loading they become those of
``transformers``, on saving and in errors they are the checkpoint's again.
"""

import json
import warnings
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from thermo_lib.files.hub import TEXTS, from_hub
from thermo_lib.files.reading import read_object
from thermo_lib.models.encoders import ENCODERS
from thermo_lib.models.published import (
    A2DLlamaConfig,
    A2DQwen2Config,
    A2DQwen3Config,
    Checked,
    DreamConfig,
    FastDLLMConfig,
    LLaDAConfig,
    OpenDCoderConfig,
    Published,
    SDARConfig,
    StableDiffCoderConfig,
)
from thermo_lib.models.settings import (
    TOKEN_IDS,
    Architecture,
    check_supported,
    flat_llama_rope,
    in_one_line,
    parse,
    same,
)

T = TypeVar("T")


# What transformers writes for Qwen2, Qwen3 and Llama.
_SIZES = same(
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "mask_token_id",
)
_SETTINGS = (
    same("max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "hidden_act") | TOKEN_IDS
)
_FIXED: dict[str, tuple[Any, ...]] = {"rope_scaling": (None,), "use_sliding_window": (False, None)}

_DREAM = Architecture(
    config=DreamConfig,
    blocks="qwen2",
    is_shifted=True,
    published_as="DreamModel",
    sizes=_SIZES,
    settings=_SETTINGS,
    fixed=_FIXED | {"use_mrope": (False, None)},
)
_LLADA = Architecture(
    config=LLaDAConfig,
    blocks="llama",
    is_shifted=False,
    published_as="LLaDAModelLM",
    sizes={
        "vocab_size": "vocab_size",
        "embedding_size": "vocab_size",
        "d_model": "hidden_size",
        "mlp_hidden_size": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mask_token_id": "mask_token_id",
    },
    settings={
        "max_sequence_length": "max_position_embeddings",
        "rms_norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "weight_tying": "tie_word_embeddings",
        "activation_type": "hidden_act",
        **TOKEN_IDS,
    },
    required=("rms_norm_eps", "rope_theta", "weight_tying", "activation_type"),
    fixed={
        "block_type": ("llama",),
        "activation_type": ("silu",),
        "layer_norm_type": ("rms",),
        "rope": (True,),
        "include_bias": (False,),
        "include_qkv_bias": (False, None),
        "bias_for_layer_norm": (False, None),
        "layer_norm_with_affine": (True, None),
        "attention_layer_norm": (False, None),
        "input_emb_norm": (False, None),
        "alibi": (False, None),
        "scale_logits": (False, None),
        "multi_query_attention": (False, None),
        "block_group_size": (1, None),
    },
    tensors={
        "lm_head": "model.transformer.ff_out",
        "model.embed_tokens": "model.transformer.wte",
        "model.norm": "model.transformer.ln_f",
        "model.layers": "model.transformer.blocks",
        "self_attn.q_proj": "q_proj",
        "self_attn.k_proj": "k_proj",
        "self_attn.v_proj": "v_proj",
        "self_attn.o_proj": "attn_out",
        "mlp.gate_proj": "ff_proj",  # through SiLU, then times up_proj
        "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm",
    },
)
_A2D_QWEN2 = Architecture(
    config=A2DQwen2Config,
    blocks="qwen2",
    is_shifted=False,
    published_as="A2DQwen2LMHeadModel",
    sizes=_SIZES,
    settings=_SETTINGS,
    fixed=_FIXED,
    mask_token="<|mask|>",
    attention="either",
    block_key="block_length",  # dllm's own files don't have it
)
_A2D_QWEN3 = Architecture(
    config=A2DQwen3Config,
    blocks="qwen3",
    is_shifted=False,
    published_as="A2DQwen3LMHeadModel",
    sizes=_SIZES | same("head_dim"),
    settings=_SETTINGS | same("attention_bias"),
    fixed=_FIXED,
    mask_token="<|mask|>",
    attention="either",
    block_key="block_length",  # dllm's own files don't have it
)
_A2D_LLAMA = Architecture(
    config=A2DLlamaConfig,
    blocks="llama",
    is_shifted=False,
    published_as="A2DLlamaLMHeadModel",
    sizes=_SIZES,
    settings=_SETTINGS | same("head_dim", "attention_bias", "mlp_bias", "rope_scaling"),
    fixed={"pretraining_tp": (1, None)},
    mask_token="<|mask|>",
    attention="either",
    block_key="block_length",  # dllm's own files don't have it
    flat=flat_llama_rope,
)
_OPEN_DCODER = Architecture(
    config=OpenDCoderConfig,
    blocks="qwen2",
    is_shifted=True,
    published_as="Qwen2ForCausalLM",
    sizes=_SIZES,
    settings=_SETTINGS,
    fixed=_FIXED,
    mask_token="<M>",
)
_SDAR = Architecture(
    config=SDARConfig,
    blocks="qwen3",
    is_shifted=False,
    published_as="SDARForCausalLM",
    sizes=_SIZES | same("head_dim"),
    settings=_SETTINGS | same("attention_bias"),
    fixed=_FIXED,
    mask_token="<|MASK|>",
    attention="block-causal",
    block_key="block_size",  # of models that were trained further; JetLM's own files don't have it
    block_length=4,
)
_FAST_DLLM = Architecture(
    config=FastDLLMConfig,
    blocks="qwen2",
    is_shifted=True,
    published_as="Fast_dLLM_QwenForCausalLM",
    sizes=_SIZES,
    settings=_SETTINGS,
    fixed=_FIXED,
    mask_token="|<MASK>|",
    attention="block-causal",
    block_key="bd_size",
)
_STABLE_DIFFCODER = replace(
    _A2D_LLAMA,
    config=StableDiffCoderConfig,
    published_as="StableDiffcoderForCausalLM",
    mask_token=None,
    mask_token_id=5,  # of the published code; neither config.json nor the tokenizer says it
    attention="block-causal",
    block_key="block_length",  # as above: its own config.json doesn't have it
    block_length=4,
)
_A2D = (_A2D_QWEN2, _A2D_QWEN3, _A2D_LLAMA)
_ALL = (_DREAM, _LLADA, *_A2D, _OPEN_DCODER, _SDAR, _FAST_DLLM, _STABLE_DIFFCODER, *ENCODERS)
ARCHITECTURES = {architecture.config.model_type: architecture for architecture in _ALL}
# The others are families of transformers' own, whose Auto classes stay as they are.
PUBLISHED = {name: entry for name, entry in ARCHITECTURES.items() if issubclass(entry.config, Published)}


def tensor_name(config: PreTrainedConfig, name: str) -> str:
    """What the checkpoint calls ``name``, a parameter's or anything else's that begins with a module's name."""
    for ours, theirs in ARCHITECTURES[config.model_type].tensors.items():
        name = name.replace(ours, theirs)
    return name


def stored_names(found: Container[str], config: PreTrainedConfig, expected: Iterable[str]) -> dict[str, str]:
    """What a checkpoint calls the tensors that a model needs, to the library's names; without those that are tied."""
    architecture, names = ARCHITECTURES[config.model_type], {}
    for name in expected:
        stored = tensor_name(config, name)
        if stored not in found:
            older = stored
            for now, then in architecture.older.items():
                older = older.replace(now, then)
            stored = older if older in found else stored
        if stored in found or not (config.tie_word_embeddings and name in architecture.parts.tied):
            names[stored] = name
    return names


def used(found: Mapping[str, T], config: PreTrainedConfig) -> dict[str, T]:
    """What is found in a checkpoint, name to anything, without the tensors that a model of its family doesn't use."""
    architecture = ARCHITECTURES[config.model_type]
    is_rotary = getattr(config, "position_embedding_type", None) == "rotary"
    unused = architecture.unused + (architecture.unused_if_rotary if is_rotary else ())
    return {name: thing for name, thing in found.items() if not any(part in name for part in unused)}


def _tokenizer_folder(name: str | Path | None, revision: str | None) -> Path:
    """A folder as it is; of a hub id that of its tokenizer, at the commit that ``config.json`` is of."""
    if name and Path(name).is_dir():
        return Path(name)
    try:
        return from_hub(str(name or ""), *TEXTS, revision=revision)
    except ConnectionError as error:
        allowed = f"allowed is a folder or a reachable hub id with one ({error})"
        raise ValueError(f"mask_token_id: found none, and no tokenizer in {str(name)!r:.80}, {allowed}") from error


def _values(
    family: str, content: dict[str, Any], folder: str | Path | None, revision: str | None = None
) -> dict[str, Any]:
    """The attributes of a family's configuration, from ``config.json`` and, of the mask token, the tokenizer.

    Args:
        family: of ``ARCHITECTURES``.
        content: of ``config.json``.
        folder: of the model, or a hub id; None where nobody says it.
        revision: of the hub id, the commit that ``config.json`` is of.
    """
    architecture = ARCHITECTURES[family]
    check_supported(family, content)
    if content.get("mask_token_id") is None and architecture.mask_token_id is not None:
        content = content | {"mask_token_id": architecture.mask_token_id}
    if content.get("mask_token_id") is None and architecture.mask_token is not None:
        from thermo_lib.models.tokenization import read_mask_token_id  # it takes a second to import

        where = _tokenizer_folder(folder, revision)
        content = content | {"mask_token_id": read_mask_token_id(where, architecture.mask_token)}
    key = architecture.block_key
    if architecture.attention == "either" and content.get(key or "") is None:
        if "bd3lm" in str(folder).lower():
            found = f"found none in {folder}, full attention is assumed"
            warnings.warn(f"block_length: {found}; load_model takes that of a bd3lm model", stacklevel=1)
    elif key is not None:
        if content.get(key) is None and architecture.block_length is not None:
            assumed = f"found none in {folder or 'config.json'}, {architecture.block_length} is assumed"
            # From one place, so that Python shows it once for a folder.
            warnings.warn(f"block_length: {assumed}; load_model takes another one", stacklevel=1)
            content = content | {key: architecture.block_length}
        architecture = replace(architecture, sizes={**architecture.sizes, key: "block_length"})
    return parse(architecture, architecture.flat(content))


def _with_block_length(family: str, content: dict[str, Any], asked: int | None) -> dict[str, Any]:
    """A ``config.json`` that says how long a block is, where that is asked for."""
    key = ARCHITECTURES[family].block_key
    if asked is None:
        return content
    if key is None:
        raise ValueError(f"block_length: found {asked!r:.80}, allowed is None with {family!r}, whose attention is full")
    if content.get(key) not in (None, asked):
        raise ValueError(f"block_length: found {asked!r:.80}, allowed is {content[key]!r}, its {key} in config.json")
    return content | {key: asked}


def _family(content: dict[str, Any], asked: str | None) -> str:
    """The family of a ``config.json``, which one that is plain Qwen2, Qwen3 or Llama doesn't say."""
    found = content.get("model_type")
    if isinstance(found, str) and found in ARCHITECTURES:
        fitting = [found]
    else:
        fitting = [name for name, entry in ARCHITECTURES.items() if entry.blocks == found and not entry.tensors]
    if not fitting:
        check_supported(found, content)
        plain = sorted({entry.blocks for entry in ARCHITECTURES.values()})
        supported = f"supported are {', '.join(ARCHITECTURES)}, and with a family {', '.join(plain)}"
        raise ValueError(f"model_type: found {found!r:.80}, {supported}")
    if asked is None and found not in ARCHITECTURES:
        allowed = f"allowed with {found!r} blocks, which say nothing of diffusion, are {', '.join(fitting)}"
        raise ValueError(f"family: found None, {allowed}")
    if asked is not None and asked not in fitting:
        raise ValueError(f"family: found {asked!r:.80}, allowed with model_type {found!r} is {', '.join(fitting)}")
    return fitting[0] if asked is None else asked


def _values_of(family: str, content: dict[str, Any], folder: str | Path | None, revision: str | None) -> dict[str, Any]:
    """``_values`` of a family whose class was asked for, once ``config.json`` is found to be of it."""
    return _values(_family(content, family), content, folder, revision)


def read_config(folder: Path, family: str | None = None, block_length: int | None = None) -> PreTrainedConfig:
    """The configuration in ``folder/config.json``; keys that ask for remote code are not obeyed.

    Args:
        folder: of a model.
        family: of ``ARCHITECTURES``, needed where ``config.json`` is plain Qwen2, Qwen3 or Llama.
        block_length: number of tokens of a block in block-causal attention, needed where ``config.json`` doesn't say
            it and it isn't that of most published models.

    Raises:
        ValueError: no such file, not JSON, unsupported ``model_type``, a family or a block length that is missing or
            doesn't fit, a missing field, a value that the modules of that architecture can't compute, or a tokenizer
            without the mask token.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model: found no config.json in {folder}")
    content = read_object(path)
    try:
        name = _family(content, family)
        content = _with_block_length(name, content, block_length)
        with in_one_line():
            return ARCHITECTURES[name].config(**_values(name, content, folder))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def config_json(config: PreTrainedConfig, **more: Any) -> str:
    """``config.json`` in the layout of the published checkpoints of that architecture."""
    architecture = ARCHITECTURES[config.model_type]

    def value(attribute: str) -> Any:
        if attribute not in ("rope_theta", "rope_scaling"):
            return getattr(config, attribute)
        scaling = dict(config.rope_parameters)
        theta = scaling.pop("rope_theta")
        return theta if attribute == "rope_theta" else scaling if scaling["rope_type"] != "default" else None

    keys = {**architecture.sizes, **architecture.settings}
    if architecture.block_key is not None:
        keys = keys | {architecture.block_key: "block_length"}
    stated = {key: value(attribute) for key, attribute in keys.items()}
    content = {
        "architectures": [architecture.published_as],
        "model_type": config.model_type,
        **{key: found for key, found in stated.items() if found is not None},
        **{key: allowed[0] for key, allowed in architecture.fixed.items() if None not in allowed},
        **more,
    }
    return json.dumps(content, indent=2) + "\n"


Checked.values, Published.written = staticmethod(_values_of), staticmethod(config_json)

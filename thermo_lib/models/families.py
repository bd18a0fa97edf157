"""The layouts of published checkpoints: their ``config.json``, and what they call their tensors.

A checkpoint's own names of settings and tensors are used at the files only: on loading they become those of
``transformers``, on saving and in errors they are the checkpoint's again.
"""

import json
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from thermo_lib.files.text import read_object
from thermo_lib.models.settings import TOKEN_IDS, Architecture, flat_rope, parse, same

HEAD = "lm_head.weight"


class Published:
    """A configuration that ``transformers`` reads from a published ``config.json``, and writes as one.

    Attributes:
        on_use: called before one is made, see ``integrations.auto``.
    """

    on_use: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Make one, once what builds its model is known to ``transformers``."""
        Published.on_use()
        return super().__new__(cls)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration; keys that ask for remote code are not obeyed.

        Raises:
            ValueError: what ``read_config`` raises.
        """
        found = config_dict.get("quantization_config")
        if found is not None and not isinstance(found, dict):
            raise ValueError(f"quantization_config: found {found!r:.80}, expected an object")
        kept = {key: config_dict[key] for key in _OF_TRANSFORMERS if key in config_dict}
        values = parse(ARCHITECTURES[cls.model_type], flat_rope(config_dict))
        return super().from_dict(values | kept, **kwargs)

    def to_json_string(self, use_diff: bool = True) -> str:
        """``config.json`` in the published layout, with what ``transformers`` adds to it."""
        content = self.to_dict()
        return config_json(self, **{key: content[key] for key in _OF_TRANSFORMERS if content.get(key) is not None})


_OF_TRANSFORMERS = ("dtype", "torch_dtype", "quantization_config", "transformers_version")


class DreamConfig(Published, Qwen2Config):
    """Qwen2's configuration with the mask token of Dream's ``config.json``."""

    model_type = "Dream"
    is_causal = False
    mask_token_id: int | None = None


class LLaDAConfig(Published, LlamaConfig):
    """Llama's configuration with the mask token of LLaDA's ``config.json``."""

    model_type = "llada"
    is_causal = False
    mask_token_id: int | None = None
    bos_token_id: int | None = None  # where a file doesn't say it, Llama's is wrong
    eos_token_id: int | list[int] | None = None


_DREAM = Architecture(
    config=DreamConfig,
    published_as="DreamModel",
    sizes=same(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "mask_token_id",
    ),
    settings=same("max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "hidden_act")
    | TOKEN_IDS,
    fixed={
        "rope_scaling": (None,),
        "use_mrope": (False, None),
        "use_sliding_window": (False, None),
    },
)
_LLADA = Architecture(
    config=LLaDAConfig,
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
ARCHITECTURES = {architecture.config.model_type: architecture for architecture in (_DREAM, _LLADA)}


def tensor_name(config: PreTrainedConfig, name: str) -> str:
    """What the checkpoint calls ``name``, a parameter's or anything else's that begins with a module's name."""
    for ours, theirs in ARCHITECTURES[config.model_type].tensors.items():
        name = name.replace(ours, theirs)
    return name


def stored_names(found: Container[str], config: PreTrainedConfig, expected: Iterable[str]) -> dict[str, str]:
    """What a checkpoint calls the tensors that a model needs, to the library's names; without a tied head."""
    names = {tensor_name(config, name): name for name in expected}
    head = tensor_name(config, HEAD)
    if config.tie_word_embeddings and head not in found:
        names.pop(head, None)
    return names


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration in ``folder/config.json``; keys that ask for remote code are not obeyed.

    Raises:
        ValueError: no such file, not JSON, unsupported ``model_type``, a missing field, or a value that the modules
            of that architecture can't compute.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model: found no config.json in {folder}")
    content = read_object(path)
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ValueError(f"{path}: model_type: found {model_type!r}, supported are {', '.join(ARCHITECTURES)}")
    try:
        architecture = ARCHITECTURES[model_type]
        return architecture.config(**parse(architecture, flat_rope(content)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def config_json(config: PreTrainedConfig, **more: Any) -> str:
    """``config.json`` in the layout of the published checkpoints of that architecture."""
    architecture = ARCHITECTURES[config.model_type]

    def value(attribute: str) -> Any:
        return config.rope_parameters["rope_theta"] if attribute == "rope_theta" else getattr(config, attribute)

    stated = {key: value(attribute) for key, attribute in (architecture.sizes | architecture.settings).items()}
    content = {
        "architectures": [architecture.published_as],
        "model_type": config.model_type,
        **{key: found for key, found in stated.items() if found is not None},
        **{key: allowed[0] for key, allowed in architecture.fixed.items() if None not in allowed},
        **more,
    }
    return json.dumps(content, indent=2) + "\n"

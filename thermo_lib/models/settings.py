"""The settings in a published ``config.json``: what an architecture needs of them, and whether they can be computed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

if TYPE_CHECKING:
    ConfigBase = PreTrainedConfig  # the other base of every class that ``Published`` is mixed into
else:
    ConfigBase = object


def flat_rope(content: dict[str, Any]) -> dict[str, Any]:
    """``rope_theta`` beside the other keys, where published checkpoints have it and ``transformers`` 5 doesn't."""
    rope = content.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(rope.get(key, "default") != "default" for key in ("rope_type", "type")):
        raise ValueError(f"rope_parameters: found {rope!r:.80}, allowed is rope_type 'default' with a rope_theta")
    return rope | content


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def flat_llama_rope(content: dict[str, Any]) -> dict[str, Any]:
    """The same with ``rope_scaling``: Llama 3.1 turns slow pairs of features still more slowly, by a factor."""
    rope, scaling = content.get("rope_parameters"), content.get("rope_scaling")
    if scaling is None and isinstance(rope, dict) and rope.get("rope_type") == "llama3":
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        rope = {key: value for key, value in rope.items() if key == "rope_theta"}
    if scaling is not None:
        _check_llama3(scaling)
    return flat_rope(content | {"rope_parameters": rope, "rope_scaling": scaling})


def _check_llama3(found: Any) -> None:
    allowed = f"allowed are null and an object with rope_type 'llama3' and {', '.join(_LLAMA3)}"
    if not isinstance(found, dict) or found.get("rope_type") != "llama3" or found.keys() != {"rope_type", *_LLAMA3}:
        raise ValueError(f"rope_scaling: found {found!r:.80}, {allowed}")
    _check_whole("rope_scaling.original_max_position_embeddings", found[_LLAMA3[-1]], 1, 2**31)
    least = {"factor": 1, "low_freq_factor": 0, "high_freq_factor": 0}
    for key, value in least.items():
        if not (type(found[key]) in (int, float) and value <= found[key] <= _MOST and found[key] > 0):
            raise ValueError(
                f"rope_scaling.{key}: found {found[key]!r:.80}, allowed are numbers from {value} to {_MOST}"
            )
    if found["high_freq_factor"] <= found["low_freq_factor"]:
        above = f"allowed are numbers above low_freq_factor = {found['low_freq_factor']}"
        raise ValueError(f"rope_scaling.high_freq_factor: found {found['high_freq_factor']}, {above}")


@dataclass(frozen=True)
class Parts:
    """What a model of ``transformers`` calls its parts; by default as Qwen2, Qwen3 and Llama do.

    Attributes:
        blocks: the list of blocks, a block is ``{blocks}.{number}``.
        embeddings: the table of the tokens' embeddings.
        norm: a norm outside the blocks, of which every model has one.
        head: the linear that makes logits.
        rotary: what turns queries and keys by their position, whose numbers are in no checkpoint; None without.
        tied: parameters that are others' where ``tie_word_embeddings`` is true, and may be missing in a checkpoint.
    """

    blocks: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str | None = "model.rotary_emb"
    tied: Mapping[str, str] = field(default_factory=lambda: {"lm_head.weight": "model.embed_tokens.weight"})


@dataclass(frozen=True)
class Architecture:
    """A family of models: its blocks, and how its published checkpoints say what this library builds.

    Attributes:
        config: the class of the configuration.
        blocks: ``qwen2``, ``qwen3`` (as Qwen2 with a norm of each head's queries and keys), ``llama``, ``bert``,
            ``roberta``, ``modernbert`` or ``esm``.
        is_shifted: whether the state at position ``i - 1`` predicts token ``i``; otherwise that at ``i`` does.
        attention: ``full``, ``block-causal``: a token sees its own block, in both directions, and all earlier ones
            (arXiv 2503.09573, section 3), or ``either``: that where ``block_key`` or the caller says a length.
        block_key: key of ``config.json`` that says how many tokens a block has, where attention is block-causal.
        block_length: number of tokens of a block where ``config.json`` doesn't say it; None where it must.
        published_as: the class in ``architectures`` of ``config.json``.
        sizes: key of ``config.json`` to attribute of ``config``, whole numbers that must be there; two keys of one
            attribute must agree.
        settings: the same for what isn't a size.
        required: the settings that must be there, because no default is the published one.
        fixed: key of ``config.json`` to the only values that the modules can compute, None where the key may be
            left out.
        tensors: part of a module's name to what stands for it in a tensor's name, where they differ.
        mask_token: text of the mask token, whose id the tokenizer knows where ``config.json`` doesn't say it, unless
            ``tokenizer_config.json`` names another; None where ``config.json`` must say it.
        mask_token_id: the mask token's id where neither ``config.json`` nor the tokenizer says it.
        parts: what the model calls its parts.
        older: part of a tensor's name to what old checkpoints have in its place.
        unused: parts of the names of tensors that checkpoints may hold and the model doesn't use.
        unused_if_rotary: more of them where ``position_embedding_type`` is ``rotary``.
        flat: the settings by their published keys, from those that ``transformers`` may have written instead.
    """

    config: type[PreTrainedConfig]
    blocks: str
    is_shifted: bool
    published_as: str
    sizes: Mapping[str, str]
    settings: Mapping[str, str]
    required: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    mask_token: str | None = None
    mask_token_id: int | None = None
    parts: Parts = field(default_factory=Parts)
    older: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    unused_if_rotary: tuple[str, ...] = ()
    flat: Callable[[dict[str, Any]], dict[str, Any]] = flat_rope
    attention: str = "full"
    block_key: str | None = None
    block_length: int | None = None


def same(*keys: str) -> dict[str, str]:
    """Keys that are attributes of the same name."""
    return {key: key for key in keys}


TOKEN_IDS = same("bos_token_id", "eos_token_id", "pad_token_id")
FLAGS = same(
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "norm_bias",
    "decoder_bias",
    "classifier_bias",
    "emb_layer_norm_before",
    "token_dropout",
)
_SMALL = ("rms_norm_eps", "layer_norm_eps", "norm_eps")
_POSITIVE = ("rope_theta", "global_rope_theta", "local_rope_theta")
_MOST_POSITIVE = 2**53  # torch holds larger whole numbers neither as such nor as they are
_ACTIVATIONS = ("hidden_act", "hidden_activation", "classifier_activation")
_POSITIONS = ("absolute", "rotary")
# Of what would take all memory or all time before a tensor of the wrong shape is found.
_MOST = 2**24

# Of published models' types; what isn't one of them would fail deep inside transformers.
_TYPES = ("float32", "bfloat16", "float16", "float64")
# With more blocks than any model has, to build them takes minutes before a tensor is found missing.
_LIMITS = {"num_hidden_layers": (1, 2**9), "mask_token_id": (0, _MOST), "pad_token_id": (0, _MOST)}


_EXPERTS = "a mixture of experts"
_UNSUPPORTED = {
    "llada2_moe": f"{_EXPERTS} (LLaDA2) with block-causal attention",
    "sdar_moe": f"{_EXPERTS} (SDAR) with block-causal attention",
    "rnd1": f"{_EXPERTS} (RND1)",
}
_OF_QWEN3 = ("block_size", "head_dim", "attention_bias", "use_qk_norm", "qk_norm")  # not in Dream's own config.json


@contextmanager
def in_one_line() -> Iterator[None]:
    """Make a ValueError of what ``transformers`` finds wrong with a configuration."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error


def check_supported(model_type: Any, content: dict[str, Any]) -> None:
    """Raise ValueError for a model that is known to compute something else than the modules here do."""
    if isinstance(model_type, str) and model_type in _UNSUPPORTED:
        raise ValueError(f"model_type: found {model_type!r:.80}, {_UNSUPPORTED[model_type]}, which isn't supported yet")
    experts = [key for key in content if "expert" in key and content[key]]
    if experts:
        found = f"{experts[0]}: found {content[experts[0]]!r:.80}"
        raise ValueError(f"{found}, a mixture of experts, which isn't supported yet")
    if model_type == "Dream":
        for key in _OF_QWEN3:
            if content.get(key) is not None:
                what = "a Dream model with Qwen3 blocks and block-causal attention (DreamReasoner)"
                raise ValueError(f"{key}: found {content[key]!r:.80}, {what}, which isn't supported yet")


def parse(architecture: Architecture, content: dict[str, Any]) -> dict[str, Any]:
    """The attributes of the configuration."""
    missing = [key for key in (*architecture.sizes, *architecture.required) if content.get(key) is None]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    for key, allowed in architecture.fixed.items():
        # 0 == False and 1 == True in Python, but not in a configuration.
        if not any(content.get(key) == value and type(content.get(key)) is type(value) for value in allowed):
            raise ValueError(f"{key}: found {content.get(key)!r:.80}, allowed is {allowed[0]!r}")
    _check_beside(content)
    values: dict[str, Any] = {}
    for key, attribute in architecture.sizes.items():
        found = content[key]
        least, most = _LIMITS.get(attribute, (1, _MOST))
        _check_whole(key, found, least, most)
        if values.setdefault(attribute, found) != found:
            raise ValueError(f"{key}: found {found}, allowed is {attribute} = {values[attribute]}")
    kinds = content.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        raise ValueError(f"layer_types: found {kinds!r:.80}, allowed is 'full_attention' for every layer")
    for key, attribute in architecture.settings.items():
        if key in content:
            _check_setting(key, attribute, content[key])
            values[attribute] = content[key]
    keys = {**architecture.sizes, **architecture.settings}
    turns = architecture.parts.rotary is not None and values.get("position_embedding_type") != "absolute"
    _check_sizes({attribute: key for key, attribute in reversed(keys.items())}, values, turns)
    return values


def _check_beside(content: Mapping[str, Any]) -> None:
    """Refuse keys that no module computes with, and that ``transformers`` reads."""
    for key in ("dtype", "torch_dtype"):
        if content.get(key) is not None and str(content[key]).removeprefix("torch.") not in _TYPES:
            raise ValueError(f"{key}: found {content[key]!r:.80}, allowed are {', '.join(_TYPES)}")
    if not isinstance(content.get("auto_map") or {}, dict):
        raise ValueError(f"auto_map: found {content['auto_map']!r:.80}, expected an object")


def _check_whole(key: str, found: Any, least: int, most: int) -> None:
    if type(found) is not int or not least <= found <= most:
        raise ValueError(f"{key}: found {found!r:.80}, allowed are whole numbers from {least} to {most}")


def _check_setting(key: str, attribute: str, found: Any) -> None:
    if attribute in _SMALL:
        if not (type(found) is float and 0 < found < 1):
            raise ValueError(f"{key}: found {found!r:.80}, allowed are numbers above 0 and below 1")
    elif attribute in _POSITIVE:
        if not (type(found) in (int, float) and 0 < found <= _MOST_POSITIVE):
            raise ValueError(f"{key}: found {found!r:.80}, allowed are numbers above 0 up to {_MOST_POSITIVE}")
    elif attribute == "max_position_embeddings":
        _check_whole(key, found, 1, 2**31)
    elif attribute in TOKEN_IDS or attribute in ("cls_token_id", "sep_token_id"):
        is_list = attribute == "eos_token_id" and isinstance(found, list)
        for number in found if is_list else () if found is None else (found,):
            _check_whole(key, number, 0, 2**31)
    elif attribute == "head_dim":
        if found is not None:
            _check_whole(key, found, 1, _MOST)
    elif attribute in FLAGS:
        if not isinstance(found, bool):
            raise ValueError(f"{key}: found {found!r:.80}, allowed are false and true")
    elif attribute == "position_embedding_type":
        if found not in _POSITIONS:
            raise ValueError(f"{key}: found {found!r:.80}, allowed are {', '.join(_POSITIONS)}")
    elif attribute in _ACTIVATIONS:
        from transformers.activations import ACT2FN  # takes as long to import as the models themselves

        if not (isinstance(found, str) and found in ACT2FN):
            raise ValueError(f"{key}: found {found!r:.80}, allowed are {', '.join(sorted(ACT2FN))}")


def _check_sizes(keys: Mapping[str, str], values: Mapping[str, Any], turns: bool) -> None:
    divided = {"num_key_value_heads": "num_attention_heads"} if "num_key_value_heads" in values else {}
    if values.get("head_dim") is None:
        divided = {"num_attention_heads": "hidden_size"} | divided
    for part, whole in divided.items():
        if values[part] < 1 or values[whole] % values[part]:
            allowed = f"allowed are divisors of {keys[whole]} = {values[whole]}"
            raise ValueError(f"{keys[part]}: found {values[part]}, {allowed}")
    head_size = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    if turns and head_size % 2:  # rotary embeddings turn pairs of features
        if values.get("head_dim") is not None:
            raise ValueError(f"{keys['head_dim']}: found {head_size}, allowed are even numbers")
        found = f"found {values['num_attention_heads']}, which makes heads of {head_size}"
        raise ValueError(f"{keys['num_attention_heads']}: {found}, allowed are those of an even size")
    if values["mask_token_id"] >= values["vocab_size"]:
        allowed = f"allowed is below {keys['vocab_size']} = {values['vocab_size']}"
        raise ValueError(f"{keys['mask_token_id']}: found {values['mask_token_id']}, {allowed}")

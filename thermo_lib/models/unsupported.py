"""Models that are known to compute something else than the modules here do."""

from collections.abc import Mapping
from typing import Any

_EXPERTS = "a mixture of experts"
_UNSUPPORTED = {
    "llada2_moe": f"{_EXPERTS} (LLaDA2) with block-causal attention",
    "sdar_moe": f"{_EXPERTS} (SDAR) with block-causal attention",
    "rnd1": f"{_EXPERTS} (RND1)",
}
_OF_QWEN3 = ("block_size", "head_dim", "attention_bias", "use_qk_norm", "qk_norm")  # not in Dream's own config.json


def check_supported(model_type: Any, content: Mapping[str, Any]) -> None:
    """Raise ValueError for a model that is known to compute something else than the modules here do."""
    if isinstance(model_type, str) and model_type in _UNSUPPORTED:
        raise ValueError(f"model_type: found {model_type!r}, {_UNSUPPORTED[model_type]}, which isn't supported yet")
    experts = [key for key in content if "expert" in key and content[key]]
    if experts:
        found = f"{experts[0]}: found {content[experts[0]]!r:.80}"
        raise ValueError(f"{found}, a mixture of experts, which isn't supported yet")
    if model_type == "Dream":
        for key in _OF_QWEN3:
            if content.get(key) is not None:
                what = "a Dream model with Qwen3 blocks and block-causal attention (DreamReasoner)"
                raise ValueError(f"{key}: found {content[key]!r:.80}, {what}, which isn't supported yet")

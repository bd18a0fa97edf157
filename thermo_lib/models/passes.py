"""How a forward pass goes through a model of ``transformers``: into its blocks, what they are given, and out again.

Written out, because a block is also run alone, with gradients or with weights that are read when they are needed; what
is computed is what the model's own forward computes.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Norm(Protocol):
    """What the norms of ``transformers`` and a ``TimeNorm`` have in common."""

    weight: Tensor


class DecoderPass:
    """Qwen2, Qwen3 and Llama: rotary positions, a norm after the last block, a linear as the head."""

    def longest(self, config: Any) -> int | None:
        """How many tokens a text may have; None where the model has no table of positions, which ends somewhere."""
        return None

    def seen(self, config: Any) -> str:
        """Which tokens a token sees, in words."""
        return "full"

    def enter(self, model: Any, ids: Tensor, positions: Tensor, visible: Tensor | None) -> Tensor:
        """What enters the first block, ``(batch, length, hidden)``.

        Args:
            model: of ``transformers``.
            ids: int64 ``(batch, length)``.
            positions: of the tokens from 0, ``(batch or 1, length)``.
            visible: bool ``(batch, length)``, False at padding; None without.
        """
        return model.model.embed_tokens(ids)

    def arguments(self, model: Any, hidden: Tensor, bias: Tensor | None, positions: Tensor) -> list[dict[str, Any]]:
        """What each block is given beside the hidden states.

        Args:
            model: of ``transformers``.
            hidden: of any length-``length`` batch, for type and device.
            bias: added to attention's scores, ``(batch, 1, length, length)``; None without padding.
            positions: see ``enter``.
        """
        shared = {
            "attention_mask": bias,
            "position_ids": positions,
            "position_embeddings": model.model.rotary_emb(hidden, positions),
            "use_cache": False,
        }
        return [shared] * len(model.model.layers)

    def leave(self, model: Any, hidden: Tensor) -> Tensor:
        """From what the last block returns to what the head's linear is given, the same shape."""
        return model.model.norm(hidden)

    def predict(self, model: Any, states: Tensor) -> Tensor:
        """Logits ``(..., vocabulary)`` from what ``leave`` returns, ``(..., hidden)``."""
        return model.lm_head(states)

    def prepare(self, model: Any) -> None:
        """Change a new model so that nothing of it is made for causal attention or for an own count of positions."""
        for module in model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False


class BlockCausalPass(DecoderPass):
    """SDAR and Fast-dLLM v2: as the decoders; a token sees its block, in both directions, and all earlier blocks.

    Blocks are counted from a text's first token (Block Diffusion, arXiv 2503.09573, section 3).
    """

    def seen(self, config: Any) -> str:
        """See ``DecoderPass``."""
        return f"block-causal in blocks of {config.block_length}"

    def arguments(self, model: Any, hidden: Tensor, bias: Tensor | None, positions: Tensor) -> list[dict[str, Any]]:
        """See ``DecoderPass``."""
        block_length = model.config.block_length
        if hidden.shape[1] > block_length:
            number = positions.to(hidden.device) // block_length
            later = number[:, None, None, :] > number[:, None, :, None]
            ahead = hiding(later, hidden.dtype)
            bias = ahead if bias is None else torch.minimum(bias, ahead)
        return self.cached(model, hidden, bias, positions)

    def cached(self, model: Any, hidden: Tensor, bias: Tensor | None, positions: Tensor) -> list[dict[str, Any]]:
        """``arguments`` where the bias already hides later blocks: ``(batch, 1, length, keys)``, None for nothing."""
        return super().arguments(model, hidden, bias, positions)


def hiding(is_hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores to hide keys from queries: of the same shape, 0 or the type's lowest."""
    bias = torch.zeros(is_hidden.shape, dtype=dtype, device=is_hidden.device)
    return bias.masked_fill(is_hidden, torch.finfo(dtype).min)


class BertPass(DecoderPass):
    """BERT: embedded positions, a norm before the first block, a head with a layer of its own before the linear."""

    def longest(self, config: Any) -> int | None:
        """See ``DecoderPass``."""
        return config.max_position_embeddings - self._first(config)

    def enter(self, model: Any, ids: Tensor, positions: Tensor, visible: Tensor | None) -> Tensor:
        """See ``DecoderPass``."""
        embeddings = model.base_model.embeddings
        return embeddings(ids, token_type_ids=torch.zeros_like(ids), position_ids=positions + self._first(model.config))

    def _first(self, config: Any) -> int:
        """The position of the first token."""
        return 0

    def arguments(self, model: Any, hidden: Tensor, bias: Tensor | None, positions: Tensor) -> list[dict[str, Any]]:
        """See ``DecoderPass``."""
        return [{"attention_mask": bias}] * len(model.base_model.encoder.layer)

    def leave(self, model: Any, hidden: Tensor) -> Tensor:
        """See ``DecoderPass``."""
        return model.cls.predictions.transform(hidden)

    def predict(self, model: Any, states: Tensor) -> Tensor:
        """See ``DecoderPass``."""
        return model.cls.predictions.decoder(states)

    def prepare(self, model: Any) -> None:
        """See ``DecoderPass``; tables that count positions are given to the modules instead."""
        super().prepare(model)
        embeddings = model.base_model.embeddings
        embeddings.position_ids = None
        if hasattr(embeddings, "token_type_ids"):
            embeddings.token_type_ids = None


class RobertaPass(BertPass):
    """RoBERTa: as BERT; positions begin after that of the padding token."""

    def _first(self, config: Any) -> int:
        """See ``BertPass``."""
        return config.pad_token_id + 1

    def leave(self, model: Any, hidden: Tensor) -> Tensor:
        """See ``DecoderPass``."""
        head = model.lm_head
        return head.layer_norm(nn.functional.gelu(head.dense(hidden)))

    def predict(self, model: Any, states: Tensor) -> Tensor:
        """See ``DecoderPass``."""
        return model.lm_head.decoder(states)


class EsmPass(RobertaPass):
    """ESM-1b (positions embedded as in RoBERTa) and ESM-2 (rotary): norms before each layer and after the last block.

    With ``token_dropout`` a mask's embedding is zero and the others' are multiplied by ``0.88 / (1 - m)``, where ``m``
    is the share of masks in the text and 0.88 what isn't masked in training (``_UNMASKED``).
    """

    _UNMASKED = 1 - 0.15 * 0.8

    def longest(self, config: Any) -> int | None:
        """See ``DecoderPass``."""
        return super().longest(config) if config.position_embedding_type == "absolute" else None

    def enter(self, model: Any, ids: Tensor, positions: Tensor, visible: Tensor | None) -> Tensor:
        """See ``DecoderPass``.

        The model's own forward also counts masks in padding, and divides by zero where a text is all masks, as every
        text is at the first denoising step.
        """
        embeddings, config = model.esm.embeddings, model.config
        hidden = embeddings.word_embeddings(ids)
        seen = torch.ones_like(ids, dtype=torch.bool) if visible is None else visible.bool()
        if config.token_dropout:
            is_known = (ids != config.mask_token_id) & seen
            scale = self._UNMASKED * seen.sum(-1) / is_known.sum(-1).clamp(min=1)
            hidden = (hidden * (scale[:, None] * is_known)[..., None]).to(hidden.dtype)
        if embeddings.position_embedding_type == "absolute":
            hidden = hidden + embeddings.position_embeddings(positions + self._first(config))
        if embeddings.layer_norm is not None:
            hidden = embeddings.layer_norm(hidden)
        return hidden if visible is None else hidden * seen[..., None].to(hidden.dtype)

    def arguments(self, model: Any, hidden: Tensor, bias: Tensor | None, positions: Tensor) -> list[dict[str, Any]]:
        """See ``DecoderPass``."""
        rotary = model.esm.rotary_embeddings
        turned = None if rotary is None else rotary(hidden, positions)
        return [{"attention_mask": bias, "position_embeddings": turned}] * len(model.esm.encoder.layer)

    def leave(self, model: Any, hidden: Tensor) -> Tensor:
        """See ``DecoderPass``."""
        return super().leave(model, model.esm.encoder.emb_layer_norm_after(hidden))

    def predict(self, model: Any, states: Tensor) -> Tensor:
        """See ``DecoderPass``."""
        return model.lm_head.decoder(states) + model.lm_head.bias

    def prepare(self, model: Any) -> None:
        """See ``DecoderPass``; what predicts contacts isn't needed, and frequencies are computed."""
        super().prepare(model)
        del model.esm.contact_head
        if (rotary := model.esm.rotary_embeddings) is not None:
            rotary.register_buffer("inv_freq", rotary.inv_freq, persistent=False)


class ModernBertPass(DecoderPass):
    """ModernBERT: rotary positions, most layers see a window only, a head with a layer of its own."""

    def seen(self, config: Any) -> str:
        """See ``DecoderPass``."""
        every, reach = config.global_attn_every_n_layers, config.sliding_window
        return "full" if every == 1 else f"full in one block of {every}, of tokens at most {reach} away in others"

    def enter(self, model: Any, ids: Tensor, positions: Tensor, visible: Tensor | None) -> Tensor:
        """See ``DecoderPass``."""
        return model.model.embeddings(ids)

    def arguments(self, model: Any, hidden: Tensor, bias: Tensor | None, positions: Tensor) -> list[dict[str, Any]]:
        """See ``DecoderPass``."""
        reach = model.config.sliding_window
        places = torch.arange(hidden.shape[1], device=hidden.device)
        biases = {"full_attention": bias, "sliding_attention": bias}
        if len(places) > reach + 1:
            near = hiding((places[:, None] - places).abs() > reach, hidden.dtype)
            biases["sliding_attention"] = near[None, None] if bias is None else torch.minimum(bias, near)
        given = {
            kind: {
                "attention_mask": biases[kind],
                "position_embeddings": model.model.rotary_emb(hidden, positions, kind),
            }
            for kind in sorted(set(model.config.layer_types))
        }
        return [given[kind] for kind in model.config.layer_types]

    def leave(self, model: Any, hidden: Tensor) -> Tensor:
        """See ``DecoderPass``."""
        return model.head(model.model.final_norm(hidden))

    def predict(self, model: Any, states: Tensor) -> Tensor:
        """See ``DecoderPass``."""
        return model.decoder(states)


BLOCK_CAUSAL = BlockCausalPass()
PASSES = {
    "qwen2": DecoderPass(),
    "qwen3": DecoderPass(),
    "llama": DecoderPass(),
    "bert": BertPass(),
    "roberta": RobertaPass(),
    "esm": EsmPass(),
    "modernbert": ModernBertPass(),
}

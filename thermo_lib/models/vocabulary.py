"""Which of a model's ids may be written, and which of them end a text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

_LONG = 64  # unknown ids that follow each other, as they do at a vocabulary's end; no other is looked up by itself
NO_PROBABILITY = -1e30  # finite, so that 0 * log 0 is 0 in a KL divergence; float16 doesn't hold it


class Vocabulary:
    """Which of a model's ids may be written.

    Args:
        tokenizer: the tokenizer; without one every id of the model is known.
        size: number of its tokens.
        vocab_size: number of the model's ids.
        never: ids that are never written, the first of them the mask token.

    Attributes:
        writable: see ``DiffusionLM``.
    """

    def __init__(self, tokenizer: Tokenizer | None, size: int, vocab_size: int, never: Sequence[int]):
        self.tokenizer, self.size = tokenizer, size
        is_known = torch.full((vocab_size,), tokenizer is None)
        if tokenizer is not None:
            is_known[[number for number in tokenizer.get_vocab().values() if number < vocab_size]] = True
        is_known[list(never)] = False
        is_known[never[0]] = True  # which ``token_logits`` rules out
        known, unknown = is_known.nonzero().flatten(), (~is_known).nonzero().flatten()
        self.writable = known[known != never[0]]
        runs = torch.tensor_split(unknown, ((unknown.diff() > 1).nonzero().flatten() + 1).tolist())
        self._runs = [slice(int(run[0]), int(run[-1]) + 1) for run in runs if len(run) >= _LONG]
        self._scattered = torch.cat([unknown[:0], *(run for run in runs if len(run) < _LONG)])

    def rule_out(self, logits: Tensor) -> Tensor:
        """Give other ids no probability in logits ``(n, vocabulary)``, which are overwritten."""
        for run in self._runs:
            logits[:, run] = NO_PROBABILITY
        if len(self._scattered):
            self._scattered = self._scattered.to(logits.device)
            logits.index_fill_(1, self._scattered, NO_PROBABILITY)
        return logits


def end_token_ids(model: PreTrainedModel, carried: Mapping[str, str]) -> tuple[int, ...]:
    """All ids that end a text: those of ``config.json``, then those that only ``generation_config.json`` names.

    Instruct models have the end of an answer in the second one.

    Args:
        model: the model; what ``transformers`` read of its generation counts where no file is carried.
        carried: see ``DiffusionLM``.

    Raises:
        ValueError: what ``generation_config.json`` says isn't an id or a list of ids.
    """
    found = json.loads(carried.get("generation_config.json", "{}")).get("eos_token_id")
    if found is None:
        found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = _listed(found)
    if not all(type(i) is int and i >= 0 for i in more):
        allowed = "allowed is an id, or a list of ids"
        raise ValueError(f"generation_config.json: eos_token_id: found {found!r:.80}, {allowed}")
    return tuple(dict.fromkeys([*_listed(model.config.eos_token_id), *more]))


def _listed(found: Any) -> Sequence[Any]:
    return found if isinstance(found, list | tuple) else [] if found is None else [found]


def check_known(ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError for token ids, any shape, that a model with so many ids doesn't have."""
    is_unknown = (ids < 0) | (ids >= vocab_size)
    if is_unknown.any():
        raise ValueError(f"ids: found {ids[is_unknown][0].item()}, allowed are 0..{vocab_size - 1}")

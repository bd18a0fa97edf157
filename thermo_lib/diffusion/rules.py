"""Which tokens may be written where, and what the end of a text means: rules that every sampler follows.

``suppress_tokens`` and ``begin_suppress_tokens`` are called so in ``transformers``' generation. A model that fills
positions in any order tends to be sure of the end of sequence far on the right while hardly anything is written, which
then leaves no room for the text (arXiv 2502.09992, appendix B.4). LLaDA's published loop has two remedies,
``logits_eos_inf`` and ``confidence_eos_eot_inf``; here they are ``suppress_end`` and ``end_last``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from thermo_lib.models.lm import DiffusionLM


@dataclass(frozen=True)
class TokenRules:
    """The arguments of ``generate`` of these names; ``resolved`` knows a model's vocabulary and end.

    Token ids are given as a sequence, or a single one as a number.

    Raises:
        ValueError: what isn't a token id, or rules that contradict each other.
    """

    suppress_tokens: Sequence[int] | int = ()
    begin_suppress_tokens: Sequence[int] | int = ()
    end_tokens: Sequence[int] | int | None = None
    suppress_end: bool = False
    end_last: bool = False
    stop_at_end: bool | None = None

    def __post_init__(self) -> None:
        for name in ("suppress_tokens", "begin_suppress_tokens", "end_tokens"):
            found = getattr(self, name)
            if found is not None:
                object.__setattr__(self, name, _ids(name, found))  # frozen
        for name in ("end_last", "stop_at_end"):
            if self.suppress_end and getattr(self, name):
                raise ValueError(f"{name}: found {True} with suppress_end, allowed is one of them: no end is written")

    def _tokens(self, name: str) -> tuple[int, ...]:
        """The ids of a field, as they are from ``__post_init__`` on; none of None."""
        return getattr(self, name) or ()

    @property
    def _asks_for_end(self) -> str | None:
        names = ("suppress_end", "end_last", "stop_at_end")
        return next((name for name in names if getattr(self, name)), None)

    def resolved(self, lm: DiffusionLM, sampler: str, *, block_by_block: bool = False) -> "TokenRules":
        """The rules for a model: with its ``end_token_ids`` where none are given, ``suppress_end`` as its tokens.

        Args:
            lm: the model.
            sampler: see ``generate``.
            block_by_block: whether blocks of block-causal attention are filled one after the other. A
                ``stop_at_end`` of None is True then where an end is known, else False.

        Raises:
            ValueError: ids outside the vocabulary, rules that leave no token, no known end where a rule is about it, or
                ``end_last`` with a sampler without confidence.
        """
        if self.end_last and sampler == "origin":
            raise ValueError("sampler: found 'origin', allowed with end_last are the others, which have a confidence")
        ends = None if self.end_tokens is None else self._tokens("end_tokens")
        stops = block_by_block if self.stop_at_end is None else self.stop_at_end
        if ends is None and (stops or self._asks_for_end is not None):
            ends = lm.end_token_ids
        if self._asks_for_end is not None and not ends:
            allowed = f"allowed is at least one id with {self._asks_for_end}, since the model's configuration has none"
            raise ValueError(f"end_tokens: found none, {allowed}")
        stops = bool(stops and ends and not self.suppress_end)
        begin = self._tokens("begin_suppress_tokens")
        suppressed = (*self._tokens("suppress_tokens"), *((ends or ()) if self.suppress_end else ()))
        for name, ids in (
            ("suppress_tokens", suppressed),
            ("begin_suppress_tokens", begin),
            ("end_tokens", ends or ()),
        ):
            outside = [token for token in ids if token >= lm.vocab_size]
            if outside:
                raise ValueError(f"{name}: found {outside[0]}, allowed are 0..{lm.vocab_size - 1}")
        ruled_out = {*suppressed, *begin}
        if ruled_out and not set(lm.writable.tolist()) - ruled_out:
            found = "found every id that the model may write, allowed is to leave at least one"
            raise ValueError(f"suppress_tokens, begin_suppress_tokens: {found}")
        return TokenRules(suppressed, begin, ends, False, self.end_last, stops)

    def rule_out(self, logits: Tensor, is_first: Tensor) -> Tensor:
        """Give tokens that mustn't be written no probability.

        Args:
            logits: ``(n, vocabulary)``; overwritten.
            is_first: bool ``(n,)``, at a row's first masked position.
        """
        if self.suppress_tokens:
            logits.index_fill_(1, _on(self._tokens("suppress_tokens"), logits.device), -torch.inf)
        if self.begin_suppress_tokens:
            begin = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            begin.index_fill_(0, _on(self._tokens("begin_suppress_tokens"), logits.device), True)
            logits.masked_fill_(is_first[:, None] & begin, -torch.inf)
        return logits

    def is_end(self, ids: Tensor) -> Tensor:
        """Which of some ids end a text, bool of the same shape."""
        return torch.isin(ids, _on(self._tokens("end_tokens"), ids.device))

    def ended(self, ids: Tensor, is_written: Tensor, is_left: Tensor) -> Tensor:
        """Rows with an end that has nothing masked on its left are finished: the end is written on, to their end.

        Args:
            ids: int64 ``(batch, length)``.
            is_written: bool, same shape: the positions that were masked at the start; others stay as they are.
            is_left: bool, same shape: those that are still masked.

        Returns:
            The ids, with the row's first such end at all written positions on its right.
        """
        ends = is_written & self.is_end(ids) & (is_left.cumsum(1) == 0)
        count = ends.cumsum(1)
        token = (ids * (ends & (count == 1))).sum(1, keepdim=True)
        return torch.where(is_written & (count > 0), token, ids)


def _ids(name: str, found: Any) -> tuple[int, ...]:
    """Token ids as a tuple."""
    ids = (found,) if isinstance(found, Integral) else found
    is_list = isinstance(ids, Sequence) and not isinstance(ids, str | bytes)
    if not is_list or any(not isinstance(i, Integral) or isinstance(i, bool) or i < 0 for i in ids):
        raise ValueError(f"{name}: found {found!r}, allowed are token ids, whole numbers from 0")
    return tuple(int(i) for i in ids)


@lru_cache(maxsize=16)  # to move them at every step would wait for a GPU
def _on(ids: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64).to(device)

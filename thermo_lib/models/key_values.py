"""Keys and values of finished blocks, so that a block-causal model computes only the block that is being filled.

In block-causal attention nothing that follows a block changes what the model computes of it (Block Diffusion, arXiv
2503.09573, section 3), so keys and values of a block that is filled are computed once. SDAR (arXiv 2510.06303) and
Fast-dLLM v2 (arXiv 2509.26328) generate in this way.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from thermo_lib.models.passes import BLOCK_CAUSAL, DecoderPass, hiding
from thermo_lib.quant.calls import CurrentStep, denoising

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    class _Base(PreTrainedModel):
        """What else every model is."""

        # In transformers a decorator hides its type.
        def to(self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
            """Move or cast the model."""

        @property
        def blocks(self) -> nn.ModuleList:
            """See ``MaskPredictor``."""

else:
    _Base = object


class KeyValues:
    """Keys and values of the finished blocks of a batch of texts, in each layer of a model.

    Texts lie from their first token on, without padding, whatever their lengths.

    Args:
        rows: number of texts.

    Attributes:
        filled: number of tokens of each text that are finished.
        last: what the last of them predicts the next token from, ``(rows, hidden)``; None where nothing is finished.
    """

    def __init__(self, rows: int):
        self.filled = [0] * rows
        self.last: Tensor | None = None
        self._layers: list[tuple[Tensor, Tensor]] = []  # each (rows, heads, longest, features)
        self._counts: list[int] | None = None  # of tokens that a pass adds, None where it adds none

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """All keys and values that a layer's queries may see, as the caches of ``transformers`` give them.

        Args:
            key, value: of the tokens of this pass, ``(rows, heads, length, features)``.
            layer: its number.

        Returns:
            ``(rows, heads, longest + length, features)`` each, where ``longest`` is the largest of ``filled``.
        """
        if layer < len(self._layers):
            before = self._layers[layer]
            every = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        else:
            every = key, value
        if self._counts is not None:
            kept = [self._closed_up(part, self._counts) for part in every]
            self._layers[layer : layer + 1] = [(kept[0], kept[1])]
        return every

    def _closed_up(self, every: Tensor, counts: list[int]) -> Tensor:
        """The new tokens right after the finished ones of each row, which aren't at one place where rows differ."""
        longest = max(self.filled)
        after = [filled + count for filled, count in zip(self.filled, counts, strict=True)]
        if all(filled == longest for filled in self.filled):
            return every[:, :, : max(after)]
        place = torch.arange(max(after), device=every.device)
        finished = torch.tensor(self.filled).to(every.device)[:, None]
        place = torch.where(place < finished, place, place - finished + longest).clamp(max=every.shape[2] - 1)
        return every.gather(2, place[:, None, :, None].expand(-1, every.shape[1], -1, every.shape[3]))

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows, in the order that is given."""
        if list(rows) == list(range(len(self.filled))):
            return
        self.filled = [self.filled[row] for row in rows]
        which = torch.tensor(rows, dtype=torch.int64)
        longest = max(self.filled, default=0)
        self._layers = [
            (key[which.to(key.device), :, :longest], value[which.to(value.device), :, :longest])
            for key, value in self._layers
        ]
        if self.last is not None:
            self.last = self.last[which.to(self.last.device)]


class BlockByBlock(_Base):
    """How models compute a block after others; mixed into ``MaskPredictor``, whose parts it uses."""

    is_shifted: bool
    passes: DecoderPass
    step: CurrentStep

    @property
    def block_length(self) -> int | None:
        """Number of tokens of a block in block-causal attention; None where attention is full."""
        return self.config.block_length if self.passes is BLOCK_CAUSAL else None

    def hidden_of_block(
        self, input_ids: Tensor, cache: KeyValues, counts: Sequence[int] | None = None, store: bool = False
    ) -> Tensor:
        """``hidden`` of the tokens that follow those in a cache, of a block-causal model; only they are computed.

        What is in the cache is what ``hidden`` computes of the finished blocks, with the parameters of the step in
        which they were stored.

        Args:
            input_ids: int64 ``(batch, length)``, what follows in each row, from the beginning of a block.
            cache: see ``KeyValues``; a new one at the beginning of the texts.
            counts: number of each row's ids that count, others are seen by none; None for all.
            store: add them to the cache. A text can only go on after a whole block.

        Returns:
            ``(batch, length, hidden)``, such that position ``i`` predicts token ``i``.

        Raises:
            ValueError: a model with full attention, a count out of range, or a cache of other rows or that ends inside
                a block.
        """
        block_length = self.block_length
        if block_length is None:
            raise ValueError(f"model: found {self.config.model_type!r}, allowed is one with block-causal attention")
        if len(cache.filled) != len(input_ids):
            raise ValueError(f"cache: found {len(cache.filled)} rows, expected {len(input_ids)}, as input_ids has")
        length = input_ids.shape[1]
        counts = [length] * len(input_ids) if counts is None else list(counts)
        for filled, count in zip(cache.filled, counts, strict=True):
            if not 0 <= count <= length:
                raise ValueError(f"counts: found {count}, allowed are 0..{length}")
            if filled % block_length and count:
                allowed = f"allowed are whole blocks of {block_length} before more tokens"
                raise ValueError(f"cache: found a text of {filled} tokens, {allowed}")
        finished = torch.tensor(cache.filled).to(input_ids.device)
        positions = finished[:, None] + torch.arange(length, device=input_ids.device)
        cache._counts = counts if store else None
        try:
            with denoising(self.step.value, input_ids == self.config.mask_token_id):
                hidden = self.passes.enter(self, input_ids, positions, None)
                bias = _bias(cache.filled, counts, length, block_length, hidden)
                for block, given in zip(self.blocks, BLOCK_CAUSAL.cached(self, hidden, bias, positions), strict=True):
                    hidden = block(hidden, past_key_values=cache, **given)
                states = self.passes.leave(self, hidden)
        finally:
            cache._counts = None
        found = states
        if self.is_shifted:  # a first token has no state before it and keeps its own
            first = states[:, 0]
            if cache.last is not None:
                first = torch.where((finished > 0)[:, None].to(first.device), cache.last, first)
            found = torch.cat([first[:, None], states[:, :-1]], 1)
        if store:
            _finish(cache, states, counts)
        return found


def _bias(filled: list[int], counts: list[int], length: int, block_length: int, hidden: Tensor) -> Tensor | None:
    """What is added to attention's scores, ``(rows, 1, length, longest + length)``; None where nothing is hidden."""
    longest = max(filled)
    if length <= block_length and all(n == longest for n in filled) and all(n == length for n in counts):
        return None
    device = hidden.device
    place = torch.arange(length, device=device)
    unfinished = torch.arange(longest, device=device) >= torch.tensor(filled).to(device)[:, None]
    beyond = place >= torch.tensor(counts).to(device)[:, None]
    later = place // block_length > place[:, None] // block_length
    is_hidden = torch.cat([unfinished[:, None].expand(-1, length, -1), beyond[:, None] | later], 2)
    return hiding(is_hidden[:, None], hidden.dtype)


def _finish(cache: KeyValues, states: Tensor, counts: list[int]) -> None:
    """Count what a pass has added, and keep the states of the last tokens."""
    ends = torch.tensor(counts).to(states.device)
    last = states[torch.arange(len(states), device=states.device), (ends - 1).clamp(min=0)]
    cache.last = last if cache.last is None else torch.where(ends[:, None] > 0, last, cache.last)
    cache.filled = [filled + count for filled, count in zip(cache.filled, counts, strict=True)]

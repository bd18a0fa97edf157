"""Block-causal models generate block by block, with the keys and values of finished blocks kept.

As the published loops of SDAR (arXiv 2510.06303) and Fast-dLLM v2 (arXiv 2509.26328) do, after Block Diffusion (arXiv
2503.09573, section 3): what is known before the first mask is computed once, then each block is denoised by itself,
and computed once more when it is filled. Schedule, samplers and rules are those of ``diffusion.sampling``.

Blocks are those of the model's attention, counted from a text's first token, so a prompt that ends inside a block
shares that block with the first new tokens. A block that is filled in ``S`` of the ``T`` timesteps is computed at its
step ``s`` for timestep ``floor(s T / S)``, and with a ``threshold`` for ``floor((1 - m / n) T)``, where ``m`` of the
block's ``n`` positions are still masked: the mask ratio of the block, not of the text. All earlier blocks are seen as
they are at the end, computed for timestep ``T - 1``. So a text is that of a loop that keeps nothing and computes before
each step all earlier blocks anew, for timestep ``T - 1``; where nothing in the model depends on the timestep, that is
one pass over the text. With logits that are shifted by one, the first token of a block is predicted from the last one
of the block before, as it is at the end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thermo_lib.diffusion.step import Batch, computing_for
from thermo_lib.models.key_values import KeyValues
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.models.vocabulary import check_known


def blocks_of(lm: Any, block_length: int | None) -> tuple[int | None, bool]:
    """What ``generate`` is asked to fill together.

    Args:
        lm: the model.
        block_length: None for a block-causal model's own, and for all positions of another; 0 for all of any.

    Returns:
        The length of blocks, None for a single one, and whether a block-causal model fills its own one by one.
    """
    own = lm.model.block_length if isinstance(lm, DiffusionLM) else None
    if block_length is None:
        return own, own is not None
    if type(block_length) is int and block_length == 0:
        return None, False
    return block_length, own is not None


def check_blocks(lm: DiffusionLM, ids: Tensor, block_length: int | None, **hooks: Any) -> None:
    """Refuse what can't be done block by block.

    Raises:
        ValueError: another block length than the model's, ids outside the vocabulary, or hooks, by their names, which
            see logits of all positions or change finished blocks.
    """
    own = lm.model.block_length
    if block_length != own:
        allowed = f"allowed is {own}, that of the model's attention, or 0 for all positions together"
        raise ValueError(f"block_length: found {block_length!r}, {allowed}")
    for name, hook in hooks.items():
        if hook is not None:
            why = "with a block-causal model, whose steps compute a block alone; block_length=0 fills all together"
            raise ValueError(f"{name}: found a hook, allowed is None {why}")
    check_known(ids, lm.vocab_size)


@dataclass(frozen=True)
class _Place:
    """The tokens that a pass computes.

    Attributes:
        rows: of the batch, int64 ``(rows, 1)``.
        columns: int64 ``(rows, length)``.
        counts: number of each row's columns that are in its text; others are computed and seen by none.
    """

    rows: Tensor
    columns: Tensor
    counts: list[int]

    def of(self, values: Tensor) -> Tensor:
        """Values ``(batch, length)`` at the place, ``(rows, length)``."""
        return values[self.rows, self.columns]


class CachedBatch:
    """Some rows of a generation whose blocks are filled one after the other; each row goes on by itself.

    Args:
        batch: the rows, at the start, and how they are filled. Its schedule is one of the model's blocks.
    """

    def __init__(self, batch: Batch):
        self._batch = batch
        count, length = batch.start.shape
        is_text = torch.ones_like(batch.start) if batch.is_text is None else batch.is_text
        self._lengths = is_text.sum(1)
        self._pads = length - self._lengths
        self._rows = torch.arange(count, device=batch.start.device)  # those that aren't finished
        self._cache = KeyValues(count)

    @torch.no_grad()
    def step(self, x: Tensor, timestep: int, uniform: Tensor) -> Tensor:
        """See ``Batch.step``; only the blocks that are being filled are computed, and those before that are new."""
        batch = self._batch
        is_left = batch.left(x)
        is_open, rate = batch.opened(is_left, timestep)
        if not is_open.any():
            return x
        place = self._go_on(x, is_left, timestep)
        told = self._timesteps(is_left, timestep)[self._rows].tolist()
        with computing_for(batch.lm, told, timestep, batch.schedule.timesteps):
            inside = torch.arange(place.columns.shape[1])[None] < torch.tensor(place.counts)[:, None]
            asked = (place.of(is_open) & inside.to(x.device)).flatten().nonzero().flatten()
            return batch.filled(x, lambda places: self._logits(x, place, asked), is_open, rate, uniform)

    def _go_on(self, x: Tensor, is_left: Tensor, timestep: int) -> _Place:
        """Drop finished rows, compute what is new before the others' first block with masks, and give these blocks."""
        batch, block_length = self._batch, self._batch.lm.model.block_length
        assert block_length is not None  # of a block-causal model
        goes_on = is_left[self._rows].any(1)
        self._cache.keep(goes_on.nonzero().flatten().tolist())
        self._rows = self._rows[goes_on]
        first = is_left[self._rows].byte().argmax(1) - self._pads[self._rows]
        starts = (first // block_length * block_length).tolist()
        new = [start - filled for start, filled in zip(starts, self._cache.filled, strict=True)]
        if max(new):
            before = self._place(self._cache.filled, new)
            timesteps = batch.schedule.timesteps
            with computing_for(batch.lm, [timesteps - 1], timestep, timesteps):
                batch.lm.model.hidden_of_block(before.of(x), self._cache, new, store=True)
        lengths = self._lengths[self._rows].tolist()
        counts = [min(block_length, length - start) for start, length in zip(starts, lengths, strict=True)]
        return self._place(starts, counts)

    def _place(self, starts: list[int], counts: list[int]) -> _Place:
        """The tokens of the rows from those numbers on, counted from each text's first."""
        device = self._rows.device
        first = self._pads[self._rows] + torch.tensor(starts).to(device)
        columns = first[:, None] + torch.arange(max(counts), device=device)
        return _Place(self._rows[:, None], columns.clamp(max=self._batch.start.shape[1] - 1), counts)

    def _timesteps(self, is_left: Tensor, timestep: int) -> Tensor:
        """The timesteps of the rows' blocks, int64 ``(batch,)``."""
        schedule = self._batch.schedule
        if self._batch.sampling.threshold is None:
            _, step, steps = schedule.at(timestep)
            return step * schedule.timesteps // steps
        block = torch.where(is_left, schedule.block, schedule.timesteps).amin(1)
        start = (self._batch.start & (schedule.block == block[:, None])).sum(1)
        left = (is_left & (schedule.block == block[:, None])).sum(1)
        return (start - left) * schedule.timesteps // start.clamp(min=1)

    def _logits(self, x: Tensor, place: _Place, asked: Tensor) -> Iterator[Tensor]:
        """Of the asked tokens of a place, int64 ``(n,)``, row by row; see ``DiffusionLM.logit_parts``."""
        lm = self._batch.lm
        states = lm.model.hidden_of_block(place.of(x), self._cache, place.counts).flatten(0, 1)
        for some in states[asked.to(states.device)].split(lm.rows_at_a_time):
            yield lm.token_logits(lm.model.predict(some), self._batch.late).to(x.device)

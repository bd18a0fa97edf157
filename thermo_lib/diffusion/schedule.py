"""How each row's masked positions and timesteps are divided into blocks, filled left to right (semi-autoregressive
generation, arXiv 2502.09992, section 2.4). A row's division doesn't depend on the other rows of its batch."""

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


def check_count(name: str, found: Any) -> None:
    """Raise ValueError unless a value is a whole number from 1."""
    if not isinstance(found, Integral) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{name}: found {found!r}, allowed is at least 1, a whole number")


@dataclass(frozen=True)
class Schedule:
    """Which block a row fills at which timestep.

    The timesteps are shared out among the blocks of a row as evenly as they can be: where they don't divide, the first
    blocks have one more.

    Attributes:
        timesteps: ``T``.
        block: number of the block of each masked position, from 0, int64 ``(batch, length)``.
        masked: number of masked positions of each row, int64 ``(batch,)``.
        blocks: number of blocks of each row, at least 1, int64 ``(batch,)``.
        is_divided: whether some row has several.
    """

    timesteps: int
    block: Tensor
    masked: Tensor
    blocks: Tensor
    is_divided: bool = False

    @classmethod
    def of(cls, is_masked: Tensor, block_length: int | None, timesteps: int, place: Tensor | None = None) -> "Schedule":
        """Divide the masked positions of each row, left to right.

        Args:
            is_masked: bool ``(batch, length)``.
            block_length: masked positions in a block, the last may have fewer; None for a single block.
            timesteps: ``T``.
            place: number of each position in its text, int64 ``(batch, length)``: blocks are then those of a
                block-causal model, of all positions, and those without masks don't count.

        Raises:
            ValueError: an empty block, or fewer timesteps than a row has blocks.
        """
        masked = is_masked.sum(1)
        if block_length is None:
            return cls(timesteps, torch.zeros_like(is_masked, dtype=torch.int64), masked, torch.ones_like(masked))
        check_count("block_length", block_length)
        number = (is_masked.cumsum(1) - 1 if place is None else place) // block_length
        before = torch.nn.functional.pad(number.masked_fill(~is_masked, -1), (1, 0), value=-1)[:, :-1]
        begins = is_masked & (number > before.cummax(1).values)
        block, blocks = (begins.cumsum(1) - 1).clamp(min=0), begins.sum(1).clamp(min=1)
        most = int(blocks.max()) if len(blocks) else 1
        if timesteps < most:
            allowed = f"allowed is at least {most}, one for each block of {block_length} positions"
            raise ValueError(f"timesteps: found {timesteps}, {allowed}")
        return cls(timesteps, block, masked, blocks, most > 1)

    def start(self, block: Tensor) -> Tensor:
        """The first timestep of a block of each row, int64 ``(batch,)``; of the block after the last, ``T``."""
        return self.timesteps // self.blocks * block + torch.minimum(self.timesteps % self.blocks, block)

    def at(self, timestep: int) -> tuple[Tensor, Tensor, Tensor]:
        """The block that each row fills at a timestep, the step inside it, and the block's number of steps.

        Each is int64 ``(batch,)``.
        """
        width, longer = self.timesteps // self.blocks, self.timesteps % self.blocks
        edge = longer * (width + 1)
        timesteps = torch.full_like(self.blocks, timestep)
        block = torch.where(timesteps < edge, timesteps // (width + 1), longer + (timesteps - edge) // width)
        return block, timesteps - self.start(block), width + (block < longer)

    def counts(self) -> set[int]:
        """The numbers of steps that blocks have."""
        if not self.is_divided:
            return {self.timesteps}
        divided = [divmod(self.timesteps, blocks) for blocks in self.blocks.unique().tolist()]
        return {width for width, _ in divided} | {width + 1 for width, longer in divided if longer}

    def told(self, timestep: int, left: Tensor, *, follows: bool) -> list[int]:
        """The timestep that time-aware layers compute for, of each row.

        A row that fills several blocks has other mask ratios than the timesteps say. It is told the timestep of its
        own ratio, ``floor((1 - left / masked) T)``.

        Args:
            timestep: of the run; that of a row with a single block.
            left: number of positions of each row that are still masked, int64 ``(batch,)``.
            follows: whether a single block is filled in its timesteps; otherwise its mask ratio counts too.
        """
        masked = self.masked.clamp(min=1)
        by_ratio = ((masked - left) * self.timesteps // masked).clamp(0, self.timesteps - 1)
        return torch.where(self.blocks == 1, timestep, by_ratio).tolist() if follows else by_ratio.tolist()

    def __getitem__(self, rows: slice | Tensor) -> "Schedule":
        return replace(self, block=self.block[rows], masked=self.masked[rows], blocks=self.blocks[rows])

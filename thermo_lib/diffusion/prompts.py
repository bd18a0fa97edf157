"""What denoising starts from: texts that are all masks, or prompts that stay with masks to fill after them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thermo_lib.diffusion.states import Calibration


class Prompts(Protocol):
    """Starts of one length, as many as wanted.

    Attributes:
        is_empty: whether every position is masked.
    """

    is_empty: bool

    def draw(self, count: int, seed: int) -> Tensor:
        """Some starts, int64 ``(count, length)``, masks at the positions to fill."""

    def start(self, number: int, seed: int) -> Tensor:
        """The start of a number, counted from 0, int64 ``(length,)``."""


@dataclass(frozen=True)
class EmptyTexts:
    """Texts of which nothing is known.

    Attributes:
        length: number of tokens.
        mask_token_id: the id at every position.
    """

    length: int
    mask_token_id: int
    is_empty = True

    def draw(self, count: int, seed: int) -> Tensor:
        """See ``Prompts``."""
        return torch.full((count, self.length), self.mask_token_id)

    def start(self, number: int, seed: int) -> Tensor:
        """See ``Prompts``."""
        return torch.full((self.length,), self.mask_token_id)


@dataclass(frozen=True)
class GivenPrompts:
    """Prompts that are drawn at random from some that are known.

    Attributes:
        ids: int64 ``(prompts, length)``, masks at the positions to fill.
    """

    ids: Tensor
    is_empty = False

    def draw(self, count: int, seed: int) -> Tensor:
        """See ``Prompts``; all of them come before any comes again."""
        generator = torch.Generator().manual_seed(seed)
        rounds = [torch.randperm(len(self.ids), generator=generator) for _ in range(-(-count // len(self.ids)))]
        return self.ids[torch.cat(rounds)[:count]]

    def start(self, number: int, seed: int) -> Tensor:
        """See ``Prompts``."""
        turn, position = divmod(number, len(self.ids))
        return self.draw(len(self.ids), seed + turn)[position]


def prompts_of(calibration: Calibration, mask_token_id: int) -> Sequence[Prompts]:
    """What the calibration states start from, one entry for each of their lengths.

    Raises:
        ValueError: states of a length without any at the first timestep.
    """
    found: list[Prompts] = []
    for number, part in enumerate(calibration.parts):
        first = part.ids[part.timestep == 0]
        if not len(first):
            raise ValueError(f"calibration: part {number}: found no state at timestep 0, which fresh states start from")
        is_empty = bool((first == mask_token_id).all())
        found.append(EmptyTexts(first.shape[1], mask_token_id) if is_empty else GivenPrompts(first))
    return found

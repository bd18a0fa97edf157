"""A model that is a table of logits, and the states that a sampler passes through."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thermo_lib.diffusion.sampling import generate
from thermo_lib.diffusion.tokens import SAMPLERS
from thermo_lib.models.checks import LateChecks
from thermo_lib.models.lm import DiffusionLM

CONFIDENCE_SAMPLERS = SAMPLERS[1:]
MASK = 0

RandomIds = Callable[..., Tensor]


@dataclass
class TableLM:
    """A model whose logits at a position are a row of a table, whatever the other tokens are."""

    table: Tensor
    mask_token_id: int = MASK
    device = torch.device("cpu")
    end_token_ids = ()
    rows_at_a_time = 0  # 0 for a quarter of them, at least five

    @property
    def vocab_size(self) -> int:
        """As ``DiffusionLM.vocab_size``."""
        return self.table.shape[-1]

    @property
    def writable(self) -> Tensor:
        """As ``DiffusionLM.writable``; the mask token is the first id."""
        return torch.arange(1, self.vocab_size)

    def set_timestep(self, timestep: int, timesteps: int) -> None:
        """Nothing depends on the timestep."""

    def logits(self, ids: Tensor, at: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The rows of the chosen positions; the mask token gets no probability."""
        rows = self.table.expand(len(ids), -1, -1)[at].clone()
        rows[:, self.mask_token_id] = -1e30
        return rows

    def logit_parts(
        self, ids: Tensor, at: Tensor, attention_mask: Tensor | None = None, *, late: LateChecks | None = None
    ) -> Iterator[Tensor]:
        """As ``DiffusionLM.logit_parts``: some rows at a time."""
        is_asked = at if at.dtype == torch.bool else torch.zeros(ids.numel()).index_fill(0, at, 1).bool().view_as(ids)
        logits = self.logits(ids, is_asked, attention_mask)
        yield from logits.split(self.rows_at_a_time or max(5, len(logits) // 4))


def run_states(lm: TableLM | DiffusionLM, start: Tensor, **arguments: object) -> list[Tensor]:
    """The states before each step and the result, of all rows."""
    states: list[Tensor] = []
    result = generate(
        lm, start, batch_size=len(start), on_state=lambda _, rows, x: states.append(x.clone()), **arguments
    )
    return [*states, result]

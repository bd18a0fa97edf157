"""With a threshold every position that is sure enough is filled, and rows end early."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from table_model import MASK, RandomIds, TableLM, run_states
from torch import Tensor

from thermo_lib.diffusion.sampling import generate
from thermo_lib.diffusion.tokens import BY_PROBABILITY, SAMPLERS
from thermo_lib.models.lm import DiffusionLM

CONFIDENCE = [0.9, 0.4, 0.8, 0.35, 0.6, 0.95]


def table(confidence: list[float]) -> Tensor:
    """Logits of a token of the given probability at each position, and of eight others that share the rest."""
    rows = [[0.0, p, *[(1 - p) / 8] * 8] for p in confidence]
    return torch.tensor(rows).log().clamp(min=-1e30)


def masks_of(states: list[Tensor]) -> list[list[list[int]]]:
    """The masked positions of each row after each step that changes something."""
    found = [[row.nonzero().flatten().tolist() for row in x == MASK] for x in states]
    return [new for i, new in enumerate(found) if i == 0 or new != found[i - 1]]


class TestThreshold:
    """Fast-dLLM's parallel decoding."""

    @pytest.mark.parametrize("sampler", BY_PROBABILITY)
    def test_what_is_sure_enough_is_filled_at_once(self, sampler: str) -> None:
        how = {"timesteps": 8, "sampler": sampler, "threshold": 0.7}
        states = run_states(TableLM(table(CONFIDENCE)), torch.full((1, 6), MASK), **how)
        # 0.9, 0.8 and 0.95 first; then the surest one at a time: 0.6, 0.4, 0.35.
        assert masks_of(states) == [[[0, 1, 2, 3, 4, 5]], [[1, 3, 4]], [[1, 3]], [[3]], [[]]]

    def test_the_threshold_itself_is_not_above_it(self) -> None:
        certain = torch.zeros(3, 4)
        certain[:, 1] = 1e4  # of probability 1 exactly
        states = run_states(
            TableLM(certain), torch.full((1, 3), MASK), timesteps=3, sampler="maskgit_plus", threshold=1.0
        )
        assert masks_of(states) == [[[0, 1, 2]], [[1, 2]], [[2]], [[]]]

    def test_a_block_begins_when_the_one_before_is_full(self) -> None:
        how = {"timesteps": 6, "sampler": "maskgit_plus", "threshold": 0.7, "block_length": 3}
        states = run_states(TableLM(table(CONFIDENCE)), torch.full((1, 6), MASK), **how)
        assert masks_of(states) == [[[0, 1, 2, 3, 4, 5]], [[1, 3, 4, 5]], [[3, 4, 5]], [[3, 4]], [[3]], [[]]]
        start = torch.full((2, 6), MASK)
        start[1, :3] = 5
        states = run_states(TableLM(table(CONFIDENCE)), start, **how)
        assert [rows[1] for rows in masks_of(states)[:4]] == [[3, 4, 5], [3, 4], [3], []]

    @given(
        confidence=st.lists(st.floats(0.2, 0.99), min_size=1, max_size=12),
        timesteps=st.integers(1, 14),
        block_length=st.none() | st.integers(1, 12),
        threshold=st.floats(0.1, 1),
        sampler=st.sampled_from(BY_PROBABILITY),
        temperature=st.sampled_from([0.0, 1.0]),
    )
    def test_at_every_step_one_at_least_and_in_the_end_all(
        self,
        confidence: list[float],
        timesteps: int,
        block_length: int | None,
        threshold: float,
        sampler: str,
        temperature: float,
    ) -> None:
        blocks = 1 if block_length is None else -(-len(confidence) // block_length)
        states = run_states(
            TableLM(table(confidence)),
            torch.full((1, len(confidence)), MASK),
            timesteps=max(timesteps, blocks),
            block_length=block_length,
            threshold=threshold,
            sampler=sampler,
            temperature=temperature,
        )
        left = [int((x == MASK).sum()) for x in states]
        assert all(b < a or a == 0 for a, b in itertools.pairwise(left))
        assert left[-1] == 0

    def test_too_few_timesteps_fill_evenly(self) -> None:
        # Nothing exceeds the threshold: of 6 positions in 4 steps ceil(6/4), ceil(4/3), ceil(2/2) and the last.
        how = {"timesteps": 4, "sampler": "maskgit_plus", "threshold": 1.0}
        states = run_states(TableLM(table(CONFIDENCE)), torch.full((1, 6), MASK), **how)
        assert [int((x == MASK).sum()) for x in states] == [6, 4, 2, 1, 0]

    def test_a_finished_row_is_not_run_any_more(self) -> None:
        sizes: list[int] = []

        class Counting(TableLM):
            def logits(self, ids: Tensor, at: Tensor, attention_mask: Tensor | None = None) -> Tensor:
                sizes.append(len(ids))
                return super().logits(ids, at)

        start = torch.full((3, 6), MASK)
        start[0, [1, 3, 4]] = 5  # the unsure positions
        start[2, 1:] = 5
        how: dict[str, Any] = {"timesteps": 10, "sampler": "maskgit_plus", "threshold": 0.7}
        text = generate(Counting(table(CONFIDENCE)), start, **how)
        assert sizes == [3, 1, 1, 1]
        assert not (text == MASK).any()
        for row in range(3):
            assert torch.equal(text[row], generate(TableLM(table(CONFIDENCE)), start[row : row + 1], **how)[0])
        seen: list[int] = []
        generate(TableLM(table(CONFIDENCE)), start, on_state=lambda i, rows, x: seen.append(len(x)), **how)
        assert seen == [3] * 10, "hooks see every row at every timestep"

    def test_it_takes_fewer_passes_than_the_schedule(self, tiny: DiffusionLM, random_ids: RandomIds) -> None:
        ids = torch.cat([random_ids(2, 4), torch.full((2, 16), MASK)], dim=1)
        passes: list[int] = []
        hidden = tiny.model.hidden
        tiny.model.hidden = lambda *given: passes.append(1) or hidden(*given)
        try:
            generate(tiny, ids, timesteps=16, block_length=4, sampler="low_confidence", threshold=0.1)
        finally:
            del tiny.model.hidden
        assert 4 <= len(passes) < 16

    def test_hooks_see_the_same_steps(self, tiny: DiffusionLM, prompts: Tensor) -> None:
        how: dict[str, Any] = {"timesteps": 12, "sampler": "maskgit_plus", "threshold": 0.4, "block_length": 4}
        hooked = generate(tiny, prompts, on_logits=lambda step, ids, x: x, on_tokens=lambda step, ids, x: ids, **how)
        assert torch.equal(hooked, generate(tiny, prompts, **how))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"threshold": 0}, "threshold: found 0, allowed is above 0 and at most 1"),
            ({"threshold": 1.1}, "threshold: found 1.1, allowed is above 0 and at most 1"),
            ({"threshold": "0.9"}, "threshold: found '0.9', allowed is above 0"),
            ({"threshold": float("nan")}, "threshold: found nan, allowed is above 0"),
            ({"alg_temp": 0.5}, "alg_temp: found 0.5, allowed with a threshold is 0"),
            *(
                ({"sampler": sampler}, f"sampler: found '{sampler}', allowed with a threshold are maskgit_plus, low")
                for sampler in SAMPLERS
                if sampler not in BY_PROBABILITY
            ),
        ],
    )
    def test_a_wrong_value_is_named(self, prompts: Tensor, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            generate(
                TableLM(torch.zeros(14, 9)),
                prompts,
                **{"timesteps": 2, "threshold": 0.9, "sampler": "maskgit_plus", **arguments},
            )

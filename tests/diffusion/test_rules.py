"""What mustn't be written isn't, and the end of a text ends it."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from table_model import CONFIDENCE_SAMPLERS, MASK, TableLM, run_states
from torch import Tensor

from thermo_lib.diffusion.rules import TokenRules
from thermo_lib.diffusion.sampling import generate
from thermo_lib.diffusion.tokens import SAMPLERS
from thermo_lib.models.lm import DiffusionLM

END, LENGTH = 2, 8


def random_table(seed: int = 0, vocabulary: int = 7, length: int = LENGTH) -> Tensor:
    return 2 * torch.randn(length, vocabulary, generator=torch.Generator().manual_seed(seed))


def all_masks(rows: int = 1, length: int = LENGTH) -> Tensor:
    return torch.full((rows, length), MASK)


def order_of(states: list[Tensor]) -> list[list[int]]:
    """The positions of the first row that each step fills."""
    pairs = itertools.pairwise(states)
    return [((a[0] == MASK) & (b[0] != MASK)).nonzero().flatten().tolist() for a, b in pairs]


class TestSuppressed:
    """Ids that are never written, or not at the start."""

    @pytest.mark.parametrize("hooked", [False, True])
    @pytest.mark.parametrize("temperature", [0.0, 20.0])
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_they_are_not_written(self, sampler: str, temperature: float, hooked: bool) -> None:
        how: dict[str, Any] = {"timesteps": 4, "sampler": sampler, "temperature": temperature}
        how |= {"on_logits": lambda step, ids, logits: logits} if hooked else {}
        lm, start = TableLM(random_table()), all_masks(30)
        start[:, 1] = 3  # what is visible may be one of them
        assert {3, 5} <= set(generate(lm, start, **how)[:, 2:].unique().tolist())
        text = generate(lm, start, suppress_tokens=(3, 5), **how)
        assert not set(text[:, 2:].unique().tolist()) & {MASK, 3, 5}
        assert (text[:, 1] == 3).all()
        assert torch.equal(generate(lm, start, suppress_tokens=[], **how), generate(lm, start, **how))

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_at_the_first_masked_position_of_each_row(self, sampler: str) -> None:
        table = torch.zeros(LENGTH, 7)
        table[:, 4] = 5.0
        start = all_masks(3)
        start[1, :3], start[2, 0] = 6, 6
        how: dict[str, Any] = {"timesteps": 5, "sampler": sampler, "begin_suppress_tokens": 4}
        text = generate(TableLM(table), start, **how)
        for row, first in enumerate((0, 3, 1)):
            assert text[row, first] not in (MASK, 4)
            assert (text[row, first + 1 :] == 4).all()
        if sampler != "origin":  # the first masked position is that of the start, whatever is filled first
            table[0] = 0
            assert order_of(run_states(TableLM(table), all_masks(), **how))[-1][0] == 0
            assert generate(TableLM(table), all_masks(), **how)[0, 1:].eq(4).all()

    @pytest.mark.parametrize("alg_temp", [0.0, 0.3])
    @pytest.mark.parametrize("sampler", CONFIDENCE_SAMPLERS)
    def test_the_number_that_is_filled_stays(self, sampler: str, alg_temp: float) -> None:
        def counts(**rules: Any) -> list[int]:
            how = {"timesteps": 5, "sampler": sampler, "alg_temp": alg_temp, "temperature": 0.5, "top_p": 0.8}
            return [int((x == MASK).sum()) for x in run_states(TableLM(random_table()), all_masks(4), **how, **rules)]

        suppressed = tuple(range(2, 7))  # a single token is left, of probability 1
        assert counts() == counts(suppress_tokens=suppressed) == counts(begin_suppress_tokens=suppressed)
        assert counts() == counts(end_tokens=(1, 2, 3, 4, 5), end_last=True)

    @given(
        vocabulary=st.integers(3, 8),
        seed=st.integers(0, 50),
        sampler=st.sampled_from(SAMPLERS),
        temperature=st.sampled_from([0.0, 1.0]),
        alg_temp=st.sampled_from([0.0, 1e-30, 0.5]),
        left=st.integers(1, 2),
    )
    def test_however_many_are_left_out_a_text_is_finite(
        self, vocabulary: int, seed: int, sampler: str, temperature: float, alg_temp: float, left: int
    ) -> None:
        text = generate(
            TableLM(random_table(seed, vocabulary)),
            all_masks(3),
            timesteps=3,
            sampler=sampler,
            temperature=temperature,
            alg_temp=alg_temp,
            suppress_tokens=range(left + 1, vocabulary),
        )
        assert set(text.unique().tolist()) <= set(range(1, left + 1))


class TestEnd:
    """Ends that don't crowd out the text, and a row that stops at its end."""

    @pytest.fixture
    def crowded(self) -> TableLM:
        """A model that is sure of the end at the last five positions, and unsure of tokens 3..7 before them."""
        table = torch.zeros(LENGTH, 9)
        table[torch.arange(3), torch.tensor([3, 4, 5])] = torch.tensor([3.0, 2.5, 2.0])
        table[3:, END] = torch.tensor([6.0, 6.5, 7.0, 7.5, 8.0])
        return TableLM(table)

    @pytest.mark.parametrize("sampler", CONFIDENCE_SAMPLERS)
    def test_ends_are_filled_last(self, crowded: TableLM, sampler: str) -> None:
        how: dict[str, Any] = {"timesteps": LENGTH, "sampler": sampler, "eps": 0.0}
        assert order_of(run_states(crowded, all_masks(), **how)) == [[7], [6], [5], [4], [3], [0], [1], [2]]
        last = run_states(crowded, all_masks(), end_tokens=END, end_last=True, **how)
        assert order_of(last)[:3] == [[0], [1], [2]]
        assert torch.equal(last[-1], torch.tensor([[3, 4, 5, 2, 2, 2, 2, 2]]))
        blocks = run_states(crowded, all_masks(), end_tokens=END, end_last=True, block_length=4, **how)
        assert order_of(blocks)[:4] == [[0], [1], [2], [3]]

    def test_with_a_threshold_a_sure_end_waits_too(self, crowded: TableLM) -> None:
        how: dict[str, Any] = {"timesteps": LENGTH, "sampler": "low_confidence", "threshold": 0.9}
        assert order_of(run_states(crowded, all_masks(), **how))[0] == [3, 4, 5, 6, 7]
        assert order_of(run_states(crowded, all_masks(), end_tokens=END, end_last=True, **how))[0] == [0]

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_without_ends_none_is_written(self, crowded: TableLM, sampler: str) -> None:
        how: dict[str, Any] = {"timesteps": LENGTH, "sampler": sampler}
        assert (generate(crowded, all_masks(), **how) == END).any()
        text = generate(crowded, all_masks(), end_tokens=END, suppress_end=True, **how)
        assert not (text == END).any()
        assert torch.equal(text, generate(crowded, all_masks(), suppress_tokens=END, **how))

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_a_row_stops_at_its_end(self, sampler: str) -> None:
        table = torch.zeros(LENGTH, 9)
        table[torch.arange(LENGTH), torch.tensor([3, 4, END, 5, 6, 7, 8, END])] = 9.0 - torch.arange(LENGTH)
        start = all_masks(2)
        start[1, [0, 6]] = torch.tensor([END, 7])  # an end of the prompt ends nothing, and visible tokens stay
        sizes: list[int] = []

        class Counting(TableLM):
            def logits(self, ids: Tensor, at: Tensor, attention_mask: Tensor | None = None) -> Tensor:
                sizes.append(len(ids))
                return super().logits(ids, at)

        how: dict[str, Any] = {"timesteps": 20, "sampler": sampler, "eps": 0.0}
        plain = generate(TableLM(table), start, **how)
        assert plain[0].tolist() == [3, 4, 2, 5, 6, 7, 8, 2]
        text = generate(Counting(table), start, end_tokens=[END, 1], stop_at_end=True, **how)
        assert text.tolist() == [[3, 4, 2, 2, 2, 2, 2, 2], [2, 4, 2, 2, 2, 2, 7, 2]]
        if sampler == "low_confidence":  # which fills from the left here, one at each of the first eight steps
            assert sizes == [2, 2, 1]

    def test_nothing_stops_while_a_mask_is_on_the_left(self, crowded: TableLM) -> None:
        how: dict[str, Any] = {"timesteps": LENGTH, "sampler": "entropy", "eps": 0.0}
        states = run_states(crowded, all_masks(), end_tokens=END, stop_at_end=True, **how)
        assert [int((x == MASK).sum()) for x in states] == [8, 7, 6, 5, 4, 3, 2, 1, 0]

    def test_what_was_filled_on_the_right_becomes_end(self) -> None:
        table = torch.zeros(4, 9)
        table[torch.arange(4), torch.tensor([3, END, 5, 6])] = torch.tensor([5.0, 6.0, 7.0, 8.0])
        how: dict[str, Any] = {"timesteps": 4, "sampler": "maskgit_plus", "eps": 0.0}
        states = run_states(TableLM(table), all_masks(length=4), end_tokens=END, stop_at_end=True, **how)
        assert states[3].tolist() == [[MASK, END, 5, 6]]
        assert states[4].tolist() == [[3, END, END, END]]

    def test_padding_on_the_left_is_nothing_masked(self, crowded: TableLM) -> None:
        how: dict[str, Any] = {"timesteps": LENGTH, "end_tokens": END, "stop_at_end": True, "block_length": 2}
        is_text = torch.arange(LENGTH)[None] >= 2
        text = generate(crowded, all_masks(), attention_mask=is_text, **how)
        assert text.tolist() == [[MASK, MASK, 5, 2, 2, 2, 2, 2]]

    def test_hooks_see_the_row_after_its_end(self, crowded: TableLM) -> None:
        seen: list[list[int]] = []

        def look(step: int | None, ids: Tensor, logits: Tensor | None) -> Tensor:
            seen.append(ids[0].tolist())
            return ids

        how: dict[str, Any] = {"timesteps": 4, "block_length": 2, "end_tokens": END, "stop_at_end": True}
        generate(crowded, all_masks(), on_tokens=look, **how)
        assert seen == [[0] * 8, [3, 4, *[0] * 6], [3, 4, 5, 2, 2, 2, 2, 2], seen[2], seen[2]]

    def test_the_end_is_that_of_the_models_configuration(self, tiny: DiffusionLM, prompts: Tensor) -> None:
        lm = replace(tiny)
        with pytest.raises(
            ValueError, match="end_tokens: found none, allowed is at least one id with suppress_end, since"
        ):
            generate(lm, prompts, timesteps=4, suppress_end=True)
        before = lm.model.config.eos_token_id
        text = generate(lm, prompts, timesteps=4)
        written = text[prompts == MASK].unique().tolist()
        try:
            for ends in (written[0], written[:3]):
                lm.model.config.eos_token_id = ends
                assert lm.end_token_id == written[0]
                found = generate(lm, prompts, timesteps=4, suppress_end=True)
                expected = generate(lm, prompts, timesteps=4, suppress_tokens=ends)
                assert torch.equal(found, expected)
                assert not torch.equal(found, text)
        finally:
            lm.model.config.eos_token_id = before


class TestWrongValues:
    """A wrong value is named before any work."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"suppress_tokens": [99]}, r"suppress_tokens: found 99, allowed are 0\.\.8"),
            ({"begin_suppress_tokens": 9}, r"begin_suppress_tokens: found 9, allowed are 0\.\.8"),
            ({"end_tokens": [1, 9]}, r"end_tokens: found 9, allowed are 0\.\.8"),
            ({"suppress_tokens": -1}, "suppress_tokens: found -1, allowed are token ids, whole numbers from 0"),
            ({"suppress_tokens": [1.5]}, r"suppress_tokens: found \[1.5\], allowed are token ids"),
            ({"suppress_tokens": "12"}, "suppress_tokens: found '12', allowed are token ids"),
            ({"end_tokens": [True]}, r"end_tokens: found \[True\], allowed are token ids"),
            ({"end_tokens": (), "stop_at_end": True}, "end_tokens: found none, .* at least one id with stop_at_end"),
            ({"end_last": True}, "end_tokens: found none, .* at least one id with end_last"),
            ({"suppress_tokens": range(1, 9)}, "suppress_tokens, begin_suppress_tokens: found every id that the model"),
            (
                {"suppress_tokens": range(1, 5), "begin_suppress_tokens": range(5, 9)},
                "suppress_tokens, begin_suppress_tokens: found every id that the model may write, allowed is to leave",
            ),
            ({"suppress_end": True, "end_last": True, "end_tokens": 1}, "end_last: found True with suppress_end"),
            ({"suppress_end": True, "stop_at_end": True, "end_tokens": 1}, "stop_at_end: found True with suppress_end"),
            (
                {"sampler": "origin", "end_last": True, "end_tokens": 1},
                "sampler: found 'origin', allowed with end_last",
            ),
        ],
    )
    def test_a_wrong_value_is_named(self, prompts: Tensor, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            generate(TableLM(torch.zeros(14, 9)), prompts, **{"timesteps": 2, **arguments})

    def test_rules_are_resolved_once(self) -> None:
        lm = TableLM(torch.zeros(4, 9))
        rules = TokenRules(suppress_tokens=[3], end_tokens=5, suppress_end=True).resolved(lm, "entropy")
        assert rules.suppress_tokens == (3, 5)
        assert rules.resolved(lm, "entropy") == rules

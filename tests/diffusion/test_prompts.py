"""Denoising starts from texts of masks only, or from prompts with masks after them, drawn without favour."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor

from thermo_lib import Calibration, calibrate
from thermo_lib.data.puzzles import ANSWER, MASK, TASK_LENGTH, TASK_TOKENS, TASKS, PuzzlePrompts, held_out
from thermo_lib.diffusion.prompts import EmptyTexts, GivenPrompts, Prompts, prompts_of
from thermo_lib.diffusion.states import States, forward_states
from thermo_lib.models.lm import DiffusionLM

RandomIds = Callable[..., Tensor]


def rows_of(ids: Tensor) -> Counter[tuple[int, ...]]:
    """How often each row comes."""
    return Counter(map(tuple, ids.tolist()))


class TestEmptyTexts:
    """Texts of which nothing is known."""

    @given(count=st.integers(0, 5), length=st.integers(1, 9), seed=st.integers(0, 99))
    def test_every_position_is_a_mask(self, count: int, length: int, seed: int) -> None:
        texts = EmptyTexts(length, mask_token_id=7)
        assert texts.is_empty
        assert torch.equal(texts.draw(count, seed), torch.full((count, length), 7))
        assert torch.equal(texts.start(count, seed), torch.full((length,), 7))


class TestGivenPrompts:
    """Prompts drawn from some that are known."""

    @given(prompts=st.integers(1, 7), count=st.integers(1, 30), seed=st.integers(0, 99))
    def test_all_come_before_any_comes_again(self, prompts: int, count: int, seed: int) -> None:
        given_prompts = GivenPrompts(torch.arange(prompts)[:, None].repeat(1, 3))
        assert not given_prompts.is_empty
        drawn = given_prompts.draw(count, seed)
        started = torch.stack([given_prompts.start(number, seed) for number in range(count)])
        for ids in (drawn, started):
            assert ids.shape == (count, 3)
            for end in range(1, count + 1):
                times = rows_of(ids[:end])
                assert max(times.values()) - min(times.values()) <= 1
                assert len(times) == min(end, prompts)

    def test_equal_seeds_draw_the_same_and_others_something_else(self) -> None:
        prompts = GivenPrompts(torch.arange(20)[:, None])
        assert prompts.draw(50, 3).equal(prompts.draw(50, 3))
        assert not prompts.draw(50, 3).equal(prompts.draw(50, 4))
        assert not prompts.draw(50, 3)[:20].equal(prompts.draw(50, 3)[20:40])  # every round has an order of its own
        starts = [torch.stack([prompts.start(i, seed) for i in range(50)]) for seed in (3, 3, 40)]
        assert starts[0].equal(starts[1])
        assert not starts[0].equal(starts[2])
        assert not starts[0][:20].equal(starts[0][20:40])


class TestPuzzlePrompts:
    """New training puzzles with their answers masked."""

    def text(self, tokenizer: Tokenizer, row: Tensor) -> str:
        return tokenizer.decode(row.tolist(), skip_special_tokens=False)

    @pytest.mark.slow
    @pytest.mark.parametrize("count", [1, 2, 5, 6])
    def test_they_are_training_puzzles_of_all_tasks_without_answers(self, tokenizer: Tokenizer, count: int) -> None:
        prompts = PuzzlePrompts(tokenizer)
        assert not prompts.is_empty
        drawn = prompts.draw(count, 0)
        started = torch.stack([prompts.start(number, 0) for number in range(count)])
        for ids in (drawn, started):
            assert ids.shape == (count, TASK_LENGTH)
            texts = [self.text(tokenizer, row) for row in ids]
            tasks = Counter(next(task for task in TASKS if text.startswith(TASK_TOKENS[task])) for text in texts)
            assert max(tasks.values()) - min(tasks[task] for task in TASKS) <= count % len(TASKS)
            for text in texts:
                question, answer = text.split(ANSWER)
                assert set(answer.split(MASK)) == {""}
                assert answer
                assert not held_out(question.split("|>")[1])
            assert len(set(texts)) == count

    def test_equal_seeds_draw_the_same_and_others_something_else(self, tokenizer: Tokenizer) -> None:
        prompts = PuzzlePrompts(tokenizer)
        assert prompts.draw(6, 1).equal(prompts.draw(6, 1))
        assert not prompts.draw(6, 1).equal(prompts.draw(6, 2))
        assert prompts.start(5, 1).equal(prompts.start(5, 1))
        assert not prompts.start(4, 1).equal(prompts.start(4, 2))

    def test_their_length_is_the_one_asked_for(self, tokenizer: Tokenizer) -> None:
        prompts = PuzzlePrompts(tokenizer, length=60)
        assert prompts.draw(2, 0).shape == (2, 60)
        assert prompts.start(1, 0).shape == (60,)


class TestPromptsOf:
    """What calibration states start from."""

    def test_each_length_has_its_own(self, tiny: DiffusionLM, random_ids: RandomIds) -> None:
        code, asked = random_ids(3, 8), random_ids(4, 6, seed=1)
        is_answer = torch.arange(6).expand(4, -1) >= 3
        drawn = calibrate(tiny, [(code, None), (asked, is_answer)], timesteps=4, seed=0, progress=False)
        texts, prompts = prompts_of(drawn, tiny.mask_token_id)
        assert texts == EmptyTexts(8, tiny.mask_token_id)
        assert isinstance(prompts, GivenPrompts)
        expected = asked.masked_fill(is_answer, tiny.mask_token_id)
        assert prompts.ids.equal(expected)
        assert rows_of(prompts.draw(4, 0)) == rows_of(expected)

    def test_the_forward_process_starts_from_the_same(self, tiny: DiffusionLM, random_ids: RandomIds) -> None:
        asked, is_answer = random_ids(4, 6), torch.arange(6).expand(4, -1) >= 2
        drawn = calibrate(tiny, [(asked, is_answer)], timesteps=3, source="forward", progress=False)
        (prompts,) = prompts_of(drawn, tiny.mask_token_id)
        assert prompts.ids.equal(asked.masked_fill(is_answer, tiny.mask_token_id))

    def test_a_part_without_a_start_is_named(self, tiny: DiffusionLM, random_ids: RandomIds) -> None:
        whole = forward_states(random_ids(2, 6), None, 3, tiny.mask_token_id, seed=0)
        late: States = whole[whole.timestep > 0]
        with pytest.raises(ValueError, match="calibration: part 1: found no state at timestep 0"):
            prompts_of(Calibration((whole, late), 3, "forward"), tiny.mask_token_id)

    def test_all_kinds_can_be_used_alike(self, tokenizer: Tokenizer) -> None:
        kinds: list[Prompts] = [EmptyTexts(4, 1), GivenPrompts(torch.ones(2, 4).long()), PuzzlePrompts(tokenizer)]
        for prompts in kinds:
            drawn, start = prompts.draw(3, 0), prompts.start(3, 0)
            assert (len(drawn), drawn.dtype, start.dtype) == (3, torch.int64, torch.int64)
            assert drawn.shape[1:] == start.shape

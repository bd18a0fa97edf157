"""Generating fills what is masked and nothing else, in the order and number that sampler and schedule say."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from table_model import CONFIDENCE_SAMPLERS, MASK, RandomIds, TableLM, run_states
from torch import Tensor, nn

from thermo_lib.diffusion.sampling import generate
from thermo_lib.diffusion.schedule import Schedule
from thermo_lib.diffusion.tokens import SAMPLERS, sample_tokens
from thermo_lib.models.lm import DiffusionLM


class TestGenerate:
    """Every sampler fills all masked positions, keeps the rest, and depends on nothing but seed and input."""

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_all_masks_are_filled_and_visible_tokens_stay(
        self, tiny: DiffusionLM, prompts: Tensor, sampler: str, temperature: float
    ) -> None:
        text = generate(tiny, prompts, timesteps=4, sampler=sampler, temperature=temperature)
        visible = prompts != MASK
        assert not (text == MASK).any()
        assert torch.equal(text[visible], prompts[visible])

    @pytest.mark.parametrize("alg_temp", [0.0, 0.5])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_the_text_depends_on_the_seed_and_not_on_the_batch_size(
        self, tiny: DiffusionLM, prompts: Tensor, sampler: str, temperature: float, alg_temp: float
    ) -> None:
        def run(batch_size: int, seed: int = 7) -> Tensor:
            return generate(
                tiny,
                prompts,
                timesteps=4,
                sampler=sampler,
                temperature=temperature,
                alg_temp=alg_temp,
                seed=seed,
                batch_size=batch_size,
            )

        together = run(64)
        for batch_size in (1, 2, 3, 64):
            assert torch.equal(run(batch_size), together)
        is_random = sampler == "origin" or temperature > 0 or alg_temp > 0
        assert torch.equal(run(64, seed=8), together) is not is_random
        assert torch.equal(run(64, seed=2**63 - 1), run(64, seed=2**63 - 2)) is not is_random  # the largest ones

    def test_the_input_is_left_as_it_was(self, tiny: DiffusionLM, prompts: Tensor) -> None:
        before = prompts.clone()
        generate(tiny, prompts, timesteps=2)
        assert torch.equal(prompts, before)

    @given(masked=st.integers(1, 20), timesteps=st.integers(1, 12), sampler=st.sampled_from(CONFIDENCE_SAMPLERS))
    @example(masked=41, timesteps=41, sampler="entropy")  # in float32 41 * (1 / 41) is below 1
    def test_confidence_samplers_fill_the_scheduled_number(self, masked: int, timesteps: int, sampler: str) -> None:
        # rho_i = 1/(T - i), so that of n masked tokens step i fills floor(n / (T - i)), and the last step all; LLaDA
        # fills ceil(n / (T - i)), the same number up to one and the remainder first instead of last.
        lm = TableLM(torch.randn(masked, 9, generator=torch.Generator().manual_seed(masked)))
        counts: list[int] = []
        generate(
            lm,
            torch.full((1, masked), MASK),
            timesteps=timesteps,
            sampler=sampler,
            eps=0.0,
            on_state=lambda _, rows, x: counts.append(int((x == MASK).sum())),
        )
        expected = [masked]
        for i in range(timesteps - 1):
            left = expected[-1]
            share = -(-left // (timesteps - i)) if sampler == "low_confidence" else left // (timesteps - i)
            expected.append(left - share)
        assert counts == expected

    @pytest.mark.parametrize(
        ("sampler", "order"),
        [
            ("maskgit_plus", [0, 1, 2]),  # likeliest token: 0.60, 0.55, 0.50
            ("low_confidence", [0, 1, 2]),
            ("topk_margin", [0, 2, 1]),  # 0.60 - 0.10, 0.55 - 0.45, 0.50 - 0.05
            ("entropy", [1, 0, 2]),  # in nats 1.23, 0.69, 1.84; the least is surest
        ],
    )
    def test_the_surest_position_is_filled_first(self, sampler: str, order: list[int]) -> None:
        rows = [[0.0, 0.60, *[0.10] * 4], [0.0, 0.55, 0.45], [0.0, 0.50, *[0.05] * 10]]
        table = torch.tensor([row + [0.0] * (12 - len(row)) for row in rows]).log().clamp(min=-1e30)
        states: list[Tensor] = []
        text = generate(
            TableLM(table),
            torch.full((1, 3), MASK),
            timesteps=3,
            sampler=sampler,
            eps=0.0,
            on_state=lambda _, rows, x: states.append(x[0].clone()),
        )
        states.append(text[0])
        filled = [int(((a == MASK) & (b != MASK)).nonzero()) for a, b in itertools.pairwise(states)]
        assert filled == order

    def test_alg_temp_draws_the_position_by_the_softmax_of_its_confidence(self) -> None:
        # maskgit_plus at temperature 0: the score is the largest probability of the row.
        rows = torch.tensor([[0.0, 0.9, 0.1], [0.0, 0.7, 0.3], [0.0, 0.5, 0.5]])
        count, alg_temp = 6000, 0.3
        states: list[Tensor] = []
        generate(
            TableLM(rows.log().clamp(min=-1e30)),
            torch.full((count, 3), MASK),
            timesteps=3,
            sampler="maskgit_plus",
            alg_temp=alg_temp,
            eps=0.0,
            batch_size=count,
            on_state=lambda _, rows, x: states.append(x.clone()),
        )
        first = (states[1] != MASK).nonzero()
        assert first[:, 0].tolist() == list(range(count))
        expected = (torch.tensor([0.9, 0.7, 0.5], dtype=torch.float64) / alg_temp).softmax(-1) * count
        assert chisquare(first[:, 1].bincount(minlength=3), expected).pvalue > 1e-3

    @pytest.mark.slow
    @given(timesteps=st.integers(2, 8), seed=st.integers(0, 1000), eps=st.sampled_from([0.0, 1e-3, 0.4]))
    @settings(max_examples=10)
    def test_origin_fills_each_position_with_the_scheduled_probability(
        self, timesteps: int, seed: int, eps: float
    ) -> None:
        rows, length = 16, 250
        counts: list[int] = []
        generate(
            TableLM(torch.zeros(length, 4)),
            torch.full((rows, length), MASK),
            timesteps=timesteps,
            sampler="origin",
            temperature=1.0,
            eps=eps,
            seed=seed,
            batch_size=rows,
            on_state=lambda _, rows, x: counts.append(int((x == MASK).sum())),
        )
        for timestep, count in enumerate(counts):
            share = 1 - timestep * (1 - eps) / timesteps
            assert abs(count - rows * length * share) <= 6 * (rows * length * share * (1 - share)) ** 0.5

    def test_every_state_of_a_trajectory_is_reported_once_with_its_rows(
        self, tiny: DiffusionLM, prompts: Tensor
    ) -> None:
        seen: list[tuple[int, int, int]] = []
        generate(
            tiny,
            prompts,
            timesteps=3,
            batch_size=2,
            on_state=lambda timestep, rows, x: seen.append((timestep, rows.start, len(x))),
        )
        assert seen == [(timestep, start, size) for timestep in range(3) for start, size in ((0, 2), (2, 2), (4, 1))]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"sampler": "greedy"}, "sampler: found 'greedy', allowed are origin, maskgit_plus, topk_margin, entropy"),
            ({"temperature": -0.1}, "temperature: found -0.1, allowed is at least 0"),
            ({"top_p": 0.0}, "top_p: found 0.0, allowed is above 0 and at most 1"),
            ({"top_p": 1.1}, "top_p: found 1.1"),
            ({"top_k": 0}, "top_k: found 0, allowed is at least 1"),
            ({"top_k": 1.5}, "top_k: found 1.5, allowed is at least 1"),
            ({"timesteps": 0}, "timesteps: found 0, allowed is at least 1"),
            ({"timesteps": 2.5}, "timesteps: found 2.5, allowed is at least 1, a whole number"),
            ({"timesteps": True}, "timesteps: found True, allowed is at least 1, a whole number"),
            ({"temperature": float("nan")}, "temperature: found nan, allowed is at least 0 and finite"),
            ({"temperature": float("inf")}, "temperature: found inf, allowed is at least 0 and finite"),
            ({"alg_temp": -0.1}, "alg_temp: found -0.1, allowed is at least 0 and finite"),
            ({"alg_temp": float("nan")}, "alg_temp: found nan, allowed is at least 0 and finite"),
            ({"eps": 1.0}, "eps: found 1.0, allowed is at least 0 and below 1"),
            ({"eps": -0.1}, "eps: found -0.1, allowed is at least 0 and below 1"),
            ({"batch_size": 0}, "batch_size: found 0, allowed is at least 1"),
        ],
    )
    def test_a_value_out_of_range_is_named(
        self, tiny: DiffusionLM, prompts: Tensor, arguments: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            generate(tiny, prompts, **{"timesteps": 2, **arguments})

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (torch.zeros(3, dtype=torch.int64), r"ids: found torch.int64 of shape \(3,\), allowed are integers"),
            (torch.zeros(1, 3), r"ids: found torch.float32 of shape \(1, 3\), allowed are integers"),
            (torch.tensor([[9999, MASK]]), r"ids: found 9999, allowed are 0\.\."),
        ],
        ids=["one row", "floats", "no token"],
    )
    def test_what_is_no_batch_of_ids_is_named(self, tiny: DiffusionLM, ids: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            generate(tiny, ids, timesteps=2)

    def test_no_temperature_of_positions_is_zero(self, tiny: DiffusionLM, prompts: Tensor) -> None:
        none, zero = (generate(tiny, prompts, timesteps=4, alg_temp=alg_temp) for alg_temp in (None, 0.0))
        assert torch.equal(none, zero)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_ids_of_a_gpu_give_the_same_text_there(self, tiny: DiffusionLM, prompts: Tensor) -> None:
        text = generate(tiny, prompts.cuda(), timesteps=4, temperature=1.0)
        assert text.is_cuda
        assert torch.equal(text.cpu(), generate(tiny, prompts, timesteps=4, temperature=1.0))


class TestPadding:
    """A row of a batch that is padded on the left gives what it gives alone, and its padding stays."""

    LENGTHS = (14, 9, 4)

    @pytest.fixture
    def rows(self, random_ids: RandomIds) -> list[Tensor]:
        """Rows of other lengths; the first half of each is visible."""
        return [
            torch.cat([random_ids(1, n // 2, seed=n), torch.full((1, n - n // 2), MASK)], dim=1) for n in self.LENGTHS
        ]

    @pytest.mark.parametrize("block_length", [None, 2])
    @pytest.mark.parametrize("pad", [5, MASK])
    @pytest.mark.parametrize("sampler", CONFIDENCE_SAMPLERS)
    def test_each_row_gives_what_it_gives_alone(
        self, tiny: DiffusionLM, rows: list[Tensor], sampler: str, pad: int, block_length: int | None
    ) -> None:
        longest = self.LENGTHS[0]
        padded = torch.cat([nn.functional.pad(row, (longest - row.shape[1], 0), value=pad) for row in rows])
        is_text = torch.arange(longest) >= longest - torch.tensor(self.LENGTHS)[:, None]
        how = {"timesteps": 5, "sampler": sampler, "block_length": block_length}
        text = generate(tiny, padded, attention_mask=is_text, **how)
        assert (text[~is_text] == pad).all()
        for found, row in zip(text, rows, strict=True):
            assert torch.equal(found[-row.shape[1] :], generate(tiny, row, **how)[0])

    def test_a_mask_without_padding_changes_nothing(self, tiny: DiffusionLM, prompts: Tensor) -> None:
        everything = torch.ones_like(prompts, dtype=torch.bool)
        assert torch.equal(
            generate(tiny, prompts, timesteps=4, attention_mask=everything), generate(tiny, prompts, timesteps=4)
        )

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (torch.ones(5, 14), r"attention_mask: found torch.float32 of shape \(5, 14\), allowed is torch.bool"),
            (torch.ones(5, 13, dtype=torch.bool), r"attention_mask: found torch.bool of shape \(5, 13\), allowed is"),
            ((torch.arange(14) < 13).expand(5, -1), "attention_mask: found padding after text, allowed is padding on"),
        ],
        ids=["floats", "another shape", "on the right"],
    )
    def test_another_mask_is_named(self, tiny: DiffusionLM, prompts: Tensor, mask: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            generate(tiny, prompts, timesteps=2, attention_mask=mask)


class TestLowConfidence:
    """LLaDA's remasking: fill every mask, keep the tokens that the model itself finds most probable."""

    def test_temperature_changes_the_token_and_not_its_confidence(self) -> None:
        # At temperature 50 all tokens are about equally likely to be drawn, and maskgit_plus is equally sure of all of
        # them; low_confidence keeps exactly the one whose drawn token has the largest probability at temperature 1.
        table = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) * 2
        table[:, MASK] = -1e30
        lm, start, kept = TableLM(table), torch.full((40, 6), MASK), []
        uniform = torch.rand((2, 40, 6), generator=torch.Generator().manual_seed(0))[1]  # step 0 of seed 0
        first = run_states(lm, start, timesteps=6, sampler="low_confidence", temperature=50.0)[1]
        for row in range(40):
            tokens, _ = sample_tokens(table, 50.0, uniform[row])
            probability = table.softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
            expected = torch.full((6,), MASK)
            expected[probability.argmax()] = tokens[probability.argmax()]
            assert torch.equal(first[row], expected)
            kept.append(int(probability.argmax()))
        assert len(set(kept)) > 2

    @pytest.mark.slow
    @given(masked=st.integers(1, 60), steps=st.integers(1, 60))
    def test_the_numbers_of_llada(self, masked: int, steps: int) -> None:
        # Algorithm 5 of arXiv 2502.09992 as released: n // T at every step, one more at each of the first n % T.
        lm = TableLM(torch.randn(masked, 5, generator=torch.Generator().manual_seed(masked)))
        states = run_states(lm, torch.full((1, masked), MASK), timesteps=steps, sampler="low_confidence")
        left = [int((x == MASK).sum()) for x in states]
        filled = [before - after for before, after in itertools.pairwise(left)]
        assert filled == [masked // steps + (i < masked % steps) for i in range(steps)]


class TestBlocks:
    """Blocks of masked positions are filled one after the other, left to right, whatever lies between them."""

    @given(
        rows=st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3),
        block_length=st.integers(1, 13),
        more=st.integers(0, 14),
        sampler=st.sampled_from(SAMPLERS),
        temperature=st.sampled_from([0.0, 1.0]),
    )
    def test_a_block_is_filled_before_the_next_begins(
        self, rows: list[list[bool]], block_length: int, more: int, sampler: str, temperature: float
    ) -> None:
        is_masked = torch.tensor(rows)
        lm = TableLM(torch.randn(12, 7, generator=torch.Generator().manual_seed(0)))
        blocks = [max(1, -(-int(row.sum()) // block_length)) for row in is_masked]
        timesteps = max(blocks) + more
        states = run_states(
            lm,
            torch.where(is_masked, MASK, 5),
            timesteps=timesteps,
            block_length=block_length,
            sampler=sampler,
            temperature=temperature,
        )
        for row, count in enumerate(blocks):
            places = is_masked[row].nonzero().flatten()
            sizes = [timesteps // count + (block < timesteps % count) for block in range(count)]
            block_of = [block for block, size in enumerate(sizes) for _ in range(size)]
            for number, (before, after) in enumerate(itertools.pairwise(states)):
                block = block_of[number]
                done, current, later = (
                    places[: block * block_length],
                    places[block * block_length :][:block_length],
                    places[(block + 1) * block_length :],
                )
                assert (before[row, done] != MASK).all()
                assert (after[row, later] == MASK).all()
                if [*block_of, None][number + 1] != block:
                    assert (after[row, current] != MASK).all()
        assert (states[-1] != MASK).all()

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_one_block_of_everything_is_no_block(self, tiny: DiffusionLM, prompts: Tensor, sampler: str) -> None:
        whole = generate(tiny, prompts, timesteps=4, sampler=sampler, temperature=1.0)
        assert torch.equal(
            generate(tiny, prompts, timesteps=4, sampler=sampler, temperature=1.0, block_length=9), whole
        )
        assert not torch.equal(
            generate(tiny, prompts, timesteps=6, sampler=sampler, temperature=1.0, block_length=3), whole
        )

    def test_the_text_does_not_depend_on_the_batch_size(self, tiny: DiffusionLM, prompts: Tensor) -> None:
        # Rows with fewer masks have fewer blocks, and more timesteps for each of them.
        start = prompts.clone()
        start[0, 3:] = 7
        texts = [
            generate(tiny, start, timesteps=6, sampler="low_confidence", block_length=3, batch_size=size)
            for size in (1, 2, 64)
        ]
        assert torch.equal(texts[0], texts[2])
        assert torch.equal(texts[1], texts[2])

    @pytest.mark.parametrize(
        ("block_length", "timesteps", "message"),
        [
            (-1, 4, "block_length: found -1, allowed is at least 1"),
            (False, 4, "block_length: found False, allowed is at least 1"),
            (2, 2, "timesteps: found 2, allowed is at least 3, one for each block of 2 positions"),
            (2, 0, "timesteps: found 0, allowed is at least 1"),
        ],
    )
    def test_a_value_out_of_range_is_named(self, block_length: int, timesteps: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            generate(
                TableLM(torch.zeros(5, 4)), torch.full((1, 5), MASK), timesteps=timesteps, block_length=block_length
            )

    def test_blocks_count_masked_positions_only(self) -> None:
        is_masked = torch.tensor([[True, False, True, True, False, True, True], [False] * 6 + [True]])
        schedule = Schedule.of(is_masked, 2, 12)
        assert schedule.blocks.tolist() == [3, 1]  # 5 masks make blocks of 2, 2 and 1
        assert schedule.block[0, is_masked[0]].tolist() == [0, 0, 1, 1, 2]
        assert schedule.block[1, 6] == 0

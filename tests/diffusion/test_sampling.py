"""Masked diffusion: the schedule, the forward process, and samplers that fill what is masked and nothing else."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor, nn

from thermo_lib.diffusion.sampling import (
    SAMPLERS,
    block_numbers,
    confidence,
    filter_logits,
    generate,
    mask_ratios,
    mask_tokens,
    sample_tokens,
    unmask_probabilities,
)
from thermo_lib.models.lm import DiffusionLM

CONFIDENCE_SAMPLERS = SAMPLERS[1:]
MASK = 0

RandomIds = Callable[..., Tensor]


@dataclass
class TableLM:
    """A model whose logits at a position are a row of a table, whatever the other tokens are."""

    table: Tensor
    mask_token_id: int = MASK

    def set_timestep(self, timestep: int, timesteps: int) -> None:
        """Nothing depends on the timestep."""

    def logits(self, ids: Tensor, at: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The rows of the chosen positions; the mask token gets no probability."""
        rows = self.table.expand(len(ids), -1, -1)[at].clone()
        rows[:, self.mask_token_id] = -1e30
        return rows


@pytest.fixture(scope="module")
def prompts(random_ids: RandomIds) -> Tensor:
    """Five sequences of 14 tokens, each with 5 visible tokens at other places."""
    ids = random_ids(5, 14)
    order = torch.rand(5, 14, generator=torch.Generator().manual_seed(1)).argsort(1)
    return torch.where(order < 5, ids, MASK)


def distinct_logits(size: int) -> st.SearchStrategy[Tensor]:
    """One row of logits, no two closer than 0.05."""
    levels = st.lists(st.integers(-80, 80), min_size=size, max_size=size, unique=True)
    return levels.map(lambda values: torch.tensor([values]) * 0.05)


class TestSchedule:
    """The linear schedule: all masked at the start, nothing at the end."""

    def test_four_steps(self) -> None:
        # t_i = 1 - i/4; rho_i = 1 - t_{i+1}/t_i: 1 - 3/4, 1 - 2/3, 1 - 1/2, 1 - 0.
        assert mask_ratios(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
        torch.testing.assert_close(
            unmask_probabilities(4), torch.tensor([1 / 4, 1 / 3, 1 / 2, 1.0], dtype=torch.float64)
        )

    @given(timesteps=st.integers(1, 300))
    def test_unmasking_undoes_the_masking_exactly(self, timesteps: int) -> None:
        ratios, rho = mask_ratios(timesteps), unmask_probabilities(timesteps)
        assert ratios[0] == 1
        assert ratios[-1] == 0
        assert rho[-1] == 1
        assert ((rho > 0) & (rho <= 1)).all()
        # The share filled at step i is (1 - rho_0) .. (1 - rho_{i-1}) rho_i = t_i rho_i; all shares sum to 1.
        still_masked = torch.cat([torch.ones(1, dtype=torch.float64), (1 - rho).cumprod(0)])
        torch.testing.assert_close(still_masked, ratios)
        torch.testing.assert_close((still_masked[:-1] * rho).sum(), torch.tensor(1.0, dtype=torch.float64))
        # Equal shares: with the linear schedule every step fills 1/T of the tokens.
        torch.testing.assert_close(ratios[:-1] * rho, torch.full((timesteps,), 1 / timesteps, dtype=torch.float64))

    def test_a_schedule_that_ends_above_zero(self) -> None:
        # eps = 1/5, T = 4: t_i = 1, 0.8, 0.6, 0.4, 0.2; the last step fills all.
        torch.testing.assert_close(mask_ratios(4, 0.2), torch.tensor([1, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64))
        expected = torch.tensor([0.2, 0.25, 1 / 3, 1.0], dtype=torch.float64)
        torch.testing.assert_close(unmask_probabilities(4, 0.2), expected)

    def test_no_timestep_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="timesteps: found 0, allowed is at least 1"):
            mask_ratios(0)


class TestForwardProcess:
    """Each allowed position is masked independently with the given probability; other tokens stay."""

    @given(ratio=st.floats(0, 1), seed=st.integers(0, 2**31))
    def test_the_share_of_masked_tokens_is_the_ratio(self, ratio: float, seed: int) -> None:
        ids = torch.full((4, 2500), 7)
        masked, is_masked = mask_tokens(ids, torch.full((4,), ratio), MASK, torch.Generator().manual_seed(seed))
        assert torch.equal(masked == MASK, is_masked)
        assert torch.equal(masked[~is_masked], ids[~is_masked])
        bound = 6 * (ids.numel() * ratio * (1 - ratio)) ** 0.5  # six standard deviations of a binomial count
        assert abs(int(is_masked.sum()) - ids.numel() * ratio) <= bound + 1e-6

    def test_every_row_has_a_ratio_of_its_own(self) -> None:
        ids = torch.full((2, 50), 7)
        _, is_masked = mask_tokens(ids, torch.tensor([0.0, 1.0]), MASK, torch.Generator().manual_seed(0))
        assert is_masked.sum(1).tolist() == [0, 50]

    @given(seed=st.integers(0, 2**31))
    def test_only_allowed_positions_are_masked(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        allowed = torch.rand(3, 40, generator=generator) < 0.5
        ids = torch.full((3, 40), 7)
        _, is_masked = mask_tokens(ids, torch.ones(3), MASK, generator, allowed)
        assert torch.equal(is_masked, allowed)


class TestSampleTokens:
    """A token is drawn from the softmax, after temperature and filters, by inverting its distribution."""

    @given(logits=distinct_logits(7), uniform=st.floats(0, 1, exclude_max=True, width=32))
    def test_temperature_zero_takes_the_likeliest(self, logits: Tensor, uniform: float) -> None:
        token, probabilities = sample_tokens(logits, 0.0, torch.tensor([uniform]))
        assert token.item() == logits.argmax().item()
        torch.testing.assert_close(probabilities, logits.softmax(-1))

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_tokens_follow_the_softmax(self, temperature: float) -> None:
        logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, 1.2]])
        uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
        tokens, _ = sample_tokens(logits.expand(20_000, -1), temperature, uniform)
        expected = (logits[0].double() / temperature).softmax(-1) * 20_000
        assert chisquare(tokens.bincount(minlength=5), expected).pvalue > 1e-3

    @given(logits=distinct_logits(6), temperature=st.floats(0.3, 3))
    def test_evenly_spread_random_numbers_give_each_token_its_share(self, logits: Tensor, temperature: float) -> None:
        # Of n midpoints (i + 1/2) / n, an interval of length p holds n p of them up to less than one at its two ends.
        count = 1000
        uniform = (torch.arange(count) + 0.5) / count
        tokens, probabilities = sample_tokens(logits.expand(count, -1), temperature, uniform)
        assert (tokens.bincount(minlength=6) - count * probabilities[0]).abs().max() < 1.01

    @given(logits=distinct_logits(8), k=st.integers(1, 10))
    def test_top_k_keeps_the_k_likeliest(self, logits: Tensor, k: int) -> None:
        kept = set((filter_logits(logits, None, k)[0] > -torch.inf).nonzero().flatten().tolist())
        assert kept == set(logits[0].argsort(descending=True)[:k].tolist())

    @given(logits=distinct_logits(8), p=st.floats(0.01, 1))
    def test_top_p_keeps_the_shortest_prefix_that_reaches_p(self, logits: Tensor, p: float) -> None:
        order = logits[0].argsort(descending=True).tolist()
        mass = logits[0].double().softmax(-1)
        kept = (filter_logits(logits, p, None)[0] > -torch.inf).nonzero().flatten().tolist()
        assert set(kept) == set(order[: len(kept)])
        assert mass[order[: len(kept)]].sum() >= p - 1e-6
        assert mass[order[: len(kept) - 1]].sum() <= p + 1e-6

    def test_top_p_is_of_all_tokens_also_with_top_k(self) -> None:
        # The nucleus of mass 0.5 is {0.4, 0.3}; among the two likeliest alone it would be the first.
        kept = filter_logits(torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log(), 0.5, 2)[0] > -torch.inf
        assert kept.tolist() == [True, True, False, False]

    @given(
        logits=distinct_logits(8),
        temperature=st.floats(0.1, 5),
        p=st.none() | st.floats(0.01, 1),
        k=st.none() | st.integers(1, 8),
        seed=st.integers(0, 2**31),
    )
    def test_only_what_the_filters_keep_is_drawn(
        self, logits: Tensor, temperature: float, p: float | None, k: int | None, seed: int
    ) -> None:
        uniform = torch.rand(50, generator=torch.Generator().manual_seed(seed))
        tokens, probabilities = sample_tokens(logits.expand(50, -1), temperature, uniform, p, k)
        kept = filter_logits(logits / temperature, p, k)[0] > -torch.inf
        assert kept[tokens].all()
        assert (probabilities[:, ~kept] == 0).all()
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(50))

    @pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
    def test_a_token_without_probability_is_never_drawn(self, uniform: float) -> None:
        # Both ends of the cumulative distribution belong to tokens of probability zero.
        tokens, _ = sample_tokens(torch.tensor([[-1e30, 0.0, -1e30]]), 1.0, torch.tensor([uniform]))
        assert tokens.tolist() == [1]


class TestConfidence:
    """The samplers' scores, worked out by hand for one distribution."""

    PROBABILITIES = torch.tensor([[0.5, 0.3, 0.2]])

    @pytest.mark.parametrize(
        ("sampler", "expected"),
        [
            ("maskgit_plus", 0.3),  # the probability of the token that was drawn, here the second
            ("low_confidence", 0.3),
            ("topk_margin", 0.2),  # 0.5 - 0.3
            ("entropy", -1.0296530),  # 0.5 ln 0.5 + 0.3 ln 0.3 + 0.2 ln 0.2
        ],
    )
    def test_scores(self, sampler: str, expected: float) -> None:
        assert confidence(sampler, torch.tensor([1]), self.PROBABILITIES).item() == pytest.approx(expected, abs=1e-6)

    def test_a_certain_row_is_surest(self) -> None:
        certain_and_even = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
        for sampler in CONFIDENCE_SAMPLERS:
            certain, even = confidence(sampler, torch.tensor([1, 1]), certain_and_even)
            assert certain > even


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

    @given(timesteps=st.integers(2, 8), seed=st.integers(0, 1000), eps=st.sampled_from([0.0, 1e-3, 0.4]))
    @settings(max_examples=15)
    def test_origin_fills_each_position_with_the_scheduled_probability(
        self, timesteps: int, seed: int, eps: float
    ) -> None:
        rows, length = 200, 50
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
        steps = 4 if block_length is None else 2
        blocks = [1 if block_length is None else -(-int((row == MASK).sum()) // block_length) for row in rows]
        text = generate(
            tiny,
            padded,
            timesteps=steps * blocks[0],
            attention_mask=is_text,
            sampler=sampler,
            block_length=block_length,
        )
        assert (text[~is_text] == pad).all()
        for found, row, count in zip(text, rows, blocks, strict=True):
            alone = generate(tiny, row, timesteps=steps * count, sampler=sampler, block_length=block_length)
            assert torch.equal(found[-row.shape[1] :], alone[0])

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


def run_states(lm: TableLM | DiffusionLM, start: Tensor, **arguments: object) -> list[Tensor]:
    """The states before each step and the result, of all rows."""
    states: list[Tensor] = []
    result = generate(
        lm, start, batch_size=len(start), on_state=lambda _, rows, x: states.append(x.clone()), **arguments
    )
    return [*states, result]


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
        steps=st.integers(1, 3),
        sampler=st.sampled_from(SAMPLERS),
        temperature=st.sampled_from([0.0, 1.0]),
    )
    def test_a_block_is_filled_before_the_next_begins(
        self, rows: list[list[bool]], block_length: int, steps: int, sampler: str, temperature: float
    ) -> None:
        is_masked = torch.tensor(rows)
        lm = TableLM(torch.randn(12, 7, generator=torch.Generator().manual_seed(0)))
        blocks = max(1, -(-int(is_masked.sum(1).max()) // block_length))
        states = run_states(
            lm,
            torch.where(is_masked, MASK, 5),
            timesteps=steps * blocks,
            block_length=block_length,
            sampler=sampler,
            temperature=temperature,
        )
        for number, (before, after) in enumerate(itertools.pairwise(states)):
            for row in range(len(rows)):
                places = is_masked[row].nonzero().flatten()
                done, current, later = (
                    places[: number // steps * block_length],
                    places[number // steps * block_length :][:block_length],
                    places[(number // steps + 1) * block_length :],
                )
                assert (before[row, done] != MASK).all()
                assert (after[row, later] == MASK).all()
                if number % steps == steps - 1:
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
        # Rows with fewer masks have fewer blocks; the timesteps are divided by those of the longest row.
        start = prompts.clone()
        start[0, 3:] = 7
        texts = [
            generate(tiny, start, timesteps=6, sampler="low_confidence", block_length=3, batch_size=size)
            for size in (1, 2, 64)
        ]
        assert torch.equal(texts[0], texts[2])
        assert torch.equal(texts[1], texts[2])

    def test_the_model_is_told_the_step_of_the_whole_run(self, tiny: DiffusionLM, prompts: Tensor) -> None:
        told: list[tuple[int, int]] = []
        lm = TableLM(torch.zeros(14, 9))
        lm.set_timestep = lambda *step: told.append(step)
        generate(lm, prompts, timesteps=6, block_length=3)
        assert told == [(i, 6) for i in range(6)]

    @pytest.mark.parametrize(
        ("block_length", "timesteps", "message"),
        [
            (0, 4, "block_length: found 0, allowed is at least 1"),
            (2, 4, "timesteps: found 4, allowed are multiples of the 3 blocks"),
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
        number, steps = block_numbers(is_masked, 2, 12)
        assert steps == 4  # 5 masks make blocks of 2, 2 and 1
        assert number[0, is_masked[0]].tolist() == [0, 0, 1, 1, 2]
        assert number[1, 6] == 0


class TestHooks:
    """Dream's hooks see each step's ids and logits, and what they return takes the place of these."""

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_hooks_that_change_nothing_change_nothing(self, tiny: DiffusionLM, prompts: Tensor, sampler: str) -> None:
        arguments = {"timesteps": 4, "sampler": sampler, "temperature": 1.0, "top_p": 0.9}
        plain = generate(tiny, prompts, **arguments)
        hooked = generate(
            tiny,
            prompts,
            on_logits=lambda step, ids, logits: logits,
            on_tokens=lambda step, ids, logits: ids,
            **arguments,
        )
        assert torch.equal(hooked, plain)

    def test_on_logits_sees_the_state_before_and_the_logits_of_all_positions(
        self, tiny: DiffusionLM, prompts: Tensor
    ) -> None:
        seen: list[int] = []
        before: list[Tensor] = []

        def look(step: int, ids: Tensor, logits: Tensor) -> Tensor:
            everywhere = torch.ones_like(ids, dtype=torch.bool)
            assert torch.equal(logits, tiny.logits(ids, everywhere).unflatten(0, ids.shape))
            assert torch.equal(ids == MASK, before[-1] == MASK)
            seen.append(step)
            return logits

        generate(tiny, prompts, timesteps=3, on_logits=look, on_state=lambda _, rows, x: before.append(x.clone()))
        assert seen == [0, 1, 2]

    def test_what_on_logits_returns_is_sampled_from(self, tiny: DiffusionLM, prompts: Tensor) -> None:
        def only_seven(step: int, ids: Tensor, logits: Tensor) -> Tensor:
            changed = torch.full_like(logits, -1e30)
            changed[..., 7] = 0
            return changed

        text = generate(tiny, prompts, timesteps=3, temperature=1.0, on_logits=only_seven)
        assert torch.equal(text, torch.where(prompts == MASK, 7, prompts))

    def test_on_tokens_sees_the_state_after_the_step_and_the_changed_logits(
        self, tiny: DiffusionLM, prompts: Tensor
    ) -> None:
        after: list[Tensor] = []
        before: list[Tensor] = []

        def look(step: int | None, ids: Tensor, logits: Tensor | None) -> Tensor:
            if step is None:
                assert logits is None
                assert not before
                assert torch.equal(ids, prompts)
            else:
                assert logits.shape[:2] == ids.shape
                assert logits.max() <= 1
                after.append(ids.clone())
            return ids

        text = generate(
            tiny,
            prompts,
            timesteps=3,
            on_state=lambda _, rows, x: before.append(x.clone()),
            on_logits=lambda step, ids, logits: logits.clamp(max=1),
            on_tokens=look,
        )
        for state, previous in zip([*before[1:], text], after, strict=True):
            assert torch.equal(state, previous)

    def test_what_on_tokens_masks_is_filled_again(self, tiny: DiffusionLM, prompts: Tensor) -> None:
        def remask_first(step: int | None, ids: Tensor, logits: Tensor | None) -> Tensor:
            return ids if step in (None, 2) else torch.cat([torch.full_like(ids[:, :1], MASK), ids[:, 1:]], dim=1)

        states = run_states(tiny, prompts, timesteps=3, block_length=3, on_tokens=remask_first)
        assert (prompts[:, 0] != MASK).any()
        assert all((x[:, 0] == MASK).all() for x in states[1:3])
        assert not (states[3] == MASK).any()

    def test_generation_starts_from_what_on_tokens_returns_before_the_first_step(
        self, tiny: DiffusionLM, prompts: Tensor
    ) -> None:
        # Three positions more are visible; the others are numbered into blocks without them.
        start = torch.cat([prompts[:, :-3], torch.full((5, 3), 7)], dim=1)
        most = int((start == MASK).sum(1).max())
        arguments = {"timesteps": 2 * -(-most // 2), "block_length": 2}
        assert (prompts == MASK).sum(1).max() > most + 1  # so that the blocks of the prompts alone would be more
        text = generate(
            tiny, prompts, on_tokens=lambda step, ids, _: start[: len(ids)] if step is None else ids, **arguments
        )
        assert torch.equal(text, generate(tiny, start, **arguments))

    def test_hooks_are_called_at_every_step_with_logits_also_when_nothing_is_left(self, tiny: DiffusionLM) -> None:
        seen: list[tuple[str, int | None, bool]] = []
        ids = torch.full((1, 4), 9)

        def look(name: str, result: int) -> Callable[..., Tensor]:
            return lambda *given: seen.append((name, given[0], given[2] is not None)) or given[result]

        generate(tiny, ids, timesteps=2, on_logits=look("logits", 2), on_tokens=look("tokens", 1))
        steps = [(name, step, True) for step in range(2) for name in ("logits", "tokens")]
        assert seen == [("tokens", None, False), *steps]

    @pytest.mark.parametrize("hook", ["on_logits", "on_tokens"])
    @pytest.mark.parametrize(("returned", "found"), [(None, "None"), (torch.zeros(2), r"\(2,\)")])
    def test_a_result_of_another_shape_is_refused(
        self, tiny: DiffusionLM, prompts: Tensor, hook: str, returned: object, found: str
    ) -> None:
        with pytest.raises(ValueError, match=rf"{hook}: returned {found}, expected a tensor of shape \(5, 14"):
            generate(tiny, prompts, timesteps=2, **{hook: lambda *_: returned})


def published_loop(
    lm: DiffusionLM,
    x: Tensor,
    steps: int,
    sampler: str,
    top_p: float | None,
    top_k: int | None,
    hooks: tuple[Callable[..., Tensor], Callable[..., Tensor]],
) -> Tensor:
    """Dream's sampling loop at temperature 0 (arXiv 2508.15487) of one sequence, a position at a time in float64."""
    on_tokens, on_logits = hooks
    x = on_tokens(None, x.clone(), None)
    schedule = [1 + (1e-3 - 1) * i / steps for i in range(steps + 1)]
    for step, (t, s) in enumerate(itertools.pairwise(schedule)):
        logits = lm.model(x)
        logits[..., lm.mask_token_id] = -torch.inf  # which the published loop doesn't
        logits = on_logits(step, x, logits)
        surest = []
        for place in (x[0] == lm.mask_token_id).nonzero().flatten().tolist():
            probabilities, order = logits[0, place].double().softmax(-1).sort(descending=True)
            count = int((probabilities.cumsum(0) - probabilities <= (1 if top_p is None else top_p)).sum())
            kept = probabilities[: min(count, top_k or count)]
            kept = torch.cat([kept / kept.sum(), torch.zeros(1, dtype=torch.float64)])
            score = {
                "maskgit_plus": kept[0],
                "topk_margin": kept[0] - kept[1],
                "entropy": (kept * (kept + 1e-10).log()).sum(),
            }[sampler]
            surest.append((-score.item(), place, order[0].item()))
        filled = len(surest) if step == steps - 1 else int(len(surest) * (1 - s / t))
        for _, place, token in sorted(surest)[:filled]:
            x[0, place] = token
        x = on_tokens(step, x, logits)
    return x


class TestPublishedLoop:
    """``generate`` writes what Dream's published loop writes."""

    @pytest.fixture
    def unsure(self, build_tiny: Callable[[int], DiffusionLM]) -> DiffusionLM:
        """A model whose nuclei have several tokens, so that no two positions are equally sure after the filters."""
        lm = build_tiny(0)
        lm.model.lm_head.weight.mul_(0.3)
        return lm

    @pytest.mark.parametrize("has_hooks", [False, True])
    @pytest.mark.parametrize(("top_p", "top_k"), [(None, None), (0.6, 5)])
    @pytest.mark.parametrize("sampler", ["maskgit_plus", "topk_margin", "entropy"])
    def test_greedy_texts_are_equal(
        self,
        unsure: DiffusionLM,
        random_ids: RandomIds,
        sampler: str,
        top_p: float | None,
        top_k: int | None,
        has_hooks: bool,
    ) -> None:
        def pin(step: int | None, ids: Tensor, logits: Tensor | None) -> Tensor:
            return torch.cat([ids[:, :-2], torch.tensor([[7, 8]])], dim=1) if has_hooks else ids

        def from_the_right(step: int, ids: Tensor, logits: Tensor) -> Tensor:
            # Each position's logits lean on its right neighbour's, filled or not.
            return logits + 0.5 * logits.roll(-1, 1).clamp(min=-1e3) if has_hooks else logits

        differing = 0
        for masked, steps in ((8, 8), (12, 5), (16, 4), (6, 12), (24, 16)):
            ids = torch.cat([random_ids(1, 5, seed=masked), torch.full((1, masked), MASK)], dim=1)
            settings = {"timesteps": steps, "sampler": sampler, "top_p": top_p, "top_k": top_k}
            hooks = {"on_tokens": pin, "on_logits": from_the_right} if has_hooks else {}
            text = generate(unsure, ids, **settings, **hooks)
            assert torch.equal(text, published_loop(unsure, ids, steps, sampler, top_p, top_k, (pin, from_the_right)))
            differing += not torch.equal(text, generate(unsure, ids, **settings, **hooks, eps=0.0))
        assert differing  # so that the schedule counts

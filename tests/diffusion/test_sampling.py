"""A token is drawn by the filtered softmax of its logits, and each sampler scores positions by its formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from table_model import CONFIDENCE_SAMPLERS
from torch import Tensor

from thermo_lib.diffusion.tokens import _drawn, confidence, filter_logits, sample_tokens


def distinct_logits(size: int) -> st.SearchStrategy[Tensor]:
    """One row of logits, no two closer than 0.05."""
    levels = st.lists(st.integers(-80, 80), min_size=size, max_size=size, unique=True)
    return levels.map(lambda values: torch.tensor([values]) * 0.05)


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

    @pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 5000])
    @pytest.mark.parametrize("share", [1.0, 0.01])
    def test_blocks_of_tokens_give_the_token_of_the_whole_distribution(self, size: int, share: float) -> None:
        generator = torch.Generator().manual_seed(size)
        probabilities = torch.randn((40, size), generator=generator).mul(3).softmax(-1)
        probabilities *= torch.rand((40, size), generator=generator) < share
        probabilities[:, size // 2] += 0.01  # some token has some
        cumulative = probabilities.double().cumsum(-1)
        for uniform in (torch.rand(40, generator=generator), torch.zeros(40), torch.full((40,), 1 - 2**-24)):
            found = _drawn(probabilities, uniform)
            number = uniform.double()[:, None] * cumulative[:, -1:]
            assert torch.equal(found, torch.searchsorted(cumulative, number, right=True).squeeze(1))
            assert (probabilities.gather(1, found[:, None]) > 0).all()
        assert _drawn(probabilities[:0], torch.rand(0)).shape == (0,)

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

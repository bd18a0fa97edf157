"""The schedule runs from all masked to nothing masked, and the forward process masks its share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from table_model import MASK

from thermo_lib.diffusion.sampling import mask_ratios, mask_tokens, unmask_probabilities


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

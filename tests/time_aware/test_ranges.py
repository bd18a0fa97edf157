"""Static activation ranges: clipped for least error, in every granularity, and refined through the smoothing."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pretend import DEVICE, PretendedDevice
from torch import Tensor

from thermo_lib import BoundarySmoother, Calibration, TimeGroups
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.quant.codes import fake_quantize
from thermo_lib.time_aware.ranges import InputSample, best_starts, clipped_ranges, fit_range, input_samples
from thermo_lib.transition.fit import fit_to_output
from thermo_lib.transition.parameters import TrainableRanges

TIMESTEPS = 6
Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def sample_of(seed: int = 0, tokens: int = 40, channels: int = 6, growth: float = 0.0) -> InputSample:
    """Random inputs of every timestep, masked and unmasked in turn, larger by ``growth`` with each timestep."""
    generator = torch.Generator().manual_seed(seed)
    timestep = torch.arange(TIMESTEPS).repeat_interleave(tokens)
    x = torch.randn(len(timestep), channels, generator=generator) * (1 + growth * timestep[:, None])
    return InputSample(x, torch.arange(len(timestep)) % 2 == 1, timestep)


def smoothing(groups: TimeGroups, method: str | None = None) -> Tensor:
    """The smoothing matrix of time groups."""
    return BoundarySmoother(method, 2).weights(groups.intervals)


def minmax_error(values: Tensor, bits: int, share: float = 1.0) -> float:
    """Mean squared error of a share of the range from the smallest to the largest value, zero included."""
    low, high = values.min().clamp(max=0) * share, values.max().clamp(min=0) * share
    scale = (high - low) / (2**bits - 1)
    return float((fake_quantize(values, scale, (-low / scale).round(), bits) - values).square().mean())


class TestFitRange:
    """Static ranges clip outliers where that lowers the error, and zero stays zero."""

    @given(bits=st.integers(2, 8), seed=st.integers(0, 1000), power=st.floats(1, 5))
    def test_it_is_never_worse_than_min_max_and_zero_is_exact(self, bits: int, seed: int, power: float) -> None:
        values = torch.randn(300, generator=torch.Generator().manual_seed(seed))
        values = values.sign() * values.abs() ** power
        scale, zero = fit_range(values, bits)
        assert scale > 0
        assert zero == zero.round()
        assert 0 <= zero <= 2**bits - 1
        assert fake_quantize(torch.zeros(1), scale, zero, bits).item() == 0
        error = float((fake_quantize(values, scale, zero, bits) - values).square().mean())
        assert error <= minmax_error(values, bits) * (1 + 1e-5)

    @pytest.mark.parametrize("bits", [2, 4])
    def test_it_beats_min_max_by_far_on_heavy_tails(self, bits: int) -> None:
        values = torch.randn(4000, generator=torch.Generator().manual_seed(0))
        values[0] = 20.0
        scale, zero = fit_range(values, bits)
        error = float((fake_quantize(values, scale, zero, bits) - values).square().mean())
        assert error < 0.5 * minmax_error(values, bits)

    def test_each_end_is_clipped_for_itself(self) -> None:
        # One outlier far below, none above: any common share of the range wastes codes or cuts the upper values off.
        values = torch.randn(4000, generator=torch.Generator().manual_seed(0)).abs()
        values[0] = -20.0
        scale, zero = fit_range(values, 4)
        error = float((fake_quantize(values, scale, zero, 4) - values).square().mean())
        assert error < 0.97 * min(minmax_error(values, 4, share / 100) for share in range(1, 101))

    @pytest.mark.parametrize("bits", [2, 8])
    @pytest.mark.parametrize("value", [0.7, -0.7, 1e-4, 300.0])
    def test_a_constant_value_is_kept(self, bits: int, value: float) -> None:
        values = torch.full((10,), value)
        assert fake_quantize(values, *fit_range(values, bits), bits).tolist() == pytest.approx(
            values.tolist(), rel=1e-4
        )

    def test_zeros_are_kept(self) -> None:
        scale, zero = fit_range(torch.zeros(10), 4)
        assert (scale.item(), zero.item()) == (1.0, 0.0)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_values_of_one_sign_use_all_codes(self, sign: int) -> None:
        values = sign * torch.linspace(0, 1, 1000)
        scale, zero = fit_range(values, 4)
        assert zero.item() == (0 if sign > 0 else 15)
        assert scale.item() == pytest.approx(1 / 15, rel=0.1)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (torch.tensor([]), "activations: found no value"),
            (torch.tensor([0.0, torch.nan]), "activations: found NaN or infinity"),
            (torch.tensor([0.0, torch.inf]), "activations: found NaN or infinity"),
        ],
    )
    def test_values_without_a_range_are_refused(self, values: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            fit_range(values, 4)


class TestSamples:
    """Inputs of layers, with what each token was."""

    def test_tokens_are_those_of_the_states(self, tiny: DiffusionLM, calibration: Calibration) -> None:
        samples = input_samples(tiny, calibration, [Q_PROJ, DOWN_PROJ], TIMESTEPS, 10_000, seed=0)
        assert [samples[name].x.shape[1] for name in samples] == [32, 48]
        for sample in samples.values():
            assert torch.equal(sample.timestep.unique(), torch.arange(TIMESTEPS))
            # Everything is masked at the first timestep, and less and less after it.
            shares = [float(sample.is_masked[sample.timestep == t].double().mean()) for t in range(TIMESTEPS)]
            assert shares[0] == 1 > shares[2] > shares[-1]

    def test_the_first_layer_sees_one_input_for_all_masked_tokens(
        self, tiny: DiffusionLM, calibration: Calibration
    ) -> None:
        sample = input_samples(tiny, calibration, [Q_PROJ], TIMESTEPS, 50, seed=0)[Q_PROJ]
        assert len(sample.x[sample.is_masked].unique(dim=0)) == 1
        assert len(sample.x[~sample.is_masked].unique(dim=0)) > 1

    def test_equal_seeds_give_equal_samples(self, tiny: DiffusionLM, calibration: Calibration) -> None:
        first, again, other = (
            input_samples(tiny, calibration, [Q_PROJ], TIMESTEPS, 8, seed=seed)[Q_PROJ].x for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_timesteps_are_mapped_onto_those_of_the_model(self, tiny: DiffusionLM, calibration: Calibration) -> None:
        sample = input_samples(tiny, calibration, [Q_PROJ], 3, 8, seed=0)[Q_PROJ]
        assert torch.equal(torch.bincount(sample.timestep), torch.tensor([16, 16, 16]))


class TestClippedRanges:
    """One range for every time group, token state and channel group."""

    def test_each_range_is_that_of_its_own_values(self) -> None:
        sample, groups = sample_of(growth=1.0), TimeGroups(TIMESTEPS, 3)
        scale, zero = clipped_ranges(sample, groups, 4, token_states=True, group_size=4)
        assert scale.shape == zero.shape == (3, 2, 2)
        for k, state, g in itertools.product(range(3), range(2), range(2)):
            inside = (sample.timestep // 2 == k) & (sample.is_masked == bool(state))
            expected = fit_range(sample.x[inside][:, 4 * g : 4 * g + 4], 4)
            assert (scale[k, state, g], zero[k, state, g]) == expected

    def test_a_token_state_that_never_occurs_takes_the_range_of_all(self) -> None:
        sample = sample_of()
        sample = InputSample(sample.x, torch.ones_like(sample.is_masked), sample.timestep)
        scale, zero = clipped_ranges(sample, TimeGroups(TIMESTEPS, 1), 4, token_states=True, group_size=None)
        assert scale[0, 0] == scale[0, 1]
        assert zero[0, 0] == zero[0, 1]

    def test_a_time_group_without_an_input_is_named(self) -> None:
        sample = sample_of()
        early = sample.select(sample.timestep < 3)
        with pytest.raises(ValueError, match=r"calibration: found no state in timesteps 3\.\.5"):
            clipped_ranges(early, TimeGroups(TIMESTEPS, 2), 4, token_states=False, group_size=None)


class TestBestStarts:
    """Time groups where the activations change."""

    @pytest.mark.parametrize("edge", [1, 3, 5])
    def test_a_jump_is_found(self, edge: int) -> None:
        sample = sample_of()
        x = sample.x * torch.where(sample.timestep >= edge, 30.0, 1.0)[:, None]
        moved = InputSample(x, sample.is_masked, sample.timestep)
        assert best_starts([moved], TIMESTEPS, 2, 4) == (edge,)

    def test_one_group_has_no_start_and_as_many_as_timesteps_have_all(self) -> None:
        sample = sample_of(growth=0.5)
        assert best_starts([sample], TIMESTEPS, 1, 4) == ()
        assert best_starts([sample], TIMESTEPS, TIMESTEPS, 4) == tuple(range(1, TIMESTEPS))

    def test_the_starts_make_time_groups(self) -> None:
        starts = best_starts([sample_of(1, growth=1.0), sample_of(2)], TIMESTEPS, 3, 4)
        assert TimeGroups(TIMESTEPS, 3, starts).boundaries == list(starts)

    def test_they_are_found_where_the_inputs_are(self) -> None:
        parts = [part[:6] for part in vars(sample_of(tokens=2, channels=2, growth=3.0)).values()]  # three timesteps
        with PretendedDevice() as device:
            found = best_starts([InputSample(*(part.to(DEVICE) for part in parts))], 3, 2, 4)
        assert found == best_starts([InputSample(*parts)], 3, 2, 4)
        assert device.count["to device"] == 3


def test_the_markov_term_is_the_sum_of_squared_steps() -> None:
    scale, zero_point = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 6.0, 6.0])
    ranges = TrainableRanges(scale[:, None, None], zero_point[:, None, None], torch.eye(3), 4, None)
    # Steps of log 2 and log 4 of the scale; of 3 of the 15 codes and 0 of the zero point.
    assert ranges.roughness().item() == pytest.approx(5 * math.log(2) ** 2 + 0.2**2)
    one = TrainableRanges(torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 1), 4, None)
    assert one.roughness().item() == 0


class TestTrainableRanges:
    """They quantize as the layer will, and gradients reach them."""

    @pytest.mark.parametrize("method", [None, "linear", "spline"])
    @pytest.mark.parametrize("group_size", [None, 4])
    def test_they_quantize_as_the_smoothed_parameters_do(self, method: str | None, group_size: int | None) -> None:
        sample, groups = sample_of(growth=0.5), TimeGroups(TIMESTEPS, 2)
        start = clipped_ranges(sample, groups, 4, token_states=True, group_size=group_size)
        ranges = TrainableRanges(*start, smoothing(groups, method), 4, group_size)
        steps = BoundarySmoother(method, 2).smooth(ranges.params(groups))
        found = ranges(sample.x, sample.is_masked, sample.timestep)
        for row in range(0, len(found), 7):
            step, state = steps[int(sample.timestep[row])], int(sample.is_masked[row])
            scale, zero = (
                p[state].repeat_interleave(group_size or 6)[:6] for p in (step.scale, step.zero_point.round())
            )
            torch.testing.assert_close(found[row], fake_quantize(sample.x[row], scale, zero, 4))

    def test_what_has_not_moved_is_the_start_to_the_last_bit(self) -> None:
        generator, groups = torch.Generator().manual_seed(0), TimeGroups(TIMESTEPS, 3)
        scale, zero_point = torch.rand(2, 3, 2, 500, generator=generator)
        assert not torch.equal(scale.log().exp(), scale)
        ranges = TrainableRanges(scale, zero_point, smoothing(groups, None), 4, None)
        assert torch.equal(torch.stack([p.scale for p in ranges.params(groups)]), scale)
        with torch.no_grad():
            ranges.log_scale[1] += math.log(2)
        moved = torch.stack([p.scale for p in ranges.params(groups)])
        torch.testing.assert_close(moved[1], 2 * scale[1])
        assert torch.equal(moved[::2], scale[::2])

    def test_the_gradient_of_a_scale_is_that_of_lsq(self) -> None:
        # In the range d/ds = round(x/s) - x/s, clipped it is the last code minus the zero point (LSQ, eq. 3).
        ranges = TrainableRanges(torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 2.0), torch.ones(1, 1), 2, None)
        x = torch.tensor([[0.3], [-0.9], [7.0], [-7.0]])
        no_state, first_step = torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.long)
        for row, expected in enumerate([1 - 0.6, -2 + 1.8, 3 - 2, 0 - 2]):
            ranges.zero_grad()
            ranges(x, no_state, first_step)[row].sum().backward()
            assert ranges.log_scale.grad.item() / 0.5 == pytest.approx(expected, abs=1e-5)

    def test_fitting_to_the_output_lowers_its_error_after_smoothing(self) -> None:
        sample, groups = sample_of(tokens=200, growth=2.0), TimeGroups(TIMESTEPS, 2)
        weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([9, 1, 1, 1, 1, 0.1])
        start = clipped_ranges(sample, groups, 3, token_states=False, group_size=None)
        ranges = TrainableRanges(*start, smoothing(groups, "linear"), 3, None)

        @torch.no_grad()
        def error() -> float:
            difference = ranges(sample.x, sample.is_masked, sample.timestep) - sample.x
            return float((difference @ weight.T).square().sum())

        before = error()
        fit_to_output(ranges, sample, weight, steps=100, batch=300, lr=0.02, seed=0)
        assert error() < 0.95 * before
        assert ranges.table()[1].equal(ranges.table()[1].round())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [1, 50, 3000])
def test_ranges_tried_together_or_alone_are_the_same(monkeypatch: pytest.MonkeyPatch, size: int, bits: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) ** 3
    together = fit_range(values, bits)
    monkeypatch.setattr("thermo_lib.time_aware.ranges._ALONE", 1)
    assert [tensor.tolist() for tensor in fit_range(values, bits)] == [tensor.tolist() for tensor in together]

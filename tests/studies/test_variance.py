"""The split of the variance adds up, and gives each factor what was put in for it."""

import math

import pytest
import torch

from thermo_lib.diffusion.states import calibrate
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.studies.variance import FACTORS, INSIDE, explained, log_ranges, split, variance_shares

GENERATOR = torch.Generator().manual_seed(0)


def test_a_log_range_is_that_of_a_group_of_channels() -> None:
    x = torch.tensor([[0.0, 1.0, -2.0, 2.0, 9.0], [3.0, 3.0, 0.0, 0.5, 9.0]])
    expected = torch.tensor([[0.0, math.log(4)], [math.log(1e-8), math.log(0.5)]], dtype=torch.float64)
    assert torch.allclose(log_ranges(x, 2), expected)
    assert torch.allclose(log_ranges(x, 1).squeeze(1), torch.tensor([11.0, 9.0]).double().log())


@pytest.mark.parametrize("factor", INSIDE)
def test_what_is_put_in_for_a_factor_is_found_there(factor: str) -> None:
    timestep = torch.arange(4).repeat_interleave(8)
    is_masked = torch.tensor([True, True, False, False]).repeat(8)
    token, channel = torch.arange(32), torch.arange(6)
    of_state = is_masked.double() * 2 - 1
    effect = {
        "time": timestep[:, None].double(),
        "token state": of_state[:, None],
        "token": ((-1.0) ** token)[:, None].double(),  # in every state of every timestep as often up as down
        "channel": channel[None].double(),
        "token and channel": (((-1.0) ** token)[:, None] * ((-1.0) ** channel)[None]).double(),
    }[factor]
    found = split(effect.expand(32, 6).contiguous(), timestep, is_masked)
    assert found[factor] > 1
    assert all(total < 1e-9 * found[factor] for name, total in found.items() if name != factor)


def test_the_split_adds_up() -> None:
    values = torch.randn((50, 7), generator=GENERATOR, dtype=torch.float64)
    timestep = torch.randint(5, (50,), generator=GENERATOR)
    found = split(values, timestep, torch.rand(50, generator=GENERATOR) < 0.5)
    assert sum(found.values()) == pytest.approx(float((values - values.mean()).square().sum()))


def test_what_a_kind_explains() -> None:
    kind = torch.tensor([0, 0, 1, 1])
    assert explained(torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.float64), kind) == pytest.approx(1)
    assert explained(torch.tensor([1.0, 3.0, 1.0, 3.0], dtype=torch.float64), kind) == pytest.approx(0)


def test_of_a_model(tiny: DiffusionLM) -> None:
    ids = torch.randint(5, 60, (3, 12), generator=GENERATOR)
    found = variance_shares(tiny, calibrate(tiny, [(ids, None)], timesteps=4, progress=False))
    assert list(found["shares"]) == list(FACTORS)
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert len(found["layers"]) == 4 * len(tiny.model.blocks)
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found["layers"].values())
    assert all(0 <= share <= 1 for factors in found["tokens"].values() for share in factors.values())

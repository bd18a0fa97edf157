"""A time-aware norm computes what the norm it replaces does, with the weights of the timestep."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from thermo_lib.quant.calls import denoising
from thermo_lib.quant.time_norms import TimeNorm, check_plain_norms, is_norm, refresh_time_norms
from thermo_lib.time_aware.groups import TimeGroups
from thermo_lib.time_aware.smoothing import BoundarySmoother

FEATURES, TIMESTEPS = 12, 9
KINDS = {
    "Qwen2": Qwen2RMSNorm,
    "Qwen3": Qwen3RMSNorm,
    "Llama": LlamaRMSNorm,
    "LayerNorm": nn.LayerNorm,
    "LayerNorm without bias": lambda features: nn.LayerNorm(features, bias=False),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
Make = Callable[[int], nn.Module]


def drawn(make: Make, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A norm with random parameters."""
    norm, generator = make(FEATURES), torch.Generator().manual_seed(seed)
    for parameter in norm.parameters():
        parameter.data = 1 + 0.5 * torch.randn(parameter.shape, generator=generator)
    return norm.requires_grad_(False).to(dtype)


def matrix(count: int, smoothing: str | None = "linear", window: int = 2) -> Tensor:
    return BoundarySmoother(smoothing, window).weights(TimeGroups(TIMESTEPS, count).intervals)


def spread(norm: TimeNorm, seed: int = 5) -> TimeNorm:
    """The norm with other parameters in every group."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in norm.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    norm.refresh()
    return norm


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, FEATURES, generator=torch.Generator().manual_seed(1)).to(dtype)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "smoothing"), [(1, None), (3, None), (3, "linear"), (3, "spline"), (9, None)])
def test_with_equal_groups_it_is_the_norm_bit_for_bit(
    make: Make, dtype: torch.dtype, count: int, smoothing: str | None
) -> None:
    norm = drawn(make, dtype=dtype)
    aware = TimeNorm(norm, matrix(count, smoothing))
    for x in (inputs(4, 5, dtype=dtype), inputs(4, 5, 2, dtype=dtype)):
        for step in range(TIMESTEPS):
            with denoising((step, TIMESTEPS)):
                assert torch.equal(aware(x), norm(x))
    assert torch.equal(aware.weight, norm.weight)
    bias = getattr(norm, "bias", None)
    assert aware.bias is None if bias is None else torch.equal(aware.bias, bias)
    assert aware.weight.dtype == dtype


@every_kind
@pytest.mark.parametrize("smoothing", [None, "linear", "cubic", "spline"])
def test_a_step_takes_the_smoothed_row(make: Make, smoothing: str | None) -> None:
    norm, shares = drawn(make), matrix(3, smoothing)
    aware, x = spread(TimeNorm(norm, shares)), inputs(2, 7)
    for step in range(TIMESTEPS):
        mixed = {  # written out: the norm with the mean of the groups' parameters
            name: sum(float(shares[step, g]) * parameter[g].double() for g in range(3)).float()
            for name, parameter in aware.named_parameters()
        }
        norm.weight.data = mixed["time_weight"]
        if "time_bias" in mixed:
            norm.bias.data = mixed["time_bias"]
        with denoising((step, TIMESTEPS)):
            assert torch.allclose(aware(x), norm(x), rtol=1e-6, atol=1e-6)
        with denoising((2 * step + 1, 2 * TIMESTEPS)):  # the same mask ratio in a longer run
            assert torch.allclose(aware(x), norm(x), rtol=1e-6, atol=1e-6)


def test_neighbouring_steps_with_equal_parameters_share_a_row() -> None:
    aware = TimeNorm(drawn(Qwen2RMSNorm), matrix(3, "linear", 1))  # two steps at each of two boundaries
    assert aware.table.shape == (3 + 4, FEATURES)
    assert len(aware.row_of_step) == TIMESTEPS
    assert TimeNorm(drawn(Qwen2RMSNorm), matrix(1)).table.shape == (1, FEATURES)


@every_kind
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 2)], ids=["tokens", "heads"])
@pytest.mark.parametrize("is_trained", [False, True])
def test_rows_of_several_steps_are_those_of_calls_of_their_own(
    make: Make, shape: tuple[int, ...], is_trained: bool
) -> None:
    aware, x = spread(TimeNorm(drawn(make), matrix(3))), inputs(*shape)
    steps = torch.tensor([8, 0, 3, 3, 5])
    aware.requires_grad_(is_trained)
    with torch.no_grad(), denoising((0, 1), rows=(steps, TIMESTEPS)):
        together = aware(x)
    aware.requires_grad_(False)
    for row, step in enumerate(steps.tolist()):
        with denoising((step, TIMESTEPS)):
            alone = aware(x[row : row + 1])
        assert torch.allclose(together[row : row + 1], alone, rtol=1e-6, atol=1e-6)
        if "RMSNorm" in type(drawn(make)).__name__:
            assert torch.equal(together[row : row + 1], alone)
    with denoising((0, 1), rows=(steps, TIMESTEPS)), pytest.raises(ValueError, match="rows: found 5 timesteps, exp"):
        aware(x[:3])


@every_kind
def test_gradients_reach_the_groups_through_the_smoothing(make: Make) -> None:
    shares = matrix(3)
    aware, x = TimeNorm(drawn(make), shares), inputs(2, 4)
    step = 2  # smoothed: of the first two groups
    aware.requires_grad_()
    with denoising((step, TIMESTEPS)):
        aware(x).sum().backward()
    gradient = aware.time_weight.grad
    assert torch.allclose(gradient[0] / shares[step, 0], gradient[1] / shares[step, 1], rtol=1e-4)
    assert not gradient[2].any()
    assert gradient[:2].all()


@every_kind
def test_training_is_seen_at_once_and_later_after_a_refresh(make: Make) -> None:
    aware, x = TimeNorm(drawn(make), matrix(3)), inputs(2, 4)
    before, table = aware(x), aware.table
    aware.requires_grad_()
    with torch.no_grad():
        aware.time_weight += 1
        changed = aware(x)
    assert not torch.equal(changed, before)
    aware.requires_grad_(False)
    assert torch.equal(aware(x), before)
    assert not aware.is_current
    refresh_time_norms(nn.ModuleList([aware]))
    assert aware.is_current
    assert torch.equal(aware(x), changed)
    assert aware.table is table, "a CUDA graph reads the memory that it was recorded with"


@every_kind
@pytest.mark.parametrize("smoothing", [None, "linear"])
def test_what_groups_share_is_added_to_each(make: Make, smoothing: str | None) -> None:
    aware, x = spread(TimeNorm(drawn(make), matrix(3, smoothing))), inputs(2, 4)
    before, groups = aware(x), aware.time_weight.clone()
    shared = aware.share()
    aware.requires_grad_()
    assert torch.allclose(aware(x), before, rtol=1e-6)
    for parameter in shared:
        parameter.data += 0.5
    trained = aware(x).detach()
    aware.requires_grad_(False)
    aware.merge()
    assert torch.equal(aware.time_weight, groups + 0.5)
    assert torch.allclose(aware(x), trained, rtol=1e-6)
    assert set(aware.state_dict()) <= {"time_weight", "time_bias"}


def test_one_group_shares_nothing() -> None:
    aware = TimeNorm(drawn(nn.LayerNorm), matrix(1))
    assert not aware.share()
    assert len(list(aware.parameters())) == 2


@every_kind
def test_it_is_stored_cast_and_copied(make: Make) -> None:
    aware, x = spread(TimeNorm(drawn(make), matrix(3))), inputs(2, 4)
    stored = aware.state_dict()
    assert set(stored) <= {"time_weight", "time_bias"}
    assert all(values.shape == (3, FEATURES) for values in stored.values())
    for target in (TimeNorm(drawn(make, 7), matrix(3)), copy.deepcopy(TimeNorm(drawn(make, 8), matrix(3)))):
        target.load_state_dict(stored)
        assert torch.equal(target(x), aware(x))
    meta = TimeNorm(drawn(make), matrix(3)).to("meta")
    assert meta.table is None
    assert meta.weight.device.type == "meta"
    meta.load_state_dict(stored, assign=True)
    assert torch.equal(meta(x), aware(x))
    low, again = copy.deepcopy(aware).to(torch.bfloat16), TimeNorm(drawn(make, dtype=torch.bfloat16), matrix(3))
    again.load_state_dict(low.state_dict())
    assert low.table.dtype == torch.bfloat16
    assert torch.equal(low.table, again.table), "rounded once, from the groups' parameters in that type"


@pytest.mark.slow
@pytest.mark.parametrize("make", [Qwen2RMSNorm, nn.LayerNorm], ids=["RMSNorm", "LayerNorm"])
def test_torch_compile_computes_the_same(make: Make) -> None:
    aware, x = spread(TimeNorm(drawn(make), matrix(3))), inputs(2, 4)
    compiled = torch.compile(aware, backend="eager")
    with torch.no_grad():
        for step in (0, 8, 2, 0):
            with denoising((step, TIMESTEPS)):
                assert torch.equal(compiled(x), aware(x))


class OtherNorm(nn.Module):
    """Normalizes in a way that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(FEATURES))


def test_other_modules_are_told_apart() -> None:
    assert not is_norm(nn.Linear(3, 3))
    assert not is_norm(nn.LayerNorm(3, elementwise_affine=False))
    assert not is_norm(TimeNorm(drawn(Qwen2RMSNorm), matrix(3)))
    for norm in (OtherNorm(), nn.LayerNorm((3, 4)), nn.GroupNorm(1, 4)):
        with pytest.raises(ValueError, match=rf"norm: found {type(norm).__name__} with a weight of shape .*, allowed"):
            is_norm(norm)
    with pytest.raises(ValueError, match=r"norm: found Linear, allowed are Qwen2RMSNorm, .*LayerNorm"):
        TimeNorm(nn.Linear(3, 3), matrix(3))
    with pytest.raises(ValueError, match=r"model: found time-aware norms \(1 of them\), allowed is"):
        check_plain_norms(nn.ModuleList([TimeNorm(drawn(Qwen2RMSNorm), matrix(3))]))

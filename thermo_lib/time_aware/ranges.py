"""Static activation ranges, clipped for least squared error of the activations.

Each time group, token state and group of channels has a range of its own. ``transition`` refines ranges from here."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from thermo_lib.diffusion.inputs import run_states
from thermo_lib.diffusion.states import Calibration
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.quant.codes import fake_quantize
from thermo_lib.quant.limits import SMALLEST_SCALE
from thermo_lib.time_aware.groups import TimeGroups

_SHARES = torch.logspace(0, -2, 41, dtype=torch.float32, device="cpu")  # of the min-max range, that are kept
_ALONE = 2**15  # values, from which on they are quantized in one range at a time


@dataclass(frozen=True)
class InputSample:
    """Tokens' inputs to a layer.

    Attributes:
        x: float32 ``(tokens, channels)``.
        is_masked: bool ``(tokens,)``, the token state.
        timestep: int64 ``(tokens,)``.
    """

    x: Tensor
    is_masked: Tensor
    timestep: Tensor

    def select(self, keep: Tensor) -> "InputSample":
        """The tokens where ``keep`` is True."""
        return InputSample(self.x[keep], self.is_masked[keep], self.timestep[keep])


def input_samples(
    lm: DiffusionLM, calibration: Calibration, names: Sequence[str], timesteps: int, tokens: int, seed: int
) -> dict[str, InputSample]:
    """A random sample of the inputs of some linears.

    Args:
        lm: the model whose activations are sampled.
        calibration: the states.
        names: the linears.
        timesteps: ``T`` of the quantized model, onto which the calibration's timesteps are mapped.
        tokens: tokens kept of each timestep and part of the calibration.
        seed: seeds the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, list[InputSample]] = {name: [] for name in names}
    most = max(int(torch.bincount(part.timestep).max()) * part.ids.shape[1] for part in calibration.parts)

    def keep(name: str, x: Tensor, is_masked: Tensor, timestep: int) -> None:
        chosen = torch.randint(len(x), (max(1, tokens * len(x) // most),), generator=generator).to(x.device)
        step = torch.full_like(chosen, timestep * timesteps // calibration.timesteps)
        kept[name].append(InputSample(x[chosen].float(), is_masked[chosen], step))

    run_states(lm, calibration, list(names), keep)
    return {
        name: InputSample(*(torch.cat([getattr(p, key) for p in parts]) for key in ("x", "is_masked", "timestep")))
        for name, parts in kept.items()
    }


def _spanning(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and whole zero point of the range from ``low`` (at most 0) to ``high`` (at least 0)."""
    scale = ((high - low) / (2**bits - 1)).clamp(min=SMALLEST_SCALE)
    return scale, (-low / scale).round()


def fit_range(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a static activation range, clipped for least squared error.

    The share of the min-max range that is kept is searched from 1 down to 0.01 for both ends together, then for
    each end alone.

    Args:
        values: float32 activations, any shape.
        bits: bits of an activation code.

    Returns:
        ``(scale, zero_point)``, float32 scalars, the zero point whole.

    Raises:
        ValueError: no value, or NaN or infinity among them.
    """
    values = values.flatten().float()
    if not len(values):
        raise ValueError("activations: found no value, allowed is at least one")
    if not values.isfinite().all():
        raise ValueError("activations: found NaN or infinity, expected finite numbers")
    low, high = values.min().clamp(max=0), values.max().clamp(min=0)
    if low == high:
        return torch.ones_like(low), torch.zeros_like(low)

    @cache  # the second round asks again for what the first one found
    def errors(low_places: tuple[int, ...], high_places: tuple[int, ...]) -> list[float]:
        low_shares, high_shares = (_SHARES[list(places)].to(values.device) for places in (low_places, high_places))
        scale, zero_point = _spanning(low * low_shares, high * high_shares, bits)
        if len(values) >= _ALONE:
            return [float(_error(values, *pair, bits)) for pair in zip(scale, zero_point, strict=True)]
        return _error(values.expand(len(scale), -1), scale[:, None], zero_point[:, None], bits).tolist()

    def best(places: tuple[int, ...], found: list[float]) -> int:
        return places[found.index(min(found))]

    every = tuple(range(len(_SHARES)))
    low_place = high_place = best(every, errors(every, every))
    near = _near(low_place)
    for _ in range(2):
        low_place = best(near, errors(near, (high_place,) * len(near)))
        high_place = best(near, errors((low_place,) * len(near), near))
    return _spanning(low * _SHARES[low_place], high * _SHARES[high_place], bits)


def _error(values: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Mean squared error of quantized values, over the last dimension; ``scale`` and ``zero_point`` broadcast."""
    return fake_quantize(values, scale, zero_point, bits).sub_(values).square_().mean(-1)


@cache
def _near(place: int) -> tuple[int, ...]:
    """The places of the shares up to five times as large or as small as one."""
    least, most = 0.2 * _SHARES[place], (5 * _SHARES[place]).clamp(max=1)
    return tuple(((least <= _SHARES) & (most >= _SHARES)).nonzero().flatten().tolist())


def clipped_ranges(
    sample: InputSample, groups: TimeGroups, bits: int, *, token_states: bool, group_size: int | None
) -> tuple[Tensor, Tensor]:
    """``fit_range`` for every time group, token state and channel group.

    A token state that a time group doesn't hold takes the range of both states together.

    Args:
        sample: the layer's inputs.
        groups: the time groups.
        bits: bits of an activation code.
        token_states: one range for unmasked and one for masked tokens, instead of one for both.
        group_size: neighbouring channels that share a range; None for all.

    Returns:
        ``(scale, zero_point)``, each float32 ``(time groups, token states, channel groups)``.

    Raises:
        ValueError: a time group without an input.
    """
    scales, zeros = [], []
    channels = sample.x.shape[1]
    width = min(group_size or channels, channels)
    for start, stop in groups.intervals:
        inside = sample.select((sample.timestep >= start) & (sample.timestep < stop))
        if not len(inside.x):
            raise ValueError(f"calibration: found no state in timesteps {start}..{stop - 1}")
        for state in (False, True) if token_states else (None,):
            rows = inside.x if state is None else inside.x[inside.is_masked == state]
            rows = rows if len(rows) else inside.x
            fitted = [fit_range(part, bits) for part in rows.split(width, dim=1)]
            scales += [scale for scale, _ in fitted]
            zeros += [zero for _, zero in fitted]
    shape = (groups.num_groups, 2 if token_states else 1, -1)
    return torch.stack(scales).view(shape), torch.stack(zeros).view(shape)


def best_starts(samples: Sequence[InputSample], timesteps: int, num_groups: int, bits: int) -> tuple[int, ...]:
    """The time groups with the least squared quantization error, by dynamic programming over the timesteps.

    A group costs what its inputs lose in the best of 256 ranges (16 shares of the min-max range for each end),
    relative to the energy of each timestep and summed over the layers.

    Args:
        samples: the layers' inputs.
        timesteps: ``T``.
        num_groups: number of groups.
        bits: bits of an activation code.

    Returns:
        The first timestep of every group but the first.
    """
    cost = np.zeros((timesteps, timesteps + 1))
    shares = torch.logspace(0, -2, 16, dtype=torch.float32)
    for sample in samples:
        low, high = sample.x.min().clamp(max=0), sample.x.max().clamp(min=0)
        error = torch.zeros((timesteps, len(shares) ** 2), dtype=torch.float64, device=sample.x.device)
        steps = [sample.x[sample.timestep == t] for t in range(timesteps)]
        for number, (a, b) in enumerate((a, b) for a in shares for b in shares):
            scale, zero = _spanning(low * a, high * b, bits)
            for t, x in enumerate(steps):
                error[t, number] = fake_quantize(x, scale, zero, bits).sub_(x).square_().sum()
        error /= torch.stack([x.double().square().sum() for x in steps])[:, None]
        until = torch.cat([torch.zeros_like(error[:1]), error.cumsum(0)])
        for start in range(timesteps):
            cost[start, start + 1 :] += (until[start + 1 :] - until[start]).min(1).values.cpu().numpy()
    best = np.full((num_groups + 1, timesteps + 1), np.inf)
    origin = np.zeros_like(best, dtype=int)
    best[0, 0] = 0
    for count in range(1, num_groups + 1):
        for stop in range(count, timesteps + 1):
            options = best[count - 1, :stop] + cost[:stop, stop]
            origin[count, stop] = options.argmin()
            best[count, stop] = options.min()
    starts, stop = [], timesteps
    for count in range(num_groups, 1, -1):
        stop = int(origin[count, stop])
        starts.append(stop)
    return tuple(reversed(starts))

"""Static activation ranges: what they are fitted to, in which granularity, and for which timesteps.

Each time group starts from ranges clipped for least squared error of the activations. They are then refined by
gradient descent, rounding passed straight through (LSQ; Esser et al., arXiv 1902.08153; with zero points as in LSQ+,
arXiv 2004.09576), either layer by layer for least error of the layer's output or, in ``transition``, all together for
least path KL. What is refined are the groups' parameters as the layer will use them: after smoothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from thermo_lib.calibration import Calibration, run_states
from thermo_lib.models import DiffusionLM
from thermo_lib.quant import SMALLEST_SCALE, fake_quantize
from thermo_lib.time_aware import TimeGroupParams, TimeGroups


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
        chosen = torch.randint(len(x), (max(1, tokens * len(x) // most),), generator=generator)
        step = timestep * timesteps // calibration.timesteps
        kept[name].append(InputSample(x[chosen], is_masked[chosen], torch.full((len(chosen),), step)))

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
        return torch.tensor(1.0), torch.tensor(0.0)
    shares = torch.logspace(0, -2, 41)

    def parameters(low_share: Tensor, high_share: Tensor) -> tuple[Tensor, Tensor]:
        return _spanning(low * low_share, high * high_share, bits)

    def error(low_share: Tensor, high_share: Tensor) -> float:
        quantized = fake_quantize(values, *parameters(low_share, high_share), bits)
        return float(quantized.sub_(values).square_().mean())

    both = min(shares, key=lambda share: error(share, share))
    low_share = high_share = both
    for _ in range(2):
        near = [s for s in shares if 0.2 * both <= s <= min(5 * both, 1)]
        low_share = min(near, key=lambda share, fixed=high_share: error(share, fixed))
        high_share = min(near, key=lambda share, fixed=low_share: error(fixed, share))
    return parameters(low_share, high_share)


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
    for start, stop in groups.ranges:
        inside = sample.select((sample.timestep >= start) & (sample.timestep < stop))
        if not len(inside.x):
            raise ValueError(f"calibration: found no state in timesteps {start}..{stop - 1}")
        for state in (False, True) if token_states else (None,):
            rows = inside.x if state is None else inside.x[inside.is_masked == state]
            rows = rows if len(rows) else inside.x
            fitted = [fit_range(part, bits) for part in rows.split(group_size or rows.shape[1], dim=1)]
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
    shares = torch.logspace(0, -2, 16)
    for sample in samples:
        low, high = sample.x.min().clamp(max=0), sample.x.max().clamp(min=0)
        error = torch.zeros((timesteps, len(shares) ** 2), dtype=torch.float64)
        steps = [sample.x[sample.timestep == t] for t in range(timesteps)]
        for number, (a, b) in enumerate((a, b) for a in shares for b in shares):
            scale, zero = _spanning(low * a, high * b, bits)
            for t, x in enumerate(steps):
                error[t, number] = fake_quantize(x, scale, zero, bits).sub_(x).square_().sum()
        error /= torch.stack([x.double().square().sum() for x in steps])[:, None]
        until = torch.cat([torch.zeros_like(error[:1]), error.cumsum(0)])
        for start in range(timesteps):
            cost[start, start + 1 :] += (until[start + 1 :] - until[start]).min(1).values.numpy()
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


def straight_through(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function(x)``, the gradient passed straight through to ``x``."""
    return x + (function(x) - x).detach()


def _round(x: Tensor) -> Tensor:
    return straight_through(x, torch.round)


class TrainableRanges(nn.Module):
    """The static ranges of one layer input as trainable parameters of its time groups.

    Args:
        scale, zero_point: where to start, ``(time groups, token states, channel groups)``.
        weights: smoothing matrix ``(timesteps, time groups)``, see ``BoundarySmoother.weights``.
        bits: bits of an activation code.
        group_size: neighbouring channels that share a range; None for all.
    """

    def __init__(self, scale: Tensor, zero_point: Tensor, weights: Tensor, bits: int, group_size: int | None):
        super().__init__()
        self.log_scale = nn.Parameter(scale.log())
        self.zero_point = nn.Parameter(zero_point.clone())
        self.register_buffer("weights", weights.float())
        self.bits, self.group_size = bits, group_size

    def table(self) -> tuple[Tensor, Tensor]:
        """Scale and whole zero point after smoothing, ``(timesteps, token states, channel groups)``."""
        scale = torch.tensordot(self.weights, self.log_scale.exp(), 1).clamp(min=SMALLEST_SCALE)
        return scale, _round(torch.tensordot(self.weights, self.zero_point, 1))

    def forward(self, x: Tensor, is_masked: Tensor, timestep: Tensor) -> Tensor:
        """Quantize and dequantize ``x (..., channels)``; ``is_masked`` and ``timestep`` have its leading shape."""
        state = is_masked.long() if self.log_scale.shape[1] == 2 else torch.zeros_like(timestep)
        scale, zero_point = (values[timestep, state] for values in self.table())  # (..., channel groups)
        if scale.shape[-1] > 1:
            scale, zero_point = (
                p.repeat_interleave(self.group_size, -1)[..., : x.shape[-1]] for p in (scale, zero_point)
            )
        codes = (_round(x / scale) + zero_point).clamp(0, 2**self.bits - 1)
        return (codes - zero_point) * scale

    def roughness(self) -> Tensor:
        """The Markov term: squared steps from one time group to the next, summed.

        Steps are those that the Markov score counts: of the scale relative to itself (of its logarithm, which for
        small steps is the same), of the zero point as a share of the codes.
        """
        scales, zero_points = self.log_scale.diff(dim=0), self.zero_point.diff(dim=0) / (2**self.bits - 1)
        return scales.square().sum() + zero_points.square().sum()

    def rates(self, lr: float) -> dict[nn.Parameter, float]:
        """Learning rates: scales move relatively, zero points by codes, ten times as fast."""
        return {self.log_scale: lr, self.zero_point: 10 * lr}

    @torch.no_grad()
    def params(self, groups: TimeGroups) -> list[TimeGroupParams]:
        """The time groups' parameters before smoothing."""
        return [
            TimeGroupParams(time_range, scale.clone(), zero_point.clone())
            for time_range, scale, zero_point in zip(groups.ranges, self.log_scale.exp(), self.zero_point, strict=True)
        ]


def output_error(ranges: TrainableRanges, sample: InputSample, weight: Tensor) -> float:
    """Squared error of the layers' outputs on a sample, relative to their energy.

    Args:
        ranges: the ranges of the input.
        sample: the inputs.
        weight: the weights of all layers with this input, ``(out_features, channels)``.
    """
    with torch.no_grad():
        error = (ranges(sample.x, sample.is_masked, sample.timestep) - sample.x) @ weight.T
        return float(error.square().sum() / (sample.x @ weight.T).square().sum())


def descent(
    rates: Mapping[nn.Parameter, float], steps: int
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LinearLR]:
    """Adam with learning rates, one a parameter, that fall linearly to zero."""
    groups = [
        {"params": [p for p, own in rates.items() if own == rate], "lr": rate} for rate in sorted(set(rates.values()))
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)


def fit_to_output(
    ranges: TrainableRanges, sample: InputSample, weight: Tensor, *, steps: int, batch: int, lr: float, seed: int
) -> None:
    """Refine ranges, in place, for least squared error of the layers' outputs.

    Args:
        ranges: the ranges of the input.
        sample: the inputs.
        weight: the weights of all layers with this input, ``(out_features, channels)``.
        steps: Adam steps, the learning rate falling linearly to zero.
        batch: tokens a step.
        lr: learning rate at the start.
        seed: seeds the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    gram = weight.T @ weight
    values, vectors = torch.linalg.eigh(gram.double())
    root = (vectors * values.clamp(min=0).sqrt()).float()  # (e @ root).square().sum() = |weight e|^2
    energy = (sample.x @ root).square().sum(-1).mean()
    optimizer, schedule = descent(ranges.rates(lr), steps)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(sample.x), (min(batch, len(sample.x)),), generator=generator)
            x = sample.x[rows]
            error = (ranges(x, sample.is_masked[rows], sample.timestep[rows]) - x) @ root
            optimizer.zero_grad(set_to_none=True)
            (error.square().sum(-1).mean() / energy).backward()
            optimizer.step()
            schedule.step()

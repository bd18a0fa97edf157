"""What the ranges of activations depend on: their variance, split into layer, time, token state, token and channel.

A number is the logarithm of the range (largest minus smallest number) of a group of channels of one token at the input
of a linear. The split is by sums of squares, one after the other: between the layers; inside a layer between the
timesteps, the token's states at a timestep, the tokens of a state, the groups of channels, and the rest, which tokens
and channels make together. Beside it stands what time and token state explain, each alone, of the range of a whole
token, which is what one static range for all channels has to cover. A granularity can help a range no more than its
share allows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thermo_lib.diffusion.inputs import run_states, shared_inputs
from thermo_lib.diffusion.states import Calibration
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.model import linear_names

FACTORS = ("layer", "time", "token state", "token", "channel", "token and channel")
INSIDE = FACTORS[1:]
_GROUPS = 16  # of channels
_SMALLEST = 1e-8  # a range of zero has no logarithm


def log_ranges(x: Tensor, groups: int = _GROUPS) -> Tensor:
    """Log ranges of groups of neighbouring channels.

    Args:
        x: inputs ``(tokens, channels)``.
        groups: number of groups, 1 for the range of the whole token; channels that can't be divided equally are left
            out at the end.

    Returns:
        float64 ``(tokens, groups)``, natural logarithms.
    """
    size = x.shape[1] // groups
    parts = x[:, : groups * size].unflatten(1, (groups, size)).double()
    return (parts.amax(-1) - parts.amin(-1)).clamp(min=_SMALLEST).log()


def split(values: Tensor, timestep: Tensor, is_masked: Tensor) -> dict[str, float]:
    """Sums of squares of one layer's log ranges by factor, in the order of ``INSIDE``; they add up to all of it.

    Args:
        values: ``(tokens, groups)``.
        timestep: int64 ``(tokens,)``.
        is_masked: bool ``(tokens,)``.
    """
    groups, mean = values.shape[1], values.mean()
    of_token = values.mean(1)
    of_time = _means(of_token, timestep)
    of_state = _means(of_token, 2 * timestep + is_masked)
    of_channel = values.mean(0)
    found = {
        "time": groups * (of_time - mean).square().sum(),
        "token state": groups * (of_state - of_time).square().sum(),
        "token": groups * (of_token - of_state).square().sum(),
        "channel": len(values) * (of_channel - mean).square().sum(),
        "token and channel": (values - of_token[:, None] - of_channel + mean).square().sum(),
    }
    return {name: float(total) for name, total in found.items()}


def explained(values: Tensor, kind: Tensor) -> float:
    """Share of the variance of ``values (n,)`` that lies between the kinds ``(n,)``, whole numbers from 0."""
    about = values - values.mean()
    return float(_means(about, kind).square().sum() / about.square().sum())


def _means(values: Tensor, kind: Tensor) -> Tensor:
    """Each value's mean over all values of its kind, ``(values,)``."""
    count = torch.zeros(int(kind.max()) + 1, dtype=values.dtype)
    total = count.clone().index_add_(0, kind, values)
    count.index_add_(0, kind, torch.ones_like(values))
    return (total / count.clamp(min=1))[kind]


def variance_shares(lm: DiffusionLM, calibration: Calibration) -> dict[str, Any]:
    """The shares of the factors in the variance of a model's log ranges.

    Args:
        lm: the model, full precision.
        calibration: the states.

    Returns:
        ``shares``: factor of ``FACTORS`` to its share of the variance over all layers, 0-1, which add up to 1;
        ``layers``: the first linear of each input to the shares of ``INSIDE`` in that layer's variance; and ``tokens``:
        the same to what ``time`` and ``token state`` explain of the variance of whole tokens' log ranges, each alone.
    """
    names = [names[0] for names in shared_inputs(lm, linear_names(lm.model))]
    seen: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in names}

    def receive(name: str, x: Tensor, is_masked: Tensor, timestep: int) -> None:
        about = torch.full((len(x),), timestep), is_masked.cpu()
        seen[name].append((log_ranges(x).cpu(), log_ranges(x, 1).squeeze(1).cpu(), *about))

    run_states(lm, calibration, names, receive)
    inside, tokens, means, counts = {}, {}, [], []
    for name in names:
        values, whole, timestep, is_masked = (torch.cat(part) for part in zip(*seen.pop(name), strict=True))
        inside[name] = split(values, timestep, is_masked)
        tokens[name] = {"time": explained(whole, timestep), "token state": explained(whole, is_masked.long())}
        means.append(values.mean())
        counts.append(values.numel())
    mean, count = torch.stack(means), torch.tensor(counts, dtype=torch.float64)
    between = float((count * (mean - (count * mean).sum() / count.sum()).square()).sum())
    totals = {"layer": between} | {f: sum(found[f] for found in inside.values()) for f in INSIDE}
    layers = {name: _shares(found) for name, found in inside.items()}
    return {"shares": _shares(totals), "layers": layers, "tokens": tokens}


def _shares(totals: Mapping[str, float]) -> dict[str, float]:
    return {name: total / sum(totals.values()) for name, total in totals.items()}

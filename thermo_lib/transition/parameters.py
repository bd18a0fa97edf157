"""Quantization parameters that can be trained, and a model that computes with them.

Rounding passes gradients straight through (LSQ, arXiv 1902.08153; with zero points as in LSQ+, arXiv 2004.09576)."""

from collections.abc import Callable, Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thermo_lib.models.lm import DiffusionLM
from thermo_lib.quant.calls import CALL
from thermo_lib.quant.codes import dequantize, pack, storable
from thermo_lib.quant.layers import QuantizedLinear
from thermo_lib.quant.limits import SMALLEST_SCALE
from thermo_lib.time_aware.groups import TimeGroupParams, TimeGroups


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

    Scales are trained by their logarithms. One that hasn't moved is where it started to the last bit: processors differ
    in ``exp`` and ``log``.
    """

    weights: Tensor
    start: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, weights: Tensor, bits: int, group_size: int | None):
        super().__init__()
        self.log_scale = nn.Parameter(scale.log())
        self.zero_point = nn.Parameter(zero_point.clone())
        self.register_buffer("weights", weights.float().to(scale.device))
        self.register_buffer("start", torch.stack([scale, scale.log()]), persistent=False)
        self.bits, self.group_size = bits, group_size

    def scale(self) -> Tensor:
        """The scales before smoothing, ``(time groups, token states, channel groups)``."""
        scale, log_scale = self.start
        return scale * (self.log_scale - log_scale).exp()

    def table(self) -> tuple[Tensor, Tensor]:
        """Scale and whole zero point after smoothing, ``(timesteps, token states, channel groups)``."""
        scale = torch.tensordot(self.weights, self.scale(), 1).clamp(min=SMALLEST_SCALE)
        return scale, _round(torch.tensordot(self.weights, self.zero_point, 1))

    def forward(self, x: Tensor, is_masked: Tensor, timestep: Tensor) -> Tensor:
        """Quantize and dequantize ``x (..., channels)``; ``is_masked`` and ``timestep`` have its leading shape."""
        state = is_masked.long() if self.log_scale.shape[1] == 2 else torch.zeros_like(timestep)
        scale, zero_point = (values[timestep, state] for values in self.table())  # (..., channel groups)
        if scale.shape[-1] > 1:
            assert self.group_size is not None  # of several groups
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
            for time_range, scale, zero_point in zip(groups.intervals, self.scale(), self.zero_point, strict=True)
        ]


class TrainableWeight(nn.Module):
    """A quantized weight whose scales and zero points, and perhaps codes, are trainable.

    Args:
        layer: the quantized linear; its weight parameters don't depend on the timestep.
        target: the full-precision weight, ``(out_features, in_features)``, to learn the codes too: they start where
            they are, the nearer to the next code the further the weight is on its side. None keeps the codes.
        holds_codes: hold codes that aren't learned as float32, which takes four bytes a weight and saves the time to
            unpack them at every use.
    """

    def __init__(self, layer: QuantizedLinear, target: Tensor | None = None, *, holds_codes: bool = True):
        super().__init__()
        self.bits, self.group_size = layer.bits, layer.group_size
        self.log_scale = nn.Parameter(layer.scale[0].float().log())
        self.zero_point = nn.Parameter(layer.zero_point[0].float(), requires_grad=layer.has_zero_point)
        self.position: Tensor | nn.Parameter | None = None
        self._unpacked = layer.codes
        if target is None:
            self.position = layer.codes().float() if holds_codes else None
        else:
            codes = layer.codes().float()
            scale, zero_point = (
                p[0].float().repeat_interleave(min(self.group_size, layer.in_features), 1)[:, : layer.in_features]
                for p in (layer.scale, layer.zero_point)
            )
            wanted = target.float() / scale + zero_point
            self.position = nn.Parameter(torch.clamp(wanted, codes - _INSIDE, codes + _INSIDE))

    @property
    def learns_codes(self) -> bool:
        """Whether the codes are trained."""
        return isinstance(self.position, nn.Parameter)

    def codes(self) -> Tensor:
        """As the layer's; trained ones are whole up to rounding errors, float32 ``(out_features, in_features)``."""
        position = self.position
        if isinstance(position, nn.Parameter):
            return straight_through(position.clamp(-_INSIDE, 2**self.bits - 1 + _INSIDE), torch.round)
        return self._unpacked().float() if position is None else position

    def forward(self) -> Tensor:
        """The weight, float32 ``(out_features, in_features)``."""
        return dequantize(self.codes(), self.log_scale.exp(), self.zero_point, self.group_size)

    @torch.no_grad()
    def packed(self) -> Tensor | None:
        """The codes as they are stored, None where they weren't trained."""
        if not self.learns_codes:
            return None
        return pack(self.codes().round().to(torch.uint8), self.bits, self.group_size)

    @torch.no_grad()
    def stored(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as they are stored, float16 ``(out_features, groups)``."""
        return storable(self.log_scale.exp(), self.zero_point)


class FixedWeight(nn.Module):
    """A quantized weight that isn't trained, dequantized once: four bytes a weight save the time at every use.

    Args:
        layer: the quantized linear; its weight parameters don't depend on the timestep.
    """

    weight: Tensor

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        self.register_buffer("weight", layer.weight().detach())

    def forward(self) -> Tensor:
        """The weight, float32 ``(out_features, in_features)``."""
        return self.weight


_INSIDE = 0.49  # how far a code's position may be from the code


class _TrainableLinear(nn.Module):
    """Stands for a quantized linear while its parameters are trained."""

    def __init__(
        self, layer: QuantizedLinear, ranges: TrainableRanges | None, weight: "TrainableWeight | FixedWeight | None"
    ):
        super().__init__()
        self.layer, self.ranges, self.weight = layer, ranges, weight

    def forward(self, x: Tensor) -> Tensor:
        if self.ranges is not None:
            assert CALL.rows is not None  # a call that trains ranges says the timestep of each row
            timestep, timesteps = CALL.rows
            step = timestep * len(self.layer.row_of_step) // timesteps  # a layer's table may be for another number
            x = self.ranges(x, CALL.is_masked, step[:, None].expand(x.shape[:-1]))
        elif self.layer.input_quantizer is not None:
            x = straight_through(x, self.layer.input_quantizer)
        return F.linear(x, self.layer.weight() if self.weight is None else self.weight(), self.layer.bias)


class TrainableLayers:
    """While it is entered (``with``), a quantized model computes with trainable quantization parameters.

    Args:
        quantized: the model.
        ranges: layer name to the static ranges of its input; layers that share an input share the object. None of
            them where activations aren't quantized, or dynamically.
        weights: layer name to its weight; the other layers' are dequantized at every use.

    Time-aware norms need no place here: while their parameters have gradients they compute with them.
    """

    def __init__(
        self,
        quantized: DiffusionLM,
        ranges: Mapping[str, TrainableRanges],
        weights: Mapping[str, "TrainableWeight | FixedWeight"],
    ):
        self.quantized = quantized
        self.layers = {n: m for n, m in quantized.model.named_modules() if isinstance(m, QuantizedLinear)}
        self.trained = {n: _TrainableLinear(m, ranges.get(n), weights.get(n)) for n, m in self.layers.items()}

    def __enter__(self) -> Self:
        self._put(self.trained)
        return self

    def __exit__(self, *_: object) -> None:
        self._put(self.layers)

    def _put(self, layers: Mapping[str, nn.Module]) -> None:
        for name, layer in layers.items():
            self.quantized.model.set_submodule(name, layer)

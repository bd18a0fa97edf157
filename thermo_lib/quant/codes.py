"""Low-bit weight quantization: codes, packing, the weight quantizers and the quantized linear layer.

A weight ``w`` has the code ``q = clamp(round(w / scale + zero_point), 0, 2^bits - 1)`` and the value
``(q - zero_point) * scale``; ``scale`` and ``zero_point`` belong to a group of ``group_size`` neighbours along
the input dimension and are stored as float16. A row's last group may be shorter than the others.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from thermo_lib.quant import planes
from thermo_lib.quant.limits import LARGEST, LARGEST_ZERO_POINT, SMALLEST_SCALE

BIT_WIDTHS = (2, 4, 8)


def pack(codes: Tensor, bits: int, group_size: int = 1) -> Tensor:
    """Pack codes along the last dimension.

    Where a group fills whole bytes and every group is whole, its codes lie plane by plane: of ``w`` bytes, byte ``j``
    holds the group's codes ``j``, ``j + w``, ``j + 2 w``, ..., the first in the lowest bits, so that unpacking by
    shifts and masks gives runs of neighbours. Otherwise a byte holds neighbours, as with ``w = 1``.

    A group that is wider than the row isn't whole, so its bytes hold neighbours. What computes with groups takes it for
    as wide as the row; here it must stay as it is, or the bytes would lie otherwise than in the folders that exist.

    Args:
        codes: uint8 ``(..., n)`` with values below ``2**bits``.
        bits: 2, 4 or 8: four, two or one code a byte.
        group_size: codes of a group; may be more than ``n``.

    Returns:
        uint8 ``(..., ceil(n * bits / 8))``; unused bits of the last byte are zero.
    """
    check_bits(bits)
    per_byte, count = 8 // bits, codes.shape[-1]
    width = planes.width(count, bits, group_size) or 1
    lanes = F.pad(codes, (0, -count % per_byte)).unflatten(-1, (-1, per_byte, width))
    packed = lanes[..., 0, :].clone()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane, :] << lane * bits
    return packed.flatten(-2)


def unpack(packed: Tensor, bits: int, count: int, group_size: int = 1) -> Tensor:
    """The inverse of ``pack``: uint8 ``(..., count)``."""
    check_bits(bits)
    width = planes.width(count, bits, group_size) or 1
    shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8)[:, None] * bits
    lanes = (packed.unflatten(-1, (-1, 1, width)) >> shifts) & (2**bits - 1)
    return lanes.flatten(-3)[..., :count]


def check_bits(bits: int) -> None:
    if bits not in BIT_WIDTHS:
        raise ValueError(f"bits: found {bits}, allowed are {', '.join(map(str, BIT_WIDTHS))}")


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix as codes and the parameters of its groups.

    Attributes:
        codes: uint8 ``(out_features, in_features)``.
        scale: float16 ``(out_features, groups)``, positive.
        zero_point: float16 ``(out_features, groups)``.
        bits: bits of a code.
        group_size: weights of a group; ``groups = ceil(in_features / group_size)``. It may be more than
            ``in_features``: ``pack`` needs it as it was asked for.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int

    def dequantize(self) -> Tensor:
        """The quantized weight, float32 ``(out_features, in_features)``."""
        return dequantize(self.codes, self.scale, self.zero_point, self.group_size)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    """``(codes - zero_point) * scale`` in float32.

    Args:
        codes: ``(out_features, in_features)``, whole numbers or others.
        scale, zero_point: ``(out_features, ceil(in_features / group_size))``.
        group_size: weights that share a scale; a group beyond the row is the row.
    """
    in_features = codes.shape[-1]
    group_size = min(group_size, in_features)
    padded = F.pad(codes, (0, -in_features % group_size)) if in_features % group_size else codes
    grouped = padded.unflatten(-1, (-1, group_size)).float()
    weight = (grouped - zero_point.float()[..., None]) * scale.float()[..., None]
    return weight.flatten(-2)[..., :in_features]


def quantize_codes(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """``clamp(round(w / scale + zero_point), 0, 2^bits - 1)``; ``scale`` and ``zero_point`` broadcast to ``weight``."""
    return (weight / scale).add_(zero_point).round_().clamp_(0, 2**bits - 1)


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Raise ValueError unless the weight is a non-empty finite matrix that float16 parameters can describe."""
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"{name}: found shape {tuple(weight.shape)}, expected (out_features, in_features)")
    low, high = weight.aminmax()
    largest = torch.maximum(-low, high)  # NaN if there is any
    if not largest.isfinite():
        raise ValueError(f"{name}: found NaN or infinity, expected finite numbers")
    if largest > LARGEST:
        raise ValueError(f"{name}: found |w| = {largest:.3g}, allowed is at most {LARGEST:.0f} (float16 scales)")


def storable(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point as float16, inside what it can hold."""
    scale = scale.clamp(SMALLEST_SCALE, LARGEST).to(torch.float16)
    return scale, zero_point.clamp(-LARGEST_ZERO_POINT, LARGEST_ZERO_POINT).to(torch.float16)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize activations; ``scale`` and ``zero_point`` broadcast to ``x``.

    Returns:
        As ``x``, and of its dtype. It is computed in float32 at least: steps are lost in bfloat16 and float16.
    """
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    found = quantize_codes(precise, scale, zero_point, bits).sub_(zero_point).mul_(scale)
    if found.dtype == x.dtype:
        return found
    limits = torch.finfo(x.dtype)  # half a step beyond the largest float16 would be infinite
    return found.clamp_(limits.min, limits.max).to(x.dtype)


def fake_quantize_per_token(x: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """Quantize and dequantize each token in its own min-max range, times ``clip`` (dynamic ranges, nothing stored).

    Args:
        x: ``(..., channels)``.
        bits: of a code.
        clip: share of the way from zero to the token's extremes.

    Returns:
        As ``x``, and of its dtype; ranges are float32 at least, since one in float16 may be wider than its largest
        number.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    low, high = (extreme.to(precise) for extreme in (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)))
    low, high = clip * low.clamp(max=0), clip * high.clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=SMALLEST_SCALE)
    return fake_quantize(x, scale, (-low / scale).round(), bits)

"""Weight quantizers that need no data: round to nearest, and least squared weight error in each group."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thermo_lib.quant.codes import QuantizedWeight, check_bits, check_weight, quantize_codes, storable
from thermo_lib.quant.limits import SMALLEST_SCALE


def minmax_parameters(weight: Tensor, bits: int, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and rounded zero point of each row that span ``shrink`` times its range, zero included.

    Zero is always inside, so a row of equal weights is represented exactly (up to the scale's float16).

    Args:
        weight: float32 ``(rows, group)``.
        bits: bits of a code.
        shrink: share of the range that is kept; what lies outside is clipped.

    Returns:
        ``(scale, zero_point)``, float16 ``(rows, 1)``.
    """
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    span = (high - low) * shrink
    scale = torch.where(span > 0, span / (2**bits - 1), 1.0).clamp(min=SMALLEST_SCALE)
    return storable(scale, (-low * shrink / scale).round())


def least_squares_parameters(weight: Tensor, bits: int, iterations: int = 8) -> tuple[Tensor, Tensor]:
    """Scale and (real) zero point of each row for least squared error of its weights, as ``gptq`` starts from.

    From each of several clipped ranges, alternate between rounding to codes and the linear regression of the
    weights on their codes, as in Lloyd's algorithm with equally spaced levels; keep the best seen.

    Args:
        weight: float32 ``(rows, group)``.
        bits: bits of a code.
        iterations: alternations from each start.

    Returns:
        ``(scale, zero_point)``, float16 ``(rows, 1)``.
    """
    best_scale, best_zero = minmax_parameters(weight, bits)
    best_error = torch.full_like(best_scale, torch.inf, dtype=torch.float32)
    mean = weight.mean(1, keepdim=True)
    for shrink in (1.0, 0.85, 0.7, 0.55):
        scale, zero = minmax_parameters(weight, bits, shrink)
        for _ in range(iterations):
            codes = quantize_codes(weight, scale.float(), zero.float(), bits)
            error = ((codes - zero.float()) * scale.float() - weight).square().sum(1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
            centered = codes - codes.mean(1, keepdim=True)
            variance = centered.square().sum(1, keepdim=True)
            slope = (centered * weight).sum(1, keepdim=True) / variance.clamp(min=1e-12)
            usable = (variance > 0) & (slope > SMALLEST_SCALE)
            fitted = torch.where(usable, slope, scale.float())
            offset = torch.where(usable, codes.mean(1, keepdim=True) - mean / fitted, zero.float())
            scale, zero = storable(fitted, offset)
    return best_scale, best_zero


_SHRINK = {2: 0.65, 4: 0.9, 8: 1.0}  # of the range, to start from
_STEPS = (1.5, 1.5, 1.0)  # as multiples of an alternation's: two that go further save another
_USUAL = 0.08, 0.14  # squared error of a wide group at 2 bits, as a share of its variance
_WIDE = 128


def _round(weight: Tensor, bits: int, codes: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    """Min-max parameters; like ``_fit``."""
    scale, zero_point = minmax_parameters(weight, bits)
    _encode(weight, scale, zero_point, bits, codes)
    return scale, zero_point


def _fit(weight: Tensor, bits: int, codes: Tensor, centered: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters of each row for least squared error, over twenty times as fast as ``least_squares_parameters``.

    A few of its alternations from a single start, the range shrunk towards the mean as it ends best at that precision.
    Min-max parameters take the place of these where they are better. At 2 bits in wide groups that is rare, so there
    only rows with an error that isn't a usual one are looked at.

    Args:
        weight: float32 ``(rows, group)``.
        bits: of a code.
        codes: as large, takes the codes.
        centered, work: as large, overwritten.

    Returns:
        ``(scale, zero_point)``, float16 ``(rows, 1)``.
    """
    mean = weight.mean(1, keepdim=True)
    torch.sub(weight, mean, out=centered)
    low, high = centered.amin(1, keepdim=True), centered.amax(1, keepdim=True)
    scale = ((high - low) * (_SHRINK[bits] / (2**bits - 1))).clamp(min=SMALLEST_SCALE)
    level = -low * _SHRINK[bits] / scale  # the code of the mean
    for step in _STEPS:
        _encode(centered, scale, level, bits, codes)
        total = codes.sum(1, keepdim=True)
        mean_code = total / weight.shape[1]
        covariance = torch.mul(codes, centered, out=work).sum(1, keepdim=True)
        variance = _squares(codes) - total * mean_code
        fitted = torch.where(variance > 1e-4, covariance / variance, scale)
        scale = torch.lerp(scale, fitted, step).clamp(min=fitted / 2)
        level = torch.lerp(level, mean_code, step)
    stored = storable(scale, level - mean / scale)
    _encode(weight, *stored, bits, codes)
    if bits > 2 or weight.shape[1] < _WIDE:
        return _better_of(stored, weight, bits, codes, centered, work)
    error = 1 - covariance.square() / (variance * _squares(centered))
    least, most = _USUAL
    rows = (~((error > least) & (error < most))).flatten().nonzero().flatten()  # NaN, of equal weights, isn't usual
    found = codes[rows]
    better = _better_of([p[rows] for p in stored], weight[rows], bits, found, centered[: len(rows)], work[: len(rows)])
    codes[rows] = found
    for parameter, value in zip(stored, better, strict=True):
        parameter[rows] = value
    return stored


def _better_of(
    fitted: Sequence[Tensor], weight: Tensor, bits: int, codes: Tensor, other: Tensor, work: Tensor
) -> tuple[Tensor, Tensor]:
    """The given scale and zero point of each row or its min-max ones, whichever have less squared error.

    ``codes`` are those of ``fitted``, and are changed with them; ``other`` and ``work``, as large, are overwritten.
    """
    spanned = minmax_parameters(weight, bits)
    _encode(weight, *spanned, bits, other)
    errors = []
    for (scale, zero_point), found in ((fitted, codes), (spanned, other)):
        difference = torch.sub(found, zero_point.float(), out=work).mul_(scale.float()).sub_(weight)
        errors.append(torch.linalg.vector_norm(difference, dim=1, keepdim=True))
    better = ~(errors[0] <= errors[1])
    rows = better.flatten().nonzero().flatten()
    codes[rows] = other[rows]
    scale, zero_point = (torch.where(better, b, a) for a, b in zip(fitted, spanned, strict=True))
    return scale, zero_point


def _squares(x: Tensor) -> Tensor:
    """The sum of squares of each row, ``(rows, 1)``."""
    return torch.linalg.vector_norm(x, dim=1, keepdim=True).square()


def _encode(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, out: Tensor) -> None:
    """``quantize_codes`` into ``out``."""
    torch.div(weight, scale.float(), out=out).add_(zero_point.float()).round_().clamp_(0, 2**bits - 1)


_AT_A_TIME = 2**20  # weights that are quantized together: what is computed of them stays in the processor's cache
_Rule = Callable[[Tensor, int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _by_groups(weight: Tensor, bits: int, group_size: int, rule: _Rule) -> QuantizedWeight:
    whole = weight.shape[1] - weight.shape[1] % group_size
    parts = [part for part in weight.tensor_split([whole], dim=1) if part.shape[1]]
    found = [_each_group(part, bits, group_size, rule) for part in parts]
    tensors = found[0] if len(found) == 1 else [torch.cat(pair, dim=1) for pair in zip(*found, strict=True)]
    codes, scale, zero_point = tensors
    return QuantizedWeight(codes, scale, zero_point, bits, group_size)


def _each_group(weight: Tensor, bits: int, group_size: int, rule: _Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point of groups that are all as wide, or of a single narrower one."""
    groups = weight.reshape(-1, min(group_size, weight.shape[1]))
    codes = torch.empty_like(groups, dtype=torch.uint8)
    scale, zero_point = (groups.new_empty((len(groups), 1), dtype=torch.float16) for _ in range(2))
    step = min(max(1, _AT_A_TIME // groups.shape[1]), len(groups))
    # Five rows apart: buffers whose distance is a power of two get in each other's way in the processor's cache.
    buffers = groups.new_empty((4, step + 5, groups.shape[1]), dtype=torch.float32)
    for start in range(0, len(groups), step):
        rows = slice(start, start + step)
        block, found, *work = buffers[:, : len(groups[rows])]
        scale[rows], zero_point[rows] = rule(block.copy_(groups[rows]), bits, found, *work)
        codes[rows] = work[0].view(torch.int32).copy_(found)  # to bytes by way of whole numbers, which is faster
    return codes.view(weight.shape), scale.view(len(weight), -1), zero_point.view(len(weight), -1)


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Round to nearest in each group's min-max range, the baseline that needs no data.

    Args:
        weight: ``(out_features, in_features)``.
        bits: 2, 4 or 8.
        group_size: weights that share scale and zero point.

    Raises:
        ValueError: NaN, infinity, wrong shape or bits.
    """
    check_bits(bits)
    check_weight(weight)
    return _by_groups(weight, bits, group_size, _round)


def least_squares(weight: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Scale and zero point of each group for least squared weight error; arguments as ``round_to_nearest``."""
    check_bits(bits)
    check_weight(weight)
    return _by_groups(weight, bits, group_size, _fit)

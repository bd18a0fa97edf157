"""Low-bit weight quantization: codes, packing, the weight quantizers and the quantized linear layer.

A weight ``w`` has the code ``q = clamp(round(w / scale + zero_point), 0, 2^bits - 1)`` and the value
``(q - zero_point) * scale``; ``scale`` and ``zero_point`` belong to a group of ``group_size`` neighbours along
the input dimension and are stored as float16. A row's last group may be shorter than the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thermo_lib import planes

BIT_WIDTHS = (2, 4, 8)
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
LARGEST = 65504.0  # the largest float16
LARGEST_ZERO_POINT = 1024.0  # up to here float16 resolves a zero point to half a code or better


def pack(codes: Tensor, bits: int, group_size: int = 1) -> Tensor:
    """Pack codes along the last dimension.

    Where a group fills whole bytes and every group is whole, its codes lie plane by plane: of ``w`` bytes, byte ``j``
    holds the group's codes ``j``, ``j + w``, ``j + 2 w``, ..., the first in the lowest bits, so that unpacking by
    shifts and masks gives runs of neighbours. Otherwise a byte holds neighbours, as with ``w = 1``.

    Args:
        codes: uint8 ``(..., n)`` with values below ``2**bits``.
        bits: 2, 4 or 8: four, two or one code a byte.
        group_size: codes of a group.

    Returns:
        uint8 ``(..., ceil(n * bits / 8))``; unused bits of the last byte are zero.
    """
    _check_bits(bits)
    per_byte, count = 8 // bits, codes.shape[-1]
    width = planes.width(count, bits, group_size) or 1
    lanes = F.pad(codes, (0, -count % per_byte)).unflatten(-1, (-1, per_byte, width))
    packed = lanes[..., 0, :].clone()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane, :] << lane * bits
    return packed.flatten(-2)


def unpack(packed: Tensor, bits: int, count: int, group_size: int = 1) -> Tensor:
    """The inverse of ``pack``: uint8 ``(..., count)``."""
    _check_bits(bits)
    width = planes.width(count, bits, group_size) or 1
    shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8)[:, None] * bits
    lanes = (packed.unflatten(-1, (-1, 1, width)) >> shifts) & (2**bits - 1)
    return lanes.flatten(-3)[..., :count]


def _check_bits(bits: int) -> None:
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
        group_size: weights of a group; ``groups = ceil(in_features / group_size)``.
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
        group_size: weights that share a scale.
    """
    in_features = codes.shape[-1]
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
    fitted = storable(scale, level - mean / scale)
    _encode(weight, *fitted, bits, codes)
    if bits > 2 or weight.shape[1] < _WIDE:
        return _better_of(fitted, weight, bits, codes, centered, work)
    error = 1 - covariance.square() / (variance * _squares(centered))
    least, most = _USUAL
    rows = (~((error > least) & (error < most))).flatten().nonzero().flatten()  # NaN, of equal weights, isn't usual
    found = codes[rows]
    better = _better_of([p[rows] for p in fitted], weight[rows], bits, found, centered[: len(rows)], work[: len(rows)])
    codes[rows] = found
    for parameter, value in zip(fitted, better, strict=True):
        parameter[rows] = value
    return fitted


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
    return QuantizedWeight(*tensors, bits, group_size)


def _each_group(weight: Tensor, bits: int, group_size: int, rule: _Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point of groups that are all as wide, or of a single narrower one."""
    groups = weight.reshape(-1, min(group_size, weight.shape[1]))
    codes = torch.empty(groups.shape, dtype=torch.uint8)
    scale, zero_point = (torch.empty((len(groups), 1), dtype=torch.float16) for _ in range(2))
    step = min(max(1, _AT_A_TIME // groups.shape[1]), len(groups))
    # Five rows apart: buffers whose distance is a power of two get in each other's way in the processor's cache.
    buffers = torch.empty((4, step + 5, groups.shape[1]))
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
    _check_bits(bits)
    check_weight(weight)
    return _by_groups(weight, bits, group_size, _round)


def least_squares(weight: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Scale and zero point of each group for least squared weight error; arguments as ``round_to_nearest``."""
    _check_bits(bits)
    check_weight(weight)
    return _by_groups(weight, bits, group_size, _fit)


def gptq(weight: Tensor, hessian: Tensor, bits: int, group_size: int, damping: float, ridge: float) -> QuantizedWeight:
    """GPTQ (arXiv 2210.17323, algorithm 1): quantize column by column and push each column's error onto the rest.

    Each group's scale and zero point are fitted by least squares when its first column is reached; at the end
    they are refitted for the finished codes under the same Hessian (``refit``).

    Args:
        weight: ``(out_features, in_features)``.
        hessian: ``sum x x^T`` over the calibration inputs, ``(in_features, in_features)``.
        bits: 2, 4 or 8.
        group_size: weights that share scale and zero point.
        damping: share of the mean diagonal that is added to the diagonal.
        ridge: see ``refit``.

    Raises:
        ValueError: NaN, infinity, or a Hessian of another size than the weight's rows.
    """
    _check_bits(bits)
    check_weight(weight)
    check_hessian(hessian, weight.shape[1])
    quantized = _column_by_column(weight, inverse_factor(hessian, damping), bits, group_size)
    return refit(weight, quantized, hessian, ridge)


def _column_by_column(weight: Tensor, Hinv: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """The loop of ``gptq``; ``Hinv`` as ``inverse_factor`` gives it."""
    W = weight.double().clone()
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    scales, zeros = [], []
    for start in range(0, W.shape[1], group_size):
        stop = min(start + group_size, W.shape[1])
        scale, zero = least_squares_parameters(W[:, start:stop].float(), bits)
        scales.append(scale)
        zeros.append(zero)
        s, z = scale[:, 0].double(), zero[:, 0].double()
        Err = torch.zeros((len(W), stop - start), dtype=torch.float64)
        for column in range(start, stop):
            q = quantize_codes(W[:, column], s, z, bits)
            codes[:, column] = q.to(torch.uint8)
            Err[:, column - start] = (W[:, column] - (q - z) * s) / Hinv[column, column]
            W[:, column:stop] -= Err[:, column - start, None] * Hinv[column, column:stop]
        W[:, stop:] -= Err @ Hinv[start:stop, stop:]
    return QuantizedWeight(codes, torch.cat(scales, 1), torch.cat(zeros, 1), bits, group_size)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, ``Hinv`` in GPTQ's algorithm, float64.

    Args:
        hessian: ``sum x x^T``, ``(in_features, in_features)``.
        damping: share of the mean diagonal that is added to the diagonal.
    """
    # By columns, as LAPACK has it, so that each step is in place.
    H = torch.empty_like(hessian, dtype=torch.float64).mT.copy_(hessian)
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that is always zero: its weight doesn't matter
    diagonal += damping * diagonal.mean()
    torch.linalg.cholesky(H, out=H)
    torch.cholesky_inverse(H, out=H)
    return torch.linalg.cholesky(H, upper=True, out=H)


def check_hessian(hessian: Tensor, in_features: int) -> None:
    """Raise ValueError unless the Hessian is finite and fits the weight."""
    if hessian.shape != (in_features, in_features):
        raise ValueError(f"hessian: found shape {tuple(hessian.shape)}, expected ({in_features}, {in_features})")
    if not hessian.isfinite().all():
        raise ValueError("hessian: found NaN or infinity in the calibration inputs, expected finite numbers")


_REFITTED = 2**28  # numbers of a matrix (rows, in_features, groups) that is held at a time


def refit(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, ridge: float) -> QuantizedWeight:
    """Scale and zero point of least output error for fixed codes, in closed form.

    A row is linear in ``scale`` and ``offset = -scale * zero_point`` of its groups, so the squared output error
    ``(w - D theta)^T H (w - D theta)`` has its minimum at the solution of one small linear system a row.

    Args:
        weight: the full-precision weight, ``(out_features, in_features)``.
        quantized: its codes, with the parameters to start from.
        hessian: ``sum x x^T``, ``(in_features, in_features)``.
        ridge: pull towards the starting parameters, as a share of the system's mean diagonal.

    Returns:
        The same codes with new parameters; a group whose refitted scale isn't positive keeps its old ones, and so
        does a row whose error would grow.
    """
    check_hessian(hessian, weight.shape[1])
    groups = quantized.scale.shape[1]
    pad = groups * quantized.group_size - weight.shape[1]
    H = F.pad(hessian.double(), (0, pad, 0, pad)) if pad else hessian.double()
    rows = max(1, _REFITTED // H[0].numel() // groups)
    tensors = (weight, quantized.codes, quantized.scale, quantized.zero_point)
    parts = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    fitted = [_refit(*part, H, ridge) for part in parts]
    scale, zero_point = (torch.cat(parameter) for parameter in zip(*fitted, strict=True))
    return QuantizedWeight(quantized.codes, scale, zero_point, quantized.bits, quantized.group_size)


def _refit(
    weight: Tensor,
    codes: Tensor,
    old_scale: Tensor,
    old_zero: Tensor,
    H: Tensor,
    ridge: float,
) -> tuple[Tensor, Tensor]:
    """``refit`` for some rows: their scales and zero points; ``H`` is padded to whole groups."""
    out_features, groups = old_scale.shape
    group_size, pad = len(H) // groups, len(H) - weight.shape[1]
    codes = F.pad(codes.double(), (0, pad)).view(out_features, groups, group_size)
    columns = H.view(-1, groups, group_size)

    # D = [codes of each group | ones of each group]; HD and D^T H D without forming D.
    H_codes = torch.einsum("igj,ogj->oig", columns, codes)  # (out, in, groups)
    H_ones = columns.sum(-1)  # (in, groups)
    codes_H_codes = torch.einsum("ohi,ohig->ohg", codes, H_codes.view(out_features, groups, group_size, groups))
    codes_H_ones = torch.einsum("ohi,hig->ohg", codes, H_ones.view(groups, group_size, groups))
    ones_H_ones = H_ones.view(groups, group_size, groups).sum(1).expand(out_features, -1, -1)
    top = torch.cat([codes_H_codes, codes_H_ones], -1)
    bottom = torch.cat([codes_H_ones.transpose(1, 2), ones_H_ones], -1)
    A = torch.cat([top, bottom], 1)  # (out, 2 groups, 2 groups)
    H_weight = (F.pad(weight.double(), (0, pad)) @ H).view(out_features, groups, group_size)
    b = torch.cat([(codes * H_weight).sum(-1), H_weight.sum(-1)], -1)  # (out, 2 groups)

    scale = old_scale.double()
    start = torch.cat([scale, -scale * old_zero.double()], -1)
    # A trace of ridge keeps the system solvable where the data leaves a parameter undecided.
    strength = max(ridge, 1e-12) * A.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp(min=1e-30)
    theta = _solve(A + torch.diag_embed(strength.expand(-1, 2 * groups)), b + strength * start)
    new_scale, offset = theta[:, :groups], theta[:, groups:]
    usable = new_scale > SMALLEST_SCALE
    new_zero = torch.where(usable, -offset / new_scale, old_zero.double())
    usable &= new_zero.abs() < LARGEST_ZERO_POINT
    stored_scale, stored_zero = storable(new_scale.float(), new_zero.float())
    stored_scale = torch.where(usable, stored_scale, old_scale)
    stored_zero = torch.where(usable, stored_zero, old_zero)

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:  # of each row, up to a constant
        parameters = torch.cat([scale.double(), -scale.double() * zero_point.double()], -1)
        return torch.einsum("og,ogh,oh->o", parameters, A, parameters) - 2 * (b * parameters).sum(-1)

    better = (error(stored_scale, stored_zero) <= error(old_scale, old_zero))[:, None]
    return torch.where(better, stored_scale, old_scale), torch.where(better, stored_zero, old_zero)


_SAFE = 64  # unknowns that torch solves on several threads here


def _solve(A: Tensor, b: Tensor) -> Tensor:
    """``torch.linalg.solve``; large systems on one thread: on more, torch 2.13's float64 LU fails on them, or hangs."""
    if A.shape[-1] <= _SAFE:
        return torch.linalg.solve(A, b)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.linalg.solve(A, b)
    finally:
        torch.set_num_threads(threads)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize activations; ``scale`` and ``zero_point`` broadcast to ``x``."""
    return quantize_codes(x, scale, zero_point, bits).sub_(zero_point).mul_(scale)


def fake_quantize_per_token(x: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """Quantize and dequantize each token in its own min-max range, times ``clip`` (dynamic ranges, nothing stored)."""
    low, high = clip * x.amin(-1, keepdim=True).clamp(max=0), clip * x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=SMALLEST_SCALE)
    return fake_quantize(x, scale, (-low / scale).round(), bits)


_ALL = slice(None)
_DENSE = 2**24  # weights of a layer that are dequantized at a time


class _Coded(nn.Module):
    """A module with buffers that move between devices with the model, but keep their precision.

    ``PRECISE`` names them: a parameter of a code in bfloat16, say, would be that of another weight.
    """

    PRECISE: tuple[str, ...] = ("scale", "zero_point")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers[name] for name in self.PRECISE}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            changed = self._buffers[name]
            if changed.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(changed.device)
        return self


class QuantizedLinear(_Coded):
    """A linear layer that computes from packed weights, with parameters that may depend on the timestep.

    Time-dependent parameters are tables of distinct rows with one row number a timestep, so neighbouring
    timesteps that share parameters share a row.

    Args:
        in_features, out_features: size of the layer.
        bits: bits of a weight code.
        group_size: weights that share scale and zero point.
        bias: whether there is a bias.
        activation_bits: 16 leaves the input as it is.
        activation_group_size: neighbouring input channels that share a static range; None for all of them.
        timesteps: ``T`` of the tables.

    Weight parameters are ``(rows, out_features, groups)``, at first one row. Static activation parameters are ``(rows,
    token states, channel groups)``, at first none, which means dynamic per-token ranges; with two token states the
    first belongs to unmasked tokens, the second to masked ones.

    ``STORED`` names the uint8 buffers that hold the codes. ``has_planes`` says whether they lie plane by plane; then
    inputs of less than float32 are multiplied block by block as in ``thermo_lib.planes``, and if ``compiled`` is set,
    with a compiled loop.
    """

    STORED: tuple[str, ...] = ("packed",)
    PRECISE = ("scale", "zero_point", "activation_scale", "activation_zero_point")
    has_zero_point = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        bias: bool,
        activation_bits: int = 16,
        activation_group_size: int | None = None,
        timesteps: int = 1,
    ):
        super().__init__()
        _check_bits(bits)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.activation_bits = bits, group_size, activation_bits
        self.activation_clip = 1.0  # of dynamic ranges
        self.timesteps, self.timestep = timesteps, 0
        self.has_planes = planes.width(in_features, bits, group_size) > 0
        self.compiled = False
        self.activation_group_size = activation_group_size or in_features
        self.is_masked: Tensor | None = None
        self._rows: dict[str, tuple[Tensor, list[int]]] = {}  # what ``_row`` has read
        groups = -(-in_features // group_size)
        packed_width = -(-in_features * bits // 8)
        self.register_buffer("packed", torch.zeros((out_features, packed_width), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones((1, out_features, groups), dtype=torch.float16))
        self.register_buffer("zero_point", torch.zeros((1, out_features, groups), dtype=torch.float16))
        self.register_buffer("weight_row", torch.zeros(timesteps, dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("activation_scale", torch.empty((0, 1, 1)))
        self.register_buffer("activation_zero_point", torch.empty((0, 1, 1)))
        self.register_buffer("activation_row", torch.zeros(timesteps, dtype=torch.int32))

    def set_timestep(self, timestep: int, timesteps: int) -> None:
        """Use the parameters of denoising step ``timestep`` of ``timesteps``.

        Raises:
            ValueError: the timestep is outside ``0..timesteps-1``.
        """
        if not 0 <= timestep < timesteps:
            raise ValueError(f"timestep: found {timestep}, allowed are 0..{timesteps - 1}")
        self.timestep = timestep * self.timesteps // timesteps

    def _row(self, table: str) -> int:
        """The row of the current timestep in ``weight_row`` or ``activation_row``.

        A table is read once: an index that is a tensor on a GPU is waited for, at every call of every layer.
        """
        tensor = self._buffers[table]
        read, rows = self._rows.get(table, (None, []))
        if read is not tensor:
            rows = tensor.tolist()
            self._rows[table] = tensor, rows
        return rows[self.timestep]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._rows.clear()  # a table may have been overwritten where it is

    def set_token_state(self, is_masked: Tensor) -> None:
        """Say which tokens of the next input are masked, bool ``(batch, length)``."""
        self.is_masked = is_masked if self.activation_scale.shape[1] == 2 else None

    def _per_value(self, parameter: Tensor) -> Tensor:
        """One row's parameters ``(token states, channel groups)``, broadcast to the input."""
        if parameter.shape[1] > 1:
            parameter = parameter.repeat_interleave(self.activation_group_size, 1)[:, : self.in_features]
        return parameter if self.is_masked is None else parameter[self.is_masked.long()]

    def codes(self, rows: slice = _ALL) -> Tensor:
        """The weights before zero point and scale, of some rows, ``(out_features, in_features)``."""
        return unpack(self.packed[rows], self.bits, self.in_features, self.group_size)

    def weight(self, rows: slice = _ALL) -> Tensor:
        """The dequantized weight at the current timestep, or some of its rows, float32 ``(rows, in_features)``."""
        row = self._row("weight_row")
        scale, zero_point = self.scale[row, rows], self.zero_point[row, rows]
        if not self.has_planes:
            return dequantize(self.codes(rows), scale, zero_point, min(self.group_size, self.in_features))
        weight = torch.empty((len(scale), self.in_features), device=scale.device)
        planes.plane_weight(self.packed[rows], scale.float(), zero_point.float(), self.bits, weight)
        return weight

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input as the layer sees it at the current timestep, ``(..., in_features)``, of the input's type."""
        if self.activation_bits == 16:
            return x
        if not len(self.activation_scale):
            return fake_quantize_per_token(x, self.activation_bits, self.activation_clip)
        row = self._row("activation_row")
        scale, zero_point = (self._per_value(p[row]) for p in (self.activation_scale, self.activation_zero_point))
        return fake_quantize(x, scale, zero_point, self.activation_bits).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in_features)`` to ``(..., out_features)``."""
        x = self.quantized_input(x)
        if x.dtype != torch.float32 and self.has_planes:
            row = self._row("weight_row")
            parameters = self.packed, self.scale[row], self.zero_point[row]
            product = planes.linear(x, *parameters, self.bits, compiled=self.compiled)
            return product if self.bias is None else product + self.bias
        rows = max(1, _DENSE // self.in_features)
        if rows >= self.out_features:
            return F.linear(x, self.weight().to(x.dtype), self.bias)
        parts = [slice(start, start + rows) for start in range(0, self.out_features, rows)]
        product = torch.cat([F.linear(x, self.weight(part).to(x.dtype)) for part in parts], -1)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        """The layer's size and precision, for ``print(model)``."""
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, bits={self.bits}, group_size={self.group_size}, activation_bits={self.activation_bits}"


class QuantizedEmbedding(_Coded):
    """A table of token embeddings as packed codes; only the rows that are looked up are dequantized.

    Args:
        num_embeddings, embedding_dim: size of the table.
        bits: bits of a code.
        group_size: neighbours in a row that share scale and zero point.
        dtype: of the embeddings; it follows the model's where that is cast.

    ``packed``, ``scale`` and ``zero_point`` are those of a ``QuantizedLinear`` of as many rows.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, bits: int, group_size: int, dtype: torch.dtype):
        super().__init__()
        _check_bits(bits)
        self.embedding_dim, self.bits, self.group_size = embedding_dim, bits, group_size
        groups = -(-embedding_dim // group_size)
        packed_width = -(-embedding_dim * bits // 8)
        self.register_buffer("packed", torch.zeros((num_embeddings, packed_width), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones((1, num_embeddings, groups), dtype=torch.float16))
        self.register_buffer("zero_point", torch.zeros((1, num_embeddings, groups), dtype=torch.float16))
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)  # is cast with the model

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings."""
        return self.like.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids, any shape, to embeddings ``(..., embedding_dim)``."""
        codes = unpack(self.packed[ids], self.bits, self.embedding_dim, self.group_size)
        group_size = min(self.group_size, self.embedding_dim)
        return dequantize(codes, self.scale[0, ids], self.zero_point[0, ids], group_size).to(self.dtype)

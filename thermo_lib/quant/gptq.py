"""GPTQ (arXiv 2210.17323), and the closed-form fit of scales and zero points to finished codes."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thermo_lib.quant.codes import QuantizedWeight, check_bits, check_weight, quantize_codes, storable
from thermo_lib.quant.graphs import captured
from thermo_lib.quant.limits import LARGEST_ZERO_POINT, SMALLEST_SCALE
from thermo_lib.quant.precision import FLOAT32, products_in
from thermo_lib.quant.rounding import least_squares_parameters

_RECORDED = 2**9  # columns of a group at most that are recorded; the graph has a dozen kernels for each
_KEPT = 8  # graphs
_MOST_DAMPING = 1.0


@products_in(FLOAT32)
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
    check_bits(bits)
    check_weight(weight)
    check_hessian(hessian, weight.shape[1])
    quantized = _column_by_column(weight, inverse_factor(hessian, damping), bits, group_size)
    return refit(weight, quantized, hessian, ridge)


def _column_by_column(weight: Tensor, Hinv: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """The loop of ``gptq``; ``Hinv`` as ``inverse_factor`` gives it."""
    W = weight.double().clone()
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    scales, zeros = [], []
    for start in range(0, W.shape[1], group_size):
        stop = min(start + group_size, W.shape[1])
        scale, zero = least_squares_parameters(W[:, start:stop].float(), bits)
        scales.append(scale)
        zeros.append(zero)
        s, z = scale[:, 0].double(), zero[:, 0].double()
        group = W[:, start:stop], Hinv[start:stop, start:stop], s, z
        is_graph = W.is_cuda and stop - start <= _RECORDED
        run = _recorded(bits, group) if is_graph else _of_group(bits)
        codes[:, start:stop], Err = run(*group)
        W[:, stop:] -= Err @ Hinv[start:stop, stop:]
    return QuantizedWeight(codes, torch.cat(scales, 1), torch.cat(zeros, 1), bits, group_size)


def _of_group(bits: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function of a group's weights, its part of ``Hinv``, scale and zero point, to its codes and errors."""

    def run(weight: Tensor, Hinv: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        W, codes, Err = weight.clone(), torch.zeros_like(weight, dtype=torch.uint8), torch.zeros_like(weight)
        for column in range(W.shape[1]):
            q = quantize_codes(W[:, column], scale, zero, bits)
            codes[:, column] = q.to(torch.uint8)
            Err[:, column] = (W[:, column] - (q - zero) * scale) / Hinv[column, column]
            W[:, column:] -= Err[:, column, None] * Hinv[column, column:]
        return codes, Err

    return run


_graphs: dict[tuple[Any, ...], Callable[..., tuple[Tensor, Tensor]]] = {}


def _recorded(bits: int, group: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``_of_group`` as a CUDA graph; a layer has many groups of one shape."""
    key = bits, group[0].shape, group[0].device
    if key not in _graphs:
        if len(_graphs) == _KEPT:
            _graphs.pop(next(iter(_graphs)))
        _graphs[key] = captured(_of_group(bits), *group)
    return _graphs[key]


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, ``Hinv`` in GPTQ's algorithm, float64.

    Args:
        hessian: ``sum x x^T``, ``(in_features, in_features)``. A channel that is always zero (a dead one) takes the
            mean diagonal of the others: its weights don't matter, but they must not make the damping of the others
            depend on the scale of the inputs.
        damping: share of the mean diagonal that is added to the diagonal; ten times as much, with a warning, as long as
            rounding in the sums leaves the matrix without a factor.

    Raises:
        ValueError: no factor at any damping.
    """
    # By columns, as LAPACK has it, so that each step is in place.
    H = torch.empty_like(hessian, dtype=torch.float64).mT
    share = damping
    while True:
        diagonal = H.copy_(hessian).diagonal()
        is_dead = diagonal == 0
        if is_dead.any():
            diagonal[is_dead] = 1.0 if is_dead.all() else diagonal[~is_dead].mean()
        diagonal += share * diagonal.mean()
        try:
            torch.linalg.cholesky(H, out=H)
            torch.cholesky_inverse(H, out=H)
            torch.linalg.cholesky(H, upper=True, out=H)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch doesn't say that it exports it
            if share >= _MOST_DAMPING:
                raise ValueError(f"hessian: found none that is positive, up to a damping of {share:g}") from None
            share = min(_MOST_DAMPING, max(10 * share, 1e-4))
            continue
        if share != damping:
            warnings.warn(f"hessian: {damping:g} of damping left it singular, {share:g} was taken", stacklevel=2)
        return H


def check_hessian(hessian: Tensor, in_features: int) -> None:
    """Raise ValueError unless the Hessian is finite and fits the weight."""
    if hessian.shape != (in_features, in_features):
        raise ValueError(f"hessian: found shape {tuple(hessian.shape)}, expected ({in_features}, {in_features})")
    if not hessian.isfinite().all():
        raise ValueError("hessian: found NaN or infinity in the calibration inputs, expected finite numbers")


def fit_precision(device: torch.device) -> torch.dtype:
    """The type in which parameters are fitted to finished codes: float64 on a CPU, float32 elsewhere.

    Many GPUs are slow at float64. On the reference model's layers and on inputs with a spectrum over eight decades the
    fit in float32 left an error of 1 to 1.000001 times that of float64; iterative refinement didn't change it.
    """
    return torch.float64 if device.type == "cpu" else torch.float32


TRACE = {torch.float64: 1e-12, torch.float32: 1e-6}  # share of a system's diagonal that keeps it solvable
_REFITTED = 2**28  # numbers of a matrix (rows, in_features, groups) that is held at a time


@products_in(FLOAT32)
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
    group_size = min(quantized.group_size, weight.shape[1])
    pad = groups * group_size - weight.shape[1]
    precise = hessian.to(fit_precision(hessian.device))
    H = F.pad(precise, (0, pad, 0, pad)) if pad else precise
    rows = max(1, _REFITTED // H[0].numel() // groups)
    tensors = (weight, quantized.codes, quantized.scale, quantized.zero_point)
    parts = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    fitted = [_refit(some, codes, scale, zero, H, ridge) for some, codes, scale, zero in parts]
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
    """``refit`` for some rows, in the precision of ``H``, padded to whole groups: their scales and zero points."""
    out_features, groups = old_scale.shape
    group_size, pad = len(H) // groups, len(H) - weight.shape[1]
    codes = F.pad(codes.to(H.dtype), (0, pad)).view(out_features, groups, group_size)
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
    H_weight = (F.pad(weight.to(H.dtype), (0, pad)) @ H).view(out_features, groups, group_size)
    b = torch.cat([(codes * H_weight).sum(-1), H_weight.sum(-1)], -1)  # (out, 2 groups)

    scale = old_scale.to(H.dtype)
    start = torch.cat([scale, -scale * old_zero.to(H.dtype)], -1)
    # A trace of ridge keeps the system solvable where the data leaves a parameter undecided.
    strength = max(ridge, TRACE[H.dtype]) * A.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp(min=1e-30)
    theta = _solve(A + torch.diag_embed(strength.expand(-1, 2 * groups)), b + strength * start)
    new_scale, offset = theta[:, :groups], theta[:, groups:]
    usable = new_scale > SMALLEST_SCALE
    new_zero = torch.where(usable, -offset / new_scale, old_zero.to(H.dtype))
    usable &= new_zero.abs() < LARGEST_ZERO_POINT
    stored_scale, stored_zero = storable(new_scale.float(), new_zero.float())
    stored_scale = torch.where(usable, stored_scale, old_scale)
    stored_zero = torch.where(usable, stored_zero, old_zero)

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:  # of each row, up to a constant
        parameters = torch.cat([scale.to(H.dtype), -scale.to(H.dtype) * zero_point.to(H.dtype)], -1)
        return torch.einsum("og,ogh,oh->o", parameters, A, parameters) - 2 * (b * parameters).sum(-1)

    better = (error(stored_scale, stored_zero) <= error(old_scale, old_zero))[:, None]
    return torch.where(better, stored_scale, old_scale), torch.where(better, stored_zero, old_zero)


_SAFE = 64  # unknowns that torch solves on several threads here


def _solve(A: Tensor, b: Tensor) -> Tensor:
    """``torch.linalg.solve``; large systems on one thread: on more, torch 2.13's float64 LU fails on them, or hangs."""
    if A.shape[-1] <= _SAFE or A.device.type != "cpu":
        return torch.linalg.solve(A, b)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.linalg.solve(A, b)
    finally:
        torch.set_num_threads(threads)

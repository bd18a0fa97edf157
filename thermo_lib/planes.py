"""Matrix products from packed codes: the weight is never dense as a whole, and never interleaved.

Unpacked plane by plane, the k-th codes of all bytes are neighbours: a plane is one shift and one mask, and its values
are written in a row. The columns of a weight then stand in another order, in which the input's channels are put too,
which is cheap. Some rows are dequantized at a time, so that they are still in the processor's cache when they are
multiplied.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCK = 2**21  # weights that are dequantized at a time on a CPU
_BLOCK_ON_GPU = 2**26  # there a launch costs more than a trip to memory

PlaneWeight = Callable[[Tensor, Tensor, Tensor, int, torch.dtype], Tensor]


def fits(in_features: int, bits: int, group_size: int) -> bool:
    """Whether every plane has the same number of columns in every group."""
    return in_features % group_size == 0 and group_size % (8 // bits) == 0


def plane_order(x: Tensor, bits: int) -> Tensor:
    """The last dimension in the order of the planes: the first of every ``8 / bits`` neighbours, then the second, ...

    Args:
        x: ``(..., in_features)``.
        bits: of a code.
    """
    return x.unflatten(-1, (-1, 8 // bits)).transpose(-1, -2).flatten(-2)


def plane_weight(packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """``(codes - zero_point) * scale`` of some rows, computed in float32, columns in ``plane_order``.

    Args:
        packed: uint8 ``(rows, in_features * bits / 8)``.
        scale, zero_point: ``(rows, groups)``.
        bits: of a code.
        dtype: of the result.

    Returns:
        ``(rows, in_features)``.
    """
    grouped = packed.unflatten(1, (scale.shape[1], -1))
    rows, groups, width = grouped.shape
    planes = torch.empty((rows, 8 // bits, groups, width), device=packed.device)
    for plane in range(8 // bits):
        planes[:, plane] = (grouped >> plane * bits) & (2**bits - 1)
    planes -= zero_point.float()[:, None, :, None]
    planes *= scale.float()[:, None, :, None]
    return planes.to(dtype).flatten(1)


def _plane_weight(packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """``plane_weight`` as one expression, which a compiler fuses into one loop."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    grouped = packed.unflatten(1, (scale.shape[1], -1))[:, None]
    codes = (grouped >> shifts[:, None, None]) & (2**bits - 1)
    weight = (codes.float() - zero_point.float()[:, None, :, None]) * scale.float()[:, None, :, None]
    return weight.to(dtype).flatten(1)


@functools.cache
def _compiled() -> PlaneWeight:
    return torch.compile(_plane_weight, dynamic=True)  # on demand: this alone takes seconds


def linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, *, compiled: bool = False
) -> Tensor:
    """``x`` times a packed weight, transposed.

    Args:
        x: bfloat16 or float16 ``(..., in_features)``.
        packed, scale, zero_point: the weight's, see ``plane_weight``; its columns and groups ``fits``.
        bits: of a code.
        compiled: dequantize in a fused loop that ``torch.compile`` makes on first use.

    Returns:
        ``(..., out_features)``.
    """
    dequantize = _compiled() if compiled else plane_weight
    x = plane_order(x, bits)
    rows = max(1, (_BLOCK_ON_GPU if x.is_cuda else _BLOCK) // x.shape[-1])
    blocks = zip(packed.split(rows), scale.split(rows), zero_point.split(rows), strict=True)
    products = [F.linear(x, dequantize(*block, bits, x.dtype)) for block in blocks]
    return products[0] if len(products) == 1 else torch.cat(products, -1)


def compile_linears(model: nn.Module) -> None:
    """Let the quantized linears of a model dequantize in a compiled loop; the first use compiles it, in seconds.

    Inputs in float32 are not affected: there every result is that of the uncompiled library, bit for bit.

    Raises:
        ValueError: ``torch.compile`` finds no compiler for the model's device.
    """
    layers = [module for module in model.modules() if hasattr(module, "compiled")]
    if not layers:
        raise ValueError("compile: found no quantized linears, expected a quantized model")
    device = layers[0].packed.device
    example = torch.zeros((2, 32), dtype=torch.uint8, device=device), *torch.ones((2, 2, 2), device=device)
    try:
        _compiled()(*example, 2, torch.bfloat16)
    except RuntimeError as error:
        raise ValueError(f"compile: found no working compiler for device {device} ({error})") from error
    for layer in layers:
        layer.compiled = True

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

_ROWS = 512  # of a weight that are dequantized at a time on a CPU
_NUMBERS = 2**21  # the same uncompiled, which goes over them several times
_ROWS_ON_GPU = 2**14  # there a launch costs more than a trip to memory


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


def plane_weight(packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, out: Tensor) -> None:
    """``(codes - zero_point) * scale`` of some rows, computed in float32, columns in ``plane_order``.

    Args:
        packed: uint8 ``(rows, in_features * bits / 8)``.
        scale, zero_point: float32 ``(rows, groups)``.
        bits: of a code.
        out: takes the result, ``(rows, 8 / bits, groups, bytes of a group)``.
    """
    grouped = packed.view(len(packed), scale.shape[1], -1)
    planes = torch.empty(out.shape, device=out.device)
    for plane in range(8 // bits):
        planes[:, plane] = (grouped >> plane * bits) & (2**bits - 1)
    planes -= zero_point[:, None, :, None]
    planes *= scale[:, None, :, None]
    out.copy_(planes)


@functools.cache
def _compiled(bits: int, width: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """``plane_weight`` for groups of ``width`` bytes as one loop; with the width known it fills vector registers."""

    def fused(packed: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor) -> None:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        codes = (packed.view(len(packed), 1, -1, width) >> shifts[:, None, None]) & (2**bits - 1)
        out.copy_((codes.float() - zero_point[:, None, :, None]) * scale[:, None, :, None])

    return torch.compile(fused, dynamic=True)  # on demand: this alone takes seconds


def linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, *, compiled: bool = False
) -> Tensor:
    """``x`` times a packed weight, transposed.

    Args:
        x: bfloat16 or float16 ``(..., in_features)``.
        packed: the weight's codes, uint8 ``(out_features, in_features * bits / 8)``.
        scale, zero_point: ``(out_features, groups)``, so that it ``fits``.
        bits: of a code.
        compiled: dequantize in a fused loop that ``torch.compile`` makes on first use.

    Returns:
        ``(..., out_features)``.
    """
    groups = scale.shape[1]
    width = packed.shape[1] // groups
    dequantize = _compiled(bits, width) if compiled else functools.partial(plane_weight, bits=bits)
    x = plane_order(x, bits)
    most = _ROWS_ON_GPU if x.is_cuda else _ROWS if compiled else _NUMBERS // x.shape[-1]
    rows = max(1, min(most, len(packed)))
    weight = torch.empty((rows, 8 // bits, groups, width), dtype=x.dtype, device=x.device)
    products = []
    for codes, *parameters in zip(packed.split(rows), scale.split(rows), zero_point.split(rows), strict=True):
        dense = weight[: len(codes)]
        dequantize(codes, *(parameter.float() for parameter in parameters), out=dense)
        products.append(F.linear(x, dense.flatten(1)))
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
    packed, parameters = torch.zeros((2, 32), dtype=torch.uint8, device=device), torch.ones((2, 2, 2), device=device)
    try:
        _compiled(2, 16)(packed, *parameters, torch.empty((2, 4, 2, 16), device=device))
    except RuntimeError as error:
        raise ValueError(f"compile: found no working compiler for device {device} ({error})") from error
    for layer in layers:
        layer.compiled = True

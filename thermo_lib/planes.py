"""Matrix products from packed codes: the weight is never dense as a whole.

The codes of a group lie plane by plane in its bytes (see ``quant.pack``), so a plane is one shift and one mask, and its
values are written in a row. Some rows are dequantized at a time, so that they are still in the processor's cache when
they are multiplied.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

_ROWS = 512  # of a weight that are dequantized at a time on a CPU
_NUMBERS = 2**21  # the same uncompiled, which goes over them several times
_ROWS_ON_GPU = 2**14  # there a launch costs more than a trip to memory


def width(in_features: int, bits: int, group_size: int) -> int:
    """Bytes of a group whose codes lie plane by plane; 0 where groups don't fill whole bytes or aren't all whole."""
    per_byte = 8 // bits
    return 0 if in_features % group_size or group_size % per_byte else group_size // per_byte


def plane_weight(packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, out: Tensor) -> None:
    """``(codes - zero_point) * scale`` of some rows, computed in float32.

    Args:
        packed: uint8 ``(rows, in_features * bits / 8)``.
        scale, zero_point: float32 ``(rows, groups)``.
        bits: of a code.
        out: takes the result, ``(rows, in_features)``.
    """
    grouped = packed.view(*scale.shape, -1)
    dense = out if out.dtype == torch.float32 else torch.empty(out.shape, device=out.device)
    planes = dense.view(*scale.shape, 8 // bits, -1)
    for plane in range(8 // bits):
        planes[:, :, plane] = (grouped >> plane * bits) & (2**bits - 1)
    planes -= zero_point[..., None, None]
    planes *= scale[..., None, None]
    if dense is not out:
        out.copy_(dense)


@functools.cache
def _compiled(
    rows: int, groups: int, group_bytes: int, bits: int, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """``plane_weight`` as one loop, for one shape.

    It is traced and handed to inductor without ``torch.compile``, whose checks before every call take half as long as
    the loop itself.
    """

    def fused(packed: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor) -> None:
        lowest = 2 ** (bits * torch.arange(8 // bits, device=device))[:, None]
        # Masked where they are, then scaled down, which is exact: bytes are slow to shift.
        codes = (packed.view(-1, 1, group_bytes) & (lowest * (2**bits - 1)).to(torch.uint8)) * (1 / lowest)
        weight = (codes - zero_point.view(-1, 1, 1)) * scale.view(-1, 1, 1)
        out.copy_(weight.view(rows, -1))

    packed = torch.zeros((rows, groups * group_bytes), dtype=torch.uint8, device=device)
    scale, zero_point = torch.ones((2, rows, groups), device=device)
    examples = [
        packed,
        scale,
        zero_point,
        torch.empty((rows, groups * group_bytes * 8 // bits), dtype=dtype, device=device),
    ]
    with torch.no_grad():
        return torch._inductor.compile(make_fx(fused)(*examples), examples)


def linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, *, compiled: bool = False
) -> Tensor:
    """``x`` times a packed weight, transposed.

    Args:
        x: bfloat16 or float16 ``(..., in_features)``.
        packed: the weight's codes, uint8 ``(out_features, in_features * bits / 8)``.
        scale, zero_point: ``(out_features, groups)``; ``width`` isn't 0.
        bits: of a code.
        compiled: dequantize in a fused loop, which takes a compiler and at first use some seconds.

    Returns:
        ``(..., out_features)``.
    """
    groups = scale.shape[1]
    most = _ROWS_ON_GPU if x.is_cuda else _ROWS if compiled else _NUMBERS // x.shape[-1]
    rows = max(1, min(most, len(packed)))
    weight = torch.empty((rows, x.shape[-1]), dtype=x.dtype, device=x.device)
    tensors = packed, scale.float(), zero_point.float()
    whole = rows == len(packed)  # then there is nothing to split, which costs as much as it looks for small weights
    products = []
    for some in [tensors] if whole else zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        dense = weight if whole else weight[: len(some[0])]
        if compiled:
            _compiled(len(dense), groups, packed.shape[1] // groups, bits, x.dtype, x.device)(*some, dense)
        else:
            plane_weight(*some, bits, dense)
        products.append(F.linear(x, dense))
    return products[0] if whole else torch.cat(products, -1)


def compile_linears(model: nn.Module) -> None:
    """Let the quantized linears of a model dequantize in a compiled loop; the first use compiles it, in seconds.

    Inputs in float32 are not affected: there every result is that of the uncompiled library, bit for bit.

    Raises:
        ValueError: there is no compiler for the model's device.
    """
    layers = [module for module in model.modules() if hasattr(module, "compiled")]
    if not layers:
        raise ValueError("compile: found no quantized linears, expected a quantized model")
    device = layers[0].packed.device
    try:
        _compiled(2, 2, 16, 2, torch.bfloat16, device)
    except RuntimeError as error:
        raise ValueError(f"compile: found no working compiler for device {device} ({error})") from error
    for layer in layers:
        layer.compiled = True

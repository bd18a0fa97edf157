"""Matrix products from packed codes: the weight is never dense as a whole.

The codes of a group lie plane by plane in its bytes (see ``quant.pack``), so a plane is one shift and one mask, and its
values are written in a row. Some rows are dequantized at a time, so that they are still in the processor's cache when
they are multiplied.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from thermo_lib.quant.backends import set_backend
from thermo_lib.quant.kernels import Packed, Ranges, library
from thermo_lib.quant.limits import SMALLEST_SCALE

_ROWS = 512  # of a weight that are dequantized at a time on a CPU
_NUMBERS = 2**22  # the same uncompiled, which goes over them several times
_ROWS_ON_GPU = 2**14  # there a launch costs more than a trip to memory


def width(in_features: int, bits: int, group_size: int) -> int:
    """Bytes of a group whose codes lie plane by plane; 0 where groups don't fill whole bytes or aren't all whole."""
    per_byte = 8 // bits
    return 0 if in_features % group_size or group_size % per_byte else group_size // per_byte


def plane_weight(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    out: Tensor,
    codes: Tensor | None = None,
    dense: Tensor | None = None,
) -> None:
    """``(codes - zero_point) * scale`` of some rows, computed in float32.

    Args:
        packed: uint8 ``(rows, in_features * bits / 8)``.
        scale, zero_point: float32 ``(rows, groups)``.
        bits: of a code.
        out: takes the result, ``(rows, in_features)``.
        codes, dense: uint8 ``(8 / bits, *packed.shape)`` and float32 ``out.shape``, overwritten: for many calls, since
            new memory takes as long as the work.
    """
    if dense is None:
        dense = out if out.dtype == torch.float32 else torch.empty(out.shape, device=out.device, dtype=torch.float32)
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8, device=out.device)[:, None, None]
    codes = torch.bitwise_right_shift(packed, shifts, out=codes)  # plane by plane, so that each pass is over long rows
    codes &= 2**bits - 1
    grouped = dense.view(*scale.shape, -1)
    grouped.unflatten(-1, (8 // bits, -1)).permute(2, 0, 1, 3).copy_(codes.view(8 // bits, *scale.shape, -1))
    grouped -= zero_point[..., None]
    grouped *= scale[..., None]
    if dense is not out:
        out.copy_(dense)


def _packed(packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Packed:
    pointers = (tensor.data_ptr() for tensor in (packed, scale, zero_point))
    return Packed(*pointers, *scale.shape, packed.shape[1] // scale.shape[1], bits)


def _native_weight(packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, out: Tensor) -> None:
    """``plane_weight`` by ``kernels.cpp``, for contiguous bfloat16 on a CPU."""
    library().dequantize(_packed(packed, scale, zero_point, bits), out.data_ptr())


def _native_linear(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """``linear`` in one pass over the codes, on a CPU with a matrix unit for bfloat16."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty((len(tokens), len(packed)), dtype=x.dtype)
    library().multiply(_packed(packed, scale, zero_point, bits), tokens.data_ptr(), out.data_ptr(), len(tokens))
    return out.view(*x.shape[:-1], len(packed))


@functools.cache
def _fused(
    rows: int, groups: int, group_bytes: int, bits: int, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """``plane_weight`` as one loop by inductor, for one shape, where ``kernels.cpp`` isn't for.

    It is traced and handed to inductor without ``torch.compile``, whose checks before every call take half as long as
    the loop itself.
    """

    def fused(packed: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor) -> None:
        lowest = 2 ** (bits * torch.arange(8 // bits, device=device))[:, None]
        # Masked where they are, then scaled down, which is exact: bytes are slow to shift.
        codes = (packed.view(-1, 1, group_bytes) & (lowest * (2**bits - 1)).to(torch.uint8)) * (1 / lowest.float())
        weight = (codes - zero_point.view(-1, 1, 1)) * scale.view(-1, 1, 1)
        out.copy_(weight.view(rows, -1))

    packed = torch.zeros((rows, groups * group_bytes), dtype=torch.uint8, device=device)
    scale, zero_point = torch.ones((2, rows, groups), dtype=torch.float32, device=device)
    dense = torch.empty((rows, groups * group_bytes * 8 // bits), dtype=dtype, device=device)
    examples = [packed, scale, zero_point, dense]
    with torch.no_grad():
        return torch._inductor.compile(make_fx(fused)(*examples), examples)


def _fused_weight(packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, out: Tensor) -> None:
    """``plane_weight`` in a loop that inductor compiles."""
    groups = scale.shape[1]
    _fused(len(packed), groups, packed.shape[1] // groups, bits, out.dtype, out.device)(packed, scale, zero_point, out)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    bias: Tensor | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """``x`` times a packed weight, transposed, and a bias, which is added before the result is rounded.

    Args:
        x: bfloat16 or float16 ``(..., in_features)``.
        packed: the weight's codes, uint8 ``(out_features, in_features * bits / 8)``.
        scale, zero_point: ``(out_features, groups)``; ``width`` isn't 0.
        bits: of a code.
        bias: ``(out_features,)`` of ``x``'s type; None for none. In one pass over the codes it is added afterwards.
        compiled: dequantize in a compiled loop, which takes a compiler and at first use some seconds.

    Returns:
        ``(..., out_features)``.
    """
    tensors = packed, scale.float(), zero_point.float()
    native = compiled and x.dtype == torch.bfloat16 and x.device.type == "cpu"
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    group_size = x.shape[-1] // scale.shape[1]
    if native and not needs_gradient and group_size % 2 == 0 and library().can_multiply():
        found = _native_linear(x, *tensors, bits)
        return found if bias is None else found + bias
    most = _ROWS_ON_GPU if x.is_cuda else _ROWS if compiled else _NUMBERS // x.shape[-1]
    rows = max(1, min(most, len(packed)))
    weight = torch.empty((rows, x.shape[-1]), dtype=x.dtype, device=x.device)
    dequantize: Callable[..., None] = _native_weight if native else _fused_weight if compiled else plane_weight
    work = []
    if not compiled:
        codes = torch.empty((8 // bits, rows, packed.shape[1]), dtype=torch.uint8, device=x.device)
        work = [codes, torch.empty_like(weight, dtype=torch.float32)]

    def product(*some: Tensor, bias: Tensor | None) -> Tensor:
        dense, *rest = (tensor[..., : len(some[0]), :] for tensor in (weight, *work))
        dequantize(*some, bits, dense, *rest)
        return F.linear(x, dense, bias)

    if rows == len(packed):  # to split costs as much as it looks for small weights
        return product(*tensors, bias=bias)
    parts = list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
    biases = [None] * len(parts) if bias is None else bias.split(rows)
    return torch.cat([product(*some, bias=own) for some, own in zip(parts, biases, strict=True)], -1)


def multiplies_codes(x: Tensor, in_features: int, groups: int) -> bool:
    """Whether ``code_linear`` works here: bfloat16 without gradients, on a CPU with a unit for products of bytes."""
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    is_fit = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not needs_gradient
    return is_fit and in_features // groups % 4 == 0 and library().can_multiply_codes()


def code_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    ranges: tuple[Tensor, Tensor] | None,
    activation_bits: int,
    clip: float = 1.0,
) -> Tensor:
    """The quantized input times a packed weight, transposed, in whole numbers: codes are multiplied with codes.

    Args:
        x: bfloat16 ``(..., in_features)``, for which ``multiplies_codes`` is true.
        packed, scale, zero_point, bits: see ``packed_linear``.
        ranges: float32 scale and zero point of each token, ``(tokens,)``; None takes each token's own range.
        activation_bits: number of bits of a code of the input.
        clip: how far a token's own range reaches, as a share of the way from zero to its extremes.

    Returns:
        ``(..., out_features)``.
    """
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty((len(tokens), len(packed)), dtype=x.dtype)
    tensors = packed, scale.float().contiguous(), zero_point.float().contiguous()
    given = (None, None) if ranges is None else [part.contiguous() for part in ranges]
    pointers = (None if part is None else part.data_ptr() for part in given)
    how = Ranges(*pointers, clip, SMALLEST_SCALE, activation_bits)
    library().multiply_codes(_packed(*tensors, bits), how, tokens.data_ptr(), out.data_ptr(), len(tokens))
    return out.view(*x.shape[:-1], len(packed))


def compile_linears(model: nn.Module) -> None:
    """Let the quantized linears of a model dequantize in a compiled loop; the first use compiles it, in seconds.

    Inputs in float32 are not affected: there every result is that of the uncompiled library, bit for bit.

    Raises:
        ValueError: there is no compiler for the model's device.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "backend")]
    if not layers:
        raise ValueError("compile: found no quantized linears, expected a quantized model")
    device = layers[0].packed.device
    try:
        if device.type == "cpu":
            library()
        else:
            _fused(2, 2, 16, 2, torch.bfloat16, device)
    except RuntimeError as error:
        raise ValueError(f"compile: found no working compiler for device {device} ({error})") from error
    set_backend(model, "compiled")

"""Products from trellis-coded weights on a CPU, by ``kernels.cpp``: some rows and columns are read at a time.

The columns of all rows take the same numbers of bits, so where a column's state begins is known once for all rows.
Sixteen neighbouring columns take at most 96 bits, which with the bits before them fit into sixteen bytes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from thermo_lib.quant.kernels import Streams, library
from thermo_lib.quant.trellis import STATE_BITS, codebook, gains

_BLOCK = 16  # columns


@dataclass(frozen=True)
class Layout:
    """Where the states of the columns are, see ``Streams`` in ``kernels.cpp``.

    Attributes:
        first: int64 ``(blocks,)``.
        places: uint8 ``(blocks, 64)``.
        shifts: int32 ``(blocks, 16)``.
        gains: float32 ``(blocks, 16)``.
        columns: number of columns.
    """

    first: Tensor
    places: Tensor
    shifts: Tensor
    gains: Tensor
    columns: int

    @classmethod
    def of(cls, column_bits: Tensor) -> "Layout":
        """The layout of columns with these bits, ``(in_features,)``, 0 to ``trellis.MOST_BITS``."""
        columns = len(column_bits)
        bits = F.pad(column_bits.long(), (0, -columns % _BLOCK))
        start = (bits.cumsum(0) + 16 - STATE_BITS).view(-1, _BLOCK)  # of the state, two bytes of zeros before the row
        first = start[:, 0] // 8
        local = start - 8 * first[:, None]
        byte, offset = local // 8, local % 8
        nothing = torch.full_like(byte, 0x80)  # which stands for a byte of zeros
        places = torch.stack([byte + 2, byte + 1, byte, nothing], -1).to(torch.uint8)
        is_column = (torch.arange(bits.numel()) < columns).view(-1, _BLOCK)
        places = torch.where(is_column[..., None], places, 0x80).flatten(1)
        reach = torch.where(is_column, F.pad(gains(column_bits), (0, -columns % _BLOCK)).view(-1, _BLOCK), 0)
        shifts = (24 - STATE_BITS - offset).to(torch.int32)
        return cls(first - 2, places.contiguous(), shifts.contiguous(), reach.contiguous(), columns)


def _streams(packed: Tensor, layout: Layout, scale: Tensor, group_size: int) -> Streams:
    tensors = packed, layout.first, layout.places, layout.shifts, layout.gains, codebook(), scale
    pointers = (tensor.data_ptr() for tensor in tensors)
    return Streams(*pointers, *packed.shape, layout.columns, scale.shape[1], min(group_size, layout.columns))


def stream_weight(packed: Tensor, layout: Layout, scale: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """The dequantized weight; bit for bit what ``trellis.read_codes`` times the scale is, then cast.

    Args:
        packed: uint8 ``(rows, bytes)``, contiguous, on the CPU.
        layout: of its columns.
        scale: float32 ``(rows, groups)``, contiguous.
        group_size: number of columns that share a scale.
        dtype: float32 or bfloat16.

    Returns:
        ``(rows, in_features)``.
    """
    out = torch.empty((len(packed), layout.columns), dtype=dtype)
    read = library().read_streams if dtype == torch.bfloat16 else library().read_streams_float
    read(_streams(packed, layout, scale, group_size), out.data_ptr())
    return out


def stream_linear(x: Tensor, packed: Tensor, layout: Layout, scale: Tensor, group_size: int) -> Tensor:
    """``x`` times the weight, transposed; other arguments as for ``stream_weight``.

    Where the processor has a matrix unit for bfloat16, the weight is read and multiplied in one pass.

    Args:
        x: bfloat16 ``(..., in_features)`` on the CPU.

    Returns:
        ``(..., out_features)``.
    """
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    if needs_gradient or layout.columns % 2 or not library().can_multiply():
        return F.linear(x, stream_weight(packed, layout, scale, group_size, x.dtype))
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty((len(tokens), len(packed)), dtype=x.dtype)
    streams = _streams(packed, layout, scale, group_size)
    library().multiply_streams(streams, tokens.data_ptr(), out.data_ptr(), len(tokens))
    return out.view(*x.shape[:-1], len(packed))

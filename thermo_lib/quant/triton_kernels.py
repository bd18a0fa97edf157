"""Dequantizing on a GPU, in Triton: a weight is written once in the input's type, whatever the number of tokens.

Under Triton's interpreter (``TRITON_INTERPRET=1`` before this module is imported) the same kernels run on a CPU.
"""

import torch
from torch import Tensor

from thermo_lib.extras import needs
from thermo_lib.quant.trellis import STATE_BITS, codebook_on, gains

triton = needs("triton")
tl = needs("triton.language")

_BYTES = 1024  # of codes that a program reads
_ROWS, _COLUMNS = 8, 256  # of a trellis-coded weight that a program writes
_ROWS_OF_TABLE = 32  # the same where a program copies the table first, which is as large as 2 rows of these columns


@triton.jit
def _planes(packed, scale, zero_point, out, count, WIDTH: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr,
            GROUPS: tl.constexpr):  # fmt: skip
    """``(codes - zero_point) * scale`` of ``GROUPS`` neighbouring groups, which rows follow one another in."""
    lanes: tl.constexpr = 8 // BITS
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    byte = tl.arange(0, PADDED)
    is_group = group < count
    inside = is_group[:, None] & (byte < WIDTH)[None, :]
    codes = tl.load(packed + group[:, None] * WIDTH + byte[None, :], mask=inside, other=0).to(tl.int32)
    factor = tl.load(scale + group, mask=is_group, other=0).to(tl.float32)
    zero = tl.load(zero_point + group, mask=is_group, other=0).to(tl.float32)
    first = out + group[:, None] * (WIDTH * lanes) + byte[None, :]
    for lane in tl.static_range(lanes):
        code = ((codes >> (lane * BITS)) & (2**BITS - 1)).to(tl.float32)
        value = (code - zero[:, None]) * factor[:, None]
        tl.store(first + lane * WIDTH, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _streams(packed, byte, shift, gain, values, scale, out, rows, width, columns, groups, group_size,
             STATES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATHERS: tl.constexpr):  # fmt: skip
    """A block of a trellis-coded weight: each column's state is in three bytes of the row's stream."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < rows, column < columns
    first = tl.load(byte + column, mask=is_column, other=0)
    word = tl.full((ROWS, COLUMNS), 0, tl.int32)
    for place in tl.static_range(3):
        at = first + place
        there = is_row[:, None] & (is_column & (at >= 0) & (at < width))[None, :]
        read = tl.load(packed + row[:, None] * width + at[None, :], mask=there, other=0)
        word = (word << 8) | read.to(tl.int32)
    inside = is_row[:, None] & is_column[None, :]
    state = (word >> tl.load(shift + column, mask=is_column, other=0)[None, :]) & (STATES - 1)
    if GATHERS:  # from shared memory, where lanes that look in different places don't wait for a line of memory each
        table = tl.load(values + tl.arange(0, STATES))
        value = tl.reshape(tl.gather(table, tl.reshape(state, (ROWS * COLUMNS,)), 0), (ROWS, COLUMNS))
    else:
        value = tl.load(values + state, mask=inside, other=0)
    value *= tl.load(gain + column, mask=is_column, other=0)[None, :]
    where = row[:, None] * groups + (column // group_size)[None, :]
    value = value * tl.load(scale + where, mask=inside, other=0).to(tl.float32)
    tl.store(out + row[:, None] * columns + column[None, :], value.to(out.dtype.element_ty), mask=inside)


def plane_weight(packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The dequantized weight of codes that lie plane by plane; see ``planes.plane_weight``.

    Args:
        packed: uint8 ``(rows, in_features * bits / 8)``.
        scale, zero_point: ``(rows, groups)``.
        bits: of a code.
        dtype: of the result.

    Returns:
        ``(rows, in_features)``.
    """
    count = scale.numel()
    width = packed.numel() // count
    padded = triton.next_power_of_2(width)
    out = torch.empty((len(packed), packed.shape[1] * 8 // bits), dtype=dtype, device=packed.device)
    groups = max(1, _BYTES // padded)
    tensors = packed.contiguous(), scale.contiguous(), zero_point.contiguous()
    _planes[(triton.cdiv(count, groups),)](*tensors, out, count, WIDTH=width, PADDED=padded, BITS=bits, GROUPS=groups)
    return out


def stream_places(column_bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the states of columns with these bits are: first byte, shift and gain, ``(in_features,)`` each.

    The first of a state's three bytes may lie up to two bytes before the row, where there are zeros.
    """
    first = column_bits.long().cumsum(0) + 16 - STATE_BITS
    shift = 24 - STATE_BITS - first % 8
    return (first // 8 - 2).int(), shift.int(), gains(column_bits)


def stream_weight(
    packed: Tensor,
    places: tuple[Tensor, Tensor, Tensor],
    scale: Tensor,
    group_size: int,
    dtype: torch.dtype,
    gathers: bool = False,
) -> Tensor:
    """The dequantized weight of trellis codes, in float32 bit for bit the plain one.

    Args:
        packed: uint8 ``(rows, bytes)``.
        places: what ``stream_places`` returned.
        scale: ``(rows, groups)``.
        group_size: number of columns that share a scale.
        dtype: of the result.
        gathers: whether each program holds the table of values in shared memory, instead of reading it through the
            cache; the result is the same.

    Returns:
        ``(rows, in_features)``.
    """
    (rows, width), columns = packed.shape, len(places[0])
    block = _ROWS_OF_TABLE if gathers else _ROWS
    out = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    grid = triton.cdiv(rows, block), triton.cdiv(columns, _COLUMNS)
    table, size = codebook_on(packed.device), min(group_size, columns)
    _streams[grid](
        *(packed.contiguous(), *places, table, scale.contiguous(), out, rows, width, columns, scale.shape[1], size),
        STATES=2**STATE_BITS,
        ROWS=block,
        COLUMNS=_COLUMNS,
        GATHERS=gathers,
        num_warps=8 if gathers else 4,
    )
    return out

"""Dequantizing on a GPU, in Triton: a weight is written once in the input's type, whatever the number of tokens.

Under Triton's interpreter (``TRITON_INTERPRET=1`` before this module is imported) the same kernels run on a CPU.
"""

from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from thermo_lib.extras import needs
from thermo_lib.quant.trellis import BLOCK_COLUMNS, STATE_BITS, BlockPlaces, codebook_on, whole_words

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    triton = needs("triton")
    tl = needs("triton.language")

_BYTES = 1024  # of codes that a program reads
_ROWS, _BLOCKS = 16, 32  # of a trellis-coded weight that a program writes


@triton.jit
@no_type_check
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
@no_type_check
def _word(words, at, count, inside):
    """Four bytes of a stream, the first one highest; zero where there are none."""
    word = tl.load(words + at, mask=inside & (at >= 0) & (at < count), other=0).to(tl.uint32, bitcast=True)
    swapped = (word << 24) | ((word & 0xFF00) << 8) | ((word >> 8) & 0xFF00) | (word >> 24)
    return swapped.to(tl.uint64)


@triton.jit
@no_type_check
def _streams(words, first, offset, gain, values, scale, out, count, rows, width, columns, groups, group_size,
             STATES: tl.constexpr, STATE_BITS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
             COLUMNS: tl.constexpr, BY_BLOCK: tl.constexpr):  # fmt: skip
    """Some rows of blocks of neighbouring columns of a trellis-coded weight, whose states lie in 64 bits each."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_row, is_block, is_column = row < rows, block * COLUMNS < columns, column < columns
    inside = is_row[:, None] & is_block[None, :]

    begin = tl.load(first + block, mask=is_block, other=0)
    bit = row[:, None] * width * 8 + begin[None, :]
    at, skip = bit >> 5, (bit & 31).to(tl.uint64)
    high = (_word(words, at, count, inside) << 32) | _word(words, at + 1, count, inside)
    low = _word(words, at + 2, count, inside)
    before = tl.maximum(-begin, 0).to(tl.uint64)[None, :]  # bits of other rows
    window = (((high << skip) | ((low << skip) >> 32)) << before) >> before
    right = 64 - STATE_BITS - tl.load(offset + column, mask=is_column, other=0)
    state = (window[:, :, None] >> right.to(tl.uint64)[None, :, :]).to(tl.int32) & (STATES - 1)

    # From shared memory, where lanes that look in different places don't wait for a line of memory each.
    table = tl.load(values + tl.arange(0, STATES))
    value = tl.gather(table, tl.reshape(state, (ROWS * BLOCKS * COLUMNS,)), 0)
    value = tl.reshape(value, (ROWS, BLOCKS, COLUMNS)) * tl.load(gain + column, mask=is_column, other=0)[None, :, :]
    all_inside = is_row[:, None, None] & is_column[None, :, :]
    if BY_BLOCK:
        where = row[:, None] * groups + (block * COLUMNS // group_size)[None, :]
        value *= tl.load(scale + where, mask=inside, other=0).to(tl.float32)[:, :, None]
    else:
        where = row[:, None, None] * groups + (column // group_size)[None, :, :]
        value *= tl.load(scale + where, mask=all_inside, other=0).to(tl.float32)
    place = out + row[:, None, None] * columns + column[None, :, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=all_inside)


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


def stream_weight(packed: Tensor, places: BlockPlaces, scale: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """The dequantized weight of trellis codes, in float32 bit for bit the plain one.

    Args:
        packed: uint8 ``(rows, bytes)``.
        places: of the columns.
        scale: ``(rows, groups)``.
        group_size: number of columns that share a scale.
        dtype: of the result.

    Returns:
        ``(rows, in_features)``.
    """
    (rows, width), columns, groups = packed.shape, places.columns, scale.shape[1]
    out = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    words, size = whole_words(packed), min(group_size, columns)
    of_columns = places.first, places.offset, places.gain, codebook_on(packed.device)
    _streams[triton.cdiv(rows, _ROWS), triton.cdiv(len(places.first), _BLOCKS)](
        *(words, *of_columns, scale.contiguous(), out, words.numel(), rows, width, columns, groups, size),
        STATES=2**STATE_BITS,
        STATE_BITS=STATE_BITS,
        ROWS=_ROWS,
        BLOCKS=_BLOCKS,
        COLUMNS=BLOCK_COLUMNS,
        BY_BLOCK=groups == 1 or size % BLOCK_COLUMNS == 0,
        num_warps=4,
    )
    return out

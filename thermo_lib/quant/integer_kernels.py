"""Products of whole numbers on a GPU, in Triton: the codes of an input times the codes of a weight, in int8.

With codes p of the input and q of the weight, their zero points y and z and their scales a and b, an output is
``a (sum_groups b sum p q - y sum_groups b sum q - sum_groups b z sum (p - y))``, as in ``kernels.cpp``. Codes and zero
points are shifted by the middle of their range where they wouldn't fit into int8 otherwise, which changes nothing.

Of many tokens no other way was faster. On an H200, at 2048 tokens and as multiples of the dense product, 3584 -> 18944,
18944 -> 3584 and 3584 -> 3584 took 1.12, 1.16 and 1.26 by these kernels. Codes that were unpacked to bytes first (0.07
to 0.09) and then multiplied by a Triton kernel with a scale a group took 1.27, 1.29 and 1.45, the best of 13 sizes of
blocks with pointers or the card's own copies of tiles. ``torch._int_mm`` alone, of such bytes and without any scale,
took 1.09, 0.84 and 1.01, so there is no second way by it for weights with a scale a row.
"""

import math
from typing import TYPE_CHECKING, NamedTuple, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor

from thermo_lib.extras import needs
from thermo_lib.quant.limits import SMALLEST_SCALE

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    triton = needs("triton")
    tl = needs("triton.language")

NARROWEST = 16  # bytes of a plane; narrower ones leave most of a tensor core's 32 places empty
PLACES = 32  # the zero points' part is summed over as many numbers at a time
_WIDEST = 64  # bytes of a plane that are multiplied at a time
_FEW = 64  # tokens, that are quantized by programs of more warps, and multiplied in blocks of all of them
_BLOCKS = 132  # of the output, that fill a card
_LONGEST = 4096  # places that are quantized at a time
_ROUNDS = tl.constexpr(3 * 2.0**22)  # a number this large has no fractions: to add it rounds, ties to even


class Tile(NamedTuple):
    """A block of the output that a program computes, and how.

    Attributes:
        rows, tokens: its size.
        warps, stages: of the program.
    """

    rows: int
    tokens: int
    warps: int
    stages: int


_TILES = {  # by the largest number of tokens they are for; measured on an H200 at 1, 32 and 256 to 4096 tokens
    16: Tile(64, 16, 4, 4),
    32: Tile(64, 32, 4, 4),
    64: Tile(64, 64, 4, 4),
    math.inf: Tile(64, 64, 4, 3),
}
_LONG = 64  # groups; blocks of longer rows and many tokens are larger, of more rows where their columns are split
_SPLIT_TILE, _LONG_TILE = Tile(128, 64, 4, 3), Tile(64, 128, 4, 3)
_FINISH_TILES = {16: Tile(32, 16, 4, 4), 64: Tile(64, 16, 4, 4), math.inf: Tile(64, 64, 4, 3)}


class TokenCodes(NamedTuple):
    """Quantized tokens: ``(codes - zero_point) * scale``.

    Attributes:
        codes: int8 ``(tokens, in_features)``, shifted by ``-2**(bits - 1)``.
        scale: float32 ``(tokens,)``.
        sums: float32 ``(tokens, places)``, what a weight's zero points are multiplied with: each group's sum of
            ``codes - zero_point``; the zero point, shifted like the codes; zeros up to a multiple of ``PLACES``.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor


@triton.jit
@no_type_check
def _quantize(x, given_scale, given_zero_point, codes, out_scale, sums, stride, clip, least, share,
              BITS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, SOME_GROUPS: tl.constexpr,
              ALL_PLACES: tl.constexpr, LENGTH: tl.constexpr, ALL_LENGTH: tl.constexpr, IS_GIVEN: tl.constexpr,
              BY_SHARE: tl.constexpr):  # fmt: skip
    """A token, some groups at a time; the groups and their places are padded to powers of two."""
    most: tl.constexpr = 2**BITS - 1
    parts: tl.constexpr = (GROUPS + SOME_GROUPS - 1) // SOME_GROUPS
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, ALL_PLACES)
    if IS_GIVEN:
        scale, zero = tl.load(given_scale + token * stride), tl.load(given_zero_point + token * stride)
    else:
        lowest = tl.full((SOME_GROUPS, ALL_PLACES), 0, tl.float32)
        highest = tl.full((SOME_GROUPS, ALL_PLACES), 0, tl.float32)
        for part in range(parts):
            group = part * SOME_GROUPS + tl.arange(0, SOME_GROUPS)
            inside = (group < GROUPS)[:, None] & (place < SIZE)[None, :]
            at = token * (GROUPS * SIZE) + group[:, None] * SIZE + place[None, :]
            value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
            lowest, highest = tl.minimum(lowest, value), tl.maximum(highest, value)
        low, high = clip * tl.min(tl.min(lowest, 1), 0), clip * tl.max(tl.max(highest, 1), 0)
        # torch divides by a number on a CPU, and multiplies by its inverse on a GPU.
        step = (high - low) * share if BY_SHARE else tl.div_rn(high - low, most * 1.0)
        scale = tl.maximum(step, least)
        zero = (tl.div_rn(0 - low, scale) + _ROUNDS) - _ROUNDS
    all_sums = sums + token * LENGTH
    last = tl.arange(0, ALL_LENGTH)
    shifted_zero = tl.where(last == GROUPS, zero - 2 ** (BITS - 1), 0.0)
    tl.store(all_sums + last, shifted_zero, mask=(last >= GROUPS) & (last < LENGTH))
    strange = tl.full((SOME_GROUPS, ALL_PLACES), 0, tl.int32)
    for part in range(parts):
        group = part * SOME_GROUPS + tl.arange(0, SOME_GROUPS)
        inside = (group < GROUPS)[:, None] & (place < SIZE)[None, :]
        at = token * (GROUPS * SIZE) + group[:, None] * SIZE + place[None, :]
        value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        strange |= (value != value).to(tl.int32)
        code = tl.minimum(tl.maximum(tl.div_rn(value, scale) + zero, 0.0), most * 1.0)
        code = ((code + _ROUNDS) - _ROUNDS).to(tl.int32)
        tl.store(codes + at, (code - 2 ** (BITS - 1)).to(tl.int8), mask=inside)
        total = tl.sum(tl.where(inside, code, 0), 1).to(tl.float32) - zero * SIZE
        tl.store(all_sums + group, total, mask=group < GROUPS)
    is_number = tl.max(tl.max(strange, 1), 0) == 0  # NaN has no code, and mustn't get lost
    tl.store(out_scale + token, tl.where(is_number, scale, float("nan")))


@triton.jit
@no_type_check
def _lane(some, LANE: tl.constexpr, BITS: tl.constexpr, BY_FOUR: tl.constexpr):
    """A code of each byte, int8; those of 8 bits are shifted by -128. ``BY_FOUR`` takes four bytes at a time."""
    if BITS == 8:
        return (some ^ 128).to(tl.int8, bitcast=True)
    elif BY_FOUR:
        mask: tl.constexpr = (2**BITS - 1) * 0x01010101
        code: tl.constexpr = f"{{ .reg .b32 t; shr.b32 t, $1, {LANE * BITS}; and.b32 $0, t, {mask}; }}"
        return tl.inline_asm_elementwise(code, "=r,r", [some], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return ((some >> (LANE * BITS)) & (2**BITS - 1)).to(tl.int8, bitcast=True)


@triton.jit
@no_type_check
def _lanes(some, BITS: tl.constexpr, BY_FOUR: tl.constexpr):
    """The codes of all lanes of bytes ``(rows, bytes)``, lane after lane: int8 ``(rows, lanes * bytes)``."""
    if BITS == 8:
        return _lane(some, 0, BITS, BY_FOUR)
    elif BITS == 4:
        pair = tl.join(_lane(some, 0, BITS, BY_FOUR), _lane(some, 1, BITS, BY_FOUR))
        return tl.reshape(tl.permute(pair, (0, 2, 1)), (some.shape[0], 2 * some.shape[1]))
    else:
        even = tl.join(_lane(some, 0, BITS, BY_FOUR), _lane(some, 2, BITS, BY_FOUR))
        odd = tl.join(_lane(some, 1, BITS, BY_FOUR), _lane(some, 3, BITS, BY_FOUR))
        return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), (some.shape[0], 4 * some.shape[1]))


@triton.jit
@no_type_check
def _multiply(codes, token_scale, sums, packed, scale, factors, out, tokens, rows,
              WIDTH: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
              LENGTH: tl.constexpr, STEP: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
              TOKENS: tl.constexpr, BY_FOUR: tl.constexpr):  # fmt: skip
    """A block of the output. Bytes of a plane are multiplied in int32, and what they come to is summed in float32.

    The weight is on the left, so that its unpacked codes can stay in registers. Where the columns are split, what each
    part of the groups comes to is written by itself, in float32, and ``_finish`` does the rest.
    """
    lanes: tl.constexpr = 8 // BITS
    blocks: tl.constexpr = (WIDTH + BYTES - 1) // BYTES
    per: tl.constexpr = (GROUPS + SPLITS - 1) // SPLITS
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    is_row, is_token = row < rows, token < tokens
    start = tl.program_id(2) * per
    total = tl.full((ROWS, TOKENS), 0, tl.float32)
    for step in range(start * blocks, tl.minimum(start + per, GROUPS) * blocks):
        group = step // blocks
        byte = (step % blocks) * BYTES + tl.arange(0, BYTES)
        is_byte = byte < WIDTH
        where = packed + row[:, None] * (GROUPS * WIDTH) + (group * WIDTH + byte)[None, :]
        some = tl.load(where, mask=is_row[:, None] & is_byte[None, :], other=0)
        place = tl.arange(0, lanes * BYTES)
        start_byte = (step % blocks) * BYTES
        column = (group * lanes + place // BYTES) * WIDTH + start_byte + place % BYTES
        there = is_token[:, None] & (start_byte + place % BYTES < WIDTH)[None, :]
        p = tl.load(codes + token[:, None] * (GROUPS * WIDTH * lanes) + column[None, :], mask=there, other=0)
        # One product of all lanes: each is waited for, as its left side is in registers.
        part = tl.dot(_lanes(some, BITS, BY_FOUR), tl.trans(p), out_dtype=tl.int32)
        b = tl.load(scale + row * GROUPS + group, mask=is_row, other=0).to(tl.float32)
        total += part.to(tl.float32) * b[:, None]
    if SPLITS > 1:
        place = out + tl.program_id(2).to(tl.int64) * tokens * rows + token[None, :] * rows + row[:, None]
        tl.store(place, total, mask=is_row[:, None] & is_token[None, :])
    else:
        for first in range(0, LENGTH, STEP):
            place = first + tl.arange(0, STEP)
            f = tl.load(factors + row[:, None] * LENGTH + place[None, :], mask=is_row[:, None], other=0)
            s = tl.load(sums + token[:, None] * LENGTH + place[None, :], mask=is_token[:, None], other=0)
            total = tl.dot(f, tl.trans(s), total, input_precision="tf32x3")
        total *= tl.load(token_scale + token, mask=is_token, other=0)[None, :]
        found = tl.trans(total).to(out.dtype.element_ty)
        tl.store(out + token[:, None] * rows + row[None, :], found, mask=is_token[:, None] & is_row[None, :])


@triton.jit
@no_type_check
def _finish(found, token_scale, sums, factors, out, tokens, rows, LENGTH: tl.constexpr, STEP: tl.constexpr,
            PARTS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """A block of the output, of products of codes that are there in parts: adds the zero points' part, and scales."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    is_row, is_token = row < rows, token < tokens
    inside, at = is_token[:, None] & is_row[None, :], token[:, None] * rows + row[None, :]
    total = tl.load(found + at, mask=inside, other=0)
    whole = tl.full((), 1, tl.int64) * tokens * rows
    for part in range(1, PARTS):
        total += tl.load(found + part * whole + at, mask=inside, other=0)
    for first in range(0, LENGTH, STEP):
        place = first + tl.arange(0, STEP)
        f = tl.load(factors + row[:, None] * LENGTH + place[None, :], mask=is_row[:, None], other=0)
        s = tl.load(sums + token[:, None] * LENGTH + place[None, :], mask=is_token[:, None], other=0)
        total = tl.dot(s, tl.trans(f), total, input_precision="tf32x3")
    total *= tl.load(token_scale + token, mask=is_token, other=0)[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def quantize_tokens(x: Tensor, ranges: tuple[Tensor, Tensor] | None, bits: int, clip: float, groups: int) -> TokenCodes:
    """Quantize tokens to the codes of ``codes.fake_quantize`` or ``codes.fake_quantize_per_token``.

    Args:
        x: ``(tokens, in_features)``, at least one token.
        ranges: float32 scale and zero point of each token, ``(tokens,)``; None takes each token's own range.
        bits: number of bits of a code, at most 8.
        clip: how far a token's own range reaches, as a share of the way from zero to its extremes.
        groups: number of groups of equal size, whose codes are summed.
    """
    tokens, columns = x.shape
    size, length = columns // groups, -(-(groups + 1) // PLACES) * PLACES
    codes = torch.empty((tokens, columns), dtype=torch.int8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    sums = torch.empty((tokens, length), dtype=torch.float32, device=x.device)
    given = (scale, scale) if ranges is None else ranges  # one range of all tokens isn't written out for each
    if given[0].stride() != given[1].stride():
        given = given[0].contiguous(), given[1].contiguous()
    padded = triton.next_power_of_2(size)
    longest = _LONGEST if tokens > _FEW else 8 * _LONGEST  # few tokens are quantized at once
    some = min(triton.next_power_of_2(groups), max(1, longest // padded))
    _quantize[(tokens,)](
        *(x.contiguous(), *given, codes, scale, sums, given[0].stride(0), clip, SMALLEST_SCALE, 1 / (2**bits - 1)),
        BITS=bits,
        GROUPS=groups,
        SIZE=size,
        SOME_GROUPS=some,
        ALL_PLACES=padded,
        LENGTH=length,
        ALL_LENGTH=triton.next_power_of_2(length),
        IS_GIVEN=ranges is not None,
        BY_SHARE=x.is_cuda,
        num_warps=min(16, max(4, some * padded // 2048)),
        enable_fp_fusion=False,  # torch rounds a product before it is added
    )
    return TokenCodes(codes, scale, sums)


def code_factors(codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """What ``TokenCodes.sums`` are multiplied with: float32 ``(rows, places)``.

    Args:
        codes: uint8 ``(rows, in_features)``.
        scale, zero_point: ``(rows, groups)``.
        bits: of a code; those of 8 bits are taken as shifted by -128.
    """
    grouped = codes.unflatten(1, (scale.shape[1], -1))
    shift = 128 if bits == 8 else 0
    offset = (grouped.sum(-1, dtype=torch.int32) - shift * grouped.shape[-1]) * scale.float()
    zeros = scale.float() * (zero_point.float() - shift)
    factors = -torch.cat([zeros, offset.sum(-1, keepdim=True)], 1)
    return F.pad(factors, (0, -factors.shape[1] % PLACES))


def code_product(
    tokens: TokenCodes,
    packed: Tensor,
    scale: Tensor,
    factors: Tensor,
    bits: int,
    dtype: torch.dtype,
    splits: int | None = None,
) -> Tensor:
    """Quantized tokens times a packed weight, transposed.

    Args:
        tokens: by ``quantize_tokens`` with as many groups.
        packed: uint8 ``(rows, in_features * bits / 8)``, codes plane by plane.
        scale: ``(rows, groups)``.
        factors: what ``code_factors`` returned.
        bits: of the weight's codes.
        dtype: of the result.
        splits: how many parts the columns are split into; None chooses so that the card is filled.

    Returns:
        ``(tokens, rows)``.
    """
    count, (rows, groups) = len(tokens.codes), scale.shape
    tile = _tile(count, rows, groups)
    blocks = triton.cdiv(rows, tile.rows), triton.cdiv(count, tile.tokens)
    if splits is None:
        splits = _splits(blocks[0] * blocks[1], groups, count)
    splits = triton.cdiv(groups, triton.cdiv(groups, splits))
    shape, kind = ((count, rows), dtype) if splits == 1 else ((splits, count, rows), torch.float32)
    out = torch.empty(shape, dtype=kind, device=packed.device)
    width = packed.shape[1] // groups
    _multiply[(*blocks, splits)](
        *(*tokens, packed.contiguous(), scale.contiguous(), factors, out, count, rows),
        WIDTH=width,
        BYTES=max(32, min(_WIDEST, width & -width)),
        BITS=bits,
        GROUPS=groups,
        LENGTH=factors.shape[1],
        STEP=PLACES,
        SPLITS=splits,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        BY_FOUR=packed.is_cuda,  # the interpreter runs no assembly
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out if splits == 1 else _sum_up(out, tokens, factors, dtype)


def _sum_up(found: Tensor, tokens: TokenCodes, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """The product ``(tokens, rows)`` from what the parts of the columns come to, float32 ``(parts, tokens, rows)``."""
    parts, count, rows = found.shape
    tile = _for_tokens(_FINISH_TILES, count)
    out = torch.empty((count, rows), dtype=dtype, device=found.device)
    _finish[(triton.cdiv(rows, tile.rows), triton.cdiv(count, tile.tokens))](
        *(found, tokens.scale, tokens.sums, factors, out, count, rows),
        LENGTH=factors.shape[1],
        STEP=PLACES,
        PARTS=parts,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def _tile(tokens: int, rows: int, groups: int) -> Tile:
    if tokens <= _FEW or groups <= _LONG:
        return _for_tokens(_TILES, tokens)
    blocks = triton.cdiv(rows, _SPLIT_TILE.rows) * triton.cdiv(tokens, _SPLIT_TILE.tokens)
    return _SPLIT_TILE if _splits(blocks, groups, tokens) > 1 else _LONG_TILE


def _for_tokens(tiles: dict[float, Tile], tokens: int) -> Tile:
    return next(tile for most, tile in tiles.items() if tokens <= most)


def _splits(blocks: int, groups: int, tokens: int) -> int:
    """Parts of the columns so that enough blocks of a few tokens are computed to fill a card, of four groups or more.

    Blocks of 64 tokens or fewer wait longer for memory than they compute, so four of them share a multiprocessor.
    """
    return max(1, min((4 if tokens <= _FEW else 2) * _BLOCKS // blocks, groups // 4))

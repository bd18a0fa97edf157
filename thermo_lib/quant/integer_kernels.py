"""Products of whole numbers on a GPU, in Triton: the codes of an input times the codes of a weight, in int8.

With codes p of the input and q of the weight, their zero points y and z and their scales a and b, an output is
``a (sum_groups b sum p q - y sum_groups b sum q - sum_groups b z sum (p - y))``, as in ``kernels.cpp``. Codes and zero
points are shifted by the middle of their range where they wouldn't fit into int8 otherwise, which changes nothing.

There is no second way by ``torch._int_mm`` for weights with a scale a row. It takes a byte a weight: kept so, four
times as much is read as of 2 bits, and to read is what takes the time at 256 tokens; unpacked for each product,
codes are written and read once more, which of an H100's bandwidth takes about as long as the product of 256 tokens
and a fifth of that of 2048. This is reckoned from the card's published rates, not measured.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from thermo_lib.extras import needs
from thermo_lib.quant.limits import SMALLEST_SCALE

triton = needs("triton")
tl = needs("triton.language")

NARROWEST = 16  # bytes of a plane; narrower ones leave most of a tensor core's 32 places empty
_WIDEST = 64  # bytes of a plane that are multiplied at a time
_ROUNDS = tl.constexpr(3 * 2.0**22)  # a number this large has no fractions: to add it rounds, ties to even


class TokenCodes(NamedTuple):
    """Quantized tokens: ``(codes - zero_point) * scale``.

    Attributes:
        codes: int8 ``(tokens, in_features)``, shifted by ``-2**(bits - 1)``. Where they alternate, the bits of every
            other one of a group are inverted: it is ``-1 - code``.
        scale, zero_point: float32 ``(tokens,)``; the zero points are shifted like the codes.
        sums: float32 ``(groups, tokens)``, of each group's ``codes - zero_point``. Where codes alternate, as many rows
            follow that sum the inverted ones, as they were before.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    sums: Tensor


@triton.jit
def _quantize(x, given_scale, given_zero_point, codes, out_scale, out_zero_point, sums, clip, least, share,
              BITS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, ALL_GROUPS: tl.constexpr,
              ALL_PLACES: tl.constexpr, IS_GIVEN: tl.constexpr, BY_SHARE: tl.constexpr,
              ALTERNATES: tl.constexpr):  # fmt: skip
    """A token; the groups and their places are padded to powers of two."""
    most: tl.constexpr = 2**BITS - 1
    token, tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    group, place = tl.arange(0, ALL_GROUPS), tl.arange(0, ALL_PLACES)
    inside = (group < GROUPS)[:, None] & (place < SIZE)[None, :]
    at = token * (GROUPS * SIZE) + group[:, None] * SIZE + place[None, :]
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if IS_GIVEN:
        scale, zero = tl.load(given_scale + token), tl.load(given_zero_point + token)
    else:
        low = clip * tl.minimum(tl.min(tl.min(value, 1), 0), 0.0)
        high = clip * tl.maximum(tl.max(tl.max(value, 1), 0), 0.0)
        # torch divides by a number on a CPU, and multiplies by its inverse on a GPU.
        step = (high - low) * share if BY_SHARE else tl.div_rn(high - low, most * 1.0)
        scale = tl.maximum(step, least)
        zero = (tl.div_rn(0 - low, scale) + _ROUNDS) - _ROUNDS
    code = tl.minimum(tl.maximum(tl.div_rn(value, scale) + zero, 0.0), most * 1.0)
    code = ((code + _ROUNDS) - _ROUNDS).to(tl.int32)
    shifted = code - 2 ** (BITS - 1)
    is_odd = (place % 2 == 1)[None, :]
    if ALTERNATES:
        shifted = tl.where(is_odd, -1 - shifted, shifted)
    tl.store(codes + at, shifted.to(tl.int8), mask=inside)
    total = tl.sum(tl.where(inside, code, 0), 1).to(tl.float32) - zero * SIZE
    tl.store(sums + group * tokens + token, total, mask=group < GROUPS)
    if ALTERNATES:
        odd = tl.sum(tl.where(inside & is_odd, code, 0), 1).to(tl.float32) - zero * (SIZE // 2)
        tl.store(sums + (GROUPS + group) * tokens + token, odd, mask=group < GROUPS)
    is_number = tl.max(tl.max((value != value).to(tl.int32), 1), 0) == 0  # NaN has no code, and mustn't get lost
    tl.store(out_scale + token, tl.where(is_number, scale, float("nan")))
    tl.store(out_zero_point + token, zero - 2 ** (BITS - 1))


@triton.jit
def _multiply(codes, token_scale, token_zero_point, sums, packed, scale, zero_point, offset, out, tokens, rows,
              WIDTH: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
              ROWS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """A block of the output. Bytes of a plane are multiplied in int32, and what they come to is summed in float32.

    The weight is on the left, so that its unpacked codes can stay in registers.
    """
    lanes: tl.constexpr = 8 // BITS
    shift: tl.constexpr = 128 if BITS == 8 else 0
    blocks: tl.constexpr = (WIDTH + BYTES - 1) // BYTES
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    is_row, is_token = row < rows, token < tokens
    total = tl.full((ROWS, TOKENS), 0, tl.float32)
    for step in range(GROUPS * blocks):
        group = step // blocks
        byte = (step % blocks) * BYTES + tl.arange(0, BYTES)
        is_byte = byte < WIDTH
        where = packed + row[:, None] * (GROUPS * WIDTH) + (group * WIDTH + byte)[None, :]
        some = tl.load(where, mask=is_row[:, None] & is_byte[None, :], other=0)
        part = tl.full((ROWS, TOKENS), 0, tl.int32)
        for lane in tl.static_range(lanes):
            q = (((some >> (lane * BITS)) & (2**BITS - 1)) ^ shift).to(tl.int8, bitcast=True)
            column = (group * lanes + lane) * WIDTH + byte
            there = is_token[:, None] & is_byte[None, :]
            p = tl.load(codes + token[:, None] * (GROUPS * WIDTH * lanes) + column[None, :], mask=there, other=0)
            part = tl.dot(q, tl.trans(p), part, out_dtype=tl.int32)
        b = tl.load(scale + row * GROUPS + group, mask=is_row, other=0).to(tl.float32)
        total += part.to(tl.float32) * b[:, None]
    for group in range(GROUPS):
        b = tl.load(scale + row * GROUPS + group, mask=is_row, other=0).to(tl.float32)
        z = tl.load(zero_point + row * GROUPS + group, mask=is_row, other=0).to(tl.float32) - shift
        total -= (b * z)[:, None] * tl.load(sums + group * tokens + token, mask=is_token, other=0)[None, :]
    y = tl.load(token_zero_point + token, mask=is_token, other=0)
    total -= tl.load(offset + row, mask=is_row, other=0)[:, None] * y[None, :]
    total *= tl.load(token_scale + token, mask=is_token, other=0)[None, :]
    found = tl.trans(total).to(out.dtype.element_ty)
    tl.store(out + token[:, None] * rows + row[None, :], found, mask=is_token[:, None] & is_row[None, :])


def quantize_tokens(
    x: Tensor,
    ranges: tuple[Tensor, Tensor] | None,
    bits: int,
    clip: float,
    groups: int,
    alternates: bool = False,
) -> TokenCodes:
    """Quantize tokens to the codes of ``codes.fake_quantize`` or ``codes.fake_quantize_per_token``.

    Args:
        x: ``(tokens, in_features)``, at least one token.
        ranges: float32 scale and zero point of each token, ``(tokens,)``; None takes each token's own range.
        bits: number of bits of a code, at most 8.
        clip: how far a token's own range reaches, as a share of the way from zero to its extremes.
        groups: number of groups of equal size, whose codes are summed.
        alternates: invert every other code, see ``TokenCodes``; a group's size is even.
    """
    tokens, columns = x.shape
    codes = torch.empty((tokens, columns), dtype=torch.int8, device=x.device)
    scale, zero_point = torch.empty((2, tokens), dtype=torch.float32, device=x.device)
    sums = torch.empty(((1 + alternates) * groups, tokens), dtype=torch.float32, device=x.device)
    given = (scale, zero_point) if ranges is None else [part.contiguous() for part in ranges]
    size = columns // groups
    padded = triton.next_power_of_2(groups), triton.next_power_of_2(size)
    _quantize[(tokens,)](
        *(x.contiguous(), *given, codes, scale, zero_point, sums, clip, SMALLEST_SCALE, 1 / (2**bits - 1)),
        BITS=bits,
        GROUPS=groups,
        SIZE=size,
        ALL_GROUPS=padded[0],
        ALL_PLACES=padded[1],
        IS_GIVEN=ranges is not None,
        BY_SHARE=x.is_cuda,
        ALTERNATES=alternates,
        num_warps=min(16, max(4, padded[0] * padded[1] // 2048)),
        enable_fp_fusion=False,  # torch rounds a product before it is added
    )
    return TokenCodes(codes, scale, zero_point, sums)


def code_offset(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """What each row's codes sum up to, times their scales: float32 ``(rows,)``.

    Args:
        codes: uint8 ``(rows, in_features)``.
        scale: ``(rows, groups)``.
        bits: of a code; those of 8 bits are taken as shifted by -128.
    """
    grouped = codes.unflatten(1, (scale.shape[1], -1))
    shift = 128 if bits == 8 else 0
    return ((grouped.sum(-1, dtype=torch.int32) - shift * grouped.shape[-1]) * scale.float()).sum(-1)


def tile(tokens: int) -> int:
    """How many tokens a program multiplies; the kernel is another one for each of these sizes."""
    return min(128, max(16, triton.next_power_of_2(tokens)))


def code_product(
    tokens: TokenCodes,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    offset: Tensor,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Quantized tokens times a packed weight, transposed.

    Args:
        tokens: by ``quantize_tokens`` with as many groups.
        packed: uint8 ``(rows, in_features * bits / 8)``, codes plane by plane.
        scale, zero_point: ``(rows, groups)``.
        offset: what ``code_offset`` returned.
        bits: of the weight's codes.
        dtype: of the result.

    Returns:
        ``(tokens, rows)``.
    """
    count, (rows, groups) = len(tokens.codes), scale.shape
    out = torch.empty((count, rows), dtype=dtype, device=packed.device)
    width = packed.shape[1] // groups
    tall, wide = 64 if count <= 64 else 128, tile(count)
    _multiply[(triton.cdiv(rows, tall), triton.cdiv(count, wide))](
        *(*tokens, packed.contiguous(), scale.contiguous(), zero_point.contiguous(), offset, out, count, rows),
        WIDTH=width,
        BYTES=max(32, min(_WIDEST, width & -width)),
        BITS=bits,
        GROUPS=groups,
        ROWS=tall,
        TOKENS=wide,
        num_warps=4 if tall * wide < 128 * 128 else 8,
        num_stages=3,
    )
    return out

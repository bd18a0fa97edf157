"""Products from codes on CUDA by ``humming-kernels``, which compiles its kernels at their first use.

Its kernels for inputs in int8 take no zero point that has a fraction, take a weight's code of n bits as shifted by
``-2**(n - 1)``, and give their result in 16 bits. So zero points are left to a small product of the inputs' group sums.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thermo_lib.extras import needs

if TYPE_CHECKING:
    from thermo_lib.quant.integer_kernels import TokenCodes

_LARGEST = 2.0**15  # that a result in float16 may reach


def humming_product(
    codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Convert a weight once, for products with inputs of one type.

    Args:
        codes: uint8 ``(out_features, in_features)`` on a GPU.
        scale, zero_point: ``(out_features, groups)``; zero points may have fractions.
        bits: of a code.
        group_size: weights that share them; a multiple of 8.
        dtype: bfloat16 or float16.

    Returns:
        A function of the input ``(tokens, in_features)`` that returns ``(tokens, out_features)``.
    """
    how = {"group_size": min(group_size, codes.shape[1]), "has_zero_point": True, "is_fp_zero_point": True}
    tensors = {"weight_scale": scale.to(dtype), "zero_point": zero_point.to(dtype)}
    return _layer(codes, bits, dtype, how, tensors)


def humming_code_product(
    codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> Callable[["TokenCodes", torch.dtype], Tensor]:
    """Convert a weight once, for products with the codes of inputs, in whole numbers.

    A sum of products of codes is rounded to 11 bits before the zero points' part of it is taken away, so that part has
    to be small. Weights are between -2 and 1 where they have 2 bits, -1/2 in the mean, and an input's codes may be far
    from zero in the mean. Therefore the bits of every other code are inverted, in the weight and in the inputs, which
    makes ``-1 - code`` of it: what neighbours add up to is close to zero then. With codes u of the input and v of the
    weight after that, and ``-1 - y`` and ``-1 - z`` for the zero points where they are inverted, an output is
    ``a sum_groups b (sum u v - y (sum_even v - sum_odd v) + sum_odd v - z sum (p - y) - sum_odd (p - y))``.

    Args:
        codes: uint8 ``(out_features, in_features)`` on a GPU; both are multiples of 64.
        scale, zero_point: ``(out_features, groups)``; groups of a multiple of 32, zero points may have fractions.
        bits: of a code.

    Returns:
        A function of tokens with as many groups, whose codes alternate, and of the result's type, to
        ``(tokens, out_features)``.
    """
    from thermo_lib.quant.integer_kernels import finish, pad

    (columns, groups), middle = (codes.shape[1], scale.shape[1]), 2 ** (bits - 1)
    is_odd = torch.arange(columns, device=codes.device) % 2 == 1
    turned = torch.where(is_odd, 2**bits - 1 - codes, codes)
    b, z = scale.float(), zero_point.float() - middle
    unit = 2.0 ** math.ceil(math.log2(max(float(b.abs().max()), 2.0**-24)))  # scales are at most 1 in it
    share = 2.0 ** min(0, math.floor(math.log2(_LARGEST / (128 * middle * columns))))
    grouped = turned.unflatten(1, (groups, -1)).int() - middle
    even, odd = ((grouped[..., first::2].sum(-1) * b).sum(-1) for first in (0, 1))
    factors = pad(torch.cat([-(b * z), -b, (odd - even)[:, None], odd[:, None]], 1))
    how = {"group_size": 0 if groups == 1 else columns // groups}
    layer = _layer(
        turned, bits, torch.float16, how, {"weight_scale": (b / unit).half()}, input_config={"dtype": "int8"}
    )

    shares: dict[int, Tensor] = {}

    def product(tokens: "TokenCodes", dtype: torch.dtype) -> Tensor:
        count = -(-len(tokens.codes) // 4) * 4  # scales of tokens are read in fours
        if count not in shares:
            shares[count] = torch.full((count, 1), share, dtype=torch.float32, device=codes.device)
        found = layer(tokens.codes, input_scale=shares[count][: len(tokens.codes)])
        return finish(found, tokens, factors, unit / share, dtype)

    return product


def _layer(
    codes: Tensor, bits: int, dtype: torch.dtype, how: dict[str, Any], tensors: dict[str, Tensor], **more: Any
) -> Callable[..., Tensor]:
    """A layer of ``humming``, whose results are of a type."""
    HummingLayer = needs("humming.layer").HummingLayer
    pack_weight = needs("humming.ops").pack_weight
    how = {"dtype": f"uint{bits}", **how}
    with torch.cuda.device(codes.device):
        layer = HummingLayer(*codes.shape, weight_config=how, torch_dtype=dtype, **more).to(codes.device)
        layer.load_from_tensors({"weight": pack_weight(codes.int(), bits), **tensors})
        layer.transform()
    return layer

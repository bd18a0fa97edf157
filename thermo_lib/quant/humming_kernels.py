"""Products from codes on CUDA by ``humming-kernels``, which compiles its kernels at their first use."""

from collections.abc import Callable

import torch
from torch import Tensor

from thermo_lib.extras import needs


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
    HummingLayer = needs("humming.layer").HummingLayer
    pack_weight = needs("humming.ops").pack_weight
    group_size = min(group_size, codes.shape[1])
    how = {"dtype": f"uint{bits}", "group_size": group_size, "has_zero_point": True, "is_fp_zero_point": True}
    parameters = {"weight_scale": scale.to(dtype), "zero_point": zero_point.to(dtype)}
    with torch.cuda.device(codes.device):
        layer = HummingLayer(*codes.shape, weight_config=how, torch_dtype=dtype).to(codes.device)
        layer.load_from_tensors({"weight": pack_weight(codes.int(), bits), **parameters})
        layer.transform()
    return layer

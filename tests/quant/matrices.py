"""Random weights, and what the tests of quantizers compare with."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from thermo_lib.quant.codes import BIT_WIDTHS, QuantizedWeight, pack, quantize_codes
from thermo_lib.quant.layers import TrellisLinear
from thermo_lib.quant.rounding import least_squares, least_squares_parameters, round_to_nearest
from thermo_lib.quant.trellis import pack_symbols

HALF_ULP = 2.0**-11  # relative error of rounding to float16
SUBNORMAL = 2.0**-25  # absolute error of rounding a float16 below its normal range

bit_widths = st.sampled_from(BIT_WIDTHS)
seeds = st.integers(0, 2**31)
roundings = st.sampled_from([round_to_nearest, least_squares])


def weights(rows: int, columns: int, seed: int, size: float = 1.0, mean: float = 0.0) -> Tensor:
    """A random weight matrix."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size + mean


def random_trellis(bits: Tensor, rows: int, group_size: int, generator: torch.Generator) -> TrellisLinear:
    """A layer of random symbols, of these bits of the columns, and random scales."""
    columns = len(bits)
    symbols = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    layer = TrellisLinear(columns, rows, bits=2, group_size=group_size, bias=False)
    layer.packed = pack_symbols(symbols & ((1 << bits.int()) - 1).to(torch.uint8), bits)
    layer.packed_column_bits = pack(bits, 4)
    layer.scale = (torch.rand(layer.scale.shape, generator=generator) + 0.1).half()
    return layer


def thorough(weight: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Codes nearest to the weight at the parameters that the thorough search finds."""
    fits = [(group, *least_squares_parameters(group, bits)) for group in weight.split(group_size, dim=1)]
    codes = [quantize_codes(group, scale.float(), zero.float(), bits) for group, scale, zero in fits]
    parameters = (torch.cat([fit[k] for fit in fits], 1) for k in (1, 2))
    return QuantizedWeight(torch.cat(codes, 1).to(torch.uint8), *parameters, bits, group_size)


def spread(values: Tensor, columns: int, group_size: int) -> Tensor:
    """Parameters of groups as one value a column, ``(rows, columns)`` float64."""
    return values.double().repeat_interleave(group_size, 1)[:, :columns]

"""Trellis-coded weights: few bits a weight, spent on the columns where they count most.

A row's codes are one stream of bits, and a weight's value is looked up by the last ``STATE_BITS`` bits of the stream up
to it, so that neighbours share bits and a code of ``k`` bits is nearer to the rate-distortion bound than ``2^k`` levels
are (trellis-coded quantization, Marcellin and Fischer 1990; with shifted states and a fixed Gaussian codebook: QTIP,
arXiv 2406.11235). Here the columns of one layer may take different numbers of bits, and the stream is searched under
GPTQ's error feedback (arXiv 2210.17323): the squared output error is a sum over columns once each column's error is
pushed onto the rest, so the search keeps the best so many partial rows (the M-algorithm, Anderson and Mohan 1984).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from thermo_lib.quant.codes import check_weight, dequantize, storable
from thermo_lib.quant.gptq import TRACE, check_hessian, fit_precision, inverse_factor
from thermo_lib.quant.limits import SMALLEST_SCALE
from thermo_lib.quant.precision import FLOAT32, products_in

STATE_BITS = 12
MOST_BITS = 6  # of a column
BLOCK_COLUMNS = 8  # neighbours whose states lie in 64 bits, whatever their bits are
_BLOCK = 16  # columns between two updates of all later columns
_SEARCHED = 2**26  # numbers that the search keeps at a time
_HELD = 20  # bytes of a GPU for each of these, twice what is held: launches take the time there, so rows are many
_REFITTED = 2**27  # numbers of a matrix (rows, groups, in_features) that the fit of the scales holds at a time


@cache
def codebook() -> Tensor:
    """The value of every state, float32 ``(2**STATE_BITS,)``: the quantiles of a standard normal distribution.

    They are shuffled, but so that the successors of a state, which differ in their last bits, divide the distribution
    evenly, whatever the number of bits (set partitioning, Ungerboeck 1982). Every value is a float16 number.
    """
    states = torch.arange(2**STATE_BITS)
    last, first = states % 2**MOST_BITS, states >> MOST_BITS
    reversed_last = sum(((last >> bit) & 1) << (MOST_BITS - 1 - bit) for bit in range(MOST_BITS))
    generator = torch.Generator().manual_seed(1)
    turn = torch.randint(0, 2**MOST_BITS, (len(states) >> MOST_BITS,), generator=generator)
    stratum = (reversed_last + turn[first]) % 2**MOST_BITS
    rank = torch.empty_like(states)
    for number in range(2**MOST_BITS):
        members = (stratum == number).nonzero().flatten()
        rank[members] = number * len(members) + torch.randperm(len(members), generator=generator)
    quantile = (rank.double() + 0.5) / len(states)
    return torch.special.ndtri(quantile).half().float()


@cache
def codebook_on(device: torch.device) -> Tensor:
    """``codebook`` on a device."""
    return codebook().to(device)


def gains(column_bits: Tensor) -> Tensor:
    """How far each column's values reach, ``sqrt(1 - 4^-k)``, float32 ``(in_features,)``.

    A code of ``k`` bits of a normal source of variance 1 has the variance ``1 - 4^-k`` at the rate-distortion bound; a
    column without bits is zero.
    """
    return (1 - 0.25 ** column_bits.float()).sqrt()


def pack_symbols(symbols: Tensor, column_bits: Tensor) -> Tensor:
    """Write each row's codes one after the other, the highest bit first.

    Args:
        symbols: uint8 ``(out_features, in_features)``, each below two to the power of its column's bits.
        column_bits: ``(in_features,)``, 0 to ``MOST_BITS``.

    Returns:
        uint8 ``(out_features, ceil(sum of column_bits / 8))``; unused bits of the last byte are zero.
    """
    bits = column_bits.long()
    column = torch.arange(len(bits), device=bits.device).repeat_interleave(bits)
    ends = bits.cumsum(0)
    shift = ends[column] - 1 - torch.arange(len(column), device=bits.device)
    stream = (symbols[:, column] >> shift.to(torch.uint8)) & 1
    lanes = F.pad(stream, (0, -stream.shape[1] % 8)).unflatten(1, (-1, 8)).int()
    return (lanes << torch.arange(7, -1, -1, device=lanes.device)).sum(-1).to(torch.uint8)


def read_states(packed: Tensor, column_bits: Tensor) -> Tensor:
    """The state at each column, int32 ``(out_features, in_features)``: the last bits of the stream up to there.

    Args:
        packed: what ``pack_symbols`` returned; before its first bit there are zeros.
        column_bits: ``(in_features,)``.
    """
    padded = F.pad(packed, (2, 2)).int()
    first = column_bits.long().cumsum(0) + 16 - STATE_BITS  # a window of STATE_BITS touches at most three bytes
    byte, offset = first // 8, first % 8
    word = (padded[:, byte] << 16) | (padded[:, byte + 1] << 8) | padded[:, byte + 2]
    return (word >> (24 - STATE_BITS - offset).int()) & (2**STATE_BITS - 1)


class BlockPlaces(NamedTuple):
    """Where the states of blocks of ``BLOCK_COLUMNS`` neighbours are in a row's stream; the last block may be short.

    Attributes:
        first: int32 ``(blocks,)``, the first bit of a block's first state; below zero before the row, where zeros are.
        offset: int32 ``(blocks, BLOCK_COLUMNS)``, how many bits later each column's state begins.
        gain: float32 ``(blocks, BLOCK_COLUMNS)``, see ``gains``.
        columns: number of columns.
    """

    first: Tensor
    offset: Tensor
    gain: Tensor
    columns: int


def block_places(column_bits: Tensor) -> BlockPlaces:
    """Where the states of columns with these bits are."""
    padded = F.pad(column_bits.long(), (0, -len(column_bits) % BLOCK_COLUMNS))
    start = (padded.cumsum(0) - STATE_BITS).view(-1, BLOCK_COLUMNS)
    first = start[:, 0].contiguous()
    return BlockPlaces(
        first.int(), (start - first[:, None]).int(), gains(padded).view(-1, BLOCK_COLUMNS), len(column_bits)
    )


def whole_words(packed: Tensor) -> Tensor:
    """Bytes as int32 words, flat; they are copied only where they don't fill the words or lie across them."""
    flat = packed.reshape(-1)
    if flat.numel() % 4 or flat.data_ptr() % 4:
        flat = F.pad(flat, (0, -flat.numel() % 4)).clone()
    return flat.view(torch.int32)


def read_codes(packed: Tensor, column_bits: Tensor) -> Tensor:
    """The weights before scaling, float32 ``(out_features, in_features)``; arguments as ``read_states``."""
    return codebook_on(packed.device)[read_states(packed, column_bits)] * gains(column_bits)


@dataclass(frozen=True)
class TrellisWeight:
    """A weight matrix as streams of bits and the scales of its groups.

    Attributes:
        packed: uint8 ``(out_features, bytes)``, see ``pack_symbols``.
        column_bits: uint8 ``(in_features,)``.
        scale: float16 ``(out_features, groups)``, positive.
        group_size: weights of a group along the input dimension.
    """

    packed: Tensor
    column_bits: Tensor
    scale: Tensor
    group_size: int

    def codes(self) -> Tensor:
        """The weights before scaling, float32 ``(out_features, in_features)``."""
        return read_codes(self.packed, self.column_bits)

    def dequantize(self) -> Tensor:
        """The quantized weight, float32 ``(out_features, in_features)``."""
        return dequantize(self.codes(), self.scale, torch.zeros_like(self.scale), self.group_size)


def column_costs(weight: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """What an error of the size of the weights would cost in each column, float64 ``(in_features,)``.

    GPTQ's squared output error is the sum of the columns' squared errors over ``Hinv_ii^2``, once each column's error
    is pushed onto the later ones. A column whose input is always zero costs nothing.

    Args:
        weight: ``(out_features, in_features)``.
        hessian: ``sum x x^T``, ``(in_features, in_features)``.
        damping: see ``gptq``.
    """
    costs = weight.double().square().sum() / weight.shape[1] / inverse_factor(hessian, damping).diagonal().square()
    return torch.where(hessian.diagonal() == 0, 0.0, costs)


def allocate_bits(costs: Mapping[str, Tensor], rows: Mapping[str, int], average_bits: float) -> dict[str, Tensor]:
    """Give every column of every layer so many bits that the sum of their errors is least.

    A column with ``k`` bits has the error ``4^-k`` times its cost (the distortion-rate function of a normal source), so
    the next bit goes where the cost of a weight is largest: reverse water-filling, Cover and Thomas, section 10.3.3,
    with whole bits, and one at least: what a column without any leaves to the others is more than its cost says.

    Args:
        costs: layer name to what ``column_costs`` returned.
        rows: layer name to ``out_features``, the weights of a column.
        average_bits: mean of the bits over all weights; reached from below.

    Returns:
        Layer name to uint8 ``(in_features,)``, 1 to ``MOST_BITS``, on the CPU: the search reads them as numbers.

    Raises:
        ValueError: an average out of range.
    """
    if not 1 <= average_bits <= MOST_BITS:
        raise ValueError(f"average_bits: found {average_bits}, allowed are 1..{MOST_BITS}")
    more = MOST_BITS - 1  # than the first bit
    costs = {name: cost.cpu() for name, cost in costs.items()}
    share = 0.25 ** torch.arange(more, dtype=torch.float64)  # of its cost, that each of them saves
    saved = torch.cat([(costs[name] / rows[name])[:, None] * share for name in costs]).flatten()
    weights = torch.cat([torch.full((len(costs[name]) * more,), rows[name]) for name in costs])
    order = saved.argsort(descending=True, stable=True)
    budget = int((average_bits - 1) * sum(len(costs[name]) * rows[name] for name in costs))
    taken = torch.zeros(len(saved), dtype=torch.uint8)
    taken[order] = (weights[order].cumsum(0) <= budget).to(torch.uint8)
    bits = 1 + taken.view(-1, more).sum(1, dtype=torch.uint8)
    return dict(zip(costs, bits.split([len(cost) for cost in costs.values()]), strict=True))


@products_in(FLOAT32)
def trellis(
    weight: Tensor,
    hessian: Tensor,
    column_bits: Tensor,
    group_size: int,
    damping: float,
    beam: int,
) -> TrellisWeight:
    """Search the streams of bits of least squared output error, and fit the scales.

    Args:
        weight: ``(out_features, in_features)``.
        hessian: ``sum x x^T`` over the calibration inputs, ``(in_features, in_features)``.
        column_bits: bits of each column's codes, ``(in_features,)``, 0 to ``MOST_BITS``, on the CPU.
        group_size: weights along the input dimension that share a scale.
        damping: see ``gptq``.
        beam: partial rows that are kept at each column; 1 takes the nearest value, as GPTQ does.

    Raises:
        ValueError: NaN, infinity, or a Hessian or ``column_bits`` of another size than the weight's rows.
    """
    check_weight(weight)
    in_features = weight.shape[1]
    check_hessian(hessian, in_features)
    if column_bits.shape != (in_features,) or column_bits.min() < 0 or column_bits.max() > MOST_BITS:
        found = f"shape {tuple(column_bits.shape)} in {column_bits.min()}..{column_bits.max()}"
        raise ValueError(f"column_bits: found {found}, allowed is ({in_features},) in 0..{MOST_BITS}")
    if beam < 1:
        raise ValueError(f"beam: found {beam}, allowed is at least 1")
    width = min(group_size, in_features)  # of a group
    Hinv = inverse_factor(hessian, damping).float()
    padded = F.pad(weight.float(), (0, -in_features % width)).unflatten(1, (-1, width))
    here = column_bits.to(weight.device)
    sizes = torch.full((padded.shape[1],), width)
    sizes[-1] = in_features - width * (len(sizes) - 1)
    deviation = padded.square().sum(-1).div(sizes.to(weight.device)).sqrt()
    scale, _ = storable(deviation, torch.zeros_like(deviation))
    of_column = scale.float().repeat_interleave(width, 1)[:, :in_features] * gains(here)
    at_a_time = max(1, _searched(weight.device) // (beam * in_features))
    symbols = [
        _search(rows, reach, Hinv, column_bits.tolist(), beam)
        for rows, reach in zip(weight.float().split(at_a_time), of_column.split(at_a_time), strict=True)
    ]
    packed = pack_symbols(torch.cat(symbols), here)
    quantized = TrellisWeight(packed, here.to(torch.uint8), scale, group_size)
    return refit_scales(weight, quantized, hessian)


def _searched(device: torch.device) -> int:
    """How many numbers the search keeps at a time: on a GPU in coarse steps, so that it seldom differs on one card."""
    if device.type != "cuda":
        return _SEARCHED
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    step = 1 << max(0, (free // _HELD).bit_length() - 3)  # a quarter of the power of two below
    return max(_SEARCHED, free // _HELD // step * step)


def _search(weight: Tensor, reach: Tensor, Hinv: Tensor, column_bits: Sequence[int], beam: int) -> Tensor:
    """The symbols of some rows, uint8 ``(rows, in_features)``.

    Args:
        weight: float32 ``(rows, in_features)``.
        reach: what the codebook's values are multiplied with, the same shape.
        Hinv: upper triangular, ``(in_features, in_features)``.
        column_bits: of each column.
        beam: partial rows kept.
    """
    rows, in_features = weight.shape
    values, device = codebook_on(weight.device), weight.device
    choices_of = {bits: torch.arange(2**bits, device=device) for bits in set(column_bits)}
    W = weight[:, None]  # (rows, kept, columns from the block's first)
    state, cost = (torch.zeros((rows, 1), dtype=dtype, device=device) for dtype in (torch.int64, torch.float32))
    steps: list[tuple[Tensor, Tensor]] = []  # of each column: the parents of what is kept, and their new symbols
    for start in range(0, in_features, _BLOCK):
        width = min(_BLOCK, in_features - start)
        block, rest = W[..., :width], W[..., width:]  # what is done of the block becomes its errors
        ancestor = torch.arange(block.shape[1], device=device).expand(rows, -1)
        for offset in range(width):
            column = start + offset
            choices = 2 ** column_bits[column]
            successors = (state[..., None] * choices + choices_of[column_bits[column]]) % 2**STATE_BITS
            value = values[successors] * reach[:, column, None, None]
            err = ((block[..., offset, None] - value) / Hinv[column, column]).flatten(1)
            cost = (cost[..., None] + err.unflatten(1, (-1, choices)).square()).flatten(1)
            kept = min(beam, cost.shape[1])
            cost, chosen = cost.topk(kept, 1, largest=False, sorted=False)
            parent = chosen // choices
            state, err = successors.flatten(1).gather(1, chosen), err.gather(1, chosen)
            steps.append((parent.to(torch.int32), (chosen % choices).to(torch.uint8)))
            block, ancestor = _of_parents(block, parent), ancestor.gather(1, parent)
            block[..., offset] = err
            block[..., offset + 1 :] -= err[..., None] * Hinv[column, column + 1 : start + width]
        stop = start + width
        W = _of_parents(rest, ancestor)
        del rest  # this is most of what is held, so that there is no third of it
        W -= block @ Hinv[start:stop, stop:]
    at = cost.argmin(1, keepdim=True)
    symbols = torch.empty((rows, in_features), dtype=torch.uint8, device=device)
    for column in range(in_features - 1, -1, -1):
        parent, symbol = steps[column]
        symbols[:, column] = symbol.gather(1, at).squeeze(1)
        at = parent.gather(1, at).long()
    return symbols


def _of_parents(x: Tensor, parent: Tensor) -> Tensor:
    """``(rows, kept, columns)`` of the partial rows that the new ones continue."""
    return x.gather(1, parent[..., None].expand(-1, -1, x.shape[2]))


@products_in(FLOAT32)
def refit_scales(weight: Tensor, quantized: TrellisWeight, hessian: Tensor) -> TrellisWeight:
    """The scales of least squared output error for fixed codes, in closed form.

    Args:
        weight: the full-precision weight, ``(out_features, in_features)``.
        quantized: its codes and the scales to start from.
        hessian: ``sum x x^T``, ``(in_features, in_features)``.

    Returns:
        The same codes with new scales; a scale that wouldn't be positive stays as it was.
    """
    groups, width = quantized.scale.shape[1], min(quantized.group_size, weight.shape[1])
    rows = max(1, _REFITTED // (weight.shape[1] * groups))
    parts = (tensor.split(rows) for tensor in (weight, quantized.packed, quantized.scale))
    H = hessian.to(fit_precision(hessian.device))
    group_of = torch.arange(weight.shape[1], device=weight.device) // width
    member = group_of == torch.arange(groups, device=weight.device)[:, None]  # (groups, in)

    def fit(weight: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        codes = read_codes(packed, quantized.column_bits).to(H.dtype)
        by_group = codes[:, None] * member  # (out, groups, in)
        A = by_group @ H @ by_group.transpose(1, 2)
        b = by_group @ (weight.to(H.dtype) @ H)[..., None]
        # A group without bits decides nothing.
        strength = max(1e-9, TRACE[H.dtype]) * A.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        regular = A + torch.diag_embed(strength[:, None].expand(-1, groups))
        start = scale.to(H.dtype)[..., None]
        fitted = torch.linalg.solve(regular, b + strength[:, None, None] * start).squeeze(-1)
        stored, _ = storable(fitted.float(), torch.zeros_like(fitted))
        return torch.where(fitted > SMALLEST_SCALE, stored, scale)

    scale = torch.cat([fit(*some) for some in zip(*parts, strict=True)])
    return TrellisWeight(quantized.packed, quantized.column_bits, scale, quantized.group_size)

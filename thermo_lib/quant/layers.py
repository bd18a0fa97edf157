"""Layers that compute from packed codes: linears with time-aware parameters, trellis-coded linears, embeddings."""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thermo_lib.quant import planes
from thermo_lib.quant.calls import CALL
from thermo_lib.quant.codes import check_bits, dequantize, fake_quantize, fake_quantize_per_token, unpack
from thermo_lib.quant.trellis import read_codes

_ALL = slice(None)
_DENSE = 2**24  # weights of a layer that are dequantized at a time


class _Coded(nn.Module):
    """A module with buffers that move between devices with the model, but keep their precision.

    ``PRECISE`` names them: a parameter of a code in bfloat16, say, would be that of another weight.
    """

    PRECISE: tuple[str, ...] = ("scale", "zero_point")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers[name] for name in self.PRECISE}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            changed = self._buffers[name]
            if changed.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(changed.device)
        return self


class QuantizedLinear(_Coded):
    """A linear layer that computes from packed weights, with parameters that may depend on the timestep.

    Time-dependent parameters are tables of distinct rows with one row number a timestep, so neighbouring
    timesteps that share parameters share a row.

    Args:
        in_features, out_features: size of the layer.
        bits: bits of a weight code.
        group_size: weights that share scale and zero point.
        bias: whether there is a bias.
        activation_bits: 16 leaves the input as it is.
        activation_group_size: neighbouring input channels that share a static range; None for all of them.
        timesteps: ``T`` of the tables.

    Weight parameters are ``(rows, out_features, groups)``, at first one row. Static activation parameters are ``(rows,
    token states, channel groups)``, at first none, which means dynamic per-token ranges; with two token states the
    first belongs to unmasked tokens, the second to masked ones.

    ``STORED`` names the uint8 buffers that hold the codes. ``has_planes`` says whether they lie plane by plane; then
    inputs of less than float32 are multiplied block by block as in ``quant.planes``, and if ``compiled`` is set,
    with a compiled loop.
    """

    STORED: tuple[str, ...] = ("packed",)
    PRECISE = ("scale", "zero_point", "activation_scale", "activation_zero_point")
    has_zero_point = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        bias: bool,
        activation_bits: int = 16,
        activation_group_size: int | None = None,
        timesteps: int = 1,
    ):
        super().__init__()
        check_bits(bits)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.activation_bits = bits, group_size, activation_bits
        self.activation_clip = 1.0  # of dynamic ranges
        self.timesteps = timesteps
        self.has_planes = planes.width(in_features, bits, group_size) > 0
        self.compiled = False
        self.activation_group_size = activation_group_size or in_features
        self._rows: dict[str, tuple[Tensor, list[int]]] = {}  # what ``_row`` has read
        groups = -(-in_features // group_size)
        packed_width = -(-in_features * bits // 8)
        self.register_buffer("packed", torch.zeros((out_features, packed_width), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones((1, out_features, groups), dtype=torch.float16))
        self.register_buffer("zero_point", torch.zeros((1, out_features, groups), dtype=torch.float16))
        self.register_buffer("weight_row", torch.zeros(timesteps, dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32) if bias else None)
        self.register_buffer("activation_scale", torch.empty((0, 1, 1), dtype=torch.float32))
        self.register_buffer("activation_zero_point", torch.empty((0, 1, 1), dtype=torch.float32))
        self.register_buffer("activation_row", torch.zeros(timesteps, dtype=torch.int32))

    def _row(self, table: str) -> int:
        """The row of the call's timestep in ``weight_row`` or ``activation_row``.

        A table is read once: an index that is a tensor on a GPU is waited for, at every call of every layer.
        """
        tensor = self._buffers[table]
        read, rows = self._rows.get(table, (None, []))
        if read is not tensor:
            rows = tensor.tolist()
            self._rows[table] = tensor, rows
        timestep, timesteps = CALL.step
        return rows[timestep * self.timesteps // timesteps]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._rows.clear()  # a table may have been overwritten where it is

    def _per_value(self, parameter: Tensor) -> Tensor:
        """One row's parameters ``(token states, channel groups)``, broadcast to the input."""
        if parameter.shape[1] > 1:
            parameter = parameter.repeat_interleave(self.activation_group_size, 1)[:, : self.in_features]
        if len(parameter) == 1:
            return parameter[0]
        if CALL.is_masked is None:
            raise ValueError("token states: found none, expected a call that says which tokens are masked")
        return parameter[CALL.is_masked.long()]

    def codes(self, rows: slice = _ALL) -> Tensor:
        """The weights before zero point and scale, of some rows, ``(out_features, in_features)``."""
        return unpack(self.packed[rows], self.bits, self.in_features, self.group_size)

    def weight(self, rows: slice = _ALL) -> Tensor:
        """The dequantized weight at the current timestep, or some of its rows, float32 ``(rows, in_features)``."""
        row = self._row("weight_row")
        scale, zero_point = self.scale[row, rows], self.zero_point[row, rows]
        if not self.has_planes:
            return dequantize(self.codes(rows), scale, zero_point, self.group_size)
        weight = torch.empty((len(scale), self.in_features), device=scale.device, dtype=torch.float32)
        planes.plane_weight(self.packed[rows], scale.float(), zero_point.float(), self.bits, weight)
        return weight

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input as the layer sees it at the current timestep, ``(..., in_features)``, of the input's type."""
        if self.activation_bits == 16:
            return x
        if not len(self.activation_scale):
            return fake_quantize_per_token(x, self.activation_bits, self.activation_clip)
        row = self._row("activation_row")
        scale, zero_point = (self._per_value(p[row]) for p in (self.activation_scale, self.activation_zero_point))
        return fake_quantize(x, scale, zero_point, self.activation_bits)

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in_features)`` to ``(..., out_features)``."""
        x = self.quantized_input(x)
        if x.dtype != torch.float32 and self.has_planes:
            row = self._row("weight_row")
            parameters = self.packed, self.scale[row], self.zero_point[row]
            product = planes.packed_linear(x, *parameters, self.bits, compiled=self.compiled)
            return product if self.bias is None else product + self.bias
        rows = max(1, _DENSE // self.in_features)
        if rows >= self.out_features:
            return F.linear(x, self.weight().to(x.dtype), self.bias)
        parts = [slice(start, start + rows) for start in range(0, self.out_features, rows)]
        product = torch.cat([F.linear(x, self.weight(part).to(x.dtype)) for part in parts], -1)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        """The layer's size and precision, for ``print(model)``."""
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, bits={self.bits}, group_size={self.group_size}, activation_bits={self.activation_bits}"


class QuantizedEmbedding(_Coded):
    """A table of token embeddings as packed codes; only the rows that are looked up are dequantized.

    Args:
        num_embeddings, embedding_dim: size of the table.
        bits: bits of a code.
        group_size: neighbours in a row that share scale and zero point.
        dtype: of the embeddings; it follows the model's where that is cast.

    ``packed``, ``scale`` and ``zero_point`` are those of a ``QuantizedLinear`` of as many rows.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, bits: int, group_size: int, dtype: torch.dtype):
        super().__init__()
        check_bits(bits)
        self.embedding_dim, self.bits, self.group_size = embedding_dim, bits, group_size
        groups = -(-embedding_dim // group_size)
        packed_width = -(-embedding_dim * bits // 8)
        self.register_buffer("packed", torch.zeros((num_embeddings, packed_width), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones((1, num_embeddings, groups), dtype=torch.float16))
        self.register_buffer("zero_point", torch.zeros((1, num_embeddings, groups), dtype=torch.float16))
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)  # is cast with the model

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings."""
        return self.like.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids, any shape, to embeddings ``(..., embedding_dim)``."""
        codes = unpack(self.packed[ids], self.bits, self.embedding_dim, self.group_size)
        return dequantize(codes, self.scale[0, ids], self.zero_point[0, ids], self.group_size).to(self.dtype)


class TrellisLinear(QuantizedLinear):
    """A linear layer that computes from a trellis-coded weight; see ``QuantizedLinear``.

    Its zero points are zero and aren't stored; the bits of its columns are stored as 4-bit codes.
    """

    STORED = ("packed", "packed_column_bits")
    has_zero_point = False

    def __init__(self, in_features: int, out_features: int, **options: Any):
        super().__init__(in_features, out_features, **options)
        self.has_planes = False
        self.register_buffer("packed_column_bits", torch.zeros(-(-in_features // 2), dtype=torch.uint8))

    def codes(self, rows: slice = slice(None)) -> Tensor:
        """The weights before scaling, of some rows, float32 ``(out_features, in_features)``."""
        return read_codes(self.packed[rows], unpack(self.packed_column_bits, 4, self.in_features))

"""Layers that compute from packed codes: linears with time-aware parameters, trellis-coded linears, embeddings."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thermo_lib.quant import backends, planes
from thermo_lib.quant.buffers import PreciseBuffers, TimestepTable
from thermo_lib.quant.calls import CALL, denoising
from thermo_lib.quant.codes import check_bits, dequantize, unpack
from thermo_lib.quant.input_ranges import DynamicRanges, StaticRanges
from thermo_lib.quant.streams import Layout, stream_linear, stream_weight
from thermo_lib.quant.trellis import BlockPlaces, block_places, read_codes

_ALL = slice(None)
_DENSE = 2**24  # weights of a layer that are dequantized at a time


def _version(tensor: Tensor) -> int | None:
    """How often a tensor has been changed where it is; None where torch doesn't count."""
    return None if tensor.is_inference() else tensor._version


class QuantizedLinear(TimestepTable):
    """A linear layer that computes from packed weights, with parameters that may depend on the timestep.

    Args:
        in_features, out_features: size of the layer.
        bits: bits of a weight code.
        group_size: weights that share scale and zero point.
        bias: whether there is a bias.
        input_quantizer: ``StaticRanges``, ``DynamicRanges``, or None to leave the input as it is.
        timesteps: ``T`` of the parameters' table, see ``TimestepTable``.

    ``scale`` and ``zero_point`` are float16 ``(rows, out_features, groups)``, at first one row.

    ``STORED`` names the uint8 buffers that hold the codes. ``has_planes`` says whether they lie plane by plane; then
    inputs of less than float32 are multiplied block by block as in ``quant.planes``. ``backend`` is what is asked to
    multiply them, ``chosen`` what the last call took, see ``quant.backends``: "triton int8" multiplies the input's
    codes with the weight's, instead of what they stand for. ``keeps_weight`` is set by ``keeping_weights``.
    """

    STORED: tuple[str, ...] = ("packed",)
    has_zero_point = True

    packed: Tensor
    bias: Tensor | None
    backend: str
    chosen: str | None
    keeps_weight: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        bias: bool,
        input_quantizer: StaticRanges | DynamicRanges | None = None,
        timesteps: int = 1,
    ):
        check_bits(bits)
        groups = -(-in_features // group_size)
        scale = torch.ones((1, out_features, groups), dtype=torch.float16)
        super().__init__(scale, torch.zeros_like(scale), torch.zeros(timesteps, dtype=torch.int32))
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        self.has_planes = planes.width(in_features, bits, group_size) > 0
        self.backend, self.chosen = "auto", None
        self._converted: dict[Any, Any] = {}
        packed_width = -(-in_features * bits // 8)
        self.register_buffer("packed", torch.zeros((out_features, packed_width), dtype=torch.uint8))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32) if bias else None)
        self.input_quantizer = input_quantizer

    @property
    def activation_bits(self) -> int:
        """Bits of a code of the input, 16 where it isn't quantized."""
        return 16 if self.input_quantizer is None else self.input_quantizer.bits

    def codes(self, rows: slice = _ALL) -> Tensor:
        """The weights before zero point and scale, of some rows, ``(out_features, in_features)``."""
        return unpack(self.packed[rows], self.bits, self.in_features, self.group_size)

    def weight(self, rows: slice = _ALL) -> Tensor:
        """The dequantized weight at the current timestep, or some of its rows, float32 ``(rows, in_features)``."""
        row = self.row()
        scale, zero_point = self.scale[row, rows], self.zero_point[row, rows]
        if not self.has_planes:
            return dequantize(self.codes(rows), scale, zero_point, self.group_size)
        weight = torch.empty((len(scale), self.in_features), device=scale.device, dtype=torch.float32)
        planes.plane_weight(self.packed[rows], scale.float(), zero_point.float(), self.bits, weight)
        return weight

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input as the layer sees it at the current timestep, ``(..., in_features)``, of the input's type."""
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in_features)`` to ``(..., out_features)``.

        Where the call has a timestep for each row and the weight depends on it, rows of one weight are computed
        together.
        """
        if CALL.rows is None or (rows := self.rows_of(x)) is None:
            return self.multiply(x)
        (steps, timesteps), is_masked = CALL.rows, CALL.is_masked
        groups = [[i for i, other in enumerate(rows) if other == row] for row in dict.fromkeys(rows)]
        parts = []
        for group in groups:
            some = torch.tensor(group).to(x.device)
            states = None if is_masked is None else is_masked[some]
            with denoising((int(steps[group[0]]), timesteps), states, rows=(steps[group], timesteps)):
                parts.append(self.multiply(x[some]))
        order = torch.tensor([i for group in groups for i in group]).argsort()
        return torch.cat(parts)[order.to(x.device)]

    def multiply(self, x: Tensor) -> Tensor:
        """``forward`` at one timestep, that of the call, as far as the weight depends on it."""
        if self._multiplies_codes(x):
            self.chosen = "compiled"
            return self._code_linear(x)
        self.chosen = backends.choose(self, x)
        if self.chosen not in ("plain", "compiled"):
            return backends.product(self.chosen, self, x, self._bias(x.dtype))
        x = self.quantized_input(x)
        if x.dtype.itemsize < torch.float32.itemsize and self.has_planes:
            row = self.row()
            parameters = self.packed, self.scale[row], self.zero_point[row]
            return planes.packed_linear(x, *parameters, self.bits, self._bias(x.dtype), compiled=self.compiled)
        rows = max(1, _DENSE // self.in_features)
        if rows >= self.out_features:
            return F.linear(x, self._dense_weight(x.dtype), self._bias(x.dtype))
        parts = [slice(start, start + rows) for start in range(0, self.out_features, rows)]
        whole = self._bias(x.dtype)
        bias = [None if whole is None else whole[part] for part in parts]
        return torch.cat([F.linear(x, self.weight(p).to(x.dtype), b) for p, b in zip(parts, bias, strict=True)], -1)

    def _dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The whole dequantized weight at the current timestep, in the type of a product."""
        if not self.keeps_weight or torch.is_grad_enabled():
            return self.weight().to(dtype)
        return self._once(("dense", self.row(), dtype), lambda: self.weight().to(dtype))

    def forget_weights(self) -> None:
        """Let go of what ``keeping_weights`` has kept."""
        self._converted = {key: kept for key, kept in self._converted.items() if key[0] != "dense"}

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        """The bias in the type of a product, which under autocast isn't the layer's."""
        return None if self.bias is None else self.bias.to(dtype)

    def _plus_bias(self, product: Tensor) -> Tensor:
        bias = self._bias(product.dtype)
        return product if bias is None else product + bias

    @property
    def compiled(self) -> bool:
        """Whether the compiled code is asked for."""
        return self.backend == "compiled"

    def triton_weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight by a Triton kernel, ``(out_features, in_features)``."""
        from thermo_lib.quant.triton_kernels import plane_weight

        row = self.row()
        return plane_weight(self.packed, self.scale[row], self.zero_point[row], self.bits, dtype)

    def suits_triton(self) -> bool:
        """Whether there is a Triton kernel for the layer's codes."""
        return self.has_planes

    def suits_cuda(self) -> bool:
        """Whether there is a kernel in CUDA for the layer's codes."""
        return False

    def humming(self, dtype: torch.dtype) -> Any:
        """The product by ``humming``; converted once for each row of the table, type and weight."""
        from thermo_lib.quant.humming_kernels import humming_product

        def convert() -> Any:
            return humming_product(*self._of_row(self.codes()), self.bits, self.group_size, dtype)

        return self._once(("humming", self.row(), dtype), convert)

    def integer_triton(self, x: Tensor) -> Tensor:
        """``x (..., in_features)`` times the weight in whole numbers, by Triton kernels: ``(tokens, out_features)``."""
        from thermo_lib.quant.integer_kernels import code_factors, code_product, quantize_tokens

        packed, scale, zero_point = self._of_row(self.packed)

        def convert() -> Any:
            return code_factors(self.codes(), scale, zero_point, self.bits)

        factors = self._once(("factors", self.row()), convert)
        ranges, clip = self.input_quantizer, getattr(self.input_quantizer, "clip", 1.0)
        assert ranges is not None  # an input without codes isn't multiplied so
        tokens = x.reshape(-1, x.shape[-1])
        codes = quantize_tokens(tokens, ranges.of_tokens(x), ranges.bits, clip, scale.shape[-1])
        return code_product(codes, packed, scale, factors, self.bits, x.dtype)

    def _of_row(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes with the scale and zero point of the current timestep."""
        row = self.row()
        return codes, self.scale[row], self.zero_point[row]

    def _once(self, key: Any, convert: Callable[[], Any]) -> Any:
        """What is made of the weight; made again when a tensor of it is replaced, or changed where it is."""
        tensors = [getattr(self, name) for name in (*self.STORED, "scale", "zero_point")]
        held = [(tensor, _version(tensor)) for tensor in tensors]
        known = self._converted.get(key)
        if known is None or any(a is not b or i != j for (a, i), (b, j) in zip(known[0], held, strict=True)):
            known = self._converted[key] = held, convert()
        return known[1]

    def _multiplies_codes(self, x: Tensor) -> bool:
        """Whether the input's codes are multiplied with the weight's, instead of what they stand for."""
        ranges = self.input_quantizer
        if not (self.compiled and self.has_planes and ranges is not None and ranges.is_by_token):
            return False
        return planes.multiplies_codes(x, self.in_features, self.scale.shape[-1])

    def _code_linear(self, x: Tensor) -> Tensor:
        row, ranges = self.row(), self.input_quantizer
        assert ranges is not None  # by ``_multiplies_codes``
        weight = self.packed, self.scale[row], self.zero_point[row], self.bits
        clip = getattr(ranges, "clip", 1.0)
        return self._plus_bias(planes.code_linear(x, *weight, ranges.of_tokens(x), ranges.bits, clip))

    def extra_repr(self) -> str:
        """The layer's size and precision, for ``print(model)``."""
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        bits = f"bits={self.bits}, group_size={self.group_size}, activation_bits={self.activation_bits}"
        return f"{size}, {bits}, backend={self.chosen or self.backend}"


@contextmanager
def keeping_weights(layers: Iterable[QuantizedLinear]) -> Iterator[None]:
    """While it is entered (``with``), layers keep the weights that they dequantize, for many passes of a small model.

    It acts on products of plain torch without gradients, of up to 2^24 weights; their bits are the same. A layer holds
    its plain weight for each type of input and each row of its table of timesteps that was used.
    """
    keeping = [layer for layer in layers if not layer.keeps_weight]
    for layer in keeping:
        layer.keeps_weight = True
    try:
        yield
    finally:
        for layer in keeping:
            layer.keeps_weight = False
            layer.forget_weights()


class QuantizedEmbedding(PreciseBuffers):
    """A table of token embeddings as packed codes; only the rows that are looked up are dequantized.

    Args:
        num_embeddings, embedding_dim: size of the table.
        bits: bits of a code.
        group_size: neighbours in a row that share scale and zero point.
        dtype: of the embeddings; it follows the model's where that is cast.

    ``packed``, ``scale`` and ``zero_point`` are those of a ``QuantizedLinear`` of as many rows.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    like: Tensor

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

    packed_column_bits: Tensor

    def __init__(self, in_features: int, out_features: int, **options: Any):
        super().__init__(in_features, out_features, **options)
        self.has_planes = False
        self.register_buffer("packed_column_bits", torch.zeros(-(-in_features // 2), dtype=torch.uint8))

    def codes(self, rows: slice = slice(None)) -> Tensor:
        """The weights before scaling, of some rows, float32 ``(out_features, in_features)``."""
        return read_codes(self.packed[rows], unpack(self.packed_column_bits, 4, self.in_features))

    def weight(self, rows: slice = slice(None)) -> Tensor:
        """See ``QuantizedLinear``."""
        if not (self.compiled and self.packed.device.type == "cpu"):
            return super().weight(rows)
        scale = self.scale[self.row(), rows].float()
        return stream_weight(self.packed[rows], self._layout(), scale, self.group_size, torch.float32)

    def suits_triton(self) -> bool:
        """See ``QuantizedLinear``."""
        return True

    def triton_weight(self, dtype: torch.dtype) -> Tensor:
        """See ``QuantizedLinear``."""
        from thermo_lib.quant.triton_kernels import stream_weight

        return stream_weight(self.packed, self._places(), self.scale[self.row()], self.group_size, dtype)

    def suits_cuda(self) -> bool:
        """See ``QuantizedLinear``."""
        return True

    def cuda_weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight by a kernel in CUDA, ``(out_features, in_features)``."""
        from thermo_lib.quant.cuda_kernels import stream_weight

        return stream_weight(self.packed, self._places(), self.scale[self.row()], self.group_size, dtype)

    def _places(self) -> BlockPlaces:
        """The same for those of a GPU."""
        return self._once("places", lambda: block_places(unpack(self.packed_column_bits, 4, self.in_features)))

    def multiply(self, x: Tensor) -> Tensor:
        """See ``QuantizedLinear``."""
        if not (self.compiled and x.dtype == torch.bfloat16 and x.device.type == "cpu"):
            return super().multiply(x)
        self.chosen = "compiled"
        scale = self.scale[self.row()].float()
        product = stream_linear(self.quantized_input(x), self.packed, self._layout(), scale, self.group_size)
        return self._plus_bias(product)

    def _layout(self) -> Layout:
        """Where the columns' states are for the kernels of a CPU."""
        return self._once("layout", lambda: Layout.of(unpack(self.packed_column_bits, 4, self.in_features)))

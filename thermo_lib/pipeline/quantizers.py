"""The methods that quantize a weight: each knows the layer that computes from its codes, and what that stores."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.parts import GPTQ, LeastSquares, RoundToNearest, Trellis
from thermo_lib.quant.codes import QuantizedWeight, check_weight, pack, unpack
from thermo_lib.quant.gptq import gptq, refit
from thermo_lib.quant.layers import QuantizedLinear, TrellisLinear
from thermo_lib.quant.rounding import least_squares, round_to_nearest
from thermo_lib.quant.trellis import MOST_BITS, allocate_bits, codebook, column_costs, trellis
from thermo_lib.time_aware.groups import TimeGroupParams

Coded = tuple[dict[str, Tensor], list[TimeGroupParams]]
GridMethod = Callable[[Tensor, int, int], QuantizedWeight]
ROUNDING: dict[type, GridMethod] = {RoundToNearest: round_to_nearest, LeastSquares: least_squares}


class Quantizer(ABC):
    """A method of quantizing the weights of a model's linears.

    Args:
        config: how to quantize.

    Attributes:
        layer: the class of the layers that compute from its codes.
        parameters: the parameters that are stored beside the codes.
        needs_hessians: whether ``code`` needs Hessians.
        needs_all_hessians: whether all linears are seen before any is quantized, see ``see`` and ``decide``.
    """

    layer: ClassVar[type[QuantizedLinear]] = QuantizedLinear
    parameters: ClassVar[tuple[str, ...]] = ("scale", "zero_point")
    needs_all_hessians: bool = False

    def __init__(self, config: ThermoConfig):
        self.how, self.groups = config.weights, config.weight_groups
        self.needs_hessians = type(self.how) not in ROUNDING or self.groups.num_groups > 1

    @property
    def span(self) -> tuple[float, float]:
        """The least and the largest code, before zero point and scale."""
        return 0, 2 ** int(self.how.bits) - 1

    def see(self, name: str, linear: nn.Linear, hessian: Tensor) -> None:
        """Take note of a linear before any is quantized; ``hessian`` is ``sum x x^T`` of all its inputs."""
        raise NotImplementedError

    def decide(self) -> None:
        """Decide what depends on the whole model, all of whose linears have been seen."""
        raise NotImplementedError

    def code(self, name: str, weight: Tensor, hessians: Tensor | None) -> Coded:
        """Quantize a weight.

        Args:
            name: of the layer.
            weight: ``(out_features, in_features)``.
            hessians: ``sum x x^T`` of the time groups, ``(groups, in_features, in_features)``; None for a data-free
                method and a single time group.

        Returns:
            The layer's buffers that hold codes, and its parameters for each time group, before smoothing.

        Raises:
            ValueError: a weight that can't be quantized.
        """
        check_weight(weight, name)
        return self._code(name, weight, hessians, self.how.group_size or weight.shape[1])

    @abstractmethod
    def _code(self, name: str, weight: Tensor, hessians: Tensor | None, group_size: int) -> Coded: ...

    def expected(self, rows: int, columns: int, read: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        """What is stored of a layer, as tensors on the meta device by their keys.

        Args:
            rows, columns: size of the weight.
            read: gives the stored tensor of a key, as far as the size of others depends on it; None where there is none
                of the right type and shape.

        Raises:
            ValueError: a stored tensor that has no meaning.
        """
        parameters = expected_parameters(self.groups.num_groups, rows, columns, self.how.group_size, self.parameters)
        return expected_codes(rows, columns, int(self.how.bits)) | parameters


class UniformGrid(Quantizer):
    """Codes on a uniform grid: round to nearest, least squares, or GPTQ."""

    how: RoundToNearest | LeastSquares | GPTQ

    def _code(self, name: str, weight: Tensor, hessians: Tensor | None, group_size: int) -> Coded:
        bits = self.how.bits
        if isinstance(self.how, GPTQ):
            assert hessians is not None  # as needs_hessians says
            base = gptq(weight, hessians.sum(0), bits, group_size, self.how.damping, self.how.ridge)
        else:
            base = ROUNDING[type(self.how)](weight, bits, group_size)
        intervals, fitted = self.groups.intervals, [base]
        if len(intervals) > 1:
            assert hessians is not None  # as needs_hessians says
            ridge = self.how.ridge if isinstance(self.how, GPTQ) else GPTQ().ridge
            fitted = [refit(weight, base, hessian, ridge) for hessian in hessians]
        stored = {"packed": pack(base.codes, bits, group_size)}
        return stored, [
            TimeGroupParams(time_range, f.scale, f.zero_point, f.group_size)
            for time_range, f in zip(intervals, fitted, strict=True)
        ]


class TrellisCodes(Quantizer):
    """Streams of bits whose columns may take different numbers of bits; see ``quant.trellis``."""

    how: Trellis
    layer = TrellisLinear
    parameters = ("scale",)

    def __init__(self, config: ThermoConfig):
        super().__init__(config)
        self.needs_all_hessians = self.how.spread
        self._costs: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}
        self._column_bits: dict[str, Tensor] = {}

    @property
    def span(self) -> tuple[float, float]:
        """See ``Quantizer``; the gains of columns are below one."""
        most = codebook().abs().max().item()
        return -most, most

    def see(self, name: str, linear: nn.Linear, hessian: Tensor) -> None:
        """Work out what each number of bits costs in each of the linear's columns."""
        self._costs[name] = column_costs(linear.weight, hessian, self.how.damping)
        self._rows[name] = linear.out_features

    def decide(self) -> None:
        """Give every column of every linear its bits."""
        self._column_bits = allocate_bits(self._costs, self._rows, self.how.bits)

    def _code(self, name: str, weight: Tensor, hessians: Tensor | None, group_size: int) -> Coded:
        assert hessians is not None  # as needs_hessians says
        equal = torch.full((weight.shape[1],), int(self.how.bits))
        column_bits = self._column_bits[name] if self.how.spread else equal
        coded = trellis(weight, hessians.sum(0), column_bits, group_size, self.how.damping, self.how.beam)
        zero_point = torch.zeros_like(coded.scale)
        params = TimeGroupParams(self.groups.intervals[0], coded.scale, zero_point, coded.group_size)
        return {"packed": coded.packed, "packed_column_bits": pack(coded.column_bits, 4)}, [params]

    def expected(self, rows: int, columns: int, read: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        """See ``Quantizer``; the width of the streams depends on the bits of the columns."""
        expected = super().expected(rows, columns, read)
        expected["packed_column_bits"] = torch.empty(-(-columns // 2), device="meta", dtype=torch.uint8)
        packed = read("packed_column_bits")
        if packed is not None and packed.shape == expected["packed_column_bits"].shape:
            column_bits = unpack(packed, 4, columns)
            if column_bits.max() > MOST_BITS:
                raise ValueError(f"packed_column_bits: found {column_bits.max()}, allowed are 0..{MOST_BITS}")
            width = -(-int(column_bits.sum()) // 8)
            expected["packed"] = torch.empty((rows, width), device="meta", dtype=torch.uint8)
        return expected


def quantizer_of(config: ThermoConfig) -> Quantizer:
    """The method of a configuration's weights."""
    return TrellisCodes(config) if isinstance(config.weights, Trellis) else UniformGrid(config)


def expected_codes(rows: int, columns: int, bits: int) -> dict[str, Tensor]:
    """``packed`` of codes of equal bits, on the meta device."""
    return {"packed": torch.empty((rows, -(-columns * bits // 8)), device="meta", dtype=torch.uint8)}


def expected_parameters(
    time_groups: int, rows: int, columns: int, group_size: int | None, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """The parameters of a weight's groups, on the meta device, ``(time groups, rows, groups)``."""
    shape = time_groups, rows, -(-columns // (group_size or columns))
    return {f"weight_{name}": torch.empty(shape, device="meta", dtype=torch.float16) for name in names}

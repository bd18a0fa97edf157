"""How a layer quantizes its input: in static ranges that are stored, or in the range of each token."""

from torch import Tensor, nn

from thermo_lib.quant.buffers import TimestepTable
from thermo_lib.quant.calls import CALL
from thermo_lib.quant.codes import fake_quantize, fake_quantize_per_token


class DynamicRanges(nn.Module):
    """Quantizes each token in its own min-max range; nothing is stored.

    Args:
        bits: number of bits of a code.
        clip: how far a range reaches, as a share of the way from zero to the token's extremes.
    """

    is_by_token = True

    def __init__(self, bits: int, clip: float = 1.0):
        super().__init__()
        self.bits, self.clip = bits, clip

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x (..., channels)``."""
        return fake_quantize_per_token(x, self.bits, self.clip)

    def of_tokens(self, x: Tensor) -> None:
        """No ranges are given: each token has its own."""
        return None

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        return f"bits={self.bits}, clip={self.clip}"


class StaticRanges(TimestepTable):
    """Quantizes in stored ranges, which may depend on the timestep, on the token's state and on the channel.

    Args:
        bits: number of bits of a code.
        scale, zero_point: float32 ``(rows, token states, channel groups)``, zero points whole. With two token states
            the first belongs to unmasked tokens and the second to masked ones.
        row_of_step: int32 ``(timesteps,)``, see ``TimestepTable``.
        group_size: number of neighbouring channels that share a range; None for all of them.
    """

    def __init__(
        self, bits: int, scale: Tensor, zero_point: Tensor, row_of_step: Tensor, group_size: int | None = None
    ):
        super().__init__(scale, zero_point, row_of_step)
        self.bits, self.group_size = bits, group_size

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x (batch, length, channels)`` at the call's timestep, of the input's type.

        Raises:
            ValueError: ranges by token state in a call that doesn't say which tokens are masked.
        """
        row = self.row()
        scale, zero_point = (self._per_value(p[row], x.shape[-1]) for p in (self.scale, self.zero_point))
        return fake_quantize(x, scale, zero_point, self.bits)

    def of_tokens(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Scale and zero point of each token of ``x (..., channels)``, ``(tokens,)``; the channels share a range."""
        row = self.row()
        parts = (self._per_value(p[row], x.shape[-1]) for p in (self.scale, self.zero_point))
        scale, zero_point = (part.expand(*x.shape[:-1], 1).reshape(-1) for part in parts)
        return scale, zero_point

    @property
    def is_by_token(self) -> bool:
        """Whether all channels of a token share a range."""
        return self.scale.shape[2] == 1

    def _per_value(self, parameter: Tensor, channels: int) -> Tensor:
        """One row's parameters ``(token states, channel groups)``, broadcast to the input."""
        if parameter.shape[1] > 1:
            parameter = parameter.repeat_interleave(self.group_size, 1)[:, :channels]
        if len(parameter) == 1:
            return parameter[0]
        if CALL.is_masked is None:
            raise ValueError("token states: found none, expected a call that says which tokens are masked")
        return parameter[CALL.is_masked.long()]

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        rows, states, groups = self.scale.shape
        return f"bits={self.bits}, rows={rows}, token_states={states}, channel_groups={groups}"

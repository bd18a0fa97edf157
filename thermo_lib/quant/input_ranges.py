"""How a layer quantizes its input: in static ranges that are stored, or in the range of each token."""

import torch
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

        Where the call has a timestep for each row, each row is quantized at its own.

        Raises:
            ValueError: ranges by token state in a call that doesn't say which tokens are masked, or timesteps of
                another number of rows.
        """
        return fake_quantize(x, *self._per_value(x), self.bits)

    def of_tokens(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Scale and zero point of each token of ``x (..., channels)``, ``(tokens,)``; the channels share a range."""
        scale, zero_point = (part.expand(*x.shape[:-1], 1).reshape(-1) for part in self._per_value(x))
        return scale, zero_point

    @property
    def is_by_token(self) -> bool:
        """Whether all channels of a token share a range."""
        return self.scale.shape[2] == 1

    def _per_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, broadcast to an input ``(..., channels)``."""
        rows = self.rows_of(x)
        if rows is None or len(set(rows)) == 1:
            row = self.row() if rows is None else rows[0]
            scale, zero_point = (self._of_tokens(p[row], x.shape[-1]) for p in (self.scale, self.zero_point))
        else:
            index = torch.tensor(rows).to(self.scale.device)
            scale, zero_point = (self._of_tokens(p[index], x.shape[-1]) for p in (self.scale, self.zero_point))
        return scale, zero_point

    def _of_tokens(self, parameter: Tensor, channels: int) -> Tensor:
        """Parameters ``([batch,] token states, channel groups)``, those of each token ``(..., channels or 1)``."""
        if parameter.shape[-1] > 1:
            assert self.group_size is not None  # of several groups
            parameter = parameter.repeat_interleave(self.group_size, -1)[..., :channels]
        if parameter.shape[-2] == 1:
            return parameter[0] if parameter.ndim == 2 else parameter
        if CALL.is_masked is None:
            raise ValueError("token states: found none, expected a call that says which tokens are masked")
        state = CALL.is_masked.long()
        if parameter.ndim == 2:
            return parameter[state]
        return parameter.gather(1, state[..., None].expand(-1, -1, parameter.shape[-1]))

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        rows, states, groups = self.scale.shape
        return f"bits={self.bits}, rows={rows}, token_states={states}, channel_groups={groups}"

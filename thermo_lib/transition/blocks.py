"""The hidden states that enter each block, in the full-precision and in the quantized model."""

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from thermo_lib.diffusion.inputs import SeenEnough, block_arguments, watch_inputs
from thermo_lib.diffusion.states import Calibration
from thermo_lib.models.lm import DiffusionLM


class BlockStream:
    """What enters a block on all calibration states, in the full-precision and in the quantized model.

    Args:
        reference: the full-precision model.
        quantized: the other model, with as many blocks and the same embeddings.
        calibration: the states.

    Attributes:
        targets: the full-precision model's hidden states, float32 ``(states, length, hidden)`` for each part of the
            calibration.
        inputs: the quantized model's.
    """

    def __init__(self, reference: DiffusionLM, quantized: DiffusionLM, calibration: Calibration):
        self.reference, self.quantized = reference, quantized
        with torch.no_grad():
            self.targets = [reference.model.model.embed_tokens(part.ids) for part in calibration.parts]
        self.inputs = self.targets
        self._arguments = [block_arguments(reference, part[:1]) for part in self.targets]

    def run(self, block: nn.Module, part: int, x: Tensor) -> Tensor:
        """A block on hidden states ``(batch, length, hidden)`` of one part of the calibration."""
        return block(x, **self._arguments[part])

    @torch.no_grad()
    def _advance(self, block: nn.Module, hidden: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat([self.run(block, i, x) for x in part.split(64)]) for i, part in enumerate(hidden)]

    def enter(self, number: int) -> None:
        """Take the targets through a block."""
        self.targets = self._advance(self.reference.model.model.layers[number], self.targets)

    @torch.no_grad()
    def hessians(self, number: int, importance: Mapping[str, Sequence[Tensor] | None]) -> dict[str, Tensor]:
        """``sum x x^T`` of the inputs of some linears of a block, in the quantized model as it is now.

        Args:
            number: of the block.
            importance: the linears' names, as they come in the block, to the weights of the sum's tokens,
                ``(states, length)`` for each part of the calibration; None counts every token 1.

        Returns:
            Name to float64 ``(in_features, in_features)``.
        """
        block = self.quantized.model.model.layers[number]
        linears = {name: self.quantized.model.get_submodule(name) for name in importance}
        found = {n: torch.zeros((m.in_features, m.in_features), dtype=torch.float64) for n, m in linears.items()}
        *_, last = importance
        at: tuple[int, Tensor] = (0, torch.empty(0, dtype=torch.int64))

        def receive(name: str, x: Tensor) -> None:
            x, weights = x.flatten(0, 1).float(), importance[name]  # float16 doesn't reach the squares of its numbers
            weighted = x if weights is None else x * weights[at[0]][at[1]].reshape(-1, 1)
            found[name] += x.T @ weighted
            if name == last:
                raise SeenEnough

        with watch_inputs(linears, receive):
            for part, hidden in enumerate(self.inputs):
                for rows in torch.arange(len(hidden)).split(64):
                    at = (part, rows)
                    with suppress(SeenEnough):
                        self.run(block, part, hidden[rows])
        return found

    def leave(self, number: int) -> None:
        """Take the inputs through a block, as it is quantized now."""
        self.inputs = self._advance(self.quantized.model.model.layers[number], self.inputs)

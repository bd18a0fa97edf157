"""The second moments of linears' inputs, under which GPTQ and the trellis weigh errors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Hessians:
    """``sum x x^T`` of the inputs of some linears, by time group.

    Args:
        linears: name to linear.
        num_groups: number of time groups.

    Attributes:
        sums: name to float64 ``(time groups, in_features, in_features)``, on the linear's device.
    """

    def __init__(self, linears: Mapping[str, nn.Module], num_groups: int = 1):
        weights = {name: linear.get_parameter("weight") for name, linear in linears.items()}
        self.sums = {
            name: torch.zeros((num_groups, weight.shape[1], weight.shape[1]), dtype=torch.float64, device=weight.device)
            for name, weight in weights.items()
        }

    def add(self, name: str, x: Tensor, group: int = 0, token_weights: Tensor | None = None) -> None:
        """Add the inputs of some tokens.

        Args:
            name: of the linear.
            x: its inputs, ``(..., in_features)``; float64 is multiplied as such, all else in float32.
            group: number of the time group that they belong to.
            token_weights: what each token counts, of ``x``'s leading shape; None counts every token 1.
        """
        x = x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))  # float16 doesn't reach their squares
        weighted = x if token_weights is None else x * token_weights.reshape(-1, 1)
        self.sums[name][group] += x.T @ weighted

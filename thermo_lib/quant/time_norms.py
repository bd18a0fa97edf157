"""Norms whose weights (and biases) depend on the timestep: those of time groups, smoothed across their boundaries.

The normalization is that of the module it replaces, RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450); what it
is multiplied with, and of a LayerNorm what is added, is a row of a table. The table is the product of a smoothing
matrix with the groups' parameters, as for static ranges.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thermo_lib.quant.calls import CALL, Rows

_RMS = ("Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm")  # by name: their modules take a second to import
SUPPORTED = (*_RMS, "LayerNorm")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with a weight for each feature, as a ``TimeNorm`` can replace it.

    Raises:
        ValueError: another kind of norm, which isn't known to compute what a ``TimeNorm`` does.
    """
    kind = type(module).__name__
    if isinstance(module, TimeNorm) or "Norm" not in kind or (weight := getattr(module, "weight", None)) is None:
        return False
    if kind not in SUPPORTED or weight.ndim != 1:
        shape = tuple(weight.shape)
        allowed = f"allowed are {', '.join(SUPPORTED)} with a weight for each feature"
        raise ValueError(f"norm: found {kind} with a weight of shape {shape}, {allowed}")
    return True


class TimeNorm(nn.Module):
    """A norm whose weight, and bias where there is one, depends on the timestep.

    A call takes the row of its timestep, ``CALL.step``; a run with another number of timesteps takes the same mask
    ratio's. Where the rows of a batch have timesteps of their own, ``CALL.rows``, each row of the input takes its own.

    ``time_weight`` and ``time_bias`` are the groups' parameters before smoothing, ``(groups, features)``, and all that
    is stored. ``table`` and ``bias_table`` are made of them, ``(distinct rows, features)``; after a change of the
    parameters where they are, ``refresh`` makes them anew. While a parameter is trained (``requires_grad``) the rows
    are computed at every call, with gradients.

    Several groups are trained as what they share and what each deviates from it: between ``share`` and ``merge`` the
    parameters ``shared_weight`` and ``shared_bias``, ``(features,)``, are added to every group's.

    Args:
        norm: the module to replace: every group starts with its weight and bias.
        matrix: smoothing, ``(timesteps, groups)``, each row sums to 1.

    Raises:
        ValueError: a norm of another kind, see ``is_norm``.
    """

    table: Tensor | None
    bias_table: Tensor | None

    def __init__(self, norm: nn.Module, matrix: Tensor):
        super().__init__()
        if not is_norm(norm):
            raise ValueError(f"norm: found {type(norm).__name__}, allowed are {', '.join(SUPPORTED)}")
        given: Any = norm  # of one of several classes, which share no base
        self.centers = isinstance(norm, nn.LayerNorm)
        self.eps: float = given.eps if self.centers else given.variance_epsilon
        distinct, numbers = matrix.double().unique_consecutive(dim=0, return_inverse=True)
        groups = matrix.shape[1]
        is_plain = distinct.equal(torch.eye(groups, dtype=torch.float64, device=distinct.device))
        self.matrix = None if is_plain else distinct  # None: a row is a group's parameters
        self.row_of_step: list[int] = numbers.tolist()
        self._row_of_step: Tensor | None = None

        def of_groups(parameter: Tensor) -> nn.Parameter:
            return nn.Parameter(parameter.detach().expand(groups, -1).clone(), requires_grad=False)

        bias: Tensor | None = getattr(norm, "bias", None)
        self.time_weight = of_groups(given.weight)
        self.time_bias = None if bias is None else of_groups(bias)
        self.shared_weight: nn.Parameter | None = None
        self.shared_bias: nn.Parameter | None = None
        self.register_buffer("table", None, persistent=False)
        self.register_buffer("bias_table", None, persistent=False)
        self.refresh()

    @property
    def weight(self) -> Tensor:
        """The weight at the current timestep, ``(features,)``."""
        return self.time_weight[0] if self.table is None else self.table[self.row()]

    @property
    def bias(self) -> Tensor | None:
        """The bias at the current timestep, ``(features,)``; None where there is none."""
        if self.time_bias is None:
            return None
        return self.time_bias[0] if self.bias_table is None else self.bias_table[self.row()]

    @property
    def features(self) -> int:
        """Number of features."""
        return self.time_weight.shape[1]

    @property
    def groups(self) -> int:
        """Number of time groups."""
        return len(self.time_weight)

    @property
    def depends_on_timestep(self) -> bool:
        """Whether there is more than one row."""
        return self.groups > 1

    def row(self) -> int:
        """The table's row of the call's timestep."""
        timestep, timesteps = CALL.step
        return self.row_of_step[timestep * len(self.row_of_step) // timesteps]

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the tables anew from the groups' parameters; what reads the old ones, as a CUDA graph, sees the change.

        It is computed on the CPU, number by number: equal parameters give equal tables on every device.
        """
        if self.time_weight.is_meta or (self.time_bias is not None and self.time_bias.is_meta):
            self.table = self.bias_table = None
            return
        self.table = _replaced(self.table, self._smoothed(self.time_weight))
        if self.time_bias is not None:
            self.bias_table = _replaced(self.bias_table, self._smoothed(self.time_bias))

    def share(self) -> list[nn.Parameter]:
        """Give all groups something in common to train, zero at first, see the class.

        Returns:
            The new parameters, none with one group.
        """
        if self.groups == 1:
            return []
        self.shared_weight = nn.Parameter(torch.zeros_like(self.time_weight[0]))
        if self.time_bias is not None:
            self.shared_bias = nn.Parameter(torch.zeros_like(self.time_bias[0]))
        return [p for p in (self.shared_weight, self.shared_bias) if p is not None]

    @torch.no_grad()
    def merge(self) -> None:
        """Add what the groups share to each of them, and make the tables of it."""
        for parameter, shared in ((self.time_weight, self.shared_weight), (self.time_bias, self.shared_bias)):
            if parameter is not None and shared is not None:
                parameter.add_(shared)
        self.shared_weight = self.shared_bias = None
        self.refresh()

    @property
    def is_current(self) -> bool:
        """Whether the tables are those of the groups' parameters."""
        pairs = ((self.table, self.time_weight), (self.bias_table, self.time_bias))
        return all(p is None or (t is not None and t.equal(self._smoothed(p))) for t, p in pairs)

    def _smoothed(self, parameters: Tensor) -> Tensor:
        """The distinct rows of a parameter, of its type and on its device."""
        parameters = parameters.detach()
        if self.matrix is None:
            return parameters.clone()
        groups = parameters.cpu().double()
        total = torch.zeros((len(self.matrix), groups.shape[1]), dtype=torch.float64, device="cpu")
        for share, group in zip(self.matrix.cpu().T, groups, strict=True):
            total += share[:, None] * group
        return total.to(parameters)

    def _tables(self) -> tuple[Tensor, Tensor | None]:
        """Rows of weights and biases; of parameters that are trained, as they are now and with gradients."""
        weights, biases = self.table, self.bias_table
        if self.time_weight.requires_grad:
            weights = self._trained(self.time_weight, self.shared_weight)
        if self.time_bias is not None and self.time_bias.requires_grad:
            biases = self._trained(self.time_bias, self.shared_bias)
        assert weights is not None  # it is on the meta device alone
        return weights, biases

    def _trained(self, parameter: Tensor, shared: Tensor | None) -> Tensor:
        """The distinct rows of a parameter, with gradients."""
        groups = parameter if shared is None else parameter + shared
        if self.matrix is None:
            return groups
        if self.matrix.device != parameter.device:
            self.matrix = self.matrix.to(parameter.device)
        return (self.matrix @ groups.double()).to(parameter.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x (batch, ..., features)``, then multiply with the timestep's weight and add its bias.

        Raises:
            ValueError: timesteps of rows (``CALL.rows``) that aren't as many as the input's rows.
        """
        weight, bias = self._tables()
        rows = None if CALL.rows is None or len(weight) == 1 else self._rows(x, CALL.rows)
        row = 0 if len(weight) == 1 or rows is not None else self.row()
        if self.centers:
            if rows is None:
                now = None if bias is None else bias[row]
                return F.layer_norm(x, (x.shape[-1],), weight[row], now, self.eps)
            precise = torch.promote_types(x.dtype, torch.float32)
            normal = F.layer_norm(x.to(precise), (x.shape[-1],), None, None, self.eps)
            scaled = normal * _along(weight[rows], x)
            return (scaled if bias is None else scaled + _along(bias[rows], x)).to(x.dtype)
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (weight[row] if rows is None else _along(weight[rows], x)) * x.to(dtype)

    def _rows(self, x: Tensor, rows: Rows) -> Tensor:
        """The table's row of each row of the input, int64 ``(batch,)``."""
        timestep, timesteps = rows
        if len(timestep) != len(x):
            raise ValueError(f"rows: found {len(timestep)} timesteps, expected one for each of {len(x)} rows of input")
        if self._row_of_step is None or self._row_of_step.device != timestep.device:
            self._row_of_step = torch.tensor(self.row_of_step).to(timestep.device)
        return self._row_of_step[timestep * len(self.row_of_step) // timesteps]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.time_weight.dtype
        super()._apply(fn, recurse)
        if self.time_weight.dtype != before or self.time_weight.is_meta != (self.table is None):
            self.refresh()  # rows are rounded to the type once, from parameters of that type
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *more, **kwargs)
        if f"{prefix}time_weight" in state_dict or f"{prefix}time_bias" in state_dict:
            self.refresh()

    def extra_repr(self) -> str:
        """The size, for ``print(model)``."""
        kind = "LayerNorm" if self.centers else "RMSNorm"
        return f"{kind}, features={self.features}, groups={self.groups}, eps={self.eps}"


def _replaced(table: Tensor | None, new: Tensor) -> Tensor:
    """``new``, in the memory of the table before it where that has its shape, type and device."""
    if table is None or table.is_meta or (table.shape, table.dtype, table.device) != (new.shape, new.dtype, new.device):
        return new
    return table.copy_(new)


def _along(rows: Tensor, x: Tensor) -> Tensor:
    """Parameters of each row ``(batch, features)``, broadcast to ``x (batch, ..., features)``."""
    return rows.view(len(rows), *[1] * (x.ndim - 2), rows.shape[-1])


def time_norms(model: nn.Module) -> dict[str, TimeNorm]:
    """The time-aware norms of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TimeNorm)}


def check_plain_norms(model: nn.Module) -> None:
    """Raise ValueError for a model with time-aware norms, which a full-precision checkpoint can't hold."""
    if found := time_norms(model):
        allowed = "allowed is a model whose norms have one weight; save_quantized stores those of a quantized model"
        raise ValueError(f"model: found time-aware norms ({len(found)} of them), {allowed}")


def refresh_time_norms(model: nn.Module) -> None:
    """``TimeNorm.refresh`` of every time-aware norm of a model, as after training."""
    for norm in time_norms(model).values():
        norm.refresh()

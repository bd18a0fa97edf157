"""The hidden states that enter a model's blocks, one block after the other."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from thermo_lib.diffusion.inputs import SeenEnough, group_by_input, watch_inputs
from thermo_lib.diffusion.states import Calibration
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.models.streamed import hold, release
from thermo_lib.quant.calls import denoising
from thermo_lib.quant.hessians import Hessians
from thermo_lib.time_aware.groups import TimeGroups

_NUMBERS = 2**27  # in the widest activations of a batch
_BATCH = 64  # states of a batch at most, as in ``run_states``
_ON_DEVICE = 2**31  # bytes of hidden states that are on the model's device in any case
_SHARE = 0.3  # of a GPU's free memory that more of them may take, as two are held at times; else the host's


def states_at_a_time(lm: DiffusionLM, calibration: Calibration) -> int:
    """How many states a batch holds: 64, or fewer where they or the model are wide."""
    widest = max(part.ids.shape[1] for part in calibration.parts) * lm.model.config.intermediate_size
    return max(1, min(_BATCH, _NUMBERS // widest))


def _home(device: torch.device, size: int) -> torch.device:
    """Where so many bytes of hidden states are held; wherever it is, the results are the same."""
    is_there = size <= _ON_DEVICE
    if not is_there and device.type == "cuda":
        is_there = size <= _SHARE * torch.cuda.mem_get_info(device)[0]
    return device if is_there else torch.device("cpu")


def decisive_dtype(lm: DiffusionLM) -> torch.dtype:
    """In which type passes run whose results decide codes: float64 for a model in float32 on a CPU, else the model's.

    GPTQ hands the error of a column on to the next ones, so that one code that is rounded the other way changes those
    after it. In float32 a processor's order of adding up decides about some of them; what is left of that in float64
    is far smaller than the distance of a weight from the middle between two codes.
    """
    is_float32 = lm.device.type == "cpu" and lm.model.dtype == torch.float32
    return torch.float64 if is_float32 else lm.model.dtype


@contextmanager
def _computing_in(block: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While it is entered (``with``), the floating-point numbers of a block have a wider type."""
    tensors = [t for t in chain(block.parameters(), block.buffers()) if t.dtype == torch.float32 != dtype]
    narrow = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, data in zip(tensors, narrow, strict=True):
            tensor.data = data


def _widened(value: Any, dtype: torch.dtype) -> Any:
    """What a block is given, with float32 tensors in another type."""
    if isinstance(value, dict):
        return {key: _widened(one, dtype) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_widened(one, dtype) for one in value)
    is_float32 = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.to(dtype) if is_float32 else value


@contextmanager
def deciding(lm: DiffusionLM) -> Iterator[None]:
    """While it is entered (``with``), a model's blocks compute in ``decisive_dtype``: for whole passes that decide.

    Its blocks are in memory. Quantized weights stay as they are stored, and become wide a layer at a time.
    """
    dtype, blocks = decisive_dtype(lm), list(lm.model.blocks)
    with ExitStack() as stack:
        if dtype != lm.model.dtype:
            for block in blocks:
                stack.enter_context(_computing_in(block, dtype))
                take = block.register_forward_pre_hook(
                    lambda _, given, named: (_widened(given, dtype), _widened(named, dtype)), with_kwargs=True
                )
                stack.callback(take.remove)
            # The last norm has the model's type, and so what it is given.
            last = blocks[-1].register_forward_hook(lambda _, __, states: states.to(lm.model.dtype))
            stack.callback(last.remove)
        yield


class BlockStream:
    """The hidden states that enter one block of a model, on all calibration states.

    It starts at the first block and moves on with ``advance``. The block at which it stands is held, see
    ``models.streamed.hold``.

    Args:
        lm: the model.
        calibration: the states.
        dtype: of the hidden states and of the blocks while they run; None for the model's.

    Attributes:
        number: of the block at which it stands.
        hidden: what enters that block, ``(states, length, hidden)`` for each part of the calibration; many of them
            are in the host's memory, see ``taken``.
    """

    def __init__(self, lm: DiffusionLM, calibration: Calibration, dtype: torch.dtype | None = None):
        calibration = calibration.to(lm.device)
        self.lm, self.calibration, self.number = lm, calibration, 0
        self._dtype = dtype or lm.model.dtype
        numbers = sum(part.ids.numel() for part in calibration.parts) * lm.model.config.hidden_size
        where = _home(lm.device, numbers * self._dtype.itemsize)
        with torch.no_grad():
            self.hidden = [
                torch.cat([lm.model.enter(some).to(where, self._dtype) for some in part.ids.split(_BATCH)])
                for part in calibration.parts
            ]
            self._arguments = [lm.model.block_arguments(x[:1].to(lm.device)) for x in self.hidden]
        self._batch = states_at_a_time(lm, calibration)

    @property
    def block(self) -> nn.Module:
        """The block at which the stream stands, as it is now."""
        return self.lm.model.blocks[self.number]

    @property
    def is_last(self) -> bool:
        """Whether no block follows."""
        return self.number + 1 == len(self.lm.model.blocks)

    def run(self, part: int, x: Tensor) -> Tensor:
        """The block on hidden states ``(batch, length, hidden)`` of one part of the calibration."""
        hold(self.block)
        with _computing_in(self.block, self._dtype):
            return self.block(x, **self._arguments[part][self.number])

    def _output(self, part: int, timestep: int, rows: Tensor) -> Tensor:
        """The block on some states of one timestep."""
        with denoising((timestep, self.calibration.timesteps)):
            return self.run(part, self.taken(self.hidden, part, rows))

    def taken(self, hidden: Sequence[Tensor], part: int, rows: Tensor) -> Tensor:
        """Some states of a part, on the model's device, wherever they and the row numbers are."""
        return hidden[part][rows.to(hidden[part].device)].to(self.lm.device)

    @torch.no_grad()
    def hessians(
        self,
        linears: Sequence[str],
        groups: TimeGroups,
        token_weights: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """``sum x x^T`` of the inputs of some of the block's linears, by time group.

        Args:
            linears: their names.
            groups: the time groups.
            token_weights: name to what each token counts, ``(states, length)`` for each part of the calibration; the
                tokens of linears that it doesn't name count 1.

        Returns:
            Name to float64 ``(groups, in_features, in_features)``; linears with one input and the same weights of the
            tokens share the tensor.
        """
        weights = token_weights or {}
        modules = {name: self.lm.model.get_submodule(name) for name in linears}
        one = self.taken(self.hidden, 0, torch.zeros(1, dtype=torch.int64))
        shared = group_by_input(modules, lambda: self.run(0, one))
        first = {name: name if name in weights else names[0] for names in shared for name in names}
        watched = {name: modules[name] for name in linears if name in first.values()}
        found = Hessians(watched, groups.num_groups)
        for part, timestep, rows in self.calibration.batches(self._batch):
            group = groups.group_of(timestep * groups.timesteps // self.calibration.timesteps)
            waiting = set(watched)

            def receive(
                name: str,
                x: Tensor,
                part: int = part,
                rows: Tensor = rows,
                group: int = group,
                waiting: set[str] = waiting,
            ) -> None:
                found.add(name, x, group, weights[name][part][rows] if name in weights else None)
                waiting.discard(name)
                if not waiting:
                    raise SeenEnough

            with watch_inputs(watched, receive), suppress(SeenEnough):
                self._output(part, timestep, rows)
        return {name: found.sums[first[name]] for name in linears}

    @torch.no_grad()
    def advance(self) -> None:
        """Take the states through the block, as it is now, to the next one."""
        for part, timestep, rows in self.calibration.batches(self._batch):
            hidden = self.hidden[part]
            hidden[rows.to(hidden.device)] = self._output(part, timestep, rows).to(hidden.device)
        release(self.block)
        self.number += 1

"""Quantize a model block by block under calibration, so that memory doesn't grow with the number of blocks.

A block is read, the Hessians of its linears are collected on the hidden states that enter it, its linears are
quantized, and the states go through what they have become. Held at a time are one block and the states at its door;
the result is that of ``quantize`` with the whole model in memory.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from thermo_lib.diffusion.inputs import block_arguments, watch_inputs
from thermo_lib.diffusion.states import Calibration
from thermo_lib.files.snapshots import Snapshot, named, part_of
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import QuantizedLM, linear_names
from thermo_lib.pipeline.storage import stored_tensors
from thermo_lib.pipeline.weights import counts_tokens, quantize_layer
from thermo_lib.quant.calls import denoising

_NUMBERS = 2**27  # in the widest activations of a batch
_BATCH = 64  # states of a batch at most, as in ``run_states``


def check_layerwise(config: ThermoConfig) -> None:
    """Raise ValueError unless a configuration needs nothing but the inputs of one linear after another."""
    spread = getattr(config.weights, "spread", False)
    phases = ", ".join(phase.phase for phase in config.training)
    for name, wrong, found, allowed in (
        ("weights.token_weights", counts_tokens(config), "path_kl", "uniform"),
        ("weights.spread", spread, spread, False),
        ("training", phases, phases, "no phase"),
        ("activations.ranges", config.has_static_ranges, "static", "dynamic, or activations=None"),
    ):
        if wrong:
            found = f"found {found!r}, allowed block by block is {allowed!r}"
            raise ValueError(f"{name}: {found}; load the model as a whole for anything else")


class _Doorstep:
    """The hidden states that enter a block, for all calibration states.

    Args:
        lm: the model, whose blocks hold weights only while they are worked on.
        calibration: the states.
        hidden: float32 ``(states, length, hidden)`` for each part of the calibration; replaced in place.
    """

    def __init__(self, lm: QuantizedLM, calibration: Calibration, hidden: list[Tensor]):
        self.lm, self.calibration, self.hidden = lm, calibration, hidden
        self._arguments = [block_arguments(lm, x[:1]) for x in hidden]
        widest = max(x.shape[1] for x in hidden) * lm.model.config.intermediate_size
        self._batch = max(1, min(_BATCH, _NUMBERS // widest))

    def outputs(self, block: nn.Module) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The block's output on batch after batch: ``(part, rows, (batch, length, hidden))``."""
        for part, timestep, rows in self.calibration.batches(self._batch):
            self.timestep = timestep
            with denoising((timestep, self.calibration.timesteps)):
                output = block(self.hidden[part][rows], **self._arguments[part])
            yield part, rows, output

    def hessians(self, block: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        """``sum x x^T`` of the linears' inputs by time group, float64 ``(groups, in_features, in_features)``.

        Linears that share an input share the tensor.
        """
        groups = self.lm.config.weight_groups
        found: dict[str, Tensor] = {}
        seen: dict[int, tuple[str, Tensor]] = {}  # inputs of this batch, kept so that no id is used twice

        def receive(name: str, x: Tensor) -> None:
            first, _ = seen.setdefault(id(x), (name, x))
            if name not in found:
                empty = torch.zeros((groups.num_groups, x.shape[-1], x.shape[-1]), dtype=torch.float64)
                found[name] = found[first] if first != name else empty
            if first == name:
                x = x.flatten(0, 1)
                found[name][groups.group_of(self.timestep * groups.timesteps // self.calibration.timesteps)] += x.T @ x

        with watch_inputs(linears, receive):
            for _ in self.outputs(block):
                seen.clear()
        return found

    def pass_through(self, block: nn.Module) -> None:
        """Take the states through a block as it is now."""
        for part, rows, output in self.outputs(block):
            self.hidden[part][rows] = output


def coded_blocks(
    lm: QuantizedLM, read: Callable[[str], Tensor], calibration: Calibration, snapshot: Snapshot
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Quantize block after block.

    Args:
        lm: the model without weights (on the meta device), with the configuration; blocks are quantized in it and
            emptied again.
        read: a tensor of the full-precision model by the library's name.
        calibration: the states.
        snapshot: where the states are kept while they stand at a block's door; a stopped run goes on from there.

    Yields:
        A block's number and the tensors that are stored of its linears; the block at which an earlier run was stopped
        comes first, even if that run has yielded it.
    """
    state = snapshot.load()
    if state:
        states = part_of(state, "hidden")
        hidden, start = [states[str(part)] for part in range(len(states))], int(state["block"])
    else:
        table = read("model.embed_tokens.weight")
        hidden, start = [table[part.ids].float() for part in calibration.parts], 0
    doorstep = _Doorstep(lm, calibration, hidden)
    for number in range(start, len(lm.model.model.layers)):
        prefix = f"model.layers.{number}"
        block = lm.model.get_submodule(prefix)
        for name in block.state_dict():
            block.load_state_dict({name: read(f"{prefix}.{name}").float()}, strict=False, assign=True)
        block.requires_grad_(False)
        names = [name for name in linear_names(lm.model) if name.startswith(f"{prefix}.")]
        hessians = doorstep.hessians(block, {name: lm.model.get_submodule(name) for name in names})
        for name in names:
            bits = torch.full((lm.model.get_submodule(name).in_features,), lm.config.bit_width)
            quantize_layer(lm, name, hessians[name], {name: bits})
        del hessians
        yield number, {k: v for name in names for k, v in stored_tensors(lm, name).items()}
        doorstep.pass_through(block)
        block.to("meta")
        for name in names:
            del lm.weight_params[name]
        snapshot.save({"block": torch.tensor(number + 1)} | named("hidden", {str(i): x for i, x in enumerate(hidden)}))

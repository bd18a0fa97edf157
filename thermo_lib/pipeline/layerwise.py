"""Quantize a model block by block under calibration, so that memory doesn't grow with the number of blocks.

A block is read, the Hessians of its linears are collected on the hidden states that enter it, its linears are
quantized, and the states go through what they have become. Memory holds one block and the hidden states that enter it;
the result is that of ``quantize`` with the whole model in memory.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from thermo_lib.diffusion.states import Calibration
from thermo_lib.files.snapshots import Snapshot, named, part_of
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import QuantizedLM, linear_names
from thermo_lib.pipeline.quantizers import quantizer_of
from thermo_lib.pipeline.storage import stored_tensors
from thermo_lib.pipeline.weights import counts_tokens, quantize_layer
from thermo_lib.transition.blocks import BlockStream


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


def coded_blocks(
    lm: QuantizedLM, read: Callable[[str], Tensor], calibration: Calibration, snapshot: Snapshot
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Quantize block after block.

    Args:
        lm: the model without weights (on the meta device), with the configuration; blocks are quantized in it and
            emptied again.
        read: a tensor of the full-precision model by the library's name, on the device where the work is done, which
            is that of the model's position embeddings.
        calibration: the states.
        snapshot: where the hidden states that enter a block are kept; a stopped run goes on from there.

    Yields:
        A block's number and the tensors that are stored of its linears; the block at which an earlier run was stopped
        comes first, even if that run has yielded it.
    """
    state = snapshot.load()
    if state:
        states = part_of(state, "hidden")
        device = lm.model.model.rotary_emb.inv_freq.device
        hidden, start = [states[str(part)].to(device) for part in range(len(states))], int(state["block"])
    else:
        table = read("model.embed_tokens.weight")
        calibration = calibration.to(table.device)
        hidden, start = [table[part.ids].float() for part in calibration.parts], 0
    quantizer = quantizer_of(lm.config)
    stream = BlockStream(lm, calibration, start, hidden)
    for number in range(start, len(lm.model.model.layers)):
        prefix = f"model.layers.{number}"
        block = stream.block
        for name in block.state_dict():
            block.load_state_dict({name: read(f"{prefix}.{name}").float()}, strict=False, assign=True)
        block.requires_grad_(False)
        names = [name for name in linear_names(lm.model) if name.startswith(f"{prefix}.")]
        hessians = stream.hessians(names, lm.config.weight_groups)
        for name in names:
            quantize_layer(lm, quantizer, name, hessians[name])
        del hessians
        yield number, {k: v for name in names for k, v in stored_tensors(lm, name).items()}
        stream.advance()
        block.to("meta")
        for name in names:
            del lm.weight_params[name]
        kept = named("hidden", {str(part): x for part, x in enumerate(stream.hidden)})
        snapshot.save({"block": torch.tensor(stream.number)} | kept)

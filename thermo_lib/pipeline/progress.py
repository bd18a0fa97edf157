"""Snapshots of a model whose blocks are quantized or trained one after the other: one of each finished block."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thermo_lib.files.snapshots import Snapshot, named, part_of
from thermo_lib.pipeline.model import QuantizedLM, install_layer, install_weights
from thermo_lib.pipeline.quantizers import quantizer_of
from thermo_lib.pipeline.storage import stored_type, time_group_params, weight_tensors
from thermo_lib.quant.layers import QuantizedLinear


@dataclass(frozen=True)
class BlockSnapshots:
    """One snapshot for each block.

    Attributes:
        of_all: path and digest, from which those of the blocks are made; None for no snapshots.
    """

    of_all: Snapshot | None

    def save(self, lm: QuantizedLM, block: str, losses: dict[str, list[float]]) -> None:
        """Keep a finished block.

        Args:
            lm: the model.
            block: name of the block.
            losses: what was trained in it to the loss of each step.
        """
        if self.of_all is None:
            return
        module = lm.model.get_submodule(block)
        layers = {name: layer for name, layer in lm.quantized_layers().items() if name.startswith(f"{block}.")}
        tables = {f"{name}.{key}" for name, layer in layers.items() for key in _held(layer)}
        rest = {name: tensor for name, tensor in named(block, module.state_dict()).items() if name not in tables}
        stored = {key: tensor for name in layers for key, tensor in weight_tensors(lm, name).items()}
        trained = {name: torch.tensor(values, dtype=torch.float64) for name, values in losses.items()}
        _of_block(self.of_all, block).save(named("stored", stored) | named("rest", rest) | named("losses", trained))

    def restore(self, lm: QuantizedLM, block: str) -> bool:
        """Bring a block to where its snapshot was taken; False where there is none.

        Raises:
            ValueError: what ``Snapshot.load`` raises.
        """
        if self.of_all is None:
            return False
        snapshot = _of_block(self.of_all, block)
        state = snapshot.load()
        if not state:
            return False
        with snapshot.checked(state, _expected(lm, block, state)):
            self._restore(lm, state)
        return True

    def _restore(self, lm: QuantizedLM, state: Mapping[str, Tensor]) -> None:
        """Put back what ``save`` has kept."""
        device, config, quantizer = lm.device, lm.config, quantizer_of(lm.config)
        stored = {name: tensor.to(device) for name, tensor in part_of(state, "stored").items()}
        for name in sorted({name.rpartition(".")[0] for name in stored}):
            layer, found = lm.model.get_submodule(name), part_of(stored, name)
            parameters = {key: found[f"weight_{key}"] for key in quantizer.parameters}
            assert isinstance(layer, nn.Linear | QuantizedLinear)
            lm.weight_params[name] = time_group_params("weight", parameters, config, layer.in_features)
            codes = {key: found[key] for key in quantizer.layer.STORED}
            if isinstance(layer, QuantizedLinear):
                for key, tensor in codes.items():
                    setattr(layer, key, tensor)
                install_weights(layer, lm.weight_params[name], config)
            else:
                install_layer(lm, name, codes)
        rest = {name: tensor.to(device) for name, tensor in part_of(state, "rest").items()}
        lm.model.load_state_dict(rest, strict=False)
        lm.losses |= {name: values.tolist() for name, values in part_of(state, "losses").items()}


def _expected(lm: QuantizedLM, block: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as ``save`` keeps them of a block; how many losses there are, the snapshot says."""
    quantizer, stored, aside = quantizer_of(lm.config), dict[str, Tensor](), set[str]()
    for name, linear in lm.model.get_submodule(block).named_modules(prefix=block):
        if not isinstance(linear, nn.Linear | QuantizedLinear):
            continue
        read = lambda key, name=name: state.get(f"stored.{name}.{key}")  # noqa: E731
        stored |= named(name, quantizer.expected(linear.out_features, linear.in_features, read))
        aside |= {f"{name}.{key}" for key in (_held(linear) if isinstance(linear, QuantizedLinear) else ("weight",))}
    stored = {name: tensor.to(stored_type(name) or tensor.dtype) for name, tensor in stored.items()}
    rest = named(block, lm.model.get_submodule(block).state_dict())
    losses = {
        name: torch.empty(values.numel(), dtype=torch.float64) for name, values in part_of(state, "losses").items()
    }
    kept = {name: tensor for name, tensor in rest.items() if name not in aside}
    return named("stored", stored) | named("rest", kept) | named("losses", losses)


def _of_block(of_all: Snapshot, block: str) -> Snapshot:
    """The snapshot of a block."""
    path = of_all.path
    return Snapshot(path.with_name(f"{path.stem}-{block.rpartition('.')[2]}{path.suffix}"), of_all.run)


def _held(layer: QuantizedLinear) -> tuple[str, ...]:
    """The buffers of a quantized layer that its codes and parameters decide."""
    return (*layer.STORED, "scale", "zero_point", "row_of_step")

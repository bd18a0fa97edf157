"""What the tests of streamed quantization share: settings, states, and what a folder holds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thermo_lib import Calibration, ThermoConfig, calibrate, load_model, load_quantized

SMALL = {"group_size": 16, "activation_bits": 16, "num_time_groups": 1}
EARLIER = {"config.json": b'{"quantization_config": {"quant_method": "thermo"}}'}  # an output of an earlier run
ALL_IN_TWO = 2**12  # bytes of a shard: every checkpoint here takes several


def configured(**fields: Any) -> ThermoConfig:
    few = {"weights.beam": 4} if fields.get("quantizer") == "trellis" else {}
    return ThermoConfig(**(SMALL | {"quantizer": "least_squares"} | few | fields))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def state(folder: Path) -> dict[str, Tensor]:
    """All parameters and buffers of a quantized model."""
    model = load_quantized(folder).model
    return dict(model.named_parameters()) | dict(model.named_buffers())


def states_of(source: Path) -> Calibration:
    """Random calibration states at all of 8 timesteps, in two lengths."""
    lm, generator = load_model(str(source)), torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(0, lm.model.config.vocab_size - 1, (3, length), generator=generator), None) for length in (7, 5)
    ]
    return calibrate(lm, batches, timesteps=8, source="forward", seed=0, progress=False)


def unfinished(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


def shard_of(source: Path, name: str) -> Path:
    index = json.loads((source / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return source / index["weight_map"][name]


def _stop_at_second(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def stopped(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise KeyboardInterrupt
        return function(*arguments)

    return stopped

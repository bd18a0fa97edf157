"""Quantized models and checkpoints that the tests of this folder share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import TIMESTEPS, Quantize, RandomIds, config_of
from layouts import DREAM, Layout
from streamed import ALL_IN_TWO, EARLIER
from tokenizers import Tokenizer
from torch import Tensor

from thermo_lib import Calibration, ThermoConfig, quantize
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline import streaming
from thermo_lib.pipeline.model import QuantizedLM


@pytest.fixture(scope="session")
def quantized(tiny: DiffusionLM, calibration: Calibration) -> Quantize:
    """Quantizes the tiny model; equal configurations share a model, which tests don't change."""
    made: dict[ThermoConfig, QuantizedLM] = {}

    def make(**changes: Any) -> QuantizedLM:
        config = config_of(**changes)
        if config not in made:
            made[config] = quantize(tiny, config, calibration if config.needs_calibration else None)
        return made[config]

    return make


@pytest.fixture(scope="module")
def outputs(random_ids: RandomIds) -> Callable[[DiffusionLM], Tensor]:
    """A model's logits at every timestep, ``(timesteps, batch, length, vocabulary)``."""
    ids = random_ids(2, 10, seed=5)

    def run(lm: DiffusionLM) -> Tensor:
        found = []
        for timestep in range(TIMESTEPS):
            lm.set_timestep(timestep, TIMESTEPS)
            with torch.no_grad():
                found.append(lm.model(ids).logits)
        return torch.stack(found)

    return run


@pytest.fixture
def several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_SHARD_BYTES", ALL_IN_TWO)
    monkeypatch.setattr(streaming, "_ROWS_BYTES", 2**10)  # a tensor is read in several parts


@pytest.fixture
def write(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Writes a checkpoint of a layout with changed settings."""

    def make(layout: Layout = DREAM, **changes: Any) -> Path:
        return layout.write(tmp_path / "source", tokenizer, **changes)

    return make


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where an earlier output is, which only a complete new one may replace."""
    path = tmp_path / "output"
    path.mkdir()
    (path / "config.json").write_bytes(EARLIER["config.json"])
    return path

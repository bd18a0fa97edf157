"""Block by block, calibration and training give the model that they give in memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import BLOCKS, Layout
from small_runs import every_nth
from streamed import _stop_at_second, configured, state, states_of, unfinished

from thermo_lib import Calibration, load_model, quantize, save_quantized
from thermo_lib.pipeline import streaming
from thermo_lib.pipeline.streaming import quantize_checkpoint

SHORT = {"steps": 2, "batch": 4}
FRESH = {"num_texts": 2, "num_prompts": 2}

pytestmark = pytest.mark.usefixtures("several_shards")

FIELDS: list[dict[str, Any]] = [
    {"quantizer": "gptq"},
    {"quantizer": "gptq", "embedding_bits": 8, "activation_bits": 4, "activation_ranges": "dynamic"},
    {"quantizer": "gptq", "group_size": None, "num_time_groups": 2, "enable_boundary_smoothing": True},
    {"quantizer": "least_squares", "num_time_groups": 2},
    {"quantizer": "trellis", "bit_width": 2, "weights.token_weights": "uniform"},
    {"quantizer": "trellis", "average_bits": 2.2},
    {"quantizer": "gptq", "group_size": None, "hessian": "transition"},
    {"quantizer": "gptq", "group_size": None, "activation_bits": 4, "num_time_groups": 2},
    {"training": ({"phase": "blocks", **SHORT}, {"phase": "path_kl", **SHORT})},
    {  # states of two lengths in a step, each at its own timesteps
        "quantizer": "rtn",
        "activation_bits": 4,
        "num_time_groups": 2,
        "training": ({"phase": "path_kl", "states": "fresh", **FRESH, "steps": 2},),
    },
    {
        "quantizer": "trellis",
        "average_bits": 2.2,
        "weights.beam": 2,
        "activation_bits": 4,
        "activation_ranges": "dynamic",
        "training": (
            {"phase": "sequential", "states": "fresh", **FRESH, "steps": 1, "batch": 4},
            {"phase": "path_kl", "what": "network", "states": "fresh", **FRESH, "steps": 2},
        ),
    },
]
WITH_EVERY_KIND = (FIELDS[-1],)  # which reaches the most


def cases() -> list[Any]:
    """Each configuration with one kind of blocks, the kinds in turn, and some with every kind."""
    return [
        pytest.param(BLOCKS[kind], fields, id=f"{fields}-{kind}")
        for number, fields in enumerate(FIELDS)
        for kind in (BLOCKS if fields in WITH_EVERY_KIND else [list(BLOCKS)[number % len(BLOCKS)]])
    ]


class TestResult:
    @pytest.mark.slow
    @pytest.mark.parametrize(("layout", "fields"), cases())
    def test_block_by_block_it_is_the_model_that_is_calibrated_in_memory(
        self, write: Callable[..., Path], tmp_path: Path, layout: Layout, fields: dict[str, Any]
    ) -> None:
        source, config = write(layout), configured(timesteps=4, **fields)
        calibration = every_nth(states_of(source), 2)
        quantize_checkpoint(source, tmp_path / "streamed", config, calibration)
        save_quantized(quantize(load_model(str(source)), config, calibration), tmp_path / "in memory")
        streamed, expected = state(tmp_path / "streamed"), state(tmp_path / "in memory")
        assert streamed.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(streamed[name], tensor), name
        assert not unfinished(tmp_path / "streamed").exists()
        about = json.loads((tmp_path / "streamed" / "config.json").read_text(encoding="utf-8"))
        is_trained = config.phase("path_kl") is not None and config.phase("path_kl").what == "network"
        assert about["torch_dtype"] == ("float32" if is_trained else "bfloat16")


class TestBadSource:
    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"quantizer": "gptq"}, "calibration: found None, required by 'gptq'"),
            ({"num_time_groups": 2}, "calibration: found None, required by time groups"),
            ({"activation_bits": 8}, "calibration: found None, required by static activation ranges"),
            ({"reconstruction": "blocks"}, "calibration: found None, required by training 'blocks'"),
        ],
        ids=str,
    )
    def test_what_needs_calibration_is_refused_without_it(
        self, write: Callable[..., Path], output: Path, fields: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(ValueError, match=reason):
            quantize_checkpoint(write(), output, configured(**fields))
        assert not unfinished(output).exists()

    def test_another_calibration_is_refused(
        self, write: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, config = write(), configured(quantizer="gptq", timesteps=8)
        calibration = states_of(source)
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "_write", _stop_at_second(streaming._write))
            with pytest.raises(KeyboardInterrupt):
                quantize_checkpoint(source, output, config, calibration)
        (first, second), rows = calibration.parts, torch.arange(8)
        with pytest.raises(ValueError, match="output: found an unfinished run of another calibration"):
            quantize_checkpoint(source, output, config, Calibration((first[rows], second), 8, "forward"))
        quantize_checkpoint(source, output, config, calibration)

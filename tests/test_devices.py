"""Everything is computed on the model's device, and nothing moves back and forth inside a loop.

A device that claims to be another one stands for a GPU, see ``pretend``.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import MASK_TOKEN_ID, SDAR
from pretend import DEVICE, OnDevice, PretendedDevice, moved
from tokenizers import Tokenizer
from torch import Tensor

from thermo_lib import Calibration, ThermoConfig, calibrate, generate, path_kl, quantize
from thermo_lib.data.puzzles import make_puzzles
from thermo_lib.diffusion.states import trajectory_states
from thermo_lib.diffusion.tokens import SAMPLERS
from thermo_lib.evaluation.scores import Suite, evaluate
from thermo_lib.models.lm import DiffusionLM, load_model, save_model
from thermo_lib.pipeline.activations import requantize_activations, smooth_each_layer
from thermo_lib.pipeline.model import QuantizedLM
from thermo_lib.pipeline.parts import (
    GPTQ,
    Blocks,
    Dynamic,
    LeastSquares,
    PathKL,
    RoundToNearest,
    Sequential,
    Static,
    TimeNorms,
    Trellis,
)
from thermo_lib.pipeline.parts import TimeGrouping as Groups
from thermo_lib.pipeline.storage import load_quantized, save_quantized
from thermo_lib.pipeline.streaming import quantize_checkpoint

pytestmark = pytest.mark.slow

TIMESTEPS = 3
SHORT = {"steps": 2, "batch": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "least squares, 8-bit embeddings": {"weights": LeastSquares(group_size=16), "embedding_bits": 8},
    "gptq in time groups": {"weights": GPTQ(group_size=16), "time_groups": Groups(count=3)},
    "gptq for path KL": {"weights": GPTQ(group_size=16, token_weights="path_kl")},
    "trellis, spread bits": {"weights": Trellis(bits=2.3, beam=4)},
    "static": {"weights": RoundToNearest(bits=4), "activations": Static(bits=8, group_size=16, by_token_state=True)},
    "static, for the output": {
        "weights": RoundToNearest(bits=4),
        "activations": Static(bits=4, fit_to="output", steps=2, batch=32),
        "time_groups": Groups(count=2),
    },
    "static, for path KL": {
        "weights": RoundToNearest(bits=4),
        "activations": Static(bits=4, fit_to="path_kl", **SHORT),
        "time_groups": Groups(count=2, smoothing="spline"),
    },
    "sequential, dynamic": {
        "weights": Trellis(bits=2.3, beam=4),
        "activations": Dynamic(bits=8),
        "training": (Sequential(**SHORT),),
    },
    "blocks, then codes": {
        "weights": GPTQ(group_size=16),
        "training": (Blocks(**SHORT), PathKL(what="codes", **SHORT)),
    },
    "network on fresh states": {
        "weights": GPTQ(group_size=16),
        "training": (PathKL(what="network", states="fresh", num_texts=4, own_share=0.5, steps=3),),
    },
    "norms of time groups": {
        "weights": RoundToNearest(bits=4),
        "activations": Static(bits=8),
        "training": (TimeNorms(count=2, what="network", states="fresh", num_texts=4, own_share=0.5, steps=2),),
    },
}


@pytest.fixture(scope="module")
def tiny(build_tiny: Callable[..., DiffusionLM]) -> DiffusionLM:
    """One narrow block: on the pretended device every operation is looked at, which takes its time."""
    return build_tiny(0, hidden_size=16, intermediate_size=24, num_hidden_layers=1)


@pytest.fixture(scope="module")
def calibration(tiny: DiffusionLM, random_ids: Callable[..., Tensor]) -> Calibration:
    """Six sequences of 16 tokens on their trajectories."""
    return calibrate(tiny, [(random_ids(6, 16), None)], timesteps=TIMESTEPS, progress=False)


@pytest.fixture(scope="module")
def folder(build_tiny: Callable[..., DiffusionLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of two narrow blocks."""
    path = tmp_path_factory.mktemp("models") / "narrow"
    save_model(build_tiny(0, hidden_size=16, intermediate_size=24), path)
    return path


@pytest.fixture
def there(tiny: DiffusionLM) -> DiffusionLM:
    """The tiny model on the pretended device."""
    lm = copy.deepcopy(tiny)
    moved(lm.model)
    assert lm.model.device == DEVICE
    return lm


def plain(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, OnDevice) else tensor


def all_there(lm: DiffusionLM) -> bool:
    """Whether every number of a model is on the pretended device."""
    tensors = [*lm.model.parameters(), *lm.model.buffers()]
    return all(isinstance(tensor, OnDevice) for tensor in tensors if tensor.numel())


def agree(here: QuantizedLM, there: QuantizedLM) -> None:
    """The same codes but for few, and the same parameters but for rounding."""
    layers = there.quantized_layers()
    for name, layer in here.quantized_layers().items():
        assert (plain(layers[name].packed) == layer.packed).float().mean() > 0.9, name
    for phase, losses in here.losses.items():
        assert there.losses[phase] == pytest.approx(losses, rel=0.05, abs=0.05), phase


@pytest.mark.parametrize("fields", [pytest.param(fields, id=name) for name, fields in CONFIGS.items()])
def test_quantizing(tiny: DiffusionLM, there: DiffusionLM, calibration: Calibration, fields: dict[str, Any]) -> None:
    config = ThermoConfig(timesteps=TIMESTEPS, **fields)
    expected = quantize(tiny, config, calibration)
    with PretendedDevice():
        found = quantize(there, config, calibration)
        assert all_there(found)
    agree(expected, found)


def test_a_stopped_training_goes_on(
    tiny: DiffusionLM, there: DiffusionLM, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = Blocks(**SHORT), PathKL(**SHORT)
    config = ThermoConfig(timesteps=TIMESTEPS, weights=RoundToNearest(), training=phases)
    with PretendedDevice():
        whole = quantize(there, config, calibration, resume=tmp_path)
        again = quantize(there, config, calibration, resume=tmp_path)
        assert all_there(again)
    for name, layer in whole.quantized_layers().items():
        assert torch.equal(plain(layer.packed), plain(again.quantized_layers()[name].packed))
        assert torch.equal(plain(layer.scale), plain(again.quantized_layers()[name].scale))
    assert whole.losses == again.losses


def test_changing_activations_and_smoothing(there: DiffusionLM, calibration: Calibration) -> None:
    config = ThermoConfig(timesteps=TIMESTEPS, weights=RoundToNearest(bits=4))
    with PretendedDevice():
        weights = quantize(there, config)
        changes = {"activations": Static(bits=4), "time_groups": Groups(count=2, smoothing=None)}
        changed = requantize_activations(weights, calibration, **changes)
        chosen = smooth_each_layer(changed, calibration, ["linear"], [1], reference=there)
        assert all_there(chosen)


def test_a_model_is_saved_from_the_device(there: DiffusionLM, tmp_path: Path) -> None:
    config = ThermoConfig(timesteps=TIMESTEPS, weights=RoundToNearest(), embedding_bits=8)
    with PretendedDevice():
        quantized = quantize(there, config)
        save_quantized(quantized, tmp_path / "q")
    loaded = load_quantized(tmp_path / "q")
    for name, layer in loaded.quantized_layers().items():
        assert torch.equal(layer.packed, plain(quantized.quantized_layers()[name].packed))


@pytest.mark.parametrize(
    "fields",
    [
        {"weights": LeastSquares(group_size=16)},
        {"weights": Trellis(bits=2.2, beam=4), "training": (Sequential(**SHORT), PathKL(what="network", **SHORT))},
    ],
    ids=str,
)
def test_a_checkpoint_is_quantized_on_the_device(
    folder: Path, tmp_path: Path, random_ids: Callable[..., Tensor], fields: dict[str, Any]
) -> None:
    config = ThermoConfig(timesteps=2, **fields)
    states = calibrate(load_model(str(folder)), [(random_ids(4, 12), None)], timesteps=2, progress=False)
    quantize_checkpoint(folder, tmp_path / "here", config, states)
    with PretendedDevice() as device:
        quantize_checkpoint(folder, tmp_path / "there", config, states, device=DEVICE)
    assert device.count["to device"] > 0
    here, there = (load_quantized(tmp_path / name).quantized_layers() for name in ("here", "there"))
    for name, layer in here.items():
        assert (layer.packed == there[name].packed).float().mean() > 0.9


def test_a_cluster_has_no_other_device(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device: found cuda, allowed is cpu on a cluster"):
        quantize_checkpoint(folder, tmp_path / "q", ThermoConfig.preset("fast"), client=object(), device="cuda")


@pytest.mark.parametrize("source", ["trajectory", "forward"])
def test_the_same_seed_gives_the_same_states(
    tiny: DiffusionLM, there: DiffusionLM, random_ids: Callable[..., Tensor], source: str
) -> None:
    how = {"timesteps": TIMESTEPS, "source": source, "progress": False}
    expected = calibrate(tiny, [(random_ids(6, 16), None)], **how)
    with PretendedDevice():
        found = calibrate(there, [(random_ids(6, 16), None)], **how)
    for name, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[name], tensor)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_gives_the_same_texts(tiny: DiffusionLM, there: DiffusionLM, sampler: str) -> None:
    ids = torch.full((3, 12), tiny.mask_token_id)
    ids[:, :2] = 20
    how = {
        "timesteps": 5,
        "sampler": sampler,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 20,
        "alg_temp": 0.3,
        "seed": 3,
    }
    expected = generate(tiny, ids, **how)
    with PretendedDevice() as device:
        found = generate(there, ids.to(DEVICE), **how)
    assert torch.equal(plain(found), expected)
    moves = device.count["to device"] + device.count["to cpu"]
    assert moves <= 1 + 5 + 5  # the ids, and of each step the random numbers


@pytest.mark.parametrize("how", [{}, {"sampler": "origin"}, {"suppress_tokens": [7], "begin_suppress_tokens": [8]}])
def test_a_step_waits_for_a_gpu_once_before_its_pass(there: DiffusionLM, how: dict[str, Any]) -> None:
    ids, waits = torch.full((2, 12), there.mask_token_id), []
    for timesteps in (3, 6):
        with PretendedDevice() as device:
            generate(there, ids.to(DEVICE), timesteps=timesteps, temperature=0.8, **how)
        assert device.count["to cpu"] == 0
        waits.append(device.count["read"] + device.count["size"])
    assert waits[1] - waits[0] == 3  # a number that is read, or a size that depends on numbers; of each step one


@pytest.mark.parametrize("hook", ["on_state", "on_logits", "on_tokens"])
def test_hooks_see_tensors_of_the_device(there: DiffusionLM, hook: str) -> None:
    seen: list[bool] = []

    def look(*given: Any) -> Tensor:
        tensors = [x for x in given if isinstance(x, Tensor)]
        seen.extend(isinstance(x, OnDevice) for x in tensors)
        return tensors[-1] if hook == "on_logits" else tensors[0]

    with PretendedDevice():
        generate(there, torch.full((2, 6), there.mask_token_id), timesteps=3, **{hook: look})
    assert seen
    assert all(seen)


def test_left_padding_and_blocks(tiny: DiffusionLM, there: DiffusionLM) -> None:
    ids = torch.full((2, 8), tiny.mask_token_id)
    visible = torch.ones_like(ids, dtype=torch.bool)
    visible[0, :3] = False
    how = {"timesteps": 4, "block_length": 4, "temperature": 1.0, "sampler": "origin"}
    expected = generate(tiny, ids, attention_mask=visible, **how)
    with PretendedDevice():
        found = generate(there, ids.to(DEVICE), attention_mask=visible.to(DEVICE), **how)
    assert torch.equal(plain(found), expected)


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"threshold": 0.3}], ids=["drawn", "sure"])
def test_block_by_block(tmp_path: Path, tokenizer: Tokenizer, options: dict[str, float]) -> None:
    folder = SDAR.write(tmp_path / "sdar", tokenizer, mask_token_id=MASK_TOKEN_ID)
    lm = load_model(str(folder), dtype=torch.float64)  # in which where a tensor lies decides no token
    ids = torch.full((3, 14), lm.mask_token_id)
    ids[0, :5], ids[1, 9:] = 20, 21
    visible = torch.ones_like(ids, dtype=torch.bool)
    visible[2, :5] = False
    how = {"timesteps": 9, "block_length": 4, "sampler": "low_confidence", "end_tokens": range(40, 90), **options}
    expected = generate(lm, ids, attention_mask=visible, **how)
    moved(lm.model)
    with PretendedDevice():
        found = generate(lm, ids.to(DEVICE), attention_mask=visible.to(DEVICE), **how)
    assert torch.equal(plain(found), expected)


@pytest.mark.parametrize("bits", [None, 8])
def test_rows_at_several_timesteps_and_all_options(
    tiny: DiffusionLM, calibration: Calibration, bits: int | None
) -> None:
    ranges = None if bits is None else Static(bits=bits, by_token_state=True)
    groups = Groups(count=TIMESTEPS)
    config = ThermoConfig(
        timesteps=TIMESTEPS, weights=GPTQ(bits=8, group_size=16), activations=ranges, time_groups=groups
    )
    lm = quantize(tiny, config, calibration)
    ids = torch.full((3, 14), tiny.mask_token_id)
    ids[0, :4], ids[1, 9:] = 20, 21
    visible = torch.ones_like(ids, dtype=torch.bool)
    visible[2, :5] = False
    rules = {"suppress_tokens": [30, 31], "begin_suppress_tokens": 32, "end_tokens": range(40, 90), "stop_at_end": True}
    for options in ({"sampler": "entropy"}, {"sampler": "low_confidence", "threshold": 0.5}):
        how = {"timesteps": 7, "block_length": 3, "end_last": True, "attention_mask": visible, **rules, **options}
        expected = generate(lm, ids, **how)
        there = replace(lm, model=copy.deepcopy(lm.model))
        moved(there.model)
        with PretendedDevice():
            found = generate(there, ids.to(DEVICE), **how | {"attention_mask": visible.to(DEVICE)})
        assert torch.equal(plain(found), expected)


def test_evaluation(tiny: DiffusionLM, there: DiffusionLM, calibration: Calibration) -> None:
    config = ThermoConfig(timesteps=TIMESTEPS, weights=RoundToNearest(bits=4))
    states = trajectory_states(tiny, torch.full((4, 12), tiny.mask_token_id), None, TIMESTEPS, 0)
    puzzles = make_puzzles("sudoku", 2, 0, test=True)

    def scores(lm: DiffusionLM) -> Any:
        suite = Suite(lm, states, states, puzzles, TIMESTEPS)
        return evaluate(quantize(lm, config), suite)

    expected = scores(tiny)
    with PretendedDevice() as device:
        found = scores(there)
    assert device.count["to device"] < 60
    for name in ("correct", "masked", "nll"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-3)
    assert found.path.total == pytest.approx(expected.path.total, rel=1e-3)
    assert found.puzzles == expected.puzzles


def test_path_kl_moves_the_states_once(tiny: DiffusionLM, there: DiffusionLM) -> None:
    states = trajectory_states(tiny, torch.full((4, 12), tiny.mask_token_id), None, TIMESTEPS, 0)
    with PretendedDevice() as device:
        found = path_kl(there, there, states, TIMESTEPS, batch_size=2)
    assert found.total == pytest.approx(0, abs=1e-6)
    assert device.count["to device"] <= 8  # four tensors of the states, for each model
    assert device.count["to cpu"] <= 2 + 2 * (TIMESTEPS + 1)


def test_mixing_devices_fails() -> None:
    with PretendedDevice() as device:
        there = torch.ones(3).to(DEVICE)
        assert float(there.sum()) == 3
        with pytest.raises(RuntimeError, match=r"on the same device, but found device .3,., cpu .3,."):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match=r"generator of the device, found one of cpu"):
            torch.multinomial(there, 1, generator=torch.Generator())
        assert torch.equal(there.cpu(), torch.ones(3))
    assert device.count == {"to device": 1, "read": 1, "to cpu": 1}


def test_ids_on_another_device_than_the_model(there: DiffusionLM, random_ids: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="input_ids: found on cpu, expected on lazy, where the model is"):
        there.model(random_ids(1, 4))


def test_a_model_split_over_devices_is_refused(tiny: DiffusionLM) -> None:
    lm = copy.deepcopy(tiny)
    moved(lm.model.model.layers[0].mlp)
    with pytest.raises(ValueError, match="lm: found a model split over cpu, lazy, allowed is one device"):
        quantize(lm, "fast")

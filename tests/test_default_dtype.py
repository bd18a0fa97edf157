"""No result depends on ``torch.set_default_dtype``: everything that is made has the dtype that it needs."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from thermo_lib.diffusion.path_kl import path_kl
from thermo_lib.diffusion.sampling import generate
from thermo_lib.diffusion.states import Calibration, calibrate
from thermo_lib.diffusion.tokens import SAMPLERS
from thermo_lib.diffusion.training import stratified_ratios
from thermo_lib.evaluation.scores import context_free_scores, masked_token_scores
from thermo_lib.integrations.lm_eval import HarnessLM
from thermo_lib.models.architectures import build_model
from thermo_lib.models.lm import DiffusionLM, load_model, save_model
from thermo_lib.pipeline.activations import requantize_activations, resmooth, smooth_each_layer
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import QuantizedLM
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.storage import load_quantized, save_quantized
from thermo_lib.pipeline.streaming import quantize_checkpoint
from thermo_lib.quant.planes import compile_linears
from thermo_lib.time_aware.groups import TimeGroupParams
from thermo_lib.time_aware.ranges import best_starts, input_samples
from thermo_lib.time_aware.smoothing import BoundarySmoother

TIMESTEPS = 6
DEFAULTS = [torch.bfloat16, torch.float64]
ACTIVATIONS = {"activation_bits": 8, "activation_ranges": "static"}
CONFIGS: dict[str, dict[str, Any]] = {
    "rtn": {"quantizer": "rtn", "embedding_bits": 8},
    "least_squares": {"quantizer": "least_squares", "embedding_bits": 8},
    "gptq": {"quantizer": "gptq", "weights.token_weights": "path_kl"},
    "gptq in time groups": {"quantizer": "gptq", "num_time_groups": 2, "enable_boundary_smoothing": True},
    "trellis": {"quantizer": "trellis", "average_bits": 2.5},
    "dynamic ranges": {"quantizer": "rtn", "activation_bits": 8, "activation_ranges": "dynamic"},
    "static ranges": {"quantizer": "rtn", "num_time_groups": 2, "activations.by_token_state": True, **ACTIVATIONS},
    "ranges for outputs": {"quantizer": "rtn", "activations.fit_to": "output", "activations.steps": 2, **ACTIVATIONS},
    "ranges for path KL": {"quantizer": "rtn", "activations.fit_to": "path_kl", "activations.steps": 2, **ACTIVATIONS},
    "blocks": {"quantizer": "rtn", "blocks.steps": 2},
    "sequential": {"quantizer": "gptq", "sequential.steps": 2},
    "transitions": {"quantizer": "rtn", "path_kl.what": "codes", "path_kl.steps": 2},
    "chains": {"quantizer": "rtn", "path_kl.states": "fresh", "path_kl.steps": 2, "path_kl.own_share": 0.5},
}


@pytest.fixture(scope="module")
def tiny(build_tiny: Callable[..., DiffusionLM]) -> DiffusionLM:
    """A model of one block: whatever is done, it is done three times."""
    return build_tiny(0, num_hidden_layers=1)


@pytest.fixture(scope="module")
def calibration(tiny: DiffusionLM, random_ids: Callable[..., Tensor]) -> Calibration:
    """Four sequences of 12 tokens on their trajectories."""
    return calibrate(tiny, [(random_ids(4, 12), None)], timesteps=TIMESTEPS, progress=False)


def config_of(name: str) -> ThermoConfig:
    settings = {"bit_width": 2, "group_size": 16, "timesteps": TIMESTEPS, "num_time_groups": 1}
    return ThermoConfig(**{**settings, "enable_boundary_smoothing": False, **CONFIGS[name]})


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def bits_of(value: Any) -> Any:
    """A result as something that is equal only if every bit and every dtype is."""
    if isinstance(value, Tensor):
        value = value.detach().contiguous()
        return str(value.dtype), tuple(value.shape), value.view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, DiffusionLM):
        return {name: bits_of(tensor) for name, tensor in value.model.state_dict().items()}
    if isinstance(value, dict):
        return {key: bits_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits_of(item) for item in value]
    return bits_of(vars(value)) if hasattr(value, "__dataclass_fields__") else value


def check_same(work: Callable[[], Any]) -> None:
    """Do the work under each default dtype."""
    expected = bits_of(work())
    for dtype in DEFAULTS:
        with default_dtype(dtype):
            assert bits_of(work()) == expected, f"another result under {dtype}"


def quantized(lm: DiffusionLM, name: str, calibration: Calibration) -> QuantizedLM:
    return quantize(lm, config_of(name), calibration)


@pytest.mark.parametrize("name", CONFIGS)
def test_quantized_models_and_what_they_compute(tiny: DiffusionLM, calibration: Calibration, name: str) -> None:
    states = calibration.parts[0]

    def work() -> list[Any]:
        lm = quantized(tiny, name, calibration)
        return [lm, path_kl(tiny, lm, states, TIMESTEPS), generate(lm, states.ids[:2], timesteps=2)]

    check_same(work)


@pytest.mark.parametrize("name", ["least_squares", "gptq in time groups", "trellis", "static ranges"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folders(tiny: DiffusionLM, calibration: Calibration, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    lm = quantized(tiny, name, calibration)

    def work() -> list[Any]:
        save_quantized(lm, tmp_path / "quantized")
        loaded = load_quantized(tmp_path / "quantized", dtype=dtype)
        assert loaded.model.model.norm.weight.dtype == dtype
        written = (tmp_path / "quantized" / "model.safetensors").read_bytes()
        return [written, loaded, loaded.model(calibration.parts[0].ids[:2]).logits]

    check_same(work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_precision_models(tiny: DiffusionLM, calibration: Calibration, tmp_path: Path, dtype: torch.dtype) -> None:
    def work() -> list[Any]:
        save_model(tiny, tmp_path / "model")
        loaded = load_model(str(tmp_path / "model"), dtype=dtype)
        assert {p.dtype for p in loaded.model.parameters()} == {dtype}
        return [loaded, dict(loaded.model.named_buffers()), loaded.model(calibration.parts[0].ids[:2]).logits]

    check_same(work)


@pytest.mark.parametrize("name", ["least_squares", "gptq in time groups", "trellis"])
def test_quantize_checkpoint(tiny: DiffusionLM, calibration: Calibration, tmp_path: Path, name: str) -> None:
    save_model(tiny, tmp_path / "model")
    config = config_of(name)
    uniform = {"token_weights": "uniform"} if hasattr(config.weights, "token_weights") else {}
    uniform |= {"bits": 2, "spread": False} if config.quantizer == "trellis" else {}
    config = config.replace(weights=uniform)

    def work() -> dict[str, bytes]:
        out = tmp_path / "quantized"
        quantize_checkpoint(tmp_path / "model", out, config, calibration if config.needs_calibration else None)
        return {path.name: path.read_bytes() for path in sorted(out.iterdir())}

    check_same(work)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_generation(tiny: DiffusionLM, sampler: str) -> None:
    ids = torch.full((2, 6), tiny.mask_token_id)
    how = {"timesteps": 3, "temperature": 0.8, "top_p": 0.9, "top_k": 50, "alg_temp": 0.5}
    check_same(lambda: generate(tiny, ids, sampler=sampler, **how))


@pytest.mark.parametrize("source", ["forward", "trajectory"])
def test_calibration_states(tiny: DiffusionLM, random_ids: Callable[..., Tensor], source: str) -> None:
    batches = [(random_ids(3, 8), None)]
    check_same(lambda: calibrate(tiny, batches, timesteps=3, source=source, seed=0, progress=False).tensors())


def test_activation_ranges_and_smoothing(tiny: DiffusionLM, calibration: Calibration) -> None:
    lm = quantized(tiny, "static ranges", calibration)
    check_same(lambda: resmooth(lm, "sigmoid", 1))
    check_same(lambda: requantize_activations(lm, activation_ranges="dynamic", num_time_groups=1))
    check_same(lambda: smooth_each_layer(lm, calibration, ["linear", "spline"], [1]))
    names = ["model.layers.0.mlp.down_proj"]
    check_same(
        lambda: best_starts([input_samples(tiny, calibration, names, TIMESTEPS, 16, 0)[names[0]]], TIMESTEPS, 2, 4)
    )
    check_same(lambda: BoundarySmoother("cubic", 2).weights([(0, 3), (3, 6)]))
    check_same(lambda: [vars(TimeGroupParams((0, 1), 0.1, zero)) for zero in (3.3, 3)])
    check_same(lambda: TimeGroupParams((0, 1), [0.1, 0.2], [1.5, 2.5]).scale)


def test_scores(tiny: DiffusionLM, calibration: Calibration) -> None:
    states = calibration.parts[0]
    counts = torch.arange(tiny.model.config.vocab_size)
    check_same(lambda: masked_token_scores(tiny, states, TIMESTEPS))
    check_same(lambda: [context_free_scores(states, TIMESTEPS, counts, copy) for copy in (False, True)])


def test_likelihoods_of_the_harness(tiny: DiffusionLM, tmp_path: Path) -> None:
    save_model(tiny, tmp_path / "model")
    requests = [Instance("loglikelihood", {}, ("def f", "(x):"), 0)]
    check_same(lambda: HarnessLM(str(tmp_path / "model"), mc_num=4).loglikelihood(requests, disable_tqdm=True))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layers(tiny: DiffusionLM, calibration: Calibration, tmp_path: Path, dtype: torch.dtype) -> None:
    save_quantized(quantized(tiny, "rtn", calibration), tmp_path / "quantized")

    def work() -> Tensor:
        lm = load_quantized(tmp_path / "quantized", dtype=dtype)
        compile_linears(lm.model)
        return lm.model(calibration.parts[0].ids[:2]).logits

    check_same(work)


def test_training(build_tiny: Callable[[int], DiffusionLM]) -> None:
    check_same(lambda: build_tiny(3))
    check_same(lambda: stratified_ratios(5, torch.Generator().manual_seed(0)))


def test_the_default_stays_as_it_was(tiny: DiffusionLM) -> None:
    with default_dtype(torch.bfloat16):
        assert {p.dtype for p in build_model(tiny.model.config).parameters()} == {torch.float32}
        assert torch.get_default_dtype() == torch.bfloat16

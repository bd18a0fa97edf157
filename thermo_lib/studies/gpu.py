"""``python -m thermo_lib gpu-check``: which kernels are right on this machine's GPU, and how long everything takes.

Models have random weights in the shapes of Dream 7B; times don't depend on what the weights are.
"""

import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig

from thermo_lib.diffusion.sampling import generate
from thermo_lib.diffusion.states import calibrate
from thermo_lib.evaluation.report import hardware, versions
from thermo_lib.evaluation.statistics import paired_ratio
from thermo_lib.files.text import write_json
from thermo_lib.models.lm import REFERENCE_DIR, DiffusionLM
from thermo_lib.models.tokenization import read_tokenizer
from thermo_lib.pipeline.compiled import GraphedPass, compile
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.quant.backends import set_backend
from thermo_lib.quant.gptq import gptq
from thermo_lib.quant.graphs import captured
from thermo_lib.quant.layers import TrellisLinear
from thermo_lib.quant.precision import TF32, products_in
from thermo_lib.quant.rounding import least_squares, round_to_nearest
from thermo_lib.quant.trellis import trellis
from thermo_lib.studies.full_size import PUBLISHED, random_model
from thermo_lib.studies.speed import DREAM_7B, KERNELS

_TOKENS = (1, 33, 65, 257)
_WRONG = 0.02  # error of a product, as a share of its size
_STEPS, _TEXT = 16, 256  # of a generation: denoising steps and tokens
_BEAM = 16
_SEQUENCES = 8  # of calibration
_NETWORK_STEPS = 20  # of training
_COLD = 2**27  # bytes of weights that are read in turns: more than a GPU's cache holds
_MODELS = (None, "int2 w2a16", "int2 w2a8 static", "trellis")


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        config: of the models.
        layers: number of blocks of the models.
        tokens: numbers of tokens of the inputs.
        checked: ``(in_features, out_features)`` of the linears whose products are checked.
        sizes: the same of those that are timed.
        rounds: number of counted turns of a comparison.
        seconds: that all parts may take together, each an equal share and what those before it left of theirs; after
            that it begins no other row.
    """

    config: PreTrainedConfig
    layers: int
    tokens: Sequence[int]
    checked: Sequence[tuple[int, int]]
    sizes: Sequence[tuple[int, int]]
    rounds: int
    seconds: float


_DREAM = PUBLISHED["Dream 7B"]
_CHECKED = ((31, 7), (100, 50), (768, 48), (512, 513), (3584, 512))
WHOLE = Extent(_DREAM, 28, (1, 32, 256, 1024, 2048), _CHECKED, DREAM_7B, 15, 420.0)
QUICK = Extent(_DREAM, 4, (32, 256, 1024), (_CHECKED[1], _CHECKED[4]), DREAM_7B[:1], 7, 90.0)

Rows = Iterator[dict[str, Any]]


def _backends(kernel: str) -> tuple[str, ...]:
    return ("plain", "triton", "cuda" if kernel == "trellis" else "humming")


@torch.no_grad()
def kernel_rows(device: torch.device, extent: Extent) -> Rows:
    """Products by each kernel against float32 ones of the dequantized weight; ``error`` as a share of their size."""
    for kernel, make in KERNELS.items():
        for in_features, out_features in extent.checked:
            layer = make(in_features, out_features).to(device)
            for backend in _backends(kernel):
                for tokens in _TOKENS:
                    set_backend(layer, backend)
                    x = torch.randn(tokens, in_features, device=device, dtype=torch.bfloat16)
                    found, expected = layer(x).float(), F.linear(layer.quantized_input(x).float(), layer.weight())
                    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
                    size = f"{in_features} -> {out_features}"
                    about = {"kernel": kernel, "asked": backend, "computed": layer.chosen, "linear": size}
                    yield about | {"tokens": tokens, "error": error, "right": error < _WRONG}


def linear_rows(device: torch.device, extent: Extent) -> Rows:
    """Times of single linears against the dense bfloat16 one, both as CUDA graphs, none of their weights in the cache.

    Kernels that aren't used for a size are left out, and so is plain torch on a GPU.
    """
    for in_features, out_features in extent.sizes:
        weights = torch.randn(_copies(2 * in_features * out_features, device), out_features, in_features).bfloat16()
        dense = [functools.partial(F.linear, weight=weight) for weight in weights.to(device)]
        inputs = {count: torch.randn(count, in_features).to(device, torch.bfloat16) for count in extent.tokens}
        expected = {count: together(dense, x, device) for count, x in inputs.items()}
        for kernel, make in KERNELS.items():
            layer = make(in_features, out_features).to(device)
            layers = [copy.deepcopy(layer) for _ in range(_copies(layer.packed.numel(), device))]
            for backend in _backends(kernel)[device.type == "cuda" :]:
                set_backend(nn.ModuleList(layers), backend)
                for count, x in inputs.items():
                    row = _timed(layers, x, expected[count], extent.rounds, len(dense))
                    if layers[0].chosen in (backend, f"{backend} int8"):
                        about = {"linear": f"{in_features} -> {out_features}", "kernel": kernel}
                        yield about | {"backend": layers[0].chosen, "tokens": count} | row


def _copies(size: int, device: torch.device) -> int:
    """How many weights of so many bytes are used in turns."""
    return min(64, -(-_COLD // size)) if device.type == "cuda" else 1


@torch.no_grad()
def together(products: Sequence[Callable[[Tensor], Tensor]], x: Tensor, device: torch.device) -> Callable[[], None]:
    """A function that makes all products and waits for them, on a GPU as one graph."""

    def run(x: Tensor) -> Tensor:
        return [product(x) for product in products][-1]

    made = captured(run, x) if device.type == "cuda" else run

    def call() -> None:
        made(x)
        _wait(device)

    return call


@torch.no_grad()
def _timed(
    layers: Sequence[nn.Module], x: Tensor, dense: Callable[[], None], rounds: int, count: int
) -> dict[str, Any]:
    """What ``layers`` take, as a multiple of what ``count`` dense ones do; each by itself."""
    found = paired_ratio(together(layers, x, x.device), dense, rounds)
    share = count / len(layers)
    return {
        "times_dense": share * found["ratio"],
        "ci": [share * end for end in found["ci"]],
        "dense_ms": 1e3 * found["baseline_seconds"] / count,
    }


@torch.no_grad()
def forward_rows(device: torch.device, extent: Extent) -> Rows:
    """Milliseconds of a forward pass of one sequence, called and replayed, and what they are of the dense model's."""
    dense: dict[tuple[int, bool], float] = {}
    for kernel in _MODELS:
        model = run = None  # of the last one, whose memory doesn't count
        _free(device)
        model = random_model(extent.config, extent.layers, device, kernel)
        for tokens in extent.tokens:
            ids = torch.randint(0, 1000, (1, tokens), device=device)
            for is_graph in _ways(device):
                run = GraphedPass(model, 1) if is_graph else model.hidden
                seconds = _median(functools.partial(run, ids), device, extent.rounds)
                dense.setdefault((tokens, is_graph), seconds)
                about = {"model": kernel or "dense", "graph": is_graph, "layers": extent.layers, "tokens": tokens}
                times = {"ms": 1e3 * seconds, "times_dense": seconds / dense[tokens, is_graph]}
                yield about | times | {"peak_mib": _peak(device)}


def _ways(device: torch.device) -> tuple[bool, ...]:
    """Whether a pass is replayed as a graph."""
    return (False, True) if device.type == "cuda" else (False,)


def generation_rows(device: torch.device, extent: Extent) -> Rows:
    """Seconds to fill 256 tokens in 16 steps, and the share of them that isn't spent in forward passes."""
    tokenizer = read_tokenizer(REFERENCE_DIR)
    for kernel in _MODELS:
        _free(device)
        model = random_model(extent.config, extent.layers, device, kernel)
        lm = DiffusionLM(model, tokenizer, model.config.mask_token_id, "random")
        ids = torch.full((1, _TEXT), lm.mask_token_id, device=device)
        for is_graph in _ways(device):
            if is_graph:
                compile(lm, 1)
            fill = functools.partial(generate, lm, ids, timesteps=_STEPS, temperature=0.5)
            whole = _median(fill, device, 3)
            passes = _STEPS * _median(functools.partial(_pass, lm, ids), device, 3)
            about = {"model": kernel or "dense", "graph": is_graph, "layers": extent.layers}
            yield about | {"seconds": whole, "beside": 1 - passes / whole}


@torch.no_grad()
def _pass(lm: DiffusionLM, ids: Tensor) -> Tensor:
    """A forward pass, with the head at as many positions as are open in the mean of a generation's steps."""
    return lm.model.predict(lm.model.hidden(ids)[0, : _TEXT * (_STEPS + 1) // (2 * _STEPS)])


@torch.no_grad()
def quantizer_rows(device: torch.device, extent: Extent) -> Rows:
    """Weights that each quantizer quantizes in a second."""
    for in_features, out_features in extent.sizes:
        weight = torch.randn(out_features, in_features, device=device) / 50
        x = torch.randn(2 * in_features, in_features, device=device)
        hessian = (x.T @ x).double()
        bits = torch.full((in_features,), 2)
        group = min(128, in_features)
        methods: dict[str, Callable[[], object]] = {
            "round to nearest": functools.partial(round_to_nearest, weight, 2, group),
            "least squares": functools.partial(least_squares, weight, 2, group),
            "gptq": functools.partial(gptq, weight, hessian, 2, group, 0.01, 0.001),
            "trellis, beam 16": functools.partial(trellis, weight, hessian, bits, in_features, 0.01, _BEAM),
        }
        for name, method in methods.items():
            _free(device)
            seconds = _median(method, device, int(not name.startswith("trellis")))
            about = {"quantizer": name, "linear": f"{in_features} -> {out_features}", "seconds": seconds}
            yield about | {"weights_a_second": weight.numel() / seconds, "peak_mib": _peak(device)}


def _in_type_of(read: Callable[[torch.dtype], Tensor], x: Tensor) -> Tensor:
    return read(x.dtype)


@torch.no_grad()
def decoder_rows(device: torch.device, extent: Extent) -> Rows:
    """Milliseconds to read a trellis-coded weight, by each kernel; none on a CPU."""
    for in_features, out_features in extent.sizes if device.type == "cuda" else ():
        layer = KERNELS["trellis"](in_features, out_features).to(device)
        assert isinstance(layer, TrellisLinear)
        for name, read in (("triton", layer.triton_weight), ("cuda", layer.cuda_weight)):
            often = together([functools.partial(_in_type_of, read)] * 8, layer.scale.bfloat16(), device)
            seconds = _median(often, device, extent.rounds) / 8
            yield {"decoder": name, "linear": f"{in_features} -> {out_features}", "ms": 1e3 * seconds}


def layerwise_rows(device: torch.device, extent: Extent) -> Rows:
    """Seconds and memory of quantizing a model of one block, which takes what a block of a larger one does.

    The model is there twice in float32, as it was and quantized, and products are in TF32, as the command ``quantize``
    has it. Of ``best`` the search is measured without training, and training with the fastest search; ``steps`` is how
    many were made of the phase that trains the network.
    """
    tokenizer, length = read_tokenizer(REFERENCE_DIR), min(_TEXT, max(extent.tokens))
    best = ThermoConfig.preset("best")
    fast = best.replace(weights=best.weights.model_copy(update={"beam": 1}))
    network = best.training[-1].model_copy(update={"steps": _NETWORK_STEPS})
    configs = {
        "gptq": ThermoConfig.preset("gptq"),
        "best, untrained": best.replace(training=()),
        "best, one partial row, untrained": fast.replace(training=()),
        "best, one partial row, sequential": fast.replace(training=best.training[:1]),
        "best, one partial row, network": fast.replace(training=(network,)),
    }
    for name, config in configs.items():
        model = lm = states = None  # of the last one, whose memory doesn't count
        _free(device)
        model = random_model(extent.config, 1, device).float()
        lm = DiffusionLM(model, tokenizer, model.config.mask_token_id, "random")
        ids = torch.randint(0, 1000, (_SEQUENCES, length), device=device)
        states = calibrate(lm, [(ids, None)], timesteps=config.timesteps, source="forward", progress=False)
        _wait(device)
        start = time.perf_counter()
        with products_in(TF32):
            quantize(lm, config, states)
        _wait(device)
        about = {"preset": name, "blocks": 1, "steps": _NETWORK_STEPS if config.training == (network,) else None}
        yield about | {"seconds": time.perf_counter() - start, "peak_mib": _peak(device)}


PARTS: dict[str, Callable[[torch.device, Extent], Rows]] = {
    "kernels": kernel_rows,
    "rows": linear_rows,
    "forward": forward_rows,
    "generation": generation_rows,
    "quantizers": quantizer_rows,
    "decoders": decoder_rows,
    "layerwise": layerwise_rows,
}


def gpu_check(
    device: torch.device,
    extent: Extent,
    output: Path,
    *,
    found: dict[str, Any] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Run every part, one that fails included, and write what is known after each.

    Args:
        device: where to measure.
        extent: how much.
        output: JSON file.
        found: takes what is known, also where it can't be written.
        progress: show a bar.

    Returns:
        What is written: ``card``, ``versions``, the rows of each of ``PARTS``, and ``failed``: part to the reason.

    Raises:
        OSError: no space left, or no right to write.
    """
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware()["processor"]
    found = {} if found is None else found
    found |= {"card": card, "versions": versions(), "failed": {}}
    start, bar = time.perf_counter(), tqdm(PARTS.items(), desc="gpu-check", disable=not progress, unit="part")
    for number, (name, part) in enumerate(bar):
        found[name], share = [], (number + 1) / len(PARTS) * extent.seconds
        try:
            for row in part(device, extent):
                found[name].append(row)
                if time.perf_counter() - start > share:
                    found["failed"][name] = f"no more time: {len(found[name])} rows are here"
                    break
        except Exception as error:  # a driver's or a compiler's: the other parts go on
            found["failed"][name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.300}"
        _free(device)
        write_json(output, found)
    return found


def _median(function: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median seconds of a call, after one that warms up; of none, that one's."""
    seconds = []
    for turn in range(rounds + 1):
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        if turn or not rounds:
            seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float | None:
    """MiB of GPU memory at most since ``_free``; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None

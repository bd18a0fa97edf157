"""What a published model costs at its full size: checkpoints and models in its shapes, memory, times of its linears.

A checkpoint of random weights has the sizes, memory and times of the published one; its answers are noise.
"""

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig

from thermo_lib.evaluation.statistics import paired_ratio
from thermo_lib.files.folders import write_folder
from thermo_lib.files.tensors import INDEX_NAME
from thermo_lib.files.text import write_json
from thermo_lib.models.architectures import MaskPredictor, skeleton
from thermo_lib.models.families import config_json, tensor_name
from thermo_lib.models.lm import REFERENCE_DIR
from thermo_lib.models.published import DreamConfig, LLaDAConfig
from thermo_lib.models.tokenization import read_tokenizer, save_tokenizer
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import QuantizedLM, linear_names
from thermo_lib.pipeline.parts import GPTQ
from thermo_lib.quant.backends import set_backend
from thermo_lib.quant.gptq import gptq
from thermo_lib.quant.layers import QuantizedLinear
from thermo_lib.quant.planes import compile_linears
from thermo_lib.studies.speed import KERNELS

# The sizes in config.json of Dream-org/Dream-v0-Base-7B and -Instruct-7B, and of GSAI-ML/LLaDA-8B-Base and -Instruct.
PUBLISHED: dict[str, PreTrainedConfig] = {
    "Dream 7B": DreamConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        mask_token_id=151666,
    ),
    "LLaDA 8B": LLaDAConfig(
        vocab_size=126464,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        mask_token_id=126336,
    ),
}
_SHARD_BYTES = 2**30
_ROWS = 2**24  # random numbers that are drawn at a time


def weight_counts(config: PreTrainedConfig) -> dict[str, int]:
    """How many weights are in the ``linears`` of the blocks, in ``embeddings`` and ``head``, and in the ``rest``."""
    model = skeleton(config)
    linears = {f"{name}.weight" for name in linear_names(model)}
    parts = {"model.embed_tokens.weight": "embeddings", "lm_head.weight": "head"}
    counts = dict.fromkeys(["linears", "embeddings", "head", "rest"], 0)
    for name, parameter in model.named_parameters():
        counts["linears" if name in linears else parts.get(name, "rest")] += parameter.numel()
    return counts


def stored_sizes(config: PreTrainedConfig, thermo: ThermoConfig) -> list[dict[str, Any]]:
    """Size in bytes of each part of ``weight_counts``, and of ``all``, before and after data-free quantization.

    Returns:
        For each ``part`` its ``weights``, ``bfloat16`` and ``quantized`` bytes.
    """
    parameters = 32 / (thermo.group_size or config.hidden_size)  # bits of scale and zero point for each weight
    bits = dict.fromkeys(["embeddings", "head"], 16 if thermo.embedding_bits == 16 else 8 + parameters)
    bits |= {"linears": thermo.weights.bits + parameters, "rest": 16}
    rows = [
        {"part": part, "weights": count, "bfloat16": 2 * count, "quantized": count * bits[part] / 8}
        for part, count in weight_counts(config).items()
    ]
    return [*rows, {"part": "all", **{key: sum(row[key] for row in rows) for key in list(rows[0])[1:]}}]


def random_model(
    config: PreTrainedConfig, layers: int, device: torch.device | str = "cpu", kernel: str | None = None
) -> MaskPredictor:
    """A model of random weights in bfloat16.

    Args:
        config: its sizes.
        layers: number of its blocks.
        device: where.
        kernel: a name of ``speed.KERNELS``; its linears inside the blocks have random codes, those of one size the same
            ones. None for dense ones.
    """
    settings = {**config.to_dict(), "num_hidden_layers": layers}
    model = skeleton(type(config)(**{k: v for k, v in settings.items() if k != "layer_types"}))
    names = set(linear_names(model))
    made: dict[tuple[int, int], QuantizedLinear] = {}
    for name, module in list(model.named_modules()):
        if name in names and isinstance(module, nn.Linear) and kernel is not None:
            size = module.in_features, module.out_features
            if size not in made:
                made[size] = KERNELS[kernel](*size).to(device)
            layer = copy.deepcopy(made[size])
            layer.bias = None if module.bias is None else torch.zeros(module.out_features, dtype=torch.bfloat16)
            model.set_submodule(name, layer.to(device))
    for name, parameter in list(model.named_parameters()):
        tensor = torch.empty(parameter.shape, device=device, dtype=torch.bfloat16)
        owner, _, key = name.rpartition(".")
        filled = tensor.fill_(1) if tensor.ndim == 1 and key == "weight" else tensor.normal_(std=0.02)
        setattr(model.get_submodule(owner), key, nn.Parameter(filled, requires_grad=False))
    rotary = model.rotary
    assert rotary is not None  # published models don't embed positions
    model.set_submodule("model.rotary_emb", type(rotary)(config=model.config).to(device))
    return model.eval()


def random_checkpoint(folder: str | Path, config: PreTrainedConfig, *, seed: int = 0, progress: bool = False) -> None:
    """Write a checkpoint of random bfloat16 weights in the published layout, in shards of about a GiB.

    Matrices and biases are normal with standard deviation 0.02, norms are 1; the tokenizer is the reference model's.

    Args:
        folder: to write; an earlier one stays as it was until the new one is complete.
        config: the model's sizes, e.g. of ``PUBLISHED``.
        seed: equal seeds give equal weights.
        progress: show a bar.
    """
    expected = skeleton(config).state_dict()
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: torch.Size) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.bfloat16)
        weight = torch.empty(shape, dtype=torch.bfloat16)
        for part in weight.view(-1).split(_ROWS):
            part.copy_(torch.randn(part.shape, generator=generator).mul_(0.02))
        return weight

    def write(target: Path) -> None:
        weight_map: dict[str, str] = {}
        shard: dict[str, Tensor] = {}

        def finish() -> None:
            name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(shard, target / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, name))
            shard.clear()

        for name, tensor in tqdm(expected.items(), desc="random weights", disable=not progress, leave=False):
            if shard and sum(t.nbytes for t in shard.values()) + 2 * tensor.numel() > _SHARD_BYTES:
                finish()
            shard[tensor_name(config, name)] = draw(name, tensor.shape)
        finish()
        write_json(target / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})
        (target / "config.json").write_text(config_json(config, torch_dtype="bfloat16"), encoding="utf-8")
        save_tokenizer(read_tokenizer(REFERENCE_DIR), None, target)

    write_folder(Path(folder), write)


@dataclass
class Cost:
    """What a piece of work took: seconds of wall clock, and MiB of memory that were resident at most and at the end."""

    seconds: float = 0.0
    peak_mib: float = 0.0
    resident_mib: float = 0.0


@contextmanager
def cost() -> Iterator[Cost]:
    """Measure what is done inside; the memory is that of the whole process (Linux)."""
    found = Cost()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    start = time.perf_counter()
    yield found
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    found.seconds = time.perf_counter() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found.peak_mib, found.resident_mib = (int(status[key].split()[0]) / 1024 for key in ("VmHWM", "VmRSS"))


def distinct_linears(lm: QuantizedLM) -> dict[str, tuple[QuantizedLinear, int]]:
    """One linear of each shape in the blocks: its size in words, itself, and how many there are."""
    named = {f"{layer.in_features} -> {layer.out_features}": layer for layer in lm.quantized_layers().values()}
    counts = Counter(f"{layer.in_features} -> {layer.out_features}" for layer in lm.quantized_layers().values())
    return {name: (layer, counts[name]) for name, layer in named.items()}


@torch.no_grad()
def linear_ratios(
    lm: QuantizedLM, *, tokens: int = 256, rounds: int = 10, progress: bool = False
) -> list[dict[str, Any]]:
    """Time every shape of linear from packed weights against the dense bfloat16 product, in turns.

    Args:
        lm: a quantized model in bfloat16.
        tokens: of the input.
        rounds: counted turns.
        progress: show bars.

    Returns:
        For each shape ``size``, ``count``, ``dense_ms``, and the ratios ``eager`` and ``compiled`` (medians) with their
        95 % intervals ``..._ci``; the shape's own linears are left as they were.
    """
    rows = []
    for size, (layer, count) in distinct_linears(lm).items():
        device = layer.packed.device
        x = torch.randn(tokens, layer.in_features, dtype=torch.bfloat16, device=device)
        dense = layer.weight().to(torch.bfloat16)
        row: dict[str, Any] = {"size": size, "count": count}
        asked = layer.backend
        for kind in ("eager", "compiled"):
            if kind == "compiled":
                compile_linears(layer)
            else:
                set_backend(layer, "plain")
            found = paired_ratio(
                partial(_finished, layer, x),
                partial(_finished, F.linear, x, dense),
                rounds,
                progress=f"{size} {kind}" if progress else None,
            )
            row |= {kind: found["ratio"], f"{kind}_ci": found["ci"], "dense_ms": 1000 * found["baseline_seconds"]}
        set_backend(layer, asked)
        rows.append(row)
    return rows


def _finished(function: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """What a function returns, once a GPU has computed it."""
    found = function(*given)
    if found.is_cuda:
        torch.cuda.synchronize()
    return found


def gptq_costs(lm: QuantizedLM, *, tokens: int = 4096, progress: bool = False) -> list[dict[str, Any]]:
    """What GPTQ costs for one linear of each shape, with weights as they are and a Hessian of random inputs.

    Args:
        lm: a quantized model; its dequantized weights are quantized again.
        tokens: of the inputs.
        progress: show a bar.

    Returns:
        For each shape ``size``, ``count``, ``seconds`` (Hessian and quantization) and ``peak_mib``.
    """
    rows = []
    for size, (layer, count) in tqdm(distinct_linears(lm).items(), desc="gptq", disable=not progress, leave=False):
        weight = layer.weight().cpu()
        x = torch.randn(tokens, layer.in_features, generator=torch.Generator().manual_seed(0))
        with cost() as found:
            hessian = (x.T @ x).double()
            gptq(weight, hessian, layer.bits, layer.group_size, GPTQ().damping, GPTQ().ridge)
        rows.append({"size": size, "count": count, "seconds": found.seconds, "peak_mib": found.peak_mib})
        del hessian
    return rows

"""Adapters to other projects' 2-bit weight quantizers; each runs that project's own code.

Only the peers' environment has these packages, so every function imports the package that it needs. An adapter takes
the full-precision model, its calibration states and options, and returns a ``Layer`` for each linear inside the
blocks, by its name, and for each other parameter that it changed. No calibrated method sees a causal mask: the model
is run by the project itself, on its own states.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from thermo_lib.data.corpus import SEQUENCE_LENGTH
from thermo_lib.data.puzzles import PuzzlePrompts
from thermo_lib.diffusion.inputs import run_states, shared_inputs
from thermo_lib.diffusion.prompts import EmptyTexts, Prompts
from thermo_lib.diffusion.states import Calibration
from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline import parts
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import linear_names, names_by_block, part_as
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.weights import input_hessians
from thermo_lib.quant.gptq import gptq
from thermo_lib.quant.rounding import round_to_nearest
from thermo_lib.studies.peers import ggml
from thermo_lib.time_aware.groups import TimeGroups


@dataclass(frozen=True)
class Layer:
    """A quantized linear layer, or an unquantized parameter that a method trains.

    Attributes:
        weight: what the stored tensors stand for, float32 ``(out_features, in_features)``; the parameter.
        bits: of everything that is stored in the place of the weight; None for a parameter that is stored as before.
    """

    weight: Tensor
    bits: int | None


class Layers(dict[str, Layer]):
    """Layers by name.

    Attributes:
        losses: what was trained to the loss of each step, path KL in nats per sequence; empty for other projects.
    """

    losses: Mapping[str, list[float]] = MappingProxyType({})


def stored_bits(*tensors: Tensor, bits: int | None = None) -> int:
    """Bits of some tensors as they are stored.

    Args:
        tensors: of any dtype.
        bits: of an element, where a format packs them tighter than the tensor at hand; by default the dtype's.
    """
    return sum(t.numel() * (t.element_size() * 8 if bits is None else bits) for t in tensors)


def _weights(lm: DiffusionLM) -> dict[str, Tensor]:
    return {name: part_as(nn.Linear, lm.model, name).weight.detach() for name in linear_names(lm.model)}


def thermo(lm: DiffusionLM, calibration: Calibration, **fields: Any) -> Layers:
    """This project's quantizers; ``fields`` of ``ThermoConfig``. Fresh states are those of code and new puzzles."""
    config = ThermoConfig(**fields)
    prompts: list[Prompts] = [EmptyTexts(SEQUENCE_LENGTH, lm.mask_token_id), PuzzlePrompts(lm.tokenizer)]
    quantized = quantize(lm, config, calibration, prompts=prompts)
    before, after = lm.model.state_dict(), quantized.model.state_dict()
    trained = [name for name, tensor in before.items() if name in after and not tensor.equal(after[name])]
    layers = Layers({name: Layer(after[name], None) for name in trained})
    for name, layer in quantized.quantized_layers().items():
        layers[name] = Layer(layer.weight(), quantized.stored_bits(name))
    layers.losses = quantized.losses
    return layers


def hqq(lm: DiffusionLM, calibration: Calibration, *, group_size: int, axis: int) -> Layers:
    """HQQ (half-quadratic quantization, no data), scales and zero points in float16 as its layers keep them."""
    from hqq.core.quantize import Quantizer

    layers = Layers()
    for name, weight in _weights(lm).items():
        codes, meta = Quantizer.quantize(weight, nbits=2, group_size=group_size, axis=axis, device="cpu")
        meta["scale"], meta["zero"] = meta["scale"].half(), meta["zero"].half()
        bits = stored_bits(codes, meta["scale"], meta["zero"])
        meta |= {"scale": meta["scale"].float(), "zero": meta["zero"].float(), "compute_dtype": torch.float32}
        layers[name] = Layer(Quantizer.dequantize(codes, meta), bits)
    return layers


def quanto(lm: DiffusionLM, calibration: Calibration, *, optimizer: str | None = None) -> Layers:
    """optimum-quanto's ``qint2`` in its model-level API, on float16 weights; ``optimizer`` as its class is called."""
    from optimum import quanto as library

    # The head stays as it is; names that match none of the blocks' linears are left out.
    model = copy.deepcopy(lm.model).half()
    chosen = getattr(library, optimizer)() if optimizer else None
    library.quantize(model, weights=library.qint2, include=linear_names(model), optimizer=chosen)
    library.freeze(model)
    layers = Layers()
    for name in _weights(lm):
        weight: Any = model.get_submodule(name).weight
        layers[name] = Layer(weight.dequantize().float(), stored_bits(weight._data._data, weight._scale, weight._shift))
    return layers


def torchao(lm: DiffusionLM, calibration: Calibration, *, group_size: int | None, asymmetric: bool) -> Layers:
    """torchao's ``IntxWeightOnlyConfig`` with ``torch.int2``; ``group_size`` None for one scale a row.

    torchao keeps each 2-bit code in an int8 for its back ends to pack; here it counts 2 bits. Zero points are int8,
    and count only where the mapping is asymmetric.
    """
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
    from torchao.quantization.quant_primitives import MappingType

    model = copy.deepcopy(lm.model)
    names = set(linear_names(model))
    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int2,  # type: ignore[attr-defined]  # torch has it, its stubs don't
        granularity=PerGroup(group_size) if group_size else PerAxis(0),
        mapping_type=MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC,
        scale_dtype=torch.float16,
    )
    quantize_(model, config, filter_fn=lambda module, name: name in names)
    layers = Layers()
    for name in names:
        weight: Any = model.get_submodule(name).weight
        bits = stored_bits(weight.qdata, bits=2) + stored_bits(weight.scale)
        bits += stored_bits(weight.zero_point) if asymmetric else 0
        layers[name] = Layer(weight.dequantize().float(), bits)
    return layers


@contextmanager
def _first_blocks(lm: DiffusionLM, count: int) -> Iterator[None]:
    """Let the model end after its first blocks, when what comes later isn't needed."""
    name, every = lm.model.parts.blocks, lm.model.blocks
    lm.model.set_submodule(name, every[:count])
    try:
        yield
    finally:
        lm.model.set_submodule(name, every)


def gptqmodel(lm: DiffusionLM, calibration: Calibration, **options: Any) -> Layers:
    """GPTQModel's GPTQ and its packed layer; ``options`` of its ``QuantizeConfig``.

    As in its model-level API with ``true_sequential``: linears are quantized in the order they run in, those with the
    same input together, on inputs that come from everything before them already quantized and packed.
    """
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    lm = DiffusionLM(copy.deepcopy(lm.model), lm.tokenizer, lm.mask_token_id, lm.name)
    layers = Layers()
    for names in shared_inputs(lm, linear_names(lm.model)):
        configs = [QuantizeConfig(bits=2, offload_to_disk=False, **options) for _ in names]
        tasks = [GPTQ(lm.model.get_submodule(name), config) for name, config in zip(names, configs, strict=True)]

        def accumulate(name: str, x: Tensor, is_masked: Tensor, timestep: int, tasks: list[Any] = tasks) -> None:
            for task in tasks:
                task.add_batch(x[None], None)

        block = next(iter(names_by_block(names)))
        with _first_blocks(lm, int(block.rpartition(".")[2]) + 1):
            run_states(lm, calibration, names[:1], accumulate)
        for name, config, task in zip(names, configs, tasks, strict=True):
            linear = part_as(nn.Linear, lm.model, name)
            task.quantizer.configure(perchannel=True)
            quantized, scale, zero, group_index, *_ = task.quantize()
            linear.weight.copy_(quantized)
            packed = TorchLinear(
                bits=2,
                group_size=config.group_size,
                sym=config.sym,
                desc_act=config.desc_act,
                in_features=linear.in_features,
                out_features=linear.out_features,
                bias=False,
            ).eval()
            bare = nn.Linear(linear.in_features, linear.out_features, bias=False).requires_grad_(False)
            bare.weight.copy_(quantized)
            packed.pack_original(bare, scale, zero, group_index)
            bits = stored_bits(packed.qweight, packed.qzeros, packed.scales)
            # Group numbers are stored for every column; they say nothing where groups are neighbours.
            if config.desc_act:
                bits += stored_bits(packed.g_idx)
            packed.scales = packed.scales.float()
            layers[name] = Layer(packed.dequantize_weight().T.float().contiguous(), bits)
            linear.weight.copy_(layers[name].weight)
    return layers


class _Padded(MaskPredictor):
    """Takes sequences that are padded on the right with an id above the vocabulary, whatever mask comes along.

    AutoRound masks the last token of every sample, and all trailing repeats, as if they were padding; a masked
    diffusion state ends with repeated mask tokens that are seen and predicted.
    """

    def forward(  # type: ignore[override]  # AutoRound gives it nothing else
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        is_token = input_ids < self.config.vocab_size
        return super().forward(input_ids.masked_fill(~is_token, 0), is_token)


def autoround(lm: DiffusionLM, calibration: Calibration, *, scheme: str, iters: int, alg_ext: bool = False) -> Layers:
    """AutoRound's model-level tuner in float32, on all calibration states; its recipe's names for the options."""
    from auto_round import AutoRound
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

    model = copy.deepcopy(lm.model)
    model.__class__ = type("PaddedModel", (_Padded, type(model)), {})
    padding = model.config.vocab_size
    longest = max(part.ids.shape[1] for part in calibration.parts)
    ids = torch.cat([F.pad(part.ids, (0, longest - part.ids.shape[1]), value=padding) for part in calibration.parts])
    tuner = AutoRound(
        model,
        tokenizer=SimpleNamespace(pad_token_id=padding, pad_token="<pad>"),
        scheme=scheme,
        dataset=[{"input_ids": rows} for rows in ids.split(8)],
        seqlen=longest,
        nsamples=len(ids),
        device_map="cpu",
        enable_torch_compile=False,
        amp=False,
        alg_configs=SignRoundConfig(iters=iters, enable_alg_ext=alg_ext),
    )
    tuned, _ = tuner.quantize()
    layers = Layers()
    for name in _weights(lm):
        layer: Any = tuned.get_submodule(name)
        # Its packed formats hold 2-bit codes, float16 scales and a 2-bit zero point for each scale.
        bits = stored_bits(layer.weight, bits=2) + stored_bits(layer.scale, bits=16) + stored_bits(layer.scale, bits=2)
        layers[name] = Layer(layer.weight.detach().float(), bits)
    return layers


def importance(lm: DiffusionLM, calibration: Calibration) -> dict[str, Tensor]:
    """llama.cpp's importance matrix: the mean square of each input of every linear, float32 ``(in_features,)``."""
    names = linear_names(lm.model)
    sums = {name: torch.zeros(part_as(nn.Linear, lm.model, name).in_features, dtype=torch.float64) for name in names}
    tokens = dict.fromkeys(names, 0)

    def accumulate(name: str, x: Tensor, is_masked: Tensor, timestep: int) -> None:
        sums[name] += x.double().square().sum(0)
        tokens[name] += len(x)

    run_states(lm, calibration, names, accumulate)
    return {name: (sums[name] / tokens[name]).float() for name in names}


# llama.cpp's Q2_K mixture stores these as Q3_K (llama-quant.cpp, LLAMA_FTYPE_MOSTLY_Q2_K, fewer than 4 query heads to
# a key head).
_Q3_IN_MIXTURE = ("v_proj", "o_proj", "down_proj")


def llamacpp(
    lm: DiffusionLM, calibration: Calibration, *, type: str, imatrix: bool = False, mixture: bool = False
) -> Layers:
    """llama.cpp's block formats through its own library.

    Args:
        lm, calibration: as for every method.
        type: ``q2_K``, ``iq2_xxs``, ``iq2_xs`` or ``iq2_s``.
        imatrix: weigh columns by their inputs' mean square.
        mixture: Q3_K for the layers that the file type Q2_K gives more bits to.
    """
    weighting = importance(lm, calibration) if imatrix else {}
    layers = Layers()
    for name, weight in _weights(lm).items():
        chosen = "q3_K" if mixture and name.endswith(_Q3_IN_MIXTURE) else type
        layers[name] = Layer(*ggml.round_trip(weight, chosen, weighting.get(name)))
    return layers


def compare_gptq(lm: DiffusionLM, calibration: Calibration) -> list[dict[str, Any]]:
    """Output errors of this project's GPTQ and GPTQModel's on the same Hessians, layer by layer.

    Both with asymmetric groups of 128, natural column order and the same damping, on the full-precision model's
    inputs. ``gptqmodel mse`` also searches its groups' ranges, as this project's does.

    Returns:
        A row for each layer: ``layer`` and the squared output error of each, as a share of the output's square.
    """
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    ours = parts.GPTQ()
    damping, ridge, group_size = ours.damping, ours.ridge, ours.group_size
    assert group_size is not None  # 128, see above
    names = linear_names(lm.model)
    hessians = input_hessians(lm, calibration, names, TimeGroups(calibration.timesteps, 1))

    def theirs(weight: Tensor, factor: Tensor, mse: float) -> Tensor:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
        linear.weight.copy_(weight)
        config = QuantizeConfig(
            bits=2,
            group_size=group_size,
            sym=False,
            desc_act=False,
            act_group_aware=False,
            damp_percent=damping,
            mse=mse,
            offload_to_disk=False,
        )
        task = GPTQ(linear, config)
        task.quantizer.configure(perchannel=True)
        task.add_batch(factor[None], None)
        return task.quantize()[0]

    rows = []
    for name, weight in _weights(lm).items():
        hessian = hessians[name][0]
        values, vectors = torch.linalg.eigh(hessian)
        factor = (vectors * values.clamp(min=0).sqrt()).T.float()  # factor^T factor = hessian: as good as the inputs
        found = {
            "round-to-nearest": round_to_nearest(weight, 2, group_size).dequantize(),
            "thermo_lib": gptq(weight, hessian, 2, group_size, damping, ridge).dequantize(),
            "gptqmodel": theirs(weight, factor, 0.0),
            "gptqmodel mse": theirs(weight, factor, 2.4),
        }
        size = torch.einsum("oi,ij,oj->", weight.double(), hessian, weight.double())
        errors = {key: (value - weight).double() for key, value in found.items()}
        rows.append(
            {"layer": name} | {k: float(torch.einsum("oi,ij,oj->", e, hessian, e) / size) for k, e in errors.items()}
        )
    return rows


ADAPTERS: dict[str, Callable[..., Layers]] = {
    f.__name__: f for f in (thermo, hqq, quanto, torchao, gptqmodel, autoround, llamacpp)
}

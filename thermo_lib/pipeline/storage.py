"""The folder of a quantized model: what is stored, and how it is saved and loaded."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from thermo_lib.files.folders import write_folder
from thermo_lib.files.reading import read_object
from thermo_lib.files.snapshots import named
from thermo_lib.files.tensors import (
    WEIGHTS_NAME,
    cast,
    check_dtype,
    check_full_precision,
    check_shapes,
    open_safetensors,
    read_headers,
    read_tensors,
)
from thermo_lib.models.architectures import MaskPredictor, skeleton
from thermo_lib.models.families import config_json, read_config, stored_names, tensor_name, used
from thermo_lib.models.lm import DiffusionLM, fill, load_model, model_folder, take_expected
from thermo_lib.models.tokenization import read_carried, read_chat_template, read_tokenizer, save_tokenizer
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import (
    QuantizedLM,
    coded_tables,
    head_bias,
    install_activations,
    install_layer,
    install_table,
    install_time_norms,
    linear_names,
    norm_names,
    part_as,
    range_table,
    tables,
    weight_table,
)
from thermo_lib.pipeline.parts import Static
from thermo_lib.pipeline.quantizers import expected_codes, expected_parameters, quantizer_of
from thermo_lib.quant.layers import QuantizedLinear
from thermo_lib.quant.time_norms import time_norms
from thermo_lib.time_aware.groups import TimeGroupParams


def _group_tensors(kind: str, layers: dict[str, list[TimeGroupParams]], config: ThermoConfig) -> dict[str, Tensor]:
    return {
        f"{name}.{kind}_{key}": torch.stack([getattr(p, key) for p in params]).contiguous()
        for name, params in layers.items()
        for key in _parameter_names(kind, config)
    }


def _parameter_names(kind: str, config: ThermoConfig) -> tuple[str, ...]:
    """The parameters of weights or activations that are stored."""
    return quantizer_of(config).parameters if kind == "weight" else ("scale", "zero_point")


def stored_tensors(lm: QuantizedLM, name: str) -> dict[str, Tensor]:
    """What is stored of a quantized layer's weights: codes, and parameters of the time groups before smoothing."""
    _check_held(lm, name)
    return weight_tensors(lm, name)


def weight_tensors(lm: QuantizedLM, name: str) -> dict[str, Tensor]:
    """``stored_tensors`` of a layer that isn't checked, as before its activations are quantized."""
    layer = part_as(QuantizedLinear, lm.model, name)
    codes = named(name, {key: getattr(layer, key) for key in layer.STORED})
    return codes | _group_tensors("weight", {name: lm.weight_params[name]}, lm.config)


def _check_held(lm: QuantizedLM, name: str) -> None:
    """Raise ValueError if a layer computes with other parameters than those that would be stored of it.

    Layers hold smoothed rows, the model what they come from; ``load_state_dict`` changes only the first.
    """
    layer = part_as(QuantizedLinear, lm.model, name)
    tables: dict[str, tuple[nn.Module | None, tuple[Tensor, Tensor, Tensor]]] = {}
    tables["weights"] = layer, weight_table(lm.weight_params[name], lm.config)
    if lm.config.has_static_ranges:
        tables["activations"] = layer.input_quantizer, range_table(lm.activation_params[name], lm.config)
    for kind, (held, expected) in tables.items():
        for key, tensor in zip(("scale", "zero_point", "row_of_step"), expected, strict=True):
            if not getattr(held, key).equal(tensor.to(layer.packed.device)):
                raise ValueError(
                    f"{name}: found {key} of other {kind} than this model was quantized to, as after "
                    "load_state_dict; save the model that they come from instead"
                )


def model_tensors(lm: QuantizedLM) -> dict[str, Tensor]:
    """All that is stored of a quantized model, by the library's names.

    Raises:
        ValueError: a layer or norm that computes with other parameters than those that would be stored of it.
    """
    layers = lm.quantized_layers()
    for name, norm in time_norms(lm.model).items():
        if not norm.is_current:
            raise ValueError(f"{name}: found rows of other parameters than time_weight and time_bias; call its refresh")
    coded = tables(lm.model) if lm.config.embedding_bits < 16 else ()
    inside = {f"{n}.{key}" for n in [*layers, *coded] for key in lm.model.get_submodule(n).state_dict()}
    tensors = {k: v.contiguous() for k, v in lm.model.state_dict().items() if k not in inside}
    if lm.model.config.tie_word_embeddings:
        for name in lm.model.parts.tied:
            tensors.pop(name, None)
    for name, layer in layers.items():
        tensors |= stored_tensors(lm, name)
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
    for name in coded:
        if (bias := getattr(lm.model.get_submodule(name), "bias", None)) is not None:
            tensors.setdefault(head_bias(lm.model), bias)
    for name in coded_tables(lm.model, lm.config):
        table = lm.model.get_submodule(name)
        buffers = {"packed": "packed", "weight_scale": "scale", "weight_zero_point": "zero_point"}
        tensors |= named(name, {key: table.get_buffer(buffer) for key, buffer in buffers.items()})
    return tensors | _group_tensors("activation", lm.activation_params, lm.config)


def quantized_config_json(config: PreTrainedConfig, thermo: ThermoConfig, dtype: torch.dtype) -> str:
    """``config.json`` of a quantized folder.

    Args:
        config: of the model.
        thermo: how it was quantized.
        dtype: of its norms, in which ``from_pretrained`` computes unless it is told another; the first tensor of the
            file, where it would look otherwise, may be a scale.
    """
    return config_json(config, torch_dtype=str(dtype).removeprefix("torch."), quantization_config=thermo.to_dict())


def save_quantized(lm: QuantizedLM, folder: str | Path) -> None:
    """Write a quantized model: packed codes, time-group parameters before smoothing, config and tokenizer.

    An earlier folder of that name stays as it was until the new one is complete.

    Raises:
        ValueError: what ``output_folder`` raises, or a layer that computes with other parameters than would be stored.
        OSError: no space left, or no right to write.
    """

    def write(target: Path) -> None:
        tensors = model_tensors(lm)
        stored = {tensor_name(lm.model.config, name): tensor.cpu().clone() for name, tensor in tensors.items()}
        save_file(stored, target / WEIGHTS_NAME, metadata={"format": "pt"})
        text = quantized_config_json(lm.model.config, lm.config, lm.model.norm.weight.dtype)
        (target / "config.json").write_text(text, encoding="utf-8")
        save_tokenizer(lm.tokenizer, lm.chat_template, target, lm.carried)

    write_folder(Path(folder), write)


def load_quantized(path: str | Path, *, dtype: torch.dtype = torch.float32, progress: bool = False) -> QuantizedLM:
    """Load what ``save_quantized`` or ``quantize_checkpoint`` wrote, computing bit for bit what was saved.

    Args:
        path: the folder.
        dtype: of what isn't quantized, and of the computation.
        progress: show bars.

    Raises:
        ValueError: not a folder of a quantized model, or damaged; the message says where and why.
    """
    check_dtype(dtype)
    folder = model_folder(str(path))
    config = read_config(folder)
    tokenizer = read_tokenizer(folder, config.vocab_size)
    thermo = read_quantization(folder)
    found = read_tensors(folder, progress=progress)
    model = skeleton(config)
    lm = QuantizedLM(
        model,
        tokenizer,
        config.mask_token_id,
        str(path),
        thermo,
        chat_template=read_chat_template(folder),
        carried=read_carried(folder),
    )
    tensors = take_expected(found, config, expected_tensors(model, thermo, found, folder), folder)
    check_types({name: tensor.dtype for name, tensor in found.items()}, folder)
    uncoded = {name: tensor for name, tensor in tensors.items() if stored_type(name) is None}
    cast(uncoded, dtype, partial(tensor_name, config), folder, progress=progress)
    tensors |= uncoded
    install_time_norms(model, thermo)
    install(lm, tensors, folder, dtype)
    fill(model, tensors, dtype)
    return lm


def read_quantization(folder: Path) -> ThermoConfig:
    """How a quantized folder's model was quantized; raises ValueError for another method or a wrong setting."""
    try:
        return ThermoConfig.from_dict(read_object(folder / "config.json").get("quantization_config"))
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from error


def is_quantized(name: str) -> bool:
    """Whether a model is quantized, by its ``config.json``; without that file it isn't."""
    path = model_folder(name) / "config.json"
    return path.is_file() and read_object(path).get("quantization_config") is not None


def load_any(
    name: str,
    *,
    family: str | None = None,
    block_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> DiffusionLM:
    """A model, full precision or quantized, which says what it is; raises what the two functions for them raise."""
    if is_quantized(name):
        return load_quantized(name, dtype=dtype, progress=progress)
    return load_model(name, family=family, block_length=block_length, dtype=dtype, progress=progress)


def expected_tensors(
    model: MaskPredictor, thermo: ThermoConfig, found: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """What is stored of a quantized model.

    Args:
        model: the model, not quantized.
        thermo: how it was quantized.
        found: stored tensors by the checkpoint's names; of a trellis the sizes depend on ``packed_column_bits``.
        folder: for errors.

    Returns:
        The library's name to a tensor of the right shape, on the meta device.
    """
    names, with_codes = linear_names(model), coded_tables(model, thermo)
    coded = {*names, *(tables(model) if with_codes else ())}
    expected = {k: v for k, v in model.state_dict().items() if k.removesuffix(".weight") not in coded}
    if thermo.time_norms is not None:
        for name in norm_names(model):
            for key in ("weight", "bias"):
                if (one := expected.pop(f"{name}.{key}", None)) is not None:
                    expected[f"{name}.time_{key}"] = one.expand(thermo.time_norms.count, -1)
    for name in with_codes:
        rows, columns = model.config.vocab_size, model.config.hidden_size
        parameters = expected_parameters(1, rows, columns, thermo.group_size, ("scale", "zero_point"))
        expected |= named(name, expected_codes(rows, columns, thermo.embedding_bits) | parameters)
    for name in names:
        linear = part_as(nn.Linear, model, name)
        expected |= _expected_weight(name, linear, model.config, thermo, found, folder)
        if linear.bias is not None:
            expected[f"{name}.bias"] = linear.bias
        if isinstance(how := thermo.activations, Static):
            channel_groups = -(-linear.in_features // (how.group_size or linear.in_features))
            shape = (thermo.num_time_groups, 1 + how.by_token_state, channel_groups)
            per_group = torch.empty(shape, device="meta", dtype=torch.float32)
            expected |= {f"{name}.activation_scale": per_group, f"{name}.activation_zero_point": per_group}
    return expected


def check_stored(model: MaskPredictor, thermo: ThermoConfig, paths: Sequence[Path], folder: Path) -> dict[str, Tensor]:
    """What is stored of a quantized model, by the library's names, once names, shapes and types in files are right.

    Args:
        model: the model, not quantized.
        thermo: how it was quantized.
        paths: the files.
        folder: for errors.

    Raises:
        ValueError: what ``read_headers``, ``check_shapes`` and ``check_types`` raise.
    """
    found = read_headers(paths)
    column_bits: dict[str, Tensor] = {}
    for path in paths:
        with open_safetensors(path) as file:
            keys = [key for key in file.keys() if key.endswith("packed_column_bits")]
            column_bits |= {key: file.get_tensor(key) for key in keys}
    expected = expected_tensors(model, thermo, column_bits, folder)
    found = used(found, model.config)
    names = stored_names(found, model.config, expected)
    shapes = {name: tensor.shape for name, tensor in found.items()}
    check_shapes(shapes, {stored: expected[name] for stored, name in names.items()}, folder)
    check_types({name: tensor.dtype for name, tensor in found.items()}, folder)
    return expected


def _expected_weight(
    name: str,
    linear: nn.Linear,
    config: PreTrainedConfig,
    thermo: ThermoConfig,
    found: Mapping[str, Tensor],
    folder: Path,
) -> dict[str, Tensor]:
    """What is stored of a linear's weight; arguments as for ``expected_tensors``."""

    def read(key: str) -> Tensor | None:
        stored = tensor_name(config, f"{name}.{key}")
        if stored in found:
            check_types({stored: found[stored].dtype}, folder)
        return found.get(stored)

    try:
        return named(name, quantizer_of(thermo).expected(linear.out_features, linear.in_features, read))
    except ValueError as error:
        key, _, problem = str(error).partition(": ")
        raise ValueError(f"{folder}: tensor {tensor_name(config, f'{name}.{key}')}: {problem}") from error


def stored_type(name: str) -> torch.dtype | None:
    """The type of a tensor of a quantized folder; None where it may be any of full precision."""
    key = name.rpartition(".")[2]
    if key in ("packed", "packed_column_bits"):
        return torch.uint8
    if key in ("weight_scale", "weight_zero_point"):
        return torch.float16
    return torch.float32 if key in ("activation_scale", "activation_zero_point") else None


def check_types(found: Mapping[str, torch.dtype], where: Path) -> None:
    """Raise ValueError unless tensors of a quantized folder, name to type, have the types of the format."""
    for name, dtype in found.items():
        expected = stored_type(name)
        if expected is None:
            check_full_precision(dtype, name, where)
        elif dtype != expected:
            raise ValueError(f"{where}: tensor {name}: found {dtype}, expected {expected}")


def _check_scale(
    scale: Tensor, zero_point: Tensor | None, codes: tuple[float, float], name: str, dtype: torch.dtype, where: Path
) -> None:
    """Raise ValueError unless a scale is positive, and all that codes between two can stand for is finite in a type."""
    if (scale <= 0).any():
        raise ValueError(f"{where}: tensor {name}: found {scale.min().item():.3g}, allowed is above 0")
    zero = torch.zeros_like(scale) if zero_point is None else zero_point
    steps = torch.maximum(*((code - zero.double()).abs() for code in codes))
    reach, most = (scale * steps).max().item(), torch.finfo(dtype).max
    if reach > most:
        found = f"found a scale of codes that stand for up to {reach:.3g}"
        raise ValueError(f"{where}: tensor {name} as {dtype}: {found}, allowed is {most:.5g} at most")


def time_group_params(
    kind: str, values: Mapping[str, Tensor], config: ThermoConfig, in_features: int
) -> list[TimeGroupParams]:
    """The parameters of a layer's time groups.

    Args:
        kind: ``weight`` or ``activation``.
        values: ``scale``, and ``zero_point`` where it is stored, the time groups first.
        config: how the layer is quantized.
        in_features: of the layer.
    """
    groups = config.weight_groups if kind == "weight" else config.groups
    group_size = config.group_size or in_features if kind == "weight" else None
    zeros = values.get("zero_point", torch.zeros_like(values["scale"]))
    return [
        TimeGroupParams(time_range, scale, zero, group_size)
        for time_range, scale, zero in zip(groups.intervals, values["scale"], zeros, strict=True)
    ]


def install(lm: QuantizedLM, tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Put what is stored of quantized linears and tables into a model that isn't quantized yet.

    Args:
        lm: the model, with the configuration.
        tensors: by the library's name; those that are installed are taken out.
        folder: for errors.
        dtype: of what isn't quantized, and of the computation.

    Raises:
        ValueError: a scale that isn't positive, or that makes of codes what a type doesn't hold.
    """
    config, thermo = lm.model.config, lm.config
    kinds = {"weight": lm.weight_params} | ({"activation": lm.activation_params} if thermo.has_static_ranges else {})
    for name in linear_names(lm.model):
        linear, stored_name = part_as(nn.Linear, lm.model, name), tensor_name(config, name)
        for kind, layers in kinds.items():
            values = {key: tensors.pop(f"{name}.{kind}_{key}") for key in _parameter_names(kind, thermo)}
            name_of_scale, computed = f"{stored_name}.{kind}_scale", dtype if kind == "weight" else torch.float32
            span = quantizer_of(thermo).span if kind == "weight" else (0, 2**thermo.activation_bits - 1)
            _check_scale(values["scale"], values.get("zero_point"), span, name_of_scale, computed, folder)
            layers[name] = time_group_params(kind, values, thermo, linear.in_features)
        stored = {key: tensors.pop(f"{name}.{key}") for key in quantizer_of(thermo).layer.STORED}
        if linear.bias is not None:
            linear.bias = nn.Parameter(tensors.pop(f"{name}.bias").to(dtype), requires_grad=False)
        install_layer(lm, name, stored)
        if thermo.activations is not None:
            layer = part_as(QuantizedLinear, lm.model, name)
            install_activations(layer, lm.activation_params.get(name, []), thermo)
    with_codes = coded_tables(lm.model, thermo)
    if with_codes and (head := part_as(nn.Linear, lm.model, lm.model.parts.head)).bias is not None:
        name = head_bias(lm.model)
        bias = tensors[name] if name in tensors else lm.model.get_parameter(name)
        tensors.pop(f"{lm.model.parts.head}.bias", None)
        head.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    for name in with_codes:
        stored = {key: tensors.pop(f"{name}.{key}") for key in ("packed", "weight_scale", "weight_zero_point")}
        span, key = (0, 2**thermo.embedding_bits - 1), f"{tensor_name(config, name)}.weight_scale"
        _check_scale(stored["weight_scale"], stored["weight_zero_point"], span, key, dtype, folder)
        install_table(lm, name, stored, dtype)

"""What a model folder holds, from its settings and the headers of its files: no weight is read."""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from thermo_lib.files.tensors import check_full_precision, read_headers, weight_files
from thermo_lib.models.architectures import MaskPredictor, skeleton
from thermo_lib.models.families import ARCHITECTURES, read_config, tensor_name, used
from thermo_lib.models.lm import last_norm, model_folder
from thermo_lib.models.streamed import Checkpoint
from thermo_lib.models.tokenization import read_tokenizer
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import linear_names, norm_names
from thermo_lib.pipeline.parts import TimeNorms
from thermo_lib.pipeline.presets import PRESETS
from thermo_lib.pipeline.storage import check_stored, is_quantized, read_quantization


def about(name: str, family: str | None = None, block_length: int | None = None) -> dict[str, Any]:
    """What a model is, full precision or quantized, as numbers for programs; ``described`` says it to people.

    Args:
        name: ``"reference"`` for the embedded model, a folder, or a hub id.
        family, block_length: see ``load_model``.

    Returns:
        A JSON object: ``family``, ``blocks`` (their number), ``kind_of_blocks``, ``hidden_size``, ``parameters``,
        ``vocabulary``, ``tokenizer_tokens``, ``tied_embeddings``, ``mask_id``, ``is_shifted``, ``attention``,
        ``heads``, ``head_size``, ``key_value_heads``, ``norms`` (their type), ``time_norms`` and ``quantized`` in words
        or None, ``bits_per_weight`` of the linears in blocks, and ``files``, a name to its bytes.

    Raises:
        ValueError: what ``load_model`` and ``load_quantized`` raise but for the numbers in tensors, which aren't read.
    """
    folder = model_folder(name)
    config = read_config(folder, family, block_length)
    entry, model = ARCHITECTURES[config.model_type], skeleton(config)
    tokens = read_tokenizer(folder, config.vocab_size).get_vocab_size()
    paths = weight_files(folder)
    thermo = read_quantization(folder) if is_quantized(name) else None
    norms = None if thermo is None else thermo.time_norms
    found = used(read_headers(paths), config)
    if thermo is None:
        Checkpoint(folder, model)  # which checks names and shapes
        for key, tensor in found.items():
            check_full_precision(tensor.dtype, key, folder)
    else:
        check_stored(model, thermo, paths, folder)
    number = config.num_attention_heads
    return {
        "family": config.model_type,
        "blocks": len(model.blocks),
        "kind_of_blocks": entry.blocks,
        "hidden_size": config.hidden_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": config.vocab_size,
        "tokenizer_tokens": tokens,
        "tied_embeddings": bool(config.tie_word_embeddings),
        "mask_id": config.mask_token_id,
        "is_shifted": entry.is_shifted,
        "attention": str(model.passes.seen(config)),
        "heads": number,
        "head_size": getattr(config, "head_dim", None) or config.hidden_size // number,
        "key_value_heads": getattr(config, "num_key_value_heads", number),
        "norms": str(found[last_norm(config, found)].dtype).removeprefix("torch."),
        "time_norms": None if norms is None else _time_norms(model, norms),
        "quantized": None if thermo is None else words(thermo),
        "bits_per_weight": _bits(model, found),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
    }


def described(found: Mapping[str, Any]) -> dict[str, str]:
    """What ``about`` found, for people: title to text, in the order to show them."""
    heads = f"{found['heads']} heads of {found['head_size']}, {found['key_value_heads']} of keys and values"
    shift = "by one: position i predicts token i + 1" if found["is_shifted"] else "none: position i predicts token i"
    return {
        "family": f"{found['family']}, {found['blocks']} {found['kind_of_blocks']} blocks of {found['hidden_size']}",
        "parameters": f"{found['parameters']:,}",
        "vocabulary": f"{found['vocabulary']:,}, {found['tokenizer_tokens']:,} of the tokenizer",
        "embeddings": "also the head's" if found["tied_embeddings"] else "apart from the head's",
        "mask id": str(found["mask_id"]),
        "shift": shift,
        "attention": f"{found['attention']}, {heads}",
        "norms": found["norms"],
        **({} if found["time_norms"] is None else {"time norms": found["time_norms"]}),
        "quantized": found["quantized"] or "no",
        "bits per weight": f"{found['bits_per_weight']:.3f} of the linears in blocks",
        **{name: f"{size:,} bytes" for name, size in found["files"].items()},
    }


def _bits(model: MaskPredictor, found: dict[str, Tensor]) -> float:
    """Bits stored for the linears inside the blocks, with all parameters of codes, for each weight."""
    names, bits, weights = linear_names(model), 0, 0
    owners = {tensor_name(model.config, f"{name}.") for name in names}
    for key, tensor in found.items():
        owner, _, kind = key.rpartition(".")
        if f"{owner}." in owners and kind != "bias":
            bits += 8 * tensor.nbytes
        elif kind in ("time_weight", "time_bias"):  # one set is that of a plain norm
            bits += 8 * tensor.nbytes * (len(tensor) - 1) // len(tensor)
    for name in names:
        weights += model.get_parameter(f"{name}.weight").numel()
    return bits / weights


def _time_norms(model: MaskPredictor, phase: TimeNorms) -> str:
    """How many sets of weights the norms have, and how these are smoothed."""
    smoothed = "not smoothed" if phase.smoothing is None else f"smoothing {phase.smoothing}"
    window = "" if phase.window is None else f", window {phase.window}"
    return f"{phase.count} sets for each of {len(norm_names(model))}, {smoothed}{window}"


def words(config: ThermoConfig) -> str:
    """A configuration as the command ``quantize`` takes it: the nearest preset and what differs from it."""
    found = _flat(config)

    def differences(preset: str) -> dict[str, Any]:
        other = _flat(ThermoConfig.preset(preset))
        return {key: found.get(key) for key in [*found, *other] if found.get(key) != other.get(key)}

    preset = min(PRESETS, key=lambda name: len(differences(name)))
    return " ".join([f"preset={preset}", *(f"{key}={_word(value)}" for key, value in differences(preset).items())])


def _flat(config: ThermoConfig) -> dict[str, Any]:
    """Setting to value, those of a part as ``part.setting``."""
    content = config.model_dump(mode="json")
    parts = {phase["phase"]: phase for phase in content.pop("training")}
    parts |= {key: content.pop(key) for key in ("weights", "activations", "time_groups")}
    inside = {f"{part}.{key}": value for part, values in parts.items() for key, value in (values or {}).items()}
    return inside | content


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

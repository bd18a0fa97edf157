"""Comparison with the 2-bit methods that users pick instead, on the same model, calibration states and inputs.

``peers.quantize`` runs in an environment of its own and leaves each method's dequantized weights and costs; here they
are put into the full-precision model and scored like any other, also with dynamic 4-bit activations.
"""

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from thermo_lib.evaluation import (
    Suite,
    accuracy_interval,
    accuracy_per_sequence,
    build_suite,
    evaluate,
    interval,
    path_kl_interval,
)
from thermo_lib.models import DiffusionLM, DreamModel, check_tensors, read_object, read_safetensors
from thermo_lib.quant import fake_quantize_per_token
from thermo_lib.quantized_model import linear_names
from thermo_lib.report import hardware, read_json, versions, write_json
from thermo_lib.study import gain, path_kl_change, score

FOLDER = Path("artifacts/peers")
REPORT = Path("reports/peers.json")
CHECK = "gptq-check"


@dataclass(frozen=True)
class Entry:
    """What ``peers.quantize`` says about one method and setting.

    Attributes:
        method, setting, version: in words.
        bits_per_weight: everything stored for the quantized linears, for each of their weights.
        seconds: wall clock of the quantization, without imports and loading.
        peak_mib: rise of the process's resident memory while it quantized, at its peak.
        made_of: digest of the model, the calibration states, the settings and the versions.
    """

    method: str
    setting: str
    version: str
    bits_per_weight: float
    seconds: float
    peak_mib: float
    made_of: str

    def __post_init__(self) -> None:
        for name in ("method", "setting", "version", "made_of"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name}: found {value!r}, allowed is a text that isn't empty")
        for name, lowest in (("bits_per_weight", 1.0), ("seconds", 0.0), ("peak_mib", 0.0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not lowest <= value < math.inf:
                raise ValueError(f"{name}: found {value!r}, allowed is a number from {lowest:g}")


def read_entry(path: str | Path) -> Entry:
    """Read the JSON of a complete result.

    Raises:
        ValueError: no such file, not JSON, a missing or unknown field, or a value out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: found no such file")
    content = read_object(path)
    if found := sorted(content.keys() ^ Entry.__annotations__.keys()):
        problem = "unknown" if found[0] in content else "missing"
        raise ValueError(f"{path}: {found[0]}: {problem}, allowed are {', '.join(Entry.__annotations__)}")
    try:
        return Entry(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_weights(path: str | Path, model: DreamModel) -> dict[str, Tensor]:
    """Read the dequantized weights of the linears inside a model's blocks.

    Args:
        path: a safetensors file.
        model: the full-precision model whose names and shapes they must have.

    Returns:
        Parameter name, e.g. ``model.layers.0.mlp.up_proj.weight``, to float32 ``(out_features, in_features)``.

    Raises:
        ValueError: unreadable file, a tensor that is missing, extra, of another shape or dtype, NaN or infinity.
    """
    path = Path(path)
    found = read_safetensors(path)
    expected = {f"{name}.weight": model.get_submodule(name).weight for name in linear_names(model)}
    check_tensors(found, expected, path)
    for name, tensor in found.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{path}: tensor {name}: found {tensor.dtype}, allowed is torch.float32")
    return found


def with_weights(
    reference: DiffusionLM, weights: Mapping[str, Tensor], name: str, activation_bits: int = 16
) -> DiffusionLM:
    """The full-precision model with other weights in its blocks; the given one stays as it is.

    Args:
        reference: the full-precision model.
        weights: what ``load_weights`` returns.
        name: of the new model.
        activation_bits: of the inputs of these linears, in dynamic per-token ranges as in ``QuantizedLinear``; 16
            leaves them as they are.
    """
    lm = DiffusionLM(copy.deepcopy(reference.model), reference.tokenizer, reference.mask_token_id, name)

    def quantize_input(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (fake_quantize_per_token(inputs[0], activation_bits),)

    with torch.no_grad():
        for parameter, weight in weights.items():
            linear = lm.model.get_submodule(parameter.removesuffix(".weight"))
            linear.weight.copy_(weight)
            if activation_bits < 16:
                linear.register_forward_pre_hook(quantize_input)
    return lm


def score_peer(entry: Entry, weights: Mapping[str, Tensor], suite: Suite) -> dict[str, Any]:
    """Measure one peer: a row of the report.

    Args:
        entry, weights: what was quantized.
        suite: the project's evaluation inputs.

    Returns:
        The entry's fields, ``accuracy``, ``path_kl`` (each with ``_ci``, 95 %, and ``_per_sequence``), ``nelbo``,
        ``sudoku_solved``, and ``accuracy_a4`` and ``path_kl_a4`` with 4-bit activations.
    """
    lm = with_weights(suite.reference, weights, f"{entry.method}, {entry.setting}")
    evaluation = evaluate(lm, suite)
    row = asdict(entry) | {
        "accuracy": evaluation.accuracy,
        "accuracy_ci": list(accuracy_interval(evaluation)),
        "accuracy_per_sequence": accuracy_per_sequence(evaluation.correct, evaluation.masked).tolist(),
        "nelbo": evaluation.nelbo,
        "path_kl": evaluation.path.total,
        "path_kl_ci": list(path_kl_interval(evaluation.path)),
        "path_kl_per_sequence": evaluation.path.per_sequence.sum(1).tolist(),
        "sudoku_solved": evaluation.puzzles.accuracy if evaluation.puzzles else None,
    }
    low = score(with_weights(suite.reference, weights, lm.name, activation_bits=4), {}, suite)
    for key in ("accuracy", "path_kl"):
        values = torch.tensor(getattr(low, f"{key}_per_sequence"), dtype=torch.float64).numpy()
        row[f"{key}_a4"] = getattr(low, key)
        row[f"{key}_a4_ci"] = list(interval(lambda index, v=values: float(v[index].mean()), len(values)))
        row[f"{key}_a4_per_sequence"] = values.tolist()
    return row


def compare(row: Mapping[str, Any], baseline: Mapping[str, Any], activation_bits: int = 16) -> dict[str, Any]:
    """One row of the report against another, sequence by sequence.

    Args:
        row, baseline: rows that ``score_peer`` returned on the same suite.
        activation_bits: 16 or 4.

    Returns:
        ``gain`` (relative, of the accuracy) and ``path_kl_change`` (nats), each with its paired 95 % interval ``_ci``.

    Raises:
        ValueError: other activation bits, or rows of different sequences.
    """
    suffixes = {16: "", 4: "_a4"}
    if activation_bits not in suffixes:
        raise ValueError(f"activation_bits: found {activation_bits}, allowed are 16 and 4")
    suffix = suffixes[activation_bits]
    new, old = (
        SimpleNamespace(
            accuracy_per_sequence=side[f"accuracy{suffix}_per_sequence"],
            path_kl_per_sequence=side[f"path_kl{suffix}_per_sequence"],
        )
        for side in (row, baseline)
    )
    for key in vars(new):
        found, expected = len(getattr(new, key)), len(getattr(old, key))
        if found != expected:
            raise ValueError(f"{key}: found {found} sequences, the baseline has {expected}")
    change, change_ci = gain([new], [old])
    divergence, divergence_ci = path_kl_change([new], [old])
    return {
        "gain": change,
        "gain_ci": list(change_ci),
        "path_kl_change": divergence,
        "path_kl_change_ci": list(divergence_ci),
    }


def score_all(reference: DiffusionLM, folder: Path = FOLDER, report: Path = REPORT, *, progress: bool = True) -> None:
    """Score every result in a folder that isn't in the report yet; the report is rewritten whole after each.

    Args:
        reference: the full-precision model.
        folder: what ``peers.quantize`` wrote.
        report: JSON file with ``rows`` (of ``score_peer``, and ``weights``, the digest of the file), ``errors``,
            ``gptq_check``, ``hardware`` and ``versions``.
        progress: show a bar.

    Raises:
        ValueError: no result in the folder, or a damaged one.
    """
    paths = sorted(p for p in folder.glob("*.json") if p.stem != CHECK)
    if not paths:
        raise ValueError(f"{folder}: found no results, `make peers` makes them")
    earlier = read_json(report)["rows"] if report.is_file() else []
    known = {(row["method"], row["setting"], row["weights"]): row for row in earlier}
    contents = {path: read_object(path) for path in paths}
    entries = {path: read_entry(path) for path, content in contents.items() if "error" not in content}
    files = {path: path.with_suffix(".safetensors") for path in entries}
    digests = {path: hashlib.sha256(file.read_bytes()).hexdigest() for path, file in files.items()}
    keys = {path: (entry.method, entry.setting, digests[path]) for path, entry in entries.items()}
    # What was quantized and timed anew to the same weights keeps its scores.
    rows = {path: known[keys[path]] | asdict(entry) for path, entry in entries.items() if keys[path] in known}
    check = folder / f"{CHECK}.json"

    def write() -> None:
        content = {
            "rows": [rows[path] for path in paths if path in rows],
            "errors": [content for content in contents.values() if "error" in content],
            "gptq_check": read_json(check) if check.is_file() else [],
            "hardware": hardware(),
            "versions": versions(),
        }
        write_json(report, content)

    missing = [path for path in entries if path not in rows]
    suite = build_suite(reference) if missing else None
    for path in tqdm(missing, desc="scores", unit="setting", disable=not progress):
        weights = load_weights(files[path], reference.model)
        rows[path] = score_peer(entries[path], weights, suite) | {"weights": digests[path]}
        write()
    write()

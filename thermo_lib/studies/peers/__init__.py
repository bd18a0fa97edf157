"""Comparison with the 2-bit methods that users pick instead, on the same model, calibration states and inputs.

``peers.quantize`` runs in an environment of its own and leaves each method's dequantized weights and costs; here they
are put into the full-precision model and scored like any other, also with dynamic 4-bit activations.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from thermo_lib.evaluation.report import hardware, versions
from thermo_lib.evaluation.scores import (
    Suite,
    accuracy_interval,
    accuracy_per_sequence,
    build_suite,
    evaluate,
    path_kl_interval,
)
from thermo_lib.evaluation.statistics import interval, mean_interval, verdict
from thermo_lib.files.reading import field_of, read_json, read_object, read_report
from thermo_lib.files.tensors import check_tensors, read_safetensors
from thermo_lib.files.text import write_json
from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.model import linear_names
from thermo_lib.quant.codes import fake_quantize_per_token
from thermo_lib.studies.grid import scores
from thermo_lib.studies.smoothing import gain, path_kl_change

FOLDER = Path("artifacts/peers")
PEERS_REPORT = Path("reports/peers.json")
WITNESS_REPORT = Path("reports/peers_witness.json")
NAMES = {"method": str, "setting": str, "made_of": str}  # what each result is told apart by
CHECK = "gptq-check"
LOSS_STEPS = 10
PEER_COLUMNS = {
    "method": ("method", "{}"),
    "setting": ("setting", "{}"),
    "bpw": ("bits_per_weight", "{:.3f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "95 %": ("accuracy_ci", "{0[0]:.3f}..{0[1]:.3f}"),
    "NELBO": ("nelbo", "{:.2f}"),
    "path KL": ("path_kl", "{:.1f}"),
    "Sudoku": ("sudoku_solved", "{:.2f}"),
    "accuracy A4": ("accuracy_a4", "{:.3f}"),
    "path KL A4": ("path_kl_a4", "{:.1f}"),
}
COST_COLUMNS = {"s": ("seconds", "{:.1f}"), "MiB": ("peak_mib", "{:.0f}")}
ABLATION_COLUMNS = {
    "": ("name", "{}"),
    "bpw": ("bits_per_weight", "{:.3f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "gain": ("gain", "{:+.1%}"),
    "gain, 95 %": ("gain_ci", "{0[0]:+.1%}..{0[1]:+.1%}"),
    "path KL": ("path_kl", "{:.1f}"),
    "change": ("path_kl_change", "{:+.1f}"),
    "change, 95 %": ("path_kl_change_ci", "{0[0]:+.1f}..{0[1]:+.1f}"),
    "Sudoku": ("sudoku_solved", "{:.2f}"),
    "accuracy A4": ("accuracy_a4", "{:.3f}"),
    "path KL A4": ("path_kl_a4", "{:.1f}"),
}
GOAL_COLUMNS = {
    "goal": ("goal", "{}"),
    "value": ("value", "{:z.3f}"),
    "95 %": ("ci", "{0[0]:z.3f}..{0[1]:z.3f}"),
    "bound": ("bound", "{:.3f}"),
    "verdict": ("verdict", "{}"),
}
PeerRow = Mapping[str, Any]  # what ``score_peer`` returns
_SUFFIXES = {16: "", 4: "_a4"}  # of the keys of a row


@dataclass(frozen=True)
class Entry:
    """What ``peers.quantize`` says about one method and setting.

    Attributes:
        method, setting, version: in words.
        bits_per_weight: everything stored for the quantized linears, for each of their weights.
        seconds: wall clock of the quantization, without imports and loading.
        peak_mib: rise of the process's resident memory while it quantized, at its peak.
        made_of: digest of the model, the calibration states, the settings and the versions.
        activation_clip: of the dynamic 4-bit ranges that it is scored with.
        losses: what was trained to its losses, path KL in nats per sequence, means of ``LOSS_STEPS`` steps.
    """

    method: str
    setting: str
    version: str
    bits_per_weight: float
    seconds: float
    peak_mib: float
    made_of: str
    activation_clip: float = 1.0
    losses: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("method", "setting", "version", "made_of"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name}: found {value!r}, allowed is a text that isn't empty")
        for name, lowest in (("bits_per_weight", 1.0), ("seconds", 0.0), ("peak_mib", 0.0), ("activation_clip", 0.0)):
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


def load_weights(path: str | Path, model: MaskPredictor) -> dict[str, Tensor]:
    """Read the dequantized weights of the linears inside a model's blocks, and what else of the model was trained.

    Args:
        path: a safetensors file.
        model: the full-precision model whose names and shapes they must have.

    Returns:
        Parameter name, e.g. ``model.layers.0.mlp.up_proj.weight``, to float32 of the parameter's shape.

    Raises:
        ValueError: unreadable file, a tensor that is missing, extra, of another shape or dtype, NaN or infinity.
    """
    path = Path(path)
    found = read_safetensors(path)
    needed = {f"{name}.weight" for name in linear_names(model)}
    expected = {name: p for name, p in model.named_parameters() if name in needed or name in found}
    check_tensors(found, expected, path)
    for name, tensor in found.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{path}: tensor {name}: found {tensor.dtype}, allowed is torch.float32")
    return found


def with_weights(
    reference: DiffusionLM,
    weights: Mapping[str, Tensor],
    name: str,
    activation_bits: int = 16,
    activation_clip: float = 1.0,
) -> DiffusionLM:
    """The full-precision model with other weights; the given one stays as it is.

    Args:
        reference: the full-precision model.
        weights: what ``load_weights`` returns.
        name: of the new model.
        activation_bits: of the inputs of the linears inside the blocks, in dynamic per-token ranges as in
            ``QuantizedLinear``; 16 leaves them as they are.
        activation_clip: of these ranges.
    """
    lm = DiffusionLM(copy.deepcopy(reference.model), reference.tokenizer, reference.mask_token_id, name)

    def quantize_input(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (fake_quantize_per_token(inputs[0], activation_bits, activation_clip),)

    with torch.no_grad():
        for parameter, weight in weights.items():
            lm.model.get_parameter(parameter).copy_(weight)
    if activation_bits < 16:
        for linear in linear_names(lm.model):
            lm.model.get_submodule(linear).register_forward_pre_hook(quantize_input)
    return lm


def _scores(lm: DiffusionLM, suite: Suite) -> dict[str, Any]:
    evaluation = evaluate(lm, suite)
    return {
        "accuracy": evaluation.accuracy,
        "accuracy_ci": list(accuracy_interval(evaluation)),
        "accuracy_per_sequence": accuracy_per_sequence(evaluation.correct, evaluation.masked).tolist(),
        "nelbo": evaluation.nelbo,
        "path_kl": evaluation.path.total,
        "path_kl_ci": list(path_kl_interval(evaluation.path, evaluation.resamples)),
        "path_kl_per_sequence": evaluation.path.per_sequence.sum(1).tolist(),
        "sudoku_solved": evaluation.puzzles.accuracy if evaluation.puzzles else None,
    }


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
    row = asdict(entry) | _scores(lm, suite)
    clip = entry.activation_clip
    low = scores(with_weights(suite.reference, weights, lm.name, activation_bits=4, activation_clip=clip), suite)
    for key in ("accuracy", "path_kl"):
        values = torch.tensor(low[f"{key}_per_sequence"], dtype=torch.float64).numpy()
        row[f"{key}_a4"] = float(np.mean(values))
        row[f"{key}_a4_ci"] = list(mean_interval(values, suite.resamples))
        row[f"{key}_a4_per_sequence"] = values.tolist()
    return row


@dataclass(frozen=True)
class _Side:
    """One of two rows that are compared, see ``Scored``."""

    accuracy_per_sequence: Sequence[float]
    path_kl_per_sequence: Sequence[float]


def compare(row: PeerRow, baseline: PeerRow, activation_bits: int = 16) -> dict[str, Any]:
    """One row of the report against another, sequence by sequence.

    Args:
        row, baseline: rows that ``score_peer`` returned on the same suite.
        activation_bits: 16 or 4.

    Returns:
        ``gain`` (relative, of the accuracy) and ``path_kl_change`` (nats), each with its paired 95 % interval ``_ci``.

    Raises:
        ValueError: other activation bits, or rows of different sequences.
    """
    if activation_bits not in _SUFFIXES:
        raise ValueError(f"activation_bits: found {activation_bits}, allowed are 16 and 4")
    suffix = _SUFFIXES[activation_bits]
    new, old = (
        _Side(
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


def _paired(statistic: Callable[..., float], *columns: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """A statistic of values given sequence by sequence, with its 95 % interval over the sequences."""
    arrays = [np.array(column) for column in columns]
    return statistic(*arrays), interval(lambda index: statistic(*(a[index] for a in arrays)), len(arrays[0]))


def _goal(name: str, measured: tuple[float, tuple[float, float]], bound: float, *, at_least: bool) -> dict[str, Any]:
    value, ci = measured
    return {"goal": name, "value": value, "ci": ci, "bound": bound, "verdict": verdict(ci, bound, at_least=at_least)}


def accuracy_kept(row: PeerRow, full_precision: PeerRow, bound: float, activation_bits: int = 16) -> dict[str, Any]:
    """The goal on the share of the full-precision accuracy that is left.

    Args:
        row: of the report.
        full_precision: the report's ``full_precision``.
        bound: the share, at least.
        activation_bits: 16 or 4.
    """
    suffix = _SUFFIXES[activation_bits]
    accuracies = row[f"accuracy{suffix}_per_sequence"], full_precision["accuracy_per_sequence"]
    measured = _paired(lambda new, full: float(new.mean() / full.mean()), *accuracies)
    return _goal(f"{row['setting']}: accuracy kept at W2A{activation_bits}", measured, bound, at_least=True)


def path_kl_share(row: PeerRow, peer: PeerRow) -> tuple[float, tuple[float, float]]:
    """What is left of a peer's path KL, with its paired 95 % interval over the trajectories."""
    columns = (side["path_kl_per_sequence"] for side in (row, peer))
    return _paired(lambda a, b: float(a.mean() / b.mean()), *columns)


def shares_of(row: PeerRow, peer: PeerRow, full_precision: PeerRow, bound: float) -> list[dict[str, Any]]:
    """The goals on what is left of a peer's path KL and of its accuracy drop.

    Args:
        row, peer: of the report.
        full_precision: the report's ``full_precision``.
        bound: the share, below.
    """
    name = f"{peer['method']} ({peer['bits_per_weight']:.2f} bits)"
    drop = _paired(
        lambda a, b, full: float((full.mean() - a.mean()) / (full.mean() - b.mean())),
        *(side["accuracy_per_sequence"] for side in (row, peer, full_precision)),
    )
    return [
        _goal(f"{row['setting']}: path KL, share of {name}", path_kl_share(row, peer), bound, at_least=False),
        _goal(f"{row['setting']}: accuracy drop, share of {name}", drop, bound, at_least=False),
    ]


def ahead_of(row: PeerRow, peer: PeerRow, activation_bits: int = 16) -> dict[str, Any]:
    """The goal of less path KL than a peer, in nats.

    Args:
        row, peer: of the report.
        activation_bits: 16 or 4.
    """
    found = compare(row, peer, activation_bits)
    than = f"{peer['method']} ({peer['bits_per_weight']:.2f} bits)"
    name = f"{row['setting']}: path KL at W2A{activation_bits} less than {than}, nats"
    return _goal(name, (found["path_kl_change"], tuple(found["path_kl_change_ci"])), 0.0, at_least=False)


def score_all(
    reference: DiffusionLM,
    folder: Path = FOLDER,
    report: Path = PEERS_REPORT,
    make_suite: Callable[[DiffusionLM], Suite] | None = None,
    *,
    progress: bool = True,
) -> None:
    """Score every result in a folder that isn't in the report yet; the report is rewritten whole after each.

    Rows of settings that the folder doesn't have stay.

    Args:
        reference: the full-precision model.
        folder: what ``peers.quantize`` wrote.
        report: JSON file with ``rows`` (of ``score_peer``, and ``weights``, the digest of the file), the same scores of
            ``full_precision``, ``errors``, ``gptq_check``, ``hardware`` and ``versions``.
        make_suite: makes the inputs, where something is to score; ``build_suite`` by default.
        progress: show a bar.

    Raises:
        ValueError: no result in the folder, or a damaged one.
    """
    paths = sorted(p for p in folder.glob("*.json") if p.stem != CHECK)
    if not paths and not report.is_file():
        raise ValueError(f"{folder}: found no results, `make peers` makes them")
    earlier = read_earlier(report) if report.is_file() else {"rows": [], "errors": [], "gptq_check": []}
    contents = {path: read_object(path) for path in paths}
    errors = [content for content in contents.values() if "error" in content]
    for path, content in contents.items():
        for name, kind in NAMES.items():
            field_of(content, name, kind, str(path))
    entries = [(read_entry(path), path) for path, content in contents.items() if "error" not in content]
    files = {_setting(asdict(entry)): path.with_suffix(".safetensors") for entry, path in entries}
    digests = {setting: hashlib.sha256(file.read_bytes()).hexdigest() for setting, file in files.items()}
    redone = {_setting(content) for content in contents.values()}
    rows = {_setting(row): row for row in earlier["rows"] if _setting(row) not in redone}
    errors += [error for error in earlier["errors"] if _setting(error) not in redone]
    known = {(*_setting(row), row["weights"]): row for row in earlier["rows"]}
    check = folder / f"{CHECK}.json"

    def write() -> None:
        content = {
            "full_precision": full_precision,
            "rows": [rows[setting] for setting in sorted(rows)],
            "errors": sorted(errors, key=_setting),
            "gptq_check": read_json(check) if check.is_file() else earlier["gptq_check"],
            "hardware": hardware(),
            "versions": versions(),
        }
        write_json(report, content)

    missing = []
    for entry, _ in entries:
        setting = _setting(asdict(entry))
        if (same := known.get((*setting, digests[setting]))) is None:
            missing.append(entry)
        else:  # quantized and timed anew to the same weights: keeps its scores
            rows[setting] = same | asdict(entry)
    full_precision = earlier.get("full_precision")
    if missing or full_precision is None:
        suite = (make_suite or build_suite)(reference)
        if full_precision is None:
            full_precision = _scores(reference, suite)
        for entry in tqdm(missing, desc="scores", unit="setting", disable=not (progress and missing)):
            setting = _setting(asdict(entry))
            weights = load_weights(files[setting], reference.model)
            rows[setting] = score_peer(entry, weights, suite) | {"weights": digests[setting]}
            write()
    write()


def read_earlier(report: Path) -> dict[str, Any]:
    """What ``score_all`` wrote.

    Raises:
        ValueError: not the JSON of such a report; names the row and the field.
    """
    rows = NAMES | {"weights": str, "path_kl": float, "path_kl_per_sequence": list, "accuracy_per_sequence": list}
    return read_report(report, rows=rows, errors=NAMES | {"error": str}, gptq_check={})


def _setting(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["method"], row["setting"]

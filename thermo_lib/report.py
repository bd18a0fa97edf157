"""Reports for machines (JSON) and people (text): rows of numbers with intervals, verdicts, versions, hardware."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from thermo_lib.params import default

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "papermill", "dvc")
_COLUMNS = {  # column of the text tables: key of a row and how to print it
    "configuration": ("name", "{}"),
    "bpw": ("bits_per_weight", "{:.2f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "95 %": ("accuracy_ci", "{0[0]:.3f}..{0[1]:.3f}"),
    "NELBO": ("nelbo", "{:.2f}"),
    "path KL": ("path_kl", "{:.2f}"),
    "Markov": ("markov_score", "{:.2f}"),
    "max jump": ("max_jump", "{:.2f}"),
    "cosine": ("cosine_similarity", "{:.3f}"),
    "Sudoku": ("sudoku_solved", "{:.2f}"),
}


def write_text(path: str | Path, text: str) -> None:
    """Write a file so that an earlier one stays whole until the new one is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON with sorted keys; NaN and infinity are refused.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    write_text(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: no such file (an earlier stage of the pipeline writes it).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"found no {path.name}: an earlier stage writes it, run `dvc repro`")
    return json.loads(path.read_text(encoding="utf-8"))


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]] = _COLUMNS) -> str:
    """Rows as a text table; a value that is missing or None shows as a dash, a column without values not at all.

    Args:
        rows: mappings of keys to values.
        columns: heading to ``(key, format string)``.
    """
    used = {h: spec for h, spec in columns.items() if any(row.get(spec[0]) is not None for row in rows)}
    cells = [list(used)]
    for row in rows:
        cells.append(["-" if row.get(key) is None else form.format(row[key]) for key, form in used.values()])
    widths = [max(len(line[i]) for line in cells) for i in range(len(used))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


TARGET_COLUMNS = {
    "target": ("name", "{}"),
    "precision": ("activation_bits", "W2A{}"),
    "method": ("smoothing_method", "{}"),
    "value": ("value", "{:.3f}"),
    "95 %": ("ci", "{0[0]:.3f}..{0[1]:.3f}"),
    "bound": ("target", "{}"),
    "verdict": ("verdict", "{}"),
}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def hardware() -> dict[str, Any]:
    """The machine: architecture, processor, threads that torch uses."""
    cpuinfo = Path("/proc/cpuinfo")
    names = []
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "machine": platform.machine(),
        "processor": names[0] if names else platform.processor() or "unknown",
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
    }


def build_report(
    model: str, full_precision: dict[str, Any], configurations: list[dict[str, Any]], targets: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of ``report.json``."""
    return {
        "model": model,
        "versions": versions(),
        "hardware": hardware(),
        "seeds": {"all": default("seed")},
        "full_precision": full_precision,
        "configurations": configurations,
        "targets": targets,
    }


def report_text(report: Mapping[str, Any]) -> str:
    """``report.txt``: the configurations, the verdicts, and what they were measured with."""
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    machine = report["hardware"]
    parts = [
        f"Quantization of the diffusion language model {report['model']!r}",
        "",
        table([report["full_precision"], *report["configurations"]]),
        "",
        "accuracy: masked tokens, mean over timesteps; NELBO: nats a token; path KL: nats a sequence; 95 %: bootstrap.",
        "",
        "The earlier project's targets, each against the same quantizer and time groups without smoothing",
        "",
        table(report["targets"], TARGET_COLUMNS),
        "",
        f"Measured with {packages}; seed {report['seeds']['all']};",
        f"{machine['processor']} ({machine['machine']}), {machine['threads']} threads.",
    ]
    return "\n".join(parts) + "\n"

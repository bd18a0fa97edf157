"""Reports for machines (JSON) and people (text): rows of numbers with intervals, verdicts, versions, hardware."""

import csv
import importlib.metadata
import io
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from thermo_lib.files.text import write_text

REPORTED_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "papermill", "dvc")
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
TARGET_COLUMNS = {
    "target": ("name", "{}"),
    "precision": ("precision", "{}"),
    "method": ("smoothing_method", "{}"),
    "value": ("value", "{:z.3f}"),
    "95 %": ("ci", "{0[0]:z.3f}..{0[1]:z.3f}"),
    "bound": ("target", "{}"),
    "verdict": ("verdict", "{}"),
}


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


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in REPORTED_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # the last are the pipeline's
            found[name] = importlib.metadata.version(name)
    return found


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
    model: str,
    full_precision: dict[str, Any],
    configurations: list[dict[str, Any]],
    targets: list[dict[str, Any]],
    seed: int = 0,
) -> dict[str, Any]:
    """The content of ``report.json``."""
    return {
        "model": model,
        "versions": versions(),
        "hardware": hardware(),
        "seeds": {"all": seed},
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


def metrics(
    full_precision: Mapping[str, Any], configurations: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The content of ``metrics.json``, for ``dvc metrics``: scores by configuration, verdicts by target; no times."""
    keys = ("bits_per_weight", "accuracy", "nelbo", "path_kl", "cosine_similarity", "sudoku_solved", "markov_score")
    scores = {
        row["name"]: {key: row[key] for key in keys if row[key] is not None}
        for row in (full_precision, *configurations)
    }
    verdicts: dict[str, dict[str, str]] = {}
    for row in targets:
        where = f"{row['precision']} {row['smoothing_method'] or 'none'}"
        verdicts.setdefault(row["name"], {})[where] = row["verdict"]
    return {"configurations": scores, "verdicts": verdicts}


def write_per_timestep(path: str | Path, configurations: Sequence[Mapping[str, Any]], key: str) -> None:
    """A CSV for ``dvc plots``: one line a timestep, one column a configuration."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["timestep", *(row["name"] for row in configurations)])
    columns = [row[key] for row in configurations]
    writer.writerows((timestep, *values) for timestep, values in enumerate(zip(*columns, strict=True)))
    write_text(path, text.getvalue())


def model_card(record: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """The README of the reference model: what it is, what it learned from, what it can do.

    Args:
        record: ``training.json``.
        scores: what the notebook ``01_reference_model`` measured.
    """
    settings, row = record["settings"], scores["full_precision"]
    packages = ", ".join(f"{name} {version}" for name, version in settings["packages"].items())
    curve = "\n".join(
        f"| {(i + 1) * record['loss_every']:,} | {record['code_loss'][i]:.3f} | {record['planning_loss'][i]:.3f} |"
        for i in _spread(len(record["code_loss"]), 8)
    )
    return f"""# Reference model

A masked diffusion language model with Dream's architecture (Qwen2 blocks, bidirectional attention, logits shifted
by one) and {record["parameters"]:,} parameters: {settings["num_hidden_layers"]} blocks of width \
{settings["hidden_size"]}, {settings["num_attention_heads"]} heads, MLP
{settings["intermediate_size"]}, a byte-level BPE of {settings["vocab_size"]:,} tokens with every digit alone.
It is made for measuring quantization; it is no use as a writer of programs. Weights: bfloat16 safetensors.
Licence: as the project; the training packages are BSD-licensed.

## Data
- Source code without tests of {packages}; 90 % of the files train, 5 % validate, 5 % test, by a hash of the path.
- Generated 4x4 Sudoku (4-12 clues, one solution) and Countdown with three numbers, 5 % of the inputs kept for testing.

## Training
{record["steps"]:,} steps of Muon and AdamW from scratch, {record["code_tokens"]:,} tokens of code, \
{record["puzzles"]:,} puzzles, seed {settings["seed"]}; `notebooks/00_training.ipynb` is the recipe.
Loss in nats per masked token:

| step | code | planning |
|---|---|---|
{curve}

## Scores
Held-out files, {len(row["accuracy_per_timestep"])} timesteps; puzzles by denoising in as many steps.

| | accuracy | NELBO (nats a token) |
|---|---|---|
| unigram | {scores["unigram"][0]:.3f} | {scores["unigram"][1]:.2f} |
| most frequent visible token | {scores["copying"][0]:.3f} | {scores["copying"][1]:.2f} |
| this model | {row["accuracy"]:.3f} | {row["nelbo"]:.2f} |

Solved of fresh puzzles: Sudoku {scores["solved"]["sudoku"]:.3f}, Countdown {scores["solved"]["countdown"]:.3f}. \
Round-to-nearest INT2 at group size 128 changes the accuracy by {100 * scores["rounded_loss"]:+.1f} % (relative).
"""


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` indices of ``count``, evenly spread, the last among them."""
    return sorted({round((count - 1) * i / max(most - 1, 1)) for i in range(most)})

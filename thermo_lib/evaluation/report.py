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

_MOVING = (  # numbers that two runs are compared by: a label with its unit, the key, and the key of its interval
    ("accuracy (0-1)", "accuracy", "accuracy_ci"),
    ("path KL (nats)", "path_kl", "path_kl_ci"),
    ("NELBO (nats a token)", "nelbo", None),
    ("Sudoku solved (0-1)", "sudoku_solved", None),
    ("Markov score (0-1)", "markov_score", None),
    ("bits per weight", "bits_per_weight", None),
)
MOVED_COLUMNS = {
    "configuration": ("name", "{}"),
    "number": ("number", "{}"),
    "committed": ("committed", "{:.4f}"),
    "committed, 95 %": ("ci", "{0[0]:.4f}..{0[1]:.4f}"),
    "this run": ("value", "{:.4f}"),
    "change": ("change", "{:+.4f}"),
    "change / half of the interval": ("of_interval", "{:+.2f}"),
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


def headline(
    full_precision: Mapping[str, Any], configurations: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """The content of ``scores.json``: the few numbers that ``dvc metrics`` and ``dvc exp`` compare.

    Returns:
        ``accuracy`` (0-1) of full precision (``full``), of GPTQ's weights alone (``gptq``) and, of the configurations
        with the fewest bits of activations, of that with the lowest path KL (e.g. ``W2A4``); ``path_kl`` (nats) of the
        last two; and how many ``targets`` are met, under a name that says of how many: ``met/30``.
    """
    gptq = next(row for row in _weights_only(configurations) if row["quantizer"] == "gptq")
    fewest = min(row["activation_bits"] for row in configurations)
    best = min((row for row in configurations if row["activation_bits"] == fewest), key=lambda row: row["path_kl"])
    found = {"gptq": gptq, f"W{best['bits']}A{fewest}": best}
    return {
        "accuracy": {"full": full_precision["accuracy"]} | {name: row["accuracy"] for name, row in found.items()},
        "path_kl": {name: row["path_kl"] for name, row in found.items()},
        "targets": {f"met/{len(targets)}": sum(row["verdict"] == "met" for row in targets)},
    }


def _weights_only(configurations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those with 16-bit activations and one time group: what the notebook ``03_int2_baseline`` measures."""
    return [row for row in configurations if (row["activation_bits"], row["num_time_groups"]) == (16, 1)]


def stage_results(report: Mapping[str, Any], timings: Mapping[str, Any]) -> dict[str, Any]:
    """What the stages left in ``artifacts``, from the report that was made of it.

    Args:
        report, timings: ``report.json``, ``timings.json``.

    Returns:
        name of a file in ``artifacts`` to its content; of ``reference.json`` only what the report has of it.
    """
    int2 = _weights_only(report["configurations"])
    is_cost = [row["name"].startswith("overhead") for row in report["targets"]]
    cost = [row for row, of_time in zip(report["targets"], is_cost, strict=True) if of_time]
    return {
        "reference.json": {"full_precision": report["full_precision"]},
        "int2.json": int2,
        "smoothing.json": {
            "configurations": [row for row in report["configurations"] if row not in int2],
            "targets": [row for row, of_time in zip(report["targets"], is_cost, strict=True) if not of_time],
        },
        "timings/int2.json": timings["int2"],
        "timings/smoothing.json": {**timings["smoothing"], "targets": cost},
    }


def moved(rows: Sequence[Mapping[str, Any]], committed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Which numbers of a run differ from those that are committed, and by how much.

    Args:
        rows: configurations of this run.
        committed: those of ``report.json``; they are matched by name.

    Returns:
        A row for each number that differs: ``name``, ``number``, ``committed``, ``ci`` (of the committed one, None
        where it has none), ``value``, ``change``, and ``of_interval``, the change in halves of that interval's width.
        A configuration that isn't committed has rows without ``committed``.
    """
    before = {row["name"]: row for row in committed}
    found = []
    for row in rows:
        for label, key, interval in _MOVING:
            old, new = before.get(row["name"], {}).get(key), row.get(key)
            if new is None or old == new:
                continue
            ends = before[row["name"]].get(interval) if old is not None and interval else None
            change = None if old is None else new - old
            half = (ends[1] - ends[0]) / 2 if ends else 0
            found.append(
                {
                    "name": row["name"],
                    "number": label,
                    "committed": old,
                    "ci": ends,
                    "value": new,
                    "change": change,
                    "of_interval": change / half if half and change is not None else None,
                }
            )
    return found


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

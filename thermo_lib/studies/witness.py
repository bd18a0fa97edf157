"""A second witness: the study's questions on a model that nobody here trained.

AntiBERTy (Ruffolo et al., arXiv 2112.07782; 26 million parameters, a BERT that has seen 558 million antibodies; MIT) is
a masked language model. Denoising starts from all masks between ``[CLS]`` and ``[SEP]``; special tokens are never
drawn. Its weights are in the wheel ``antiberty`` of the Python package index: one file is taken out of it, and nothing
of it is installed or run.

``python -m thermo_lib.studies.witness`` measures what is missing in ``reports/witness_points.json`` and, of time-aware
norms of the reference model, in ``reports/norms_points.json``, one point after the other, and writes
``reports/witness.json``. A run that is stopped goes on where it was.
"""

import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from thermo_lib.diffusion.states import Calibration, calibrate, forward_states, trajectory_states
from thermo_lib.evaluation.report import versions
from thermo_lib.evaluation.scores import Suite
from thermo_lib.evaluation.statistics import interval
from thermo_lib.files.folders import write_folder
from thermo_lib.files.tensors import WEIGHTS_NAME
from thermo_lib.files.text import write_json
from thermo_lib.models.lm import DiffusionLM, load_model
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.parts import GPTQ, LeastSquares, PathKL, RoundToNearest, Sequential, TimeNorms, Trellis
from thermo_lib.studies.grid import Grid, Inputs, Point, PointRow, point
from thermo_lib.studies.smoothing import gain, path_kl_change, verdicts
from thermo_lib.studies.variance import FACTORS, variance_shares

WHEEL = "antiberty==0.1.3"
SHA256 = "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a"
FOLDER = Path("artifacts/antiberty")
POINTS = Path("reports/witness_points.json")
NORMS_POINTS = Path("reports/norms_points.json")
REPORT = Path("reports/witness.json")
TIMESTEPS = 16
SEEDS = (0, 1, 2)
PRECISIONS = (4, None, 8)  # bits of activations
METHODS = (None, "linear", "cubic", "sigmoid")
COLUMNS = {
    "method": ("method", "{}"),
    "bpw": ("bits_per_weight", "{:.3f}"),
    "A": ("activation_bits", "{}"),
    "seeds": ("seeds", "{}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "95 %": ("accuracy_ci", "{0[0]:.3f}..{0[1]:.3f}"),
    "path KL": ("path_kl", "{:.1f}"),
    "path KL, 95 %": ("path_kl_ci", "{0[0]:.1f}..{0[1]:.1f}"),
    "gain": ("gain", "{:+z.1%}"),
    "change": ("change", "{:+z.2f}"),
    "change, 95 %": ("change_ci", "{0[0]:+z.2f}..{0[1]:+z.2f}"),
}
BOTH_COLUMNS = {
    "method": ("method", "{}"),
    "reference": ("reference", "{:.1f}"),
    "witness": ("witness", "{:.1f}"),
    "reference, share": ("reference_share", "{:.3f}"),
    "witness, share": ("witness_share", "{:.3f}"),
}
NORM_COLUMNS = {
    "model": ("model", "{}"),
    "weights": ("quantizer", "{}"),
    "sets": ("count", "{}"),
    "smoothing": ("smoothing", "{}"),
    "seeds": ("seeds", "{}"),
    "bpw": ("bits_per_weight", "{:.3f}"),
    "accuracy": ("accuracy", "{:.4f}"),
    "path KL": ("path_kl", "{:.2f}"),
    "change": ("change", "{:+z.3f}"),
    "95 %": ("change_ci", "{0[0]:+z.3f}..{0[1]:+z.3f}"),
}
# Methods that were measured on the reference model: what they are called in ``reports/peers.json``.
_ON_REFERENCE = {
    "round-to-nearest": ("round-to-nearest", "group 128"),
    "GPTQ": ("thermo_lib GPTQ", "group 128"),
    "trellis, even": ("thermo_lib trellis", "2 bits a column"),
    "trellis, spread": ("thermo_lib trellis", "spread bits"),
    "trellis, sequential": ("thermo_lib trellis", "spread bits, sequential"),
    "trellis, sequential, network": ("thermo_lib trellis", "all phases"),
}
_INSIDE = "antiberty/trained_models/"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_TOKENS = ("pad_token", "unk_token", "cls_token", "eos_token", "mask_token")


def fetch(folder: Path = FOLDER) -> Path:
    """The model's folder, made from the wheel if it isn't there.

    Raises:
        RuntimeError: the wheel can't be downloaded, or has another hash.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return folder
    with tempfile.TemporaryDirectory() as name:
        wanted = Path(name, "requirements.txt")
        wanted.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command = [*pip, "--only-binary", ":all:", "--dest", name, "--requirement", str(wanted)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            raise RuntimeError(f"pip download {WHEEL}: {found.stderr.strip()}")
        (wheel,) = Path(name).glob("*.whl")
        convert(wheel, folder)
    return folder


def convert(wheel: Path, folder: Path) -> None:
    """Write the masked language model in a wheel of ``antiberty`` as a folder that ``load_model`` reads.

    Left out are the heads for species, chain and graft, and the pooler that only they use.
    """
    with zipfile.ZipFile(wheel) as file:
        pickle = io.BytesIO(file.read(f"{_INSIDE}AntiBERTy_md_smooth/pytorch_model.bin"))
        config = json.loads(file.read(f"{_INSIDE}AntiBERTy_md_smooth/config.json"))
        letters = file.read(f"{_INSIDE}vocab.txt").decode().split()
    tensors: dict[str, Tensor] = torch.load(pickle, weights_only=True, map_location="cpu")
    used = ("bert.embeddings.", "bert.encoder.", "cls.predictions.")
    kept = {name: tensor.clone() for name, tensor in tensors.items() if name.startswith(used)}
    for name in ("bert.embeddings.position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"):
        kept.pop(name, None)  # counted, or tied
    config |= {"architectures": ["BertForMaskedLM"], "mask_token_id": letters.index("[MASK]")}
    config.pop("_name_or_path", None)
    generation = {"suppress_tokens": [letters.index(token) for token in _SPECIAL]}
    settings = {"tokenizer_class": "EsmTokenizer"} | dict(zip(_TOKENS, (*_SPECIAL, "[MASK]"), strict=True))

    def write(target: Path) -> None:
        save_file(kept, target / WEIGHTS_NAME, metadata={"format": "pt"})
        (target / "vocab.txt").write_text("\n".join(letters) + "\n", encoding="utf-8")
        for name, content in (
            ("config.json", config),
            ("generation_config.json", generation),
            ("tokenizer_config.json", settings),
        ):
            write_json(target / name, content)

    folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder(folder, write)


def starts(lm: DiffusionLM, count: int, residues: int) -> tuple[Tensor, Tensor]:
    """All masks between ``[CLS]`` and ``[SEP]``.

    Returns:
        ids int64 ``(count, residues + 2)``, and where the masks are, bool of that shape.
    """
    ids = torch.full((count, residues + 2), lm.mask_token_id)
    ids[:, 0], ids[:, -1] = (lm.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    return ids, ids == lm.mask_token_id


@dataclass(frozen=True)
class WitnessInputs:
    """What the points are calibrated and evaluated on, all of it drawn by the model itself.

    Attributes:
        sequences: number of held-out sequences, by which accuracy is measured.
        trajectories: number of trajectories, by which path KL is measured.
        residues: of both.
        calibration_sequences: number of sequences of each length in ``calibration_residues``.
        calibration_residues: the lengths.
    """

    sequences: int = 16
    trajectories: int = 48
    residues: int = 120
    calibration_sequences: int = 16
    calibration_residues: tuple[int, ...] = (110, 120, 130)

    def suite(self, reference: DiffusionLM, timesteps: int) -> Suite:
        """What points are evaluated on; seeds 1,000 and 1,001, of which calibration sees nothing."""

        def drawn(count: int, seed: int) -> Any:
            return trajectory_states(reference, *starts(reference, count, self.residues), timesteps, seed)

        clean = drawn(self.sequences, 1_000)[torch.arange(self.sequences)].clean
        _, allowed = starts(reference, self.sequences, self.residues)
        held_out = forward_states(clean, allowed, timesteps, reference.mask_token_id, 1_000)
        return Suite(reference, held_out, drawn(self.trajectories, 1_001), [], timesteps)

    def calibration(self, reference: DiffusionLM, timesteps: int, seed: int) -> Calibration:
        """The model's own trajectories of a seed."""
        batches = [starts(reference, self.calibration_sequences, length) for length in self.calibration_residues]
        return calibrate(reference, batches, timesteps=timesteps, seed=seed, progress=False)


_PLAIN: dict[str, Any] = {"activations": None, "time_groups": None, "timesteps": TIMESTEPS}
_EVEN = Trellis(bits=2, spread=False, token_weights="uniform", beam=16)
_SPREAD = Trellis(beam=16)
_FIRST: dict[str, dict[str, Any]] = {
    "round-to-nearest": {"weights": RoundToNearest()},
    "least squares": {"weights": LeastSquares()},
    "GPTQ": {"weights": GPTQ()},
    "trellis, even": {"weights": _EVEN},
    "trellis, spread": {"weights": _SPREAD},
    "trellis, sequential": {"weights": _SPREAD, "training": (Sequential(),)},
    "trellis, sequential, network": {"weights": _SPREAD, "training": (Sequential(), PathKL(what="network"))},
}


def method_points(name: str, seeds: Sequence[int] = SEEDS) -> list[Point]:
    """The points of a method for the weights, one a seed; one in all where nothing is calibrated."""
    config = ThermoConfig(**_PLAIN | _FIRST[name])
    return [Point(config, seed) for seed in (seeds if config.needs_calibration else seeds[:1])]


def _activations(bits: int | None, **more: Any) -> dict[str, Any]:
    ranges = {"activations": None if bits is None else {"ranges": "static", "bits": bits}}
    return {"weights": GPTQ(), "timesteps": TIMESTEPS, **ranges, **more}


def question_points(bits: int | None, seeds: Sequence[int] = SEEDS) -> dict[str, list[Point]]:
    """The seed project's question at one precision: what time groups and their smoothing do for GPTQ's weights.

    Args:
        bits: of the activations; None leaves them as they are, and the weights' scales depend on the time.
        seeds: of the calibration.
    """
    three = _activations(bits, time_groups={"count": 3, "smoothing": None})
    every = _activations(bits, time_groups={"count": TIMESTEPS, "smoothing": None})
    found = {
        "one": [point(seed, **_activations(bits, time_groups=None)) for seed in seeds],
        **{f"3 groups, {method or 'not smoothed'}": [point(s, method, **three) for s in seeds] for method in METHODS},
        "one for each timestep": [point(seed, **every) for seed in seeds],
    }
    if bits is not None:
        dynamic = {"weights": GPTQ(), "timesteps": TIMESTEPS, "activations": {"ranges": "dynamic", "bits": bits}}
        found["dynamic"] = [point(seed, **dynamic, time_groups=None) for seed in seeds]
    return found


def norm_points(weights: str, count: int, smoothing: str | None, seeds: Sequence[int] = SEEDS) -> list[Point]:
    """Time-aware norms, trained for path KL on fresh states, one point a seed."""
    norms = TimeNorms(count=count, smoothing=smoothing, states="fresh", steps=300)
    config = ThermoConfig(**_PLAIN | _FIRST[weights] | {"training": (norms,)})
    return [Point(config, seed) for seed in seeds]


NORMS_OF = ("GPTQ", "trellis, even")
NORMS: tuple[tuple[int, str | None], ...] = (
    (1, None),
    (3, None),
    (3, "linear"),
    (3, "sigmoid"),
    (3, "spline"),
    (TIMESTEPS, None),
)


def plan() -> list[list[Point]]:
    """Everything that is measured of the witness, in its order: a run that is stopped leaves the first of it."""
    plain = [p for name in _FIRST if "sequential" not in name for p in method_points(name)]
    trained = [p for name in _FIRST if "sequential" in name for p in method_points(name, SEEDS[:1])]
    found = []
    for seed in SEEDS:
        found += [[p for p in plain if p.calibration_seed == seed], _norms("GPTQ", NORMS[:3], seed)]
        for bits in PRECISIONS:
            found.append([p for points in question_points(bits, (seed,)).values() for p in points])
        found.append([p for p in trained if p.calibration_seed == seed])
    return found + norms_plan()


def norms_plan() -> list[list[Point]]:
    """What is measured of time-aware norms, of both models."""
    return [_norms(weights, NORMS, seed) for seed in SEEDS for weights in NORMS_OF]


def _norms(weights: str, settings: Sequence[tuple[int, str | None]], seed: int) -> list[Point]:
    return [p for setting in settings for p in norm_points(weights, *setting, (seed,))]


def _complete(grid: Grid, bits: int | None) -> tuple[int, ...]:
    """The seeds with which everything was measured at one precision."""
    every = {seed: question_points(bits, (seed,)).values() for seed in SEEDS}
    return tuple(s for s, found in every.items() if all(p.key in grid.rows for points in found for p in points))


def _row(rows: Sequence[PointRow], method: str, activation_bits: int) -> dict[str, Any]:
    """A row of ``witness.json``: means over seeds, intervals over sequences."""
    accuracies, paths = (
        np.mean([getattr(row, name) for row in rows], axis=0)
        for name in ("accuracy_per_sequence", "path_kl_per_sequence")
    )
    return {
        "method": method,
        "bits_per_weight": rows[0].bits_per_weight,
        "activation_bits": activation_bits,
        "seeds": len(rows),
        "accuracy": float(accuracies.mean()),
        "accuracy_ci": list(interval(lambda index: float(accuracies[index].mean()), len(accuracies))),
        "path_kl": float(paths.mean()),
        "path_kl_ci": list(interval(lambda index: float(paths[index].mean()), len(paths))),
    }


def _available(grid: Grid, points: Iterable[Point]) -> list[PointRow]:
    return [grid[p] for p in points if p.key in grid.rows]


def report(grid: Grid, reference: Grid, variance: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``reports/witness.json``, of what has been measured.

    Args:
        grid: of the witness.
        reference: of time-aware norms of the reference model.
        variance: model to what ``variances`` returns.
    """
    rows, targets, norms = [], [], []
    for name in _FIRST:
        if found := _available(grid, method_points(name)):
            rows.append(_row(found, name, 16))
    for bits in PRECISIONS:
        if seeds := _complete(grid, bits):
            question = {name: [grid[p] for p in points] for name, points in question_points(bits, seeds).items()}
            for name, found in question.items():
                rows.append(_row(found, f"GPTQ, {name}", bits or 16) | _against(question["one"], found))
            rough = _activations(bits, time_groups={"count": 3, "smoothing": None})
            targets += verdicts(grid, rough, METHODS[1:], seeds)
    for model, measured in {"reference": reference, WHEEL: grid}.items():
        for weights in NORMS_OF:
            for setting in NORMS:
                norms += _norm_rows(measured, model, weights, *setting)
    return {
        "model": WHEEL,
        "versions": versions(),
        "seeds": list(SEEDS),
        "timesteps": TIMESTEPS,
        "rows": rows,
        "targets": targets,
        "time_norms": norms,
        "variance": variance,
    }


def variances(lm: DiffusionLM, inputs: Inputs | WitnessInputs) -> dict[str, Any]:
    """Where the variance of activations' ranges lies, see ``variance_shares``.

    Returns:
        ``shares``: factor to its share with each seed; ``tokens``: layer to what time and token state explain of a
        token's range, mean over seeds.
    """
    found = [variance_shares(lm, inputs.calibration(lm, TIMESTEPS, seed)) for seed in SEEDS]
    layers = {
        layer: {factor: float(np.mean([one["tokens"][layer][factor] for one in found])) for factor in factors}
        for layer, factors in found[0]["tokens"].items()
    }
    return {"shares": {factor: [one["shares"][factor] for one in found] for factor in FACTORS}, "tokens": layers}


def _against(one: Sequence[PointRow], found: Sequence[PointRow]) -> Mapping[str, Any]:
    """What differs from one range or scale for all timesteps, relative accuracy and nats, paired by sequence."""
    if found == one:
        return {}
    gained, gained_ci = gain(found, one)
    change, change_ci = path_kl_change(found, one)
    return {"gain": gained, "gain_ci": list(gained_ci), "change": change, "change_ci": list(change_ci)}


def _norm_rows(grid: Grid, model: str, weights: str, count: int, smoothing: str | None) -> list[dict[str, Any]]:
    """A row of ``time_norms``, of the seeds that were measured; none without any."""
    pairs = zip(norm_points(weights, count, smoothing), norm_points(weights, 1, None), strict=True)
    both = [(grid[a], grid[b]) for a, b in pairs if a.key in grid.rows and b.key in grid.rows]
    if not both:
        return []
    found, twins = zip(*both, strict=True)
    change, change_ci = (0.0, (0.0, 0.0)) if count == 1 else path_kl_change(found, twins)
    return [
        {
            "model": model,
            "quantizer": weights,
            "activation_bits": 16,
            "count": count,
            "smoothing": smoothing,
            "seeds": len(found),
            "bits_per_weight": found[0].bits_per_weight,
            "accuracy": float(np.mean([row.accuracy for row in found])),
            "path_kl": float(np.mean([row.path_kl for row in found])),
            "change": change,
            "change_ci": list(change_ci),
        }
    ]


def both_models(
    peers: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], baseline: str
) -> list[dict[str, Any]]:
    """Path KL of the methods that were measured on both models, in nats and as a share of a baseline's.

    Args:
        peers: the rows of ``reports/peers.json``, of the reference model.
        rows: of ``reports/witness.json``.
        baseline: a method that was measured on both.
    """
    by_name = {(row["method"], row["setting"]): row["path_kl"] for row in peers}
    ours = {row["method"]: row["path_kl"] for row in rows}
    both = {m: (by_name[named], ours[m]) for m, named in _ON_REFERENCE.items() if named in by_name and m in ours}
    if baseline not in both:
        raise ValueError(f"baseline: found {baseline!r}, allowed are {', '.join(both)}")
    return [
        {
            "method": method,
            "reference": reference,
            "witness": witness,
            "reference_share": reference / both[baseline][0],
            "witness_share": witness / both[baseline][1],
        }
        for method, (reference, witness) in both.items()
    ]


def main() -> None:
    """Measure what is missing, and write the report after each part of the plan."""
    grid = Grid(POINTS, load_model(str(fetch())), WitnessInputs())
    reference = Grid(NORMS_POINTS, load_model("reference"))
    variance = {
        "reference": variances(reference.reference, Inputs(code_sequences=8, puzzles=4)),
        WHEEL: variances(grid.reference, WitnessInputs(calibration_sequences=4)),
    }
    work = [(grid, points) for points in plan()] + [(reference, points) for points in norms_plan()]
    for measured, points in work:
        measured.run(points)
        write_json(REPORT, report(grid, reference, variance))


if __name__ == "__main__":
    main()

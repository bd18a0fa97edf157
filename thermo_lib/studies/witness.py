"""A second witness: the study's questions on a model that nobody here trained.

AntiBERTy (Ruffolo et al., arXiv 2112.07782; 26 million parameters, a BERT that has seen 558 million antibodies; MIT) is
a masked language model. Denoising starts from all masks between ``[CLS]`` and ``[SEP]``; special tokens are never
drawn. Its weights are in the wheel ``antiberty`` of the Python package index: one file is taken out of it, and nothing
of it is installed or run.
"""

import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from thermo_lib.data.puzzles import token_id
from thermo_lib.diffusion.states import Calibration, calibrate, forward_states, trajectory_states
from thermo_lib.evaluation.scores import Suite, accuracy_per_sequence, masked_token_scores
from thermo_lib.files.folders import write_folder
from thermo_lib.files.tensors import WEIGHTS_NAME
from thermo_lib.files.text import write_json
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.parts import (
    GPTQ,
    LeastSquares,
    PathKL,
    RoundToNearest,
    Sequential,
    SmoothingMethod,
    TimeNorms,
    Trellis,
)
from thermo_lib.studies.grid import Point, point

WHEEL = "antiberty==0.1.3"
SHA256 = "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a"
FOLDER = Path("artifacts/antiberty")
TIMESTEPS = 16
SEEDS = (0, 1, 2)
PRECISIONS = (4, None, 8)  # bits of activations
METHODS = (None, "linear", "cubic", "sigmoid")
PUBLIC = (  # the heavy and the light chain that the description of the published package shows
    "EVQLVQSGPEVKKPGTSVKVSCKASGFTFMSSAVQWVRQARGQRLEWIGWIVIGSGNTNYAQKFQERVTITRDMSTSTAYMELSSLRSEDTAVYYCAAPYCSSISCNDGFDIWGQGTMVTVS",
    "DVVMTQTPFSLPVSLGDQASISCRSSQSLVHSNGNTYLHWYLQKPGQSPKLLIYKVSNRFSGVPDRFSGSGSGTDFTLKISRVEAEDLGVYFCSQSTHVPYTFGGGTKLEIK",
)
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

    write_folder(folder, write)


def starts(lm: DiffusionLM, count: int, residues: int) -> tuple[Tensor, Tensor]:
    """All masks between ``[CLS]`` and ``[SEP]``.

    Returns:
        ids int64 ``(count, residues + 2)``, and where the masks are, bool of that shape.
    """
    ids = torch.full((count, residues + 2), lm.mask_token_id)
    ids[:, 0], ids[:, -1] = (token_id(lm.tokenizer, token) for token in ("[CLS]", "[SEP]"))
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
        batches: list[tuple[Tensor, Tensor | None]] = [
            starts(reference, self.calibration_sequences, length) for length in self.calibration_residues
        ]
        return calibrate(reference, batches, timesteps=timesteps, seed=seed, progress=False)


def public_accuracy(lm: DiffusionLM, timesteps: int = TIMESTEPS, masks: int = 32) -> Tensor:
    """Masked-token accuracy on the two sequences that its authors show.

    Args:
        lm: the model, full precision or quantized.
        timesteps: ``T``; masks are drawn at the ratio of each.
        masks: drawn of each sequence and timestep, with seed 1,002.

    Returns:
        float64 ``(masks,)``: the accuracy with each of them, mean over timesteps and sequences.
    """
    found = []
    for letters in PUBLIC:
        ids, allowed = starts(lm, masks, len(letters))
        ids[:, 1:-1] = torch.tensor([token_id(lm.tokenizer, letter) for letter in letters])
        states = forward_states(ids, allowed, timesteps, lm.mask_token_id, 1_002)
        correct, masked, _ = masked_token_scores(lm, states, timesteps)
        found.append(accuracy_per_sequence(correct, masked))
    return torch.stack(found).mean(0)


_PLAIN: dict[str, Any] = {"activations": None, "time_groups": None, "timesteps": TIMESTEPS}
_EVEN = Trellis(bits=2, spread=False, token_weights="uniform", beam=16)
_SPREAD = Trellis(beam=16)
FIRST: dict[str, dict[str, Any]] = {
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
    config = ThermoConfig(**_PLAIN | FIRST[name])
    return [Point(config, seed) for seed in (seeds if config.needs_calibration else seeds[:1])]


def at_precision(bits: int | None, **more: Any) -> dict[str, Any]:
    ranges = {"activations": None if bits is None else {"ranges": "static", "bits": bits}}
    return {"weights": GPTQ(), "timesteps": TIMESTEPS, **ranges, **more}


def question_points(bits: int | None, seeds: Sequence[int] = SEEDS) -> dict[str, list[Point]]:
    """The seed project's question at one precision: what time groups and their smoothing do for GPTQ's weights.

    Args:
        bits: of the activations; None leaves them as they are, and the weights' scales depend on the time.
        seeds: of the calibration.
    """
    three = at_precision(bits, time_groups={"count": 3, "smoothing": None})
    every = at_precision(bits, time_groups={"count": TIMESTEPS, "smoothing": None})
    found = {
        "one": [point(seed, **at_precision(bits, time_groups=None)) for seed in seeds],
        **{f"3 groups, {method or 'not smoothed'}": [point(s, method, **three) for s in seeds] for method in METHODS},
        "one for each timestep": [point(seed, **every) for seed in seeds],
    }
    if bits is not None:
        ranges = {"ranges": "dynamic", "bits": bits}
        dynamic = {**at_precision(None, time_groups=None), "activations": ranges}
        found["dynamic"] = [point(seed, **dynamic) for seed in seeds]
    return found


def norm_points(
    weights: str, count: int, smoothing: SmoothingMethod | None, seeds: Sequence[int] = SEEDS
) -> list[Point]:
    """Time-aware norms, trained for path KL on fresh states, one point a seed."""
    norms = TimeNorms(count=count, smoothing=smoothing, states="fresh", steps=300)
    config = ThermoConfig(**_PLAIN | FIRST[weights] | {"training": (norms,)})
    return [Point(config, seed) for seed in seeds]


NORMS_OF = ("GPTQ", "trellis, even")
NormSetting = tuple[int, SmoothingMethod | None]  # number of sets, and how they are smoothed
NORMS: tuple[NormSetting, ...] = (
    (1, None),
    (3, None),
    (3, "linear"),
    (3, "sigmoid"),
    (3, "spline"),
    (TIMESTEPS, None),
)


def plan() -> list[list[Point]]:
    """Everything that is measured of the witness, in its order: a run that is stopped leaves the first of it."""
    plain = [p for name in FIRST if "sequential" not in name for p in method_points(name)]
    trained = [p for name in FIRST if "sequential" in name for p in method_points(name, SEEDS[:1])]
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


def _norms(weights: str, settings: Sequence[NormSetting], seed: int) -> list[Point]:
    return [p for setting in settings for p in norm_points(weights, *setting, (seed,))]

"""Time-aware norms against one set of norms that is trained alike: paired differences in path KL.

Every variant is trained from the same quantized model on the same states, and so is its twin, ``count=1``. What one has
over the other is the time groups' doing, and not the training's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from thermo_lib.diffusion.path_kl import path_kl, reference_logits
from thermo_lib.diffusion.prompts import Prompts
from thermo_lib.diffusion.states import Calibration, States
from thermo_lib.evaluation.statistics import RESAMPLES, interval
from thermo_lib.files.folders import remove
from thermo_lib.files.snapshots import digest
from thermo_lib.files.text import read_object, write_json
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.model import QuantizedLM
from thermo_lib.pipeline.parts import TimeNorms
from thermo_lib.pipeline.phases import first_starts
from thermo_lib.pipeline.training import train_time_norms

_OUTPUTS = 2**28  # numbers of the full-precision outputs that are kept from variant to variant

COLUMNS = {
    "sets": ("count", "{}"),
    "smoothing": ("smoothing", "{}"),
    "trained": ("what", "{}"),
    "activation bits": ("activation_bits", "{}"),
    "bits per weight": ("bits_per_weight", "{:.3f}"),
    "path KL": ("path_kl", "{:.2f}"),
    "change": ("change", "{:+z.2f}"),
    "95 %": ("change_ci", "{0[0]:+z.2f}..{0[1]:+z.2f}"),
}


def twin(phase: TimeNorms) -> TimeNorms:
    """The phase with one set of norms, trained in the same way."""
    return TimeNorms(**phase.model_dump(exclude={"phase", "count", "starts", "smoothing", "window"}) | {"count": 1})


class TimeNormsStudy:
    """Variants of time-aware norms of one model, kept in a JSON file that is rewritten whole after every one.

    Training that was stopped goes on from its snapshots beside the file, with the same result.

    Args:
        path: the file; what it holds isn't trained again.
        reference: the full-precision model.
        start: the quantized model from which all variants are trained; it stays as it is.
        states: held-out trajectories of the full-precision model, see ``trajectory_states``; their number of timesteps
            is that of the start's configuration.
        calibration: states to train on; not needed for fresh ones with prompts.
        prompts: what fresh states start from; by default what the calibration states do.

    Raises:
        ValueError: the file holds variants of other weights or states.
    """

    def __init__(
        self,
        path: str | Path,
        reference: DiffusionLM,
        start: QuantizedLM,
        states: States,
        calibration: Calibration | None = None,
        *,
        prompts: Sequence[Prompts] | None = None,
    ):
        self.path, self.reference, self.start, self.states = Path(path), reference, start, states
        self.calibration, self.prompts = calibration, prompts
        seen: dict[str, Tensor] = {} if calibration is None else calibration.tensors()
        starts = {} if prompts is None else first_starts(prompts, 0)
        self.made_of = {
            "weights": digest(reference.identity()),
            "start": digest(start.identity(), start.config.to_dict()),
            "states": digest(vars(states), seen, starts),
            "torch": str(torch.__version__),
        }
        self.rows: dict[str, dict[str, Any]] = {}
        self._outputs: list[Tensor] | None = None
        if self.path.is_file():
            content = read_object(self.path)
            if content["made_of"] != self.made_of:
                raise ValueError(f"{self.path}: found variants of other weights or states, delete it to start anew")
            self.rows = content["rows"]

    def run(
        self, variants: Sequence[TimeNorms | Mapping[str, Any]], *, seeds: Sequence[int] = (0,), progress: bool = False
    ) -> list[dict[str, Any]]:
        """Train what is missing of the variants and their twins, and compare them.

        Args:
            variants: phases ``TimeNorms``, or their settings.
            seeds: of the order in which states are drawn, of the chains for fresh ones.
            progress: show a bar.

        Returns:
            One row a variant: its settings (``count``, ``starts``, ``smoothing``, ``window``, ``what``),
            ``activation_bits``, ``bits_per_weight``, ``path_kl`` (nats per sequence, seeds averaged) and that of the
            ``twin`` and of the ``start``, ``change`` (``path_kl - twin``) and ``change_ci``, its 95 % interval by
            bootstrap over sequences and seeds.

        Raises:
            ValueError: a wrong setting, no seed or one that is there twice, or missing calibration.
        """
        phases = [self._acting(one if isinstance(one, TimeNorms) else TimeNorms(**one)) for one in variants]
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds: found {list(seeds)}, allowed is at least one, each of them once")
        for phase in phases:
            if self.calibration is None and (phase.states == "calibration" or self.prompts is None):
                raise ValueError(f"calibration: found None, required by states={phase.states!r}")
        wanted = {self._key(each, seed): (each, seed) for each in [*map(twin, phases), *phases] for seed in seeds}
        missing = {key: each for key, each in wanted.items() if key not in self.rows}
        if "start" not in self.rows:
            self._keep("start", self._measured(self.start))
        for key, (phase, seed) in tqdm(missing.items(), desc="time norms", disable=not progress):
            snapshots = self.path.with_name(f"{self.path.name}.snapshots") / key
            settings = phase.model_dump(exclude={"phase"})
            trained = train_time_norms(
                replace(self.start, config=self.start.config.replace(seed=seed)),
                self.reference,
                self.calibration,
                prompts=self.prompts,
                resume=snapshots,
                progress=progress,
                **settings,
            )
            self._keep(key, self._measured(trained) | {"phase": phase.model_dump(mode="json"), "seed": seed})
            remove(snapshots)
        return [self._row(phase, seeds) for phase in phases]

    def _acting(self, phase: TimeNorms) -> TimeNorms:
        """The phase with the window that acts."""
        config = self.start.config
        return config.replace(training=(*config.training, phase)).time_norms

    def _key(self, phase: TimeNorms, seed: int) -> str:
        return digest(phase.model_dump(mode="json"), seed)

    def _measured(self, lm: QuantizedLM) -> dict[str, Any]:
        timesteps, vocabulary = self.start.config.timesteps, self.reference.model.config.vocab_size
        if self._outputs is None and int(self.states.is_masked.sum()) * vocabulary <= _OUTPUTS:
            self._outputs = reference_logits(self.reference, self.states, timesteps)
        found = path_kl(self.reference, lm, self.states, timesteps, reference_outputs=self._outputs)
        bits = round(lm.bits_per_weight, 6)
        return {"path_kl": found.per_sequence.sum(1).tolist(), "bits_per_weight": bits}

    def _keep(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = json.loads(json.dumps(row))
        write_json(self.path, {"made_of": self.made_of, "rows": self.rows})

    def _row(self, phase: TimeNorms, seeds: Sequence[int]) -> dict[str, Any]:
        found, twins = (
            np.array([self.rows[self._key(each, seed)]["path_kl"] for seed in seeds]) for each in (phase, twin(phase))
        )  # (seeds, sequences)
        row = self.rows[self._key(phase, seeds[0])]
        settings = {name: row["phase"][name] for name in ("count", "starts", "smoothing", "window", "what")}
        change, ci = paired_change(found - twins)
        return settings | {
            "activation_bits": self.start.config.activation_bits,
            "bits_per_weight": row["bits_per_weight"],
            "path_kl": float(found.mean()),
            "twin": float(twins.mean()),
            "start": float(np.mean(self.rows["start"]["path_kl"])),
            "change": change,
            "change_ci": list(ci),
        }


def paired_change(differences: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, tuple[float, float]]:
    """The mean of paired differences ``(seeds, sequences)``, with its 95 % bootstrap interval over both."""
    seeds, sequences = differences.shape
    generator = np.random.default_rng(1)

    def mean(index: np.ndarray) -> float:
        return float(differences[generator.integers(seeds, size=seeds)][:, index].mean())

    return float(differences.mean()), interval(mean, sequences, resamples)

"""The models that the peers quantize: the reference model, and AntiBERTy, the second witness."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thermo_lib.diffusion.states import Calibration, calibrate
from thermo_lib.evaluation.scores import Suite, build_suite
from thermo_lib.files.tensors import WEIGHTS_NAME
from thermo_lib.models.lm import REFERENCE_DIR, DiffusionLM, load_model
from thermo_lib.studies import witness
from thermo_lib.studies.peers import FOLDER, PEERS_REPORT, WITNESS_REPORT


@dataclass(frozen=True)
class Subject:
    """A model that every peer quantizes on the same states, and is scored on with the same inputs.

    Attributes:
        model_folder: of the full-precision model.
        load: loads it, and fetches it first where it isn't there.
        states: draws the calibration states.
        suite: what quantized models are scored on.
        folder: where results lie until they are scored.
        report: the JSON file with the scores.
    """

    model_folder: Path
    load: Callable[[], DiffusionLM]
    states: Callable[[DiffusionLM], Calibration]
    suite: Callable[[DiffusionLM], Suite]
    folder: Path
    report: Path

    @property
    def calibration_path(self) -> Path:
        """The calibration states, drawn once for all peers."""
        return self.folder / "calibration.safetensors"

    def calibration(self, lm: DiffusionLM) -> Calibration:
        """The states, read where they have been drawn before."""
        if self.calibration_path.is_file():
            return Calibration.load(self.calibration_path)
        calibration = self.states(lm)
        calibration.save(self.calibration_path)
        return calibration

    def digest(self) -> "hashlib._Hash":
        """Of model and calibration states."""
        found = hashlib.sha256()
        for path in (self.model_folder / WEIGHTS_NAME, self.calibration_path):
            found.update(path.read_bytes())
        return found


REFERENCE = Subject(
    model_folder=REFERENCE_DIR,
    load=lambda: load_model("reference"),
    states=calibrate,
    suite=build_suite,
    folder=FOLDER,
    report=PEERS_REPORT,
)
SUBJECTS = {
    "reference": REFERENCE,
    "antiberty": Subject(
        model_folder=witness.FOLDER,
        load=lambda: load_model(str(witness.fetch())),
        states=lambda lm: witness.WitnessInputs().calibration(lm, witness.TIMESTEPS, witness.SEEDS[0]),
        suite=lambda lm: witness.WitnessInputs().suite(lm, witness.TIMESTEPS),
        folder=Path("artifacts/peers-antiberty"),
        report=WITNESS_REPORT,
    ),
}

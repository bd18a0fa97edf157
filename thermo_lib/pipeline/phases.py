"""What a phase of training works on: its states, and the snapshots from which a stopped run goes on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from thermo_lib.diffusion.prompts import Prompts, prompts_of
from thermo_lib.diffusion.states import Calibration, calibrate
from thermo_lib.files.locks import locked
from thermo_lib.files.snapshots import Snapshot, digest, named, part_of
from thermo_lib.files.whole import sweep_inside
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.parts import PathKL, Phase, TimeNorms
from thermo_lib.transition.chains import Batch, Chains
from thermo_lib.transition.loss import TransitionLoss

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
AnyPhase = TypeVar("AnyPhase", bound=Phase)
_HELD: ContextVar[Path | None] = ContextVar("held", default=None)  # the folder of the function that is running


def alone_in_resume(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function that keeps snapshots the only one in the folder ``resume``, and tidy up after killed ones."""

    @wraps(function)
    def run(*arguments: Arguments.args, **more: Arguments.kwargs) -> Result:
        resume: Any = more.get("resume")
        folder = None if resume is None else Path(resume).resolve()
        if folder == _HELD.get():
            return function(*arguments, **more)
        token = _HELD.set(folder)
        try:
            if folder is None:
                return function(*arguments, **more)
            with locked(folder / "snapshots", said="resume: found another run keeping {}"):
                sweep_inside(folder)
                return function(*arguments, **more)
        finally:
            _HELD.reset(token)

    return run


def check_trainable(lm: DiffusionLM) -> None:
    """Raise ValueError for a model in float16 or bfloat16, where the steps of training are lost in rounding."""
    dtype = lm.model.dtype
    if dtype.itemsize < torch.float32.itemsize:
        allowed = (
            "allowed with training is float32: load_model without dtype, or quantize_checkpoint, a block at a time"
        )
        raise ValueError(f"lm: found a model in {dtype}, {allowed}")


@dataclass(frozen=True)
class PhaseRun(Generic[AnyPhase]):
    """A phase of training of one model.

    Attributes:
        phase: the settings.
        config: the configuration after the phase.
        reference: the full-precision model.
        source: where the states come from: the calibration, or what fresh states start from.
        snapshot: where progress is kept, under a digest of all that the result depends on; None for nowhere.
        progress: show bars.
    """

    phase: AnyPhase
    config: ThermoConfig
    reference: DiffusionLM
    source: Calibration | Sequence[Prompts]
    snapshot: Snapshot | None
    progress: bool

    @classmethod
    def of(
        cls,
        phase: AnyPhase,
        config: ThermoConfig,
        reference: DiffusionLM,
        calibration: Calibration | None,
        *,
        prompts: Sequence[Prompts] | None,
        resume: str | Path | None,
        progress: bool,
        name: str,
        start: DiffusionLM | None = None,
    ) -> "PhaseRun[AnyPhase]":
        """Choose the source of the states, and the snapshot.

        Args:
            phase, config, reference, progress: see the attributes.
            calibration: its states.
            prompts: what fresh states start from; None for what the calibration states do.
            resume: folder of the snapshots; None for none.
            name: of the snapshot's file.
            start: the quantized model that is trained; None where the phase makes it.

        Raises:
            ValueError: neither calibration nor prompts, where the phase needs them, or a model that can't be trained.
        """
        for lm in (reference, start):
            if lm is not None:
                check_trainable(lm)
        if calibration is not None:
            calibration.check_vocabulary(reference.model.config.vocab_size)
        is_fresh = phase.states == "fresh"
        if is_fresh and prompts is not None:
            source: Calibration | Sequence[Prompts] = prompts
        elif calibration is None:
            raise ValueError(f"calibration: found None, required by states={phase.states!r}")
        else:
            source = prompts_of(calibration, reference.mask_token_id) if is_fresh else calibration
        snapshot = None
        if resume is not None:
            seen = source.tensors() if isinstance(source, Calibration) else first_starts(source, config.seed)
            models = (lm.identity() for lm in (reference, start) if lm is not None)
            run = digest(config.digest(), str(torch.__version__), *models, seen)
            snapshot = Snapshot(Path(resume) / f"{name}.safetensors", run)
        return cls(phase, config, reference, source, snapshot, progress)

    def states(self) -> Calibration:
        """The states to train on: those of the calibration, or fresh ones, which no other seed makes."""
        if isinstance(self.source, Calibration):
            return self.source
        seed = self.config.seed + 2
        ids = [starts.draw(count, seed) for starts, count in _counted(self.source, self.phase)]
        return calibrate(
            self.reference,
            [(starts, starts == self.reference.mask_token_id) for starts in ids],
            timesteps=self.config.timesteps,
            source="trajectory",
            seed=seed,
            progress=self.progress,
        )

    def label(self, text: str) -> str | None:
        """The label of a progress bar, None where none is shown."""
        return text if self.progress else None


def weights_snapshot(
    reference: DiffusionLM, config: ThermoConfig, calibration: Calibration | None, resume: str | Path
) -> Snapshot:
    """Where the blocks are kept whose weights are quantized without training; arguments as for ``PhaseRun.of``."""
    states = {} if calibration is None else calibration.tensors()
    how = config.replace(training=()).digest()
    return Snapshot(
        Path(resume) / "weights.safetensors", digest(how, str(torch.__version__), reference.identity(), states)
    )


def first_starts(source: Sequence[Prompts], seed: int) -> dict[str, Tensor]:
    """What tells one source of prompts from another."""
    return {str(number): starts.draw(64, seed) for number, starts in enumerate(source)}


def _counted(source: Sequence[Prompts], phase: Phase) -> Iterator[tuple[Prompts, int]]:
    """Prompts with how many fresh sequences start from them, of those from which any do."""
    for starts in source:
        count = phase.num_texts if starts.is_empty else phase.num_prompts
        if count:
            yield starts, count


class FreshChains:
    """Chains of every source of prompts, a step of all at a time; see ``transition.chains.Draws``.

    Args:
        loss: the two models.
        source: what the chains start from.
        phase: how many there are, and whose steps they take.
        seed: seeds the steps.
    """

    def __init__(self, loss: TransitionLoss, source: Sequence[Prompts], phase: PathKL | TimeNorms, seed: int):
        self.chains = []
        for starts, count in _counted(source, phase):
            own = round(phase.own_share * count) if starts.is_empty else 0
            start = lambda number, starts=starts: starts.start(number, seed)  # noqa: E731
            self.chains.append(Chains(loss, start, count, own, seed))

    def step(self) -> Batch:
        """The present states of all chains and their targets."""
        return [chain.step() for chain in self.chains]

    def state(self) -> dict[str, Tensor]:
        """Of all chains."""
        states = (named(str(number), chain.state()) for number, chain in enumerate(self.chains))
        return {key: value for state in states for key, value in state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` returned."""
        for number, chain in enumerate(self.chains):
            chain.restore(part_of(state, str(number)))

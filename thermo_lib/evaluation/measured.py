"""Evaluations that aren't made twice: each is kept in a file, under a digest of everything that decides it."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from thermo_lib.data.corpus import token_stream
from thermo_lib.data.puzzles import TASK_LENGTH, Puzzle
from thermo_lib.diffusion.path_kl import PathKLEstimate
from thermo_lib.evaluation.scores import (
    Evaluation,
    PuzzlePaths,
    PuzzleResult,
    Suite,
    evaluate,
    puzzles_under_bound,
    solve_puzzles,
)
from thermo_lib.files.locks import locked
from thermo_lib.files.snapshots import Snapshot, digest, named, part_of
from thermo_lib.models.families import config_json
from thermo_lib.models.lm import DiffusionLM

_FORMAT = "evaluations 1"
_LIBRARY = Path(__file__).resolve().parent.parent
_BOUND = ("path_kl", "bound", "solved_reference", "solved", "difference")
_DECIDING = ("data", "diffusion", "models", "quant", "evaluation/scores.py")


class Measured:
    """A file of evaluations.

    An evaluation is found again only if the model's weights and settings, the inputs, the code that computes with them
    and torch's version are the same; what isn't found is measured.

    Args:
        path: the file; it needn't be there.

    Raises:
        ValueError: a damaged file, or one of another format.
    """

    def __init__(self, path: str | Path):
        self._snapshot = Snapshot(Path(path), _FORMAT, is_sealed=False)
        self._found = self._snapshot.load()
        self._used: dict[str, Tensor] = {}

    def _kept(self, key: str, *names: str) -> dict[str, Tensor]:
        """What is known of an evaluation, if anything is; raises ValueError where a tensor of it is missing."""
        kept = part_of(self._found, key)
        missing = [name for name in names if name not in kept]
        if kept and missing:
            where = f"{self._snapshot.path}: {key}.{missing[0]}"
            raise ValueError(f"{where}: found none, allowed is a tensor beside the others; delete the file")
        return kept

    def evaluate(self, lm: DiffusionLM, suite: Suite, *, progress: bool = False) -> Evaluation:
        """What ``scores.evaluate`` returns."""
        inputs = [_states(suite), [vars(puzzle) for puzzle in suite.puzzles], suite.timesteps, suite.sampler]
        key = digest(*_decided_by(lm), *_decided_by(suite.reference), *inputs, suite.temperature)
        kept = self._kept(key, "correct", "masked", "nll", "per_sequence", "cosine")
        if not kept:
            kept = _tensors(evaluate(lm, suite, progress=progress))
        self._used |= named(key, kept)
        return Evaluation(
            correct=kept["correct"].double(),
            masked=kept["masked"].double(),
            nll=kept["nll"],
            length=suite.held_out.ids.shape[1],
            path=PathKLEstimate(kept["per_sequence"], kept["cosine"]),
            puzzles=_result(kept["puzzles"]) if "puzzles" in kept else None,
            resamples=suite.resamples,
        )

    def solve_puzzles(
        self,
        lm: DiffusionLM,
        puzzles: list[Puzzle],
        timesteps: int = 16,
        *,
        task_length: int = TASK_LENGTH,
        progress: bool = False,
    ) -> PuzzleResult:
        """What ``scores.solve_puzzles`` returns with its defaults."""
        key = digest(*_decided_by(lm), [vars(puzzle) for puzzle in puzzles], timesteps, task_length)
        kept = self._kept(key, "puzzles")
        if not kept:
            found = solve_puzzles(lm, puzzles, timesteps, task_length=task_length, progress=progress)
            kept = {"puzzles": _as_bytes(found)}
        self._used |= named(key, kept)
        return _result(kept["puzzles"])

    def puzzles_under_bound(self, paths: PuzzlePaths, lm: DiffusionLM) -> dict[str, float]:
        """What ``scores.puzzles_under_bound`` returns."""
        inputs = [[vars(puzzle) for puzzle in paths.puzzles], paths.timesteps, paths.seed, paths.task_length]
        key = digest("under bound", *_decided_by(lm), *_decided_by(paths.reference), *inputs)
        kept = self._kept(key, *_BOUND)
        if not kept:
            found = puzzles_under_bound(paths, lm)
            kept = {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
        self._used |= named(key, kept)
        return {name: kept[name].item() for name in _BOUND}

    def token_counts(self, files: Mapping[str, str], tokenizer: Tokenizer) -> Tensor:
        """How often each token is in some files, with the token after each file; int64 ``(vocabulary,)``."""
        key = digest("token counts", dict(files), tokenizer.to_str(), _code())
        kept = self._kept(key, "counts")
        if not kept:
            tokens = token_stream(files, tokenizer).long()
            kept = {"counts": torch.bincount(tokens, minlength=tokenizer.get_vocab_size())}
        self._used |= named(key, kept)
        return kept["counts"]

    def save(self) -> None:
        """Write the file with what has been asked for since it was read, and what others have added; the rest goes.

        Raises:
            ValueError: the file has been damaged meanwhile.
            OSError: no space left, or no right to write; an earlier file is as it was.
        """
        with locked(self._snapshot.path, wait=True):
            added = {key: value for key, value in self._snapshot.load().items() if key not in self._found}
            self._snapshot.save(dict(sorted((added | self._used).items())))


def _tensors(found: Evaluation) -> dict[str, Tensor]:
    counts = {"correct": found.correct.to(torch.int16), "masked": found.masked.to(torch.int16)}
    path = {"per_sequence": found.path.per_sequence, "cosine": found.path.cosine}
    puzzles = {} if found.puzzles is None else {"puzzles": _as_bytes(found.puzzles)}
    return {**counts, "nll": found.nll, **path, **puzzles}


def _as_bytes(result: PuzzleResult) -> Tensor:
    """Answers as JSON, uint8."""
    return torch.tensor(list(json.dumps(vars(result)).encode()), dtype=torch.uint8)


def _result(stored: Tensor) -> PuzzleResult:
    return PuzzleResult(**json.loads(bytes(stored.tolist())))


def _states(suite: Suite) -> dict[str, Tensor]:
    return named("held_out", vars(suite.held_out)) | named("trajectories", vars(suite.trajectories))


def _decided_by(lm: DiffusionLM) -> list[object]:
    """What the outputs of a model depend on."""
    config = getattr(lm, "config", None)
    settings = None if config is None else config.to_dict()
    about = [config_json(lm.model.config), settings, lm.tokenizer.to_str(), lm.mask_token_id]
    return [lm.model.state_dict(), about, str(torch.__version__), _code()]


def _files() -> list[Path]:
    """The files with code that decides an evaluation."""
    paths = [_LIBRARY / part for part in _DECIDING]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))]
    return sorted(file for file in files if file.suffix in (".py", ".cpp"))


@cache
def _code() -> str:
    return digest(*([str(file.relative_to(_LIBRARY)), file.read_text(encoding="utf-8")] for file in _files()))

"""Evaluation of full-precision and quantized models on the same inputs, with paired statistics.

Accuracy and NELBO come from held-out files masked by the forward process, path KL and the cosine similarity of
the outputs from the full-precision model's own trajectories, and the share of solved puzzles from generation.
Every model sees the same sequences, masks and puzzles, so differences are paired; intervals are bootstrap
percentiles over sequences.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from thermo_lib.data import corpus
from thermo_lib.data.corpus import held_out_sequences
from thermo_lib.data.puzzles import (
    TASK_LENGTH,
    Puzzle,
    decode_answers,
    encode_puzzles,
    is_solution,
    knows_tasks,
    make_puzzles,
    read_jsonl,
)
from thermo_lib.data.texts import text_sequences
from thermo_lib.diffusion.cut import cut_to_blocks
from thermo_lib.diffusion.path_kl import PathKLEstimate, path_kl, reference_logits
from thermo_lib.diffusion.sampling import generate, unmask_probabilities
from thermo_lib.diffusion.states import States, forward_states, trajectory_states
from thermo_lib.evaluation.statistics import RESAMPLES, interval
from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.models.loaded import as_lm

_KEPT_LOGITS = 2**28  # a GiB in float32


@dataclass(frozen=True)
class Suite:
    """The inputs of an evaluation, the same for every model.

    Attributes:
        reference: the full-precision model.
        held_out: forward states of held-out code, every sequence at every timestep.
        trajectories: the reference's ancestral trajectories, every sequence at every timestep.
        puzzles: Sudoku puzzles that training never saw; empty where the model's tokenizer doesn't know the task.
        timesteps: ``T``.
        sampler, temperature: how the puzzles are answered.
        resamples: number of bootstrap samples of the intervals.
    """

    reference: DiffusionLM
    held_out: States
    trajectories: States
    puzzles: list[Puzzle]
    timesteps: int
    sampler: str = "entropy"
    temperature: float = 0.0
    resamples: int = RESAMPLES

    @cached_property
    def reference_outputs(self) -> list[Tensor] | None:
        """The reference's logits on ``trajectories``, see ``reference_logits``; None where they would be too many."""
        count = int(self.trajectories.is_masked.sum()) * self.reference.model.config.vocab_size
        return reference_logits(self.reference, self.trajectories, self.timesteps) if count <= _KEPT_LOGITS else None


@dataclass(frozen=True)
class PuzzleResult:
    """Answers to puzzles, in their order."""

    answers: list[str]
    solved: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of solved puzzles, 0-1."""
        return sum(self.solved) / len(self.solved)


@dataclass(frozen=True)
class Evaluation:
    """What one model did on a suite; rows are sequences, columns timesteps.

    Attributes:
        correct: float64 ``(sequences, timesteps)``, masked tokens whose likeliest token is right.
        masked: float64, same shape, masked tokens.
        nll: float64, same shape, summed negative log-likelihood of the masked tokens in nats.
        length: tokens of a sequence that are denoised.
        path: path KL and output similarity to the full-precision model.
        puzzles: the Sudoku puzzles; None where the suite has none.
        resamples: number of bootstrap samples of its intervals.
    """

    correct: Tensor
    masked: Tensor
    nll: Tensor
    length: int
    path: PathKLEstimate
    puzzles: PuzzleResult | None
    resamples: int = RESAMPLES

    @property
    def accuracy_per_timestep(self) -> Tensor:
        """Masked-token accuracy at each timestep, ``(timesteps,)``."""
        return self.correct.sum(0) / self.masked.sum(0)

    @property
    def accuracy(self) -> float:
        """Masked-token accuracy, mean over timesteps, 0-1."""
        return float(self.accuracy_per_timestep.mean())

    @property
    def nelbo(self) -> float:
        """Negative evidence lower bound of the T-step process in nats a token (arXiv 2406.07524, eq. 8)."""
        rho = unmask_probabilities(self.nll.shape[1])
        return float((self.nll.mean(0) * rho).sum() / self.length)


def build_suite(
    reference: DiffusionLM | MaskPredictor,
    *,
    timesteps: int = 16,
    sequences: int = 40,
    trajectories: int = 16,
    sudoku: int = 40,
    length: int = corpus.SEQUENCE_LENGTH,
    texts: Sequence[str] | None = None,
    sampler: str = "entropy",
    temperature: float = 0.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: bool = False,
) -> Suite:
    """The project's evaluation inputs for a reference model; of a block-causal one the last block of each text.

    Args:
        reference: the full-precision model, also one of ``transformers``' Auto classes.
        timesteps: number of denoising steps ``T``.
        sequences: number of held-out sequences.
        trajectories: number of the reference's own trajectories.
        sudoku: number of Sudoku puzzles; none where the tokenizer doesn't know the task.
        length: tokens of a sequence and of a trajectory.
        texts: what the sequences come from, see ``data.texts``; None for the project's held-out code.
        sampler, temperature: how the puzzles are answered, see ``generate``.
        resamples: number of bootstrap samples of the intervals.
        seed: seeds all of it.
        progress: show bars.
    """
    reference = as_lm(reference)
    if texts is None:
        code = held_out_sequences(corpus.load_corpus("test"), reference.tokenizer, sequences, length, seed)
    else:
        code = text_sequences(texts, reference.tokenizer, sequences, length, seed, reference.end_token_id)
    empty, cut = torch.full((trajectories, length), reference.mask_token_id), {"count": 1, "timesteps": timesteps}
    ((code, scored),) = cut_to_blocks(reference, code, None, own=False, seed=seed, **cut)
    ((empty, drawn),) = cut_to_blocks(reference, empty, None, own=True, seed=seed + 1, **cut)
    label = "trajectories" if progress else None
    paths = trajectory_states(reference, empty, drawn, timesteps, seed + 1, progress=label)
    puzzles = sudoku if knows_tasks(reference.tokenizer) else 0
    return Suite(
        reference=reference,
        held_out=forward_states(code, scored, timesteps, reference.mask_token_id, seed),
        trajectories=paths,
        puzzles=make_puzzles("sudoku", puzzles, seed, test=True),
        timesteps=timesteps,
        sampler=sampler,
        temperature=temperature,
        resamples=resamples,
    )


def solve_puzzles(
    lm: DiffusionLM,
    puzzles: list[Puzzle],
    timesteps: int = 16,
    *,
    sampler: str = "entropy",
    temperature: float = 0.0,
    task_length: int = TASK_LENGTH,
    seed: int = 0,
    progress: bool = False,
) -> PuzzleResult:
    """Generate an answer to every puzzle and check it; any valid solution is right.

    Args:
        lm: the model.
        puzzles: of one or several tasks.
        timesteps: number of denoising steps.
        sampler, temperature: see ``generate``.
        task_length: tokens of a puzzle.
        seed: seeds the sampler.
        progress: show a bar.
    """
    ids, is_answer = encode_puzzles(puzzles, lm.tokenizer, task_length)
    filled = generate(
        lm,
        torch.where(is_answer, lm.mask_token_id, ids),
        timesteps=timesteps,
        sampler=sampler,
        eps=0.0,
        block_length=0,  # together, so that a block-causal model doesn't need a timestep for each of its blocks
        temperature=temperature,
        seed=seed,
        batch_size=128,
        progress="puzzles" if progress else None,
    )
    answers = decode_answers(filled, is_answer, lm.tokenizer)
    return PuzzleResult(answers, [is_solution(p, a) for p, a in zip(puzzles, answers, strict=True)])


def evaluate_jsonl(
    lm: DiffusionLM | MaskPredictor, path: str | Path, task: str, *, progress: bool = False
) -> PuzzleResult:
    """Solve the puzzles of a JSONL file (one ``{"input": ..., "output": ...}`` a line).

    Args:
        lm: the model, also one of ``transformers``' Auto classes.
        path: the file.
        task: ``sudoku`` or ``countdown``.
        progress: show a bar.

    Raises:
        ValueError: unknown task, malformed line, or a puzzle that doesn't fit the model's task length.
    """
    return solve_puzzles(as_lm(lm), read_jsonl(path, task), progress=progress)


@dataclass(frozen=True)
class PuzzlePaths:
    """What the full-precision model does on puzzles, to which quantized models are compared.

    It denoises with the ancestral sampler at temperature 1, to which path KL belongs.

    Attributes:
        reference: the full-precision model.
        puzzles: of one or several tasks.
        timesteps: ``T``.
        seed: seeds the sampler.
        task_length: number of tokens of a puzzle.
    """

    reference: DiffusionLM
    puzzles: list[Puzzle]
    timesteps: int
    seed: int = 0
    task_length: int = TASK_LENGTH

    @cached_property
    def states(self) -> States:
        """The reference's trajectories."""
        ids, is_answer = encode_puzzles(self.puzzles, self.reference.tokenizer, self.task_length)
        return trajectory_states(self.reference, ids, is_answer, self.timesteps, self.seed)

    @cached_property
    def outputs(self) -> list[Tensor]:
        """The reference's logits on them."""
        return reference_logits(self.reference, self.states, self.timesteps)

    @cached_property
    def solved(self) -> float:
        """Share of the puzzles that the reference solves."""
        return self.solved_by(self.reference)

    def solved_by(self, lm: DiffusionLM) -> float:
        """Share of the puzzles that a model solves with the same sampler and seed."""
        ids, is_answer = encode_puzzles(self.puzzles, lm.tokenizer, self.task_length)
        drawn = partial(generate, sampler="origin", temperature=1.0, eps=0.0, block_length=0)
        filled = drawn(lm, ids.where(~is_answer, lm.mask_token_id), timesteps=self.timesteps, seed=self.seed)
        answers = decode_answers(filled, is_answer, lm.tokenizer)
        return sum(is_solution(p, a) for p, a in zip(self.puzzles, answers, strict=True)) / len(self.puzzles)


def puzzles_under_bound(paths: PuzzlePaths, quantized: DiffusionLM) -> dict[str, float]:
    """What path KL promises about solved puzzles, and what is solved.

    Whether a puzzle is solved is a function of the path, so by data processing and Pinsker's inequality the shares of
    solved puzzles differ by at most ``sqrt(path KL / 2)``, the path KL averaged over the puzzles (the root is concave).

    Args:
        paths: what the full-precision model does.
        quantized: the other model.

    Returns:
        ``path_kl`` (nats per puzzle), ``bound``, and ``solved_reference``, ``solved``, ``difference`` (0-1).
    """
    found = path_kl(paths.reference, quantized, paths.states, paths.timesteps, reference_outputs=paths.outputs).total
    solved = paths.solved_by(quantized)
    return {
        "path_kl": found,
        "bound": math.sqrt(found / 2),
        "solved_reference": paths.solved,
        "solved": solved,
        "difference": abs(solved - paths.solved),
    }


@torch.no_grad()
def masked_token_scores(
    lm: DiffusionLM, states: States, timesteps: int, *, batch_size: int = 64, progress: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Correct tokens, masked tokens and summed negative log-likelihood, each float64 ``(sequences, timesteps)``."""
    sequences, states = len(states.ids) // timesteps, states.to(lm.device)
    zeros = partial(torch.zeros, dtype=torch.float64, device=states.ids.device)
    correct, masked, nll = (zeros((sequences, timesteps)) for _ in range(3))
    batches = list(states.batches(batch_size))
    seen = [0] * timesteps
    for timestep, rows in tqdm(batches, desc=progress, disable=progress is None, leave=False):
        lm.set_timestep(timestep, timesteps)
        is_masked, clean = states.is_masked[rows], states.clean[rows]
        truth = clean[is_masked]
        likeliest, loss = [], []
        parts = truth.split(lm.rows_at_a_time)
        for logits, part in zip(lm.logit_parts(states.ids[rows], is_masked), parts, strict=True):
            likeliest.append(logits.argmax(-1) == part)
            loss.append(F.cross_entropy(logits, part, reduction="none"))
        index = slice(seen[timestep], seen[timestep] + len(rows))
        seen[timestep] += len(rows)
        for target, values in (
            (correct, torch.cat(likeliest)),
            (masked, torch.ones_like(truth)),
            (nll, torch.cat(loss)),
        ):
            grid = zeros(is_masked.shape)
            target[index, timestep] = grid.masked_scatter(is_masked, values.double()).sum(1)
    return correct.cpu(), masked.cpu(), nll.cpu()


def accuracy_per_sequence(correct: Tensor, masked: Tensor) -> Tensor:
    """Each sequence's share of the masked-token accuracy, ``(sequences,)``; their mean is the accuracy.

    Args:
        correct, masked: see ``masked_token_scores``.
    """
    return (correct / masked.mean(0)).mean(1)


def evaluate(lm: DiffusionLM | MaskPredictor, suite: Suite, *, progress: bool = False) -> Evaluation:
    """Evaluate a model, full precision or quantized, also one of ``transformers``' Auto classes, on a suite."""
    lm = as_lm(lm)

    def label(text: str) -> str | None:
        return f"{lm.name}: {text}" if progress else None

    correct, masked, nll = masked_token_scores(lm, suite.held_out, suite.timesteps, progress=label("accuracy"))
    return Evaluation(
        correct=correct,
        masked=masked,
        nll=nll,
        length=int(suite.held_out.is_masked[0].sum()),
        path=path_kl(
            suite.reference,
            lm,
            suite.trajectories,
            suite.timesteps,
            reference_outputs=suite.reference_outputs,
            progress=label("path KL"),
        ),
        puzzles=_answers(lm, suite, progress),
        resamples=suite.resamples,
    )


def _answers(lm: DiffusionLM, suite: Suite, progress: bool) -> PuzzleResult | None:
    """The model's answers to the suite's puzzles, None where it has none."""
    if not suite.puzzles:
        return None
    return solve_puzzles(
        lm, suite.puzzles, suite.timesteps, sampler=suite.sampler, temperature=suite.temperature, progress=progress
    )


def _accuracy(evaluation: Evaluation) -> Callable[[np.ndarray], float]:
    correct, masked = evaluation.correct.numpy(), evaluation.masked.numpy()
    return lambda index: float((correct[index].sum(0) / masked[index].sum(0)).mean())


def accuracy_interval(evaluation: Evaluation) -> tuple[float, float]:
    """The 95 % interval of the masked-token accuracy, over sequences."""
    return interval(_accuracy(evaluation), len(evaluation.correct), evaluation.resamples)


def path_kl_interval(path: PathKLEstimate, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % interval of the path KL in nats, over trajectories."""
    totals = path.per_sequence.sum(1).numpy()
    return interval(lambda index: float(totals[index].mean()), len(totals), resamples)


def relative_accuracy_gain(evaluation: Evaluation, baseline: Evaluation) -> tuple[float, tuple[float, float]]:
    """``accuracy / baseline accuracy - 1`` with its paired 95 % interval over sequences.

    Raises:
        ValueError: the baseline gets no token right, so that there is no ratio.
    """
    if baseline.accuracy == 0:
        raise ValueError("baseline: found an accuracy of 0, a relative gain needs one above 0")
    new, old = _accuracy(evaluation), _accuracy(baseline)
    value = evaluation.accuracy / baseline.accuracy - 1
    return value, interval(lambda index: new(index) / old(index) - 1, len(evaluation.correct), evaluation.resamples)


def path_kl_difference(evaluation: Evaluation, baseline: Evaluation) -> tuple[float, tuple[float, float]]:
    """``path KL - baseline path KL`` in nats with its paired 95 % interval over trajectories."""
    difference = (evaluation.path.per_sequence - baseline.path.per_sequence).sum(1).numpy()
    return float(difference.mean()), interval(
        lambda index: float(difference[index].mean()), len(difference), evaluation.resamples
    )


def context_free_scores(states: States, timesteps: int, counts: Tensor, copy: bool) -> tuple[float, float]:
    """Accuracy and NELBO of a model without context, what a trained model must be well above.

    The unigram model predicts the training frequencies; the copying one mixes them half and half with the
    frequencies of the visible tokens of the same sequence, and so guesses the most frequent one.

    Args:
        states: forward states, every sequence at every timestep.
        timesteps: ``T``.
        counts: training count of each token, ``(vocabulary,)``.
        copy: the copying model instead of the unigram one.

    Returns:
        ``(masked-token accuracy 0-1, NELBO in nats a token)``.
    """
    unigram = (counts.double() + 1) / (counts.sum() + len(counts))
    rho = unmask_probabilities(timesteps)
    accuracy, nelbo = [], 0.0
    for timestep, rows in states.batches(len(states.ids)):
        correct = masked = 0
        for row in rows.tolist():
            is_masked, clean = states.is_masked[row], states.clean[row]
            visible = clean[~is_masked]
            probabilities = unigram
            if copy and len(visible):
                seen = torch.bincount(visible, minlength=len(unigram)).float()
                probabilities = 0.5 * unigram + 0.5 * seen / len(visible)
            truth = clean[is_masked]
            correct += int((truth == probabilities.argmax()).sum())
            masked += len(truth)
            nelbo -= float(rho[timestep] * probabilities[truth].log().sum()) / (len(rows) * states.ids.shape[1])
        accuracy.append(correct / masked)
    return sum(accuracy) / len(accuracy), nelbo

"""Scores are those of slow direct computations, and their intervals hold them."""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor

from thermo_lib import ThermoConfig, build_suite, evaluate, evaluate_jsonl, quantize, validate
from thermo_lib.data import corpus
from thermo_lib.data.puzzles import SUDOKU, TASK_LENGTH, TASKS, Puzzle, encode_puzzles, held_out, make_puzzles
from thermo_lib.diffusion.path_kl import PathKLEstimate
from thermo_lib.diffusion.states import States
from thermo_lib.evaluation import scores as scores_module
from thermo_lib.evaluation.scores import (
    Evaluation,
    PuzzlePaths,
    PuzzleResult,
    Suite,
    accuracy_interval,
    context_free_scores,
    masked_token_scores,
    path_kl_difference,
    path_kl_interval,
    puzzles_under_bound,
    relative_accuracy_gain,
    solve_puzzles,
)
from thermo_lib.evaluation.summary import markov, stored_bits, summarize
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.model import QuantizedLM

TIMESTEPS = 6


@pytest.fixture(scope="module")
def full(tiny: DiffusionLM, suite: Suite) -> Evaluation:
    """Of the reference itself."""
    return evaluate(tiny, suite)


@pytest.fixture(scope="module")
def rough(unsmoothed: QuantizedLM, suite: Suite) -> Evaluation:
    return evaluate(unsmoothed, suite)


@dataclass
class FixedLM:
    """A model whose logits at each row and position are given."""

    table: Tensor
    tokenizer: Tokenizer | None = None
    mask_token_id: int = 0
    name: str = "fixed"
    device = torch.device("cpu")
    rows_at_a_time = 7

    @property
    def writable(self) -> Tensor:
        """As ``DiffusionLM.writable``."""
        return torch.arange(1, self.table.shape[-1])

    @property
    def vocab_size(self) -> int:
        """As ``DiffusionLM.vocab_size``."""
        return self.table.shape[-1]

    def logit_parts(self, ids: Tensor, at: Tensor, attention_mask: None = None, **_: object) -> Iterator[Tensor]:
        """As ``DiffusionLM.logit_parts``."""
        is_asked = at if at.dtype == torch.bool else torch.zeros(ids.numel()).index_fill(0, at, 1).bool().view_as(ids)
        yield from self.logits(ids, is_asked).split(self.rows_at_a_time)

    def set_timestep(self, timestep: int, timesteps: int) -> None:
        """Nothing depends on the timestep."""

    def logits(self, ids: Tensor, at: Tensor) -> Tensor:
        """As ``DiffusionLM.logits``: the mask token gets no probability."""
        rows = self.table.expand(len(ids), ids.shape[1], -1)[at].clone()
        rows[:, self.mask_token_id] = -1e30
        return rows


def exact_states(length: int, vocabulary: int) -> States:
    """One sequence at each of ``length`` timesteps, with exactly the scheduled number of masks."""
    clean = (torch.arange(length) % (vocabulary - 1) + 1).repeat(length, 1)
    is_masked = torch.arange(length) < length - torch.arange(length)[:, None]
    return States(torch.where(is_masked, 0, clean), is_masked, torch.arange(length), clean)


def evaluation_of(correct: list[list[float]], masked: list[list[float]], path: list[list[float]]) -> Evaluation:
    """An evaluation with given counts and path KL."""
    tensors = [torch.tensor(values, dtype=torch.float64) for values in (correct, masked, path)]
    return Evaluation(
        correct=tensors[0],
        masked=tensors[1],
        nll=tensors[1],
        length=10,
        path=PathKLEstimate(tensors[2], torch.ones_like(tensors[2])),
        puzzles=PuzzleResult(["x"], [True]),
        resamples=200,
    )


class TestScores:
    """Accuracy and NELBO of masked tokens."""

    def test_they_are_those_of_a_slow_computation(self, tiny: DiffusionLM, suite: Suite) -> None:
        states = suite.held_out
        correct, masked, nll = masked_token_scores(tiny, states, TIMESTEPS, batch_size=4)
        expected = torch.zeros(3, 6, TIMESTEPS, dtype=torch.float64)
        for row in range(len(states.ids)):
            timestep, sequence = divmod(row, 6)
            logits = tiny.model(states.ids[row : row + 1]).logits[0].double()
            logits[:, tiny.mask_token_id] = -torch.inf
            for position in range(16):
                if states.ids[row, position] != tiny.mask_token_id:
                    continue
                truth = int(states.clean[row, position])
                log_probability = logits[position, truth] - logits[position].logsumexp(0)
                hit = float(logits[position].argmax() == truth)
                expected[:, sequence, timestep] += torch.tensor([hit, 1.0, -log_probability])
        torch.testing.assert_close(torch.stack([correct, masked, nll]), expected, rtol=1e-4, atol=1e-4)
        assert 0 < correct.sum() < masked.sum()

    def test_accuracy_and_nelbo_are_the_documented_means(
        self, tiny: DiffusionLM, suite: Suite, full: Evaluation
    ) -> None:
        correct, masked, nll = masked_token_scores(tiny, suite.held_out, TIMESTEPS)
        shares = [float(correct[:, i].sum() / masked[:, i].sum()) for i in range(TIMESTEPS)]
        assert full.accuracy_per_timestep.tolist() == pytest.approx(shares)
        assert full.accuracy == pytest.approx(sum(shares) / TIMESTEPS)
        # rho_i = 1 / (T - i); 6 sequences of 16 tokens.
        nelbo = sum(float(nll[:, i].sum()) / (TIMESTEPS - i) for i in range(TIMESTEPS)) / 6 / 16
        assert full.nelbo == pytest.approx(nelbo)

    def test_the_reference_has_no_divergence_from_itself(self, full: Evaluation) -> None:
        assert full.path.total == 0
        assert full.path.mean_cosine == pytest.approx(1, abs=1e-6)

    @settings(max_examples=15)
    @given(length=st.integers(1, 12), vocabulary=st.integers(3, 50))
    def test_a_uniform_model_has_the_nelbo_of_a_uniform_guess(self, length: int, vocabulary: int) -> None:
        # With exactly t_i n masked tokens at timestep i the NELBO is sum_i rho_i t_i ln(V - 1) = ln(V - 1): a masked
        # position never is a mask token, so one of V - 1 is guessed.
        states = exact_states(length, vocabulary)
        _, masked, nll = masked_token_scores(FixedLM(torch.zeros(1, 1, vocabulary)), states, length)
        assert masked.tolist() == [[length - i for i in range(length)]]
        result = replace(evaluation_of([[0]], [[1]], [[0]]), nll=nll, length=length)
        assert result.nelbo == pytest.approx(math.log(vocabulary - 1), rel=1e-6)

    def test_a_model_that_knows_the_text_is_right_everywhere(self) -> None:
        states = exact_states(5, 7)
        known = torch.nn.functional.one_hot(states.clean[0], 7).float()[None] * 50
        correct, masked, nll = masked_token_scores(FixedLM(known), states, 5)
        assert torch.equal(correct, masked)
        assert nll.abs().max() < 1e-6


class TestContextFree:
    """Baselines without context, worked out by hand.

    Counts 0, 3, 1, 0 plus one each: probabilities 1/8, 4/8, 2/8, 1/8. The text is 1 1 2 3; the first of two timesteps
    masks all of it, the second the first and third token. rho is 1/2 and 1.
    """

    CLEAN = torch.tensor([[1, 1, 2, 3], [1, 1, 2, 3]])
    MASKED = torch.tensor([[True, True, True, True], [True, False, True, False]])
    STATES = States(torch.where(MASKED, 0, CLEAN), MASKED, torch.tensor([0, 1]), CLEAN)
    COUNTS = torch.tensor([0, 3, 1, 0])

    def test_unigram(self) -> None:
        # Surprise in bits: 1 + 1 + 2 + 3 = 7, then 1 + 2 = 3: (7/2 + 3) / 4 bits a token. It always guesses token 1:
        # 2 of 4 and 1 of 2 are right.
        accuracy, nelbo = context_free_scores(self.STATES, 2, self.COUNTS, copy=False)
        assert accuracy == pytest.approx(0.5)
        assert nelbo == pytest.approx((7 / 2 + 3) / 4 * math.log(2))

    def test_copying(self) -> None:
        # At the second timestep 1 and 3 are visible: half of (1, 4, 2, 1)/8 and half of (0, 4, 0, 4)/8 is
        # (1, 8, 2, 5)/16: surprise 1 + 3 = 4 bits. At the first nothing is visible: the unigram model.
        accuracy, nelbo = context_free_scores(self.STATES, 2, self.COUNTS, copy=True)
        assert accuracy == pytest.approx(0.5)
        assert nelbo == pytest.approx((7 / 2 + 4) / 4 * math.log(2))


class TestIntervals:
    """Bootstrap percentile intervals, paired over sequences."""

    def test_intervals_of_accuracy_and_path_kl_hold_their_values(self) -> None:
        rng = np.random.default_rng(0)
        masked = np.full((12, 4), 20.0)
        result = evaluation_of(rng.integers(0, 20, (12, 4)).tolist(), masked.tolist(), rng.random((12, 4)).tolist())
        low, high = accuracy_interval(result)
        assert low < result.accuracy < high
        low, high = path_kl_interval(result.path, result.resamples)
        assert low < result.path.total < high

    def test_equal_evaluations_differ_by_exactly_nothing(
        self, tiny: DiffusionLM, suite: Suite, full: Evaluation
    ) -> None:
        again = evaluate(tiny, suite)
        assert relative_accuracy_gain(full, again) == (0.0, (0.0, 0.0))
        assert path_kl_difference(full, again) == (0.0, (0.0, 0.0))

    def test_a_gain_over_nothing_is_refused(self) -> None:
        nothing = evaluation_of([[0.0]], [[10.0]], [[1.0]])
        with pytest.raises(ValueError, match="baseline: found an accuracy of 0"):
            relative_accuracy_gain(nothing, nothing)

    def test_a_gain_is_relative_and_paired(self) -> None:
        # Every sequence has 6 of 10 right instead of 5 of 10: the gain is 20 % on any resample; its pairing removes
        # the spread between sequences.
        masked = [[10.0], [20.0], [40.0]]
        before = evaluation_of([[5.0], [10.0], [20.0]], masked, [[1.0], [5.0], [9.0]])
        after = evaluation_of([[6.0], [12.0], [24.0]], masked, [[0.5], [4.5], [8.5]])
        value, ci = relative_accuracy_gain(after, before)
        assert (value, *ci) == pytest.approx((0.2, 0.2, 0.2))
        value, ci = path_kl_difference(after, before)
        assert (value, *ci) == pytest.approx((-0.5, -0.5, -0.5))


def oracle(puzzles: list[Puzzle], tokenizer: Tokenizer) -> FixedLM:
    """A model that writes the outputs of these puzzles, in their order."""
    ids, _ = encode_puzzles(puzzles, tokenizer, TASK_LENGTH)
    table = torch.nn.functional.one_hot(ids, tokenizer.get_vocab_size()).float() * 50
    return FixedLM(table, tokenizer)


class TestPuzzles:
    """Answers are generated and checked, from the project's puzzles or a file."""

    def test_right_answers_count_and_wrong_ones_do_not(self, tokenizer: Tokenizer) -> None:
        puzzles = [p for task in TASKS for p in make_puzzles(task, 3, 0, test=True)]
        outputs = [p.output for p in puzzles]
        outputs[1], outputs[4] = outputs[1][::-1] + "1", "1+1=3"
        written = [replace(p, output=output) for p, output in zip(puzzles, outputs, strict=True)]
        result = solve_puzzles(oracle(written, tokenizer), puzzles, timesteps=3)
        assert result.answers == outputs
        assert result.solved == [True, False, True, True, False, True]
        assert result.accuracy == pytest.approx(4 / 6)

    def test_a_file_of_puzzles_is_solved(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        puzzles = make_puzzles("countdown", 4, 0, test=True)
        path = tmp_path / "puzzles.jsonl"
        path.write_text("".join(json.dumps({"input": p.input}) + "\n" for p in puzzles), encoding="utf-8")
        result = evaluate_jsonl(oracle(puzzles, tokenizer), path, "countdown")
        assert result == PuzzleResult([p.output for p in puzzles], [True] * 4)

    def test_path_kl_bounds_the_change_of_what_is_solved(self, tokenizer: Tokenizer) -> None:
        puzzles = make_puzzles("sudoku", 30, 0, test=True)
        sure = oracle(puzzles, tokenizer)
        answer_tokens = float(encode_puzzles(puzzles, tokenizer, TASK_LENGTH)[1].sum(1)[0])
        paths = PuzzlePaths(sure, puzzles, timesteps=1)
        assert puzzles_under_bound(paths, sure) == {
            "path_kl": 0, "bound": 0, "solved_reference": 1, "solved": 1, "difference": 0
        }  # fmt: skip
        for logit in (14, 11):
            found = puzzles_under_bound(paths, FixedLM(sure.table * logit / 50, tokenizer))
            # The sure model gives its token all the probability, so each token's divergence is -log q(token).
            others = tokenizer.get_vocab_size() - 2
            expected = answer_tokens * math.log1p(others * math.exp(-logit))
            assert found["path_kl"] == pytest.approx(expected, rel=1e-3)
            assert found["bound"] == pytest.approx(math.sqrt(expected / 2), rel=1e-3)
            assert found["difference"] == 1 - found["solved"] <= found["bound"]

    def test_a_bad_file_is_named(self, tiny: DiffusionLM, tmp_path: Path) -> None:
        path = tmp_path / "puzzles.jsonl"
        path.write_text("{}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"puzzles\.jsonl, line 1"):
            evaluate_jsonl(tiny, path, "sudoku")


class TestSuite:
    """The inputs are the same for every model and have the sizes asked for."""

    def test_it_has_the_sizes_asked_for(self, tiny: DiffusionLM, small_corpus: None) -> None:
        sizes = {"timesteps": 3, "sequences": 5, "trajectories": 4, "sudoku": 2, "length": 12}
        suite, again = build_suite(tiny, **sizes), build_suite(tiny, **sizes)
        assert suite.held_out.ids.shape == (5 * 3, 12)
        assert suite.trajectories.ids.shape == (4 * 3, 12)
        assert [p.task for p in suite.puzzles] == ["sudoku", "sudoku"]
        assert all(held_out(p.input) for p in suite.puzzles)
        assert suite.timesteps == 3
        assert torch.equal(suite.held_out.ids, again.held_out.ids)
        assert torch.equal(suite.trajectories.ids, again.trajectories.ids)
        other = build_suite(tiny, **sizes, seed=1)
        assert not torch.equal(suite.held_out.clean, other.held_out.clean)
        assert not torch.equal(suite.trajectories.clean, other.trajectories.clean)
        test_text = "".join(corpus.load_corpus("test").values())
        assert "test_0" in test_text
        assert all(tiny.tokenizer.decode(row.tolist()) in test_text for row in suite.held_out.clean)
        assert evaluate(tiny, suite).path.total == 0

    def test_sampler_and_resamples_reach_what_uses_them(
        self, tiny: DiffusionLM, small_corpus: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = {"timesteps": 3, "sequences": 4, "trajectories": 2, "sudoku": 2, "length": 12}
        suite = build_suite(tiny, **sizes, sampler="origin", temperature=0.5, resamples=7)
        asked: dict[str, Any] = {}
        monkeypatch.setattr(scores_module, "generate", lambda lm, ids, **how: asked.update(how) or ids)
        scores = evaluate(tiny, suite)
        assert (asked["sampler"], asked["temperature"], asked["timesteps"]) == ("origin", 0.5, 3)
        drawn: list[int] = []
        real = scores_module.interval
        monkeypatch.setattr(
            scores_module,
            "interval",
            lambda statistic, count, *rest: drawn.extend(rest) or real(statistic, count, *rest),
        )
        summarize("tiny", tiny, scores)
        relative_accuracy_gain(replace(scores, correct=scores.masked), replace(scores, correct=scores.masked))
        path_kl_difference(scores, scores)
        assert drawn == [7] * 4

    def test_a_model_that_does_not_know_the_tasks_gets_no_puzzles(self, tiny: DiffusionLM, small_corpus: None) -> None:
        foreign = replace(tiny, tokenizer=Tokenizer.from_str(tiny.tokenizer.to_str().replace(SUDOKU, "<|other|>")))
        suite = build_suite(foreign, timesteps=2, sequences=3, trajectories=2, length=12)
        assert suite.puzzles == []
        scores = evaluate(foreign, suite)
        assert scores.puzzles is None
        assert summarize("foreign", foreign, scores)["sudoku_solved"] is None
        with pytest.raises(ValueError, match=r"tokenizer: found no task markers, puzzles need .*sudoku"):
            solve_puzzles(foreign, make_puzzles("sudoku", 1, 0, test=True))


class TestQuantizedModels:
    """Rows, targets and validation of quantized models."""

    def test_validation_is_path_kl_cosine_and_markov_score(
        self, unsmoothed: QuantizedLM, suite: Suite, rough: Evaluation
    ) -> None:
        result = validate(unsmoothed, suite)
        assert result.path_kl == rough.path.total > 0
        assert result.cosine_similarity == rough.path.mean_cosine < 1
        assert result.markov == markov(unsmoothed)
        assert result.markov_smoothness_score == result.markov.score < 1
        assert list(result.markov.boundary_scores) == [2, 4]

    def test_a_model_whose_parameters_do_not_depend_on_time_is_smooth(self, tiny: DiffusionLM, suite: Suite) -> None:
        lm = quantize(tiny, ThermoConfig(quantizer="rtn", num_time_groups=1, activation_bits=16))
        result = validate(lm, suite)
        assert (result.markov_smoothness_score, result.markov) == (1.0, None)

    def test_a_row_has_settings_and_scores_of_its_model(
        self, tiny: DiffusionLM, unsmoothed: QuantizedLM, full: Evaluation, rough: Evaluation
    ) -> None:
        of_reference = summarize("full precision", tiny, full)
        row = summarize("rough", unsmoothed, rough)
        assert row.keys() == of_reference.keys()
        expected = {
            "name": "rough",
            "bits": 8,
            "activation_bits": 4,
            "activation_ranges": "static",
            "quantizer": "rtn",
            "group_size": 20,
            "num_time_groups": 3,
            "smoothing_method": None,
            "smoothing_window": None,
            "bits_per_weight": unsmoothed.bits_per_weight,
            "accuracy": rough.accuracy,
            "nelbo": rough.nelbo,
            "path_kl": rough.path.total,
            "markov_score": markov(unsmoothed).score,
            "violations": len(markov(unsmoothed).violations),
            "sudoku_solved": rough.puzzles.accuracy,
        }
        assert {key: row[key] for key in expected} == expected
        assert len(row["accuracy_per_timestep"]) == len(row["path_kl_per_timestep"]) == TIMESTEPS
        about = [of_reference[name] for name in ("bits", "activation_bits", "bits_per_weight")]
        assert about == [32, 16, 32.0]
        assert of_reference["markov_score"] is of_reference["quantizer"] is None
        json.dumps([row, of_reference], allow_nan=False)

    @pytest.mark.parametrize(("kind", "bits"), [(torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 32)])
    def test_full_precision_has_the_bits_that_hold_its_weights(
        self, tiny: DiffusionLM, kind: torch.dtype, bits: int
    ) -> None:
        lm = replace(tiny, model=copy.deepcopy(tiny.model).to(kind).float())
        assert stored_bits(lm) == bits

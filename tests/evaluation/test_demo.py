"""What the demo shows is what the models do: steps that only fill, counts that agree with the grids."""

import itertools

import pytest

import thermo_lib
from thermo_lib.data.puzzles import Puzzle, make_puzzles
from thermo_lib.evaluation import demo
from thermo_lib.models.lm import DiffusionLM

STEPS = 2


@pytest.fixture(scope="module")
def lm() -> DiffusionLM:
    return thermo_lib.load_model("reference")


def test_a_grid_starts_masked_only_fills_and_ends_full(lm: DiffusionLM) -> None:
    (puzzle,) = make_puzzles("sudoku", 1, 0, test=True)
    rows = demo.sudoku_steps({"a": lm, "b": lm}, puzzle, timesteps=STEPS)
    assert [(row["model"], row["step"]) for row in rows] == [(m, s) for m in "ab" for s in range(STEPS + 1)]
    assert [row["grid"] for row in rows[: STEPS + 1]] == [row["grid"] for row in rows[STEPS + 1 :]]
    assert [rows[0]["filled"], rows[STEPS]["filled"]] == [0, 16]
    for before, after in itertools.pairwise(rows[: STEPS + 1]):
        assert all(old in (demo.MASKED, new) for old, new in zip(before["grid"], after["grid"], strict=True))
    solution = puzzle.output.replace("\n", " ")
    for row in rows:
        pairs = list(zip(row["grid"], solution, strict=True))
        assert row["filled"] == sum(cell not in (demo.MASKED, " ") for cell, _ in pairs)
        assert row["wrong"] == sum(cell not in (demo.MASKED, right) for cell, right in pairs)


def test_a_puzzle_is_solved_where_no_cell_is_wrong(lm: DiffusionLM) -> None:
    puzzles = make_puzzles("sudoku", 2, 0, test=True)
    (row,) = demo.sudoku_solved({"a": lm}, puzzles, timesteps=STEPS)
    ends = [demo.sudoku_steps({"a": lm}, puzzle, timesteps=STEPS)[-1] for puzzle in puzzles]
    assert row == {"model": "a", "bits_per_weight": None, "puzzles": 2, "solved": sum(not e["wrong"] for e in ends)}


def test_a_continuation_has_the_tokens_that_were_written(lm: DiffusionLM) -> None:
    rows = demo.continuations({"full precision": lm, "a": lm}, ["def f(", "x = "], tokens=3, timesteps=2)
    assert [row["prompt"] for row in rows[::2]] == ["def f(", "x = "]
    assert [row["model"] for row in rows[:2]] == ["full precision", "a"]
    assert all(len(row["words"]) == 3 for row in rows)
    assert demo.agreement(rows, "a") == 1
    rows[1] = {**rows[1], "words": ["?", *rows[0]["words"][1:]]}
    assert demo.agreement(rows, "a") == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match=r"^prompts: found '', allowed are texts that aren't empty$"):
        demo.continuations({"a": lm}, [""], tokens=1, timesteps=1)


def test_beginnings_are_those_whose_files_go_on_as_the_model_expects(lm: DiffusionLM) -> None:
    copied = "from sympy.core.mul import Mul\n" * 40
    odd = "".join(f"{first}q {second}!z@ " for first in "abcdefghij" for second in "ABCDEFGHIJKLMNOP")
    files = {"odd": odd, "copied": copied, "numbers": "1, 2, 3, " * 200}
    size = {"given": 20, "tokens": 6, "drawn": 40}
    found = demo.beginnings(lm, files, 3, **size)
    assert len(found) == 3
    assert all(start + rest in copied for start, rest in found)
    every = demo.beginnings(lm, files, 40, **size)
    assert every[:3] == found
    assert every[-1][1] in odd
    assert not any(digit in start + rest for start, rest in every for digit in "123")


def test_a_model_without_puzzles_says_so_in_one_line(lm: DiffusionLM) -> None:
    from tokenizers import Tokenizer, models

    other = DiffusionLM(lm.model, Tokenizer(models.BPE()), lm.mask_token_id, "other")
    puzzle = Puzzle("sudoku", "1200\n0000\n0000\n0000", "1234\n3412\n2143\n4321")
    with pytest.raises(ValueError, match=r"^tokenizer: found no task markers.*$"):
        demo.sudoku_steps({"other": other}, puzzle, timesteps=STEPS)
    with pytest.raises(ValueError, match=r"^task: found 'countdown', allowed is 'sudoku'$"):
        demo.sudoku_steps({"a": lm}, Puzzle("countdown", "1,2,3,6", ""), timesteps=STEPS)

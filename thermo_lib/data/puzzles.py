"""Planning tasks: 4x4 Sudoku and Countdown, generated, read, encoded and checked.

Sudoku has 4-12 clues and exactly one solution, Countdown three numbers. Both are in the JSONL format of the Dream
project's evaluation (arXiv 2508.15487): ``input`` and ``output`` strings. Puzzles are split by a hash of their input,
so an evaluation puzzle is never trained on."""

import itertools
import re
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from thermo_lib.files.reading import field_of, read_lines, shown

TASKS = ("sudoku", "countdown")
MASK, EOS, SUDOKU, COUNTDOWN, ANSWER = "<|mask|>", "<|endoftext|>", "<|sudoku|>", "<|countdown|>", "<|answer|>"
SPECIAL_TOKENS = (MASK, EOS, SUDOKU, COUNTDOWN, ANSWER)
TASK_TOKENS = {"sudoku": SUDOKU, "countdown": COUNTDOWN}
TASK_LENGTH = 42  # tokens of a puzzle, as the reference model was trained on them
_TEST_SHARE = 20  # one puzzle input in 20 is kept out of training


@dataclass(frozen=True)
class Puzzle:
    """One line of the planning format."""

    task: str
    input: str
    output: str

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task: found {self.task!r}, allowed are {', '.join(TASKS)}")


_INPUTS = {  # a task's inputs: as a pattern, and in words
    "sudoku": (r"[0-4]{4}(\n[0-4]{4}){3}", "four lines of four digits 0-4"),
    "countdown": (r"[0-9]{1,9}(,[0-9]{1,9}){2,}", "at least two numbers and the target, separated by commas"),
}


def read_jsonl(path: str | Path, task: str) -> list[Puzzle]:
    """Puzzles from a JSONL file of ``{"input": ..., "output": ...}`` lines.

    Raises:
        ValueError: unknown task, no such file, no puzzle, or a malformed line; the message names file, line and field.
    """
    puzzles = []
    for where, row in read_lines(path):
        puzzle = Puzzle(task, field_of(row, "input", str, where), field_of(row, "output", str, where, default=""))
        if not re.fullmatch(_INPUTS[task][0], puzzle.input):
            raise ValueError(f"{where}: input: found {puzzle.input!r:.80}, allowed are {_INPUTS[task][1]}")
        puzzles.append(puzzle)
    if not puzzles:
        raise ValueError(f"{shown(path)}: found no puzzle, expected one JSON object a line")
    return puzzles


@cache
def sudoku_grids() -> np.ndarray:
    """All 288 solved 4x4 grids, ``(288, 16)`` uint8, digits 1-4."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    grids = []
    for four in itertools.product(rows, repeat=4):
        grid = np.array(four, dtype=np.uint8)
        columns = all(len(set(grid[:, j])) == 4 for j in range(4))
        if columns and all(len(set(grid[r : r + 2, c : c + 2].ravel())) == 4 for r in (0, 2) for c in (0, 2)):
            grids.append(grid.ravel())
    return np.stack(grids)


def _grid_text(cells: np.ndarray) -> str:
    return "\n".join("".join(map(str, row)) for row in cells.reshape(4, 4))


def held_out(puzzle_input: str) -> bool:
    """Whether a puzzle is kept out of training, from a checksum of its input."""
    return zlib.crc32(puzzle_input.encode()) % _TEST_SHARE == 0


def _sudoku(rng: np.random.Generator, count: int, test: bool) -> list[Puzzle]:
    grids = sudoku_grids()
    puzzles: list[Puzzle] = []
    while len(puzzles) < count:
        clues = int(rng.integers(4, 13))
        tries = 64 if clues < 7 else 4  # few sets of 4 clues have one solution: try many at once, keep one
        found = False
        while not found:
            solutions = grids[rng.integers(len(grids), size=tries)]
            given = rng.random((tries, 16)).argsort(1) < clues
            fits = ((solutions[:, None] == grids[None]) | ~given[:, None]).all(-1).sum(1)
            for i in np.flatnonzero(fits == 1):
                text = _grid_text(np.where(given[i], solutions[i], 0))
                if held_out(text) == test:
                    puzzles.append(Puzzle("sudoku", text, _grid_text(solutions[i])))
                    found = True
                    break
    return puzzles


_OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b if b and a % b == 0 else -1,
}


def _countdown(rng: np.random.Generator, count: int, test: bool) -> list[Puzzle]:
    puzzles: list[Puzzle] = []
    while len(puzzles) < count:
        a, b, c = (int(n) for n in rng.integers(1, 100, size=3))
        first, second = (str(op) for op in rng.choice(list(_OPERATIONS), size=2))
        x, y = max(a, b), min(a, b)
        middle = _OPERATIONS[first](x, y)
        p, q = max(middle, c), min(middle, c)
        target = _OPERATIONS[second](p, q)
        if not (0 < middle < 1000 and 10 <= target <= 100):
            continue
        numbers = [str(n) for n in rng.permutation([a, b, c])]
        text = ",".join([*numbers, str(target)])
        if held_out(text) == test:
            puzzles.append(Puzzle("countdown", text, f"{x}{first}{y}={middle},{p}{second}{q}={target}"))
    return puzzles


def make_puzzles(task: str, count: int, seed: int | tuple[int, ...], test: bool) -> list[Puzzle]:
    """Generate puzzles with known answers.

    Sudoku: the number of clues is uniform on 4-12 and the solution unique. Countdown: three numbers
    of 1-99, a target of 10-100, two operations of ``+ - * /`` with whole positive results.

    Args:
        task: ``sudoku`` or ``countdown``.
        count: number of puzzles.
        seed: seed or seed sequence.
        test: True for puzzles that training never sees, False for those it may see.
    """
    if task not in TASKS:
        raise ValueError(f"task: found {task!r}, allowed are {', '.join(TASKS)}")
    rng = np.random.default_rng(seed)
    return (_sudoku if task == "sudoku" else _countdown)(rng, count, test)


def is_solution(puzzle: Puzzle, answer: str) -> bool:
    """Whether ``answer`` solves the puzzle; any valid solution counts, not only ``puzzle.output``."""
    return (_solves_sudoku if puzzle.task == "sudoku" else _solves_countdown)(puzzle.input, answer.strip())


def _solves_sudoku(puzzle_input: str, answer: str) -> bool:
    clues, cells = puzzle_input.replace("\n", ""), answer.replace("\n", "")
    if not re.fullmatch(r"[1-4]{4}\n[1-4]{4}\n[1-4]{4}\n[1-4]{4}", answer):
        return False
    grid = np.array([int(c) for c in cells], dtype=np.uint8)
    solved = bool((sudoku_grids() == grid).all(1).any())
    return solved and all(clue in ("0", cell) for clue, cell in zip(clues, cells, strict=True))


def _solves_countdown(puzzle_input: str, answer: str) -> bool:
    *numbers, target = (int(n) for n in puzzle_input.split(","))
    available = sorted(numbers)
    result = None
    for equation in answer.split(","):
        match = re.fullmatch(r"([0-9]{1,999})([-+*/])([0-9]{1,999})=([0-9]{1,999})", equation)
        if match is None:
            return False
        a, b, result = int(match[1]), int(match[3]), int(match[4])
        if _OPERATIONS[match[2]](a, b) != result:
            return False
        for operand in (a, b):
            if operand not in available:
                return False
            available.remove(operand)
        available.append(result)
    return available == [target] and result == target


def knows_tasks(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has the reference model's markers of planning tasks; other models don't."""
    return all(tokenizer.token_to_id(token) is not None for token in (*TASK_TOKENS.values(), ANSWER, EOS))


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token that a tokenizer has."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def encode_puzzles(puzzles: list[Puzzle], tokenizer: Tokenizer, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Puzzles as ``<task> input <answer> output <eos>...``, padded with end-of-text to ``length``.

    Returns:
        ``ids`` int64 ``(puzzles, length)`` and ``is_answer`` bool of the same shape: the positions that
        diffusion masks and fills (everything after the answer marker).

    Raises:
        ValueError: a puzzle doesn't fit into ``length`` tokens, or the tokenizer lacks the task markers.
    """
    if not knows_tasks(tokenizer):
        markers = ", ".join((*TASK_TOKENS.values(), ANSWER, EOS))
        raise ValueError(f"tokenizer: found no task markers, puzzles need {markers}")
    eos, answer = token_id(tokenizer, EOS), token_id(tokenizer, ANSWER)
    ids = torch.full((len(puzzles), length), eos)
    is_answer = torch.zeros(ids.shape, dtype=torch.bool)
    for row, puzzle in enumerate(puzzles):
        marker = token_id(tokenizer, TASK_TOKENS[puzzle.task])
        prompt = [marker, *tokenizer.encode(puzzle.input).ids, answer]
        full = [*prompt, *tokenizer.encode(puzzle.output).ids]
        if len(full) >= length:
            raise ValueError(f"length: found {length}, puzzle {puzzle.input!r} needs at least {len(full) + 1} tokens")
        ids[row, : len(full)] = torch.tensor(full)
        is_answer[row, len(prompt) :] = True
    return ids, is_answer


def decode_answers(ids: torch.Tensor, is_answer: torch.Tensor, tokenizer: Tokenizer) -> list[str]:
    """The text of the answer positions up to the first end-of-text token, one string a row."""
    eos = tokenizer.token_to_id(EOS)
    answers = []
    for row, keep in zip(ids, is_answer, strict=True):
        tokens = row[keep].tolist()
        end = tokens.index(eos) if eos in tokens else len(tokens)
        answers.append(tokenizer.decode(tokens[:end], skip_special_tokens=False))
    return answers


@dataclass(frozen=True)
class PuzzlePrompts:
    """New training puzzles with their answers masked; starts of denoising, see ``diffusion.prompts.Prompts``.

    Attributes:
        tokenizer: one that knows the tasks.
        length: tokens of a puzzle.
    """

    tokenizer: Tokenizer
    length: int = TASK_LENGTH
    is_empty = False

    def draw(self, count: int, seed: int) -> torch.Tensor:
        """Puzzles of all tasks, as equally many of each as ``count`` allows, int64 ``(count, length)``."""
        return self._masked(-(-count // len(TASKS)), (seed,))[:count]

    def start(self, number: int, seed: int) -> torch.Tensor:
        """The puzzle of a number, the tasks in turns, int64 ``(length,)``."""
        turn, task = divmod(number, len(TASKS))
        return self._masked(1, (seed, turn))[task]

    def _masked(self, count: int, seed: tuple[int, ...]) -> torch.Tensor:
        """``count`` puzzles of each task."""
        puzzles = [puzzle for task in TASKS for puzzle in make_puzzles(task, count, seed, test=False)]
        ids, is_answer = encode_puzzles(puzzles, self.tokenizer, self.length)
        return ids.masked_fill(is_answer, token_id(self.tokenizer, MASK))

"""Something to see: models denoise the same puzzle, and continue the same code, side by side.

The reference model is good at 4x4 Sudoku, and too small to write code that runs: what to see in its code is whether
two bits say the same as full precision, after beginnings that full precision knows how to go on with.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from thermo_lib.data.corpus import held_out_sequences
from thermo_lib.data.puzzles import Puzzle, decode_answers, encode_puzzles, is_solution
from thermo_lib.diffusion.sampling import generate
from thermo_lib.evaluation.display import FULL_PRECISION
from thermo_lib.models.lm import DiffusionLM

LENGTH = 42  # tokens of a puzzle, as in training
MASKED, OTHER = "·", "?"
STEP_COLUMNS = {
    "model": ("model", "{}"),
    "step": ("step", "{}"),
    "cells filled": ("filled", "{}"),
    "of them wrong": ("wrong", "{}"),
    "grid": ("grid", "{}"),
}
SOLVED_COLUMNS = {
    "model": ("model", "{}"),
    "bits per weight": ("bits_per_weight", "{:.2f}"),
    "puzzles": ("puzzles", "{}"),
    "solved": ("solved", "{}"),
}


def denoising(lm: DiffusionLM, start: torch.Tensor, timesteps: int) -> list[torch.Tensor]:
    """The states of a text that is denoised, from the start to the finished text.

    Args:
        lm: the model.
        start: int64 ``(1, length)``, masked where tokens are to be written.
        timesteps: number of denoising steps.

    Returns:
        ``timesteps + 1`` times int64 ``(length,)``, on the CPU.
    """
    states: list[torch.Tensor] = []
    keep = lambda _timestep, _rows, state: states.append(state[0].cpu().clone())  # noqa: E731
    states.append(generate(lm, start, timesteps=timesteps, on_state=keep)[0].cpu())
    return states


def sudoku_steps(models: Mapping[str, DiffusionLM], puzzle: Puzzle, *, timesteps: int) -> list[dict[str, Any]]:
    """How each model fills a Sudoku, step by step.

    Args:
        models: name to model; all of them know the puzzles.
        puzzle: a Sudoku with its solution.
        timesteps: number of denoising steps.

    Returns:
        For each model ``timesteps + 1`` rows, from all masked to all filled: ``model``; ``step``; ``grid``, the 16
        cells row by row with spaces between the rows, ``·`` where a cell is masked and ``?`` where a token is no digit;
        ``filled``, the number of cells that aren't masked; ``wrong``, how many of them differ from the solution.

    Raises:
        ValueError: a puzzle of another task, or a tokenizer that doesn't have the puzzles' markers.
    """
    if puzzle.task != "sudoku":
        raise ValueError(f"task: found {puzzle.task!r}, allowed is 'sudoku'")
    rows = []
    for name, lm in models.items():
        ids, is_answer = encode_puzzles([puzzle], lm.tokenizer, LENGTH)
        # One token a digit; the line ends between them are filled too, but aren't cells.
        cells = [at for at in is_answer[0].nonzero().flatten().tolist() if _token(lm, ids[0, at]).isdigit()]
        states = denoising(lm, ids.masked_fill(is_answer, lm.mask_token_id), timesteps)
        solution = puzzle.output.replace("\n", "")
        for step, state in enumerate(states):
            shown = "".join(_cell(lm, state[at]) for at in cells)
            pairs = [(found, right) for found, right in zip(shown, solution, strict=True) if found != MASKED]
            wrong = sum(found != right for found, right in pairs)
            grid = " ".join(shown[at : at + 4] for at in range(0, 16, 4))
            rows.append({"model": name, "step": step, "grid": grid, "filled": len(pairs), "wrong": wrong})
    return rows


def sudoku_solved(
    models: Mapping[str, DiffusionLM], puzzles: Sequence[Puzzle], *, timesteps: int
) -> list[dict[str, Any]]:
    """How many puzzles each model solves.

    Args:
        models: name to model.
        puzzles: of any task; any valid solution counts.
        timesteps: number of denoising steps.

    Returns:
        Rows with ``model``, ``bits_per_weight`` (None in full precision), ``puzzles`` and ``solved`` (both counts).

    Raises:
        ValueError: a tokenizer that doesn't have the puzzles' markers.
    """
    rows = []
    for name, lm in models.items():
        ids, is_answer = encode_puzzles(list(puzzles), lm.tokenizer, LENGTH)
        filled = generate(lm, ids.masked_fill(is_answer, lm.mask_token_id), timesteps=timesteps)
        texts = decode_answers(filled.cpu(), is_answer, lm.tokenizer)
        solved = sum(is_solution(puzzle, text) for puzzle, text in zip(puzzles, texts, strict=True))
        bits = getattr(lm, "bits_per_weight", None)
        rows.append({"model": name, "bits_per_weight": bits, "puzzles": len(puzzles), "solved": solved})
    return rows


def beginnings(
    lm: DiffusionLM, files: Mapping[str, str], count: int, *, given: int = 40, tokens: int = 8, drawn: int = 400
) -> list[tuple[str, str]]:
    """Beginnings of code that a model knows how to go on with, by a measure and not by taste.

    Of some drawn from files, those without digits (tables of numbers are easy) are ordered by the mean log probability
    that the model gives to the tokens that follow, all of them masked.

    Args:
        lm: the model.
        files: name to content; the model hasn't been trained on them.
        count: number of beginnings.
        given: number of tokens of one.
        tokens: number of tokens that follow.
        drawn: number of beginnings that are compared.

    Returns:
        At most ``count`` pairs: a beginning, and what follows in its file; the likeliest first.
    """
    every = held_out_sequences(files, lm.tokenizer, drawn, given + tokens, 0)
    texts = [[lm.tokenizer.decode(part) for part in (ids[:given], ids[given:])] for ids in every.tolist()]
    kept = [
        number
        for number, (start, rest) in enumerate(texts)
        if not re.search(r"\d", start + rest) and lm.tokenizer.encode(start).ids == every[number, :given].tolist()
    ]
    ids = every[kept]
    masked = ids.clone()
    masked[:, given:] = lm.mask_token_id
    lm.set_timestep(0, 1)
    with torch.no_grad():
        logits = torch.cat([lm.model.predict(lm.model.hidden(rows)[:, given:]) for rows in masked.split(64)])
    likely = logits.log_softmax(-1).gather(-1, ids[:, given:, None]).mean((1, 2))
    order = likely.argsort(descending=True)[:count].tolist()
    return [(start, rest) for start, rest in (texts[kept[number]] for number in order)]


def continuations(
    models: Mapping[str, DiffusionLM], prompts: Sequence[str], *, tokens: int, timesteps: int
) -> list[dict[str, Any]]:
    """How each model continues texts.

    Args:
        models: name to model.
        prompts: beginnings.
        tokens: number of tokens to write.
        timesteps: number of denoising steps.

    Returns:
        Rows with ``prompt``, ``model`` and ``words``, the tokens that were written; see ``display.texts``.

    Raises:
        ValueError: an empty prompt.
    """
    rows = []
    for prompt in prompts:
        for name, lm in models.items():
            given = lm.tokenizer.encode(prompt).ids
            if not given:
                raise ValueError(f"prompts: found {prompt!r:.80}, allowed are texts that aren't empty")
            ids = torch.tensor([[*given, *[lm.mask_token_id] * tokens]])
            written = generate(lm, ids, timesteps=timesteps)[0, len(given) :]
            rows.append({"prompt": prompt, "model": name, "words": [_token(lm, token) for token in written]})
    return rows


def agreement(rows: Sequence[Mapping[str, Any]], model: str, against: str = FULL_PRECISION) -> float:
    """The share of the tokens that a model writes as another one does, see ``continuations``."""
    words = {name: [word for row in rows if row["model"] == name for word in row["words"]] for name in (model, against)}
    pairs = list(zip(words[model], words[against], strict=True))
    return sum(one == other for one, other in pairs) / len(pairs)


def _token(lm: DiffusionLM, token: torch.Tensor) -> str:
    return lm.tokenizer.decode([int(token)], skip_special_tokens=False)


def _cell(lm: DiffusionLM, token: torch.Tensor) -> str:
    """One character for the token in a cell."""
    if int(token) == lm.mask_token_id:
        return MASKED
    text = _token(lm, token)
    return text if len(text) == 1 and text.isdigit() else OTHER

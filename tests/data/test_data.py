"""Data: splits that don't leak, puzzles with checked answers, and texts that survive the tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tokenizers import Tokenizer

from thermo_lib.data import corpus
from thermo_lib.data.corpus import SPLITS, held_out_sequences, split_of, token_stream, train_tokenizer
from thermo_lib.data.puzzles import (
    ANSWER,
    COUNTDOWN,
    EOS,
    SPECIAL_TOKENS,
    TASKS,
    Puzzle,
    decode_answers,
    encode_puzzles,
    held_out,
    is_solution,
    make_puzzles,
    read_jsonl,
    sudoku_grids,
)
from thermo_lib.studies.params import default

MPMATH = {"mpmath": default("data.packages")["mpmath"]}

seeds = st.integers(0, 2**31)
tasks = st.sampled_from(TASKS)


def count_solutions(cells: str) -> int:
    """Solutions of a 4x4 Sudoku given as 16 digits, 0 for an empty cell; an independent search cell by cell."""
    if "0" not in cells:
        return 1
    cell = cells.index("0")
    row, column = divmod(cell, 4)
    box = [4 * r + c for r in range(4) for c in range(4) if (r // 2, c // 2) == (row // 2, column // 2)]
    peers = {*range(4 * row, 4 * row + 4), *range(column, 16, 4), *box}
    seen = {cells[i] for i in peers}
    return sum(count_solutions(cells[:cell] + digit + cells[cell + 1 :]) for digit in "1234" if digit not in seen)


def has_conflict(cells: str) -> bool:
    """Whether a row, column or box of a 4x4 grid holds a digit twice."""
    grid = [[int(cells[4 * r + c]) for c in range(4)] for r in range(4)]
    boxes = [[grid[r + i][c + j] for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
    units = [*grid, *map(list, zip(*grid, strict=True)), *boxes]
    return any(len(set(filter(None, unit))) < len(list(filter(None, unit))) for unit in units)


class TestSplits:
    """Every file is in exactly one split, the same on every machine."""

    @pytest.mark.parametrize(
        ("path", "split"),
        [  # int(sha256(path), 16) % 100 is 73, 94 and 95; train ends at 90, validation at 95
            ("mpmath/libmp/libelefun.py", "train"),
            ("mpmath/function_docs.py", "validation"),
            ("mpmath/calculus/calculus.py", "test"),
        ],
    )
    def test_a_path_keeps_its_split_for_ever(self, path: str, split: str) -> None:
        assert split_of(path) == split

    def test_shares_are_90_5_and_5_percent(self) -> None:
        count = 20_000
        splits = [split_of(f"package/module_{number}.py") for number in range(count)]
        for split, share in (("train", 0.90), ("validation", 0.05), ("test", 0.05)):
            bound = 5 * (count * share * (1 - share)) ** 0.5  # five standard deviations of a binomial count
            assert abs(splits.count(split) - count * share) < bound

    def test_splits_of_a_package_are_disjoint_and_complete(self) -> None:
        loaded = {split: corpus.load_corpus(split, MPMATH) for split in SPLITS}
        folder = Path(pytest.importorskip("mpmath").__file__).parent
        sources = {
            str(path.relative_to(folder.parent)): path.read_text(encoding="utf-8")
            for path in folder.rglob("*.py")
            if "tests" not in path.parts
        }
        assert sum(map(len, loaded.values())) == len(sources)
        assert loaded["train"] | loaded["validation"] | loaded["test"] == sources

    def test_a_package_in_another_version_is_named_with_both_versions(self) -> None:
        with pytest.raises(ValueError, match=r"found mpmath==1\.3\.0, required is mpmath==0\.1"):
            corpus.load_corpus("train", {"mpmath": "0.1"})

    def test_a_missing_package_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"no-such-package is not installed, required is no-such-package==1\.0"):
            corpus.load_corpus("train", {"no-such-package": "1.0"})

    def test_an_unknown_split_is_named(self) -> None:
        with pytest.raises(ValueError, match="split: found 'dev', allowed are train, validation, test"):
            corpus.load_corpus("dev", MPMATH)

    def test_a_split_without_files_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"no \.py file of split 'test'"):
            corpus.load_corpus("test", {})


class TestTokenizer:
    """Byte-level: every text survives; digits never merge, so that puzzles have one token a digit."""

    def test_special_tokens_come_first(self, tokenizer: Tokenizer) -> None:
        assert [tokenizer.id_to_token(i) for i in range(5)] == list(SPECIAL_TOKENS)

    @given(text=st.text(max_size=60))
    def test_decoding_an_encoded_text_gives_the_text(self, tokenizer: Tokenizer, text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text

    @given(number=st.integers(0, 10**12))
    def test_every_digit_is_a_token_of_its_own(self, number: int) -> None:
        trained_on_digits = train_tokenizer(iter(["1234 1234 1234\n10 10 10"] * 50), 300)
        assert trained_on_digits.encode(str(number)).tokens == list(str(number))

    def test_a_vocabulary_smaller_than_the_bytes_is_refused(self) -> None:
        with pytest.raises(ValueError, match="vocab_size: found 260, allowed is at least 261"):
            train_tokenizer(iter(["text"]), 260)

    def test_the_stream_ends_every_file_with_end_of_text(self, tokenizer: Tokenizer) -> None:
        stream = token_stream({"a.py": "x = 1\n", "empty.py": "", "b.py": "y = 2\n"}, tokenizer)
        text = tokenizer.decode(stream.tolist(), skip_special_tokens=False)
        assert text == f"x = 1\n{EOS}{EOS}y = 2\n{EOS}"


class TestHeldOutSequences:
    """Held-out sequences are pieces of one file each, and no token is in two of them."""

    FILES = {name: " ".join(str(n) for n in range(low, low + 40)) for name, low in (("a", 1000), ("b", 2000))} | {
        "shorter than a sequence": "3000 3001",
        "empty": "",
    }

    @given(length=st.integers(5, 40), seed=seeds)
    def test_sequences_do_not_overlap(self, tokenizer: Tokenizer, length: int, seed: int) -> None:
        tokens = {name: tokenizer.encode(text).ids for name, text in self.FILES.items()}
        count = sum(len(ids) // length for ids in tokens.values())
        sequences = held_out_sequences(self.FILES, tokenizer, count, length, seed)
        assert sequences.shape == (count, length)
        # The numbers in the files ascend, so a run of five tokens or more has one place only.
        taken = set()
        for sequence in sequences.tolist():
            places = [
                (name, start)
                for name, ids in tokens.items()
                for start in range(len(ids) - length + 1)
                if ids[start : start + length] == sequence
            ]
            assert places, "a sequence crosses the end of a file"
            taken |= {(name, start + i) for name, start in places[:1] for i in range(length)}
        assert len(taken) == count * length

    def test_files_without_a_token_or_a_whole_sequence_are_no_obstacle(self, tokenizer: Tokenizer) -> None:
        found = held_out_sequences({"empty": "", "a": "12345678", "short": "1"}, tokenizer, 2, 4, seed=0)
        assert (found.dtype, found.shape) == (torch.int64, (2, 4))

    def test_the_seed_decides_the_choice(self, tokenizer: Tokenizer) -> None:
        first, again, other = (held_out_sequences(self.FILES, tokenizer, 4, 8, seed) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_more_sequences_than_there_are_is_an_error(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(ValueError, match=r"sequences: found 3 of 4 tokens, the texts hold 2 \(\d+ tokens\)"):
            held_out_sequences({"a": "12345678"}, tokenizer, 3, 4, seed=0)


class TestSudoku:
    """4x4 Sudoku: all grids are known, a puzzle has one solution, and the check knows the rules."""

    def test_there_are_288_grids(self) -> None:
        grids = ["".join(map(str, grid)) for grid in sudoku_grids().tolist()]
        assert len(set(grids)) == 288
        assert not any(has_conflict(grid) for grid in grids)

    @given(seed=seeds, test=st.booleans())
    @settings(max_examples=25)
    def test_a_puzzle_has_4_to_12_clues_and_one_solution(self, seed: int, test: bool) -> None:
        for puzzle in make_puzzles("sudoku", 4, seed, test):
            cells, solution = puzzle.input.replace("\n", ""), puzzle.output.replace("\n", "")
            assert 4 <= 16 - cells.count("0") <= 12
            assert count_solutions(cells) == 1
            assert not has_conflict(solution)
            assert all(clue in ("0", digit) for clue, digit in zip(cells, solution, strict=True))

    def test_the_number_of_clues_is_uniform(self) -> None:
        puzzles = make_puzzles("sudoku", 900, 0, test=False)
        counts = np.bincount([16 - p.input.count("0") for p in puzzles], minlength=13)
        assert counts[:4].sum() == 0
        assert chisquare(counts[4:13]).pvalue > 1e-3

    @given(seed=seeds, cell=st.integers(0, 15), step=st.integers(1, 3))
    def test_one_changed_cell_is_no_solution(self, seed: int, cell: int, step: int) -> None:
        (puzzle,) = make_puzzles("sudoku", 1, seed, test=True)
        place = cell + cell // 4  # after each row of four digits comes a newline
        digit = str((int(puzzle.output[place]) - 1 + step) % 4 + 1)
        assert is_solution(puzzle, puzzle.output)
        assert not is_solution(puzzle, puzzle.output[:place] + digit + puzzle.output[place + 1 :])

    def test_every_valid_solution_counts_not_only_the_stored_one(self) -> None:
        # The first row leaves 288 / 4! = 12 grids.
        puzzle = Puzzle("sudoku", "1234\n0000\n0000\n0000", "1234\n3412\n2143\n4321")
        texts = ["\n".join("".join(map(str, row)) for row in grid.reshape(4, 4)) for grid in sudoku_grids()]
        assert sum(is_solution(puzzle, text) for text in texts) == 12

    @pytest.mark.parametrize(
        "answer",
        [
            pytest.param("2134\n3412\n1243\n4321", id="a valid grid with a clue changed"),
            pytest.param("1234\n3412\n2143\n1324", id="a digit twice in a column"),
            pytest.param("1234\n2143\n3412\n4321", id="a digit twice in a box"),
            pytest.param("1234\n3412\n2143\n432", id="a digit too few"),
            pytest.param("1234\n3412\n2143\n43211", id="a digit too many"),
            pytest.param("1234341221434321", id="no lines"),
            pytest.param("1234\n3412\n2143\n4320", id="an empty cell"),
            pytest.param("1234\n3412\n2143\n432x", id="a letter"),
            pytest.param("", id="nothing"),
        ],
    )
    def test_wrong_answers_are_rejected(self, answer: str) -> None:
        puzzle = Puzzle("sudoku", "1000\n0000\n0000\n0001", "1234\n3412\n2143\n4321")
        assert is_solution(Puzzle("sudoku", "1000\n0000\n0000\n0000", ""), "1234\n3412\n2143\n4321")
        assert not is_solution(puzzle, answer)


class TestCountdown:
    """Countdown: reach the target with every number used once, whole results, right arithmetic."""

    @given(seed=seeds, test=st.booleans())
    def test_a_puzzle_is_solved_by_its_own_output(self, seed: int, test: bool) -> None:
        for puzzle in make_puzzles("countdown", 5, seed, test):
            *numbers, target = map(int, puzzle.input.split(","))
            assert len(numbers) == 3
            assert all(1 <= number <= 99 for number in numbers)
            assert 10 <= target <= 100
            available = sorted(numbers)
            for equation in puzzle.output.split(","):
                left, right = equation.split("=")
                operation = next(c for c in left if c in "+-*/")
                a, b = map(int, left.split(operation))
                available.remove(a)
                available.remove(b)
                exact = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[operation]
                assert exact == int(right)
                available.append(int(right))
            assert available == [target]
            assert is_solution(puzzle, puzzle.output)

    @pytest.mark.parametrize(
        "answer",
        ["3*4=12,12+2=14", "4*3=12,2+12=14", "4*3=12,12+2=14", " 3*4=12,12+2=14\n"],
    )
    def test_every_valid_solution_counts_not_only_the_stored_one(self, answer: str) -> None:
        assert is_solution(Puzzle("countdown", "2,3,4,14", "3*4=12,2+12=14"), answer)

    @pytest.mark.parametrize(
        ("numbers", "answer"),
        [
            pytest.param("2,3,4,14", "3*4=13,13+1=14", id="wrong arithmetic"),
            pytest.param("2,3,4,14", "3*4=12,12+2=15", id="wrong last result"),
            pytest.param("2,3,4,14", "3+4=7,7*2=14,2*7=14", id="a number used twice"),
            pytest.param("2,3,4,16", "4*4=16", id="a number that is there once used twice"),
            pytest.param("2,3,4,12", "3*4=12", id="a number left over"),
            pytest.param("2,3,4,14", "2+3=5,5+4=9", id="another target"),
            pytest.param("2,3,4,14", "5+9=14", id="numbers that are not there"),
            pytest.param("2,3,4,5", "3/2=1,1+4=5", id="a division with a rest"),
            pytest.param("2,3,0,5", "3/0=0,0+5=5", id="a division by zero"),
            pytest.param("2,3,4,14", "3*4=12,12+2", id="an equation without a result"),
            pytest.param("2,3,4,14", "3x4=12,12+2=14", id="no operation"),
            pytest.param("2,3,4,14", "3*4=12,12+２=14", id="a digit that isn't 0-9"),
            pytest.param("2,3,4,14", f"3*4={'1' * 5000}", id="thousands of digits"),
            pytest.param("2,3,4,14", "14", id="only the target"),
            pytest.param("2,3,4,14", "", id="nothing"),
        ],
    )
    def test_wrong_answers_are_rejected(self, numbers: str, answer: str) -> None:
        assert not is_solution(Puzzle("countdown", numbers, ""), answer)


class TestPuzzles:
    """Puzzles of both tasks: split by a checksum of the input, written and read as tokens and as JSONL."""

    @given(task=tasks, seed=seeds, other=seeds)
    @settings(max_examples=15)
    def test_no_puzzle_to_train_on_is_a_test_puzzle(self, task: str, seed: int, other: int) -> None:
        train = {p.input for p in make_puzzles(task, 20, seed, test=False)}
        test = {p.input for p in make_puzzles(task, 20, other, test=True)}
        assert not train & test
        assert {held_out(text) for text in train} == {False}
        assert {held_out(text) for text in test} == {True}

    @given(task=tasks, seed=st.one_of(seeds, st.tuples(seeds, seeds)))
    @settings(max_examples=10)
    def test_equal_seeds_give_equal_puzzles(self, task: str, seed: int | tuple[int, int]) -> None:
        first = make_puzzles(task, 3, seed, test=False)
        assert first == make_puzzles(task, 3, seed, test=False)
        assert len({p.input for p in first}) == 3

    def test_an_unknown_task_is_named(self) -> None:
        for make in (lambda: make_puzzles("chess", 1, 0, test=True), lambda: Puzzle("chess", "", "")):
            with pytest.raises(ValueError, match="task: found 'chess', allowed are sudoku, countdown"):
                make()

    @given(task=tasks, seed=seeds, count=st.integers(1, 4))
    @settings(max_examples=20)
    def test_decoding_encoded_puzzles_gives_their_outputs(
        self, tokenizer: Tokenizer, task: str, seed: int, count: int
    ) -> None:
        puzzles = make_puzzles(task, count, seed, test=False)
        ids, is_answer = encode_puzzles(puzzles, tokenizer, 60)
        assert ids.shape == is_answer.shape == (count, 60)
        assert decode_answers(ids, is_answer, tokenizer) == [p.output for p in puzzles]

    def test_the_prompt_is_visible_and_everything_after_it_is_the_answer(self, tokenizer: Tokenizer) -> None:
        ids, is_answer = encode_puzzles([Puzzle("countdown", "2,3,4,14", "3*4=12,12+2=14")], tokenizer, 32)
        text = tokenizer.decode(ids[0].tolist(), skip_special_tokens=False)
        # 1 marker, 8 characters of input, 1 marker, 14 of output; every character here is one token.
        assert text == f"{COUNTDOWN}2,3,4,14{ANSWER}3*4=12,12+2=14{EOS * 8}"
        assert is_answer[0].tolist() == [False] * 10 + [True] * 22

    def test_an_answer_ends_at_the_first_end_of_text(self, tokenizer: Tokenizer) -> None:
        eos = tokenizer.token_to_id(EOS)
        ids = torch.tensor([[*tokenizer.encode("12").ids, eos, *tokenizer.encode("3").ids], [*[eos] * 4]])
        assert decode_answers(ids, torch.ones(2, 4, dtype=torch.bool), tokenizer) == ["12", ""]

    def test_a_puzzle_that_does_not_fit_is_named_with_the_length_it_needs(self, tokenizer: Tokenizer) -> None:
        puzzle = Puzzle("countdown", "2,3,4,14", "3*4=12,12+2=14")  # 24 tokens, and an end-of-text token
        assert encode_puzzles([puzzle], tokenizer, 25)[0].shape == (1, 25)
        with pytest.raises(ValueError, match=r"length: found 24, puzzle '2,3,4,14' needs at least 25 tokens"):
            encode_puzzles([puzzle], tokenizer, 24)

    @given(task=tasks, seed=seeds)
    @settings(max_examples=10)
    def test_reading_written_lines_gives_the_puzzles(
        self, tmp_path_factory: pytest.TempPathFactory, task: str, seed: int
    ) -> None:
        puzzles = make_puzzles(task, 3, seed, test=False)
        path = tmp_path_factory.mktemp("jsonl") / "puzzles.jsonl"
        lines = [json.dumps({"input": p.input, "output": p.output}) for p in puzzles]
        path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
        assert read_jsonl(path, task) == puzzles

    def test_a_line_may_lack_the_output(self, tmp_path: Path) -> None:
        path = tmp_path / "puzzles.jsonl"
        path.write_text('{"input": "2,3,4,14"}\n', encoding="utf-8")
        assert read_jsonl(path, "countdown") == [Puzzle("countdown", "2,3,4,14", "")]

    @pytest.mark.parametrize(
        "line",
        ['{"input": "2,3,4,14"', "{}",
         '{"output": "x"}', '["2,3,4,14"]', '"2,3,4,14"', "7", "null", "nonsense", '{"input": 7}',
         '{"input": "2,3,4,14", "output": null}'],
    )  # fmt: skip
    def test_a_malformed_line_is_named_with_its_file_and_number(self, line: str, tmp_path: Path) -> None:
        path = tmp_path / "puzzles.jsonl"
        path.write_text('{"input": "2,3,4,14"}\n\n' + line + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"puzzles\.jsonl, line 3: (input: |output: )?found"):
            read_jsonl(path, "countdown")

    @pytest.mark.parametrize(
        ("task", "puzzle_input"),
        [
            ("sudoku", "1234\n0000\n0000"),
            ("sudoku", "1234\n0000\n0000\n00005"),
            ("sudoku", "words"),
            ("countdown", "2,3,four,14"),
            ("countdown", "2,3,４,14"),
            ("countdown", "2,3,4," + "1" * 5000),
            ("sudoku", "123４\n0000\n0000\n0000"),
            ("countdown", ""),
        ],
    )
    def test_an_input_that_is_no_puzzle_is_named_with_its_file_and_line(
        self, task: str, puzzle_input: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "puzzles.jsonl"
        path.write_text(json.dumps({"input": puzzle_input}) + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"puzzles\.jsonl, line 1: input: found"):
            read_jsonl(path, task)

    def test_a_character_that_separates_lines_of_text_does_not_split_a_json_line(self, tmp_path: Path) -> None:
        path = tmp_path / "puzzles.jsonl"
        path.write_text('{"input": "2,3,4,14", "output": "\u2028"}\n', encoding="utf-8")  # legal unescaped in JSON
        assert read_jsonl(path, "countdown") == [Puzzle("countdown", "2,3,4,14", "\u2028")]

    def test_a_file_without_puzzles_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "puzzles.jsonl"
        path.write_text("\n\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"puzzles\.jsonl: found no puzzle"):
            read_jsonl(path, "sudoku")

    def test_an_unknown_task_of_a_file_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "puzzles.jsonl"
        path.write_text('{"input": "x"}\n', encoding="utf-8")
        with pytest.raises(ValueError, match="task: found 'chess'"):
            read_jsonl(path, "chess")

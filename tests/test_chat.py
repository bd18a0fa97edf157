"""The command ``chat``: what the model is told, what is shown on a terminal and in a pipe, and how it ends."""

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Run
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from thermo_lib import chat as talk
from thermo_lib import generate, load_model
from thermo_lib.chat import MASK, Chat, Screen, converse, printable, wrapped
from thermo_lib.models.lm import DiffusionLM, save_model
from thermo_lib.models.tokenization import ChatTemplate

TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}")
HOW = {"timesteps": 3, "sampler": "maskgit_plus", "seed": 0}


class Terminal(io.StringIO):
    """A terminal that is written to; ``seen`` is what stands on it.

    Args:
        height: lines above which nothing can be drawn again.
    """

    def __init__(self, height: int = 24):
        super().__init__()
        self.height = height

    def isatty(self) -> bool:
        return True

    def seen(self) -> str:
        lines, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|.|\n", self.getvalue()):
            if part == "\x1b[J":
                lines = [*lines[:row], lines[row][:column]]
            elif part.endswith("A") and part[0] == "\x1b":
                row -= int(part[2:-1])
                assert row >= max(0, len(lines) - self.height)
            elif part.startswith("\x1b"):
                assert part in ("\x1b[2m", "\x1b[0m")
            elif part == "\r":
                column = 0
            elif part == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            else:
                lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
                column += 1
        return "\n".join(lines)


class Typed(io.StringIO):
    """A terminal that lines are read from."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def lm(build_tiny: Callable[[int], DiffusionLM]) -> DiffusionLM:
    found = build_tiny(0)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Typed]:
    """A terminal on which these lines are typed; an exception in their place is raised."""

    def make(*lines: str | type[BaseException]) -> Typed:
        left = list(lines)

        def read(prompt: str) -> str:
            line = left.pop(0) if left else EOFError
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        return Typed()

    return make


@pytest.fixture
def size(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Says how wide and high the terminal is."""

    def make(columns: int, lines: int) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(lines))

    return make


class TestText:
    def test_a_state_shows_masks_and_ends_before_a_special_token(self, lm: DiffusionLM) -> None:
        chat, mask = Chat(lm, 6, HOW), lm.mask_token_id
        one, two = lm.tokenizer.encode("def f").ids, lm.tokenizer.encode("print").ids
        end = lm.tokenizer.token_to_id("<|endoftext|>")
        assert chat.shown(torch.tensor([mask, mask, *one, mask, *two])) == f"{MASK * 2}def f{MASK}print"
        assert chat.shown(torch.tensor([*one, mask, *two, end, mask, *one])) == f"def f{MASK}print"
        assert chat.shown(torch.tensor([end, mask])) == ""

    @pytest.mark.parametrize(
        ("text", "lines"),
        [
            ("", [""]),
            ("abcdef", ["abcd", "ef"]),
            ("abcd\n\nef", ["abcd", "", "ef"]),
            ("日本語a", ["日本", "語a"]),
            ("e\u0301" * 4, ["e\u0301" * 4]),
            ("a日本", ["a日", "本"]),
        ],
    )
    def test_lines_are_no_wider_than_the_terminal(self, text: str, lines: list[str]) -> None:
        assert wrapped(text, 4) == lines

    def test_a_single_wide_letter_has_a_line_to_itself(self) -> None:
        assert wrapped("日本", 1) == ["日", "本"]

    def test_what_controls_a_terminal_is_left_out(self) -> None:
        assert printable("a\x1b[2J\rb\tc\nd\x07\x9b👩\u200d🔬") == "a[2Jb\tc\nd👩\u200d🔬"


class TestScreen:
    def test_every_state_takes_the_place_of_the_one_before(self, size: Callable[[int, int], None]) -> None:
        size(9, 24)
        terminal = Terminal()
        terminal.write("> hello\n")
        screen = Screen(terminal)
        for text in (f"{MASK * 20}", f"ab{MASK * 5}\n\tc", f"{MASK}", "a\nb\nc"):
            screen.draw(text)
            assert terminal.seen() == "> hello\n" + "\n".join(wrapped(text.expandtabs(4), 8))
        screen.finish("a long answer\tin two lines\nor so")
        assert terminal.seen() == "> hello\na long answer\tin two lines\nor so\n"
        screen.draw("next")
        assert terminal.seen() == "> hello\na long answer\tin two lines\nor so\nnext"
        assert f"\x1b[2m{MASK * 8}\x1b[0m" in terminal.getvalue()

    def test_of_a_text_higher_than_the_terminal_the_end_is_drawn(self, size: Callable[[int, int], None]) -> None:
        size(80, 5)
        terminal = Terminal(height=5)
        screen = Screen(terminal)
        for last in (30, 31):
            screen.draw("\n".join(map(str, range(last))))
            assert terminal.seen() == "\n".join(map(str, range(last - 4, last)))


class TestConversation:
    @pytest.fixture
    def prompts(self, lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What the model was given, without the masks."""
        seen: list[str] = []

        def record(lm: DiffusionLM, ids: Tensor, **how: Any) -> Tensor:
            known = ids[0][ids[0] != lm.mask_token_id]
            assert ids.shape == (1, len(known) + 6)
            seen.append(lm.tokenizer.decode(known.tolist(), skip_special_tokens=False))
            return generate(lm, ids, **how)

        monkeypatch.setattr(talk, "generate", record)
        return seen

    def test_the_model_is_told_all_that_was_said(self, lm: DiffusionLM, prompts: list[str]) -> None:
        target = io.StringIO()
        source = io.StringIO("one\n\ntwo\n/clear\nthree\n/exit\nfour\n")
        converse(Chat(lm, 6, HOW, system="Be brief"), source, target)
        first, second = (Chat(lm, 6, HOW, system="Be brief") for _ in range(2))
        answers = [first.answer("one"), first.answer("two"), second.answer("three")]
        assert len(set(answers)) == 3
        assert prompts[:3] == ["s:Be brief;u:one;", f"s:Be brief;u:one;a:{answers[0]};u:two;", "s:Be brief;u:three;"]
        assert target.getvalue() == "".join(f"{answer}\n" for answer in answers)

    def test_plain_text_is_continued_line_by_line(self, lm: DiffusionLM, prompts: list[str]) -> None:
        lm.chat_template = None
        converse(Chat(lm, 6, HOW, raw=True), io.StringIO("for i in\nclass A"), io.StringIO())
        assert prompts == ["for i in", "class A"]

    def test_what_closes_a_text_stays_behind_the_answer(self, lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
        """As ``[SEP]`` of BERT's tokenizers; the command that generates does the same."""
        text, mask = "<|endoftext|>", lm.mask_token_id
        end = lm.tokenizer.token_to_id(text)
        closing = TemplateProcessing(single=f"{text} $A {text}", special_tokens=[(text, end)])
        monkeypatch.setattr(lm.tokenizer, "post_processor", closing)
        states: list[list[int]] = []
        monkeypatch.setattr(talk, "generate", lambda lm, ids, **how: states.append(ids[0].tolist()) or ids)
        inside = lm.tokenizer.encode("for i in", add_special_tokens=False).ids
        Chat(lm, 3, HOW, raw=True).answer("for i in")
        assert states == [[end, *inside, mask, mask, mask, end]]

    def test_a_terminal_shows_every_state(
        self,
        lm: DiffusionLM,
        typed: Callable[..., Typed],
        size: Callable[[int, int], None],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        size(30, 24)
        drawn, draw = [], Screen.draw
        monkeypatch.setattr(Screen, "draw", lambda screen, text: drawn.append(text) or draw(screen, text))
        terminal = Terminal()
        converse(Chat(lm, 6, HOW), typed("one", "two"), terminal)
        chat = Chat(lm, 6, HOW)
        answers = [chat.answer("one"), chat.answer("two")]
        assert terminal.seen() == "".join(f"{printable(answer)}\n" for answer in answers)
        assert len(drawn) == 6
        assert drawn[0] == drawn[3] == MASK * 6
        assert 6 > drawn[1].count(MASK) > drawn[2].count(MASK) > 0
        assert capsys.readouterr().out == "\n"  # after the last prompt

    def test_an_error_on_a_terminal_ends_only_its_answer(
        self, lm: DiffusionLM, typed: Callable[..., Typed], capsys: pytest.CaptureFixture[str]
    ) -> None:
        lm.model.config.max_position_embeddings = 20
        chat, terminal, long = Chat(lm, 6, HOW), Terminal(), "x " * 20
        converse(chat, typed(long, "one", "/exit"), terminal)
        length = len(lm.tokenizer.encode(f"u:{long};").ids) + 6
        found = f"error: chat: found {length} tokens with the answer, allowed are 20, max_position_embeddings; /clear"
        assert capsys.readouterr().err.startswith(found)
        one, answer = (message["content"] for message in chat.messages)
        assert one == "one"
        assert terminal.seen() == f"{printable(answer)}\n"
        with pytest.raises(ValueError, match="chat: found"):
            converse(chat, io.StringIO(long), io.StringIO())

    def test_ctrl_c_ends_it_at_the_prompt_and_in_an_answer(
        self, lm: DiffusionLM, typed: Callable[..., Typed], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        converse(Chat(lm, 6, HOW), typed(KeyboardInterrupt, "one"), terminal := Terminal())
        assert terminal.getvalue() == ""

        def stopped(lm: DiffusionLM, ids: Tensor, on_state: Callable[..., None], **_: Any) -> Tensor:
            on_state(0, slice(None), ids)
            raise KeyboardInterrupt

        monkeypatch.setattr(talk, "generate", stopped)
        converse(Chat(lm, 6, HOW), typed("one", "two"), terminal)
        assert terminal.seen() == f"{MASK * 6}\n"


class TestCommand:
    @pytest.fixture
    def say(self, monkeypatch: pytest.MonkeyPatch, run: Run) -> Callable[..., tuple[int, str, str]]:
        """Runs the command on some lines."""

        def command(lines: str, *arguments: object) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
            return run("chat", "--max-new-tokens", 6, "--timesteps", 3, *arguments)

        return command

    def test_in_a_pipe_it_writes_what_generate_writes(
        self, say: Callable[..., tuple[int, str, str]], run: Run, lm: DiffusionLM, folder: Path, tmp_path: Path
    ) -> None:
        how = ("--sampler", "origin", "--temperature", 0.7, "--top-k", 5, "--block-length", 2, "--seed", 4)
        save_model(lm, tmp_path / "instruct")
        for model, here, there in ((folder, ["--raw"], []), (tmp_path / "instruct", [], ["--chat"])):
            asked = ("generate", "--prompt", "for i in", "--max-new-tokens", 6, "--timesteps", 3, *there)
            _, expected, _ = run(*asked, "--model", model, *how)
            assert say("for i in\n/exit\n", "--model", model, *here, *how) == (0, expected, "")

    def test_it_talks_to_a_model_with_a_template(
        self, say: Callable[..., tuple[int, str, str]], lm: DiffusionLM, tmp_path: Path
    ) -> None:
        save_model(lm, tmp_path / "instruct", dtype=torch.float32)
        status, out, err = say("one\ntwo\n", "--model", tmp_path / "instruct", "--system", "Be brief")
        how = {"timesteps": 3, "sampler": "entropy"}
        chat = Chat(load_model(str(tmp_path / "instruct")), 6, how, system="Be brief")
        assert (status, out, err) == (0, f"{chat.answer('one')}\n{chat.answer('two')}\n", "")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "chat: found no chat template in '.*', allowed is a model with one, or --raw, which continues"),
            (["--raw", "--system", "x"], "system: found 'x' with --raw, allowed is none"),
            (["--raw", "--max-new-tokens", 0], "max-new-tokens: found 0, allowed is at least 1"),
            (["--raw", "--sampler", "best"], "sampler: found 'best', allowed are origin"),
            (["--raw", "--timesteps", 0], "timesteps: found 0, allowed is at least 1"),
            (["--raw", "--dense"], "dense: found .*, which isn't quantized"),
            (
                ["--raw", "--block-length", 4, "--timesteps", 1],
                "timesteps: found 1, allowed is at least 2, one for each block",
            ),
        ],
        ids=str,
    )
    def test_a_wrong_value_is_named(
        self, say: Callable[..., tuple[int, str, str]], folder: Path, arguments: list[object], message: str
    ) -> None:
        status, out, err = say("hello\n", "--model", folder, *arguments)
        assert (status, out) == (2, "")
        assert re.search(message, err)
        assert len(err.splitlines()) == 1

    def test_ctrl_c_while_the_model_is_loaded_is_no_traceback(
        self, say: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stopped(*_: object, **__: object) -> DiffusionLM:
            raise KeyboardInterrupt

        monkeypatch.setattr("thermo_lib.commands.load_any", stopped)
        assert say("hello\n") == (0, "", "")

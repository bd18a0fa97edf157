"""A conversation with a model: what ``python -m thermo_lib chat`` reads and shows.

On a terminal an answer is drawn again at every denoising step, masks as dim blocks; elsewhere only the finished answer
is written, so that the command can stand in a pipe.
"""

import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TextIO

import torch
from torch import Tensor

from thermo_lib.diffusion.sampling import generate
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.models.tokenizer_json import encode, left_open

MASK = "░"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass
class Chat:
    """A conversation.

    Attributes:
        lm: the model that answers.
        count: number of tokens that are filled for an answer.
        how: arguments of ``generate``.
        system: what the model is told before all; None for nothing.
        raw: continue each line as plain text, for a model without a chat template; nothing is kept then.
        messages: what was said, as ``lm.chat`` takes it.

    Raises:
        ValueError: a model without a chat template, or a system message, where ``raw`` doesn't and does ask for plain
            text; or no token to fill.
    """

    lm: DiffusionLM
    count: int
    how: Mapping[str, Any]
    system: str | None = None
    raw: bool = False
    messages: list[dict[str, str]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"max-new-tokens: found {self.count}, allowed is at least 1")
        check_system(self.raw, self.system)
        if not self.raw and self.lm.chat_template is None:
            allowed = "allowed is a model with one, or --raw, which continues each line as plain text"
            raise ValueError(f"chat: found no chat template in {self.lm.name!r}, {allowed}")
        self.clear()

    def clear(self) -> None:
        """Forget what was said, but for the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def answer(self, line: str, screen: "Screen | None" = None) -> str:
        """What the model says to a line; both are kept, unless an error is raised.

        Args:
            line: what the user says.
            screen: where each state of the answer is drawn; None for nowhere.

        Raises:
            ValueError: a conversation that is longer than the model's positions, or what ``DiffusionLM.chat`` and
                ``generate`` raise.
        """
        said = [*self.messages, {"role": "user", "content": line}]
        text = line if self.raw else self.lm.chat(said)
        (encoded,) = encode(self.lm.tokenizer, [text], add_special_tokens=self.raw)
        prompt, end = left_open(encoded)
        answered = slice(len(prompt), len(prompt) + self.count)
        length, most = answered.stop + len(end), self.lm.model.config.max_position_embeddings
        if length > most:
            found = f"found {length} tokens with the answer"
            raise ValueError(f"chat: {found}, allowed are {most}, max_position_embeddings; /clear starts over")

        on_state: Callable[[int, slice, Tensor], None] | None = None
        if screen is not None:

            def draw(_timestep: int, _rows: slice, ids: Tensor) -> None:
                screen.draw(self.shown(ids[0, answered]))

            on_state = draw
        ids = torch.tensor([[*prompt, *[self.lm.mask_token_id] * self.count, *end]])
        filled = generate(self.lm, ids, on_state=on_state, **self.how)
        answer = self.lm.decode(filled[0, answered])
        if not self.raw:
            self.messages = [*said, {"role": "assistant", "content": answer}]
        return answer

    def shown(self, ids: Tensor) -> str:
        """A state of the answer, ``(count,)``, as text up to the first special token, with ``MASK`` for each mask."""
        mask, pieces = self.lm.mask_token_id, []
        ends = {n for n, token in self.lm.tokenizer.get_added_tokens_decoder().items() if token.special and n != mask}
        for is_mask, run in groupby(ids.tolist(), lambda token: token == mask):
            tokens = list(run)
            length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
            pieces.append(MASK * length if is_mask else self.lm.tokenizer.decode(tokens[:length]))
            if length < len(tokens):
                break
        return "".join(pieces)


def check_system(raw: bool, system: str | None) -> None:
    """Raise ValueError for a system message where plain text is asked for."""
    if raw and system is not None:
        raise ValueError(f"system: found {system!r:.80} with --raw, allowed is none: plain text has no roles")


class Screen:
    """The part of a terminal below the last line that was read, where a text is drawn again and again.

    Args:
        stream: the terminal.
    """

    def __init__(self, stream: TextIO):
        self.stream, self.lines = stream, 0

    def draw(self, text: str) -> None:
        """Show the end of a text that fits into the terminal, in the place of what was drawn before."""
        size = shutil.get_terminal_size()
        lines = wrapped(printable(text).expandtabs(4), max(1, size.columns - 1))[-max(1, size.lines - 1) :]
        self._replace("\n".join(re.sub(f"{MASK}+", lambda run: f"{_DIM}{run[0]}{_PLAIN}", line) for line in lines))
        self.lines = len(lines)

    def finish(self, text: str) -> None:
        """Show a whole text, and begin a new line."""
        self._replace(f"{printable(text)}\n")
        self.lines = 0

    def leave(self) -> None:
        """Begin a new line below what was drawn, if that isn't finished."""
        if self.lines:
            self.stream.write("\n")
        self.lines = 0

    def _replace(self, text: str) -> None:
        up = f"\x1b[{self.lines - 1}A" if self.lines > 1 else ""
        self.stream.write(f"\r{up}\x1b[J{text}")
        self.stream.flush()


def printable(text: str) -> str:
    """A text without what would control the terminal, but for line breaks and tabs."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def wrapped(text: str, columns: int) -> list[str]:
    """The lines that a text takes, none wider than so many columns, unless by a single wide letter."""
    lines = []
    for line in text.split("\n"):
        start = width = 0
        for place, letter in enumerate(line):
            wide = 0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
            if width + wide > columns and place > start:
                lines.append(line[start:place])
                start, width = place, 0
            width += wide
        lines.append(line[start:])
    return lines


def _read(source: TextIO, prompt: str) -> Iterator[str]:
    """The lines that a user types, or those of a file or a pipe."""
    if not source.isatty():
        yield from (line.rstrip("\n") for line in source)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (input lets lines be edited then)
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            if prompt:
                print()  # the next one's line is a new one
            return


def converse(chat: Chat, source: TextIO | None = None, target: TextIO | None = None) -> None:
    """Answer line after line, up to ``/exit``, the end of the input or Ctrl-C; ``/clear`` starts over.

    Args:
        chat: the conversation.
        source: where lines come from, by default the process's input.
        target: where answers go, by default the process's output.

    Raises:
        ValueError: what ``Chat.answer`` raises; a user at a terminal is shown it instead, and may go on.
    """
    source, target = source or sys.stdin, target or sys.stdout
    screen = Screen(target) if target.isatty() else None
    try:
        for line in _read(source, "" if screen is None else "> "):
            match line.strip():
                case "":
                    continue
                case "/exit":
                    return
                case "/clear":
                    chat.clear()
                    continue
            try:
                answer = chat.answer(line, screen)
            except ValueError as error:
                if not source.isatty():
                    raise
                if screen is not None:
                    screen.leave()
                print(f"error: {error}", file=sys.stderr)
                continue
            if screen is None:
                print(answer, file=target, flush=True)
            else:
                screen.finish(answer)
    except KeyboardInterrupt:
        if screen is not None:
            screen.leave()

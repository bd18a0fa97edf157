"""nbval compares what a notebook printed and showed as text, Markdown and HTML, not its progress bars, its remarks on
how a run goes and its warnings on stderr, nor its pictures.

On the model of processor that a notebook was executed on, every character counts. On another one numbers with a decimal
point may differ by 0.1 or a tenth: the last bits of a sum are others there, so that GPTQ takes other codes. How a table
is drawn (its `<style>`) follows from its numbers and is not compared there.
"""

import re

import pytest

_NUMBER = re.compile(r"[-+]?\d+\.\d+")
_STYLE = re.compile(r"<style.*?</style>", re.DOTALL)


def _words(text: str) -> list[str]:
    """All but the numbers, without what a column's width changes."""
    return re.sub(r"-{2,}", "--", _NUMBER.sub(" # ", text)).split()


class Roughly(str):
    """A text that equals another one if only its numbers differ, and these by little."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return False
        texts = [_STYLE.sub("", text) for text in (self, other)]
        if _words(texts[0]) != _words(texts[1]):
            return False
        pairs = zip(*([float(number) for number in _NUMBER.findall(text)] for text in texts), strict=True)
        return all(abs(a - b) <= 0.1 * max(1, abs(a), abs(b)) for a, b in pairs)

    def __ne__(self, other: object) -> bool:
        return not self == other


def pytest_itemcollected(item: pytest.Item) -> None:
    """Set how the outputs of a notebook's cell are compared."""
    from thermo_lib.notebooks import (
        is_aside,
        processor,
    )  # takes seconds, and a process that hands cells to others needs it not

    notebook = item.parent
    if not hasattr(notebook, "skip_compare"):
        return
    if "stderr" not in notebook.skip_compare:
        notebook.skip_compare = (*notebook.skip_compare, "stderr")
    compare = item.compare_outputs
    item.compare_outputs = lambda new, *stored: compare([one for one in new if not is_aside(one)], *stored)
    if notebook.nb.metadata.get("processor") != processor():
        exactly = item.sanitize
        item.sanitize = lambda output: Roughly(exactly(output)) if isinstance(output, str) else output

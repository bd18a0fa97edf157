"""What notebooks show: answers of a few sentences, tables whose two forms say the same and are equal for equal rows."""

import html
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from thermo_lib.evaluation import display
from thermo_lib.evaluation.display import answer, between, table, table_html, table_text, verdicts

ROWS = [
    {"name": "full precision", "accuracy": 0.413, "path_kl": 0.0, "path_kl_ci": [0.0, 0.0]},
    {"name": "rtn <2 bits>", "accuracy": 0.316, "path_kl": 84.26, "path_kl_ci": [80.0, 88.0]},
    {"name": "gptq", "accuracy": 0.382, "path_kl": 23.62, "path_kl_ci": [22.0, 25.0]},
    {"name": "gptq, no path KL", "accuracy": 0.3821},
]
KL = {"path KL (nats)": min}


@pytest.fixture
def shell() -> Iterator[None]:
    """As in a notebook; other tests of this process are in none again."""
    InteractiveShell.instance()
    yield
    InteractiveShell.clear_instance()


class Cells(HTMLParser):
    """The texts of a table's cells, row by row, and those in bold."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.bold: list[str] = []
        self.inside = self.is_bold = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.inside = True
            self.rows[-1].append("")
        self.is_bold = self.is_bold or tag == "strong"

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")
        self.is_bold = self.is_bold and tag != "strong"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data.strip()
        if self.is_bold:
            self.bold.append(data)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What is shown to the notebook's front end."""
    found: list[dict[str, str]] = []
    monkeypatch.setattr("IPython.display.display", lambda data, *, raw: found.append(data) if raw else None)
    return found


def test_both_forms_have_the_same_headings_and_cells() -> None:
    in_html = Cells(table_html(ROWS, title="t")).rows
    in_text = [re.split(r"\s{2,}", line) for line in table_text(ROWS, title="t").splitlines()[2:]]
    assert in_html == [in_text[0], *in_text[2:]]
    assert in_html[0] == ["configuration", "accuracy (0-1)", "path KL (nats)", "path KL, 95 %"]
    assert in_html[2] == ["rtn <2 bits>", "0.316", "84.26", "80.00..88.00"]
    assert in_html[4] == ["gptq, no path KL", "0.382", "-", "-"]


def test_the_best_is_marked_in_both_forms_and_full_precision_is_not_in_the_competition() -> None:
    best = KL | {"accuracy (0-1)": max}
    cells = Cells(table_html(ROWS, title="t", best=best))
    assert cells.bold == ["0.382", "23.62", "0.382"]  # both accuracies print the same
    marked = re.findall(r"([\d.]+)\*", table_text(ROWS, title="t", best=best))
    assert marked == cells.bold


def test_one_row_in_competition_is_no_best() -> None:
    assert Cells(table_html(ROWS[:2], title="t", best=KL)).bold == []
    assert "*" not in table_text(ROWS[:2], title="t", best=KL)


def test_equal_rows_are_equal_bytes_and_a_changed_number_is_not() -> None:
    changed = [*ROWS[:3], {**ROWS[3], "accuracy": 0.3836}]
    assert table_html(ROWS, title="t") == table_html(ROWS, title="t") != table_html(changed, title="t")
    assert table_text(ROWS, title="t") == table_text(ROWS, title="t") != table_text(changed, title="t")


def test_tables_with_other_titles_have_styles_of_their_own_and_numbers_in_titles_do_not_count() -> None:
    names = {title: re.search(r"#T_(\w+)", table_html(ROWS, title=title))[1] for title in ("a", "b", "a 1.5", "a 2.5")}
    assert names["a"] != names["b"]
    assert names["a 1.5"] == names["a 2.5"]


def bars(text: str) -> list[tuple[float, float, str]]:
    """Start and stop in percent, and colour, of each stripe that a table draws."""
    found = re.findall(r"transparent ([\d.]+)%, (#\w+) [\d.]+%, #\w+ ([\d.]+)%", text)
    return [(float(start), float(stop), color) for start, color, stop in found]


def test_a_bar_lies_where_its_interval_does_on_the_scale_of_the_column() -> None:
    rows = [{"name": name, "ci": ci} for name, ci in {"a": [0.0, 5.0], "b": [5.0, 10.0], "c": [2.5, 2.5]}.items()]
    columns = {"name": ("name", "{}"), "95 %": ("ci", "{0[0]}..{0[1]}")}
    assert bars(table_html(rows, columns, title="t")) == [
        (0.0, 50.0, display.OURS),
        (50.0, 100.0, display.OURS),
        (25.0, 27.0, display.OURS),  # one that has no width can still be seen
    ]
    below = [{"name": "d", "ci": [-10.0, 10.0]}]
    assert bars(table_html(below, columns, title="t"))[1][:2] == (49.5, 50.5)
    assert bars(table_html([{"name": "e", "ci": [1.0, 1.0]}], columns, title="t")) == []


def test_beside_ours_others_are_grey() -> None:
    text = table_html(ROWS, title="t", ours=["gptq"])
    assert [color for _, _, color in bars(text)] == [display.OTHERS, display.OTHERS, display.OURS]
    assert Cells(text).bold == ["gptq"]


def test_a_table_loads_nothing_and_names_are_not_taken_for_html() -> None:
    text = table_html([{"name": "<script>alert(1)</script>"}], title="<img src=x>")
    assert not re.search(r"<(script|img|link)|http|@import|url\(", text)
    assert html.escape("<img src=x>") in text


@pytest.mark.parametrize(
    ("rows", "best", "message"),
    [
        ([], None, "rows: found none, allowed is at least one"),
        (ROWS, {"accuracy": max}, "best: found 'accuracy', allowed are 'configuration', "),
    ],
)
def test_what_cannot_be_shown_is_named(rows: list[dict[str, Any]], best: dict[str, Any] | None, message: str) -> None:
    for form in (table_html, table_text):
        with pytest.raises(ValueError, match=re.escape(message)):
            form(rows, title="t", best=best)


def test_a_cell_shows_both_forms_of_a_table(shown: list[dict[str, str]]) -> None:
    table(ROWS, title="t", best=KL)
    assert shown == [
        {"text/html": table_html(ROWS, title="t", best=KL), "text/plain": table_text(ROWS, title="t", best=KL)}
    ]


@pytest.mark.usefixtures("shell")
def test_ipython_shows_what_is_given_to_it() -> None:
    with capture_output() as found:
        answer("It is 0.5.")
    assert found.outputs[0].data["text/markdown"] == "**Answer.** It is 0.5."


@pytest.mark.parametrize(
    "text", ["Yes.", "It costs 23.6 nats. That is 2.2 times less. No more.", "One `0.5` e.g. two."]
)
def test_an_answer_has_up_to_three_sentences(text: str, shown: list[dict[str, str]]) -> None:
    answer(text)
    assert shown == [{"text/markdown": f"**Answer.** {text}", "text/plain": f"**Answer.** {text}"}]


@pytest.mark.parametrize(("text", "count"), [("", 0), ("One. Two. Three. Four.", 4), ("1.5 is. `a` is? It is! No", 4)])
def test_a_longer_answer_is_refused(text: str, count: int, shown: list[dict[str, str]]) -> None:
    with pytest.raises(ValueError, match=f"answer: found {count} sentences, allowed are 1 to 3"):
        answer(text)
    assert shown == []


def test_a_range_of_values_that_print_the_same_is_one_value() -> None:
    assert between([0.3531, 0.3529]) == "0.353"
    assert between([2, 1, 3], "{:.1f}", " nats") == "1.0 to 3.0 nats"
    with pytest.raises(ValueError, match="values: found none"):
        between([])


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (["met"], "met"),
        (["not met", "not met"], "not met"),
        (["met", "not met", "met"], "met in 2 of 3 cases and not met in 1"),
        (["inconclusive", "met", "not met"], "met in 1 of 3 cases, not met in 1 and inconclusive in 1"),
    ],
)
def test_verdicts_in_words(found: list[str], words: str) -> None:
    assert verdicts([{"verdict": verdict} for verdict in found]) == words
    with pytest.raises(ValueError, match="targets: found none"):
        verdicts([])


@pytest.mark.usefixtures("shell")
def test_texts_mark_the_tokens_that_differ_from_full_precision() -> None:
    rows = [
        {"prompt": "if a < b:", "model": "the file", "words": [" pass\n"]},
        {"prompt": "if a < b:", "model": "full precision", "words": [" re", "turn"]},
        {"prompt": "if a < b:", "model": "two bits", "words": [" re", "peat"]},
    ]
    shown = display.texts_html(rows, title="2 < 3")
    spans = re.findall(r'<span style="background:(#\w+)">(.*?)</span>', shown, re.DOTALL)
    same, marked = display.SAME, display.MARKED
    assert spans == [(same, " pass\n"), (same, " re"), (same, "turn"), (same, " re"), (marked, "peat")]
    assert shown.count("if a &lt; b:") == 3
    text = display.texts_text(rows, title="2 < 3")
    assert text.startswith("2 < 3\n\n=== beginning\nif a < b:\n\n--- the file\n pass\n")
    assert text.endswith("--- two bits\n repeat")
    with capture_output() as captured:
        display.texts(rows, title="2 < 3")
    assert captured.outputs[0].data == {"text/html": shown, "text/plain": text}

"""What a notebook shows: an answer that is computed, and tables for eyes (HTML) and for comparisons (text).

Both forms of a table hold the same numbers in the same formats. Equal rows give equal bytes, so that an executed
notebook changes only where a number does.
"""

import hashlib
import html
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from thermo_lib.evaluation import report
from thermo_lib.extras import needs

Columns = Mapping[str, tuple[str, str]]

OURS, OTHERS = "#0072B2", "#8a8a8a"
MARKED, SAME = "#F5C9A8", "#DCEAF5"  # behind tokens that differ, and those that don't
MOST_SENTENCES = 3
FULL_PRECISION = "full precision"  # the name of the row that everything is compared with
SCORES: Columns = {  # heading with its unit: key of a row, and how to print it
    "configuration": ("name", "{}"),
    "bits per weight": ("bits_per_weight", "{:.2f}"),
    "accuracy (0-1)": ("accuracy", "{:.3f}"),
    "accuracy, 95 %": ("accuracy_ci", "{0[0]:.3f}..{0[1]:.3f}"),
    "path KL (nats)": ("path_kl", "{:.2f}"),
    "path KL, 95 %": ("path_kl_ci", "{0[0]:.2f}..{0[1]:.2f}"),
    "NELBO (nats a token)": ("nelbo", "{:.2f}"),
    "Sudoku solved (0-1)": ("sudoku_solved", "{:.2f}"),
    "Markov score (0-1)": ("markov_score", "{:.2f}"),
}
BEST_SCORES = {"accuracy (0-1)": max, "path KL (nats)": min, "NELBO (nats a token)": min}
TARGETS: Columns = {**report.TARGET_COLUMNS, "method": ("smoothing_method", "{}")}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`*])")
_STYLES = [
    {
        "selector": "caption",
        "props": "caption-side: top; text-align: left; white-space: nowrap; font-weight: bold; padding: 4px 0",
    },
    {"selector": "th", "props": "text-align: right; vertical-align: bottom; padding: 2px 8px"},
    {"selector": "th.col0", "props": "text-align: left"},
    {
        "selector": "td",
        "props": "text-align: right; white-space: nowrap; padding: 2px 8px 8px; font-variant-numeric: tabular-nums",
    },
    {"selector": "td.col0", "props": "text-align: left"},
]


def markdown(text: str) -> None:
    """Show Markdown as the output of a cell; where no Markdown is shown, the same text."""
    needs("IPython.display").display({"text/markdown": text, "text/plain": text}, raw=True)


def sentences(text: str) -> int:
    """How many sentences a text has: each but the last ends where a dot is followed by a capital, code or bold type."""
    return len(_SENTENCE_END.split(text.strip())) if text.strip() else 0


def answer(text: str) -> None:
    """Show the answer to a notebook's question.

    Args:
        text: at most three sentences, with numbers from the results.

    Raises:
        ValueError: no sentence, or more than three.
    """
    count = sentences(text)
    if not 1 <= count <= MOST_SENTENCES:
        raise ValueError(f"answer: found {count} sentences, allowed are 1 to {MOST_SENTENCES}")
    markdown(f"**Answer.** {text.strip()}")


def between(values: Collection[float], form: str = "{:.3f}", unit: str = "") -> str:
    """A range in words: ``0.353`` where all values print the same, else ``0.353 to 0.382``; ``unit`` follows it.

    Args:
        values: one or more numbers.
        form: prints one of them.
        unit: e.g. ``" nats"``.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("values: found none, allowed is at least one")
    low, high = form.format(min(values)), form.format(max(values))
    return (low if low == high else f"{low} to {high}") + unit


def verdicts(targets: Sequence[Mapping[str, Any]]) -> str:
    """The verdicts on some targets in words, e.g. ``met``, or ``met in 3 of 9 cases and not met in 6``.

    Args:
        targets: rows with ``verdict``.

    Raises:
        ValueError: no target.
    """
    found = [row["verdict"] for row in targets]
    if not found:
        raise ValueError("targets: found none, allowed is at least one")
    counts = {name: found.count(name) for name in ("met", "not met", "inconclusive") if name in found}
    if len(counts) == 1:
        return found[0]
    first, *more = (f"{name} in {count}" for name, count in counts.items())
    return f"{first} of {len(found)} cases" + "".join(
        f"{' and' if number == len(more) else ','} {part}" for number, part in enumerate(more, 1)
    )


def texts(rows: Sequence[Mapping[str, Any]], *, title: str, against: str = FULL_PRECISION) -> None:
    """Show how models continue the same beginnings, a column a model; tokens that differ from one model's are marked.

    Args:
        rows: with ``prompt``, ``model`` and ``words``, the tokens that were written; see ``demo.continuations``.
        title: what to see.
        against: the model whose tokens the others' are compared with; without it nothing is marked.
    """
    needs("IPython.display").display(
        {"text/html": texts_html(rows, title=title, against=against), "text/plain": texts_text(rows, title=title)},
        raw=True,
    )


def texts_text(rows: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """The text form of ``texts``, whose arguments it takes."""
    parts = [title]
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        parts.append(f"=== beginning\n{prompt}")
        parts += [f"--- {row['model']}\n{''.join(row['words'])}" for row in rows if row["prompt"] == prompt]
    return "\n\n".join(parts)


def texts_html(rows: Sequence[Mapping[str, Any]], *, title: str, against: str = FULL_PRECISION) -> str:
    """The HTML form of ``texts``, whose arguments it takes; it loads nothing."""
    found = [f"<p><b>{html.escape(title)}</b></p>"]
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        alike = [row for row in rows if row["prompt"] == prompt]
        right = next((row["words"] for row in alike if row["model"] == against), None)
        cells = []
        for row in alike:
            words = row["words"]
            others = words if right is None or len(right) != len(words) else right
            spans = [
                f'<span style="background:{SAME if word == other else MARKED}">{html.escape(word)}</span>'
                for word, other in zip(words, others, strict=True)
            ]
            start = f'<span style="color:{OTHERS}">{html.escape(prompt)}</span>'
            text = f'<pre style="white-space:pre-wrap">{start}{"".join(spans)}</pre>'
            style = "padding-right:24px;vertical-align:top;text-align:left"
            cells.append(f'<td style="{style}"><b>{html.escape(row["model"])}</b>{text}</td>')
        found.append(f"<table><tr>{''.join(cells)}</tr></table>")
    return "".join(found)


def table(
    rows: Sequence[Mapping[str, Any]],
    columns: Columns = SCORES,
    *,
    title: str,
    best: Mapping[str, Callable[..., Any]] | None = None,
    ours: Collection[str] = (),
    aside: Collection[str] = (FULL_PRECISION,),
    bars: bool = True,
) -> None:
    """Show rows as a styled table; its text form is a table too.

    A missing value shows as a dash, a column without values not at all. An interval has a bar below its numbers; all
    bars of a column share one scale, and a thin line marks 0 where the scale holds it.

    Args:
        rows: mappings of keys to values.
        columns: heading to ``(key, format string)``; a value that is a pair of numbers is an interval.
        title: what to see, above the table. Two tables of a notebook have different titles.
        best: heading to ``min`` or ``max``: the best value of the column is bold, in the text form it has a star.
        ours: what the first column says of the rows that are this project's: their names are bold, and where there are
            such rows the bars of the others are grey.
        aside: what the first column says of rows that are not in the competition for the best.
        bars: draw intervals; not where a column holds different quantities, which have no common scale.

    Raises:
        ValueError: no rows, or a heading in ``best`` that isn't one of the columns.
    """
    needs("IPython.display").display(
        {
            "text/html": table_html(rows, columns, title=title, best=best, ours=ours, aside=aside, bars=bars),
            "text/plain": table_text(rows, columns, title=title, best=best, aside=aside),
        },
        raw=True,
    )


def table_text(
    rows: Sequence[Mapping[str, Any]],
    columns: Columns = SCORES,
    *,
    title: str,
    best: Mapping[str, Callable[..., Any]] | None = None,
    aside: Collection[str] = (FULL_PRECISION,),
) -> str:
    """The text form of ``table``, whose arguments it takes."""
    used, winners = _used(rows, columns), _winners(rows, columns, best or {}, aside)
    texts = []
    for number, row in enumerate(rows):
        cells = {heading: _cell(row, spec) for heading, spec in used.items()}
        marks = {heading: "*" if (number, heading) in winners else " " for heading in used if heading in (best or {})}
        texts.append({heading: text + marks.get(heading, "") for heading, text in cells.items()})
    return f"{title}\n\n{report.table(texts, {heading: (heading, '{}') for heading in used})}"


def table_html(
    rows: Sequence[Mapping[str, Any]],
    columns: Columns = SCORES,
    *,
    title: str,
    best: Mapping[str, Callable[..., Any]] | None = None,
    ours: Collection[str] = (),
    aside: Collection[str] = (FULL_PRECISION,),
    bars: bool = True,
) -> str:
    """The HTML form of ``table``, whose arguments it takes; it loads nothing."""
    used, winners = _used(rows, columns), _winners(rows, columns, best or {}, aside)
    first = next(iter(used))
    is_ours = [_cell(row, used[first]) in ours for row in rows]
    texts, styles = [], []
    for number, row in enumerate(rows):
        bold = {heading for heading in used if (number, heading) in winners} | ({first} if is_ours[number] else set())
        cells = {heading: html.escape(_cell(row, spec)) for heading, spec in used.items()}
        texts.append({name: f"<strong>{text}</strong>" if name in bold else text for name, text in cells.items()})
        color = OURS if is_ours[number] or not any(is_ours) else OTHERS
        styles.append([_bar(row.get(key), rows, key, color) if bars else "" for key, _ in used.values()])
    frame = needs("pandas").DataFrame(texts, columns=list(used))
    frame.columns = [html.escape(heading) for heading in used]
    style = frame.style.hide(axis="index").set_uuid(_uuid(title, used)).set_caption(html.escape(title))
    style = style.set_table_styles(_STYLES).apply(lambda _: _like(frame, styles), axis=None)
    return style.to_html()


def _like(frame: Any, styles: Sequence[Sequence[str]]) -> Any:
    return type(frame)(styles, index=frame.index, columns=frame.columns)


def _used(rows: Sequence[Mapping[str, Any]], columns: Columns) -> dict[str, tuple[str, str]]:
    """The columns that have a value in some row."""
    if not rows:
        raise ValueError("rows: found none, allowed is at least one")
    return {h: spec for h, spec in columns.items() if any(row.get(spec[0]) is not None for row in rows)}


def _cell(row: Mapping[str, Any], spec: tuple[str, str]) -> str:
    key, form = spec
    return "-" if row.get(key) is None else form.format(row[key])


def _winners(
    rows: Sequence[Mapping[str, Any]], columns: Columns, best: Mapping[str, Callable[..., Any]], aside: Collection[str]
) -> set[tuple[int, str]]:
    """Numbers of rows and headings of the cells that hold the best of their columns; equal texts win together."""
    unknown = [heading for heading in best if heading not in columns]
    if unknown:
        raise ValueError(f"best: found {unknown[0]!r}, allowed are {', '.join(map(repr, columns))}")
    first = next(iter(columns.values()))
    found = set()
    for heading, choose in best.items():
        spec = columns[heading]
        inside = [n for n, row in enumerate(rows) if row.get(spec[0]) is not None and _cell(row, first) not in aside]
        if len(inside) > 1:
            value = _cell({spec[0]: choose(rows[number][spec[0]] for number in inside)}, spec)
            found |= {(number, heading) for number in inside if _cell(rows[number], spec) == value}
    return found


def _is_interval(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int | float) for v in value)


def _bar(value: Any, rows: Sequence[Mapping[str, Any]], key: str, color: str) -> str:
    """The CSS that draws an interval below its numbers, on the scale of its column; nothing for other values."""
    if not _is_interval(value):
        return ""
    ends = [end for row in rows if _is_interval(row.get(key)) for end in row[key]]
    low, high = min(ends), max(ends)
    if low == high:
        return ""

    def place(x: float) -> float:
        return 100 * (x - low) / (high - low)

    start = min(place(value[0]), 98)
    parts = [_stripe(start, max(place(value[1]), start + 2), color)]
    if low < 0 < high:
        parts.append(_stripe(max(place(0) - 0.5, 0), place(0) + 0.5, "#000000"))
    return f"background: {', '.join(parts)}"


def _stripe(start: float, stop: float, color: str) -> str:
    ends = f"transparent {start:.1f}%, {color} {start:.1f}%, {color} {stop:.1f}%, transparent {stop:.1f}%"
    return f"linear-gradient(90deg, {ends}) no-repeat bottom / 100% 5px"


def _uuid(title: str, used: Mapping[str, Any]) -> str:
    """A name for the table's styles: equal tables have equal ones, whatever numbers stand in their titles."""
    words = re.sub(r"[\d.]+", "#", " ".join([title, *used]))
    return hashlib.sha256(words.encode()).hexdigest()[:8]

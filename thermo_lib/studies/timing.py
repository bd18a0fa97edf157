"""What notebook 09 says of measured speeds; every number comes from the rows of the reports."""

from collections.abc import Mapping, Sequence
from typing import Any

from thermo_lib.evaluation.display import between

Rows = Sequence[Mapping[str, Any]]
Report = Mapping[str, Any] | None
_INT2, _TRELLIS = "int2 w2a16", "trellis"
_NAMES = {_INT2: "two-bit codes", "int2 w2a8 dynamic": "two-bit codes with 8-bit inputs", _TRELLIS: "trellis streams"}
_TIMES = "{:.2f}"


def answer(cpu: Report, beside: Report, card: Report, tokens: int) -> str:
    """How long packed products take, on a CPU, beside other projects, and on a GPU; what isn't there is named.

    Args:
        cpu: the content of ``reports/speed.json``.
        beside: that of ``reports/peers_speed.json``.
        card: that of ``reports/peers_gpu.json``.
        tokens: number of tokens of a product.
    """
    parts = [
        _products(cpu["rows"], tokens) if cpu else "On a CPU nothing has been measured",
        _others(beside["rows"], tokens) if beside else "Other projects' formats have not been measured",
        _pass(card, tokens) if card else "On a GPU nothing has been measured",
    ]
    return " ".join(f"{part}." for part in parts)


def title(rows: Rows, tokens: int) -> str:
    """What to see in a figure of kernels: how long two-bit codes take at some tokens."""
    found = _by_kernel(rows, tokens).get(_INT2)
    if not found:
        return f"Not measured at {tokens} tokens"
    return f"At {tokens} tokens two-bit codes take {between(found, _TIMES)} of the dense time"


def fastest_at(rows: Rows, tokens: int) -> str:
    """What to see in a figure of methods: the fastest at some tokens, and whose intervals reach its own."""
    timed = sorted(_timed(rows, tokens), key=lambda row: row["times_dense"])
    if not timed:
        return f"Not measured at {tokens} tokens"
    level = [f"{row['method']} ({row['times_dense']:.2f})" for row in timed if row["ci"][0] <= timed[0]["ci"][1]]
    return f"Fastest at {tokens} tokens, times dense: {'; '.join(level)}"


def _by_kernel(rows: Rows, tokens: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["tokens"] == tokens:
            found.setdefault(row["kernel"], []).append(row["times_dense"])
    return found


def _products(rows: Rows, tokens: int) -> str:
    found = _by_kernel(rows, tokens)
    if not found:
        return f"On a CPU nothing has been measured at {tokens} tokens"
    parts = [f"{name} take {between(found[kernel], _TIMES)}" for kernel, name in _NAMES.items() if kernel in found]
    return f"On a CPU, at {tokens} tokens, in multiples of the dense product's time, {', '.join(parts)}"


def _timed(rows: Rows, tokens: int) -> list[Mapping[str, Any]]:
    return [r for r in rows if r["tokens"] == tokens and "times_dense" in r and r["method"] != "dense bfloat16"]


def _others(rows: Rows, tokens: int) -> str:
    """The fastest format here and elsewhere, at the tokens and at a single one."""
    parts = []
    for count in dict.fromkeys((tokens, 1)):
        timed = _timed(rows, count)
        sides = [[row for row in timed if row["method"].startswith("thermo_lib") == own] for own in (True, False)]
        if all(sides):
            ours, theirs = (min(side, key=lambda row: row["times_dense"]) for side in sides)
            here, there = (f"{row['method']} takes {row['times_dense']:.2f}" for row in (ours, theirs))
            parts.append(f"at {count} token{'s' * (count > 1)} {here}, {there}")
    if not parts:
        return f"Other projects' formats have not been measured at {tokens} tokens"
    return f"Of whole blocks, the fastest formats here and elsewhere: {'; '.join(parts)}"


def _pass(card: Mapping[str, Any], tokens: int) -> str:
    times = {row["method"]: row["times_dense"] for row in _timed(card["rows"], tokens)}
    ours = {"thermo_lib INT2": _NAMES[_INT2], "thermo_lib trellis": _NAMES[_TRELLIS]}
    parts = [f"{times[method]:.2f} from {name}" for method, name in ours.items() if method in times]
    if not parts:
        return f"On a GPU no pass has been measured at {tokens} tokens"
    model = f"a pass over {tokens} tokens through two blocks of Dream 7B's sizes"
    return f"On {card['card']} {model} takes {' and '.join(parts)}"

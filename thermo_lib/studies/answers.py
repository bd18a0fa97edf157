"""What the notebooks of the studies say: sentences whose every number and verdict comes from rows of results.

Rows that aren't there yet make a sentence shorter, or name what has not been measured; they never stop a notebook.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thermo_lib.evaluation.display import between, verdicts

Rows = Sequence[Mapping[str, Any]]
EXPLAINED_COLUMNS = {
    "model": ("model", "{}"),
    "factor": ("factor", "{}"),
    "mean of the layers": ("mean", "{:.0%}"),
    "most, of a layer": ("most", "{:.0%}"),
}
_GAIN = "relative accuracy gain"


@dataclass(frozen=True)
class Found:
    """What a notebook says.

    Attributes:
        answer: at most three sentences.
        more: Markdown that stands beside the evidence.
        variance_title: what to see in the figure of the variance; empty where there is none.
    """

    answer: str
    more: str
    variance_title: str = ""


def listed(sentences: Sequence[str]) -> str:
    """Sentences as a Markdown list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def case(row: Mapping[str, Any]) -> str:
    """The precision and the smoothing of a target, and what else its name says."""
    more = row["name"].removeprefix(_GAIN).removeprefix(", ")
    return ", ".join(part for part in (f"{row['precision']} {row['smoothing_method']}", more) if part)


def norm(row: Mapping[str, Any]) -> str:
    """The name of a row of time-aware norms."""
    smoothing = row["smoothing"] or "not smoothed"
    return f"{row['model']}, {row['quantizer']}, {row['count']} sets, {smoothing}"


def second_model(measured: Mapping[str, Any], both: Rows) -> Found:
    """Whether the answers of the reference model hold on a second one.

    Args:
        measured: the content of ``reports/witness.json``; each of its lists may be short or empty.
        both: what ``second_model.both_models`` returns.
    """
    gains = [row for row in measured["targets"] if row["name"].startswith(_GAIN)]
    groups = [row for row in gains if row["name"] == _GAIN]
    if groups:
        change = between([row["value"] for row in groups], "{:+z.1%}")
        precisions = ", ".join(dict.fromkeys(row["precision"] for row in groups))
        smoothing = (
            f"At {precisions} the claim that smoothing time groups lifts accuracy by at least "
            f"{groups[0]['target']:.0%} is {verdicts(groups)} here ({change}, {_seeds(measured['rows'])})"
        )
    else:
        smoothing = "What smoothing does to this model's accuracy has not been measured"
    parts = [smoothing, _order(both), _time(measured["variance"], measured["model"])]
    more = [*_schedules(measured["rows"]), *_norms(measured["time_norms"]), *_unmeasured(measured, both)]
    title = ""
    if shares := _time_shares(measured["variance"]):
        low, high = min(shares.values()), max(shares.values())
        title = f"The timestep explains {between([low, high], '{:.0%}')} of the variance of a range"
    return Found(" ".join(f"{part}." for part in parts if part), listed(more), title)


def _seeds(rows: Rows) -> str:
    found = [row["seeds"] for row in rows if "gain" in row] or [row["seeds"] for row in rows] or [0]
    words = between(found, "{}")
    return f"{words} seed{'' if words == '1' else 's'} of calibration data"


def _order(both: Rows) -> str:
    """Whether the methods have the same order on both models, and how far the best is ahead of GPTQ."""
    if len(both) < 2:
        return "Too few methods were measured on both models to compare their order"
    names = [[row["method"] for row in sorted(both, key=lambda row: row[model])] for model in ("reference", "witness")]
    if names[0] == names[1]:
        order = "The order of the methods is the same on both models"
    else:
        order = f"The order of the methods is not the same: {_in_words(names[0])} on the reference model, here "
        order += _in_words(names[1])
    named = {row["method"]: row for row in both}
    best = min((row for row in both if row["method"].startswith("trellis")), key=_share_here, default=None)
    if best is None or "GPTQ" not in named:
        return order
    here, there = (best[model] / named["GPTQ"][model] for model in ("witness", "reference"))
    return f"{order}; the best trellis ({best['method']}) has {here:.2f} of GPTQ's path KL here and {there:.2f} there"


def _share_here(row: Mapping[str, Any]) -> float:
    return row["witness_share"]


def _in_words(names: Sequence[str]) -> str:
    return " < ".join(names)


def _time_shares(variance: Mapping[str, Any]) -> dict[str, float]:
    """Model to the share of the variance of a range's logarithm that the timestep explains, mean over seeds."""
    found = {model: one["shares"]["time"] for model, one in variance.items()}
    return {model: sum(values) / len(values) for model, values in found.items() if values}


def _time(variance: Mapping[str, Any], model: str) -> str:
    shares = _time_shares(variance)
    if model not in shares:
        return ""
    factors = {name: sum(values) / len(values) for name, values in variance[model]["shares"].items()}
    largest = max(factors, key=factors.__getitem__)
    there = f" ({shares['reference']:.0%} on the reference model)" if "reference" in shares else ""
    time = f"Time matters little because the timestep explains {shares[model]:.0%} of the variance of a range{there}"
    return f"{time}, while {largest} explains {factors[largest]:.0%}" if largest != "time" else time


def explained(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of ``EXPLAINED_COLUMNS``: what one factor alone explains of a token's range, over the layers."""
    rows = []
    for model, found in models.items():
        for factor in ("time", "token state"):
            values = [layer[factor] for layer in found["tokens"].values()]
            if values:
                rows.append({"model": model, "factor": factor, "mean": sum(values) / len(values), "most": max(values)})
    return rows


def _schedules(rows: Rows) -> Iterator[str]:
    """At each precision, what time groups do to path KL against one scale or range for all timesteps."""
    for bits in dict.fromkeys(row["activation_bits"] for row in rows):
        changed = [row for row in rows if row["activation_bits"] == bits and row.get("change") is not None]
        if changed:
            best = min(changed, key=lambda row: row["change"])
            low, high = best["change_ci"]
            verb = "lowers" if high < 0 else "raises" if low > 0 else "does not measurably change"
            yield (
                f"At W2A{bits} the best schedule over the timesteps, `{best['method']}`, {verb} path KL "
                f"({best['change']:+z.2f} nats, {low:+z.2f} to {high:+z.2f}, to {best['path_kl']:.1f})."
            )


def _norms(norms: Rows) -> Iterator[str]:
    """What a set of norms for each time group gains over one set, for each model and way to quantize the weights."""
    for model, weights in dict.fromkeys((row["model"], row["quantizer"]) for row in norms):
        alike = [row for row in norms if (row["model"], row["quantizer"]) == (model, weights)]
        one = next((row for row in alike if row["count"] == 1), None)
        several = [row for row in alike if row["count"] > 1]
        if one is None or not several:
            continue
        best = min(several, key=lambda row: row["change"])
        low, high = best["change_ci"]
        found = "fewer" if high < 0 else "more" if low > 0 else "neither fewer nor more"
        yield (
            f"{weights}, {model}: {best['count']} sets of norms ({best['smoothing'] or 'not smoothed'}) leave {found} "
            f"nats than one set ({best['change']:+z.2f}, {low:+z.2f} to {high:+z.2f}; "
            f"{best['change'] / one['path_kl']:+z.1%})."
        )


def _unmeasured(measured: Mapping[str, Any], both: Rows) -> Iterator[str]:
    missing = {
        "targets of smoothing": measured["targets"],
        "methods on both models": both,
        "time-aware norms": measured["time_norms"],
        "the variance of ranges": measured["variance"],
    }
    if names := [name for name, found in missing.items() if not found]:
        yield f"Not measured yet: {', '.join(names)}."

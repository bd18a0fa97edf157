"""What the notebooks of the studies say: sentences whose every number and verdict comes from rows of results.

Rows that aren't there yet make a sentence shorter, or name what has not been measured; they never stop a notebook.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from thermo_lib.evaluation.display import between, verdicts
from thermo_lib.evaluation.statistics import side_of_zero
from thermo_lib.studies import peers

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
    """How many pairs of methods have the same order on both models, and how far the best is ahead of GPTQ."""
    pairs = list(itertools.combinations(both, 2))
    if not pairs:
        return "Too few methods were measured on both models to compare their order"
    same = sum((a["reference"] < b["reference"]) == (a["witness"] < b["witness"]) for a, b in pairs)
    order = f"Of {len(pairs)} pairs of methods {same} have the same order of path KL on both models"
    named = {row["method"]: row for row in both}
    trellis = [row for row in both if row["method"].startswith("trellis")]
    if not trellis or "GPTQ" not in named:
        return order
    best = min(trellis, key=lambda row: row["witness"])
    here, there = (best[model] / named["GPTQ"][model] for model in ("witness", "reference"))
    leads = f"{best['method']}, leaves {here:.2f} of GPTQ's path KL ({there:.2f} on the reference model)"
    return f"{order}; the best trellis, {leads}"


def _time_shares(variance: Mapping[str, Any]) -> dict[str, float]:
    """Model to the share of the variance of a range's logarithm that the timestep explains, mean over seeds."""
    found = {model: one["shares"]["time"] for model, one in variance.items()}
    return {model: fmean(values) for model, values in found.items() if values}


def _time(variance: Mapping[str, Any], model: str) -> str:
    shares = _time_shares(variance)
    if model not in shares:
        return ""
    factors = {name: fmean(values) for name, values in variance[model]["shares"].items()}
    largest = max(factors, key=factors.__getitem__)
    there = f" ({shares['reference']:.0%} on the reference model)" if "reference" in shares else ""
    time = f"The timestep explains {shares[model]:.0%} of the variance of a range{there}"
    return f"{time}, and {largest}, the largest factor, {factors[largest]:.0%}" if largest != "time" else time


def explained(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of ``EXPLAINED_COLUMNS``: what one factor alone explains of a token's range, over the layers."""
    rows = []
    for model, found in models.items():
        for factor in ("time", "token state"):
            values = [layer[factor] for layer in found["tokens"].values()]
            if values:
                rows.append({"model": model, "factor": factor, "mean": fmean(values), "most": max(values)})
    return rows


def _schedules(rows: Rows) -> Iterator[str]:
    """At each precision, what time groups do to path KL against one scale or range for all timesteps."""
    for bits in dict.fromkeys(row["activation_bits"] for row in rows):
        changed = [row for row in rows if row["activation_bits"] == bits and row.get("change") is not None]
        if changed:
            best = min(changed, key=lambda row: row["change"])
            low, high = best["change_ci"]
            verb = side_of_zero(best["change_ci"], "lowers", "raises", "does not measurably change")
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
        found = side_of_zero(best["change_ci"], "fewer", "more", "neither fewer nor more")
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


BOUNDS = {"kept": "accuracy_kept", "kept_a4": "accuracy_kept_a4", "share": "share"}  # argument to key in params.yaml
OWN = {
    "thermo_lib trellis": "thermo_lib trellis",
    "thermo_lib GPTQ": "thermo_lib GPTQ",
    "thermo_lib": "thermo_lib trained integers",
}
WHOLE, SMALL, LOW = "all phases", "all phases, below 2.1 bits", "all phases at W2A4"


def family(method: str) -> str:
    """What a method of ``reports/peers.json`` is called in a figure."""
    return OWN.get(method, method)


@dataclass(frozen=True)
class Field:
    """The rows of ``reports/peers.json`` that the comparison is about.

    Attributes:
        full: the scores in full precision.
        ours: this project's rows by ``method: setting``, in the order of path KL.
        others: those of other projects, in the order of path KL.
        bits: peers that store at most so many bits per weight are called two-bit methods.
    """

    full: Mapping[str, Any]
    ours: Mapping[str, Mapping[str, Any]]
    others: Rows
    bits: float

    @classmethod
    def of(cls, scored: Mapping[str, Any], bits: float) -> "Field":
        """From what ``peers.score_all`` wrote.

        Raises:
            ValueError: bits that no two-bit method has.
        """
        if isinstance(bits, bool) or not isinstance(bits, int | float) or not 2 <= bits <= 4:
            raise ValueError(f"bits: found {bits!r:.80}, allowed are numbers from 2 to 4")
        rows = sorted(scored["rows"], key=lambda row: row["path_kl"])
        is_ours = [row["method"].startswith("thermo_lib") for row in rows]
        ours = {f"{row['method']}: {row['setting']}": row for row, own in zip(rows, is_ours, strict=True) if own}
        return cls(scored["full_precision"], ours, [r for r, own in zip(rows, is_ours, strict=True) if not own], bits)

    def setting(self, name: str) -> Mapping[str, Any] | None:
        """This project's trellis row of a setting; None where it hasn't been measured."""
        return self.ours.get(f"thermo_lib trellis: {name}")

    @property
    def whole(self) -> Mapping[str, Any] | None:
        """The whole pipeline; without it the best of this project's rows."""
        return self.setting(WHOLE) or next(iter(self.ours.values()), None)

    @property
    def two_bit(self) -> Mapping[str, Any] | None:
        """The best other method that stores at most ``bits``."""
        return next((row for row in self.others if row["bits_per_weight"] <= self.bits), None)

    def goals(self, kept: float, kept_a4: float, share: float) -> list[dict[str, Any]]:
        """The goals that can be judged with the rows that are there; see ``peers.GOAL_COLUMNS``."""
        whole, low, small, best = self.whole, self.setting(LOW), self.setting(SMALL), next(iter(self.others), None)
        found = [peers.accuracy_kept(whole, self.full, kept)] if whole else []
        rivals = [best] if best is self.two_bit else [self.two_bit, best]
        for rival in rivals:
            found += peers.shares_of(whole, rival, self.full, share) if whole and rival else []
        found += [peers.ahead_of(whole, best)] if whole and best else []
        found += [peers.ahead_of(small, self.two_bit)] if small and self.two_bit else []
        found += [peers.accuracy_kept(low, self.full, kept_a4, 4)] if low else []
        rival = min(self.others, key=lambda row: row["path_kl_a4"], default=None)
        return found + ([peers.ahead_of(low, rival, 4)] if low and rival else [])


def ablation(field: Field, names: Mapping[str, str], baseline: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of ``peers.ABLATION_COLUMNS``, each against a baseline, and the names of those that weren't measured.

    Args:
        field: all rows.
        names: name to ``method: setting``.
        baseline: the ``method: setting`` that is compared with.
    """
    plain = field.ours.get(baseline)
    missing = [name for name, key in names.items() if key not in field.ours]
    if plain is None:
        return [], [baseline, *missing]
    rows = [{"name": baseline.partition(": ")[0].removeprefix("thermo_lib ") + ", two-bit integers", **plain}]
    for name, key in names.items():
        if key in field.ours:
            rows.append({"name": name, **field.ours[key], **peers.compare(field.ours[key], plain)})
    return rows, missing


def standing(field: Field, goals: Rows) -> Found:
    """How far ahead of other methods this project is.

    Args:
        field: all rows.
        goals: what ``field.goals`` returns.
    """
    whole = field.whole
    if whole is None:
        return Found("No row of this project has been measured.", "")
    kept = next(goal for goal in goals if ": accuracy kept at W2A16" in goal["goal"])
    low, high = kept["ci"]
    said = [
        f"At {whole['bits_per_weight']:.2f} bits per weight `{whole['setting']}` keeps {kept['value']:.1%} of the "
        f"full-precision accuracy ({low:.1%} to {high:.1%}; {kept['bound']:.0%} is the goal: {kept['verdict']})."
    ]
    path_kl = f"Path KL, the distance to full-precision denoising, is {whole['path_kl']:.1f} nats"
    rivals = _rivals(field, whole)
    said.append(f"{path_kl}: {rivals}." if rivals else f"{path_kl}.")
    if shares := [goal for goal in goals if "share of" in goal["goal"]]:
        share = f"{shares[0]['bound']:.2f} of their path KL and loss of accuracy"
        said.append(f"The goal to stay below {share} is {verdicts(shares)}.")
    return Found(" ".join(said), listed(list(_beside(field, whole))))


def _rivals(field: Field, whole: Mapping[str, Any]) -> str:
    """What share of the best others' path KL a row has."""
    described = {"": next(iter(field.others), None), f" of at most {field.bits} bits": field.two_bit}
    parts = [
        f"{whole['path_kl'] / row['path_kl']:.2f} of that of the best other method{which} ({row['method']}, "
        f"{row['path_kl']:.1f} nats)"
        for which, row in reversed(described.items())
        if row is not None
    ]
    return " and ".join(parts)


def _beside(field: Field, whole: Mapping[str, Any]) -> Iterator[str]:
    """What else is worth a sentence: fewer bits, 4-bit activations, what training adds, puzzles."""
    best = next(iter(field.others), None)
    if best and field.two_bit is None:
        yield f"No other method that was measured stores at most {field.bits} bits, so none is compared at that size."
    small, low, untrained = (field.setting(name) for name in (SMALL, LOW, "spread bits"))
    if small:
        yield _against(f"At {small['bits_per_weight']:.2f} bits per weight", small, best)
    if low:
        rival = min(field.others, key=lambda row: row["path_kl_a4"], default=None)
        yield _against("With 4-bit activations in addition", low, rival, "path_kl_a4")
    if untrained:
        yield _against("Without any training, the trellis code with spread bits", untrained, best)
        yield f"Training brings path KL from {untrained['path_kl']:.1f} to {whole['path_kl']:.1f} nats."
    solved = whole.get("sudoku_solved"), field.full.get("sudoku_solved")
    if None not in solved:
        yield f"4x4 Sudoku: {solved[0]:.0%} solved, {solved[1]:.0%} in full precision."


def _against(subject: str, row: Mapping[str, Any], rival: Mapping[str, Any] | None, key: str = "path_kl") -> str:
    if rival is None:
        return f"{subject}: {row[key]:.1f} nats."
    side = "ahead of" if row[key] < rival[key] else "behind"
    return f"{subject}: {row[key]:.1f} nats, {side} the best other method ({rival['method']}, {rival[key]:.1f} nats)."


def smoothing(targets: Rows, fair: Rows, fitted: Rows, trained: Rows, pulled: Rows, seeds: int) -> Found:
    """Whether smoothing of time groups helps, and what does.

    Args:
        targets: what ``studies.smoothing.verdicts`` returns, of all precisions.
        fair: rows of ``studies.smoothing.summary``: rivals of time groups, against one range.
        fitted: the same, of ranges that are fitted to something else.
        trained: the same, of ranges that are trained with the weights.
        pulled: the same, of groups that are pulled together while they are trained.
        seeds: number of seeds of the calibration data.
    """
    gains = [row for row in targets if row["name"] == _GAIN]
    parts = ["What smoothing does to accuracy has not been measured"]
    if gains:
        change = between([row["value"] for row in gains], "{:+z.1%}")
        parts = [
            f"The claim that smoothing lifts accuracy by at least {gains[0]['target']:.0%} is {verdicts(gains)}: over "
            f"{seeds} seed{'s' * (seeds > 1)} of calibration data smoothing time groups changes it by {change}"
        ]
    rows = {row["name"]: row for row in [*trained, *fitted, *fair]}
    one, each = rows.get("one range"), rows.get("a range for every timestep")
    if one and each:
        parts.append(
            f"A range for every timestep, the finest schedule there is, changes it by {_gain(each)} against one range "
            f"for all steps (path KL, the distance to full-precision denoising: {each['path_kl']:.1f} against "
            f"{one['path_kl']:.1f} nats)"
        )
    others = [row for row in rows.values() if row["name"] not in ("one range", "a range for every timestep")]
    if others:
        best = min(others, key=lambda row: row["path_kl"])
        parts.append(f"The nearest to full precision is `{best['name']}`: {_gain(best)}, {best['path_kl']:.1f} nats")
    more = [*_leading("Of the rivals of smoothing", fair), *_leading("Of what ranges are fitted to", fitted)]
    more += [*_leading("Of what is trained together with the weights", trained), *_pulled(pulled)]
    return Found(" ".join(f"{part}." for part in parts), listed(more))


def _gain(row: Mapping[str, Any]) -> str:
    return "0 %" if row["gain"] is None else f"{row['gain']:+z.1f} %"


def _leading(subject: str, rows: Rows) -> Iterator[str]:
    """The two rows that are nearest to full precision, with their intervals."""
    compared = sorted((row for row in rows if row["gain"] is not None), key=lambda row: row["path_kl"])
    if compared:
        said = [
            f"`{row['name']}` ({row['path_kl']:.1f} nats; accuracy {row['gain']:+z.1f} %, "
            f"{row['gain_ci'][0]:+z.1f} to {row['gain_ci'][1]:+z.1f})"
            for row in compared[:2]
        ]
        yield f"{subject}, the nearest to full precision: {', then '.join(said)}."


def _pulled(rows: Rows) -> Iterator[str]:
    compared = [row for row in rows if row["path_kl_change"] is not None]
    if compared:
        said = "; ".join(f"{row['name'].removeprefix('trained, ')}: {row['path_kl_change']:+z.1f}" for row in compared)
        yield f"Pulling neighbouring groups together while they are trained changes path KL (nats): {said}."


def correlation(title: str, rows: Rows) -> str:
    """How the Markov score goes with path KL and accuracy, in a sentence.

    Args:
        title: which rows these are.
        rows: with ``markov_score``, ``path_kl`` and ``accuracy``; fewer than three say nothing.
    """
    if len(rows) < 3:
        return f"{title}: {len(rows)} points, too few for a correlation."
    from scipy.stats import spearmanr  # takes half a second to import

    scores = [row["markov_score"] for row in rows]
    kl, accuracy = (spearmanr(scores, [row[key] for row in rows]).statistic for key in ("path_kl", "accuracy"))
    return (
        f"{title} ({len(rows)}): rank correlation of the score with path KL {kl:+.2f}, with accuracy {accuracy:+.2f}."
    )

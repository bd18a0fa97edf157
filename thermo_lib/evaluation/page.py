"""A report as one HTML page: figures, tables and verdicts in one file that loads nothing from elsewhere."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2

from thermo_lib.extras import needs

_KINDS = {"met": "met", "not met": "not", "inconclusive": "open"}
_CONFIGURATIONS = {  # heading to key, how to print it, and the key of its interval
    "configuration": ("name", "{}", None),
    "bits per weight": ("bits_per_weight", "{:.2f}", None),
    "accuracy": ("accuracy", "{:.3f}", "accuracy_ci"),
    "path KL (nats)": ("path_kl", "{:.2f}", "path_kl_ci"),
    "NELBO (nats a token)": ("nelbo", "{:.2f}", None),
    "Markov score": ("markov_score", "{:.2f}", None),
    "Sudoku solved": ("sudoku_solved", "{:.0%}", None),
}
_TARGETS = {
    "target": ("name", "{}", None),
    "precision": ("precision", "{}", None),
    "method": ("smoothing_method", "{}", None),
    "bound": ("target", "{}", None),
    "value": ("value", "{:z.3f}", "ci"),
    "verdict": ("verdict", "{}", None),
}

_TITLE = "Quantization of the diffusion language model"
BEGINS = f"<title>{_TITLE} ".encode()  # in the first 1000 bytes of a page


def report_page(report: Mapping[str, Any]) -> str:
    """The page of a ``report.json``.

    Args:
        report: what ``evaluation.report.build_report`` returned, or ``results.read_report_json``.

    Returns:
        HTML with all it needs inside; its tables can be sorted where scripts run.

    Raises:
        ImportError: matplotlib is missing.
    """
    configurations = [report["full_precision"], *report["configurations"]]
    verdicts = Counter(row["verdict"] for row in report["targets"])
    counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in _KINDS)
    best = min(report["configurations"], key=lambda row: row["path_kl"], default=None)
    nearest = "" if best is None else f" Nearest to full precision is {best['name']}, {best['path_kl']:.1f} nats away."
    machine = report["hardware"]
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("thermo_lib.evaluation").joinpath("page.html").read_text(encoding="utf-8")
    )
    return template.render(
        title=f"{_TITLE} {report['model']}",
        summary=f"{len(report['configurations'])} configurations.{nearest} {len(report['targets'])} targets: {counts}.",
        figures=_figures(report["configurations"]),
        tables=[
            {
                "name": "configurations",
                "title": "Configurations",
                "caption": "Accuracy is that of masked tokens, mean over timesteps; path KL is in nats per sequence, 0 "
                "for the same process; in brackets 95 % intervals over sequences.",
                **_table(configurations, _CONFIGURATIONS, best),
            },
            {
                "name": "targets",
                "title": "The earlier project's targets",
                "caption": "Each against the same quantizer and time groups without smoothing. A target is met, or "
                "not, where the whole 95 % interval is on one side of the bound.",
                **_table(report["targets"], _TARGETS, None),
            },
        ],
        made_with=f"{packages}; seed {report['seeds']['all']}; {machine['processor']} ({machine['machine']}), "
        f"{machine['threads']} threads.",
    )


def _table(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, tuple[str, str, str | None]],
    best: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Headings and rows for the template; a column without any value is left out."""
    used = {heading: spec for heading, spec in columns.items() if any(row.get(spec[0]) is not None for row in rows)}

    def cell(row: Mapping[str, Any], heading: str, key: str, form: str, interval: str | None) -> dict[str, Any]:
        value: Any = row.get(key)
        ends: Any = row.get(interval) if interval else None
        shown = ends is not None and ends[0] != ends[1]
        return {
            "heading": heading,
            "text": "–" if value is None else form.format(value),
            "order": value if isinstance(value, int | float) else None,
            "kind": _KINDS.get(value) if key == "verdict" else None,
            "interval": f"({form.format(ends[0])} to {form.format(ends[1])})" if shown else None,
        }

    cells = [
        {"is_best": row is best, "cells": [cell(row, heading, *spec) for heading, spec in used.items()]} for row in rows
    ]
    return {"headings": list(used), "rows": cells, "is_judged": "verdict" in used}


def _figures(configurations: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Path KL of every configuration with its interval, and where along the timesteps that of the best arises."""
    if not configurations:
        return []
    needs("matplotlib")
    import matplotlib.pyplot as plt

    from thermo_lib.evaluation import figures

    ordered = sorted(configurations, key=lambda row: row["path_kl"])
    first = ordered[0]
    best: dict[int, Mapping[str, Any]] = {}
    for row in ordered:
        best.setdefault(row["activation_bits"], row)
    steps = first["path_kl_per_timestep"]
    share = 100 * sum(steps[len(steps) // 2 :]) / (sum(steps) or 1)
    found = []
    with plt.rc_context({"font.size": 13}):  # to be read on a phone
        figures.intervals(
            {row["name"]: (row["path_kl"], tuple(row["path_kl_ci"])) for row in ordered},
            xlabel="path KL (nats per sequence), 95 % interval",
            title=f"Nearest to full precision: {first['name']}",
            ours=[first["name"]],
        )
        text = "Path KL of each configuration: nearer to 0 is nearer to full precision."
        found.append({"source": _source(plt.gcf()), "text": text})
        figures.lines(
            _joined({row["name"]: row["path_kl_per_timestep"] for row in best.values()}),
            ylabel="path KL (nats per sequence)",
            title=f"The later half of the timesteps adds {share:.0f} % of the path KL",
        )
        text = "Where along the denoising the difference arises: the best of each precision. "
        text += f"The share in the title is that of {first['name']}."
        found.append({"source": _source(plt.gcf()), "text": text})
    return found


def _joined(series: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Series by name; those whose lines would lie on one another are one, with a line of text for each name."""
    highest = max((value for values in series.values() for value in values), default=0)
    found: dict[str, Sequence[float]] = {}
    for name, values in series.items():
        pairs = {name: list(zip(values, others, strict=False)) for name, others in found.items()}
        same = (known for known, both in pairs.items() if all(abs(a - b) <= 0.02 * highest for a, b in both))
        known = next(same, None)
        found[name if known is None else f"{known}\nand {name}"] = values if known is None else found.pop(known)
    return found


def _source(figure: Any) -> str:
    """A figure as an address that holds it; the figure is closed."""
    import matplotlib.pyplot as plt

    image = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "thermo_lib", "svg.fonttype": "path"}):
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(image.getvalue().encode()).decode()}"

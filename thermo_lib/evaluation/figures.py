"""Figures of the notebooks: colour-blind-safe colours (Okabe and Ito), axes with units, one idea each."""

import io
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thermo_lib.extras import needs
from thermo_lib.files.text import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

plt = needs("matplotlib.pyplot")
MaxNLocator = needs("matplotlib.ticker").MaxNLocator

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def _axes(count: int = 1, width: float = 6.4, height: float = 4.2) -> "tuple[Figure, list[Axes]]":
    """``count`` axes, at most three in a row."""
    rows = -(-count // 3)
    columns = -(-count // rows)
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def lines(
    series: Mapping[str, Sequence[float]],
    *,
    x: Sequence[float] | None = None,
    xlabel: str = "timestep",
    ylabel: str,
    title: str = "",
    log: bool = False,
    ax: "Axes | None" = None,
) -> "Axes":
    """One line a series against timesteps (or ``x``)."""
    if ax is None:
        ax = _axes()[1][0]
    for number, (name, values) in enumerate(series.items()):
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
        ax.plot(range(len(values)) if x is None else x, values, label=name, **style)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title, yscale="log" if log else "linear")
    if len(series) > 1:
        ax.legend(frameon=False, fontsize="small")
    return ax


def loss_curves(steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
    """Training losses against optimizer steps, one panel each."""
    _, axes = _axes(len(curves), width=5.2)
    for ax, (name, values) in zip(axes, curves.items(), strict=True):
        ax.plot(steps, values, color=COLORS[0])
        ax.set(xlabel="optimizer step", ylabel="loss (nats per masked token)", title=name, ylim=(0, None))


def panels(
    figures: Mapping[str, Mapping[str, Sequence[float]]], *, ylabel: str, log: bool = False, xlabel: str = "timestep"
) -> None:
    """Line plots side by side, one panel a title."""
    _, axes = _axes(len(figures), width=5.2)
    for ax, (title, series) in zip(axes, figures.items(), strict=True):
        lines(series, ylabel=ylabel, title=title, log=log, xlabel=xlabel, ax=ax)


def kernel_times(rows: Sequence[Mapping[str, Any]]) -> None:
    """Time against the dense product by number of tokens, a panel for each linear and a line for each kernel.

    Args:
        rows: with ``linear``, ``kernel``, ``tokens``, ``times_dense`` and its interval ``ci``.
    """
    linears = list(dict.fromkeys(row["linear"] for row in rows))
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    _, axes = _axes(len(linears), width=4.6, height=3.8)
    for ax, linear in zip(axes, linears, strict=False):
        for number, kernel in enumerate(kernels):
            found = [row for row in rows if (row["linear"], row["kernel"]) == (linear, kernel)]
            x, y = ([row[key] for row in found] for key in ("tokens", "times_dense"))
            ax.plot(x, y, color=COLORS[number], marker=MARKERS[number], markersize=5, label=kernel)
            ax.fill_between(x, *zip(*(row["ci"] for row in found), strict=True), color=COLORS[number], alpha=0.2)
        ax.axhline(1, color=COLORS[6], linestyle="--", linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time / dense bfloat16", title=linear)
        ax.set_xticks(sorted({row["tokens"] for row in rows}), sorted({row["tokens"] for row in rows}), rotation=45)
        ax.set_ylim(0.5 if min(row["times_dense"] for row in rows) > 0.5 else 0.3, 5)
        ticks = [0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4]
        ax.set_yticks([tick for tick in ticks if tick >= ax.get_ylim()[0]])
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    axes[0].legend(frameon=False, fontsize="small")


def intervals(
    rows: Mapping[str, tuple[float, tuple[float, float]]], *, xlabel: str, reference: float | None = None
) -> None:
    """Values with their 95 % intervals, one row each; ``reference`` is drawn as a vertical line."""
    _, (ax,) = _axes(width=7.5, height=0.9 + 0.34 * len(rows))
    for number, (value, (low, high)) in enumerate(rows.values()):
        ax.errorbar(value, number, xerr=[[value - low], [high - value]], fmt="o", color=COLORS[0], capsize=3)
    ax.set(xlabel=xlabel, yticks=range(len(rows)), yticklabels=list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    if reference is not None:
        ax.axvline(reference, color=COLORS[1], linestyle="--")


def shares(models: Mapping[str, Mapping[str, Sequence[float]]], *, xlabel: str) -> None:
    """Shares of several factors, a bar a model beside each other; a dot is one of a share's values.

    Args:
        models: model to factor to the values of its share, e.g. one a seed; a bar is their mean.
        xlabel: what a share is of.
    """
    factors = list(next(iter(models.values())))
    _, (ax,) = _axes(width=7.5, height=1.2 + 0.5 * len(factors))
    thickness = 0.8 / len(models)
    for number, (model, found) in enumerate(models.items()):
        places = [place + (number - (len(models) - 1) / 2) * thickness for place in range(len(factors))]
        means = [sum(found[factor]) / len(found[factor]) for factor in factors]
        ax.barh(places, means, thickness, color=COLORS[number], label=model)
        for place, mean, factor in zip(places, means, factors, strict=True):
            ax.plot(found[factor], [place] * len(found[factor]), "k.", markersize=4)
            ax.annotate(f"{mean:.1%}", (max(found[factor]), place), (6, 0), textcoords="offset points", va="center")
    largest = max(share for found in models.values() for values in found.values() for share in values)
    ax.set(xlabel=xlabel, yticks=range(len(factors)), yticklabels=factors, xlim=(0, 1.15 * largest))
    ax.set_ylim(len(factors) - 0.5, -0.5)
    ax.legend(frameon=False, fontsize="small", loc="lower right")


def parameters_over_time(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Mapping[str, Sequence[float]]], *, ylabel: str
) -> None:
    """A quantization parameter over the timesteps, unsmoothed (steps) and smoothed (markers), one panel a layer.

    Args:
        before: layer to values, one a timestep.
        after: layer to method to values.
        ylabel: the parameter with its unit.
    """
    _, axes = _axes(len(before), width=4.6, height=3.8)
    for ax, (layer, values) in zip(axes, before.items(), strict=True):
        ax.step(range(len(values)), values, where="mid", color=COLORS[6], label="none", linewidth=1.5)
        for number, (method, smoothed) in enumerate(after[layer].items()):
            ax.plot(smoothed, marker=MARKERS[number], markersize=4, color=COLORS[number], label=method, linewidth=0.8)
        ax.set(xlabel="timestep", ylabel=ylabel, title=layer)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(frameon=False, fontsize="small")


def heat_maps(
    maps: Mapping[str, Sequence[Sequence[float]]],
    *,
    xlabel: str,
    xticks: Sequence[object],
    ylabel: str,
    yticks: Sequence[object],
    label: str,
    form: str = "{:.1f}",
) -> None:
    """Matrices of numbers side by side on one colour scale, each number written into its cell; NaN stays empty."""
    figure, axes = _axes(len(maps), width=5.0, height=4.0)
    values = [v for rows in maps.values() for row in rows for v in row if v == v]
    low, high = min(values), max(values)
    for ax, (title, rows) in zip(axes, maps.items(), strict=True):
        image = ax.imshow(rows, vmin=low, vmax=high, cmap="cividis", aspect="auto", origin="lower")
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if value == value:
                    dark = (value - low) < 0.6 * (high - low)
                    ax.text(x, y, form.format(value), ha="center", va="center", color="w" if dark else "k", fontsize=8)
        ax.set(title=title, xlabel=xlabel, xticks=range(len(xticks)), yticks=range(len(yticks)))
        ax.set_xticklabels([str(tick) for tick in xticks])
        ax.set_yticklabels([str(tick) for tick in yticks])
        ax.set_ylabel(ylabel)
        ax.grid(visible=False)
    figure.colorbar(image, ax=axes, label=label)


def scatters(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    *,
    xlabel: str,
    ylabel: str,
    log: bool = False,
) -> None:
    """Points, one panel a title and one colour and marker a series."""
    _, axes = _axes(len(panels), width=5.2)
    for ax, (title, series) in zip(axes, panels.items(), strict=True):
        for number, (name, (x, y)) in enumerate(series.items()):
            turn, color = divmod(number, len(COLORS))
            style = {"color": COLORS[color], "marker": MARKERS[(number + turn) % len(MARKERS)]}
            ax.scatter(x, y, s=18, alpha=0.7, label=name, **style)
        ax.set(xlabel=xlabel, ylabel=ylabel, title=title, yscale="log" if log else "linear")
    axes[-1].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def task_stream(tasks: Sequence[tuple[str, float, float]]) -> None:
    """What each worker of a cluster did when: a bar a task, from ``(worker, start, stop)`` in seconds."""
    workers = sorted({worker for worker, _, _ in tasks}, key=lambda name: min(s for w, s, _ in tasks if w == name))
    first = min(start for _, start, _ in tasks)
    _, (ax,) = _axes(width=7.5, height=1.2 + 0.5 * len(workers))
    for worker, start, stop in tasks:
        row = workers.index(worker)
        ax.barh(row, stop - start, left=start - first, height=0.6, color=COLORS[row % len(COLORS)], edgecolor="white")
    ax.set(xlabel="time (s)", yticks=range(len(workers)), yticklabels=[f"worker {n + 1}" for n in range(len(workers))])
    ax.invert_yaxis()


def labelled_points(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]], ours: Collection[str], *, xlabel: str, ylabel: str
) -> "Figure":
    """Points with one label a series, at its lowest; ``ours`` in one colour, all else in grey. The y axis is a log."""
    figure, (ax,) = _axes(width=7.2, height=4.4)
    for name, (x, y) in points.items():
        is_ours = name in ours
        color = COLORS[0] if is_ours else "#8a8a8a"
        ax.scatter(
            x, y, s=44 if is_ours else 24, color=color, marker="D" if is_ours else "o", zorder=3 if is_ours else 2
        )
        low = min(range(len(y)), key=y.__getitem__)
        style = {"fontsize": 9, "color": color if is_ours else "#444444", "fontweight": "bold" if is_ours else "normal"}
        ax.annotate(name, (x[low], y[low]), xytext=(6, -3), textcoords="offset points", **style)
    ax.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
    ax.yaxis.set_major_formatter(needs("matplotlib.ticker").ScalarFormatter())
    ax.margins(x=0.2)
    return figure


def method_times(rows: Sequence[Mapping[str, Any]], ours: Collection[str]) -> None:
    """Time against the dense model by number of tokens: a line a method, ``ours`` in one colour, all else in grey.

    Args:
        rows: with ``method``, ``tokens``, ``times_dense`` and its interval ``ci``; those without a time are left out.
        ours: names of methods.
    """
    rows = [row for row in rows if "times_dense" in row]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    _, (ax,) = _axes(width=8.4, height=5.0)
    ends = {}
    for name in methods:
        found = [row for row in rows if row["method"] == name]
        x, y = ([row[key] for row in found] for key in ("tokens", "times_dense"))
        color = COLORS[0] if name in ours else "#8a8a8a"
        ax.plot(x, y, color=color, marker="D" if name in ours else "o", markersize=5, zorder=3 if name in ours else 2)
        ax.fill_between(x, *zip(*(row["ci"] for row in found), strict=True), color=color, alpha=0.2)
        ends[name] = x[-1], y[-1]
    height = 0.0
    for name, (x, y) in sorted(ends.items(), key=lambda end: end[1][1]):
        height = max(y, 1.12 * height)  # labels don't lie on one another
        color = COLORS[0] if name in ours else "#444444"
        style = {"xytext": (x * 1.15, height), "textcoords": "data", "va": "center", "fontsize": 8, "color": color}
        ax.annotate(name, (x, y), **style)
    ticks = sorted({row["tokens"] for row in rows})
    ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time / dense bfloat16")
    ax.set_xlim(ticks[0] * 0.8, ticks[-1] * 11)
    ax.set_xticks(ticks, ticks)
    low, high = ax.get_ylim()
    ax.set_yticks([2.0**k for k in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)])
    ax.yaxis.set_major_formatter(needs("matplotlib.ticker").FormatStrFormatter("%g"))
    ax.minorticks_off()


def save_svg(figure: "Figure", path: str | Path) -> None:
    """Write a figure as SVG: equal figures are equal files, text stays text."""
    with plt.rc_context({"svg.hashsalt": "thermo_lib", "svg.fonttype": "none"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    write_text(path, text.getvalue())

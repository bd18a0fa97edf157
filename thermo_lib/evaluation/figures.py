"""Figures of the notebooks: colour-blind-safe, axes with units, one idea each."""

import io
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thermo_lib.evaluation.axes import COLORS, MARKERS, SIGNS, head, label_ends, new_axes, plt, series_colors
from thermo_lib.evaluation.display import OTHERS, OURS
from thermo_lib.extras import needs
from thermo_lib.files.text import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MaxNLocator = needs("matplotlib.ticker").MaxNLocator


def lines(
    series: Mapping[str, Sequence[float]],
    *,
    x: Sequence[float] | None = None,
    xlabel: str = "timestep",
    ylabel: str,
    title: str = "",
    ours: Collection[str] = (),
    aside: Collection[str] = (),
    steps: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """One line a series against timesteps (or ``x``), each with its name at its end.

    Args:
        series: name to values.
        x: what the values belong to; without it their positions.
        xlabel, ylabel: with units.
        title: what to see.
        ours, aside: names that get the project's colour, and all else grey; without any a colour each but ``aside``.
        steps: name of a series that is drawn behind the others, black and in steps.
        ax: where to draw; without it a new figure.
    """
    if ax is None:
        figure, (ax,) = new_axes()
        head(figure, title)
        title = ""
    colors = series_colors([name for name in series if name != steps], ours, aside) | (
        {steps: COLORS[6]} if steps else {}
    )
    ends = {}
    for number, (name, values) in enumerate(series.items()):
        places = range(len(values)) if x is None else x
        if name == steps:
            ax.step(places, values, label=name, where="mid", color=colors[name], zorder=1)
        else:
            style: dict[str, Any] = {"color": colors[name], "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
            ax.plot(places, values, label=name, zorder=3 if name in ours else 2, **style)
        last = max((n for n, value in enumerate(values) if value == value), default=None)
        if last is not None:
            ends[name] = places[last], values[last]
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, loc="left", fontsize=11)
    if x is None:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(series) > 1:
        label_ends(ax, ends, colors)
    return ax


def loss_curves(steps: Sequence[int], curves: Mapping[str, Sequence[float]], *, title: str = "") -> None:
    """Training losses against optimizer steps, one panel each; the last value is written at its end."""
    figure, axes = new_axes(len(curves), width=5.2)
    head(figure, title)
    for ax, (name, values) in zip(axes, curves.items(), strict=True):
        ax.plot(steps, values, color=OURS)
        ax.annotate(f"{values[-1]:.2f}", (steps[-1], values[-1]), (4, 0), textcoords="offset points", color=OURS)
        ax.set(xlabel="optimizer step", ylabel="loss (nats per masked token)", ylim=(0, None))
        ax.set_title(name, loc="left", fontsize=11)


def panels(
    figures: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    ylabel: str,
    xlabel: str = "timestep",
    title: str = "",
    ours: Collection[str] = (),
    aside: Collection[str] = (),
) -> "list[Axes]":
    """Line plots side by side, one panel a title; ``title`` says above all of them what to see. See ``lines``."""
    figure, axes = new_axes(len(figures), width=5.2)
    head(figure, title)
    for ax, (name, series) in zip(axes, figures.items(), strict=True):
        lines(series, ylabel=ylabel, title=name, xlabel=xlabel, ours=ours, aside=aside, ax=ax)
    return axes


def _times(ax: "Axes", rows: Sequence[Mapping[str, Any]], *, color: str, **style: Any) -> tuple[float, float]:
    """A line of times with the band of its intervals; where it ends."""
    x, y, ci = ([row[key] for row in rows] for key in ("tokens", "times_dense", "ci"))
    ax.plot(x, y, color=color, markersize=5, **style)
    ax.fill_between(x, [low for low, _ in ci], [high for _, high in ci], color=color, alpha=0.2)
    return x[-1], y[-1]


def kernel_times(rows: Sequence[Mapping[str, Any]], *, title: str = "") -> None:
    """Time against the dense product by number of tokens, a panel for each linear and a line for each kernel.

    Args:
        rows: with ``linear``, ``kernel``, ``tokens``, ``times_dense`` and its interval ``ci``.
        title: what to see.
    """
    linears = list(dict.fromkeys(row["linear"] for row in rows))
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    figure, axes = new_axes(len(linears), width=5.2, height=3.8)
    head(figure, title)
    colors = series_colors(kernels, ())
    for ax, linear in zip(axes, linears, strict=False):
        ends = {}
        for number, kernel in enumerate(kernels):
            found = [row for row in rows if (row["linear"], row["kernel"]) == (linear, kernel)]
            if found:
                ends[kernel] = _times(ax, found, color=colors[kernel], marker=MARKERS[number])
        ax.axhline(1, color=COLORS[6], linestyle="--", linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time / dense bfloat16")
        ax.set_title(linear, loc="left", fontsize=11)
        ax.set_xticks(sorted({row["tokens"] for row in rows}), sorted({row["tokens"] for row in rows}), rotation=45)
        ax.set_ylim(0.5 if min(row["times_dense"] for row in rows) > 0.5 else 0.3, 5)
        ticks = [0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4]
        ax.set_yticks([tick for tick in ticks if tick >= ax.get_ylim()[0]])
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        label_ends(ax, ends, colors)


def intervals(
    rows: Mapping[str, tuple[float, tuple[float, float]]],
    *,
    xlabel: str,
    reference: float | None = None,
    reference_label: str = "full precision",
    title: str = "",
    ours: Collection[str] = (),
) -> "Figure":
    """Values with their 95 % intervals, one row each.

    Args:
        rows: name to ``(value, (low, high))``.
        xlabel: with the unit.
        reference: a value that the others are compared with, drawn as a vertical line.
        reference_label: what stands at this line.
        title: what to see.
        ours: names that get the project's colour, and all else grey; without any all have it.
    """
    figure, (ax,) = new_axes(width=7.5, height=1.2 + 0.34 * len(rows))
    head(figure, title)
    some = any(name in ours for name in rows)
    for line, (name, (value, (low, high))) in enumerate(rows.items()):
        color = OTHERS if some and name not in ours else OURS
        ax.errorbar(value, line, xerr=[[max(0, value - low)], [max(0, high - value)]], fmt="o", color=color, capsize=3)
    ax.set(xlabel=xlabel, yticks=range(len(rows)), yticklabels=list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    for label, name in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if name in ours else "normal")
    if reference is not None:
        ax.axvline(reference, color="#444444", linestyle="--", linewidth=1)
        style: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": 9}
        ax.annotate(reference_label, (reference, 1), (0, 3), ha="center", color="#444444", **style)
    return figure


def shares(models: Mapping[str, Mapping[str, Sequence[float]]], *, xlabel: str, title: str = "") -> None:
    """Shares of several factors, a bar a model beside each other; a dot is one of a share's values.

    Args:
        models: model to factor to the values of its share, e.g. one a seed; a bar is their mean. The first model has
            the project's colour, the others are grey; the names stand at the bars of the first factor.
        xlabel: what a share is of.
        title: what to see.
    """
    factors = list(next(iter(models.values())))
    figure, (ax,) = new_axes(width=7.5, height=1.2 + 0.5 * len(factors))
    head(figure, title)
    thickness = 0.8 / len(models)
    for number, (model, found) in enumerate(models.items()):
        places = [place + (number - (len(models) - 1) / 2) * thickness for place in range(len(factors))]
        means = [sum(found[factor]) / len(found[factor]) for factor in factors]
        color = OURS if number == 0 else OTHERS
        ax.barh(places, means, thickness, color=color)
        for place, mean, factor in zip(places, means, factors, strict=True):
            ax.plot(found[factor], [place] * len(found[factor]), "k.", markersize=4)
            name = f"  {model}" if factor == factors[0] else ""
            at, shade = (max(found[factor]), place), color if name and not number else "#444444"
            ax.annotate(f"{mean:.1%}{name}", at, (6, 0), textcoords="offset points", va="center", color=shade)
    largest = max(share for found in models.values() for values in found.values() for share in values)
    ax.set(xlabel=xlabel, yticks=range(len(factors)), yticklabels=factors, xlim=(0, 1.25 * largest))
    ax.set_ylim(len(factors) - 0.5, -0.5)


def parameter_over_time(
    layer: str,
    before: Sequence[float],
    after: Mapping[str, Sequence[float]],
    *,
    ylabel: str,
    ours: Collection[str] = (),
    ax: "Axes",
) -> None:
    """One panel of ``parameters_over_time``, on axes that are there."""
    lines({**after, "not smoothed": before}, ylabel=ylabel, title=layer, ours=ours, steps="not smoothed", ax=ax)


def parameters_over_time(
    before: Mapping[str, Sequence[float]],
    after: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    ylabel: str,
    title: str = "",
    ours: Collection[str] = (),
) -> None:
    """A quantization parameter over the timesteps, unsmoothed (steps) and smoothed (lines), one panel a layer.

    Args:
        before: layer to values, one a timestep.
        after: layer to method to values.
        ylabel: the parameter with its unit.
        title: what to see.
        ours: methods that get the project's colour, see ``lines``.
    """
    figure, axes = new_axes(len(before), width=4.6, height=3.8)
    head(figure, title)
    for ax, (layer, values) in zip(axes, before.items(), strict=True):
        parameter_over_time(layer, values, after[layer], ylabel=ylabel, ours=ours, ax=ax)


def heat_maps(
    maps: Mapping[str, Sequence[Sequence[float]]],
    *,
    xlabel: str,
    xticks: Sequence[object],
    ylabel: str,
    yticks: Sequence[object],
    label: str,
    form: str = "{:.1f}",
    title: str = "",
) -> None:
    """Matrices of numbers side by side on one colour scale, each number written into its cell; NaN stays empty."""
    figure, axes = new_axes(len(maps), width=5.0, height=4.0)
    head(figure, title)
    values = [v for rows in maps.values() for row in rows for v in row if v == v]
    low, high = min(values), max(values)
    for ax, (name, rows) in zip(axes, maps.items(), strict=True):
        image = ax.imshow(rows, vmin=low, vmax=high, cmap="cividis", aspect="auto", origin="lower")
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if value == value:
                    dark = (value - low) < 0.6 * (high - low)
                    ax.text(x, y, form.format(value), ha="center", va="center", color="w" if dark else "k", fontsize=8)
        ax.set(xlabel=xlabel, ylabel=ylabel, xticks=range(len(xticks)), yticks=range(len(yticks)))
        ax.set_title(name, loc="left", fontsize=11)
        ax.set(xticklabels=[str(tick) for tick in xticks], yticklabels=[str(tick) for tick in yticks])
        ax.grid(visible=False)
    figure.colorbar(image, ax=axes, label=label)


def scatters(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    ours: Collection[str] = (),
) -> None:
    """Points, one panel a name and one marker a series, whose name is at the height of its points' middle."""
    figure, axes = new_axes(len(panels), width=6.2)
    head(figure, title)
    for ax, (panel, series) in zip(axes, panels.items(), strict=True):
        colors, middles = series_colors(list(series), ours), {}
        for number, (name, (x, y)) in enumerate(series.items()):
            marker = MARKERS[number % len(MARKERS)]
            ax.scatter(x, y, s=22, alpha=0.8, zorder=3 if name in ours else 2, color=colors[name], marker=marker)
            middles[f"{SIGNS[marker]} {name}"] = max(x), statistics.median(y)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.set_title(panel, loc="left", fontsize=11)
        label_ends(ax, middles, dict(zip(middles, colors.values(), strict=True)))


def boards(models: Mapping[str, Mapping[str, str]], clues: str, solution: str, *, title: str = "") -> None:
    """Grids of 4x4 Sudoku, a row of grids a model: clues grey (pale until the model has copied them), right cells
    in our colour, wrong ones crossed out.

    Args:
        models: model to step to the 16 cells, row by row.
        clues: 16 digits, 0 where a cell is to fill.
        solution: 16 digits.
        title: what to see.
    """
    steps = list(next(iter(models.values())))
    size = (1.5 * len(steps) + 0.4, 1.8 * len(models) + 0.5)
    figure, axes = plt.subplots(len(models), len(steps), figsize=size, layout="constrained", squeeze=False)
    head(figure, title)
    for row, (model, grids) in zip(axes, models.items(), strict=True):
        for ax, (step, cells) in zip(row, grids.items(), strict=True):
            for at, (cell, clue, right) in enumerate(zip(cells, clues, solution, strict=True)):
                x, y = at % 4 + 0.5, at // 4 + 0.5
                wrong = cell not in ("·", right)
                color = COLORS[1] if wrong else OURS if clue == "0" else "#777777"
                if cell == "·" and clue != "0":
                    cell, color = clue, "#c0c0c0"
                weight = "bold" if clue == "0" else "normal"
                ax.text(x, y, cell, ha="center", va="center", color=color, fontsize=13, fontweight=weight)
                if wrong:
                    ax.plot([x - 0.38, x + 0.38], [y + 0.38, y - 0.38], color=color, linewidth=2)
            for line in range(5):
                style = {"color": "#444444", "linewidth": 2 if line % 2 == 0 else 0.5}
                ax.plot([line, line], [0, 4], **style)
                ax.plot([0, 4], [line, line], **style)
            ax.set(xlim=(-0.05, 4.05), ylim=(4.05, -0.05), aspect="equal", xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if ax in axes[0]:
                ax.set_title(step, fontsize=10)
        row[0].set_ylabel(model, fontsize=10)


def task_stream(tasks: Sequence[tuple[str, float, float]], *, title: str = "") -> None:
    """What each worker of a cluster did when: a bar a task, from ``(worker, start, stop)`` in seconds."""
    workers = sorted({worker for worker, _, _ in tasks}, key=lambda name: min(s for w, s, _ in tasks if w == name))
    first = min(start for _, start, _ in tasks)
    figure, (ax,) = new_axes(width=7.5, height=1.2 + 0.5 * len(workers))
    head(figure, title)
    for worker, start, stop in tasks:
        row = workers.index(worker)
        ax.barh(row, stop - start, left=start - first, height=0.6, color=OURS, edgecolor="white")
    ax.set(xlabel="time (s)", yticks=range(len(workers)), yticklabels=[f"worker {n + 1}" for n in range(len(workers))])
    ax.invert_yaxis()


def labelled_points(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ours: Collection[str],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
) -> "Figure":
    """Points with one label a series, at its lowest; ``ours`` in one colour, a marker each, all else in grey.

    The y axis is logarithmic.
    """
    figure, (ax,) = new_axes(width=6.8, height=4.6)
    head(figure, title)
    own, ends = [name for name in points if name in ours], {}
    for name, (xs, ys) in points.items():
        marks: dict[str, Any] = {"s": 24, "zorder": 2}
        if name in own:
            marks = {"s": 44, "marker": "Ds^"[own.index(name) % 3], "zorder": 3}
        ax.scatter(xs, ys, color=OURS if name in own else OTHERS, **marks)
        low = min(range(len(ys)), key=ys.__getitem__)
        ends[name] = xs[low], ys[low]
    placed: list[tuple[float, float]] = []
    for name, (x, y) in sorted(ends.items(), key=lambda end: end[1][1]):
        height = max([y, *(1.22 * other for at, other in placed if abs(at - x) < 0.3)])  # none lies on another
        placed.append((x, height))
        text: dict[str, Any] = {"color": OURS, "weight": "bold"} if name in own else {"color": "#444444"}
        ax.annotate(name, (x, height), (7, 0), textcoords="offset points", va="center", fontsize=10, **text)
    ax.set(yscale="log", yticks=[3, 5, 10, 20, 50, 100])
    ax.set_xlabel(xlabel, fontsize=11)
    ax.set_ylabel(ylabel, fontsize=11)
    ax.tick_params(labelsize=11)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.margins(x=0.15)
    return figure


def method_times(rows: Sequence[Mapping[str, Any]], ours: Collection[str], *, title: str = "") -> None:
    """Time against the dense model by number of tokens: a line a method, ``ours`` in one colour, all else in grey.

    Args:
        rows: with ``method``, ``tokens``, ``times_dense`` and its interval ``ci``; those without a time are left out.
        ours: names of methods.
        title: what to see.
    """
    rows = [row for row in rows if "times_dense" in row]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    ticks = sorted({row["tokens"] for row in rows})
    figure, (ax,) = new_axes(width=7.0, height=5.0)
    head(figure, title)
    ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time / dense bfloat16")
    ends, colors = {}, {}
    for names in ([name for name in methods if (name in ours) == own] for own in (True, False)):
        for number, name in enumerate(names):
            marker, color = MARKERS[number % len(MARKERS)], OURS if name in ours else OTHERS
            order = 3 if name in ours else 2
            found = [row for row in rows if row["method"] == name]
            x, y = _times(ax, found, color=color, marker=marker, zorder=order)
            if x == ticks[-1]:
                ends[f"{SIGNS[marker]} {name}"], colors[f"{SIGNS[marker]} {name}"] = (x, y), color
            else:
                ax.annotate(name, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=8, color="#444444")
    label_ends(ax, ends, colors)
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

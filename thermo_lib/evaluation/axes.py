"""What all figures have in common: colour-blind-safe colours (Okabe and Ito), axes, titles, names at lines' ends."""

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thermo_lib.evaluation.display import OTHERS, OURS
from thermo_lib.extras import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

plt = needs("matplotlib.pyplot")

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SIGNS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}  # of markers, in text
MARKERS = tuple(SIGNS)


def new_axes(count: int = 1, width: float = 6.4, height: float = 4.2) -> "tuple[Figure, list[Axes]]":
    """``count`` axes, at most two in a row: letters of three are too small to read at half size."""
    rows = -(-count // 2)
    columns = -(-count // rows)
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, list(axes.flat[:count])


def series_colors(names: Sequence[str], ours: Collection[str], aside: Collection[str] = ()) -> dict[str, str]:
    """One colour for ours and grey for the others; without any of ours a colour each, and grey for ``aside``."""
    if any(name in ours for name in names):
        return {name: OURS if name in ours else OTHERS for name in names}
    colored = [name for name in names if name not in aside]
    return {name: OTHERS if name in aside else COLORS[colored.index(name) % len(COLORS)] for name in names}


def label_ends(ax: "Axes", ends: Mapping[str, tuple[float, float]], colors: Mapping[str, str]) -> None:
    """Write each series' name at the right of the axes, at the height where its line ends, none on another."""
    ax.autoscale_view()
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = {name: to_axes.transform(end)[1] for name, end in ends.items()}
    order = sorted(heights, key=heights.__getitem__)
    size = 0.9 * plt.rcParams["font.size"]
    gap = size / (54 * ax.get_window_extent().height / ax.figure.dpi)
    places, above = {}, -math.inf
    for name in order:
        above = places[name] = max(heights[name], above + gap)
    # What was pushed out at the top goes down again.
    below = math.inf
    for name in reversed(order):
        below = places[name] = min(places[name], below - gap, 1 + gap / 2)
    for name, place in places.items():
        color = colors[name] if colors[name] != OTHERS else "#444444"
        style: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
        ax.annotate(name, (1, place), (6, 0), color=color, fontsize=size, annotation_clip=False, **style)


def head(figure: "Figure", title: str) -> None:
    """What to see, above a figure."""
    if title:
        title = textwrap.fill(title, int(105 * figure.get_figwidth() / plt.rcParams["font.size"]))
        figure.suptitle(title, x=0.01, ha="left", fontsize="large", fontweight="bold")

"""Draws the pictures of "How it works" and "Which setting?": ``python docs/figures/draw.py [FOLDER]``."""

import csv
import sys
from pathlib import Path

import torch

from thermo_lib.evaluation.axes import plt
from thermo_lib.evaluation.display import OURS
from thermo_lib.evaluation.figures import save_svg
from thermo_lib.notebooks import ROOT
from thermo_lib.prose import value
from thermo_lib.quant.trellis import codebook, gains
from thermo_lib.time_aware.groups import TimeGroupParams, TimeGroups
from thermo_lib.time_aware.smoothing import WINDOWED, BoundarySmoother

GREYS = ("#999999", "#666666", "#333333")


def _axes(width: float = 6.4, height: float = 3.2):
    figure, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def groups():
    """The timesteps of three groups and the share of masked tokens."""
    figure, ax = _axes()
    for number, (start, stop) in enumerate(TimeGroups(16, 3).intervals):
        steps = range(start, stop)
        ax.bar(steps, [1 - i / 16 for i in steps], color=(OURS, *GREYS)[number])
        ax.text((start + stop - 1) / 2, 1.06 - start / 16, f"group {number}", ha="center", fontsize=11)
    ax.set(xlabel="timestep", ylabel="share of masked tokens (0-1)", title="Three groups divide 16 timesteps")
    ax.set_ylim(0, 1.18)
    return figure


def smoothing():
    """A scale around the boundary of two groups, by method."""
    params = [TimeGroupParams((0, 8), [1.0], [0.0]), TimeGroupParams((8, 16), [2.0], [0.0])]
    figure, ax = _axes()
    ax.step(range(16), [1.0] * 8 + [2.0] * 8, where="mid", color=GREYS[0], linestyle=":")
    ax.text(8.9, 2.08, "not smoothed", color=GREYS[1], fontsize=11)
    for number, method in enumerate(WINDOWED):
        scales = [float(step.scale) for step in BoundarySmoother(method, 4).smooth(params)]
        color = OURS if method == "linear" else GREYS[number]
        ax.plot(range(16), scales, color=color, marker="os^"[number], markersize=4)
        ax.annotate(
            method,
            (4, scales[4]),
            (0.3, 1.25 + 0.25 * number),
            color=color,
            fontsize=11,
            arrowprops={"arrowstyle": "-", "color": color},
        )
    ax.set(xlabel="timestep", ylabel="scale", title="Smoothing turns a jump into steps")
    ax.set_ylim(0.9, 2.25)
    return figure


def path_kl():
    """What each timestep adds to path KL."""
    with (ROOT / "reports" / "path_kl_per_timestep.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure, ax = _axes()
    for name, label, color in (
        ("W2A16 rtn", "round-to-nearest", GREYS[0]),
        ("W2A16 least_squares", "least squares", GREYS[1]),
        ("W2A16 gptq", "GPTQ", OURS),
    ):
        heights = [float(row[name]) for row in rows]
        ax.plot(range(len(rows)), heights, color=color, marker="o", markersize=4)
        ax.text(len(rows) - 0.7, heights[-1], label, color=color, va="center", fontsize=11)
    ax.set(xlabel="timestep", ylabel="path KL (nats per sequence)", title="Path KL adds up over the timesteps (W2A16)")
    ax.set_xlim(-0.5, len(rows) + 4)
    return figure


def trellis():
    """The values that a column's next code can take, from two states."""
    figure, ax = _axes(height=2.6)
    for row, state in enumerate((6, 53)):
        successors = (state * 4 + torch.arange(4)) % 2**12
        values = codebook()[successors] * gains(torch.tensor([2]))
        ax.scatter(values, [row] * 4, color=(OURS, GREYS[1])[row], s=50, marker="os"[row])
        ax.text(-3.9, row, f"state {state}", va="center", fontsize=11)
    ax.set(
        xlabel="value of a weight before its scale",
        title="The bits before a code decide which 4 values it can have",
        yticks=[],
    )
    ax.set_xlim(-4, 3)
    ax.set_ylim(-0.6, 1.6)
    ax.spines["left"].set_visible(False)
    return figure


def choose():
    """The questions that lead to a preset, with the measured path KL of each."""
    static = "study(activation_bits=4 path_kl.what=parameters)"
    leaves = [
        (0, "no calibration data", "fast", value("metrics.configurations.W2A16 least_squares", "kl")),
        (1, "4-bit activations, ranges at run time", "w2a4", value("w2a4", "kl_a4")),
        (2, "4-bit activations, static ranges", "w2a4-static", value(static, "kl")),
        (3, "16-bit activations, seconds", "gptq", value("gptq", "kl")),
        (4, "16-bit activations, minutes", "best", value("best", "kl")),
        (5, "the same, fewer bits", "small", value("small", "kl")),
    ]
    figure, ax = _axes(7.4, 3.4)
    for y, have, preset, nats in leaves:
        color = OURS if preset == "best" else GREYS[1]
        ax.plot([0.3, 0.8, 0.8, 1.2], [-2.5, -2.5, -y, -y], color=GREYS[0], linewidth=1)
        ax.text(1.25, -y, have, va="center", fontsize=11)
        ax.text(5.0, -y, f"{preset}: {nats} nats", va="center", fontsize=11, color=color, weight="bold")
        ax.annotate("", (4.95, -y), (4.55, -y), arrowprops={"arrowstyle": "->", "color": GREYS[0]})
    ax.text(0.25, -2.5, "You\nhave", ha="right", va="center", fontsize=11)
    ax.set(xlim=(-0.3, 7.2), ylim=(-5.6, 0.6), title="What you have decides the preset (path KL, reference model)")
    ax.set_axis_off()
    return figure


FIGURES = {"groups": groups, "smoothing": smoothing, "path-kl": path_kl, "trellis": trellis, "choose": choose}


def main(folder: Path) -> None:
    """Draw all of them."""
    for name, draw in FIGURES.items():
        figure = draw()
        save_svg(figure, folder / f"{name}.svg")
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "figures")

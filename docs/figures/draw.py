"""Draws the pictures of "How it works" and "Which setting?": ``python docs/figures/draw.py [FOLDER]``."""

import csv
import itertools
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
    last = len(rows) - 1
    ax.set(xlabel="timestep", ylabel="path KL (nats)", title="Path KL adds up over the timesteps, most of it late")
    ax.set_xticks([*range(0, last, 5), last])
    ax.set_xlim(-0.5, last + 5)
    ax.set_ylim(0)
    return figure


def trellis():
    """The values that a column's next code can take, from two states."""
    figure, ax = _axes(height=2.8)
    for row, state in enumerate((6, 53)):
        successors = (state * 4 + torch.arange(4)) % 2**12
        values = codebook()[successors] * gains(torch.tensor([2]))
        color = (OURS, GREYS[1])[row]
        ax.scatter(values, [row] * 4, color=color, s=50, marker="os"[row])
        for code, at in enumerate(values.flatten().tolist()):
            ax.text(at, row + 0.16, f"{code:02b}", ha="center", va="bottom", color=color)
        ax.text(-3.9, row, f"after state {state}", va="center", color=color)
    ax.set(
        xlabel="value of a weight before its scale",
        title="The bits before a code decide which 4 values it can have",
        yticks=[],
    )
    ax.set_xlim(-4, 2.5)
    ax.set_ylim(-0.5, 1.7)
    ax.spines["left"].set_visible(False)
    return figure


TREE = (  # a question, and what each answer leads to: a preset or another question
    "Calibration\ndata?",
    {
        "no": "fast",
        "yes": (
            "Activations?",
            {
                "16 bits": ("Time?", {"seconds": "gptq", "minutes": "best", "minutes,\nfewest bits": "small"}),
                "4 bits": ("Ranges?", {"at run time": "w2a4", "stored": "w2a4-static"}),
            },
        ),
    },
)
MEASURED = {  # a preset to where its bits and its path KL stand
    "fast": ("metrics.configurations.W2A16 least_squares", "bits", "kl"),
    "gptq": ("gptq", "bits", "kl"),
    "best": ("best", "bits", "kl"),
    "small": ("small", "bits", "kl"),
    "w2a4": ("w2a4", "bits", "kl_a4"),
    "w2a4-static": ("study(activation_bits=4 path_kl.what=parameters)", "bits", "kl"),
}


def choose():
    """The questions that lead to a preset, with the measured bits and path KL of each."""
    figure, ax = _axes(7.4, 5.0)
    columns, leaves = (0.0, 2.0, 4.2, 6.3), itertools.count()

    def draw(node, depth):
        """Draw a question, what its answers lead to and the lines there; its height."""
        if isinstance(node, str):
            source, *quantities = MEASURED[node]
            bits, nats = (value(source, quantity) for quantity in quantities)
            y, color = -next(leaves), OURS if node == "best" else GREYS[2]
            ax.text(columns[-1], y + 0.15, node, va="center", color=color, weight="bold")
            ax.text(columns[-1], y - 0.17, f"{bits} bits, {nats} nats", va="center", color=color)
            return y
        question, answers = node
        x = columns[depth]
        children = {answer: draw(child, depth + 1) for answer, child in answers.items()}
        y = (max(children.values()) + min(children.values())) / 2
        for (answer, height), child in zip(children.items(), answers.values(), strict=True):
            end = columns[-1] if isinstance(child, str) else columns[depth + 1]
            ax.plot([x, x + 0.75, x + 0.75, end - 0.1], [y, y, height, height], color=GREYS[0], linewidth=1.2, zorder=1)
            ax.text(x + 0.82, height + 0.06, answer, va="bottom", fontsize=11, linespacing=0.9)
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": GREYS[0]}
        ax.text(x, y, question, ha="center", va="center", bbox=box, zorder=2)
        return y

    draw(TREE, 0)
    ax.set(
        xlim=(-0.7, 8.3), ylim=(-5.5, 0.7), title="Three questions lead to a preset, its bits per weight and path KL"
    )
    ax.set_axis_off()
    return figure


FIGURES = {"groups": groups, "smoothing": smoothing, "path-kl": path_kl, "trellis": trellis, "choose": choose}


def main(folder: Path) -> None:
    """Draw all of them."""
    for name, draw in FIGURES.items():
        with plt.rc_context({"font.size": 12}):  # to be read on a phone
            figure = draw()
            save_svg(figure, folder / f"{name}.svg")
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "figures")

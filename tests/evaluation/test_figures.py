"""Figures name their series where these are, in one colour for ours, and no name lies on another."""

import itertools

import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from thermo_lib.evaluation import figures
from thermo_lib.evaluation.display import OTHERS, OURS

SERIES = {"tensor": ([0.9, 0.95, 0.8], [3.0, 4.0, 5.0]), "groups": ([0.85], [3.9]), "finer groups": ([0.99], [3.95])}


@pytest.fixture(autouse=True)
def _closed() -> None:
    plt.close("all")


def names(ax: Axes) -> dict[str, float]:
    """The names beside a panel, to their heights."""
    return {text.get_text(): text.xy[1] for text in ax.texts}


def test_points_are_named_beside_the_panel() -> None:
    figures.scatters({"left": SERIES, "right": SERIES}, xlabel="score", ylabel="", ours=["tensor"])
    for ax in plt.gcf().axes:
        found = names(ax)
        assert {name[2:] for name in found} == set(SERIES)
        assert len({name[0] for name in found}) == len(SERIES), "each has a sign of its own"
        heights = sorted(found.values())
        assert all(above - below > 0.02 for below, above in itertools.pairwise(heights))
        assert ax.get_legend() is None
        colors = [to_hex(points.get_facecolor()[0]) for points in ax.collections]
        assert colors == [to_hex(OURS), to_hex(OTHERS), to_hex(OTHERS)]


def test_what_others_are_compared_with_is_grey() -> None:
    lines = {"none": [1.0, 2.0], "linear": [1.0, 3.0], "cubic": [1.0, 4.0]}
    (ax,) = figures.panels({"W2A4": lines}, ylabel="path KL", aside=["none"])
    none, linear, cubic = (to_hex(line.get_color()) for line in ax.lines)
    assert none == to_hex(OTHERS)
    assert linear == to_hex(OURS)
    assert len({none, linear, cubic}) == 3
    assert set(names(ax)) == set(lines)


def test_workers_of_a_cluster_have_one_colour() -> None:
    figures.task_stream([("b", 2.0, 3.0), ("a", 1.0, 2.5), ("b", 3.0, 4.0)])
    (ax,) = plt.gcf().axes
    assert {to_hex(bar.get_facecolor()) for bar in ax.patches} == {to_hex(OURS)}
    assert [(bar.get_y() + 0.3, bar.get_x()) for bar in ax.patches] == [(1, 1.0), (0, 0.0), (1, 2.0)]

"""The site is built without a warning, its links lead somewhere, and its examples and pictures are computed anew."""

import importlib.util
import inspect
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import thermo_lib
from thermo_lib.diffusion.sampling import unmask_probabilities
from thermo_lib.quant.trellis import codebook, gains, pack_symbols, read_codes, read_states
from thermo_lib.time_aware.groups import TimeGroupParams, TimeGroups
from thermo_lib.time_aware.markov import markov_report
from thermo_lib.time_aware.smoothing import BoundarySmoother

ROOT = Path(__file__).resolve().parents[2]


class Links(HTMLParser):
    """What a page links to, and the places in it that can be linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.loaded: set[str] = set()
        self.places: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "a" and found.get("href"):
            self.targets.add(found["href"])
        if tag in ("img", "script") and found.get("src"):
            self.loaded.add(found["src"])
        if tag == "link" and found.get("rel") == "stylesheet":
            self.loaded.add(found["href"])
        if found.get("id"):
            self.places.add(found["id"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Links]:
    """Page to its links, of the site as ``make docs`` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--site-dir", str(folder)]
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environ)
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    pages = {}
    for path in folder.rglob("*.html"):
        pages[str(path.relative_to(folder))] = links = Links()
        links.feed(path.read_text(encoding="utf-8"))
        for target in links.targets | links.loaded:
            name = target.partition("#")[0].partition("?")[0]
            is_outside = re.match(r"[a-z]+:", name) or path.name == "404.html"
            assert is_outside or not name or (path.parent / name).exists(), f"{path.name}: {target}"
    return pages


@pytest.mark.slow
def test_every_public_name_is_explained(site: dict[str, Links]) -> None:
    shown = {place.rpartition(".")[2] for place in site["api.html"].places if place.startswith("thermo_lib.")}
    assert set(thermo_lib.__all__) <= shown


@pytest.mark.slow
def test_every_page_is_reached_from_the_first(site: dict[str, Links]) -> None:
    pages = {target.partition("#")[0] for target in site["index.html"].targets}
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= pages | {"index.html"}


@pytest.mark.slow
def test_a_page_loads_nothing_from_another_machine(site: dict[str, Links]) -> None:
    for name, links in site.items():
        assert [source for source in links.loaded if re.match(r"([a-z]+:)?//", source)] == [], name


@pytest.mark.slow
def test_every_anchor_is_there(site: dict[str, Links]) -> None:
    for page, links in site.items():
        for target in links.targets:
            name, _, place = target.partition("#")
            if not place or re.match(r"[a-z]+:", name) or page == "404.html":
                continue
            there = os.path.normpath(Path(page).parent / name) if name else page
            assert place in site[there].places, f"{page}: {target}"


@pytest.mark.slow
def test_every_executed_notebook_is_a_page(site: dict[str, Links]) -> None:
    executed = {f"notebooks/{path.stem}.html" for path in (ROOT / "notebooks" / "executed").glob("*.ipynb")}
    assert executed <= set(site)
    assert any("_figures/" in source for source in site["notebooks/07_peers.html"].loaded)


def test_every_public_name_has_a_docstring() -> None:
    """So have the public methods of the public classes."""
    for name in thermo_lib.__all__:
        found = getattr(thermo_lib, name)
        assert found.__doc__, name
        if inspect.isclass(found):
            for method, function in vars(found).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    assert function.__doc__, f"{name}.{method}"


def test_links_of_pages_outside_the_site_lead_to_files() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            is_outside = re.match(r"[a-z]+:", target)
            assert is_outside or (ROOT / target).exists(), f"{page}: {target}"


@pytest.fixture(scope="module")
def explained() -> str:
    """The page with the examples, on one line."""
    return " ".join((ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8").split())


def test_the_example_of_time_groups(explained: str) -> None:
    (_, a), (b, c), (d, e) = TimeGroups(16, 3).intervals
    assert f"timesteps 0 to {a - 1}, {b} to {c - 1} and {d} to {e - 1}" in explained


def test_the_example_of_smoothing(explained: str) -> None:
    params = [TimeGroupParams((0, 4), [1.0], [0.0]), TimeGroupParams((4, 8), [2.0], [0.0])]
    rough, smooth = (BoundarySmoother(method, 2).smooth(params) for method in (None, "linear"))
    one, two, three, four = (float(step.scale) for step in smooth[2:6])
    assert f"gives {one:.1f}, {two:.1f}, {three:.1f} and {four:.1f}" in explained
    before, after = (markov_report(steps, [4], 8) for steps in (rough, smooth))
    assert f"`(1.6 - 1.4) / 1.4 = {after.mean_jump:.3f}`" in explained
    assert f"= {before.score:.1f}` to `1 - {after.mean_jump:.3f} / 2 = {after.score:.3f}`" in explained


def test_the_example_of_path_kl(explained: str) -> None:
    kl = float(torch.nn.functional.kl_div(torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]), reduction="sum"))
    rho = unmask_probabilities(2).tolist()
    total = rho[0] * 2 * kl + rho[1] * 1 * kl
    assert rho == [0.5, 1.0]
    assert f"= {kl:.3f}`" in explained
    assert f"= {total:.3f}` nats, and the bound is `sqrt({total:.3f} / 2) = {math.sqrt(total / 2):.3f}`" in explained


def test_the_example_of_the_trellis(explained: str) -> None:
    bits = torch.tensor([2, 1, 3])
    packed = pack_symbols(torch.tensor([[3, 0, 5]], dtype=torch.uint8), bits)
    states = read_states(packed, bits)[0].tolist()
    assert f"`{int(packed):08b} = {int(packed)}`" in explained
    assert [f"{state:b} = {state}" in explained for state in states] == [True] * 3
    for values, digits in ((codebook()[states], 4), (gains(bits), 4), (read_codes(packed, bits)[0], 3)):
        one, two, three = (f"{value:.{digits}f}" for value in values.tolist())
        assert f"{one}, {two} and {three}" in explained


@pytest.mark.slow
def test_pictures_are_what_the_code_draws(tmp_path: Path) -> None:
    """The text of an SVG depends on no fonts; that of another matplotlib may differ, and its version is locked."""
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "figures" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    draw.main(tmp_path)
    for path in tmp_path.iterdir():
        committed = (ROOT / "docs" / "figures" / path.name).read_text(encoding="utf-8")
        assert path.read_text(encoding="utf-8") == committed, f"{path.name} is stale: `python docs/figures/draw.py`"

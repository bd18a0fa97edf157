"""The site of the documentation is built without a warning, and its API page has every public name."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import thermo_lib

pytestmark = pytest.mark.slow

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


def test_every_public_name_is_explained(site: dict[str, Links]) -> None:
    shown = {place.rpartition(".")[2] for place in site["api.html"].places if place.startswith("thermo_lib.")}
    assert set(thermo_lib.__all__) <= shown


def test_every_page_is_reached_from_the_first(site: dict[str, Links]) -> None:
    pages = {target.partition("#")[0] for target in site["index.html"].targets}
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= pages | {"index.html"}


def test_a_page_loads_nothing_from_another_machine(site: dict[str, Links]) -> None:
    for name, links in site.items():
        assert [source for source in links.loaded if re.match(r"([a-z]+:)?//", source)] == [], name

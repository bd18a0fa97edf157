"""The page of a report: whole in one file, read by people and by a browser, with scripts or without."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from thermo_lib.evaluation.page import _joined, report_page

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="found no Chromium")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads((ROOT / "reports" / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(report: dict[str, Any]) -> str:
    return report_page(report)


class _Cells(HTMLParser):
    """The texts of a page's table cells, and what its tags load."""

    def __init__(self, page: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.loaded: list[str] = []
        self.is_in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.is_in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.is_in_cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.is_in_cell:
            self.rows[-1][-1] += data


def test_it_loads_nothing_from_elsewhere(page: str) -> None:
    loaded = _Cells(page).loaded
    assert len(loaded) == 2
    assert all(address.startswith("data:image/svg+xml;base64,") for address in loaded)
    assert not re.search(r"url\(|@import|https?:", page)


def test_equal_reports_are_equal_pages(report: dict[str, Any], page: str) -> None:
    assert report_page(report) == page


def test_numbers_and_verdicts_are_there_as_text(report: dict[str, Any], page: str) -> None:
    rows = _Cells(page).rows
    for row in report["configurations"]:
        shown = next(cells for cells in rows if cells[0] == row["name"])
        low, high = row["path_kl_ci"]
        assert f"{row['path_kl']:.2f} ({low:.2f} to {high:.2f})" in shown
    verdicts = [cells[-1] for cells in rows if cells[-1] in ("met", "not met", "inconclusive")]
    assert verdicts == [row["verdict"] for row in report["targets"]]


def test_without_scripts_a_line_says_what_does_not_work(page: str) -> None:
    head, said, rest = re.split("</?noscript>", page)
    assert re.fullmatch(r"<p class=\"soft\">JavaScript is off, .* sort its table; .*</p>", said)
    assert "<table>" not in head  # it is read before the first one
    assert "<button" not in head + rest  # scripts make them


def test_names_are_text_and_nothing_else(report: dict[str, Any]) -> None:
    name = "<script>alert(1)</script>"
    page = report_page(report | {"model": name, "configurations": [report["configurations"][0] | {"name": name}]})
    assert name not in page
    assert page.count("&lt;script&gt;") == 6


def test_a_report_without_comparisons_has_a_page(report: dict[str, Any]) -> None:
    page = report_page(report | {"configurations": [], "targets": []})
    assert "0 configurations. 0 targets: 0 met, 0 not met, 0 inconclusive." in page
    assert "<img" not in page


def test_lines_that_lie_on_one_another_are_one() -> None:
    found = _joined({"a": [1.0, 2.0], "b": [1.01, 2.01], "c": [1.0, 1.5]})
    assert found == {"a\nand b": [1.0, 2.0], "c": [1.0, 1.5]}


def _dom(page: str, script: str, width: int, folder: Path) -> str:
    """What Chromium makes of a page at a width, after a script."""
    path = folder / "page.html"
    path.write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},900", "--dump-dom", f"file://{path}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1300, 500])  # 500: Chromium's windows aren't narrower; the frame in it is 400
def test_a_browser_shows_it_without_scrolling_sideways(page: str, width: int, tmp_path: Path) -> None:
    narrow = "document.documentElement.style.width = '400px';" if width == 500 else ""
    script = f"{narrow} document.title = [document.body.scrollWidth, document.body.clientWidth].join(' ')"
    found = _dom(page, script, width, tmp_path)
    needed, there = map(int, re.search(r"<title>(\d+) (\d+)</title>", found).groups())
    assert needed <= there <= (400 if width == 500 else width)


@browser
@pytest.mark.slow
def test_a_phone_shows_every_cell(report: dict[str, Any], page: str, tmp_path: Path) -> None:
    outside = "[...document.querySelectorAll('td')].filter(cell => cell.getBoundingClientRect().right > 400).length"
    verdicts = "[...document.querySelectorAll('.verdict')].filter(one => one.getBoundingClientRect().width).length"
    script = f"document.documentElement.style.width = '400px'; document.title = [{outside}, {verdicts}].join(' ')"
    assert f"<title>0 {len(report['targets'])}</title>" in _dom(page, script, 500, tmp_path)


@browser
@pytest.mark.slow
def test_a_click_on_a_heading_sorts(report: dict[str, Any], page: str, tmp_path: Path) -> None:
    found = _dom(page, "document.querySelectorAll('th button')[3].click()", 1300, tmp_path)
    names = [cells[0] for cells in _Cells(found).rows[1 : 2 + len(report["configurations"])]]
    rows = sorted([report["full_precision"], *report["configurations"]], key=lambda row: row["path_kl"])
    assert names == [row["name"] for row in rows]

"""Pictures of what a user sees, for the documentation: ``python tests/project/screens.py [report] [site] [notebook]``.

``site`` needs ``make docs``, ``notebook`` takes some minutes. The workbench's picture is left by its test, see
``test_lab.py``.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import markdown
from browser import Page, lab, page, until
from tracked import ROOT, copy_tracked

FIGURES = ROOT / "docs" / "figures"
STYLE = "body { font: 16px/1.5 sans-serif; max-width: 900px; margin: 24px auto } td, th { padding: 2px 8px }"


def shown(browser: Page, path: Path, name: str) -> None:
    """Open a file, and save a picture of its top."""
    browser.send("Page.navigate", url=path.resolve().as_uri())
    until(lambda: browser.js("document.readyState") == "complete", f"{path}")
    browser.picture(FIGURES / name)


def report(browser: Page, work: Path) -> None:
    """The page that ``thermo report`` writes."""
    words = ["report", str(ROOT / "reports" / "report.json"), "--output", str(work / "report.html")]
    subprocess.run([sys.executable, "-m", "thermo_lib", *words], check=True)
    shown(browser, work / "report.html", "report.png")


def site(browser: Page, work: Path) -> None:
    """The first page of the documentation, and the top of README."""
    shown(browser, ROOT / "artifacts" / "site" / "index.html", "site.png")
    text = markdown.markdown((ROOT / "README.md").read_text(encoding="utf-8"), extensions=["tables", "fenced_code"])
    page = ROOT / "artifacts" / "readme.html"
    page.write_text(f'<base href="{ROOT.as_uri()}/"><style>{STYLE}</style>{text}', encoding="utf-8")
    shown(browser, page, "readme.png")
    page.unlink()


def notebook(browser: Page, work: Path) -> None:
    """The end of notebook 04 after a change: its numbers beside the committed ones."""
    root = copy_tracked(work / "clone")
    params = (root / "params.yaml").read_text(encoding="utf-8")
    params = params.replace("activation_bits: [16, 8, 4]  #", "activation_bits: [4]  #")  # the rest takes too long
    (root / "params.yaml").write_text(params.replace("overhead_bits: [16, 8, 4, 3]", "overhead_bits: [4]"), "utf-8")
    with lab(root, work / "settings") as address:
        browser.open_notebook(address, "notebooks/04_boundary_smoothing.ipynb")
        source = browser.js(f"{browser.opened}.content.widgets[1].model.sharedModel.getSource()")
        browser.write_cell(1, source.replace('default("quant.smoothing_window")', "1"))
        last = browser.js(f"{browser.opened}.content.widgets.length") - 1
        browser.run_all(lambda: browser.text_of(last), "notebook 04", 1800)
        browser.js("jupyterapp.commands.execute('application:toggle-left-area').then(() => true)")
        browser.js(f"{browser.opened}.content.scrollToItem({last}, 'start').then(() => true)")
        until(lambda: browser.js("document.querySelectorAll('table').length"), "the table")
        browser.picture(FIGURES / "notebook.png")


def main(names: list[str]) -> None:
    """Make some pictures, or all."""
    makers = {maker.__name__: maker for maker in (report, site, notebook)}
    with tempfile.TemporaryDirectory() as folder, page(Path(folder) / "home", "1300,1000") as browser:
        for name in names or makers:
            makers[name](browser, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Pictures of what a user sees, for the documentation: ``python tests/project/screens.py [report] [site] [notebook]``.

``notebook`` changes a parameter of notebook 04 in a real JupyterLab, runs all, and shows the end, where this run stands
beside the committed one: that takes as long as the notebook does. ``site`` needs ``make docs``. The workbench's picture
is left by its test, see ``test_lab.py``.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import markdown
from browser import ROOT, SECONDS, Page, lab, page, until

FIGURES = ROOT / "docs" / "figures"
NOTEBOOK = "04_boundary_smoothing.ipynb"
CHANGED = "smoothing_window = 2"
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
    """Notebook 04 after a change of a parameter, at its end."""
    root = work / "root"
    root.mkdir()
    shutil.copy(ROOT / "notebooks" / NOTEBOOK, root)
    cells = "[...jupyterapp.shell.widgets('main')].find(one => one.context?.path).content"
    with lab(root, work / "settings") as address:
        browser.open_notebook(f"{address}/lab/tree/{NOTEBOOK}")
        name = CHANGED.split(" =", maxsplit=1)[0]
        browser.js(
            f"(() => {{ const source = {cells}.widgets[1].model.sharedModel; source.setSource("
            f"source.getSource().replace(/^{name} = .*$/m, '{CHANGED}')) }})()"
        )
        browser.js("void jupyterapp.commands.execute('notebook:run-all-cells')")
        last = f"{cells}.widgets.filter(one => one.model.type == 'code').at(-1)"
        until(lambda: browser.js(f"{last}.model.outputs.length > 0"), "the notebook's last cell", 10 * SECONDS)
        browser.js(f"{cells}.scrollToCell({last}, 'start').then(() => true)")
        until(lambda: browser.js("document.readyState") == "complete", "the page")
        browser.picture(FIGURES / "notebook.png")


def main(names: list[str]) -> None:
    """Make some pictures, or all."""
    makers = {maker.__name__: maker for maker in (report, site, notebook)}
    with tempfile.TemporaryDirectory() as folder, page(Path(folder) / "home", "1300,1000") as browser:
        for name in names or makers:
            makers[name](browser, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])

"""What MkDocs does to the pages before it renders them.

Each executed notebook becomes a page, with its figures as files. A link to a notebook becomes a link to that page, and
one that leaves docs/ for anything else becomes the name of the file.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
_OUTSIDE = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+)([^)\s#]+)(#[^)\s]*)?\)")
_EXECUTED = "notebooks/executed/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the site, with a page for each executed notebook."""
    exporter = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    for path in sorted((ROOT / _EXECUTED).glob("*.ipynb")):
        text, made = exporter.from_filename(path, {"output_files_dir": f"{path.stem}_figures"})
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in made["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page's text with its links as the site has them."""
    # An executed notebook lies one folder deeper than its page does.
    here = _EXECUTED if page.file.src_uri.startswith("notebooks/") else "docs/"

    def linked(link: re.Match[str]) -> str:
        target = posixpath.normpath(here + link[2] + link[3])
        folder = posixpath.dirname(page.file.src_uri) or "."
        if target.startswith(_EXECUTED):
            name = f"notebooks/{Path(target).stem}.md"
        elif target.startswith("docs/") and target.endswith(".md"):
            name = target.removeprefix("docs/")
        else:
            return f"{link[1]} (`{target}`)"
        return f"[{link[1]}]({posixpath.relpath(name, folder)}{link[4] or ''})"

    return _OUTSIDE.sub(linked, markdown)

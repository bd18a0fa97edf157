"""What papermill leaves to do for notebooks that are committed and compared, and where a notebook reads and writes.

A notebook is run by a stage of the pipeline, or by a person (in Lab, by papermill or by nbval). Only the pipeline
writes what is committed or read by other stages. A person's run writes to ``artifacts/scratch``, and makes for itself
what an earlier stage would have left and hasn't.

An executed notebook keeps no run times, no progress bars, no remarks on how a run goes and no version of Python, so
that two runs on one machine write the same file and nbval compares only results. It names the processor, since what is
measured of quantized activations differs a little from one to another.
"""

import html
import os
import platform
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partialmethod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from thermo_lib.extras import needs
from thermo_lib.files.reading import MOST_BYTES, field_of, read_object, read_text, shown
from thermo_lib.files.whole import replacing

if TYPE_CHECKING:
    import nbformat

Found = TypeVar("Found")

ROOT = Path(__file__).resolve().parent.parent
THREADS = 2
_SCRATCH = Path("artifacts", "scratch")
_ASIDE = {"thermo_lib": "aside"}  # metadata of an output

# The instruction set decides the last bits of a float32 sum. One that every x86-64 server has since 2015 keeps the
# numbers of a notebook equal from CPU to CPU; each library reads its variable at its first use.
_PORTABLE = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def reproducible() -> None:
    """Make this process's results independent of the CPU model, as far as the libraries allow.

    Call it before any other work of torch; the first cell of every notebook does.
    """
    import torch  # not for ``tidy``, which every stage of the pipeline calls

    os.environ.update(_PORTABLE)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    deterministic: Any = torch.utils.deterministic  # a module, to which torch adds a property
    # Nothing reads it, and to fill it takes a tenth of the time.
    deterministic.fill_uninitialized_memory = False


class _Bars:
    """A file for progress bars that shows the last one as an output of the cell, which the next one replaces."""

    encoding = "utf-8"  # so that bars are drawn with blocks

    def __init__(self, shell: Any):
        self._shell, self._cell, self._output = shell, None, None

    def write(self, text: str) -> None:
        if not text.strip("\r\n\x1b[A"):  # moves the cursor only
            return
        if self._cell != self._shell.execution_count:
            self._cell, self._output = self._shell.execution_count, None
        bar = text.strip()
        shown = {"text/plain": bar, "text/html": f"<pre>{html.escape(bar)}</pre>" if bar else ""}
        if self._output is not None:
            self._output.update(shown, raw=True, metadata=_ASIDE)
        elif bar:
            display = needs("IPython.display").display
            self._output = display(shown, raw=True, metadata=_ASIDE, display_id=True)

    def flush(self) -> None:
        """Nothing waits."""


def _in_a_line(shell: Any, kind: type[BaseException], error: Any, trace: Any, tb_offset: int | None = None) -> None:
    error._render_traceback_ = lambda: [f"{kind.__name__}: {error}"]  # what IPython asks an error for
    shell.showtraceback((kind, error, trace))
    del error._render_traceback_


def readable() -> None:
    """Let a notebook show what a person reads: an error or a warning in a line, a bar that the next one replaces.

    A ValueError or OSError says what is wrong with a value or a file; the calls that led there are shown by ``%tb``.
    Every notebook calls it before it computes anything.
    """
    shell = needs("IPython").get_ipython()
    if shell is None:
        return
    from tqdm import tqdm

    shell.set_custom_exc((ValueError, OSError), _in_a_line)
    warnings.showwarning = lambda message, *_, **__: aside(f"Warning: {message}")
    bars: Any = tqdm
    bars.__init__ = partialmethod(bars.__init__, file=_Bars(shell))


def _each(name: str, value: Any, allowed: str) -> list[Any]:
    found = value if isinstance(value, list) else [value]
    if not found:
        raise ValueError(f"{name}: found none, allowed are {allowed}")
    return found


def whole(least: int, most: int | None = None, /, **parameters: Any) -> None:
    """Refuse parameters of a notebook that aren't whole numbers from ``least`` on, or lists of such.

    Raises:
        ValueError: the first that isn't; names it, what was found and what is allowed.
    """
    allowed = f"whole numbers from {least}" + ("" if most is None else f" to {most}")
    for name, value in parameters.items():
        for one in _each(name, value, allowed):
            if type(one) is not int or one < least or (most is not None and one > most):
                raise ValueError(f"{name}: found {one!r:.80}, allowed are {allowed}")


def among(choices: Sequence[Any], /, **parameters: Any) -> None:
    """Refuse parameters of a notebook that aren't one of some values, or lists of such; see ``whole``."""
    allowed = ", ".join(map(repr, choices))
    for name, value in parameters.items():
        for one in _each(name, value, allowed):
            if isinstance(one, bool) or one not in choices:
                raise ValueError(f"{name}: found {one!r:.80}, allowed are {allowed}")


def aside(text: str) -> None:
    """Say how a run goes, in Markdown: an executed copy doesn't keep it, and nbval doesn't compare it."""
    if needs("IPython").get_ipython() is None:
        print(text)
    else:
        needs("IPython.display").display({"text/markdown": text, "text/plain": text}, raw=True, metadata=_ASIDE)


def is_aside(output: Mapping[str, Any]) -> bool:
    """Whether an output of a cell says how a run goes: a progress bar, or what ``aside`` has shown."""
    return output.get("metadata", {}).get("thermo_lib") == "aside"


def in_pipeline() -> bool:
    """Whether a stage of the pipeline runs this notebook: DVC tells each command of a stage the stage's name."""
    return bool(os.environ.get("DVC_STAGE"))


def results(root: Path = ROOT) -> Path:
    """Below which folder this run's results go: the checkout's in the pipeline, else ``artifacts/scratch`` in it.

    A result has the same path in both, e.g. ``results() / "artifacts" / "int2.json"``.
    """
    return root if in_pipeline() else root / _SCRATCH


def earlier(
    name: str, read: Callable[[Path], Found], make: Callable[[], Found], how: str = "computed", *, root: Path = ROOT
) -> Found:
    """What an earlier stage left in ``artifacts``; where it isn't there, the same from elsewhere, which a line says.

    A person's run takes what another one of theirs has left in ``artifacts/scratch`` before it makes anything.

    Args:
        name: of the file or folder in ``artifacts``.
        read: reads it.
        make: computes it, or takes it from a file that is committed; the pipeline never calls it.
        how: what ``make`` does, for the message.
        root: the checkout.

    Raises:
        ValueError: it isn't there, in the pipeline.
    """
    path = root / "artifacts" / name
    if path.exists():
        return read(path)
    if in_pipeline():
        raise ValueError(f"artifacts/{name}: found none, needed is what an earlier stage of the pipeline writes")
    own = results(root) / "artifacts" / name
    if own.exists():
        aside(f"`artifacts/{name}` isn't there: `{own.relative_to(root)}` of an earlier run is used.")
        return read(own)
    aside(f"`artifacts/{name}` isn't there (`make repro` writes it): {how} for this run.")
    return make()


def processor() -> str:
    """The model of this machine's processor, e.g. ``GenuineIntel 6 143``: what decides which code the libraries run."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    keys = "vendor_id", "cpu family", "model", "CPU implementer", "CPU part"  # of x86-64 and of aarch64
    found = (re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE) for key in keys)
    return " ".join(match[1] for match in found if match) or platform.machine()


def _results_of(outputs: "list[nbformat.NotebookNode]") -> "list[nbformat.NotebookNode]":
    """The outputs without stderr and asides; text that was printed in one go in one piece (a kernel sends chunks)."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        is_stream = output.output_type == "stream"
        if is_aside(output) or (is_stream and output.name == "stderr"):
            continue
        if is_stream and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def _lasting(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What of a cell's metadata a run doesn't change: tags, and whether Jupyter hides the code until a click."""
    kept = {key: value for key, value in metadata.items() if key == "tags"}
    jupyter = metadata.get("jupyter")
    is_folded = isinstance(jupyter, dict) and jupyter.get("source_hidden") is True
    return kept | ({"jupyter": {"source_hidden": True}} if is_folded else {})


def _read_notebook(path: Path, nbformat: ModuleType) -> "nbformat.NotebookNode":
    content, where = read_object(path, MOST_BYTES), shown(path)
    for name, kind in (("nbformat", int), ("nbformat_minor", int), ("metadata", dict), ("cells", list)):
        field_of(content, name, kind, where)
    if content["nbformat"] != 4:
        raise ValueError(f"{where}: nbformat: found {content['nbformat']}, allowed is 4")
    for number, cell in enumerate(content["cells"]):
        field_of(cell, "cell_type", str, f"{where}: cell {number}")
    try:
        nbformat.validate(content)
    except (nbformat.ValidationError, AttributeError, KeyError, TypeError) as error:  # the last three of its own making
        place = ".".join(map(str, getattr(error, "absolute_path", ()))) or "cells"
        reason = str(getattr(error, "message", error)).partition("\n")[0]
        raise ValueError(f"{where}: {place}: found no notebook of format 4 ({reason:.120})") from None
    return nbformat.reads(read_text(path), as_version=4)


def tidy(path: str | Path) -> None:
    """Remove run times, progress bars and asides from a notebook that papermill has executed here, in place.

    Of a cell's metadata its tags stay, and whether its code is folded.

    Raises:
        ValueError: no such file, no notebook of format 4, or one that holds the output of an error.
    """
    nbformat = needs("nbformat")  # takes longer to import than all else here, and every notebook imports this module

    path = Path(path)
    notebook = _read_notebook(path, nbformat)
    if "papermill" in notebook.metadata:
        notebook.metadata["processor"] = processor()
    for key in set(notebook.metadata) - {"kernelspec", "language_info", "processor"}:
        del notebook.metadata[key]
    notebook.metadata.get("language_info", {}).pop("version", None)  # of Python, to its last digit
    for number, cell in enumerate(notebook.cells):
        cell.metadata = nbformat.from_dict(_lasting(cell.metadata))
        if "id" in cell:
            cell.id = f"cell-{number:02d}"
        if cell.cell_type != "code":
            continue
        if any(output.output_type == "error" for output in cell.outputs):
            raise ValueError(f"{path}: cell {number} holds the output of an error")
        cell.outputs = _results_of(cell.outputs)
    with replacing(path) as new:
        nbformat.write(notebook, new)

"""nbval compares what a notebook printed, not its progress bars and warnings on stderr."""

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    """Leave stderr out of the comparison of every notebook cell."""
    notebook = item.parent
    if hasattr(notebook, "skip_compare") and "stderr" not in notebook.skip_compare:
        notebook.skip_compare = (*notebook.skip_compare, "stderr")

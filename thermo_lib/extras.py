"""What comes with an extra of the package only."""

import importlib
from types import ModuleType

EXTRAS = {
    "IPython": "pipeline",
    "cuda": "cuda",
    "distributed": "cluster",
    "humming": "cuda",
    "ipywidgets": "pipeline",
    "lm_eval": "eval",
    "matplotlib": "pipeline",
    "nbformat": "pipeline",
    "pandas": "pipeline",
    "triton": "cuda",
    "yaml": "pipeline",
}


def needs(module: str) -> ModuleType:
    """Import a module of an extra.

    Raises:
        ImportError: it isn't installed; says which ``pip install`` brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = (error.name or module).partition(".")[0]
        if name != module.partition(".")[0]:
            raise
        bring = f'pip install "thermo_lib[{EXTRAS[name]}]"'
        raise ImportError(f"{name}: found none, needed for this; `{bring}` brings it") from None

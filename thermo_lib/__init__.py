"""Low-bit quantization of diffusion language models, with time-aware parameters and boundary smoothing.

A public name is imported when it is first used, so that ``import thermo_lib`` and the commands' help don't wait for the
models of ``transformers``.
"""

import importlib
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thermo_lib.data.corpus import load_corpus
    from thermo_lib.diffusion.path_kl import path_kl
    from thermo_lib.diffusion.sampling import generate
    from thermo_lib.diffusion.states import Calibration, calibrate
    from thermo_lib.evaluation.scores import build_suite, evaluate, evaluate_jsonl
    from thermo_lib.evaluation.summary import validate
    from thermo_lib.models.lm import load_model
    from thermo_lib.models.loaded import as_lm
    from thermo_lib.notebooks import reproducible
    from thermo_lib.pipeline.compiled import compile
    from thermo_lib.pipeline.config import ThermoConfig
    from thermo_lib.pipeline.parts import (
        GPTQ,
        Blocks,
        Dynamic,
        LeastSquares,
        PathKL,
        RoundToNearest,
        Sequential,
        Static,
        TimeGrouping,
        TimeNorms,
        Trellis,
    )
    from thermo_lib.pipeline.quantize import quantize
    from thermo_lib.pipeline.storage import load_quantized, save_quantized
    from thermo_lib.pipeline.streaming import quantize_checkpoint
    from thermo_lib.pipeline.training import optimize_transitions, train_time_norms
    from thermo_lib.quant.backends import backend, set_backend
    from thermo_lib.quant.planes import compile_linears
    from thermo_lib.time_aware.groups import TimeGroupParams, TimeGroups
    from thermo_lib.time_aware.markov import markov_report
    from thermo_lib.time_aware.smoothing import BoundarySmoother

_MODULES = {
    "Blocks": "pipeline.parts",
    "BoundarySmoother": "time_aware.smoothing",
    "Calibration": "diffusion.states",
    "Dynamic": "pipeline.parts",
    "GPTQ": "pipeline.parts",
    "LeastSquares": "pipeline.parts",
    "PathKL": "pipeline.parts",
    "RoundToNearest": "pipeline.parts",
    "Sequential": "pipeline.parts",
    "Static": "pipeline.parts",
    "ThermoConfig": "pipeline.config",
    "TimeGroupParams": "time_aware.groups",
    "TimeGrouping": "pipeline.parts",
    "TimeGroups": "time_aware.groups",
    "TimeNorms": "pipeline.parts",
    "Trellis": "pipeline.parts",
    "as_lm": "models.loaded",
    "backend": "quant.backends",
    "build_suite": "evaluation.scores",
    "calibrate": "diffusion.states",
    "compile": "pipeline.compiled",
    "compile_linears": "quant.planes",
    "evaluate": "evaluation.scores",
    "evaluate_jsonl": "evaluation.scores",
    "generate": "diffusion.sampling",
    "load_corpus": "data.corpus",
    "load_model": "models.lm",
    "load_quantized": "pipeline.storage",
    "markov_report": "time_aware.markov",
    "optimize_transitions": "pipeline.training",
    "path_kl": "diffusion.path_kl",
    "quantize": "pipeline.quantize",
    "quantize_checkpoint": "pipeline.streaming",
    "reproducible": "notebooks",
    "save_quantized": "pipeline.storage",
    "set_backend": "quant.backends",
    "train_time_norms": "pipeline.training",
    "validate": "evaluation.summary",
}

__all__ = [
    "GPTQ",
    "Blocks",
    "BoundarySmoother",
    "Calibration",
    "Dynamic",
    "LeastSquares",
    "PathKL",
    "RoundToNearest",
    "Sequential",
    "Static",
    "ThermoConfig",
    "TimeGroupParams",
    "TimeGrouping",
    "TimeGroups",
    "TimeNorms",
    "Trellis",
    "as_lm",
    "backend",
    "build_suite",
    "calibrate",
    "compile",
    "compile_linears",
    "evaluate",
    "evaluate_jsonl",
    "generate",
    "load_corpus",
    "load_model",
    "load_quantized",
    "markov_report",
    "optimize_transitions",
    "path_kl",
    "quantize",
    "quantize_checkpoint",
    "reproducible",
    "save_quantized",
    "set_backend",
    "train_time_norms",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    if name == "ThermoConfig":  # a model of transformers may be quantized with it
        importlib.import_module(f"{__name__}.integrations.auto").register_models()
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# While Python looks for what ``python -m`` runs, sys.argv[0] is "-m". This package's own commands need no registration,
# so that help doesn't wait for transformers; a program of another package gets it.
_COMMAND = ("-m", __name__) in ((flag, module.partition(".")[0]) for flag, module in pairwise(sys.orig_argv))
if sys.argv[:1] != ["-m"] or not _COMMAND:
    from thermo_lib.integrations.auto import register_configurations

    register_configurations()

"""Low-bit quantization of diffusion language models, with time-aware parameters and boundary smoothing."""

import sys
from itertools import pairwise

# While Python looks for what ``python -m`` runs, sys.argv[0] is "-m". This package's own commands import what they need
# themselves, so that help doesn't wait for torch; a program of another package gets all of it.
_COMMAND = ("-m", __name__) in ((flag, module.partition(".")[0]) for flag, module in pairwise(sys.orig_argv))
if sys.argv[:1] != ["-m"] or not _COMMAND:
    from thermo_lib.data.corpus import load_corpus
    from thermo_lib.diffusion.path_kl import path_kl
    from thermo_lib.diffusion.sampling import generate
    from thermo_lib.diffusion.states import Calibration, calibrate
    from thermo_lib.evaluation.scores import build_suite, evaluate, evaluate_jsonl
    from thermo_lib.evaluation.summary import validate
    from thermo_lib.integrations.transformers import register as register_with_transformers
    from thermo_lib.models.lm import load_model
    from thermo_lib.notebooks import reproducible
    from thermo_lib.pipeline.config import ThermoConfig
    from thermo_lib.pipeline.quantize import quantize
    from thermo_lib.pipeline.storage import load_quantized, save_quantized
    from thermo_lib.pipeline.streaming import quantize_checkpoint
    from thermo_lib.pipeline.training import optimize_transitions
    from thermo_lib.quant.planes import compile_linears
    from thermo_lib.time_aware.groups import TimeGroupParams, TimeGroups
    from thermo_lib.time_aware.markov import markov_report
    from thermo_lib.time_aware.smoothing import BoundarySmoother

    register_with_transformers()

__all__ = [
    "BoundarySmoother",
    "Calibration",
    "ThermoConfig",
    "TimeGroupParams",
    "TimeGroups",
    "build_suite",
    "calibrate",
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
    "validate",
]

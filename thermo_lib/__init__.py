"""Low-bit quantization of diffusion language models, with time-aware parameters and boundary smoothing."""

from thermo_lib.calibration import Calibration, calibrate
from thermo_lib.config import ThermoConfig
from thermo_lib.data import load_corpus
from thermo_lib.diffusion import generate
from thermo_lib.evaluation import build_suite, evaluate, evaluate_jsonl, validate
from thermo_lib.integration import register as register_with_transformers
from thermo_lib.models import load_model
from thermo_lib.notebooks import reproducible
from thermo_lib.planes import compile_linears
from thermo_lib.quantized_model import load_quantized, optimize_transitions, quantize, save_quantized
from thermo_lib.streaming import quantize_checkpoint
from thermo_lib.time_aware import BoundarySmoother, TimeGroupParams, TimeGroups, markov_report
from thermo_lib.transition import path_kl

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

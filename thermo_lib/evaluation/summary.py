"""What a model's scores come to: a row of the report, and a short validation."""

from dataclasses import dataclass
from typing import Any

import torch

from thermo_lib.diffusion.path_kl import path_kl
from thermo_lib.evaluation.scores import Evaluation, Suite, accuracy_interval, path_kl_interval
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.model import QuantizedLM, linear_names
from thermo_lib.time_aware.markov import MarkovReport, markov_report


def markov(lm: QuantizedLM) -> MarkovReport | None:
    """Markov smoothness of a model's time-dependent parameters after smoothing; None where nothing depends on time."""
    params = lm.smoothed_params()
    if not params:
        return None
    bits = lm.config.bit_width if lm.config.activations is None else lm.config.activation_bits
    return markov_report(params, lm.config.groups.boundaries, bits)


def stored_bits(lm: DiffusionLM) -> float:
    """Bits that store a weight of the linears in blocks, with all parameters of codes.

    Returns:
        What a quantized model says; else 16 where every weight is a number of bfloat16 or every one is of float16, as
        those of a checkpoint in these types are after loading, and 32 otherwise.
    """
    if isinstance(lm, QuantizedLM):
        return lm.bits_per_weight
    weights = [lm.model.get_parameter(f"{name}.weight") for name in linear_names(lm.model)]
    loaded = [weight for weight in weights if not weight.is_meta]
    types = (torch.bfloat16, torch.float16)
    return 16.0 if any(all(bool((w.to(t) == w).all()) for w in loaded) for t in types) else 32.0


def summarize(name: str, lm: DiffusionLM, evaluation: Evaluation) -> dict[str, Any]:
    """One configuration's row of the report: settings, bits per weight and scores with intervals."""
    quantized = lm if isinstance(lm, QuantizedLM) else None
    config = quantized.config if quantized else None
    bits = stored_bits(lm)
    smoothness = markov(quantized) if quantized else None
    return {
        "name": name,
        "bits": config.bit_width if config else int(bits),
        "activation_bits": config.activation_bits if config else 16,
        "activation_ranges": config.activations.ranges if config and config.activations else None,
        "quantizer": config.quantizer if config else None,
        "group_size": config.group_size if config else None,
        "num_time_groups": config.num_time_groups if config else None,
        "smoothing_method": config.smoothing_method if config else None,
        "smoothing_window": config.smoothing_window if config else None,
        "bits_per_weight": bits,
        "accuracy": evaluation.accuracy,
        "accuracy_ci": list(accuracy_interval(evaluation)),
        "accuracy_per_timestep": evaluation.accuracy_per_timestep.tolist(),
        "nelbo": evaluation.nelbo,
        "path_kl": evaluation.path.total,
        "path_kl_ci": list(path_kl_interval(evaluation.path, evaluation.resamples)),
        "path_kl_per_timestep": evaluation.path.per_timestep.tolist(),
        "markov_score": smoothness.score if smoothness else None,
        "markov_score_all_steps": smoothness.score_all_steps if smoothness else None,
        "max_jump": smoothness.max_jump if smoothness else None,
        "mean_jump": smoothness.mean_jump if smoothness else None,
        "violations": len(smoothness.violations) if smoothness else None,
        "cosine_similarity": evaluation.path.mean_cosine,
        "sudoku_solved": evaluation.puzzles.accuracy if evaluation.puzzles else None,
    }


@dataclass(frozen=True)
class ValidationReport:
    """How close a quantized model is to the full-precision one, and how smooth its parameters are over time.

    Attributes:
        cosine_similarity: of the two models' outputs at masked positions, -1 to 1.
        path_kl: nats per sequence.
        markov_smoothness_score: 0-1; 1 where no parameter depends on the timestep.
        markov: the details, None where no parameter depends on the timestep.
    """

    cosine_similarity: float
    path_kl: float
    markov_smoothness_score: float
    markov: MarkovReport | None


def validate(lm: QuantizedLM, suite: Suite, *, progress: bool = False) -> ValidationReport:
    """Compare a quantized model with the suite's reference, without text or puzzles."""
    path = path_kl(
        suite.reference,
        lm,
        suite.trajectories,
        suite.timesteps,
        reference_outputs=suite.reference_outputs,
        progress="path KL" if progress else None,
    )
    smoothness = markov(lm)
    return ValidationReport(path.mean_cosine, path.total, smoothness.score if smoothness else 1.0, smoothness)

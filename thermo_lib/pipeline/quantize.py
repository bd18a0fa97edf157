"""Quantize a diffusion language model: the phases in their order."""

import copy
from pathlib import Path

import torch

from thermo_lib.diffusion.states import Calibration
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.activations import quantize_activations, resmooth
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import QuantizedLM
from thermo_lib.pipeline.training import (
    fresh_states,
    optimize_transitions,
    quantize_sequentially,
    reconstruct_blocks,
    training_snapshot,
)
from thermo_lib.pipeline.weights import code_tables, quantize_weights


def quantize(
    lm: DiffusionLM,
    config: ThermoConfig,
    calibration: Calibration | None = None,
    *,
    resume: str | Path | None = None,
    progress: bool = False,
) -> QuantizedLM:
    """Quantize a full-precision model into a new one; the given model stays as it is.

    Args:
        lm: the full-precision model.
        config: how to quantize.
        calibration: states to fit on; needed by ``gptq``, ``trellis``, time groups and static activation ranges.
        resume: folder where training (reconstruction and transitions) keeps snapshots; the same call goes on from
            them, with the same result. They stay when it is done.
        progress: show bars.

    Raises:
        ValueError: the model is quantized already or not on the CPU, the configuration needs calibration and there is
            none, a weight holds NaN or infinity, or ``resume`` has a snapshot of another run.
    """
    if config.needs_calibration and calibration is None:
        raise ValueError(
            f"calibration: found None, required by quantizer={config.quantizer!r}, "
            f"num_time_groups={config.num_time_groups}, activation_bits={config.activation_bits} "
            f"({config.activation_ranges}); without it use rtn or least_squares at activation_bits=16"
        )
    if isinstance(lm, QuantizedLM):
        raise ValueError(f"lm: found a model quantized to {lm.config.precision}, expected a full-precision one")
    if lm.model.device.type != "cpu":
        raise ValueError(f"lm: found a model on {lm.model.device}, allowed is cpu; what is quantized can be moved")
    sequential = config.reconstruction == "sequential"
    untrained = {**config.model_dump(), "transitions": "none"} | ({} if sequential else {"reconstruction": "none"})
    # Weights are fitted without smoothing, which then starts from the groups' original parameters.
    rough = ThermoConfig(**{**untrained, "enable_boundary_smoothing": False})
    quantized = QuantizedLM(
        copy.deepcopy(lm.model),
        lm.tokenizer,
        lm.mask_token_id,
        lm.name,
        rough,
        chat_template=lm.chat_template,
        carried=lm.carried,
    )
    with torch.no_grad():
        if sequential:
            fresh = config.training_states == "chains"
            states = fresh_states(lm, "sequential", config.timesteps, progress) if fresh else calibration
            snapshot = training_snapshot(resume, "sequential", config, lm, calibration)
            quantize_sequentially(quantized, lm, states, snapshot, progress)
        else:
            quantize_weights(quantized, calibration, progress)
        if config.activation_bits < 16:
            quantized.config = ThermoConfig(**untrained)
            quantize_activations(quantized, lm, calibration, progress)
        elif config.method:
            quantized = resmooth(quantized, config.method)
    how = {"states": config.training_states, "resume": resume, "progress": progress}
    if config.reconstruction == "blocks":
        quantized = reconstruct_blocks(quantized, lm, calibration, **how)
    if config.transitions != "none":
        quantized = optimize_transitions(quantized, lm, calibration, what=config.transitions, **how)
    code_tables(quantized)
    return quantized

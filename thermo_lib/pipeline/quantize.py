"""Quantize a diffusion language model: the phases in their order."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from thermo_lib.diffusion.prompts import Prompts
from thermo_lib.diffusion.states import Calibration
from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.models.loaded import as_lm
from thermo_lib.models.streamed import HostEmbedding
from thermo_lib.pipeline.activations import quantize_activations, resmooth
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import QuantizedLM, coded_tables, norm_names
from thermo_lib.pipeline.parts import Sequential
from thermo_lib.pipeline.phases import PhaseRun, alone_in_resume, check_trainable, weights_snapshot
from thermo_lib.pipeline.presets import DEFAULT
from thermo_lib.pipeline.training import (
    optimize_transitions,
    quantize_sequentially,
    reconstruct_blocks,
    train_time_norms,
)
from thermo_lib.pipeline.weights import code_tables, quantize_weights


@alone_in_resume
def quantize(
    lm: DiffusionLM | MaskPredictor,
    config: ThermoConfig | str = DEFAULT,
    calibration: Calibration | None = None,
    *,
    prompts: Sequence[Prompts] | None = None,
    resume: str | Path | None = None,
    progress: bool = False,
) -> QuantizedLM:
    """Quantize a full-precision model into a new one; the given model stays as it is.

    Args:
        lm: the full-precision model, also one of ``transformers``' Auto classes; all work is done on its device.
        config: how to quantize, or the name of a preset such as ``"best"``.
        calibration: states to fit on, see ``calibrate``; needed by all but data-free weights.
        prompts: what fresh training states start from; by default what the calibration states do.
        resume: folder where finished blocks and training keep snapshots; the same call goes on from them, with the same
            result. They stay when it is done.
        progress: show bars.

    Raises:
        ValueError: an unknown preset, a model that is quantized already, a configuration that needs calibration and
            there is none, a weight with NaN or infinity, or ``resume`` has a snapshot of another run or another run is
            there.
    """
    lm, config = as_lm(lm), ThermoConfig.preset(config) if isinstance(config, str) else config
    _check(lm, config, calibration)
    # Weights are fitted without smoothing, which then starts from the groups' original parameters.
    quantized = QuantizedLM(
        copy.deepcopy(lm.model),
        lm.tokenizer,
        lm.mask_token_id,
        lm.name,
        config.replace(training=(), enable_boundary_smoothing=False),
        chat_template=lm.chat_template,
        carried=lm.carried,
    )
    sequential = config.phase("sequential")
    how: dict[str, Any] = {"prompts": prompts, "resume": resume, "progress": progress}
    with torch.no_grad():
        if isinstance(sequential, Sequential):
            run = PhaseRun.of(sequential, config, lm, calibration, name="sequential", **how)
            quantize_sequentially(quantized, run)
        else:
            snapshot = None if resume is None else weights_snapshot(lm, config, calibration, resume)
            quantize_weights(quantized, calibration, snapshot, progress)
        quantized.config = config.replace(training=() if sequential is None else (sequential,))
        if config.activations is not None:
            quantize_activations(quantized, lm, calibration, progress)
        elif config.time_groups is not None:
            quantized = resmooth(quantized, config.smoothing_method, config.smoothing_window)
    train: dict[str, Callable[..., QuantizedLM]] = {
        "blocks": reconstruct_blocks,
        "path_kl": optimize_transitions,
        "time_norms": train_time_norms,
    }
    for phase in config.training:
        if phase.phase in train:
            settings = phase.model_dump(exclude={"phase"})
            quantized = train[phase.phase](quantized, lm, calibration, in_place=True, **how, **settings)
    code_tables(quantized)
    quantized.set_timestep(0, config.timesteps)
    return quantized


def _check(lm: DiffusionLM, config: ThermoConfig, calibration: Calibration | None) -> None:
    """Raise ValueError before any work where the model or what it needs isn't right."""
    if isinstance(lm, QuantizedLM):
        raise ValueError(f"lm: found a model quantized to {lm.config.precision}, expected a full-precision one")
    if lm.device.type == "meta":
        raise ValueError("lm: found a model on meta, without weights, allowed are cpu and GPUs")
    devices = {
        str(t.device) for m in lm.model.modules() if not isinstance(m, HostEmbedding) for t in m.parameters(False)
    }
    if len(devices - {"meta"}) > 1:  # blocks that are read when they run are on meta
        raise ValueError(f"lm: found a model split over {', '.join(sorted(devices))}, allowed is one device")
    coded_tables(lm.model, config)  # which refuses those that can't be coded
    if config.training or getattr(config.activations, "fit_to", None) == "path_kl":
        check_trainable(lm)
    if config.time_norms is not None:
        norm_names(lm.model)  # refuses kinds that aren't known
    if config.needs_calibration and calibration is None:
        raise ValueError(
            f"calibration: found None, required by {config.needs_calibration}; calibrate(lm) makes it, and the "
            "preset 'fast' needs none"
        )
    if calibration is not None:
        calibration.check_vocabulary(lm.model.config.vocab_size)

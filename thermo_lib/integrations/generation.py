"""``generate`` and ``diffusion_generate`` of the models, as ``transformers`` and the published models have them.

``diffusion_generate`` has the arguments of Dream's published method (arXiv 2508.15487), ``generate`` the usual ones of
``transformers``, and those of the published functions of LLaDA (arXiv 2502.09992) and Fast-dLLM v2 (arXiv 2509.26328).
Both append masks to a prompt and let
``thermo_lib.generate`` fill them. ``integrations.transformers.register`` makes them methods of ``MaskPredictor``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils.generic import ModelOutput

from thermo_lib.diffusion import sampling
from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.models.loaded import as_lm

Settings = Mapping[str, Any]

_NEW_TOKENS = 20  # where nobody says how many; as in transformers
_DREAM = {"alg": "origin", "steps": 512}  # the defaults of Dream's published method
_ALIASES = {
    "gen_length": "max_new_tokens",
    "remasking": "alg",
    "mask_id": "mask_token_id",
    "input_ids": "inputs",
    "block_size": "block_length",
}
_TOKENS = ("max_new_tokens", "max_length")
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
_SAMPLING = ("top_p", "top_k", "alg_temp", "eps", "block_length", "threshold", *_SUPPRESSED)
_HOOKS = {"generation_tokens_hook_func": "on_tokens", "generation_logits_hook_func": "on_logits"}
_SETTINGS = (
    *_TOKENS,
    *("steps", "alg", "do_sample", "temperature"),
    *_SAMPLING,
    *("num_return_sequences", "seed", "output_history", "return_dict_in_generate"),
)
_ARGUMENTS = ("attention_mask", "mask_token_id", *_SETTINGS, *_HOOKS)
# What a causal model's generation is told and this one isn't: the value that asks for nothing.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    "cfg_scale": 0.0,
}
_WITHOUT_EFFECT = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")


@dataclass
class DiffusionOutput(ModelOutput):
    """What is returned with ``return_dict_in_generate=True``.

    Attributes:
        sequences: int64 ``(batch, length)``, prompts and what was filled in after them.
        history: with ``output_history=True`` the same after each step, the last being ``sequences``.
    """

    sequences: Tensor | None = None
    history: tuple[Tensor, ...] | None = None


def generate(
    model: MaskPredictor,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    **options: Any,
) -> Tensor | DiffusionOutput:
    """Append masks to prompts and fill them.

    A setting is taken from the arguments, else from ``generation_config``, else from the model's own
    ``generation_config.json``, else it has the default that is named here.

    Args:
        model: the model.
        inputs: prompts, integers ``(batch, length)``, on any device; also called ``input_ids``. Masks in them are
            filled too.
        generation_config: settings by the names below.
        options: settings, and what follows them.

            - ``max_new_tokens`` (20), or ``max_length`` with the prompt; LLaDA's ``gen_length``.
            - ``steps``: of denoising; as many as new tokens.
            - ``alg`` (``entropy``, with a ``threshold`` ``low_confidence``): which positions first, see ``sampler`` of
              ``thermo_lib.generate``; LLaDA's ``remasking``.
            - ``do_sample``, ``temperature``: True draws tokens at ``temperature`` (1), False takes the likeliest, and
              without it ``temperature`` (0) says it, 0 being the likeliest.
            - ``top_p``, ``top_k`` (0 for none), ``alg_temp``, ``eps``, ``block_length``, ``threshold``,
              ``suppress_tokens``, ``begin_suppress_tokens``: as for ``thermo_lib.generate``. Fast-dLLM's ``block_size``
              is ``block_length``; its ``small_block_size``, a part of a block that is filled first, may only be that.
            - ``num_return_sequences`` (1): texts for each prompt.
            - ``seed``: of what is drawn; by default one that torch's generator draws, which ``torch.manual_seed`` sets.
            - ``return_dict_in_generate``, ``output_history``: see ``DiffusionOutput``.
            - ``attention_mask``: bool or 0 and 1, ``(batch, length)``, 0 at padding, which is on the left.
            - ``generation_tokens_hook_func``, ``generation_logits_hook_func``: ``on_tokens`` and ``on_logits`` of
              ``thermo_lib.generate``.
            - ``mask_token_id``, LLaDA's ``mask_id``: may only be the model's.
            - ``use_cache`` and the ids of other special tokens, which change nothing. A text always has all its tokens,
              and what follows an end token is part of it. But a text of a block-causal model, unless ``block_length``
              is 0, stops at the first end token that is written, of those in its configuration and
              ``generation_config.json``, and all later tokens are that one.

    Returns:
        int64 ``(batch, length)`` on the device of ``inputs``, row by row the prompt and what was filled in; a
        ``DiffusionOutput`` if that was asked for.

    Raises:
        ValueError: an argument that has no meaning for a diffusion model, such as ``num_beams``, with another value
            than the one that asks for nothing, or what ``thermo_lib.generate`` raises.
    """
    return _generate(model, inputs, generation_config, options, {"alg": "entropy"})


def diffusion_generate(
    model: MaskPredictor,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    **options: Any,
) -> Tensor | DiffusionOutput:
    """``generate`` with the defaults of Dream's published method: ``alg="origin"``, ``steps=512``.

    Args:
        model: the model.
        inputs, generation_config, options: see ``generate``.

    Returns:
        What ``generate`` returns.

    Raises:
        ValueError: what ``generate`` raises.
    """
    return _generate(model, inputs, generation_config, options, _DREAM)


def _generate(
    model: MaskPredictor,
    inputs: Tensor | None,
    config: GenerationConfig | None,
    options: Settings,
    defaults: Settings,
) -> Tensor | DiffusionOutput:
    """``generate`` with other defaults."""
    options = _by_name(options, inputs)
    _check_small_blocks(options)
    inputs = options.pop("inputs", None)
    _check_prompts(inputs)
    mask_token_id = model.config.mask_token_id
    if options.get("mask_token_id", mask_token_id) != mask_token_id:
        raise ValueError(f"mask_token_id: found {options['mask_token_id']}, allowed is the model's, {mask_token_id}")
    given = [options, *([] if config is None else [_set(config)])]
    for settings in given:
        _check_neutral(settings)
    own = getattr(model, "generation_config", GenerationConfig())  # the encoders of transformers have none
    sources = [*given, _set(own)]
    if _first("threshold", sources, {}) is not None:
        defaults = {**defaults, "alg": None}
    found = {name: _first(name, sources, defaults) for name in _SETTINGS}
    count = _new_tokens(sources, inputs.shape[1])
    temperature, filters = _temperature(sources, len(given))
    how = {name: found[name] for name in _SAMPLING if found[name] is not None}
    if not filters or how.get("top_k") == 0:
        how.pop("top_k", None)
    if not filters:
        how.pop("top_p", None)
    wants_history, wants_dict = bool(found["output_history"]), bool(found["return_dict_in_generate"])
    if wants_history and not wants_dict:
        raise ValueError("output_history: found True, allowed is False, or return_dict_in_generate=True with it")
    copies = 1 if found["num_return_sequences"] is None else found["num_return_sequences"]
    if type(copies) is not int or copies < 1:
        raise ValueError(f"num_return_sequences: found {copies!r}, allowed are whole numbers from 1")
    visible = _extended(options.get("attention_mask"), inputs, count)
    ids = torch.nn.functional.pad(inputs, (0, count), value=mask_token_id)
    before: list[Tensor] = []
    hooks: dict[str, Any] = {theirs: options.get(name) for name, theirs in _HOOKS.items()}
    filled = sampling.generate(
        as_lm(model),
        ids.repeat_interleave(copies, 0),
        timesteps=count if found["steps"] is None else found["steps"],
        attention_mask=None if visible is None else visible.repeat_interleave(copies, 0),
        sampler=found["alg"],
        temperature=temperature,
        seed=int(torch.randint(2**31, ())) if found["seed"] is None else found["seed"],
        batch_size=max(1, copies * len(ids)),  # hooks see the whole batch
        on_state=(lambda _timestep, _rows, x: before.append(x.to(ids.device, copy=True))) if wants_history else None,
        **hooks,
        **how,
    )
    if not wants_dict:
        return filled
    return DiffusionOutput(sequences=filled, history=(*before[1:], filled) if wants_history else None)


def _by_name(options: Settings, inputs: Tensor | None) -> dict[str, Any]:
    """Arguments that aren't None, by their names here."""
    found = {} if inputs is None else {"inputs": inputs}
    for name, value in options.items():
        ours = _ALIASES.get(name, name)
        if value is None:
            continue
        if ours in found:
            raise ValueError(f"{name}: found it beside {ours}, allowed is one of them")
        found[ours] = value
    return found


def _check_small_blocks(options: dict[str, Any]) -> None:
    """Take out ``small_block_size``, which may only be what is filled together anyway."""
    small, block = options.pop("small_block_size", None), options.get("block_length")
    if small is not None and small != block:
        allowed = f"allowed is None, or block_size ({block!r:.80}): the positions of a block are filled together"
        raise ValueError(f"small_block_size: found {small!r:.80}, {allowed}")


def _check_prompts(inputs: Any) -> None:
    is_whole = isinstance(inputs, Tensor) and not (
        inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool
    )
    if not is_whole or inputs.ndim != 2:
        what = f"{inputs.dtype} of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        more = "; give a tokenizer's output as generate(**output)" if isinstance(inputs, Mapping) else ""
        raise ValueError(f"inputs: found {what}, allowed are integers (batch, length){more}")


def _set(config: GenerationConfig) -> dict[str, Any]:
    """What a configuration of ``transformers`` says."""
    return {name: value for name, value in vars(config).items() if value is not None and not name.startswith("_")}


def _check_neutral(settings: Settings) -> None:
    """Refuse what was asked for and can't be done."""
    for name, value in settings.items():
        if name in _ARGUMENTS or name in _WITHOUT_EFFECT or value is False:
            continue
        if name not in _NEUTRAL:
            raise ValueError(f"{name}: found {value!r:.80}, allowed is None; known are {', '.join(_ARGUMENTS)}")
        if value != _NEUTRAL[name]:
            why = "which asks for nothing: all positions are filled together, in steps"
            raise ValueError(f"{name}: found {value!r:.80}, allowed is {_NEUTRAL[name]}, {why}; see steps and alg")


def _first(name: str, sources: Sequence[Settings], defaults: Settings) -> Any:
    return next((source[name] for source in (*sources, defaults) if name in source), None)


def _new_tokens(sources: Sequence[Settings], known: int) -> int:
    """How many tokens are appended to prompts of ``known`` tokens."""
    said = next((source for source in sources if any(name in source for name in _TOKENS)), {})
    name = next((name for name in _TOKENS if name in said), None)
    count = _NEW_TOKENS if name is None else said[name]
    least = known + 1 if name == "max_length" else 1
    if type(count) is not int or count < least:
        raise ValueError(f"{name}: found {count!r}, allowed are whole numbers from {least}")
    return count - known if name == "max_length" else count


def _temperature(sources: Sequence[Settings], given: int) -> tuple[float, bool]:
    """The temperature, and whether ``top_p`` and ``top_k`` count.

    Args:
        sources: of settings, the first that says anything of it counts.
        given: number of those that the caller gave.
    """
    for number, source in enumerate(sources):
        samples, temperature = source.get("do_sample"), source.get("temperature")
        if samples is None:
            if temperature is None:
                continue
            return temperature, True
        if not samples:
            if temperature and number < given:
                raise ValueError(f"do_sample: found False with temperature={temperature!r}, allowed is True with it")
            return 0.0, False
        temperature = _first("temperature", sources[number:], {"temperature": 1.0})
        if temperature == 0:
            raise ValueError("temperature: found 0 with do_sample=True, allowed is above 0; do_sample=False is greedy")
        return temperature, True
    return 0.0, True


def _extended(attention_mask: Any, inputs: Tensor, count: int) -> Tensor | None:
    """The mask of prompts with as many tokens more; None where nothing is padded."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != inputs.shape:
        found = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask: found {found}, allowed is a tensor of shape {tuple(inputs.shape)}")
    return torch.nn.functional.pad(attention_mask.bool(), (0, count), value=True)

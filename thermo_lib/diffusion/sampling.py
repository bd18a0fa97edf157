"""Masked (absorbing-state) diffusion with the linear schedule of MDLM, LLaDA and Dream.

At timestep ``i`` of ``T`` a fraction ``t_i = 1 - i/T`` of the tokens is masked; one denoising step goes
from ``t_i`` to ``s_i = t_{i+1}`` (arXiv 2406.07524, section 3; arXiv 2502.09992, section 2). The samplers
are those of Dream (arXiv 2508.15487): ``origin`` is ancestral sampling of the reverse process, the next three
fill the positions first that the model is surest of; and of LLaDA (arXiv 2502.09992, section 2.4):
``low_confidence`` predicts all masked tokens and masks those again that it gave the least probability.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.models.lm import DiffusionLM, as_lm

SAMPLERS = ("origin", "maskgit_plus", "topk_margin", "entropy", "low_confidence")
LogitsHook = Callable[[int, Tensor, Tensor], Tensor]
TokensHook = Callable[[int | None, Tensor, Tensor | None], Tensor]


def mask_ratios(timesteps: int, eps: float = 0.0) -> Tensor:
    """``t_0 .. t_T`` of the linear schedule, float64 ``(timesteps + 1,)``, from 1 down to ``eps``.

    Raises:
        ValueError: no whole number of timesteps from 1, or ``eps`` out of range.
    """
    _check_count("timesteps", timesteps)
    if not (isinstance(eps, Real) and 0 <= eps < 1):
        raise ValueError(f"eps: found {eps!r}, allowed is at least 0 and below 1")
    return 1 - torch.arange(timesteps + 1, dtype=torch.float64) * (1 - eps) / timesteps


def unmask_probabilities(timesteps: int, eps: float = 0.0) -> Tensor:
    """``rho_i = 1 - s_i/t_i``, the chance of a masked token to be filled at step ``i``; float64 ``(timesteps,)``.

    The last step fills whatever is left, whatever ``eps``.
    """
    ratios = mask_ratios(timesteps, eps)
    rho = 1 - ratios[1:] / ratios[:-1]
    rho[-1] = 1
    return rho


def _check_count(name: str, found: Any) -> None:
    if not isinstance(found, Integral) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{name}: found {found!r}, allowed is at least 1, a whole number")


def mask_tokens(
    ids: Tensor, ratio: Tensor, mask_token_id: int, generator: torch.Generator, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The forward process: mask each allowed position independently with probability ``ratio``.

    Args:
        ids: int64 ``(batch, length)``.
        ratio: ``(batch,)`` in [0, 1].
        mask_token_id: id written at masked positions.
        generator: source of randomness, of the CPU: equal seeds give equal masks on every device.
        allowed: bool ``(batch, length)``, the positions that may be masked; all by default.

    Returns:
        ``(masked_ids, is_masked)``, both ``(batch, length)``.
    """
    drawn = torch.rand(ids.shape, generator=generator, dtype=torch.float32).to(ids.device)
    is_masked = drawn < ratio[:, None].to(ids.device)
    if allowed is not None:
        is_masked &= allowed
    return torch.where(is_masked, mask_token_id, ids), is_masked


def filter_logits(logits: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """Set logits outside the nucleus of mass ``top_p``, then those outside the ``top_k`` largest, to -inf.

    The nucleus is that of all tokens, as in Dream's sampling loop (arXiv 2508.15487).
    """
    if top_p is not None and top_p < 1:
        logits = logits.masked_fill(_outside_nucleus(logits.softmax(-1), top_p), -torch.inf)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return logits


_CACHED = 2**20  # logits
_LIKELY = 1024  # tokens among which a nucleus is looked for first


def _outside_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Which tokens come after those of mass ``top_p``, bool of the same shape; those as likely as the last are inside.

    A nucleus is small as a rule, and to sort a large vocabulary takes as long as a block of the model. On a CPU numbers
    are sorted alone, without their places, which takes a tenth of the time.
    """
    likeliest = probabilities.topk(min(_LIKELY, probabilities.shape[-1])).values
    if not (likeliest.sum(-1) > top_p).all():
        if probabilities.device.type == "cpu":
            likeliest = torch.from_numpy(np.sort(probabilities.numpy(), -1)).flip(-1)
        else:
            likeliest = probabilities.sort(-1, descending=True).values
    inside = (likeliest.cumsum(-1) - likeliest <= top_p).sum(-1, keepdim=True)
    return probabilities < likeliest.gather(-1, inside - 1)


def sample_tokens(
    logits: Tensor, temperature: float, uniform: Tensor, top_p: float | None = None, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token a row, by inverting the cumulative distribution.

    Args:
        logits: ``(n, vocabulary)``; what a hook made of them may be of less than float32.
        temperature: 0 takes the likeliest token.
        uniform: ``(n,)`` random numbers in [0, 1).
        top_p, top_k: nucleus and top-k filters; None for no filter.

    Returns:
        ``(tokens (n,) int64, probabilities (n, vocabulary))``, the probabilities after temperature and filters.

    Raises:
        ValueError: a row has no finite largest logit, so that it has no probabilities.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature > 0:
        logits = logits / temperature
    _check_choice(logits, temperature)
    probabilities = filter_logits(logits, top_p, top_k).float().softmax(-1)
    if temperature == 0:
        return probabilities.argmax(-1), probabilities
    cumulative = probabilities.double().cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    return drawn.clamp(max=logits.shape[-1] - 1), probabilities


def _check_choice(logits: Tensor, temperature: float) -> None:
    """Refuse rows without a distribution: softmax makes NaN of them, and a search in NaN finds the last token."""
    largest = logits.amax(-1)  # NaN if there is any
    if not largest.isfinite().all():
        found = largest[~largest.isfinite()][0].item()
        allowed = "allowed is a finite one, -inf only for tokens that are ruled out"
        raise ValueError(
            f"logits: found a row whose largest is {found} at temperature {temperature:g}, after on_logits; {allowed}"
        )


def confidence(sampler: str, tokens: Tensor, probabilities: Tensor) -> Tensor:
    """How sure the model is of each row, by the rule of the sampler; larger is surer. Shape ``(n,)``."""
    if sampler in ("maskgit_plus", "low_confidence"):
        return probabilities.gather(-1, tokens[:, None]).squeeze(-1)
    if sampler == "topk_margin":
        top = probabilities.topk(2).values
        return top[:, 0] - top[:, 1]
    return (probabilities * probabilities.clamp(min=1e-10).log()).sum(-1)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn, and which positions are filled first; the arguments of ``generate`` of these names.

    An ``alg_temp`` of None becomes 0, which is what it means in Dream's sampling loop.

    Raises:
        ValueError: unknown sampler or a value out of range.
    """

    sampler: str
    temperature: float
    top_p: float | None
    top_k: int | None
    alg_temp: float | None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler: found {self.sampler!r}, allowed are {', '.join(SAMPLERS)}")
        if self.alg_temp is None:
            object.__setattr__(self, "alg_temp", 0.0)  # frozen
        for name in ("temperature", "alg_temp"):
            found = getattr(self, name)
            if not (isinstance(found, Real) and math.isfinite(found) and found >= 0):
                raise ValueError(f"{name}: found {found!r}, allowed is at least 0 and finite")
        if self.top_p is not None and not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p: found {self.top_p!r}, allowed is above 0 and at most 1")
        if self.top_k is not None:
            _check_count("top_k", self.top_k)


def block_numbers(is_masked: Tensor, block_length: int | None, timesteps: int) -> tuple[Tensor, int]:
    """Divide the masked positions of each row into blocks, left to right, and the timesteps among the blocks.

    Args:
        is_masked: bool ``(batch, length)``.
        block_length: masked positions in a block, the last may have fewer; None for a single block.
        timesteps: ``T``.

    Returns:
        The block of each masked position, from 0, int64 ``(batch, length)``, and the timesteps of each block.

    Raises:
        ValueError: an empty block, or timesteps that can't be divided equally.
    """
    if block_length is None:
        return torch.zeros_like(is_masked, dtype=torch.int64), timesteps
    _check_count("block_length", block_length)
    number = (is_masked.cumsum(1) - 1).clamp(min=0) // block_length
    blocks = int(number.max()) + 1 if number.numel() else 1
    if timesteps % blocks:
        raise ValueError(f"timesteps: found {timesteps}, allowed are multiples of the {blocks} blocks")
    return number, timesteps // blocks


def generate(
    lm: DiffusionLM | MaskPredictor,
    ids: Tensor,
    *,
    timesteps: int,
    attention_mask: Tensor | None = None,
    sampler: str = "entropy",
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg_temp: float | None = 0.0,
    eps: float = 1e-3,
    block_length: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    on_state: Callable[[int, slice, Tensor], None] | None = None,
    on_logits: LogitsHook | None = None,
    on_tokens: TokensHook | None = None,
    progress: str | None = None,
) -> Tensor:
    """Fill the masked positions of ``ids`` in ``timesteps`` denoising steps.

    Schedule, filters and hooks are those of Dream's published loop (arXiv 2508.15487), with one difference: the mask
    token itself is never predicted, where the loops of Dream and LLaDA may write it as if it were text.

    Args:
        lm: the model, also one of ``transformers``' Auto classes; its time-aware layers are told each timestep.
        ids: integers ``(batch, length)`` with mask tokens where text is wanted, on any device. All work is done on the
            model's device, where also the hooks' tensors are; logits never leave it.
        timesteps: number of denoising steps ``T``.
        attention_mask: bool ``(batch, length)``, False at padding, which is on the left and is never filled; None
            where there is none.
        sampler: ``origin``, ``maskgit_plus``, ``topk_margin``, ``entropy`` or ``low_confidence``.
        temperature, top_p, top_k: how a token is drawn; temperature 0 takes the likeliest. The filters see the logits
            after temperature, ``top_p`` first.
        alg_temp: above 0 the positions to fill are drawn, by confidence, instead of the surest ones; None for 0.
        eps: where the masking ratio ends, before the last step fills whatever is left; 0 <= ``eps`` < 1. Of ``n``
            masked tokens step ``i`` fills ``int(n * (1 - t_{i+1} / t_i))`` with ``t_i = 1 - i * (1 - eps) / T``,
            ``origin`` each with that chance. ``low_confidence`` has no ``eps``.
        block_length: fill blocks of that many masked positions one after the other, left to right, each in its
            share of the timesteps (arXiv 2502.09992, section 2.4); None fills all together.
        seed: equal seeds give equal texts, whatever the batch size. Random numbers are drawn on the CPU, so that they
            are the same on every device.
        batch_size: sequences a forward pass.
        on_state: called with ``(timestep, rows, ids)`` before each step: a trajectory's states.
        on_logits: called with ``(timestep, ids, logits)`` at every step, returns the logits to sample from. Logits are
            those of all positions, float32 ``(batch, length, vocabulary)``, computed only where there is a hook.
        on_tokens: called with ``(None, ids, None)`` before the first step, and with ``(timestep, ids, logits)`` after
            every step; returns the ids to go on with, which may have other mask tokens. Blocks are numbered after the
            first call; logits are those that ``on_logits`` returned.
        progress: label of a progress bar; None for none.

    Returns:
        int64 ``(batch, length)``, on the device of ``ids``, without mask tokens, but for those that ``on_tokens``
        wrote in the last step and those in padding.

    Raises:
        ValueError: unknown sampler, a value out of range, ids or a mask of another kind, a hook's result of another
            shape or NaN, or what ``DiffusionLM.logits`` raises.
    """
    lm = as_lm(lm, with_tokenizer=False)
    sampling = Sampling(sampler, temperature, top_p, top_k, alg_temp)
    mask_ratios(timesteps, eps)  # refuses timesteps before they are divided
    _check_count("batch_size", batch_size)
    _check_ids(ids)
    device = lm.device
    result = ids.to(device, torch.int64, copy=True)
    is_text = _is_text(attention_mask, ids)
    padded = not bool(is_text.all())
    is_text = is_text.to(device)
    batches = [slice(start, min(start + batch_size, len(ids))) for start in range(0, len(ids), batch_size)]
    if on_tokens is not None:
        for rows in batches:
            result[rows] = _same_shape("on_tokens", on_tokens(None, result[rows].clone(), None), result[rows])
    block, steps = block_numbers((result == lm.mask_token_id) & is_text, block_length, timesteps)
    rho = unmask_probabilities(steps, 0.0 if sampler == "low_confidence" else eps).tolist()
    with tqdm(total=len(batches) * timesteps, desc=progress, disable=progress is None, leave=False) as bar:
        for timestep in range(timesteps):
            lm.set_timestep(timestep, timesteps)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + timestep)
            # Drawn for every position at once, so that the batch size doesn't change a position's random numbers.
            uniform = torch.rand((2, *ids.shape), generator=generator, dtype=torch.float32).to(device)
            for rows in batches:
                if on_state is not None:
                    on_state(timestep, rows, result[rows])
                x, visible = result[rows], (is_text[rows],) if padded else ()  # without a mask the model is faster
                is_open = (x == lm.mask_token_id) & is_text[rows] & (block[rows] <= timestep // steps)
                everywhere = None
                if on_logits is not None or on_tokens is not None:
                    everywhere = lm.logits(x, torch.ones_like(is_open), *visible).unflatten(0, x.shape)
                if on_logits is not None:
                    everywhere = _same_shape("on_logits", on_logits(timestep, x, everywhere), everywhere)
                if is_open.any():
                    parts = lm.logit_parts(x, is_open, *visible) if everywhere is None else [everywhere[is_open]]
                    x = _denoise(x, parts, is_open, rho[timestep % steps], sampling, uniform[:, rows])
                if on_tokens is not None:
                    x = _same_shape("on_tokens", on_tokens(timestep, x, everywhere), x)
                result[rows] = x
                bar.update()
    return result.to(ids.device)


def _check_ids(ids: Tensor) -> None:
    """Refuse what isn't a batch of token ids; whether they are in the vocabulary is checked by the model."""
    is_whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.ndim != 2 or not is_whole:
        raise ValueError(f"ids: found {ids.dtype} of shape {tuple(ids.shape)}, allowed are integers (batch, length)")


def _is_text(attention_mask: Tensor | None, ids: Tensor) -> Tensor:
    """Where there is no padding, bool ``(batch, length)``."""
    if attention_mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if attention_mask.dtype != torch.bool or attention_mask.shape != ids.shape:
        found = f"found {attention_mask.dtype} of shape {tuple(attention_mask.shape)}"
        raise ValueError(f"attention_mask: {found}, allowed is torch.bool of shape {tuple(ids.shape)}")
    if (attention_mask[:, :-1] & ~attention_mask[:, 1:]).any():
        raise ValueError("attention_mask: found padding after text, allowed is padding on the left")
    return attention_mask


def _same_shape(hook: str, returned: Tensor, given: Tensor) -> Tensor:
    if not isinstance(returned, Tensor) or returned.shape != given.shape:
        found = tuple(returned.shape) if isinstance(returned, Tensor) else returned
        raise ValueError(f"{hook}: returned {found!r}, expected a tensor of shape {tuple(given.shape)}")
    return returned


def _denoise(
    x: Tensor, parts: Iterable[Tensor], is_open: Tensor, rho: float, sampling: Sampling, uniform: Tensor
) -> Tensor:
    """Fill a share ``rho`` of the ``n`` open positions by parts of their logits ``(n, vocabulary)``."""
    for_position, for_token = uniform[0], uniform[1][is_open]
    tokens, scores = [], []
    for logits in (some for part in parts for some in _in_cache(part)):
        drawn, for_token = for_token[: len(logits)], for_token[len(logits) :]
        found, probabilities = sample_tokens(logits, sampling.temperature, drawn, sampling.top_p, sampling.top_k)
        tokens.append(found)
        if sampling.sampler == "low_confidence":  # what the model says of the token, however it was drawn
            probabilities = logits.float().softmax(-1)
        if sampling.sampler != "origin":
            scores.append(confidence(sampling.sampler, found, probabilities))
    filled = x.masked_scatter(is_open, torch.cat(tokens))
    if sampling.sampler == "origin":
        return torch.where(is_open & (for_position < rho), filled, x)
    score = torch.full(x.shape, -torch.inf, dtype=torch.float32, device=x.device)
    score[is_open] = torch.cat(scores)
    if sampling.alg_temp > 0:  # Gumbel top-k draws positions without replacement, by softmax(score / alg_temp)
        score = score / sampling.alg_temp - (-for_position.clamp(1e-20, 1 - 1e-7).log()).log()
    rank = score.argsort(dim=1, descending=True).argsort(dim=1)
    return torch.where(is_open & (rank < _scheduled(is_open.sum(1), rho, sampling.sampler)[:, None]), filled, x)


def _in_cache(logits: Tensor) -> Sequence[Tensor]:
    """Rows of logits at a time that a processor's cache holds while they are gone through several times."""
    return logits.split(max(1, _CACHED // logits.shape[-1])) if logits.device.type == "cpu" else (logits,)


def _scheduled(still_open: Tensor, rho: float, sampler: str) -> Tensor:
    """How many of the open positions are filled; LLaDA fills what can't be divided equally early, Dream late."""
    if rho == 1:
        return still_open
    share = still_open.double() * rho
    return (share - 1e-9).ceil() if sampler == "low_confidence" else (share + 1e-9).floor()

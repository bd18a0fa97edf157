"""Masked (absorbing-state) diffusion with the linear schedule of MDLM, LLaDA and Dream.

At timestep ``i`` of ``T`` a fraction ``t_i = 1 - i/T`` of the tokens is masked; one denoising step goes
from ``t_i`` to ``s_i = t_{i+1}`` (arXiv 2406.07524, section 3; arXiv 2502.09992, section 2). The samplers
are those of Dream (arXiv 2508.15487): ``origin`` is ancestral sampling of the reverse process, the other
three fill the positions first that the model is surest of.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from thermo_lib.models import DiffusionLM

SAMPLERS = ("origin", "maskgit_plus", "topk_margin", "entropy")


def mask_ratios(timesteps: int) -> Tensor:
    """``t_0 .. t_T`` of the linear schedule, float64 ``(timesteps + 1,)``, from 1 down to 0.

    Raises:
        ValueError: fewer than one timestep.
    """
    if timesteps < 1:
        raise ValueError(f"timesteps: found {timesteps}, allowed is at least 1")
    return 1 - torch.arange(timesteps + 1, dtype=torch.float64) / timesteps


def unmask_probabilities(timesteps: int) -> Tensor:
    """``rho_i = 1 - s_i/t_i``, the chance of a masked token to be filled at step ``i``; float64 ``(timesteps,)``."""
    ratios = mask_ratios(timesteps)
    return 1 - ratios[1:] / ratios[:-1]


def mask_tokens(
    ids: Tensor, ratio: Tensor, mask_token_id: int, generator: torch.Generator, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The forward process: mask each allowed position independently with probability ``ratio``.

    Args:
        ids: int64 ``(batch, length)``.
        ratio: ``(batch,)`` in [0, 1].
        mask_token_id: id written at masked positions.
        generator: source of randomness.
        allowed: bool ``(batch, length)``, the positions that may be masked; all by default.

    Returns:
        ``(masked_ids, is_masked)``, both ``(batch, length)``.
    """
    is_masked = torch.rand(ids.shape, generator=generator) < ratio[:, None]
    if allowed is not None:
        is_masked &= allowed
    return torch.where(is_masked, mask_token_id, ids), is_masked


def filter_logits(logits: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """Set logits outside the ``top_k`` largest and outside the nucleus of mass ``top_p`` to -inf."""
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, mass_before > top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def sample_tokens(
    logits: Tensor, temperature: float, uniform: Tensor, top_p: float | None = None, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token a row, by inverting the cumulative distribution.

    Args:
        logits: ``(n, vocabulary)``.
        temperature: 0 takes the likeliest token.
        uniform: ``(n,)`` random numbers in [0, 1).
        top_p, top_k: nucleus and top-k filters; None for no filter.

    Returns:
        ``(tokens (n,) int64, probabilities (n, vocabulary))``, the probabilities after temperature and filters.
    """
    if temperature > 0:
        logits = logits / temperature
    probabilities = filter_logits(logits, top_p, top_k).float().softmax(-1)
    if temperature == 0:
        return probabilities.argmax(-1), probabilities
    cumulative = probabilities.double().cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    return drawn.clamp(max=logits.shape[-1] - 1), probabilities


def confidence(sampler: str, tokens: Tensor, probabilities: Tensor) -> Tensor:
    """How sure the model is of each row, by the rule of the sampler; larger is surer. Shape ``(n,)``."""
    if sampler == "maskgit_plus":
        return probabilities.gather(-1, tokens[:, None]).squeeze(-1)
    if sampler == "topk_margin":
        top = probabilities.topk(2).values
        return top[:, 0] - top[:, 1]
    return (probabilities * probabilities.clamp(min=1e-10).log()).sum(-1)


def _check_sampling(sampler: str, temperature: float, top_p: float | None, top_k: int | None) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: found {sampler!r}, allowed are {', '.join(SAMPLERS)}")
    if temperature < 0:
        raise ValueError(f"temperature: found {temperature}, allowed is at least 0")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: found {top_p}, allowed is above 0 and at most 1")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: found {top_k}, allowed is at least 1")


def generate(
    lm: DiffusionLM,
    ids: Tensor,
    *,
    timesteps: int,
    sampler: str = "entropy",
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg_temp: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    on_state: Callable[[int, slice, Tensor], None] | None = None,
    progress: str | None = None,
) -> Tensor:
    """Fill the masked positions of ``ids`` in ``timesteps`` denoising steps.

    Args:
        lm: the model; its time-aware layers are told each timestep.
        ids: int64 ``(batch, length)`` with mask tokens where text is wanted.
        timesteps: number of denoising steps ``T``.
        sampler: ``origin``, ``maskgit_plus``, ``topk_margin`` or ``entropy``.
        temperature, top_p, top_k: how a token is drawn; temperature 0 takes the likeliest.
        alg_temp: above 0 the positions to fill are drawn, by confidence, instead of the surest ones.
        seed: equal seeds give equal texts, whatever the batch size.
        batch_size: sequences a forward pass.
        on_state: called with ``(timestep, rows, ids)`` before each step: a trajectory's states.
        progress: label of a progress bar; None for none.

    Returns:
        int64 ``(batch, length)`` without mask tokens.

    Raises:
        ValueError: unknown sampler or a value out of range.
    """
    _check_sampling(sampler, temperature, top_p, top_k)
    rho = unmask_probabilities(timesteps).tolist()
    result = ids.clone()
    starts = range(0, len(ids), batch_size)
    with tqdm(total=len(starts) * timesteps, desc=progress, disable=progress is None, leave=False) as bar:
        for timestep in range(timesteps):
            lm.set_timestep(timestep, timesteps)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + timestep)
            # Drawn for every position at once, so that the batch size doesn't change a position's random numbers.
            uniform = torch.rand((2, *ids.shape), generator=generator)
            for start in starts:
                rows = slice(start, min(start + batch_size, len(ids)))
                if on_state is not None:
                    on_state(timestep, rows, result[rows])
                result[rows] = _denoise(
                    lm, result[rows], rho[timestep], sampler, temperature, top_p, top_k, alg_temp, uniform[:, rows]
                )
                bar.update()
    return result


def _denoise(
    lm: DiffusionLM,
    x: Tensor,
    rho: float,
    sampler: str,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    alg_temp: float,
    uniform: Tensor,
) -> Tensor:
    is_masked = x == lm.mask_token_id
    if not is_masked.any():
        return x
    for_position, for_token = uniform
    logits = lm.logits(x, is_masked)
    tokens, probabilities = sample_tokens(logits, temperature, for_token[is_masked], top_p, top_k)
    filled = x.masked_scatter(is_masked, tokens)
    if sampler == "origin":
        return torch.where(is_masked & (for_position < rho), filled, x)
    score = torch.full(x.shape, -torch.inf)
    score[is_masked] = confidence(sampler, tokens, probabilities)
    if alg_temp > 0:  # Gumbel top-k draws positions without replacement, by softmax(score / alg_temp)
        score = score / alg_temp - (-for_position.clamp(1e-20, 1 - 1e-7).log()).log()
    count = (is_masked.sum(1).double() * rho + 1e-9).floor() if rho < 1 else is_masked.sum(1)
    rank = score.argsort(dim=1, descending=True).argsort(dim=1)
    return torch.where(is_masked & (rank < count[:, None]), filled, x)

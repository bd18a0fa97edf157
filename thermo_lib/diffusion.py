"""Masked (absorbing-state) diffusion with the linear schedule of MDLM, LLaDA and Dream.

At timestep ``i`` of ``T`` a fraction ``t_i = 1 - i/T`` of the tokens is masked; one denoising step goes
from ``t_i`` to ``s_i = t_{i+1}`` (arXiv 2406.07524, section 3; arXiv 2502.09992, section 2). The samplers
are those of Dream (arXiv 2508.15487): ``origin`` is ancestral sampling of the reverse process, the next three
fill the positions first that the model is surest of; and of LLaDA (arXiv 2502.09992, section 2.4):
``low_confidence`` predicts all masked tokens and masks those again that it gave the least probability.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from thermo_lib.models import DiffusionLM

SAMPLERS = ("origin", "maskgit_plus", "topk_margin", "entropy", "low_confidence")

LogitsHook = Callable[[int, Tensor, Tensor], Tensor]
TokensHook = Callable[[int, Tensor, Tensor | None], Tensor]


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
    if sampler in ("maskgit_plus", "low_confidence"):
        return probabilities.gather(-1, tokens[:, None]).squeeze(-1)
    if sampler == "topk_margin":
        top = probabilities.topk(2).values
        return top[:, 0] - top[:, 1]
    return (probabilities * probabilities.clamp(min=1e-10).log()).sum(-1)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn, and which positions are filled first; the arguments of ``generate`` of these names.

    Raises:
        ValueError: unknown sampler or a value out of range.
    """

    sampler: str
    temperature: float
    top_p: float | None
    top_k: int | None
    alg_temp: float

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler: found {self.sampler!r}, allowed are {', '.join(SAMPLERS)}")
        if self.temperature < 0:
            raise ValueError(f"temperature: found {self.temperature}, allowed is at least 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: found {self.top_p}, allowed is above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: found {self.top_k}, allowed is at least 1")


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
        return torch.zeros(is_masked.shape, dtype=torch.int64), timesteps
    if block_length < 1:
        raise ValueError(f"block_length: found {block_length}, allowed is at least 1")
    number = (is_masked.cumsum(1) - 1).clamp(min=0) // block_length
    blocks = int(number.max()) + 1 if number.numel() else 1
    if timesteps % blocks:
        raise ValueError(f"timesteps: found {timesteps}, allowed are multiples of the {blocks} blocks")
    return number, timesteps // blocks


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
    block_length: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    on_state: Callable[[int, slice, Tensor], None] | None = None,
    on_logits: LogitsHook | None = None,
    on_tokens: TokensHook | None = None,
    progress: str | None = None,
) -> Tensor:
    """Fill the masked positions of ``ids`` in ``timesteps`` denoising steps.

    Args:
        lm: the model; its time-aware layers are told each timestep.
        ids: int64 ``(batch, length)`` with mask tokens where text is wanted.
        timesteps: number of denoising steps ``T``.
        sampler: ``origin``, ``maskgit_plus``, ``topk_margin``, ``entropy`` or ``low_confidence``.
        temperature, top_p, top_k: how a token is drawn; temperature 0 takes the likeliest.
        alg_temp: above 0 the positions to fill are drawn, by confidence, instead of the surest ones.
        block_length: fill blocks of that many masked positions one after the other, left to right, each in its
            share of the timesteps (arXiv 2502.09992, section 2.4); None fills all together.
        seed: equal seeds give equal texts, whatever the batch size.
        batch_size: sequences a forward pass.
        on_state: called with ``(timestep, rows, ids)`` before each step: a trajectory's states.
        on_logits: called with ``(timestep, ids, logits)``, returns the logits to sample from. Logits are
            ``(batch, length, vocabulary)`` as in Dream's hooks, NaN at positions that this step doesn't fill.
        on_tokens: called with ``(timestep, ids, logits)`` after each step, returns the ids to go on with, which may
            have mask tokens again; logits are those sampled from, None where nothing was left to fill.
        progress: label of a progress bar; None for none.

    Returns:
        int64 ``(batch, length)`` without mask tokens, but for those that ``on_tokens`` wrote in the last step.

    Raises:
        ValueError: unknown sampler, a value out of range, or a hook's result of another shape.
    """
    sampling = Sampling(sampler, temperature, top_p, top_k, alg_temp)
    mask_ratios(timesteps)  # refuses timesteps before they are divided
    block, steps = block_numbers(ids == lm.mask_token_id, block_length, timesteps)
    rho = unmask_probabilities(steps).tolist()
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
                x = result[rows]
                is_open = (x == lm.mask_token_id) & (block[rows] <= timestep // steps)
                hook = on_logits and partial(on_logits, timestep, x)
                x, logits = _denoise(lm, x, is_open, rho[timestep % steps], sampling, uniform[:, rows], hook)
                if on_tokens is not None:
                    everywhere = None if logits is None else _everywhere(logits, is_open)
                    x = _same_shape("on_tokens", on_tokens(timestep, x, everywhere), x)
                result[rows] = x
                bar.update()
    return result


def _everywhere(logits: Tensor, at: Tensor) -> Tensor:
    """Logits ``(n, vocabulary)`` put at their positions in ``(batch, length, vocabulary)``, NaN elsewhere."""
    return logits.new_full((*at.shape, logits.shape[-1]), torch.nan).index_put((at,), logits)


def _same_shape(hook: str, returned: Tensor, given: Tensor) -> Tensor:
    if not isinstance(returned, Tensor) or returned.shape != given.shape:
        found = tuple(returned.shape) if isinstance(returned, Tensor) else returned
        raise ValueError(f"{hook}: returned {found!r}, expected a tensor of shape {tuple(given.shape)}")
    return returned


def _denoise(
    lm: DiffusionLM,
    x: Tensor,
    is_open: Tensor,
    rho: float,
    sampling: Sampling,
    uniform: Tensor,
    hook: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """Fill a share ``rho`` of the open positions; also the logits ``(n, vocabulary)`` there, None if none is open."""
    if not is_open.any():
        return x, None
    for_position, for_token = uniform
    logits = lm.logits(x, is_open)
    if hook is not None:
        given = _everywhere(logits, is_open)
        logits = _same_shape("on_logits", hook(given), given)[is_open]
    tokens, probabilities = sample_tokens(
        logits, sampling.temperature, for_token[is_open], sampling.top_p, sampling.top_k
    )
    filled = x.masked_scatter(is_open, tokens)
    if sampling.sampler == "origin":
        return torch.where(is_open & (for_position < rho), filled, x), logits
    if sampling.sampler == "low_confidence":  # what the model says of the token, however it was drawn
        probabilities = logits.float().softmax(-1)
    score = torch.full(x.shape, -torch.inf)
    score[is_open] = confidence(sampling.sampler, tokens, probabilities)
    if sampling.alg_temp > 0:  # Gumbel top-k draws positions without replacement, by softmax(score / alg_temp)
        score = score / sampling.alg_temp - (-for_position.clamp(1e-20, 1 - 1e-7).log()).log()
    rank = score.argsort(dim=1, descending=True).argsort(dim=1)
    return torch.where(is_open & (rank < _scheduled(is_open.sum(1), rho, sampling.sampler)[:, None]), filled, x), logits


def _scheduled(still_open: Tensor, rho: float, sampler: str) -> Tensor:
    """How many of the open positions are filled; LLaDA fills what can't be divided equally early, Dream late."""
    if rho == 1:
        return still_open
    share = still_open.double() * rho
    return (share - 1e-9).ceil() if sampler == "low_confidence" else (share + 1e-9).floor()

"""Masked (absorbing-state) diffusion with the linear schedule of MDLM, LLaDA and Dream.

At timestep ``i`` of ``T`` a fraction ``t_i = 1 - i/T`` of the tokens is masked; one denoising step goes
from ``t_i`` to ``s_i = t_{i+1}`` (arXiv 2406.07524, section 3; arXiv 2502.09992, section 2). The samplers are in
``tokens``, a step in ``step``, blocks in ``schedule``, those of block-causal models in ``blockwise``, and what is never
written in ``rules``.
"""

from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor
from tqdm import tqdm

from thermo_lib.diffusion.blockwise import CachedBatch, blocks_of, check_blocks
from thermo_lib.diffusion.rules import TokenRules
from thermo_lib.diffusion.schedule import Schedule, check_count
from thermo_lib.diffusion.step import Batch, LogitsHook, TokensHook, same_shape
from thermo_lib.diffusion.tokens import Sampling, chosen_sampler
from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.models.loaded import as_lm
from thermo_lib.models.vocabulary import check_known

_SEEDS = 1_000_003  # seeds of timesteps, and of rows, are so far apart


def mask_ratios(timesteps: int, eps: float = 0.0) -> Tensor:
    """``t_0 .. t_T`` of the linear schedule, float64 ``(timesteps + 1,)``, from 1 down to ``eps``.

    Raises:
        ValueError: no whole number of timesteps from 1, or ``eps`` out of range.
    """
    check_count("timesteps", timesteps)
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


def _seeded(number: int) -> torch.Generator:
    """A generator; of a number that 64 bits don't hold, the last ones count."""
    return torch.Generator().manual_seed(number if -(2**63) <= number < 2**64 else number % 2**64)


def _random_numbers(seed: int, timestep: int, shape: Sequence[int], lengths: Sequence[int] | None) -> Tensor:
    """Numbers in [0, 1) for positions and tokens, float32 ``(2, batch, length)``; see ``generate``.

    They are drawn for every position at once, so that the batch size doesn't change a position's numbers.

    Args:
        seed, timestep: they are drawn anew at every step.
        shape: ``(batch, length)``.
        lengths: number of positions of each row without its padding; None where there is none.
    """
    if lengths is None:
        return torch.rand((2, *shape), generator=_seeded(seed * _SEEDS + timestep), dtype=torch.float32)
    found = torch.zeros((2, *shape), dtype=torch.float32)
    for row, length in enumerate(lengths):
        generator = _seeded((seed + row * _SEEDS) * _SEEDS + timestep)
        found[:, row, shape[1] - length :] = torch.rand((2, length), generator=generator, dtype=torch.float32)
    return found


def generate(
    lm: DiffusionLM | MaskPredictor,
    ids: Tensor,
    *,
    timesteps: int,
    attention_mask: Tensor | None = None,
    sampler: str | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg_temp: float | None = 0.0,
    eps: float = 1e-3,
    block_length: int | None = None,
    threshold: float | None = None,
    suppress_tokens: Sequence[int] | int = (),
    begin_suppress_tokens: Sequence[int] | int = (),
    end_tokens: Sequence[int] | int | None = None,
    suppress_end: bool = False,
    end_last: bool = False,
    stop_at_end: bool | None = None,
    seed: int = 0,
    batch_size: int = 64,
    on_state: Callable[[int, slice, Tensor], None] | None = None,
    on_logits: LogitsHook | None = None,
    on_tokens: TokensHook | None = None,
    progress: str | None = None,
) -> Tensor:
    """Fill the masked positions of ``ids`` in ``timesteps`` denoising steps.

    Schedule, filters and hooks are those of Dream's published loop (arXiv 2508.15487), with one difference: the mask
    token itself and ids that the tokenizer doesn't have are never predicted, where the loops of Dream and LLaDA may
    write them as if they were text.

    A row's blocks, steps and time-aware layers don't depend on its neighbours. Where nothing is drawn (any sampler but
    ``origin``, ``temperature`` and ``alg_temp`` 0) a row gets the text that it gets alone, without its padding, but for
    ties that rounding decides. Where something is drawn, see ``seed``.

    Args:
        lm: the model, also one of ``transformers``' Auto classes; its time-aware layers are told each timestep. A row
            with several blocks, and every row with a ``threshold``, is told the timestep that belongs to its own mask
            ratio: of ``n`` positions to fill, ``m`` of them still masked, ``floor((1 - m / n) T)``. Blocks of a
            block-causal model have timesteps of their own, see ``blockwise``.
        ids: integers ``(batch, length)`` with mask tokens where text is wanted, on any device. All work is done on the
            model's device, where also the hooks' tensors are; logits never leave it.
        timesteps: number of denoising steps ``T``.
        attention_mask: bool ``(batch, length)``, False at padding, which is on the left and is never filled; None
            where there is none.
        sampler: ``origin``, ``maskgit_plus``, ``topk_margin``, ``entropy`` or ``low_confidence``; None for ``entropy``,
            with a ``threshold`` for ``low_confidence``.
        temperature, top_p, top_k: how a token is drawn; temperature 0 takes the likeliest. The filters see the logits
            after temperature, ``top_p`` first.
        alg_temp: above 0 the positions to fill are drawn, by confidence, instead of the surest ones; None for 0.
        eps: where the masking ratio ends, before the last step fills whatever is left; 0 <= ``eps`` < 1. Of ``n``
            masked tokens step ``i`` fills ``int(n * (1 - t_{i+1} / t_i))`` with ``t_i = 1 - i * (1 - eps) / T``,
            ``origin`` each with that chance. ``low_confidence`` has no ``eps``.
        block_length: fill blocks of that many masked positions one after the other, left to right, each in its
            share of the timesteps (arXiv 2502.09992, section 2.4); None and 0 fill all together. Each row has blocks of
            its own, the last of which may be shorter; where the timesteps don't divide, the first blocks have one more.
            With None a block-causal model fills the blocks of its attention, of ``model.block_length`` each, of which
            those without masks don't count; keys and values of earlier ones are kept, see ``blockwise``. Nothing else
            is allowed for it but that number, or 0 for all together, which such models weren't trained for.
        threshold: fill every position of the block whose confidence is above it, instead of the scheduled number
            (Fast-dLLM, arXiv 2505.22618): at least one a row, and as many as fill the block by the end of its share of
            the timesteps. The next block begins as soon as one is full, so that rows end early; they aren't run any
            more. For ``maskgit_plus`` and ``low_confidence``, whose confidence is a probability; above 0, at most 1.
        suppress_tokens: ids that are never written.
        begin_suppress_tokens: ids that aren't written at the first masked position of a row.
        end_tokens: ids that end a text; None for those of the model's configuration and ``generation_config.json``.
        suppress_end: never write them (``logits_eos_inf`` of LLaDA's published loop).
        end_last: fill the positions last, of a block, where one of them is predicted, so that ends that are sure far on
            the right don't crowd out the text (``confidence_eos_eot_inf`` of LLaDA's loop; arXiv 2502.09992, appendix
            B.4). Not for ``origin``, which has no confidence.
        stop_at_end: a row is finished once an end was written with nothing masked on its left: that end is written on
            at all positions on its right that were to be filled, and the row isn't run any more. None for True where a
            block-causal model fills its blocks, as in its published loops, an end is known and ``suppress_end`` isn't
            asked for; else False.
        seed: equal seeds give equal texts, whatever the batch size. Random numbers are drawn on the CPU, so that they
            are the same on every device. Without padding they depend on the shape of ``ids`` and on a position's place
            in it. With padding row ``r`` has those that it has alone, without its padding, with seed
            ``seed + 1_000_003 * r``; the first row gets the text that it gets alone.
        batch_size: sequences a forward pass.
        on_state: called with ``(timestep, rows, ids)`` before each step: a trajectory's states.
        on_logits: called with ``(timestep, ids, logits)`` at every step, returns the logits to sample from. Logits are
            those of all positions, float32 ``(batch, length, vocabulary)``, computed only where there is a hook, for
            finished rows too. What isn't to be written is ruled out after it. None where a block-causal model fills
            its blocks, as ``on_tokens``: its steps compute a block alone.
        on_tokens: called with ``(None, ids, None)`` before the first step, and with ``(timestep, ids, logits)`` after
            every step; returns the ids to go on with, which may have other mask tokens. Blocks are numbered after the
            first call; logits are those that ``on_logits`` returned.
        progress: label of a progress bar; None for none.

    Returns:
        int64 ``(batch, length)``, on the device of ``ids``, without mask tokens, but for those that ``on_tokens``
        wrote in the last step and those in padding.

    Raises:
        ValueError: unknown sampler, a value out of range, fewer timesteps than a row has blocks, an option about an end
            that isn't known, ids or a mask of another kind, a hook's result of another shape or NaN, or what
            ``DiffusionLM.logits`` raises.
    """
    lm = as_lm(lm)
    sampler = chosen_sampler(sampler, threshold)
    sampling = Sampling(sampler, temperature, top_p, top_k, alg_temp, threshold)
    rules = TokenRules(suppress_tokens, begin_suppress_tokens, end_tokens, suppress_end, end_last, stop_at_end)
    block_length, by_block = blocks_of(lm, block_length)
    rules = rules.resolved(lm, sampler, block_by_block=by_block)
    mask_ratios(timesteps, eps)  # refuses timesteps before they are divided
    check_count("batch_size", batch_size)
    _check_ids(ids)
    if by_block:
        assert block_length is not None  # by ``blocks_of``
        check_blocks(lm, ids, block_length, on_logits=on_logits, on_tokens=on_tokens)
    device = lm.device
    result = ids.to(device, torch.int64, copy=True)
    is_text = _is_text(attention_mask, ids)
    lengths = None if bool(is_text.all()) else is_text.sum(1).tolist()
    is_text = is_text.to(device)
    batches = [slice(start, min(start + batch_size, len(ids))) for start in range(0, len(ids), batch_size)]
    if on_tokens is not None:
        for rows in batches:
            result[rows] = same_shape("on_tokens", on_tokens(None, result[rows].clone(), None), result[rows])
    check_known(result, lm.vocab_size)
    start = (result == lm.mask_token_id) & is_text
    schedule = Schedule.of(start, block_length, timesteps, is_text.cumsum(1) - 1 if by_block else None)
    end = 0.0 if sampler == "low_confidence" else eps
    rates = {count: unmask_probabilities(count, end).to(device) for count in schedule.counts()}
    visible = None if lengths is None else is_text
    every = Batch(lm, sampling, rules, schedule, rates, start, visible, on_logits, on_tokens)
    with tqdm(total=len(batches) * timesteps, desc=progress, disable=progress is None, leave=False) as bar:
        # Keys and values are held of one batch at a time; without them all batches are at the same timestep.
        for together in [[rows] for rows in batches] if by_block else [batches]:
            parts = [CachedBatch(every[rows]) if by_block else every[rows] for rows in together]
            for timestep in range(timesteps):
                lm.set_timestep(timestep, timesteps)
                uniform = _moved(_random_numbers(seed, timestep, ids.shape, lengths), device)
                for rows, part in zip(together, parts, strict=True):
                    if on_state is not None:
                        on_state(timestep, rows, result[rows])
                    result[rows] = part.step(result[rows], timestep, uniform[:, rows])
                    bar.update()
    every.late.finish()
    return result.to(ids.device)


def _moved(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers of the CPU on a device; a GPU that still computes isn't waited for."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


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

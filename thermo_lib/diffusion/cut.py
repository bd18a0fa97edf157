"""What calibration and evaluation denoise of a block-causal model: one block after text that is finished.

Such a model is trained and used block by block (arXiv 2503.09573): it never sees a mask in an earlier block, and no
later block at all. So a text is cut after one of its blocks, and only the masks of this block are drawn or scored.
"""

from typing import Any

import torch
from torch import Tensor

from thermo_lib.diffusion.sampling import generate
from thermo_lib.models.lm import DiffusionLM


def cut_to_blocks(
    lm: DiffusionLM, ids: Tensor, allowed: Tensor | None, *, count: int, own: bool, timesteps: int, seed: int
) -> list[tuple[Tensor, Tensor | None]]:
    """Texts of a block-causal model, each cut after the block that is to be denoised; others as they are.

    Args:
        lm: the model.
        ids: int64 ``(sequences, length)``.
        allowed: bool, same shape: positions that may be masked; None for all.
        count: number of different blocks, spread over those with positions to denoise, the last one among them. The
            sequences are dealt out to them in turn.
        own: let the model write what comes before the block, where that is allowed, by its ancestral sampler in
            ``timesteps`` timesteps a block; otherwise it is that of ``ids``.
        timesteps: ``T`` of a block.
        seed: seeds what the model writes.

    Returns:
        Pairs ``(ids, allowed)``, one for each block: int64 and bool ``(some of the sequences, end of the block)``. A
        sequence without a position to denoise in its block is left out.

    Raises:
        ValueError: a count below 1.
    """
    length = lm.model.block_length
    if length is None:
        return [(ids, allowed)]
    if count < 1:
        raise ValueError(f"count: found {count}, allowed is at least 1 block")
    allowed = torch.ones_like(ids, dtype=torch.bool) if allowed is None else allowed
    block = torch.arange(ids.shape[1], device=ids.device) // length
    filled = block[allowed.any(0)].unique()
    if own and len(filled):
        start, steps = torch.where(allowed, lm.mask_token_id, ids), timesteps * len(filled)
        how: dict[str, Any] = {"sampler": "origin", "temperature": 1.0, "eps": 0.0}
        ids = generate(lm, start, timesteps=steps, block_length=length, seed=seed, **how)
    found: list[tuple[Tensor, Tensor | None]] = []
    count = min(count, len(filled), len(ids))
    for number in range(count):
        chosen = filled[(number + 1) * len(filled) // count - 1]
        end = min((int(chosen) + 1) * length, ids.shape[1])
        inside = allowed[number::count, :end] & (block[:end] == chosen)
        rows = inside.any(1)
        if rows.any():
            found.append((ids[number::count, :end][rows], inside[rows]))
    return found

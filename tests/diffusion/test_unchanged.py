"""Texts of unpadded batches stay what they were before rows had blocks of their own."""

import hashlib
import itertools

import pytest
import torch
from table_model import MASK, TableLM

from thermo_lib.diffusion.sampling import generate
from thermo_lib.diffusion.tokens import SAMPLERS

# Of the commit before, be54471.
DIGESTS = {
    "origin": "30ba6041e17a16d5",
    "maskgit_plus": "f6d827eace4efb6b",
    "topk_margin": "ecd409f1a6bda85f",
    "entropy": "bcdc9fae58ddcec1",
    "low_confidence": "f6eb86e83f0c2ba5",
}


def digest(sampler: str) -> str:
    """Of texts of many settings: one block, and equal rows in blocks that divide timesteps and masks."""
    lm = TableLM(2 * torch.randn(24, 11, generator=torch.Generator().manual_seed(0)))
    equal = torch.full((3, 24), MASK)
    equal[:, ::4] = 3
    order = torch.rand(3, 24, generator=torch.Generator().manual_seed(1)).argsort(1)
    mixed = torch.where(order < torch.tensor([24, 15, 9])[:, None], MASK, 3)
    found = hashlib.sha256()
    blocks = [(equal, steps, length) for steps, length in ((6, 6), (12, 9))]
    one = [(equal, 5, None), (mixed, 5, None), (mixed, 24, None)]
    for (ids, steps, length), temperature, alg_temp in itertools.product([*blocks, *one], (0.0, 1.0), (0.0, 0.5)):
        how = {"sampler": sampler, "temperature": temperature, "alg_temp": alg_temp, "top_p": 0.9, "seed": 3}
        text = generate(lm, ids, timesteps=steps, block_length=length, batch_size=2, **how)
        found.update(text.to(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_texts_are_those_of_the_commit_before(sampler: str) -> None:
    assert digest(sampler) == DIGESTS[sampler]

"""Prompts that the tests of sampling share."""

import pytest
import torch
from table_model import MASK, RandomIds
from torch import Tensor


@pytest.fixture(scope="module")
def prompts(random_ids: RandomIds) -> Tensor:
    """Five sequences of 14 tokens, each with 5 visible tokens at other places."""
    ids = random_ids(5, 14)
    order = torch.rand(5, 14, generator=torch.Generator().manual_seed(1)).argsort(1)
    return torch.where(order < 5, ids, MASK)

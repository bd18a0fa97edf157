"""What path KL is given besides the states: batches, logits that were computed before, and a label."""

import pytest
import torch
from table_model import MASK, TableLM

from thermo_lib.diffusion.path_kl import path_kl, reference_logits
from thermo_lib.diffusion.states import States


class PartsLM(TableLM):
    """A table of three positions and six tokens, whose logits come in parts of five rows."""

    rows_at_a_time = 5


def model(seed: int) -> PartsLM:
    return PartsLM(torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)))


def masks(timestep: list[int]) -> States:
    """Three masks at each of these timesteps."""
    ids = torch.full((len(timestep), 3), MASK)
    return States(ids, ids == MASK, torch.tensor(timestep), ids)


def test_logits_are_given_in_batches_of_the_same_size_by_default() -> None:
    p, q, states = model(0), model(1), masks([0] * 70)  # more than one batch
    given = path_kl(p, q, states, 1, reference_outputs=reference_logits(p, states, 1))
    assert torch.equal(given.per_sequence, path_kl(p, q, states, 1).per_sequence)


def test_logits_of_other_batches_are_refused() -> None:
    p, states = model(0), masks([0] * 10)
    outputs = reference_logits(p, states, 1, batch_size=10)  # they begin with those of five
    with pytest.raises(ValueError, match="zip"):
        path_kl(p, model(1), states, 1, reference_outputs=outputs, batch_size=5)


def test_a_refusal_counts_the_states_of_every_timestep() -> None:
    with pytest.raises(ValueError, match=r"found \[2, 0\] states a timestep"):
        path_kl(model(0), model(1), masks([0, 0]), 2)


def test_a_label_is_shown_while_it_runs_and_nothing_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    path_kl(model(0), model(1), masks([0, 1]), 2, progress="path KL")
    shown = capsys.readouterr().err
    assert "path KL" in shown
    assert "\n" not in shown  # the bar is wiped out at the end
    path_kl(model(0), model(1), masks([0, 1]), 2)
    assert capsys.readouterr().err == ""

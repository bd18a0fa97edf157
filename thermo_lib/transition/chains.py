"""Batches of states to train on: drawn from calibration states, or fresh denoising chains."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from thermo_lib.diffusion.sampling import unmask_probabilities
from thermo_lib.diffusion.states import Calibration, States
from thermo_lib.transition.loss import TransitionLoss

Batch = Sequence[tuple[States, Tensor]]


class Draws(Protocol):
    """Batches to train on, without end."""

    def step(self) -> Batch:
        """The next states and targets; a batch may hold states of several lengths."""

    def state(self) -> dict[str, Tensor]:
        """What decides all batches from here on."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` returned."""


class CalibrationDraws:
    """Random states of a random part of the calibration, with their full-precision targets.

    Args:
        loss: gives the targets.
        calibration: the states; a part is drawn by its number of states.
        batch: states at a time.
        seed: seeds the draws.
    """

    def __init__(self, loss: TransitionLoss, calibration: Calibration, batch: int, seed: int):
        self.loss, self.parts, self.batch = loss, calibration.parts, batch
        self.generator = torch.Generator().manual_seed(seed)

    def step(self) -> Batch:
        """See ``Draws``."""
        sizes = torch.tensor([len(part.ids) for part in self.parts], dtype=torch.float32)
        part = self.parts[int(torch.multinomial(sizes, 1, generator=self.generator))]
        rows = torch.randint(len(part.ids), (min(self.batch, len(part.ids)),), generator=self.generator)
        return [(part[rows], self.loss.targets(part[rows]))]

    def state(self) -> dict[str, Tensor]:
        """See ``Draws``."""
        return {"generator": self.generator.get_state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See ``Draws``."""
        self.generator.set_state(state["generator"])


class Chains:
    """Fresh denoising trajectories of one sequence length, a step of each at a time.

    The chains are spread evenly over the timesteps. A step is that of the ancestral sampler, by the full-precision
    model, whose distributions are the targets at the same time; a chain at its end starts anew.

    Args:
        loss: the two models.
        start: makes the state that the chain of a number, counted from 0, starts from, int64 ``(length,)``.
        count: number of chains.
        own: so many of them take the quantized model's steps instead, as it is then.
        seed: seeds the steps.
    """

    def __init__(self, loss: TransitionLoss, start: Callable[[int], Tensor], count: int, own: int, seed: int):
        if not 0 <= own <= count:
            raise ValueError(f"own: found {own}, allowed are 0..{count}, the number of chains")
        self.loss, self.start, self.own, self.started = loss, start, own, count
        self.generator = torch.Generator().manual_seed(seed)
        self.ids = torch.stack([start(number) for number in range(count)])
        self.timestep = torch.zeros(count, dtype=torch.int64)
        ends = torch.arange(count) * loss.timesteps // count
        for step in range(int(ends.max())):
            waiting = ends <= step
            kept = self.ids[waiting], self.timestep[waiting]
            self.step()
            self.ids[waiting], self.timestep[waiting] = kept

    @torch.no_grad()
    def step(self) -> tuple[States, Tensor]:
        """The present states and their targets; then every chain takes a step."""
        loss, mask_token_id = self.loss, self.loss.reference.mask_token_id
        states = States(self.ids, self.ids == mask_token_id, self.timestep, self.ids)
        targets = loss.targets(states)
        likely = targets
        if self.own:
            rows = torch.arange(len(self.ids)) < self.own
            own = rows[:, None].expand_as(self.ids)[states.is_masked]
            likely = targets.index_put((own,), loss.log_probabilities(states[rows]))
        filled = self.ids
        if len(likely):
            drawn = torch.multinomial(likely.exp(), 1, generator=self.generator).squeeze(-1)
            filled = self.ids.masked_scatter(states.is_masked, drawn)
        rho = unmask_probabilities(loss.timesteps)[self.timestep]
        chosen = torch.rand(self.ids.shape, generator=self.generator, dtype=torch.float32) < rho[:, None]
        self.ids = torch.where(states.is_masked & chosen, filled, self.ids)
        self.timestep = (self.timestep + 1) % loss.timesteps
        for row in (self.timestep == 0).nonzero().flatten().tolist():
            self.ids[row] = self.start(self.started)
            self.started += 1
        return states, targets

    def state(self) -> dict[str, Tensor]:
        """See ``Draws``."""
        started = torch.tensor(self.started)
        return {
            "ids": self.ids,
            "timestep": self.timestep,
            "started": started,
            "generator": self.generator.get_state(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See ``Draws``."""
        self.ids, self.timestep, self.started = state["ids"], state["timestep"], int(state["started"])
        self.generator.set_state(state["generator"])

"""Batches of states to train on: drawn from calibration states, or fresh denoising chains."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from thermo_lib.diffusion.sampling import unmask_probabilities
from thermo_lib.diffusion.states import Calibration, States
from thermo_lib.diffusion.tokens import sample_tokens
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
        self.device = loss.quantized.device
        self.loss, self.parts, self.batch = loss, calibration.to(self.device).parts, batch
        self.generator = torch.Generator().manual_seed(seed)

    def step(self) -> Batch:
        """See ``Draws``."""
        sizes = torch.tensor([len(part.ids) for part in self.parts], dtype=torch.float32)
        part = self.parts[int(torch.multinomial(sizes, 1, generator=self.generator))]
        rows = torch.randint(len(part.ids), (min(self.batch, len(part.ids)),), generator=self.generator)
        states = part[rows.to(self.device)]
        return [(states, self.loss.targets(states))]

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
        self.ids = torch.stack([start(number) for number in range(count)]).to(loss.quantized.device)
        self.timestep = torch.zeros(count, dtype=torch.int64, device=self.ids.device)
        self.steps = [0] * count  # the timesteps again, so that nothing waits for the device
        self.rho = unmask_probabilities(loss.timesteps).to(self.ids.device)
        ends = torch.arange(count) * loss.timesteps // count
        for step in range(int(ends.max())):
            waiting = ends <= step
            kept, steps = self.ids.clone(), self.steps
            self.step()
            self.ids = torch.where(waiting.to(self.ids.device)[:, None], kept, self.ids)
            pairs = zip(steps, self.steps, waiting.tolist(), strict=True)
            self._set_steps([old if waits else new for old, new, waits in pairs])

    def _set_steps(self, steps: list[int]) -> None:
        self.steps, self.timestep = steps, torch.tensor(steps).to(self.ids.device)

    @torch.no_grad()
    def step(self) -> tuple[States, Tensor]:
        """The present states and their targets; then every chain takes a step."""
        loss, mask_token_id = self.loss, self.loss.reference.mask_token_id
        states = States(self.ids, self.ids == mask_token_id, self.timestep, self.ids)
        targets = loss.targets(states)
        likely = targets
        if self.own:
            rows = torch.arange(len(self.ids), device=self.ids.device) < self.own
            own = rows[:, None].expand_as(self.ids)[states.is_masked]
            likely = targets.index_put((own,), loss.log_probabilities(states[rows]))
        filled = self.ids
        if len(likely):
            count = loss.reference.rows_at_a_time
            parts = zip(likely.split(count), self._uniform(len(likely)).split(count), strict=True)
            drawn = [sample_tokens(some, 1.0, uniform)[0] for some, uniform in parts]
            filled = self.ids.masked_scatter(states.is_masked, torch.cat(drawn))
        chosen = self._uniform(*self.ids.shape) < self.rho[self.timestep][:, None]
        self.ids = torch.where(states.is_masked & chosen, filled, self.ids)
        self.timestep = (self.timestep + 1) % loss.timesteps
        self.steps = [(step + 1) % loss.timesteps for step in self.steps]
        for row in (row for row, step in enumerate(self.steps) if step == 0):
            self.ids[row] = self.start(self.started).to(self.ids.device)
            self.started += 1
        return states, targets

    def _uniform(self, *shape: int) -> Tensor:
        """Random numbers, drawn on the CPU: the same on every device."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float32).to(self.ids.device)

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
        self.ids, self.started = state["ids"].to(self.ids.device), int(state["started"])
        self._set_steps(state["timestep"].tolist())
        self.generator.set_state(state["generator"])

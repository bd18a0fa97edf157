"""What a model's linears are given on calibration states."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from thermo_lib.diffusion.states import Calibration
from thermo_lib.models.lm import DiffusionLM

Consumer = Callable[[str, Tensor, Tensor, int], None]


@contextmanager
def watch_inputs(modules: Mapping[str, nn.Module], receive: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While it is entered (``with``), hand the name and input of every module that runs to ``receive``."""
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: receive(name, inputs[0]))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class SeenEnough(Exception):
    """Ends a forward pass of which the rest isn't needed: what a hook looked for is known."""


@torch.no_grad()
def group_by_input(linears: Mapping[str, nn.Module], run: Callable[[], object]) -> list[list[str]]:
    """Names of linears grouped by the input tensor that they share, e.g. ``q_proj, k_proj, v_proj``.

    Args:
        linears: name to linear.
        run: a forward pass through all of them.
    """
    groups: dict[int, list[str]] = {}
    kept: list[Tensor] = []  # keeps every input alive, so that no id is used twice

    def receive(name: str, x: Tensor) -> None:
        kept.append(x)
        groups.setdefault(id(x), []).append(name)

    with watch_inputs(linears, receive):
        run()
    return list(groups.values())


def shared_inputs(lm: DiffusionLM, names: list[str]) -> list[list[str]]:
    """Names of a model's linears grouped by the input tensor that they share."""
    linears = {name: lm.model.get_submodule(name) for name in names}
    return group_by_input(linears, lambda: lm.model.hidden(torch.full((1, 2), lm.mask_token_id, device=lm.device)))


@torch.no_grad()
def run_states(
    lm: DiffusionLM,
    calibration: Calibration,
    names: list[str],
    consume: Consumer,
    batch_size: int = 64,
    progress: str | None = None,
) -> None:
    """Run the model over all calibration states and hand the inputs of some linears to ``consume``.

    Args:
        lm: the model, full precision or quantized.
        calibration: the states.
        names: module names of the linears, e.g. ``model.layers.0.mlp.down_proj``.
        consume: called with ``(name, inputs (tokens, in_features), is_masked (tokens,), timestep)``.
        batch_size: states a forward pass.
        progress: label of a progress bar; None for none.

    Raises:
        ValueError: states with ids that the model doesn't have.
    """
    current: dict[str, Any] = {}

    def receive(name: str, x: Tensor) -> None:
        consume(name, x.reshape(-1, x.shape[-1]), current["is_masked"], current["timestep"])

    calibration.check_vocabulary(lm.model.config.vocab_size)
    calibration = calibration.to(lm.device)
    work = list(calibration.batches(batch_size))
    with watch_inputs({name: lm.model.get_submodule(name) for name in names}, receive):
        for number, timestep, rows in tqdm(work, desc=progress, disable=progress is None, leave=False):
            part = calibration.parts[number]
            lm.set_timestep(timestep, calibration.timesteps)
            current.update(is_masked=part.is_masked[rows].reshape(-1), timestep=timestep)
            lm.model.hidden(part.ids[rows])

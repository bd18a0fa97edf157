"""Train quantization parameters: for a layer's output, for a block's output, or for path KL.

Block reconstruction takes the blocks in order. Each sees the inputs that the quantized blocks before it leave it, and
is trained to put out what the full-precision model has at that place, so that it also mends errors made earlier (BRECQ,
arXiv 2102.05426). The squared error of a token counts by what it costs in path KL, see ``loss.token_importance``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from thermo_lib.files.snapshots import Snapshot, named, part_of
from thermo_lib.time_aware.ranges import InputSample
from thermo_lib.transition.blocks import BlockStream
from thermo_lib.transition.chains import Draws
from thermo_lib.transition.loss import TransitionLoss
from thermo_lib.transition.parameters import TrainableRanges


def output_error(ranges: TrainableRanges, sample: InputSample, weight: Tensor) -> float:
    """Squared error of the layers' outputs on a sample, relative to their energy.

    Args:
        ranges: the ranges of the input.
        sample: the inputs.
        weight: the weights of all layers with this input, ``(out_features, channels)``.
    """
    with torch.no_grad():
        error = (ranges(sample.x, sample.is_masked, sample.timestep) - sample.x) @ weight.T
        return float(error.square().sum() / (sample.x @ weight.T).square().sum())


def descend(
    rates: Mapping[nn.Parameter, float],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
    draws: Draws | None = None,
    snapshot: Snapshot | None = None,
    progress: str | None = None,
) -> list[float]:
    """Train parameters, in place, by Adam with learning rates that fall linearly to zero.

    Args:
        rates: every trained parameter's learning rate at the start.
        loss: the loss of the next batch, a scalar.
        steps: number of steps.
        penalty: what is added to the loss, a function of the parameters.
        draws: what the loss draws its batches from, kept in the snapshots.
        snapshot: where to go on from, and what to keep up to date; None for neither.
        progress: label of a progress bar; None for none.

    Returns:
        The loss of each step, without the penalty.
    """
    by_rate = [
        {"params": [p for p, own in rates.items() if own == rate], "lr": rate} for rate in sorted(set(rates.values()))
    ]
    optimizer = torch.optim.Adam(by_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
    state = snapshot.load() if snapshot else {}
    losses: list[float] = []
    if state:
        assert draws is not None  # what was drawn from is kept too
        assert snapshot is not None
        losses = _restore(state, snapshot, optimizer, schedule, list(rates), draws, steps)
    new: list[Tensor] = []  # read in one go: a number that is read from a GPU is waited for
    left = range(len(losses), steps)
    with torch.enable_grad():
        for step in tqdm(left, desc=progress, initial=len(losses), total=steps, disable=progress is None, leave=False):
            value = loss()
            optimizer.zero_grad(set_to_none=True)
            (value + penalty()).backward()
            optimizer.step()
            schedule.step()
            new.append(value.detach())
            if (step + 1) % _SNAPSHOT_STEPS == 0 or step + 1 == steps:
                losses += torch.stack(new).tolist()
                new.clear()
                if snapshot:
                    assert draws is not None
                    snapshot.save(_training_state(optimizer, list(rates), draws, losses))
    return losses


_SNAPSHOT_STEPS = 50  # between two snapshots, some 20 seconds of the reference model


def fit_to_output(
    ranges: TrainableRanges, sample: InputSample, weight: Tensor, *, steps: int, batch: int, lr: float, seed: int
) -> None:
    """Refine ranges, in place, for least squared error of the layers' outputs.

    Args:
        ranges: the ranges of the input.
        sample: the inputs.
        weight: the weights of all layers with this input, ``(out_features, channels)``.
        steps: see ``descend``.
        batch: number of tokens of a step.
        lr: learning rate at the start.
        seed: seeds the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    gram = weight.T @ weight
    values, vectors = torch.linalg.eigh(gram.double())
    root = (vectors * values.clamp(min=0).sqrt()).float()  # (e @ root).square().sum() = |weight e|^2
    energy = (sample.x @ root).square().sum(-1).mean()

    def loss() -> Tensor:
        rows = torch.randint(len(sample.x), (min(batch, len(sample.x)),), generator=generator).to(sample.x.device)
        x = sample.x[rows]  # (batch, channels)
        error = (ranges(x, sample.is_masked[rows], sample.timestep[rows]) - x) @ root
        return error.square().sum(-1).mean() / energy

    descend(ranges.rates(lr), loss, steps=steps)


def fit_block(
    stream: BlockStream,
    targets: Sequence[Tensor],
    importance: Sequence[Tensor],
    rates: Mapping[nn.Parameter, float],
    *,
    steps: int,
    batch: int,
    seed: int,
    progress: str | None = None,
) -> list[float]:
    """Train a block's parameters, in place, for least weighted squared error of its output.

    Args:
        stream: stands at the block in the quantized model, which computes with the trained parameters.
        targets: what the full-precision block puts out, ``(states, length, hidden)`` for each part of the calibration.
        importance: of the tokens, ``(states, length)`` for each part.
        rates: every trained parameter's learning rate at the start.
        steps: see ``descend``.
        batch: number of states of a step, all of one part, which is drawn by its number of tokens.
        seed: seeds the batches.
        progress: label of a progress bar; None for none.

    Returns:
        The loss of each step: path KL to second order, nats per sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([weight.numel() for weight in importance], dtype=torch.float32)

    def loss() -> Tensor:
        part = int(torch.multinomial(sizes, 1, generator=generator))
        count = len(stream.hidden[part])
        rows = torch.randint(count, (min(batch, count),), generator=generator)
        x, target = stream.taken(stream.hidden, part, rows), stream.taken(targets, part, rows)
        weight = stream.taken(importance, part, rows)
        error = (stream.run(part, x) - target).square().sum(-1)  # (batch, length)
        return 0.5 * (weight * error).sum() / len(rows)

    return descend(rates, loss, steps=steps, progress=progress)


def fit_to_path_kl(
    loss: TransitionLoss,
    rates: Mapping[Any, float],  # of parameters, and of biases that are buffers
    draws: Draws,
    *,
    steps: int,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
    snapshot: Snapshot | None = None,
    progress: str | None = None,
) -> list[float]:
    """Train parameters, in place, for least path KL.

    Args:
        loss: what they do.
        rates: every trained parameter's learning rate at the start.
        draws: states and targets of the steps.
        steps, penalty, snapshot, progress: see ``descend``.

    Returns:
        The loss of each step: path KL estimated on its batch, nats per sequence, summed over lengths.
    """

    def value() -> Tensor:
        return torch.stack([loss(states, targets) for states, targets in draws.step()]).sum()

    with loss:
        return descend(rates, value, steps=steps, penalty=penalty, draws=draws, snapshot=snapshot, progress=progress)


def _training_state(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], draws: Draws, losses: Sequence[float]
) -> dict[str, Tensor]:
    """Everything that the rest of a training depends on."""
    state = {"losses": torch.tensor(losses, dtype=torch.float64)} | named("draws", draws.state())
    state["lr"] = torch.tensor([group["lr"] for group in optimizer.param_groups], dtype=torch.float64)
    for number, parameter in enumerate(parameters):
        moments = named(f"moment.{number}", optimizer.state[parameter])
        state |= {f"parameter.{number}": parameter} | moments
    return state


def _restore(
    state: Mapping[str, Tensor],
    snapshot: Snapshot,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    parameters: Sequence[nn.Parameter],
    draws: Draws,
    steps: int,
) -> list[float]:
    """Put back what ``_training_state`` returned; the losses so far."""
    done = state["losses"].numel() if "losses" in state else 0
    expected = _training_state(optimizer, parameters, draws, [0.0] * done)
    for number, parameter in enumerate(parameters):
        if part_of(state, f"moment.{number}"):  # or it has had no gradient
            moments = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            expected |= named(f"moment.{number}", moments)
    with snapshot.checked(state, expected):
        taken = {int(tensor) for name, tensor in state.items() if name.endswith(".step")}
        if not 0 < done <= steps or taken - {done}:
            raise ValueError(f"found {done} losses and {max(taken, default=0)} steps, allowed are 1..{steps} of both")
        for number, parameter in enumerate(parameters):
            with torch.no_grad():
                parameter.copy_(state[f"parameter.{number}"])
            moments = part_of(state, f"moment.{number}")
            optimizer.state[parameter] = {
                name: value.to(parameter.device) if value.ndim else value for name, value in moments.items()
            }
        for group, lr in zip(optimizer.param_groups, state["lr"].tolist(), strict=True):
            group["lr"] = lr
        schedule.load_state_dict({"last_epoch": done})
        draws.restore(part_of(state, "draws"))
    return state["losses"].tolist()

"""Path KL: how far the quantized denoising process is from the full-precision one.

Denoising is a Markov chain. One step of the ancestral sampler fills each masked position independently with
probability ``rho_i = 1 - s_i/t_i`` from the model's distribution there, so the KL divergence of a transition is
``rho_i`` times the sum of the positions' divergences, and by the chain rule the divergence between the two
processes is the sum over steps, the states drawn from the full-precision process:

    pathKL = sum_i rho_i E[ sum_{masked j} KL(p_j || q_j) ]        (nats per sequence)

On the states of the full-precision model's own ancestral trajectories this is an unbiased estimate of the
divergence; on masked held-out text it is a proxy. It is also what quantization parameters can be trained for: static
activation ranges, and the weights' scales, zero points and codes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from thermo_lib.calibration import Calibration, States
from thermo_lib.diffusion import unmask_probabilities
from thermo_lib.models import NO_PROBABILITY, DiffusionLM
from thermo_lib.quant import QuantizedLinear, dequantize, pack, storable
from thermo_lib.ranges import TrainableRanges, descent, straight_through
from thermo_lib.snapshots import Snapshot, named, part_of


@dataclass(frozen=True)
class PathKL:
    """Path KL between two models.

    Attributes:
        per_sequence: float64 ``(sequences, timesteps)``, each step's contribution in nats.
        cosine: float64 ``(sequences, timesteps)``, mean cosine similarity of the two models' centred logits at
            masked positions; NaN where nothing is masked.
    """

    per_sequence: Tensor
    cosine: Tensor

    @property
    def per_timestep(self) -> Tensor:
        """Mean contribution of each step, nats per sequence, ``(timesteps,)``."""
        return self.per_sequence.mean(0)

    @property
    def total(self) -> float:
        """Nats per sequence over the whole path."""
        return float(self.per_sequence.sum(1).mean())

    @property
    def mean_cosine(self) -> float:
        """Mean cosine similarity of the outputs over all sequences and timesteps."""
        return float(self.cosine.nanmean())


@torch.no_grad()
def reference_logits(lm: DiffusionLM, states: States, timesteps: int, batch_size: int = 64) -> list[Tensor]:
    """The full-precision logits at the masked positions of each batch of states, to compare several models with."""
    outputs = []
    for timestep, rows in states.batches(batch_size):
        lm.set_timestep(timestep, timesteps)
        outputs.append(lm.logits(states.ids[rows], states.is_masked[rows]))
    return outputs


@torch.no_grad()
def path_kl(
    reference: DiffusionLM,
    quantized: DiffusionLM,
    states: States,
    timesteps: int,
    *,
    reference_outputs: list[Tensor] | None = None,
    batch_size: int = 64,
    progress: str | None = None,
) -> PathKL:
    """Path KL from the full-precision to the quantized process.

    Args:
        reference: the full-precision model.
        quantized: the other model.
        states: the full-precision model's ``trajectory_states``: every sequence at every timestep, in order.
        timesteps: ``T``.
        reference_outputs: what ``reference_logits`` returned for the same states and batch size.
        batch_size: states a forward pass.
        progress: label of a progress bar; None for none.

    Raises:
        ValueError: the states aren't a whole number of sequences at every timestep.
    """
    sequences, rest = divmod(len(states.ids), timesteps)
    counts = torch.bincount(states.timestep, minlength=timesteps)
    if rest or len(counts) != timesteps or not (counts == sequences).all():
        raise ValueError(
            f"states: found {counts.tolist()} states a timestep, "
            f"expected every sequence at each of {timesteps} timesteps"
        )
    if reference_outputs is None:
        reference_outputs = reference_logits(reference, states, timesteps, batch_size)
    rho = unmask_probabilities(timesteps)
    kl = torch.zeros((sequences, timesteps), dtype=torch.float64)
    cosine = torch.full_like(kl, torch.nan)
    seen = [0] * timesteps
    batches = list(states.batches(batch_size))
    for (timestep, rows), p_logits in zip(
        tqdm(batches, desc=progress, disable=progress is None, leave=False), reference_outputs, strict=True
    ):
        quantized.set_timestep(timestep, timesteps)
        is_masked = states.is_masked[rows]
        q_logits = quantized.logits(states.ids[rows], is_masked)
        log_p, log_q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        index = slice(seen[timestep], seen[timestep] + len(rows))
        seen[timestep] += len(rows)
        kl[index, timestep] = rho[timestep] * _row_sums(divergence, is_masked)
        similarity = _cosine(p_logits, q_logits, quantized.mask_token_id)
        cosine[index, timestep] = _row_sums(similarity, is_masked) / is_masked.sum(1)
    return PathKL(kl, cosine)


def _row_sums(values: Tensor, is_masked: Tensor) -> Tensor:
    """Sum values given at the masked positions, row by row."""
    return torch.zeros(is_masked.shape, dtype=torch.float64).masked_scatter(is_masked, values.double()).sum(1)


def _cosine(a: Tensor, b: Tensor, mask_token_id: int) -> Tensor:
    keep = [i for i in range(a.shape[-1]) if i != mask_token_id]
    a, b = a[:, keep], b[:, keep]
    return torch.cosine_similarity(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True), dim=-1)


class TrainableWeight(nn.Module):
    """A quantized weight whose scales and zero points, and perhaps codes, are trainable.

    Args:
        layer: the quantized linear; its weight parameters don't depend on the timestep.
        target: the full-precision weight, ``(out_features, in_features)``, to learn the codes too: they start where
            they are, the nearer to the next code the further the weight is on its side. None keeps the codes.
    """

    def __init__(self, layer: QuantizedLinear, target: Tensor | None = None):
        super().__init__()
        self.bits, self.group_size = layer.bits, layer.group_size
        self.log_scale = nn.Parameter(layer.scale[0].float().log())
        self.zero_point = nn.Parameter(layer.zero_point[0].float(), requires_grad=layer.has_zero_point)
        codes = layer.codes().float()
        if target is None:
            self.register_buffer("position", codes)
        else:
            scale, zero_point = (
                p[0].float().repeat_interleave(self.group_size, 1)[:, : layer.in_features]
                for p in (layer.scale, layer.zero_point)
            )
            wanted = target.float() / scale + zero_point
            self.position = nn.Parameter(torch.clamp(wanted, codes - _INSIDE, codes + _INSIDE))

    def codes(self) -> Tensor:
        """As the layer's; trained ones are whole up to rounding errors, float32 ``(out_features, in_features)``."""
        if not self.position.requires_grad:
            return self.position
        return straight_through(self.position.clamp(-_INSIDE, 2**self.bits - 1 + _INSIDE), torch.round)

    def forward(self) -> Tensor:
        """The weight, float32 ``(out_features, in_features)``."""
        return dequantize(self.codes(), self.log_scale.exp(), self.zero_point, self.group_size)

    @torch.no_grad()
    def packed(self) -> Tensor | None:
        """The codes as they are stored, None where they weren't trained."""
        if not self.position.requires_grad:
            return None
        return pack(self.codes().round().to(torch.uint8), self.bits, self.group_size)

    @torch.no_grad()
    def stored(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as they are stored, float16 ``(out_features, groups)``."""
        return storable(self.log_scale.exp(), self.zero_point)


_INSIDE = 0.49  # how far a code's position may be from the code


class _TrainableLinear(nn.Module):
    """Stands for a quantized linear while its parameters are trained."""

    def __init__(self, layer: QuantizedLinear, ranges: TrainableRanges | None, weight: TrainableWeight | None):
        super().__init__()
        self.layer, self.ranges, self.weight = layer, ranges, weight
        self.is_masked = self.timestep = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.ranges is not None:
            x = self.ranges(x, self.is_masked, self.timestep)
        elif self.layer.activation_bits < 16:
            x = straight_through(x, lambda x: self.layer.quantized_input(x))
        return F.linear(x, self.layer.weight() if self.weight is None else self.weight(), self.layer.bias)


class TrainableLayers:
    """While it is entered (``with``), a quantized model computes with trainable quantization parameters.

    Args:
        quantized: the model.
        ranges: layer name to the static ranges of its input; layers that share an input share the object. None of
            them where activations aren't quantized, or dynamically.
        weights: layer name to its weight; the other layers' stay as they are.
    """

    def __init__(
        self, quantized: DiffusionLM, ranges: Mapping[str, TrainableRanges], weights: Mapping[str, TrainableWeight]
    ):
        self.quantized = quantized
        self.layers = {n: m for n, m in quantized.model.named_modules() if isinstance(m, QuantizedLinear)}
        self.trained = {n: _TrainableLinear(m, ranges.get(n), weights.get(n)) for n, m in self.layers.items()}

    def __enter__(self) -> Self:
        self._put(self.trained)
        return self

    def __exit__(self, *_: object) -> None:
        self._put(self.layers)

    def _put(self, layers: Mapping[str, nn.Module]) -> None:
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.quantized.model.get_submodule(parent), child, layer)


def _without_mask_token(logits: Tensor, mask_token_id: int) -> Tensor:
    return logits.index_fill(-1, torch.tensor([mask_token_id]), NO_PROBABILITY)


class TransitionLoss(TrainableLayers):
    """Path KL as a function of trainable quantization parameters.

    Args:
        reference: the full-precision model.
        quantized: the other model.
        timesteps: ``T`` of the states.
        ranges, weights: see ``TrainableLayers``.
    """

    def __init__(
        self,
        reference: DiffusionLM,
        quantized: DiffusionLM,
        timesteps: int,
        ranges: Mapping[str, TrainableRanges],
        weights: Mapping[str, TrainableWeight] = MappingProxyType({}),
    ):
        super().__init__(quantized, ranges, weights)
        self.reference, self.timesteps = reference, timesteps

    def targets(self, states: States) -> Tensor:
        """The full-precision log-probabilities at the masked positions, float32 ``(masked, vocabulary)``."""
        return self.reference.logits(states.ids, states.is_masked).log_softmax(-1)

    def log_probabilities(self, states: States) -> Tensor:
        """The quantized model's, with gradients."""
        lm = self.quantized
        for layer in self.trained.values():
            step = states.timestep * layer.layer.timesteps // self.timesteps
            layer.is_masked = states.ids == lm.mask_token_id
            layer.timestep = step[:, None].expand_as(states.ids)
        logits = lm.model.lm_head(lm.model.hidden(states.ids)[states.is_masked])
        return _without_mask_token(logits, lm.mask_token_id).log_softmax(-1)

    def __call__(self, states: States, targets: Tensor) -> Tensor:
        """Path KL estimated on states of any timesteps, nats per sequence."""
        divergence = (targets.exp() * (targets - self.log_probabilities(states))).sum(-1)
        rho = unmask_probabilities(self.timesteps).float()
        weight = self.timesteps * rho[states.timestep][:, None].expand_as(states.is_masked)[states.is_masked]
        return (weight * divergence).sum() / len(states.ids)


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
        sizes = torch.tensor([float(len(part.ids)) for part in self.parts])
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
        chosen = torch.rand(self.ids.shape, generator=self.generator) < rho[:, None]
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


_SNAPSHOT_STEPS = 50  # between two snapshots, some 20 seconds of the reference model


def fit_to_path_kl(
    loss: TransitionLoss,
    rates: Mapping[nn.Parameter, float],
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
        steps: Adam steps, the learning rates falling linearly to zero.
        penalty: what is added to path KL, a function of the parameters.
        snapshot: where to go on from, and what to keep up to date; None for neither.
        progress: label of a progress bar; None for none.

    Returns:
        The loss of each step, without the penalty: path KL estimated on its batch, nats per sequence, summed over
        lengths.
    """
    optimizer, schedule = descent(rates, steps)
    state = snapshot.load() if snapshot else {}
    losses = _restore(state, optimizer, schedule, list(rates), draws) if state else []
    done = range(len(losses), steps)
    with torch.enable_grad(), loss:
        for step in tqdm(done, desc=progress, initial=len(losses), total=steps, disable=progress is None, leave=False):
            value = torch.stack([loss(states, targets) for states, targets in draws.step()]).sum()
            optimizer.zero_grad(set_to_none=True)
            (value + penalty()).backward()
            optimizer.step()
            schedule.step()
            losses.append(value.item())
            if snapshot and ((step + 1) % _SNAPSHOT_STEPS == 0 or step + 1 == steps):
                snapshot.save(_training_state(optimizer, list(rates), draws, losses))
    return losses


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
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    parameters: Sequence[nn.Parameter],
    draws: Draws,
) -> list[float]:
    """Put back what ``_training_state`` returned; the losses so far."""
    for number, parameter in enumerate(parameters):
        with torch.no_grad():
            parameter.copy_(state[f"parameter.{number}"])
        optimizer.state[parameter] = part_of(state, f"moment.{number}")
    for group, lr in zip(optimizer.param_groups, state["lr"].tolist(), strict=True):
        group["lr"] = lr
    losses = state["losses"].tolist()
    schedule.load_state_dict({"last_epoch": len(losses)})
    draws.restore(part_of(state, "draws"))
    return losses


def token_importance(
    reference: DiffusionLM, calibration: Calibration, names: Sequence[str], seed: int, progress: str | None = None
) -> dict[str, list[Tensor]]:
    """What a token's error in a module's output costs in path KL, to second order.

    Path KL is half a quadratic form in a small error, with the Fisher information of the distributions at the masked
    positions, each weighted with its step's ``rho``. Its diagonal is estimated by the squared gradients of the
    log-probabilities of tokens drawn from these distributions, and averaged over the channels of a token. For an
    autoregressive loss: GuidedQuant, arXiv 2505.07004.

    Args:
        reference: the full-precision model.
        calibration: the states.
        names: modules whose output is a tensor ``(states, length, channels)``.
        seed: seeds the drawn tokens.
        progress: label of a progress bar; None for none.

    Returns:
        Name to one float32 ``(states, length)`` for each part of the calibration.
    """
    generator = torch.Generator().manual_seed(seed)
    model, rho = reference.model, unmask_probabilities(calibration.timesteps)
    found = {name: [torch.zeros(part.ids.shape) for part in calibration.parts] for name in names}
    at: tuple[int, Tensor] = (0, torch.empty(0))

    def keep(name: str, gradient: Tensor) -> None:
        found[name][at[0]][at[1]] = gradient.square().mean(-1)

    def watch(name: str, output: Tensor) -> None:
        output.register_hook(lambda gradient: keep(name, gradient))

    handles = [model.model.embed_tokens.register_forward_hook(lambda _, inputs, output: output.requires_grad_())]
    handles += [
        model.get_submodule(name).register_forward_hook(lambda _, inputs, output, name=name: watch(name, output))
        for name in names
    ]
    try:
        with torch.enable_grad():
            work = list(calibration.batches())
            for number, timestep, rows in tqdm(work, desc=progress, disable=progress is None, leave=False):
                at, part = (number, rows), calibration.parts[number]
                logits = model.lm_head(model.hidden(part.ids[rows])[part.is_masked[rows]])
                if not len(logits):
                    continue
                log_p = _without_mask_token(logits, reference.mask_token_id).log_softmax(-1)
                drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
                weight = float(calibration.timesteps * rho[timestep]) ** 0.5
                (weight * log_p.gather(-1, drawn).sum()).backward()
    finally:
        for handle in handles:
            handle.remove()
    return found

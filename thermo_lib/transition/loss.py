"""Path KL as a loss of trainable quantization parameters, and what a token's error costs in it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from thermo_lib.diffusion.sampling import unmask_probabilities
from thermo_lib.diffusion.states import Calibration, States
from thermo_lib.diffusion.tokens import sample_tokens
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.quant.calls import CALL, denoising
from thermo_lib.transition.blocks import states_at_a_time
from thermo_lib.transition.parameters import FixedWeight, TrainableLayers, TrainableRanges, TrainableWeight

_AGAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn


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
        weights: Mapping[str, TrainableWeight | FixedWeight] = MappingProxyType({}),
    ):
        super().__init__(quantized, ranges, weights)
        self.reference, self.timesteps = reference, timesteps

    def targets(self, states: States) -> Tensor:
        """The full-precision log-probabilities at the masked positions, float32 ``(masked, vocabulary)``."""
        shape = int(states.is_masked.sum()), self.reference.model.config.vocab_size
        found = torch.empty(shape, dtype=torch.float32, device=states.ids.device)
        left = found
        for logits in self.reference.logit_parts(states.ids, states.is_masked):
            left[: len(logits)], left = logits.log_softmax(-1), left[len(logits) :]
        return found

    def log_probabilities(self, states: States) -> Tensor:
        """The quantized model's, float32 with gradients."""
        return self._log_probabilities(self._hidden(states))

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        """The quantized model's from states at masked positions, ``(n, hidden)`` to ``(n, vocabulary)``."""
        return self.quantized.token_logits(self.quantized.model.predict(hidden)).log_softmax(-1)

    def _hidden(self, states: States) -> Tensor:
        """The states from which the quantized model's head predicts at the masked positions, ``(masked, hidden)``."""
        with denoising(CALL.step, rows=(states.timestep, self.timesteps)):
            return self.quantized.model.hidden(states.ids)[states.is_masked]

    def _divergences(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The divergence at each masked position, ``(n,)``; arguments ``(n, hidden)`` and ``(n, vocabulary)``."""
        return (targets.exp() * (targets - self._log_probabilities(hidden))).sum(-1)

    def __call__(self, states: States, targets: Tensor) -> Tensor:
        """Path KL estimated on states of any timesteps, nats per sequence.

        With a large vocabulary some positions' logits are held at a time, and computed again on the way back.
        """
        hidden, rows = self._hidden(states), self.reference.rows_at_a_time
        if len(hidden) <= rows:
            divergence = self._divergences(hidden, targets)
        else:
            parts = zip(hidden.split(rows), targets.split(rows), strict=True)
            divergence = torch.cat([checkpoint(self._divergences, *part, **_AGAIN) for part in parts])
        rho = unmask_probabilities(self.timesteps).float().to(states.ids.device)
        weight = self.timesteps * rho[states.timestep][:, None].expand_as(states.is_masked)[states.is_masked]
        return (weight * divergence).sum() / len(states.ids)


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
    model, rho = reference.model, unmask_probabilities(calibration.timesteps).tolist()
    calibration = calibration.to(model.device)
    found = {name: [torch.zeros_like(part.ids, dtype=torch.float32) for part in calibration.parts] for name in names}
    at: tuple[int, Tensor] = (0, torch.empty(0, dtype=torch.int64))

    def keep(name: str, gradient: Tensor) -> None:
        found[name][at[0]][at[1]] = gradient.float().square().mean(-1)  # in float16 the square would be lost

    def watch(name: str, output: Tensor) -> None:
        output.register_hook(lambda gradient: keep(name, gradient))

    embeddings = model.get_submodule(model.parts.embeddings)
    handles = [embeddings.register_forward_hook(lambda _, inputs, output: output.requires_grad_())]
    handles += [
        model.get_submodule(name).register_forward_hook(lambda _, inputs, output, name=name: watch(name, output))
        for name in names
    ]
    try:
        with torch.enable_grad():
            work = list(calibration.batches(states_at_a_time(reference, calibration)))
            for number, timestep, rows in tqdm(work, desc=progress, disable=progress is None, leave=False):
                at, part = (number, rows), calibration.parts[number]
                hidden = model.hidden(part.ids[rows])[part.is_masked[rows]]
                if not len(hidden):
                    continue
                states = hidden.detach().requires_grad_()
                uniform = torch.rand(len(hidden), generator=generator, dtype=torch.float32).to(hidden.device)
                weight = (calibration.timesteps * rho[timestep]) ** 0.5
                size = reference.rows_at_a_time
                for some, numbers in zip(states.split(size), uniform.split(size), strict=True):
                    log_p = reference.token_logits(model.predict(some)).log_softmax(-1)
                    drawn = sample_tokens(log_p.detach(), 1.0, numbers)[0][:, None]
                    (weight * log_p.gather(-1, drawn).sum()).backward()
                hidden.backward(states.grad)
    finally:
        for handle in handles:
            handle.remove()
    return found

"""Path KL as a loss of trainable quantization parameters, and what a token's error costs in it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from tqdm import tqdm

from thermo_lib.diffusion.sampling import sample_tokens, unmask_probabilities
from thermo_lib.diffusion.states import Calibration, States
from thermo_lib.models.lm import DiffusionLM, token_logits
from thermo_lib.transition.parameters import TrainableLayers, TrainableRanges, TrainableWeight


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
        """The quantized model's, float32 with gradients."""
        lm = self.quantized
        for layer in self.trained.values():
            step = states.timestep * len(layer.layer.row_of_step) // self.timesteps
            layer.is_masked = states.ids == lm.mask_token_id
            layer.timestep = step[:, None].expand_as(states.ids)
        logits = lm.model.lm_head(lm.model.hidden(states.ids)[states.is_masked])
        return token_logits(logits, lm.mask_token_id).log_softmax(-1)

    def __call__(self, states: States, targets: Tensor) -> Tensor:
        """Path KL estimated on states of any timesteps, nats per sequence."""
        divergence = (targets.exp() * (targets - self.log_probabilities(states))).sum(-1)
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
                log_p = token_logits(logits, reference.mask_token_id).log_softmax(-1)
                uniform = torch.rand(len(log_p), generator=generator, dtype=torch.float32).to(log_p.device)
                drawn = sample_tokens(log_p.detach(), 1.0, uniform)[0][:, None]
                weight = (calibration.timesteps * rho[timestep]) ** 0.5
                (weight * log_p.gather(-1, drawn).sum()).backward()
    finally:
        for handle in handles:
            handle.remove()
    return found

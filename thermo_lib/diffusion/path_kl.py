"""Path KL: how far the quantized denoising process is from the full-precision one.

Denoising is a Markov chain. One step of the ancestral sampler fills each masked position independently with
probability ``rho_i = 1 - s_i/t_i`` from the model's distribution there, so the KL divergence of a transition is
``rho_i`` times the sum of the positions' divergences, and by the chain rule the divergence between the two
processes is the sum over steps, the states drawn from the full-precision process:

    pathKL = sum_i rho_i E[ sum_{masked j} KL(p_j || q_j) ]        (nats per sequence)

On the states of the full-precision model's own ancestral trajectories this is an unbiased estimate of the
divergence; on masked held-out text it is a proxy."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from thermo_lib.diffusion.sampling import unmask_probabilities
from thermo_lib.diffusion.states import States
from thermo_lib.models.lm import DiffusionLM


@dataclass(frozen=True)
class PathKLEstimate:
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
    """The full-precision logits at the masked positions of each batch of states, to compare several models with.

    Each is float32 ``(masked, vocabulary)``, see ``DiffusionLM.logits``.
    """
    outputs = []
    states = states.to(lm.device)
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
) -> PathKLEstimate:
    """Path KL from the full-precision to the quantized process.

    Args:
        reference: the full-precision model.
        quantized: the other model.
        states: the full-precision model's ``trajectory_states``: every sequence at every timestep, in order.
        timesteps: ``T``.
        reference_outputs: what ``reference_logits`` returned for the same states and batch size; None computes them
            again, a part at a time.
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
    states = states.to(quantized.device)
    writable = quantized.writable.to(states.ids.device)
    rho = unmask_probabilities(timesteps).tolist()
    kl = torch.zeros((sequences, timesteps), dtype=torch.float64, device=states.ids.device)
    cosine = torch.full_like(kl, torch.nan)
    seen = [0] * timesteps
    batches = list(states.batches(batch_size))
    for number, (timestep, rows) in enumerate(tqdm(batches, desc=progress, disable=progress is None, leave=False)):
        for lm in (reference, quantized):
            lm.set_timestep(timestep, timesteps)
        is_masked = states.is_masked[rows]
        if reference_outputs is None:
            p_parts = reference.logit_parts(states.ids[rows], is_masked)
        else:
            p_parts = reference_outputs[number].split(quantized.rows_at_a_time)
        divergences, similarities = [], []
        for p_logits, q_logits in zip(p_parts, quantized.logit_parts(states.ids[rows], is_masked), strict=True):
            log_p, log_q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
            similarities.append(_cosine(p_logits, q_logits, writable))
        divergence, similarity = torch.cat(divergences), torch.cat(similarities)
        index = slice(seen[timestep], seen[timestep] + len(rows))
        seen[timestep] += len(rows)
        kl[index, timestep] = rho[timestep] * _row_sums(divergence, is_masked)
        cosine[index, timestep] = _row_sums(similarity, is_masked) / is_masked.sum(1)
    return PathKLEstimate(kl.cpu(), cosine.cpu())


def _row_sums(values: Tensor, is_masked: Tensor) -> Tensor:
    """Sum values given at the masked positions, row by row."""
    return torch.zeros_like(is_masked, dtype=torch.float64).masked_scatter(is_masked, values.double()).sum(1)


def _cosine(a: Tensor, b: Tensor, writable: Tensor) -> Tensor:
    """Cosine similarity of centred logits ``(n, vocabulary)`` of the ids that may be written."""
    a, b = (x.index_select(1, writable) for x in (a, b))
    return torch.cosine_similarity(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True), dim=-1)

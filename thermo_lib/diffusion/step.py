"""One denoising step of some rows: what is open is predicted, and the surest of it filled."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from thermo_lib.diffusion.rules import TokenRules
from thermo_lib.diffusion.schedule import Schedule
from thermo_lib.diffusion.tokens import Sampling, confidence, sample_tokens
from thermo_lib.models.checks import LateChecks
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.quant.calls import CALL, denoising

LogitsHook = Callable[[int, Tensor, Tensor], Tensor]
TokensHook = Callable[[int | None, Tensor, Tensor | None], Tensor]
Parts = Callable[[Tensor], Iterable[Tensor]]
_CACHED = 2**20  # logits


@dataclass(frozen=True)
class Batch:
    """Some rows of a generation, and how they are filled.

    Attributes:
        lm: the model.
        sampling, rules: how tokens and positions are chosen.
        schedule: of the rows.
        rates: a block's number of steps to the share of its open positions that each step fills, float64 ``(steps,)``.
        start: bool ``(batch, length)``, the positions to fill.
        is_text: bool ``(batch, length)``, where there is no padding; None where there is none, which is faster.
        on_logits, on_tokens: the hooks.
        late: checks of the last step's logits, which the next one asks for, so that a GPU isn't waited for meanwhile.
    """

    lm: DiffusionLM
    sampling: Sampling
    rules: TokenRules
    schedule: Schedule
    rates: Mapping[int, Tensor]
    start: Tensor
    is_text: Tensor | None
    on_logits: LogitsHook | None = None
    on_tokens: TokensHook | None = None
    late: LateChecks = field(default_factory=LateChecks)

    def __getitem__(self, rows: slice | Tensor) -> "Batch":
        is_text = None if self.is_text is None else self.is_text[rows]
        return replace(self, schedule=self.schedule[rows], start=self.start[rows], is_text=is_text)

    def step(self, x: Tensor, timestep: int, uniform: Tensor) -> Tensor:
        """The ids ``(batch, length)`` after a step; ``uniform`` is ``(2, batch, length)``, for positions and tokens."""
        is_left = self.left(x)
        is_open, rate = self.opened(is_left, timestep)
        if self.on_logits is not None or self.on_tokens is not None:
            with self._told(is_left, timestep):
                everywhere = self.lm.logits(x, torch.ones_like(is_open), self.is_text).unflatten(0, x.shape)
            if self.on_logits is not None:
                everywhere = same_shape("on_logits", self.on_logits(timestep, x, everywhere), everywhere)
            x = self.filled(x, lambda places: [everywhere.flatten(0, 1)[places]], is_open, rate, uniform)
            self.late.finish()
            return x if self.on_tokens is None else same_shape("on_tokens", self.on_tokens(timestep, x, everywhere), x)
        if self.sampling.threshold is not None or self.rules.stop_at_end:
            rows = is_open.any(1).nonzero().flatten()  # the others are finished
            if not len(rows):
                return x
            if len(rows) < len(x):
                return x.index_copy(0, rows, self[rows].step(x[rows], timestep, uniform[:, rows]))
        with self._told(is_left, timestep):
            logits = partial(self.lm.logit_parts, x, attention_mask=self.is_text, late=self.late)
            return self.filled(x, logits, is_open, rate, uniform)

    def left(self, x: Tensor) -> Tensor:
        """Where a position is still masked, bool ``(batch, length)``."""
        is_masked = x == self.lm.mask_token_id
        return is_masked if self.is_text is None else is_masked & self.is_text

    def opened(self, is_left: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """The positions of each row's block, bool ``(batch, length)``, and the share to fill, float64 ``(batch,)``."""
        schedule = self.schedule
        if self.sampling.threshold is None and not schedule.is_divided:
            return is_left, self.rates[schedule.timesteps][timestep].expand(len(is_left))
        if self.sampling.threshold is None:
            block, step, steps = schedule.at(timestep)
            rate = torch.zeros_like(block, dtype=torch.float64)
            for count, rates in self.rates.items():
                rate = torch.where(steps == count, rates[step.clamp(max=count - 1)], rate)
        else:
            block = torch.where(is_left, schedule.block, schedule.timesteps).amin(1)
            rate = 1 / (schedule.start(block + 1) - timestep).clamp(min=1).double()
        return is_left & (schedule.block <= block[:, None]), rate

    @contextmanager
    def _told(self, is_left: Tensor, timestep: int) -> Iterator[None]:
        """While it is entered (``with``), time-aware layers compute for the timestep that belongs to each row."""
        if not self.schedule.is_divided and self.sampling.threshold is None:
            yield
            return
        told = self.schedule.told(timestep, is_left.sum(1), follows=self.sampling.threshold is None)
        with computing_for(self.lm, told, timestep, self.schedule.timesteps):
            yield

    def filled(self, x: Tensor, parts: Parts, is_open: Tensor, rate: Tensor, uniform: Tensor) -> Tensor:
        """Fill a share of the open positions.

        A GPU is waited for once, before the pass; then it is asked for all the rest of the step.

        Args:
            x: ids ``(batch, length)``.
            parts: given the open positions' places, computes their logits, each part ``(n, vocabulary)``.
            is_open: bool ``(batch, length)``.
            rate: the share, float64 ``(batch,)``.
            uniform: see ``step``.
        """
        sampling, rules = self.sampling, self.rules
        (for_position, for_token), is_first = uniform, self.start & (self.start.cumsum(1) == 1)
        places = self.late.places(is_open)
        if not len(places):
            return x
        tokens: list[Tensor] = []
        scores: list[Tensor] = []
        done = 0
        for logits in (some for part in parts(places) for some in _in_cache(part)):
            at = places[done : done + len(logits)]
            done += len(logits)
            logits = rules.rule_out(logits, is_first.flatten()[at])
            how = sampling.temperature, for_token.flatten()[at], sampling.top_p, sampling.top_k
            found, probabilities = sample_tokens(logits, *how, late=self.late)
            tokens.append(found)
            if sampling.sampler == "low_confidence":  # what the model says of the token, however it was drawn
                probabilities = logits.float().softmax(-1)
            if sampling.sampler != "origin":
                score = confidence(sampling.sampler, found, probabilities)
                scores.append(score.masked_fill(rules.is_end(found), -torch.inf) if rules.end_last else score)
        filled = x.flatten().index_copy(0, places, torch.cat(tokens)).view_as(x)
        if sampling.sampler == "origin":
            chosen = is_open & (for_position < rate.float()[:, None])
        else:
            score = torch.full((is_open.numel(),), -torch.inf, dtype=torch.float32, device=is_open.device)
            score = score.index_copy(0, places, torch.cat(scores)).view(is_open.shape)
            chosen = self._surest(score, is_open, rate, for_position)
        x = torch.where(chosen, filled, x)
        return rules.ended(x, self.start, self.left(x)) if rules.stop_at_end else x

    def _surest(self, score: Tensor, is_open: Tensor, rate: Tensor, uniform: Tensor) -> Tensor:
        """The positions to fill of those that are open, by their confidence; all are ``(batch, length)``."""
        sampling = self.sampling
        if sampling.alg_temp:  # Gumbel top-k draws positions without replacement, by softmax(score / alg_temp)
            score = score / sampling.alg_temp - (-uniform.clamp(1e-20, 1 - 1e-7).log()).log()
        # However unsure, an open position comes before one that isn't, so that the number that is filled stays.
        score = score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~is_open, -torch.inf)
        order = score.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        still_open = is_open.sum(1)
        count = _scheduled(still_open, rate, early=sampling.sampler == "low_confidence")
        if sampling.threshold is not None:
            count = _scheduled(still_open, rate, early=True)
            count = torch.maximum(count, (score > sampling.threshold).sum(1))
        return is_open & (rank < count[:, None])


@contextmanager
def computing_for(lm: DiffusionLM, told: Sequence[int], timestep: int, timesteps: int) -> Iterator[None]:
    """While it is entered (``with``), time-aware layers compute for a timestep of each row; then for that of the run.

    Args:
        lm: the model.
        told: a timestep for each row that is run, or a single one for all.
        timestep, timesteps: of the run.
    """
    if len(set(told)) > 1:
        with denoising(CALL.step, rows=(torch.tensor(told), timesteps)):
            yield
    else:
        lm.set_timestep(told[0], timesteps)
        yield
        lm.set_timestep(timestep, timesteps)


def _scheduled(still_open: Tensor, rate: Tensor, *, early: bool) -> Tensor:
    """How many of the open positions are filled; LLaDA fills what can't be divided equally early, Dream late."""
    share = still_open.double() * rate
    return (share - 1e-9).ceil() if early else (share + 1e-9).floor()


def _in_cache(logits: Tensor) -> Sequence[Tensor]:
    """Rows of logits at a time that a processor's cache holds while they are gone through several times."""
    return logits.split(max(1, _CACHED // logits.shape[-1])) if logits.device.type == "cpu" else (logits,)


def same_shape(hook: str, returned: Tensor, given: Tensor) -> Tensor:
    if not isinstance(returned, Tensor) or returned.shape != given.shape:
        found = tuple(returned.shape) if isinstance(returned, Tensor) else returned
        raise ValueError(f"{hook}: returned {found!r}, expected a tensor of shape {tuple(given.shape)}")
    return returned

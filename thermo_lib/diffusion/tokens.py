"""Which token is drawn at a masked position, and which positions are filled first.

The samplers are those of Dream (arXiv 2508.15487): ``origin`` is ancestral sampling of the reverse process, the next
three fill the positions first that the model is surest of; and of LLaDA (arXiv 2502.09992, section 2.4):
``low_confidence`` predicts all masked tokens and masks those again that it gave the least probability.
"""

from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from thermo_lib.diffusion.schedule import check_count
from thermo_lib.files.reading import is_number
from thermo_lib.models.checks import LateChecks

SAMPLERS = ("origin", "maskgit_plus", "topk_margin", "entropy", "low_confidence")
BY_PROBABILITY = ("maskgit_plus", "low_confidence")  # a position's confidence is the probability of its token


def chosen_sampler(sampler: str | None, threshold: float | None) -> str:
    """The sampler that is asked for; None is ``entropy``, or with a threshold one whose confidence is a probability."""
    if sampler is not None:
        return sampler
    return "entropy" if threshold is None else "low_confidence"


def filter_logits(logits: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """Set logits outside the nucleus of mass ``top_p``, then those outside the ``top_k`` largest, to -inf.

    The nucleus is that of all tokens, as in Dream's sampling loop (arXiv 2508.15487).
    """
    if top_p is not None and top_p < 1:
        logits = logits.masked_fill(_outside_nucleus(logits.softmax(-1), top_p), -torch.inf)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return logits


_LIKELY = 1024  # tokens among which a nucleus is looked for first
_BLOCK = 1024  # tokens whose probabilities are summed before one of them is looked for


def _outside_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Which tokens come after those of mass ``top_p``, bool of the same shape; those as likely as the last are inside.

    A nucleus is small as a rule, and to sort a large vocabulary takes as long as a block of the model. On a CPU numbers
    are sorted alone, without their places, which takes a tenth of the time.
    """
    likeliest = probabilities.topk(min(_LIKELY, probabilities.shape[-1])).values
    if not (likeliest.sum(-1) > top_p).all():
        if probabilities.device.type == "cpu":
            likeliest = torch.from_numpy(np.sort(probabilities.numpy(), -1)).flip(-1)
        else:
            likeliest = probabilities.sort(-1, descending=True).values
    inside = (likeliest.cumsum(-1) - likeliest <= top_p).sum(-1, keepdim=True)
    return probabilities < likeliest.gather(-1, inside - 1)


def sample_tokens(
    logits: Tensor,
    temperature: float,
    uniform: Tensor,
    top_p: float | None = None,
    top_k: int | None = None,
    *,
    late: LateChecks | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token a row, by inverting the cumulative distribution.

    Args:
        logits: ``(n, vocabulary)``; what a hook made of them may be of less than float32.
        temperature: 0 takes the likeliest token.
        uniform: ``(n,)`` random numbers in [0, 1).
        top_p, top_k: nucleus and top-k filters; None for no filter.
        late: takes the check of the logits; None makes it at once.

    Returns:
        ``(tokens (n,) int64, probabilities (n, vocabulary))``, the probabilities after temperature and filters.

    Raises:
        ValueError: a row has no finite largest logit, so that it has no probabilities.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature > 0:
        logits = logits / temperature
    _check_choice(logits, temperature, late)
    probabilities = filter_logits(logits, top_p, top_k).float().softmax(-1)
    if temperature == 0:
        return probabilities.argmax(-1), probabilities
    return _drawn(probabilities, uniform), probabilities


def _drawn(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Where the cumulative distribution of each row passes a number in [0, 1), int64 ``(n,)``, in float64.

    It is looked for among blocks of tokens first, then in one of them, so that a row's cumulative distribution isn't
    written: that takes a GPU as long as all else of a step beside the model.
    """
    size = probabilities.shape[1]
    end = size - size % _BLOCK
    blocks = [probabilities[:, :end].unflatten(1, (end // _BLOCK, _BLOCK)), probabilities[:, None, end:]]
    sums = torch.cat([some.sum(-1, dtype=torch.float64) for some in blocks if some.shape[1] * some.shape[2]], 1)
    cumulative = sums.cumsum(1)
    number = uniform.double()[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, number, right=True).clamp(max=sums.shape[1] - 1)
    places = block * _BLOCK + torch.arange(_BLOCK, device=block.device)
    inside = probabilities.gather(1, places.clamp(max=size - 1)).double().cumsum(1)  # the last token's may be repeated
    # Sums are rounded, and mustn't leave the number behind the last token, or at one without probability.
    number = (number - (cumulative - sums).gather(1, block)).clamp(min=0)
    number = torch.minimum(number, inside[:, -1:] * (1 - 2**-53))
    return (block * _BLOCK + torch.searchsorted(inside, number, right=True)).squeeze(1).clamp(max=size - 1)


def _check_choice(logits: Tensor, temperature: float, late: LateChecks | None) -> None:
    """Refuse rows without a distribution: softmax makes NaN of them, and a search in NaN finds the last token."""
    largest = logits.amax(-1)  # NaN if there is any

    def problem() -> str:
        found = largest[~largest.isfinite()][0].item()
        allowed = "allowed is a finite one, -inf only for tokens that are ruled out"
        return (
            f"logits: found a row whose largest is {found} at temperature {temperature:g}, after on_logits; {allowed}"
        )

    checks = late or LateChecks()
    checks.add((largest.abs() < torch.inf).all(), problem)
    if late is None:
        checks.finish()


def confidence(sampler: str, tokens: Tensor, probabilities: Tensor) -> Tensor:
    """How sure the model is of each row, by the rule of the sampler; larger is surer. Shape ``(n,)``."""
    if sampler in BY_PROBABILITY:
        return probabilities.gather(-1, tokens[:, None]).squeeze(-1)
    if sampler == "topk_margin":
        top = probabilities.topk(2).values
        return top[:, 0] - top[:, 1]
    return (probabilities * probabilities.clamp(min=1e-10).log()).sum(-1)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn, and which positions are filled first; the arguments of ``generate`` of these names.

    An ``alg_temp`` of None becomes 0, which is what it means in Dream's sampling loop.

    Raises:
        ValueError: unknown sampler or a value out of range.
    """

    sampler: str
    temperature: float
    top_p: float | None
    top_k: int | None
    alg_temp: float | None
    threshold: float | None = None

    @property
    def is_random(self) -> bool:
        """Whether tokens or positions are drawn."""
        return self.temperature > 0 or bool(self.alg_temp) or self.sampler == "origin"

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler: found {self.sampler!r}, allowed are {', '.join(SAMPLERS)}")
        if self.alg_temp is None:
            object.__setattr__(self, "alg_temp", 0.0)  # frozen
        for name in ("temperature", "alg_temp"):
            found: float = getattr(self, name)
            if not (is_number(found) and found >= 0):
                raise ValueError(f"{name}: found {found!r}, allowed is at least 0 and finite")
        if self.top_p is not None and not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p: found {self.top_p!r}, allowed is above 0 and at most 1")
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.threshold is None:
            return
        if not (isinstance(self.threshold, Real) and 0 < self.threshold <= 1):
            raise ValueError(f"threshold: found {self.threshold!r}, allowed is above 0 and at most 1")
        if self.sampler not in BY_PROBABILITY:
            allowed = f"allowed with a threshold are {', '.join(BY_PROBABILITY)}, whose confidence is a probability"
            raise ValueError(f"sampler: found {self.sampler!r}, {allowed}")
        if self.alg_temp:
            raise ValueError(f"alg_temp: found {self.alg_temp!r}, allowed with a threshold is 0: no position is drawn")

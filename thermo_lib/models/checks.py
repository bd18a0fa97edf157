"""Checks of numbers that a device is still computing."""

from collections.abc import Callable

import torch
from torch import Tensor


class LateChecks:
    """Checks whose outcomes are asked for together: a GPU is waited for once, not at each of them."""

    def __init__(self) -> None:
        self._checks: list[tuple[Tensor, Callable[[], str]]] = []

    def add(self, is_right: Tensor, problem: Callable[[], str]) -> None:
        """Note a check.

        Args:
            is_right: bool, a single number.
            problem: says what is wrong, if something is.
        """
        self._checks.append((is_right, problem))

    def places(self, flags: Tensor) -> Tensor:
        """Where flags are True, which waits for a device, and ask for the outcomes with it.

        Args:
            flags: bool, any shape.

        Returns:
            int64 ``(n,)``, the places in ``flags.flatten()``.

        Raises:
            ValueError: the problem of the first check since the last time that found one.
        """
        if self._checks:  # after a problem no place is left: only then, or where there is none, are checks looked at
            flags = flags & torch.stack([is_right for is_right, _ in self._checks]).all()
        found = flags.flatten().nonzero().flatten()
        if len(found):
            self._checks.clear()
        else:
            self.finish()
        return found

    def finish(self) -> None:
        """Ask for the outcomes of the checks since the last time.

        Raises:
            ValueError: the problem of the first check that found one.
        """
        checks, self._checks = self._checks, []
        if checks and not torch.stack([is_right for is_right, _ in checks]).all():
            raise ValueError(next(problem() for is_right, problem in checks if not is_right))


def check_logits(logits: Tensor, late: LateChecks | None = None) -> None:
    """Refuse logits, any shape, that are NaN or infinite: no token could be told from another.

    Args:
        logits: of a model's head.
        late: takes the check; None makes it at once.

    Raises:
        ValueError: they are, if the check is made at once.
    """
    if not logits.numel():
        return
    low, high = logits.detach().aminmax()  # NaN if there is any; two numbers, where ``isfinite`` takes memory
    dtype = logits.dtype  # the check mustn't hold the logits until it is asked for

    def problem() -> str:
        return (
            f"logits: found {'NaN' if low.isnan() else 'infinity'} in {dtype}, expected finite numbers; float16 "
            "overflows beyond 65504, load the model with dtype bfloat16 or float32 then"
        )

    checks = late or LateChecks()
    checks.add((low.abs() < torch.inf) & (high.abs() < torch.inf), problem)
    if late is None:
        checks.finish()

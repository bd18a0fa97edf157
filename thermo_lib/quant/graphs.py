"""CUDA graphs: a function of tensors, recorded once and replayed without Python's launches between its kernels."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found", bound=Tensor | tuple[Tensor, ...])
_WARM_UP = 3  # calls before one is recorded, in which kernels are compiled, checked and chosen


def captured(function: Callable[..., Found], *given: Tensor) -> Callable[..., Found]:
    """Record a function on a GPU.

    Args:
        function: of tensors; it doesn't change them, and waits for nothing.
        given: what it is recorded on.

    Returns:
        A function that repeats it on other tensors of these shapes and types. Its result is overwritten by its next
        call.
    """
    held = [tensor.clone() for tensor in given]
    device = held[0].device
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            function(*held)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function(*held)

    return partial(_replay, graph, held, found, function)


def _replay(
    graph: torch.cuda.CUDAGraph, held: Sequence[Tensor], found: Found, function: Callable[..., Found], *given: Tensor
) -> Found:
    """Repeat ``function``, which is held as long as its graph: what the graph reads belongs to it."""
    for mine, other in zip(held, given, strict=True):
        mine.copy_(other)
    graph.replay()
    return found

"""In which precision a GPU multiplies matrices of float32.

TF32 rounds their numbers to 11 bits (bfloat16 has 8) and takes about a sixth of the time. That is enough for a model's
passes; what is fitted to them in closed form is always computed in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FLOAT32, TF32 = "ieee", "tf32"


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """While it is entered (``with``), or while a function that it decorates runs, CUDA's products have a precision.

    Args:
        precision: ``FLOAT32`` or ``TF32``.
    """
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before

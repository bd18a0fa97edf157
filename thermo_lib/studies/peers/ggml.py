"""llama.cpp's block quantization, called in the ``ggml`` library that llama-cpp-python is built with.

The declarations follow ``ggml.h``: ``ggml_quantize_chunk`` writes rows of blocks, and a type's ``to_float`` reads
them back. A block holds everything: codes, scales, super-scales and minima.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

TYPES = {"q2_K": 10, "q3_K": 11, "iq2_xxs": 16, "iq2_xs": 17, "iq2_s": 22}  # enum ggml_type
_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):  # struct ggml_type_traits
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def _library() -> ctypes.CDLL:
    import llama_cpp

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    )
    return library


def round_trip(weight: Tensor, type: str, importance: Tensor | None = None) -> tuple[Tensor, int]:
    """Quantize a weight and read it back.

    Args:
        weight: float32 ``(out_features, in_features)``.
        type: a key of ``TYPES``.
        importance: positive float32 ``(in_features,)``, the columns' weights in the error; None for llama.cpp's own.

    Returns:
        The quantized weight, float32, and the bits of all of its blocks.

    Raises:
        ValueError: rows that blocks don't divide, a missing importance, or a library with another list of types.
    """
    library = _library()
    number = TYPES[type]
    traits = library.ggml_get_type_traits(number).contents
    rows, columns = weight.shape
    if traits.type_name.decode() != type:
        raise ValueError(f"ggml type {number}: found {traits.type_name.decode()!r}, expected {type!r}")
    if columns % traits.blck_size:
        raise ValueError(f"weight: found {columns} columns, allowed are multiples of {traits.blck_size}")
    if importance is None and library.ggml_quantize_requires_imatrix(number):
        raise ValueError(f"importance: found None, required by {type}")
    source = weight.detach().float().contiguous()
    columns_weight = None if importance is None else importance.float().contiguous()
    size = rows * columns // traits.blck_size * traits.type_size
    blocks = torch.empty(size, dtype=torch.uint8)
    written = library.ggml_quantize_chunk(
        number,
        source.data_ptr(),
        blocks.data_ptr(),
        0,
        rows,
        columns,
        None if columns_weight is None else columns_weight.data_ptr(),
    )
    if written != size:
        raise ValueError(f"{type}: found {written} bytes written, expected {size}")
    restored = torch.empty_like(source)
    traits.to_float(blocks.data_ptr(), restored.data_ptr(), restored.numel())
    return restored, size * 8

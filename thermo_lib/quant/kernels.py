"""``kernels.cpp``: products from codes in C++, compiled for this machine at first use."""

import ctypes
import functools
from pathlib import Path


class Packed(ctypes.Structure):
    """A weight whose codes lie plane by plane, as ``kernels.cpp`` has it."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("codes", "scale", "zero_point")],
        *[(name, ctypes.c_int64) for name in ("rows", "groups", "width", "bits")],
    )


class Streams(ctypes.Structure):
    """A trellis-coded weight, as ``kernels.cpp`` has it."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("codes", "first", "places", "shifts", "gains", "values", "scale")],
        *[(name, ctypes.c_int64) for name in ("rows", "bytes", "columns", "groups", "group_size")],
    )


class Ranges(ctypes.Structure):
    """How inputs are quantized, as ``kernels.cpp`` has it; without scales each token in its own range."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("scale", "zero_point")],
        *[(name, ctypes.c_float) for name in ("clip", "smallest")],
        ("bits", ctypes.c_int64),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library; raises RuntimeError without a working compiler."""
    from torch._inductor.codecache import CppCodeCache  # takes a while

    source = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    found = CppCodeCache.load(source, extra_flags=("-ftree-loop-vectorize",))
    pointer, packed, streams = ctypes.c_void_p, ctypes.POINTER(Packed), ctypes.POINTER(Streams)
    found.dequantize.argtypes = [packed, pointer]
    found.read_streams.argtypes = found.read_streams_float.argtypes = [streams, pointer]
    found.can_multiply.restype = found.can_multiply_codes.restype = ctypes.c_bool
    if found.can_multiply():
        found.multiply.argtypes = [packed, pointer, pointer, ctypes.c_int64]
        found.multiply_streams.argtypes = [streams, pointer, pointer, ctypes.c_int64]
        found.multiply_codes.argtypes = [packed, ctypes.POINTER(Ranges), pointer, pointer, ctypes.c_int64]
    return found

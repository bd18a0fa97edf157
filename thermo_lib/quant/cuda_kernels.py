"""Dequantizing trellis-coded weights on an NVIDIA GPU, in CUDA: ``streams.cu``, compiled for the card at first use."""

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thermo_lib.extras import needs
from thermo_lib.quant.trellis import BLOCK_COLUMNS, BlockPlaces, codebook_on, whole_words

driver = needs("cuda.bindings.driver")
nvrtc = needs("cuda.bindings.nvrtc")

_OUT = {torch.float32: "FLOAT", torch.bfloat16: "BFLOAT", torch.float16: "HALF"}
_ALIGNED = 4  # rows of any number of bytes are whole words together
_TYPES = (*[ctypes.c_void_p] * 7, ctypes.c_uint32, *[ctypes.c_int32] * 7)
_LINES = 5  # of what the compiler says


class Tuning(NamedTuple):
    """How the work is spread; the result is the same.

    Attributes:
        threads: of a block of threads, each of which copies the table of values to shared memory.
        resident: blocks of threads that a multiprocessor should have at a time, which limits a thread's registers.
        unrolled: rows that a turn of a thread's loop writes.
        least: rows that a thread writes at least, so that what it reads of its columns pays.
    """

    threads: int = 256
    resident: int = 5
    unrolled: int = 2
    least: int = 4


class Kernel(NamedTuple):
    """What is compiled for a card.

    Attributes:
        function: the driver's handle.
        context: what is current when it is launched.
        threads: of all blocks that the card has at a time.
    """

    function: Any
    context: Any
    threads: int


def _done(result: tuple[Any, ...]) -> Any:
    """What a call returned; raises RuntimeError where it failed."""
    status, *found = result
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {status.name}")
    return found[0] if len(found) == 1 else found


def compiled(options: tuple[str, ...]) -> bytes:
    """The machine code of ``streams.cu``; raises RuntimeError with the first lines of what the compiler says."""
    source = Path(__file__).with_name("streams.cu").read_bytes()
    program = _done(nvrtc.nvrtcCreateProgram(source, b"streams.cu", 0, [], []))
    try:
        given = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
        if int(status) != 0:
            log = b" " * _done(nvrtc.nvrtcGetProgramLogSize(program))
            _done(nvrtc.nvrtcGetProgramLog(program, log))
            said = log.decode(errors="replace").strip("\0 \n").splitlines()[:_LINES]
            raise RuntimeError("; ".join([f"streams.cu: {status.name}", *said]))
        code = b" " * _done(nvrtc.nvrtcGetCUBINSize(program))
        _done(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code


def options(dtype: torch.dtype, is_whole: bool, by_block: bool, tuning: Tuning) -> tuple[str, ...]:
    """The macros that ``streams.cu`` asks for."""
    macros = {"OUT": _OUT[dtype], "WHOLE": int(is_whole), "BY_BLOCK": int(by_block), "THREADS": tuning.threads}
    macros |= {"RESIDENT": tuning.resident, "UNROLLED": tuning.unrolled}
    return tuple(f"-D{name}={value}" for name, value in macros.items())


@functools.cache
def kernel(device: torch.device, dtype: torch.dtype, is_whole: bool, by_block: bool, tuning: Tuning) -> Kernel:
    """The kernel for a card and a kind of weight."""
    properties = torch.cuda.get_device_properties(device)
    architecture = f"--gpu-architecture=sm_{properties.major}{properties.minor}"
    code = compiled((architecture, "-std=c++17", *options(dtype, is_whole, by_block, tuning)))
    context = _done(driver.cuDevicePrimaryCtxRetain(_done(driver.cuDeviceGet(device.index))))
    _done(driver.cuCtxSetCurrent(context))
    function = _done(driver.cuModuleGetFunction(_done(driver.cuModuleLoadData(code)), b"read_streams"))
    resident = _done(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, tuning.threads, 0))
    return Kernel(function, context, max(1, resident) * tuning.threads * properties.multi_processor_count)


def row_stride(rows: int, blocks: int, threads: int, least: int) -> int:
    """Rows from one of a thread's to its next: as many as the threads of a card cover at a time.

    Args:
        rows: of the weight.
        blocks: of columns, in a row.
        threads: that the card has at a time.
        least: rows that a thread writes at least.

    Returns:
        A multiple of 4.
    """
    covered = max(1, threads // blocks // _ALIGNED)
    wanted = max(1, -(-rows // (least * _ALIGNED)))
    return _ALIGNED * min(covered, wanted)


def rows_inside(rows: int, width: int) -> int:
    """The first rows, of ``width`` bytes, of which any three words are inside the stream of all."""
    return max(0, rows - -(-12 // width)) if width else 0


def stream_weight(
    packed: Tensor,
    places: BlockPlaces,
    scale: Tensor,
    group_size: int,
    dtype: torch.dtype,
    tuning: Tuning = Tuning(),  # noqa: B008
) -> Tensor:
    """The dequantized weight of trellis codes, in float32 bit for bit the plain one.

    Args:
        packed: uint8 ``(rows, bytes)`` on a GPU.
        places: of the columns.
        scale: float16 ``(rows, groups)``.
        group_size: number of columns that share a scale.
        dtype: of the result: float32, bfloat16 or float16.
        tuning: how the work is spread.

    Returns:
        ``(rows, in_features)``.

    Raises:
        RuntimeError: the compiler or the driver fails.
    """
    (rows, width), columns, device = packed.shape, places.columns, packed.device
    out = torch.empty((rows, columns), dtype=dtype, device=device)
    blocks, groups = len(places.first), scale.shape[1]
    if not out.numel():
        return out
    size = group_size if groups > 1 else BLOCK_COLUMNS * blocks
    words, scale = whole_words(packed), scale.half().contiguous()
    with torch.cuda.device(device):
        found = kernel(device, dtype, columns % BLOCK_COLUMNS == 0, size % BLOCK_COLUMNS == 0, tuning)
        stride = row_stride(rows, blocks, found.threads, tuning.least)
        tensors = words, places.first, places.offset, places.gain, codebook_on(device), scale, out
        numbers = words.numel(), width, rows, columns, groups, size, stride, rows_inside(rows, width)
        grid = -(-min(stride, rows) * blocks // tuning.threads)
        arguments = (*[tensor.data_ptr() for tensor in tensors], *numbers), _TYPES
        stream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
        _done(driver.cuCtxSetCurrent(found.context))
        _done(driver.cuLaunchKernel(found.function, grid, 1, 1, tuning.threads, 1, 1, 0, stream, arguments, 0))
    return out

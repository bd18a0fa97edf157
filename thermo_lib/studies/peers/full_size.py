"""Data-free quantization at Dream 7B's sizes next to HQQ: ``python -m thermo_lib.studies.peers.full_size``.

Runs in the peers' environment and writes ``reports/full_size.json``, unless it is there. Random normal weights in the
shapes of a block; the methods take turns in one process. ``make peers`` lets the allocator keep freed memory: as glibc
has it by default, HQQ spends most of its time on getting memory from the system, and is three times slower.
"""

import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from thermo_lib.evaluation.report import hardware, table
from thermo_lib.files.locks import locked
from thermo_lib.files.printing import to_its_end
from thermo_lib.files.reading import read_report
from thermo_lib.files.text import write_json
from thermo_lib.notebooks import ROOT, THREADS
from thermo_lib.quant.rounding import least_squares

FULL_SIZE_REPORT = ROOT / "reports" / "full_size.json"
SIZES = {(3584, 3584): 2, (3584, 512): 2, (3584, 18944): 2, (18944, 3584): 1}  # in, out, and how many in a block
ROUNDS = 5
FULL_SIZE_COLUMNS = {
    "method": ("method", "{}"),
    "linear": ("size", "{}"),
    "bpw": ("bits_per_weight", "{:.2f}"),
    "relative squared error": ("error", "{:.4f}"),
    "M weights/s": ("speed", "{:.2f}"),
    "times as fast": ("times_as_fast", "{:.0f}"),
    "error, share of HQQ's": ("error_ratio", "{:.3f}"),
}
Method = Callable[[Tensor], Callable[[], Tensor]]  # quantizes a weight; the result dequantizes it


def _hqq(axis: int) -> Method:
    def run(weight: Tensor) -> Callable[[], Tensor]:
        from hqq.core.quantize import Quantizer

        codes, meta = Quantizer.quantize(weight, nbits=2, group_size=128, axis=axis, device="cpu")
        meta |= {"scale": meta["scale"].half().float(), "zero": meta["zero"].half().float()}
        return lambda: Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})

    return run


def _least_squares(weight: Tensor) -> Callable[[], Tensor]:
    return least_squares(weight, 2, 128).dequantize


FULL_SIZE_METHODS: dict[str, Method] = {
    "thermo_lib least squares": _least_squares,
    "HQQ, axis 1": _hqq(1),
    "HQQ, axis 0": _hqq(0),
}


def measure(in_features: int, out_features: int) -> list[dict[str, Any]]:
    """One row a method: speed over the rounds, and error, on a random weight of this size."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator).mul_(0.02).bfloat16()
    seconds: dict[str, list[float]] = {name: [] for name in FULL_SIZE_METHODS}
    error = {}
    for turn in tqdm(range(ROUNDS), desc=f"{in_features} -> {out_features}", leave=False):
        for name in sorted(FULL_SIZE_METHODS, reverse=bool(turn % 2)):
            start = time.perf_counter()
            dequantize = FULL_SIZE_METHODS[name](weight)
            seconds[name].append(time.perf_counter() - start)
            if not turn:
                exact = weight.float()
                error[name] = ((dequantize() - exact).square().sum() / exact.square().sum()).item()
    return rows_of(f"{in_features} -> {out_features}", weight.numel(), seconds, error)


def rows_of(
    size: str, weights: int, seconds: Mapping[str, Sequence[float]], error: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row a method of the report, from the seconds of each round and the relative squared error."""
    ours, *_ = FULL_SIZE_METHODS
    rows = []
    for name in FULL_SIZE_METHODS:
        row = {"method": name, "size": size, "bits_per_weight": 2.25, "error": error[name]}
        row |= {"seconds": list(seconds[name]), "speed": weights / 1e6 / statistics.median(seconds[name])}
        if name != ours:
            row["times_as_fast"] = statistics.median(a / b for a, b in zip(seconds[name], seconds[ours], strict=True))
            row["error_ratio"] = error[ours] / error[name]
        rows.append(row)
    return rows


def whole_block(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all linears of a block together, from those of each size."""
    numbers = {f"{i} -> {o}": (count, count * i * o) for (i, o), count in SIZES.items()}
    weights = sum(n for _, n in numbers.values())
    seconds: dict[str, list[float]] = {name: [0.0] * ROUNDS for name in FULL_SIZE_METHODS}
    error = dict.fromkeys(FULL_SIZE_METHODS, 0.0)
    for row in rows:
        count, n = numbers[row["size"]]
        seconds[row["method"]] = [a + count * b for a, b in zip(seconds[row["method"]], row["seconds"], strict=True)]
        error[row["method"]] += row["error"] * n / weights
    return rows_of("a block's seven", weights, seconds, error)


@to_its_end
def main() -> None:
    """Measure, write and print."""
    with locked(FULL_SIZE_REPORT, wait=True):
        if not FULL_SIZE_REPORT.is_file():
            torch.set_num_threads(THREADS)
            for method in FULL_SIZE_METHODS.values():
                method(torch.randn(256, 256))  # warms up
            rows = [row for size in SIZES for row in measure(*size)]
            versions = {name: importlib.metadata.version(name) for name in ("hqq", "torch")}
            write_json(
                FULL_SIZE_REPORT, {"rows": rows + whole_block(rows), "versions": versions, "hardware": hardware()}
            )
    print(table(read_report(FULL_SIZE_REPORT, rows={"method": str})["rows"], FULL_SIZE_COLUMNS))


if __name__ == "__main__":
    sys.exit(main())

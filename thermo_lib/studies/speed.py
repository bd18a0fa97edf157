"""``python -m thermo_lib speed``: products from codes against dense bfloat16 ones, on this machine's processor."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thermo_lib.evaluation.report import hardware, versions
from thermo_lib.evaluation.statistics import paired_ratio
from thermo_lib.files.text import write_json
from thermo_lib.quant.backends import set_backend
from thermo_lib.quant.codes import pack
from thermo_lib.quant.input_ranges import DynamicRanges, StaticRanges
from thermo_lib.quant.layers import QuantizedLinear, TrellisLinear
from thermo_lib.quant.planes import compile_linears

DREAM_7B = ((3584, 3584), (3584, 512), (3584, 18944), (18944, 3584))  # in_features, out_features of its linears
SPEED_COLUMNS = {
    "linear": ("linear", "{}"),
    "kernel": ("kernel", "{}"),
    "tokens": ("tokens", "{}"),
    "times dense": ("times_dense", "{:.2f}"),
    "95 %": ("ci", "{0[0]:.2f}..{0[1]:.2f}"),
    "dense, ms": ("dense_ms", "{:.2f}"),
}
PEERS_SPEED_COLUMNS = {
    "method": ("method", "{}"),
    "bpw": ("bits_per_weight", "{:.2f}"),
    "tokens": ("tokens", "{}"),
    "ms": ("ms", "{:.1f}"),
    "times dense": ("times_dense", "{:.2f}"),
    "95 %": ("ci", "{0[0]:.2f}..{0[1]:.2f}"),
    "why not": ("why", "{}"),
}
_SIZE = {"linear": ("linear", "{}")}
GPU_COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "kernels": {name: (name, "{}") for name in ("kernel", "asked", "computed", "linear", "tokens", "right")}
    | {"error": ("error", "{:.5f}")},
    "rows": {"backend": ("backend", "{}")} | SPEED_COLUMNS,
    "forward": {name: (name, "{}") for name in ("model", "graph", "layers", "tokens")}
    | {"ms": ("ms", "{:.2f}"), "times dense": ("times_dense", "{:.2f}")},
    "generation": {
        "model": ("model", "{}"),
        "graph": ("graph", "{}"),
        "seconds": ("seconds", "{:.2f}"),
        "beside": ("beside", "{:.2f}"),
    },
    "quantizers": {"quantizer": ("quantizer", "{}")}
    | _SIZE
    | {"seconds": ("seconds", "{:.2f}"), "weights a second": ("weights_a_second", "{:.3g}")},
    "decoders": {"decoder": ("decoder", "{}")} | _SIZE | {"ms": ("ms", "{:.3f}")},
    "layerwise": {"preset": ("preset", "{}"), "blocks": ("blocks", "{}"), "seconds": ("seconds", "{:.2f}")}
    | {"peak, MiB": ("peak_mib", "{}")},
}
_GROUP = 128
_BITS = 2.17  # of a trellis code, mean


def _planes(in_features: int, out_features: int, **more: Any) -> QuantizedLinear:
    """Two bits in groups of 128, or of the row where it isn't so many times as long; random codes."""
    group_size = _GROUP if in_features % _GROUP == 0 else in_features
    layer = QuantizedLinear(in_features, out_features, bits=2, group_size=group_size, bias=False, **more)
    codes = torch.randint(0, 4, (out_features, in_features), dtype=torch.uint8)
    layer.packed = pack(codes, 2, group_size)
    layer.scale = torch.rand(layer.scale.shape, dtype=torch.float32).add(0.5).div(100).half()
    layer.zero_point = torch.full_like(layer.scale, 1.5)
    return layer


def _static() -> StaticRanges:
    one = torch.ones((1, 1, 1), dtype=torch.float32)
    return StaticRanges(8, 0.03 * one, 128 * one, torch.zeros(1, dtype=torch.int32))


def _trellis(in_features: int, out_features: int) -> TrellisLinear:
    """Random streams of the preset ``best``: 2.17 bits a column, a scale a row."""
    layer = TrellisLinear(in_features, out_features, bits=2, group_size=in_features, bias=False)
    column_bits = torch.full((in_features,), 2, dtype=torch.uint8)
    column_bits[torch.randperm(in_features)[: round((_BITS - 2) * in_features)]] += 1
    width = -(-int(column_bits.sum()) // 8)
    layer.packed = torch.randint(0, 256, (out_features, width), dtype=torch.uint8)
    layer.packed_column_bits = pack(column_bits, 4)
    layer.scale = torch.full_like(layer.scale, 0.02)
    return layer


KERNELS: dict[str, Callable[[int, int], QuantizedLinear]] = {
    "int2 w2a16": _planes,
    "int2 w2a8 dynamic": lambda *size: _planes(*size, input_quantizer=DynamicRanges(8)),
    "int2 w2a8 static": lambda *size: _planes(*size, input_quantizer=_static()),
    "trellis": _trellis,
}


@torch.no_grad()
def kernel_speeds(
    sizes: Sequence[tuple[int, int]] = DREAM_7B,
    tokens: Sequence[int] = (1, 32, 256, 2048),
    *,
    kernels: Sequence[str] = tuple(KERNELS),
    backend: str = "compiled",
    device: torch.device | str = "cpu",
    rounds: int = 15,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Time a linear from codes against the dense bfloat16 product of the same size, in turns.

    Args:
        sizes: ``(in_features, out_features)`` of the linears.
        tokens: numbers of tokens of the input.
        kernels: names of ``KERNELS``.
        backend: what is asked to compute, see ``quant.backends``.
        device: where.
        rounds: number of counted turns.
        progress: show bars.

    Returns:
        Rows with ``linear``, ``kernel``, ``backend`` (what computed), ``tokens``, ``times_dense`` (median), its 95 %
        interval ``ci`` and ``dense_ms``.
    """
    rows = []
    for in_features, out_features in sizes:
        torch.manual_seed(0)
        name = f"{in_features} -> {out_features}"
        dense = torch.randn(out_features, in_features, dtype=torch.bfloat16).to(device)
        for kernel in kernels:
            layer = KERNELS[kernel](in_features, out_features).to(device)
            if backend == "compiled":
                compile_linears(layer)
            set_backend(layer, backend)
            for count in tokens:
                x = torch.randn(count, in_features, dtype=torch.bfloat16).to(device)
                label = f"{name} {kernel} {count}" if progress else None
                found = paired_ratio(_finished(layer, x), _finished(_dense(dense), x), rounds, progress=label)
                times = {"times_dense": found["ratio"], "ci": found["ci"], "dense_ms": 1e3 * found["baseline_seconds"]}
                rows.append({"linear": name, "kernel": kernel, "backend": layer.chosen, "tokens": count} | times)
    return rows


def fastest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that differ in the backend alone, the one that took the least time, in the order of the first of each."""
    best: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in rows:
        key = row["linear"], row["kernel"], row["tokens"]
        if key not in best or row["times_dense"] < best[key]["times_dense"]:
            best[key] = row
    return list(best.values())


def _dense(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight)


def _finished(product: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """A product that is done when the call returns, which on a GPU it isn't by itself."""

    def run() -> None:
        product(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return run


def write_speeds(output: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a report: the processor, the versions and the rows."""
    write_json(Path(output), {"processor": hardware()["processor"], "versions": versions(), "rows": list(rows)})

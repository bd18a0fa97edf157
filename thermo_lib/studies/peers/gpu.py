"""How long two blocks of Dream 7B's sizes take on a GPU in the formats of this project and of others.

``python -m thermo_lib.studies.peers.gpu`` measures what is installed (HQQ by ``pip install hqq``, gemlite by ``pip
install gemlite``), writes ``reports/peers_gpu.json`` and prints it. As in ``peers.speed`` weights are random and the
vocabulary small. Every pass is a CUDA graph, in turns with that of torch's dense bfloat16 model; gemlite tunes its
kernels before, for each size of linear and number of tokens.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig

from thermo_lib.evaluation.report import table, versions
from thermo_lib.evaluation.statistics import paired_ratio
from thermo_lib.files.locks import locked
from thermo_lib.files.printing import to_its_end
from thermo_lib.files.text import write_json
from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.notebooks import ROOT
from thermo_lib.studies.full_size import random_model
from thermo_lib.studies.gpu import together
from thermo_lib.studies.peers.methods import stored_bits
from thermo_lib.studies.peers.speed import Make, hqq, hqq_layer, installed, packed_bits, replace_linears, two_blocks
from thermo_lib.studies.speed import PEERS_SPEED_COLUMNS

GPU_REPORT = ROOT / "reports" / "peers_gpu.json"
TOKENS = (256, 1, 32)  # the one that counts most first
ROUNDS = 15
_PACKAGES = ("gemlite", "hqq", "humming-kernels")
_BACKEND = "PYTORCH"  # of HQQ

Load = Callable[[PreTrainedConfig, torch.device], tuple[MaskPredictor, float]]  # a model and its bits per weight


def _ours(kernel: str) -> Load:
    def load(config: PreTrainedConfig, device: torch.device) -> tuple[MaskPredictor, float]:
        model = random_model(config, config.num_hidden_layers, device, kernel)
        return model, packed_bits(model)

    return load


def _dense(config: PreTrainedConfig, device: torch.device) -> tuple[MaskPredictor, float]:
    return random_model(config, config.num_hidden_layers, device), 16.0


def _gemlite(inputs: str) -> Make:
    def make(linear: nn.Linear) -> tuple[nn.Module, int]:
        from gemlite import helper

        kinds = {"A16W2": helper.A16W2_HQQ_INT, "A8W2": helper.A8W2_HQQ_INT_dynamic}
        kind = kinds[inputs](device=str(linear.weight.device), dtype=torch.bfloat16)
        layer = kind.from_hqqlinear(hqq_layer(linear, _BACKEND))
        return layer, stored_bits(layer.W_q, layer.scales, layer.zeros)

    return make


def _replaced(make: Make) -> Load:
    """The dense model with other linears in its blocks."""

    def load(config: PreTrainedConfig, device: torch.device) -> tuple[MaskPredictor, float]:
        model, _ = _dense(config, device)
        bits = replace_linears(model, make)
        return model, bits

    return load


METHODS: dict[str, Load] = {
    "thermo_lib INT2": _ours("int2 w2a16"),
    "thermo_lib W2A8, dynamic": _ours("int2 w2a8 dynamic"),
    "thermo_lib W2A8, static": _ours("int2 w2a8 static"),
    "thermo_lib trellis": _ours("trellis"),
    "gemlite A16W2": _replaced(_gemlite("A16W2")),
    "gemlite A8W2": _replaced(_gemlite("A8W2")),
    "HQQ": _replaced(partial(hqq, backend=_BACKEND)),
}


@torch.no_grad()
def measure(
    device: torch.device,
    config: PreTrainedConfig,
    methods: Mapping[str, Load] = METHODS,
    tokens: Sequence[int] = TOKENS,
    rounds: int = ROUNDS,
    note: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Time a pass by each method, the head included, in turns with the dense model's.

    Args:
        device: where; on a CPU passes are called.
        config: sizes of the models.
        methods: what is loaded.
        tokens: their numbers, each a sequence.
        rounds: number of counted turns.
        note: called with all rows after each one.

    Returns:
        Rows as those of ``reports/peers_speed.json``, by method and number of tokens; a method that fails has one that
        says ``why``.
    """
    torch.manual_seed(0)
    ids = {count: torch.arange(count, device=device)[None] % config.vocab_size for count in tokens}
    dense = {count: together([_pass(_dense(config, device)[0])], x, device) for count, x in ids.items()}
    rows: list[dict[str, Any]] = []
    place = {name: number for number, name in enumerate(methods)}

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        rows.sort(key=lambda row: (place[row["method"]], row.get("tokens", 0)))
        note(rows)

    for name, load in tqdm(methods.items(), desc="methods", unit="method", leave=False):
        try:
            model, bits = load(config, device)
            for count, x in ids.items():
                found = paired_ratio(together([_pass(model)], x, device), dense[count], rounds)
                times = {"ms": 1e3 * found["candidate_seconds"], "times_dense": found["ratio"], "ci": found["ci"]}
                add({"method": name, "bits_per_weight": bits, "tokens": count} | times)
        except Exception as error:  # another project's: the other methods go on
            why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.300}"
            add({"method": name, "why": why})
    return rows


def _pass(model: MaskPredictor) -> Callable[[Tensor], Tensor]:
    return lambda ids: model.predict(model.hidden(ids))


@to_its_end
def main() -> None:
    """Measure, write after every row, and print."""
    if not torch.cuda.is_available():
        raise SystemExit("found no GPU that torch can use")
    device = torch.device("cuda")
    about = {"card": torch.cuda.get_device_name(device), "versions": versions() | installed(_PACKAGES)}
    with locked(GPU_REPORT, wait=True):
        rows = measure(device, two_blocks(), note=lambda rows: write_json(GPU_REPORT, about | {"rows": rows}))
    print(table(rows, PEERS_SPEED_COLUMNS))


if __name__ == "__main__":
    sys.exit(main())

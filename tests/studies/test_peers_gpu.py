"""The times of two blocks on a GPU by method, tried out on the CPU."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.models.published import DreamConfig
from thermo_lib.studies.peers import gpu

SMALL = DreamConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    mask_token_id=63,
)
CPU = torch.device("cpu")
OURS = [name for name in gpu.METHODS if name.startswith("thermo_lib")]


class _Doubled(nn.Module):
    """Another project's layer: the product twice."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.linear(x)


def test_methods_that_are_not_installed_say_so_and_the_others_go_on() -> None:
    noted: list[int] = []
    rows = gpu.measure(CPU, SMALL, tokens=(3, 1), rounds=2, note=lambda rows: noted.append(len(rows)))
    timed, failed = [row for row in rows if "ms" in row], [row for row in rows if "why" in row]
    assert [(row["method"], row["tokens"]) for row in timed] == [(name, count) for name in OURS for count in (1, 3)]
    assert [row["method"] for row in failed] == [name for name in gpu.METHODS if name not in OURS]
    assert all("No module named" in row["why"] for row in failed)
    assert noted == list(range(1, len(rows) + 1))
    bits = {row["method"]: row["bits_per_weight"] for row in timed}
    assert 2.2 < bits["thermo_lib trellis"] < 2.8
    assert 2 + 32 / 128 < bits["thermo_lib INT2"] < 2 + 32 / 64  # a scale and a zero point a row of 64, or of 128


@pytest.mark.parametrize("make", [lambda linear: (_Doubled(linear), 16 * linear.weight.numel())], ids=["doubled"])
def test_all_linears_of_the_blocks_are_replaced(make: Any) -> None:
    loads: list[MaskPredictor] = []

    def load(config: PreTrainedConfig, device: torch.device) -> tuple[MaskPredictor, float]:
        model, bits = gpu._replaced(make)(config, device)
        loads.append(model)
        return model, bits

    (row,) = gpu.measure(CPU, SMALL, {"doubled": load}, tokens=(5,), rounds=2)
    assert row["bits_per_weight"] == 16
    assert sum(isinstance(module, _Doubled) for module in loads[0].modules()) == 7 * SMALL.num_hidden_layers


def test_without_a_gpu_it_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="found no GPU"):
        gpu.main()

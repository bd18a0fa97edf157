"""The check of a GPU, tried out on the CPU: every part has its rows, and one that fails doesn't stop the others."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import Run

from thermo_lib.models.published import DreamConfig
from thermo_lib.studies import gpu

pytestmark = pytest.mark.slow

MODELS = ("dense", "int2 w2a16", "int2 w2a8 static", "trellis")
SMALL = gpu.Extent(
    DreamConfig(
        vocab_size=1100,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=9,
        num_attention_heads=4,
        num_key_value_heads=2,
        mask_token_id=3,
    ),
    layers=2,
    tokens=(1, 5),
    checked=gpu._CHECKED[:2],
    sizes=((256, 64),),
    rounds=2,
    seconds=1000.0,
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    with pytest.MonkeyPatch.context() as patch:
        for name, small in (("_SEQUENCES", 1), ("_STEPS", 2), ("_TEXT", 20), ("_NETWORK_STEPS", 1)):
            patch.setattr(gpu, name, small)
        found = gpu.gpu_check(torch.device("cpu"), SMALL, path)
    assert json.loads(path.read_text(encoding="utf-8")) == found
    return found


def test_every_part_has_its_rows(found: dict[str, Any]) -> None:
    assert found["failed"] == {}
    assert {(row["model"], row["tokens"]) for row in found["forward"]} == {
        (model, tokens) for model in MODELS for tokens in (1, 5)
    }
    assert all(row["times_dense"] == 1 for row in found["forward"] if row["model"] == "dense")
    assert [row["model"] for row in found["generation"]] == list(MODELS)
    assert all(row["seconds"] > 0 and row["beside"] < 1 for row in found["generation"])
    assert len(found["quantizers"]) == 4
    one = "best, one partial row"
    presets = ["gptq", "best, untrained", f"{one}, untrained", f"{one}, sequential", f"{one}, network"]
    assert [row["preset"] for row in found["layerwise"]] == presets
    assert [row["steps"] for row in found["layerwise"]] == [None, None, None, None, 1]
    assert all(row["seconds"] > 0 and row["peak_mib"] is None for row in found["layerwise"])
    assert found["decoders"] == [], "they are for a GPU"
    assert {row["backend"] for row in found["rows"]} == {"plain"}, "no other kernel is for a CPU"
    assert len(found["rows"]) == len(gpu.KERNELS) * 2


def test_every_product_is_right(found: dict[str, Any]) -> None:
    assert len(found["kernels"]) == len(SMALL.checked) * len(gpu._TOKENS) * (3 * 3 + 3)
    assert all(row["right"] for row in found["kernels"])


def test_a_part_that_fails_or_takes_too_long_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: object) -> Iterator[dict[str, Any]]:
        yield {"row": 1}
        raise RuntimeError("no kernel for this card\nmore")

    parts = {
        "fails": fails,
        "endless": lambda *_: itertools.repeat({"row": 2}),
        "good": lambda *_: iter([{"row": 3}]),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    hundredths = itertools.count()  # a look at the clock takes one
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: next(hundredths) / 100))
    extent = gpu.Extent(SMALL.config, 1, (1,), SMALL.checked, SMALL.sizes, 2, seconds=1.0)
    found = gpu.gpu_check(torch.device("cpu"), extent, tmp_path / "gpu.json")
    assert (found["fails"], found["good"]) == ([{"row": 1}], [{"row": 3}])
    assert found["failed"]["fails"] == "RuntimeError: no kernel for this card"
    assert found["failed"]["endless"].startswith("no more time: ")
    assert set(found["failed"]) == {"fails", "endless"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(run: Run) -> None:
    status, _, err = run("gpu-check")
    assert status == 2
    assert "device: found no GPU, allowed is --device cpu to try the command out" in err


def test_the_command_prints_its_tables(run: Run, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]) -> None:
    measured = {name: lambda *_, rows=found[name]: iter(rows) for name in gpu.PARTS}
    monkeypatch.setattr(gpu, "PARTS", measured)
    status, out, _ = run("gpu-check", "--quick", "--device", "cpu", "--output", "gpu.json")
    assert status == 0
    assert all(f"\n{name}\n" in f"\n{out}" for name in gpu.PARTS if name != "decoders")
    assert json.loads(Path("gpu.json").read_text(encoding="utf-8"))["card"]

"""The comparison of kernels: every kernel, size and number of tokens gets a row."""

import json
import shutil
from pathlib import Path

import pytest

from thermo_lib.evaluation.report import table
from thermo_lib.studies.speed import KERNELS, SPEED_COLUMNS, kernel_speeds, write_speeds

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize("backend", ["compiled", "plain"])
def test_a_row_for_each_kernel_size_and_number_of_tokens(tmp_path: Path, backend: str) -> None:
    rows = kernel_speeds([(256, 64), (128, 32)], (1, 5), backend=backend, rounds=2)
    assert {row["backend"] for row in rows} == {backend}
    keys = [(row["linear"], row["kernel"], row["tokens"]) for row in rows]
    sizes = ("256 -> 64", "128 -> 32")
    assert keys == [(size, kernel, tokens) for size in sizes for kernel in KERNELS for tokens in (1, 5)]
    for row in rows:
        low, high = row["ci"]
        assert 0 < low <= row["times_dense"] <= high
        assert row["dense_ms"] > 0
    write_speeds(tmp_path / "speed.json", rows)
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["rows"] == rows
    assert {"processor", "versions"} < found.keys()
    assert table(rows, SPEED_COLUMNS).count("\n") >= len(rows)

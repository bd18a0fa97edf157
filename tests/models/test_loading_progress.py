"""Loading shows how far it is, where a caller asks for it and it takes a moment."""

import re
from pathlib import Path

import pytest

from thermo_lib import ThermoConfig, load_model, load_quantized, quantize, save_quantized
from thermo_lib.models.lm import DiffusionLM, save_model
from thermo_lib.pipeline.parts import RoundToNearest


@pytest.mark.parametrize("is_quantized", [False, True])
def test_two_bars_or_none(
    tiny: DiffusionLM,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_quantized: bool,
) -> None:
    if is_quantized:
        save_quantized(quantize(tiny, ThermoConfig(weights=RoundToNearest(group_size=16))), tmp_path / "model")
    else:
        save_model(tiny, tmp_path / "model")
    load = load_quantized if is_quantized else load_model
    load(str(tmp_path / "model"))
    load(str(tmp_path / "model"), progress=True)
    assert capsys.readouterr().err == "", "a small model is there at once"
    monkeypatch.setattr("thermo_lib.files.tensors._PATIENCE", 0)
    load(str(tmp_path / "model"), progress=True)
    shown = capsys.readouterr().err
    assert re.search(r"read: +\d+%", shown)
    assert re.search(r"convert and check: +\d+%", shown)

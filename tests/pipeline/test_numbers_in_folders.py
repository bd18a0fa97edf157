"""No number of a quantized folder is infinite in the model: it is refused as load_model refuses one, by its name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from configurations import Quantize
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from thermo_lib import Calibration, load_model, load_quantized, save_quantized
from thermo_lib.files import tensors as files
from thermo_lib.models.lm import DiffusionLM, save_model
from thermo_lib.pipeline.training import train_time_norms

Q_PROJ = "model.layers.0.self_attn.q_proj"
NORM = "model.layers.1.input_layernorm"
LOADERS: dict[str, Callable[[Path, torch.dtype], object]] = {
    "load_quantized": lambda folder, dtype: load_quantized(folder, dtype=dtype),
    "AutoModel": lambda folder, dtype: AutoModel.from_pretrained(folder, dtype=dtype),
}
EVERY_LOADER = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


def change(folder: Path, name: str, value: float, dtype: torch.dtype | None = None) -> None:
    """Put a number in the first place of a stored tensor, which may get another type."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name].to(dtype or tensors[name].dtype).clone()
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})


@EVERY_LOADER
@pytest.mark.parametrize("name", [f"{NORM}.weight", f"{Q_PROJ}.bias", "lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize(
    ("value", "stored", "dtype"),
    [(1e300, torch.float64, torch.float32), (1e6, torch.float32, torch.float16)],
    ids=["double", "half"],
)
def test_what_is_not_coded(
    quantized: Quantize,
    tmp_path: Path,
    load: Callable[[Path, torch.dtype], object],
    name: str,
    value: float,
    stored: torch.dtype,
    dtype: torch.dtype,
) -> None:
    save_quantized(quantized(), tmp_path / "q")
    change(tmp_path / "q", name, value, stored)
    with pytest.raises(ValueError, match=rf"tensor {name}( as {dtype})?: found NaN or infinity"):
        load(tmp_path / "q", dtype)


def test_norms_of_time_groups(tiny: DiffusionLM, calibration: Calibration, quantized: Quantize, tmp_path: Path) -> None:
    save_quantized(train_time_norms(quantized(), tiny, calibration, count=2, steps=1), tmp_path / "q")
    change(tmp_path / "q", f"{NORM}.time_weight", 1e6, torch.float32)
    with pytest.raises(ValueError, match=rf"tensor {NORM}\.time_weight as torch\.float16: found NaN or infinity"):
        load_quantized(tmp_path / "q", dtype=torch.float16)
    load_quantized(tmp_path / "q", dtype=torch.bfloat16)


@EVERY_LOADER
@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({}, f"{Q_PROJ}.weight_scale", 6e4),
        ({}, f"{Q_PROJ}.weight_zero_point", 6e4),
        ({"quantizer": "trellis"}, f"{Q_PROJ}.weight_scale", 6e4),
        ({"embedding_bits": 8}, "lm_head.weight_scale", 6e4),
    ],
    ids=["scale", "zero point", "trellis", "table"],
)
def test_codes_that_a_type_does_not_hold(
    quantized: Quantize,
    tmp_path: Path,
    load: Callable[[Path, torch.dtype], object],
    settings: dict[str, object],
    name: str,
    value: float,
) -> None:
    save_quantized(quantized(**settings), tmp_path / "q")
    if name.endswith("zero_point"):
        change(tmp_path / "q", name.replace("zero_point", "scale"), 2.0)
    change(tmp_path / "q", name, value)
    message = name.replace("zero_point", "scale") + r" as torch\.float16: found a scale of codes that stand for up to"
    with pytest.raises(ValueError, match=rf"tensor {message} \S+, allowed is 65504 at most"):
        load(tmp_path / "q", torch.float16)
    for dtype in (torch.float32, torch.bfloat16):
        load(tmp_path / "q", dtype)


@EVERY_LOADER
def test_ranges_that_reach_infinity(
    quantized: Quantize, tmp_path: Path, load: Callable[[Path, torch.dtype], object]
) -> None:
    save_quantized(quantized(activation_bits=8), tmp_path / "q")
    change(tmp_path / "q", f"{Q_PROJ}.activation_scale", 3e38)
    message = rf"{Q_PROJ}\.activation_scale as torch\.float32: found a scale of codes that stand for up to \S+e\+40"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "q", torch.float16)


def test_more_than_the_memory_is_refused(
    tiny: DiffusionLM, quantized: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tiny, tmp_path / "m", torch.bfloat16)
    save_quantized(quantized(), tmp_path / "q")
    assert files._memory() > 2**20
    monkeypatch.setattr(files, "_memory", lambda: 1000)
    message = r"memory: found weights of 0\.0 GiB in torch\.float64, allowed are 0\.0 GiB"
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path / "m"), dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        load_quantized(tmp_path / "q", dtype=torch.float64)
    load_model(str(tmp_path / "m"), dtype=torch.bfloat16)  # nothing is made of the file's own type

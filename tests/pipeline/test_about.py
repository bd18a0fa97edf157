"""What ``python -m thermo_lib info`` says of a folder is what the loaded model has, and a bad folder is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import Quantize
from encoder_layouts import ANY, MODERNBERT, AnyLayout
from layouts import FAST_DLLM, OPEN_DCODER, stored
from safetensors.torch import save_file
from small_runs import Run

from thermo_lib import ThermoConfig, quantize_checkpoint, save_quantized
from thermo_lib.pipeline.about import about, described, words
from thermo_lib.pipeline.presets import PRESETS


@ANY
@pytest.mark.parametrize("tied", [False, True])
def test_a_full_precision_folder(write: Callable[..., Path], layout: AnyLayout, tied: bool) -> None:
    folder = write(layout, tied=tied)
    found, lm = described(about(str(folder), layout.family)), layout.load(folder)
    assert found["family"].startswith(f"{layout.model_type}, 2 ")
    assert found["parameters"] == f"{sum(p.numel() for p in lm.model.parameters()):,}"
    assert found["embeddings"] == ("also the head's" if tied else "apart from the head's")
    assert found["mask id"] == str(lm.mask_token_id)
    assert found["shift"].startswith("by one" if layout.is_shifted else "none")
    heads = f"{layout.heads} heads of {layout.head_size}, {layout.kv_heads} of keys and values"
    seen = "full in one block of 2, of tokens at most 4 away in others" if layout is MODERNBERT else "full"
    if lm.model.block_length is not None:
        seen = f"block-causal in blocks of {lm.model.block_length}"
    assert found["attention"] == f"{seen}, {heads}"
    assert (found["norms"], found["quantized"]) == ("bfloat16", "no")
    assert found["bits per weight"] == "16.000 of the linears in blocks"
    for path in folder.iterdir():
        assert found[path.name] == f"{path.stat().st_size:,} bytes"


@pytest.mark.parametrize(
    "changes",
    [
        {"quantizer": "rtn"},
        {"quantizer": "gptq", "activation_bits": 4, "num_time_groups": 2},
        {"quantizer": "least_squares", "embedding_bits": 8},
        {"quantizer": "trellis", "average_bits": 2.2},
    ],
    ids=str,
)
def test_a_quantized_folder(quantized: Quantize, tmp_path: Path, changes: dict[str, Any]) -> None:
    lm = quantized(**changes)
    save_quantized(lm, tmp_path / "q")
    found = described(about(str(tmp_path / "q")))
    assert found["bits per weight"] == f"{lm.bits_per_weight:.3f} of the linears in blocks"
    assert found["quantized"] == words(lm.config)
    assert found["norms"] == "float32"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("changes", [{}, {"timesteps": 8, "seed": 7}], ids=str)
def test_a_configuration_is_said_in_words_of_the_command(preset: str, changes: dict[str, Any]) -> None:
    expected = [f"preset={preset}", *(f"{key}={value}" for key, value in changes.items())]
    assert words(ThermoConfig.preset(preset, **changes)).split() == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "model: found no config.json in"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "model: found no tokenizer.json in"),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b""), "not a complete safetensors file"),
        (lambda folder: edit(folder, {"model.norm.weight": torch.ones(3)}), "tensor model.norm.weight: found shape"),
        (lambda folder: edit(folder, {"model.norm.weight": None}), "missing tensors model.norm.weight"),
        (
            lambda folder: edit(folder, {"model.norm.weight": torch.ones(32).int()}),
            "model.norm.weight: found torch.int",
        ),
    ],
)
@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_bad_folder_is_one_line(
    run: Run, write: Callable[..., Path], damage: Callable[[Path], object], message: str, is_quantized: bool
) -> None:
    folder = write()
    if is_quantized:
        quantize_checkpoint(folder, "q", ThermoConfig(quantizer="rtn", group_size=16, num_time_groups=1))
        folder = Path("q")
    damage(folder)
    status, out, err = run("info", folder)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def edit(folder: Path, changes: dict[str, Any]) -> None:
    """Change tensors, all in one file; None removes one."""
    tensors = {name: tensor for name, tensor in (stored(folder) | changes).items() if tensor is not None}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")


def test_another_quantization_is_refused(run: Run, write: Callable[..., Path]) -> None:
    folder = write(quantization_config={"quant_method": "gptq"})
    status, _, err = run("info", folder)
    assert status == 2
    assert "config.json: " in err
    assert "quantization_config: found {'quant_method': 'gptq'}, expected an object with quant_method 'thermo'" in err


def test_the_command_takes_the_length_of_blocks(run: Run, write: Callable[..., Path]) -> None:
    folder = write(FAST_DLLM, bd_size=None)
    status, _, err = run("info", folder)
    assert status == 2
    assert "bd_size" in err
    status, out, _ = run("info", folder, "--attention-block", 8)
    assert status == 0
    assert "blocks of 8" in out


def test_the_command_prints_it(run: Run, write: Callable[..., Path]) -> None:
    folder = write(OPEN_DCODER)
    status, out, _ = run("info", folder, "--family", "open-dcoder")
    assert status == 0
    lines = [line.split("  ", 1) for line in out.splitlines()]
    assert {title: text.strip() for title, text in lines} == described(about(str(folder), "open-dcoder"))
    status, _, err = run("info", folder)
    assert status == 2
    assert "family: found None, allowed with 'qwen2' blocks" in err
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2"

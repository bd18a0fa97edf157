"""Full-size measurements: sizes are those of the published models and of the files; the notebook runs on any model."""

import json
from pathlib import Path

import matplotlib
import pytest
import torch
from layouts import DREAM_7B, LLADA_8B
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from safetensors.torch import load_file

from thermo_lib import ThermoConfig, load_model, load_quantized, notebooks
from thermo_lib.files.tensors import weight_files
from thermo_lib.models.families import read_config
from thermo_lib.models.published import DreamConfig
from thermo_lib.pipeline.streaming import quantize_checkpoint
from thermo_lib.studies import full_size

ROOT = Path(__file__).resolve().parents[2]
SMALL = DreamConfig(
    vocab_size=1100,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    mask_token_id=1024,
)
DATA_FREE = ThermoConfig(
    quantizer="least_squares", group_size=32, embedding_bits=8, activation_bits=16, num_time_groups=1
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full-size") / "source"
    full_size.random_checkpoint(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    folder = source.with_name("quantized")
    quantize_checkpoint(source, folder, DATA_FREE)
    return folder


@pytest.mark.parametrize(("name", "published"), [("Dream 7B", DREAM_7B), ("LLaDA 8B", LLADA_8B)])
def test_published_sizes_are_those_of_the_published_config(name: str, published: dict, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published))
    ours, theirs = full_size.PUBLISHED[name].to_dict(), read_config(tmp_path).to_dict()
    of_the_tokenizer = {"bos_token_id", "eos_token_id", "pad_token_id"}  # which is the reference's
    assert {key for key, value in theirs.items() if ours.get(key) != value} <= of_the_tokenizer


def test_a_random_checkpoint_has_the_shapes_asked_for(source: Path) -> None:
    lm = load_model(str(source))
    assert lm.model.config.hidden_size == 64
    assert lm.model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert (lm.model.model.norm.weight == 1).all()
    assert sum(p.numel() for p in lm.model.parameters()) == sum(full_size.weight_counts(SMALL).values())


def test_a_random_checkpoint_is_written_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    monkeypatch.setattr(full_size, "_SHARD_BYTES", 100_000)
    full_size.random_checkpoint(tmp_path / "sharded", SMALL)
    paths = weight_files(tmp_path / "sharded")
    assert len(paths) > 3
    (whole,) = (load_file(path) for path in weight_files(source))
    parts = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert parts.keys() == whole.keys()
    assert all(tensor.equal(whole[name]) for name, tensor in parts.items())


def test_stored_sizes_are_those_of_the_files(source: Path, quantized: Path) -> None:
    *_, everything = full_size.stored_sizes(SMALL, DATA_FREE)
    for folder, key in ((source, "bfloat16"), (quantized, "quantized")):
        tensors = [tensor for path in weight_files(folder) for tensor in load_file(path).values()]
        assert sum(tensor.nbytes for tensor in tensors) == everything[key]


def test_cost_sees_the_peak_and_what_stays() -> None:
    with full_size.cost() as outside, full_size.cost() as nothing:
        pass
    with full_size.cost() as found:
        torch.ones(2**26)  # 256 MiB, gone at once
    assert found.peak_mib - outside.peak_mib > 200
    assert found.resident_mib - outside.resident_mib < 100
    assert 0 < nothing.seconds < outside.seconds
    with full_size.cost() as later:
        pass
    assert found.peak_mib - later.peak_mib > 200  # an earlier peak doesn't count


def test_every_shape_of_linear_is_measured_once(quantized: Path) -> None:
    lm = load_quantized(quantized, dtype=torch.bfloat16)
    shapes = {(64, 64): 4, (64, 32): 4, (64, 96): 4, (96, 64): 2}
    counts = {(layer.in_features, layer.out_features): n for layer, n in full_size.distinct_linears(lm).values()}
    assert counts == shapes
    rows = full_size.gptq_costs(lm, tokens=200)
    assert [row["size"] for row in rows] == ["64 -> 64", "64 -> 32", "64 -> 96", "96 -> 64"]
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 for row in rows)


@pytest.mark.slow
def test_the_notebook_runs_on_any_model(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cells with the parameters that papermill injects, in this process: a kernel would import everything anew."""
    parameters = {"model": str(source), "output": str(tmp_path / "int2"), "group_size": 32, "length": 16, "rounds": 2}
    notebook = load_notebook_node(str(ROOT / "notebooks" / "dream_7b.ipynb"))
    cells = parameterize_notebook(notebook, parameters).cells
    monkeypatch.setattr(notebooks, "THREADS", torch.get_num_threads())
    monkeypatch.chdir(ROOT)
    with matplotlib.rc_context({"backend": "agg"}):
        exec("\n".join(cell.source for cell in cells if cell.cell_type == "code"), {})
    text = capsys.readouterr().out
    assert "million weights a second" in text
    assert "96 -> 64" in text
    assert load_quantized(tmp_path / "int2").model.config.hidden_size == 64

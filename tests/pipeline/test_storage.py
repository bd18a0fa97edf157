"""A saved quantized model computes what it computed before, and each damage to its folder is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import BASE, CONFIGURATIONS, SMOOTH, Outputs, Quantize
from safetensors.torch import load_file, save_file
from small_runs import shortest
from torch import Tensor

from thermo_lib import load_model, load_quantized, save_quantized
from thermo_lib.models.lm import DiffusionLM, save_model
from thermo_lib.pipeline.activations import resmooth

# Their layers hold what those of others hold.
LIKE_OTHERS = {
    "W2A4 fitted to the output",
    "W2A4 fitted to path KL",
    "W2A16 gptq for transitions",
    "W2A8 reconstructed",
    "W2A16 gptq sequential",
}
STORED = {name: shortest(changes) for name, changes in CONFIGURATIONS.items() if name not in LIKE_OTHERS}


class TestSaveAndLoad:
    """A saved model computes bit for bit what it computed before; a damaged folder is refused."""

    @pytest.mark.parametrize("changes", STORED.values(), ids=STORED)
    def test_logits_at_every_timestep_are_bit_identical(
        self, quantized: Quantize, outputs: Outputs, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        lm = quantized(**changes)
        save_quantized(lm, tmp_path / "q")
        loaded = load_quantized(tmp_path / "q")
        assert torch.equal(outputs(loaded), outputs(lm))
        assert loaded.config == lm.config
        assert loaded.bits_per_weight == lm.bits_per_weight
        assert loaded.mask_token_id == lm.mask_token_id
        assert loaded.tokenizer.to_str() == lm.tokenizer.to_str()
        assert loaded.time_params.keys() == lm.time_params.keys()
        for method in ("cubic", None) if lm.time_params else ():  # the parameters before smoothing are there too
            found, expected = (resmooth(one, method).model.state_dict() for one in (loaded, lm))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    def test_codes_are_stored_packed(self, quantized: Quantize, tmp_path: Path) -> None:
        save_quantized(quantized(), tmp_path / "q")
        stored = load_file(tmp_path / "q" / "model.safetensors")
        packed = {name: tensor for name, tensor in stored.items() if name.endswith(".packed")}
        assert len(packed) == 14
        # Four two-bit codes a byte: 8704 weights a block in 2176 bytes.
        assert sum(tensor.numel() * tensor.element_size() for tensor in packed.values()) == 2 * 2176
        assert not [name for name in stored if name.endswith("_proj.weight")]

    def test_saving_a_loaded_model_writes_the_same_bytes(self, quantized: Quantize, tmp_path: Path) -> None:
        save_quantized(quantized(activation_bits=4, **SMOOTH), tmp_path / "q")
        save_quantized(load_quantized(tmp_path / "q"), tmp_path / "again")
        for path in (tmp_path / "q").iterdir():
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
            assert path.stat().st_mode & 0o777 == 0o644

    def test_a_failing_write_leaves_the_earlier_folder(
        self, quantized: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_quantized(quantized(), tmp_path / "q")
        before = {p.name: p.read_bytes() for p in (tmp_path / "q").iterdir()}
        monkeypatch.setattr("thermo_lib.pipeline.storage.config_json", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_quantized(quantized(bit_width=4), tmp_path / "q")
        assert {p.name: p.read_bytes() for p in (tmp_path / "q").iterdir()} == before
        assert [p.name for p in tmp_path.iterdir()] == ["q"]

    def test_a_folder_of_a_full_precision_model_is_refused(self, tiny: DiffusionLM, tmp_path: Path) -> None:
        save_model(tiny, tmp_path / "m")
        with pytest.raises(ValueError, match="quantization_config: found None, expected an object"):
            load_quantized(tmp_path / "m")

    def test_a_folder_of_a_quantized_model_is_no_full_precision_model(
        self, quantized: Quantize, tmp_path: Path
    ) -> None:
        save_quantized(quantized(), tmp_path / "q")
        with pytest.raises(ValueError, match=r"found a quantized model in .*load_quantized"):
            load_model(str(tmp_path / "q"))

    def test_a_missing_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"model: found .*absent"):
            load_quantized(tmp_path / "absent")


Q_PROJ = "model.layers.0.self_attn.q_proj"


def refused(folder: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    """Change the tensors of a saved model and see it refused with the message."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        load_quantized(folder)


class TestDamagedFolders:
    """Each kind of damage is named."""

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, quantized: Quantize, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A saved model with time-dependent activation parameters."""
        path = tmp_path_factory.mktemp("saved") / "q"
        save_quantized(quantized(activation_bits=4, **SMOOTH), path)
        return path

    @pytest.fixture
    def folder(self, saved: Path, tmp_path: Path) -> Path:
        """A copy of it."""
        return shutil.copytree(saved, tmp_path / "q")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param(lambda t: t.pop(f"{Q_PROJ}.packed"), f"missing tensors {Q_PROJ}.packed", id="codes missing"),
            pytest.param(
                lambda t: t.pop(f"{Q_PROJ}.weight_scale"), f"missing tensors {Q_PROJ}.weight_scale", id="scale missing"
            ),
            pytest.param(
                lambda t: t.pop(f"{Q_PROJ}.activation_zero_point"),
                f"missing tensors {Q_PROJ}.activation_zero_point",
                id="activation zero point missing",
            ),
            pytest.param(lambda t: t.pop("model.norm.weight"), "missing tensors model.norm.weight", id="norm missing"),
            pytest.param(
                lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(32, 32)}),
                f"unexpected tensors {Q_PROJ}.weight",
                id="extra tensor",
            ),
            pytest.param(
                lambda t: t.update({f"{Q_PROJ}.packed": t[f"{Q_PROJ}.packed"][:, :-1].contiguous()}),
                f"tensor {Q_PROJ}.packed: found shape",
                id="codes too short",
            ),
            pytest.param(
                lambda t: t.update({f"{Q_PROJ}.packed": t[f"{Q_PROJ}.packed"].float()}),
                f"{Q_PROJ}.packed",
                id="codes of another type",
            ),
            pytest.param(
                lambda t: t.update({f"{Q_PROJ}.weight_scale": t[f"{Q_PROJ}.weight_scale"].float()}),
                f"tensor {Q_PROJ}.weight_scale: found torch.float32, expected torch.float16",
                id="scale of another type",
            ),
            pytest.param(
                lambda t: t.update({f"{Q_PROJ}.activation_scale": t[f"{Q_PROJ}.activation_scale"].double()}),
                f"tensor {Q_PROJ}.activation_scale: found torch.float64, expected torch.float32",
                id="range of another type",
            ),
            pytest.param(
                lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}),
                "tensor model.norm.weight: found torch.int8, allowed are",
                id="norm of another type",
            ),
            pytest.param(
                lambda t: t[f"{Q_PROJ}.weight_scale"].fill_(torch.nan),
                f"tensor {Q_PROJ}.weight_scale: found NaN",
                id="scale NaN",
            ),
            pytest.param(lambda t: t[f"{Q_PROJ}.weight_scale"].fill_(0), f"{Q_PROJ}.*scale: found 0", id="scale zero"),
            pytest.param(
                lambda t: t[f"{Q_PROJ}.activation_scale"].fill_(-1), f"{Q_PROJ}.*scale: found -1", id="scale negative"
            ),
        ],
    )
    def test_a_damaged_tensor_is_named(
        self, folder: Path, change: Callable[[dict[str, Tensor]], object], message: str
    ) -> None:
        refused(folder, change, message)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param(
                lambda t: t.pop(f"{Q_PROJ}.packed_column_bits"),
                f"missing tensors {Q_PROJ}.packed_column_bits",
                id="bits missing",
            ),
            pytest.param(
                lambda t: t[f"{Q_PROJ}.packed_column_bits"].fill_(0x72),
                f"tensor {Q_PROJ}.packed_column_bits: found 7, allowed are 0..6",
                id="seven bits",
            ),
            pytest.param(
                lambda t: t[f"{Q_PROJ}.packed_column_bits"].fill_(0x33),
                f"tensor {Q_PROJ}.packed: found shape",
                id="other bits than the codes have",
            ),
            pytest.param(
                lambda t: t.update({f"{Q_PROJ}.packed_column_bits": t[f"{Q_PROJ}.packed_column_bits"].float()}),
                f"tensor {Q_PROJ}.packed",
                id="bits of another type",
            ),
            pytest.param(
                lambda t: t.update({f"{Q_PROJ}.weight_zero_point": torch.zeros(1, 32, 2)}),
                f"unexpected tensors {Q_PROJ}.weight_zero_point",
                id="zero points",
            ),
        ],
    )
    def test_damaged_streams_are_named(
        self, quantized: Quantize, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
    ) -> None:
        save_quantized(quantized(quantizer="trellis"), tmp_path / "q")
        refused(tmp_path / "q", change, message)

    @pytest.mark.parametrize("table", ["model.embed_tokens", "lm_head"])
    def test_damaged_tables_are_named(self, quantized: Quantize, tmp_path: Path, table: str) -> None:
        save_quantized(quantized(embedding_bits=8), tmp_path / "q")
        name = f"{table}.weight_scale"
        refused(tmp_path / "q", lambda t: t[name].neg_(), f"tensor {name}: found -.*, allowed is above 0")
        save_quantized(quantized(embedding_bits=8), tmp_path / "q")
        refused(tmp_path / "q", lambda t: t.update({name: t[name].double()}), f"tensor {name}: found torch.float64")

    def test_a_truncated_file_is_named(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"model\.safetensors: not a complete safetensors file"):
            load_quantized(folder)

    @pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
    def test_a_missing_file_is_named(self, folder: Path, file: str) -> None:
        (folder / file).unlink()
        with pytest.raises(ValueError, match=f"found no {file}"):
            load_quantized(folder)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({**BASE, "bit_width": 3}, r"weights\.bits: found 3"),
            ({**BASE, "surplus": 1}, "surplus"),
            ({**BASE, "timesteps": 10**10}, "config.json: timesteps: found 10000000000, allowed is"),
            ([1], r"config.json: quantization_config: found \[1\]"),
            ({**BASE, "num_time_groups": 7}, "num_time_groups: found 7"),
            ({**BASE, "bit_width": 4}, "missing tensors|unexpected tensors|found shape"),
            ({**BASE, "quant_method": "gptq"}, "quantization_config: found .*gptq.*expected .*'thermo'"),
            ({**BASE, "format_version": 1}, "format_version: found 1, allowed are 2 and 3: quantize the model again"),
            (
                {"format_version": 3, "weights": {"bits": 3}},
                r"config\.json: weights\.bits: found 3, allowed is 2, 4 or 8",
            ),
            ({"format_version": 3, "bits": 2}, r"config\.json: bits: found 2, allowed are the fields weights"),
            ([], "quantization_config: found "),
            (None, "quantization_config: found None"),
        ],
    )
    def test_a_configuration_that_is_not_the_model_s_is_refused(
        self, folder: Path, changed: object, message: str
    ) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(changed, dict):
            changed = {"quant_method": "thermo", "format_version": 2, **changed}
        path.write_text(json.dumps({**content, "quantization_config": changed}), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_quantized(folder)

    def test_a_copy_elsewhere_loads(self, folder: Path, tmp_path: Path, outputs: Outputs) -> None:
        copy = shutil.copytree(folder, tmp_path / "elsewhere")
        assert torch.equal(outputs(load_quantized(copy)), outputs(load_quantized(folder)))

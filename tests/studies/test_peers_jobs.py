"""Which of other projects' quantizers run, on which model, and what their results depend on."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thermo_lib.diffusion.states import Calibration
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import linear_names
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.studies.peers import quantize as peer_jobs
from thermo_lib.studies.peers.methods import ADAPTERS, stored_bits
from thermo_lib.studies.peers.subjects import SUBJECTS, Subject


def weights_of(lm) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": layer.weight() for name, layer in lm.quantized_layers().items()}


class TestJobs:
    @given(
        st.integers(1, 9),
        st.integers(1, 9),
        st.sampled_from([(torch.uint8, 8), (torch.float16, 16), (torch.int32, 32)]),
    )
    def test_stored_bits_count_every_element(self, rows: int, columns: int, of: tuple[torch.dtype, int]) -> None:
        tensor = torch.zeros((rows, columns), dtype=of[0])
        assert stored_bits(tensor) == rows * columns * of[1]
        assert stored_bits(tensor, tensor) == 2 * stored_bits(tensor)
        assert stored_bits(tensor, bits=2) == 2 * rows * columns

    def test_own_quantizer_is_counted_as_the_model_counts_itself(self, tiny, calibration) -> None:
        layers = ADAPTERS["thermo"](tiny, calibration, weights={"method": "rtn", "group_size": 16})
        expected = quantize(tiny, ThermoConfig(quantizer="rtn", group_size=16))
        bits = sum(layer.bits for layer in layers.values()) / sum(layer.weight.numel() for layer in layers.values())
        assert bits == expected.bits_per_weight
        assert all(layer.weight.equal(weights_of(expected)[f"{name}.weight"]) for name, layer in layers.items())

    def test_what_is_trained_comes_with_its_losses(self, tiny, calibration) -> None:
        fresh = {"states": "fresh", "num_texts": 2, "num_prompts": 2}
        training = (
            {"phase": "blocks", "steps": 3, **fresh},
            {"phase": "path_kl", "what": "network", "steps": 4, **fresh},
        )
        weights = {"method": "rtn", "group_size": 16}
        activations = {"ranges": "static", "bits": 4}
        fields = {"weights": weights, "activations": activations, "training": training, "timesteps": 6}
        layers = ADAPTERS["thermo"](tiny, calibration, **fields)
        assert {phase: len(losses) for phase, losses in layers.losses.items()} == {
            "block 0": 3,
            "block 1": 3,
            "transitions": 4,
        }
        unquantized = {name for name, layer in layers.items() if layer.bits is None}
        assert {"model.norm.weight", "lm_head.weight"} <= unquantized
        assert {name for name in layers if name not in unquantized} == set(linear_names(tiny.model))

    def test_only_what_the_report_lacks_runs(self, tiny, calibration, tmp_path: Path, monkeypatch) -> None:
        small = Subject(tmp_path, lambda: tiny, lambda lm: calibration, lambda lm: None, tmp_path, tmp_path / "r.json")
        monkeypatch.setitem(SUBJECTS, "antiberty", small)
        monkeypatch.setattr(peer_jobs, "made_of", lambda job, subject: f"of {job.name}")
        ran: list[str] = []

        def run(command: list[str], **_: Any) -> SimpleNamespace:
            assert command[-4:-1] == ["--model", "antiberty", "--only"]
            ran.append(command[-1])
            return SimpleNamespace(returncode=0)

        monkeypatch.setattr(peer_jobs.subprocess, "run", run)
        known, old, new = peer_jobs.JOBS[:3]
        rows = [
            {"method": j.method, "setting": j.setting, "made_of": m}
            for j, m in ((known, f"of {known.name}"), (old, "x"))
        ]
        (tmp_path / "r.json").write_text(json.dumps({"rows": rows}))
        peer_jobs.run_all([known, old, new], "antiberty")
        assert ran == [old.name, new.name]

    def test_a_result_depends_on_the_model_and_its_calibration(self, tiny, calibration, tmp_path: Path) -> None:
        def states(seed: int) -> Calibration:
            parts = [replace(part, ids=part.ids.roll(seed, 0)) for part in calibration.parts]
            return replace(calibration, parts=parts)

        digests = set()
        for number, (weights, seed) in enumerate([(b"a", 0), (b"a", 0), (b"b", 0), (b"a", 1)]):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(weights)
            subject = Subject(folder, lambda: tiny, lambda lm, s=seed: states(s), lambda lm: None, folder, folder / "r")
            drawn = subject.calibration(tiny)
            again = replace(subject, states=lambda lm: pytest.fail("drawn twice")).calibration(tiny)
            assert [part.ids.tolist() for part in again.parts] == [part.ids.tolist() for part in drawn.parts]
            digests.add(peer_jobs.made_of(peer_jobs.JOBS[0], subject))
        assert len(digests) == 3

    def test_names_are_file_names_and_differ(self) -> None:
        names = [job.name for job in peer_jobs.JOBS]
        assert len(set(names)) == len(names)
        assert all(name.replace("-", "").isalnum() for name in names)
        assert {job.adapter for job in peer_jobs.JOBS} == ADAPTERS.keys()

    def test_every_peer_is_locked(self) -> None:
        lock = Path(peer_jobs.__file__).with_name("requirements.lock").read_text(encoding="utf-8")
        pinned = {line.split("==")[0].lower().replace("_", "-") for line in lock.splitlines() if "==" in line}
        assert {job.package for job in peer_jobs.JOBS if job.package} <= pinned
        assert "://" not in lock

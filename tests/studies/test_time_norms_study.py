"""Variants of time-aware norms are compared with twins of one set, and a stopped study goes on."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from thermo_lib import Calibration, ThermoConfig, TimeNorms, path_kl, quantize, train_time_norms
from thermo_lib.diffusion.prompts import EmptyTexts
from thermo_lib.diffusion.states import States, trajectory_states
from thermo_lib.evaluation.report import table
from thermo_lib.files.snapshots import Snapshot
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.model import QuantizedLM
from thermo_lib.studies import time_norms as study
from thermo_lib.studies.time_norms import COLUMNS, TimeNormsStudy, paired_change, twin

TIMESTEPS = 6
VARIANTS = [{"steps": 6, "norm_lr": 0.02, **more} for more in ({}, {"smoothing": None}, {"count": 2})]


@pytest.fixture(scope="module")
def start(tiny: DiffusionLM) -> QuantizedLM:
    weights = {"method": "rtn", "group_size": 16}
    return quantize(tiny, ThermoConfig(weights=weights, timesteps=TIMESTEPS))


@pytest.fixture(scope="module")
def held_out(tiny: DiffusionLM, random_ids: Callable[..., torch.Tensor]) -> States:
    return trajectory_states(tiny, random_ids(3, 12, seed=9), None, TIMESTEPS, 1)


def test_rows_are_paired_differences_from_the_twins(
    tiny: DiffusionLM, start: QuantizedLM, calibration: Calibration, held_out: States, tmp_path: Path
) -> None:
    rows = TimeNormsStudy(tmp_path / "s.json", tiny, start, held_out, calibration).run(VARIANTS, seeds=(0, 3))
    assert [(row["count"], row["smoothing"], row["window"]) for row in rows] == [
        (3, "linear", 1),
        (3, None, None),
        (2, "linear", 1),
    ]
    assert len({row["twin"] for row in rows}) == 1, "variants that are trained alike share a twin"
    totals = []
    for count in (2, 1):
        for seed in (0, 3):
            seeded = quantize(tiny, start.config.replace(seed=seed))
            lm = train_time_norms(seeded, tiny, calibration, **VARIANTS[0] | {"count": count})
            totals.append(path_kl(tiny, lm, held_out, TIMESTEPS).total)
    assert rows[2]["path_kl"] == pytest.approx(np.mean(totals[:2]), rel=1e-6)
    assert rows[2]["change"] == pytest.approx(np.mean(totals[:2]) - np.mean(totals[2:]), rel=1e-4, abs=1e-6)
    for row in rows:
        low, high = row["change_ci"]
        assert low <= row["change"] <= high
        assert row["change"] == pytest.approx(row["path_kl"] - row["twin"])
        assert row["activation_bits"] == 16
        assert row["bits_per_weight"] > start.bits_per_weight
        assert row["start"] == pytest.approx(path_kl(tiny, start, held_out, TIMESTEPS).total)
    assert len(json.loads((tmp_path / "s.json").read_text())["rows"]) == 1 + 2 * 4
    assert table(rows, COLUMNS).count("linear    norms               16") == 2


class Stopped(Exception):
    """Stands for what ends a process."""


def test_a_stopped_study_goes_on(
    tiny: DiffusionLM,
    start: QuantizedLM,
    calibration: Calibration,
    held_out: States,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def made(name: str) -> TimeNormsStudy:
        return TimeNormsStudy(tmp_path / name, tiny, start, held_out, calibration)

    whole = made("whole.json").run(VARIANTS[:2])
    save, train, calls = Snapshot.save, study.train_time_norms, []

    def save_and_stop(self: Snapshot, state: dict[str, torch.Tensor]) -> None:
        save(self, state)
        if len(calls) == 2:
            raise Stopped

    def counted(*given: object, **settings: object) -> QuantizedLM:
        calls.append(settings["count"])
        return train(*given, **settings)

    monkeypatch.setattr(study, "train_time_norms", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Snapshot, "save", save_and_stop)
        with pytest.raises(Stopped):
            made("s.json").run(VARIANTS[:2])
    assert (tmp_path / "s.json.snapshots").is_dir()
    calls.clear()
    assert made("s.json").run(VARIANTS[:2]) == whole
    assert calls == [3, 3], "the twin was finished"
    calls.clear()
    assert made("s.json").run(VARIANTS[:1]) == whole[:1]
    assert calls == []
    assert not list((tmp_path / "s.json.snapshots").glob("*"))


def test_what_is_wrong_is_said_before_any_work(
    tiny: DiffusionLM, start: QuantizedLM, calibration: Calibration, held_out: States, tmp_path: Path
) -> None:
    path = tmp_path / "s.json"
    study = TimeNormsStudy(path, tiny, start, held_out)
    for variants, seeds, message in (
        ([{"count": 7}], (0,), r"time_norms\.count: found 7, allowed are 1\.\.6"),
        ([{}], (0, 0), r"seeds: found \[0, 0\], allowed is at least one"),
        ([{}], (), r"seeds: found \[\], allowed is at least one"),
        ([{}], (0,), "calibration: found None, required by states='calibration'"),
        ([TimeNorms(states="fresh")], (0,), "calibration: found None, required by states='fresh'"),
    ):
        with pytest.raises(ValueError, match=message):
            study.run(variants, seeds=seeds)
    assert not path.exists()
    fresh = TimeNorms(states="fresh", num_texts=2, steps=2, count=2)
    prompts = [EmptyTexts(12, tiny.mask_token_id)]
    (row,) = TimeNormsStudy(path, tiny, start, held_out, prompts=prompts).run([fresh])
    assert row["count"] == 2
    with pytest.raises(ValueError, match=r"s\.json: found variants of other weights or states, delete it"):
        TimeNormsStudy(path, tiny, start, held_out, calibration)


def test_the_twin_is_trained_alike() -> None:
    phase = TimeNorms(count=4, starts=(1, 2, 9), steps=7, what="network", norm_lr=0.1, states="fresh", own_share=0.5)
    one = twin(phase)
    assert (one.count, one.starts, one.smoothing, one.window) == (1, None, None, None)
    alone = {"count", "starts", "smoothing", "window"}
    assert one.model_dump(exclude=alone) == phase.model_dump(exclude=alone)


def test_intervals_are_over_sequences_and_seeds() -> None:
    by_sequence = np.array([[0.0, 4.0] * 8])
    value, (low, high) = paired_change(by_sequence)
    assert value == 2.0
    assert low < 1.5 < 2.5 < high
    by_seed = np.repeat([[0.0], [4.0]], 16, axis=1)
    assert paired_change(by_seed)[1] == (0.0, 4.0), "sequences agree, seeds don't"
    assert paired_change(np.ones((2, 5)))[1] == (1.0, 1.0)

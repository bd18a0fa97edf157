"""Measurements of version 0.1 get today's names, and no number changes."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from thermo_lib.files.reading import read_json
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.parts import GPTQ, Dynamic, PathKL, Static, TimeGrouping
from thermo_lib.studies import migrate
from thermo_lib.studies.grid import Grid, Point, point

OLD = Path(__file__).with_name("data") / "study_0_1.json"  # three rows of its study
EXPECTED = [
    ThermoConfig(
        weights=GPTQ(), activations=Static(bits=4, group_size=128), time_groups=TimeGrouping(count=3, window=3)
    ),
    ThermoConfig(weights=GPTQ(), activations=Dynamic(bits=4)),
    ThermoConfig(
        weights=GPTQ(),
        activations=Static(bits=4),
        time_groups=TimeGrouping(count=3, smoothing=None),
        training=(PathKL(what="parameters", markov_weight=1.0),),
    ),
]


@pytest.fixture
def old() -> dict[str, Any]:
    return read_json(OLD)


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "point"}


class TestStudy:
    """A file of points."""

    def test_points_mean_what_they_meant(self, old: dict[str, Any]) -> None:
        assert [migrate.migrate_point(row["point"]) for row in old["rows"]] == [Point(config) for config in EXPECTED]

    def test_seed_and_recipe_stay(self, old: dict[str, Any]) -> None:
        flat = old["rows"][0]["point"] | {"calibration_seed": 2, "recipe": "best starts"}
        assert migrate.migrate_point(flat) == Point(EXPECTED[0], 2, "best starts")

    def test_a_window_that_acted_as_the_longest_is_cut_without_a_word(
        self, old: dict[str, Any], recwarn: pytest.WarningsRecorder
    ) -> None:
        assert old["rows"][0]["point"]["smoothing_window"] == 5  # groups of 5, 5 and 6 timesteps take 3
        assert migrate.migrate_point(old["rows"][0]["point"]).config.smoothing_window == 3
        assert list(recwarn) == []

    def test_every_number_stays(self, old: dict[str, Any]) -> None:
        before = copy.deepcopy(old)
        changed = migrate.migrate_study(old)
        assert old == before
        found = {Point.from_dict(row["point"]).key: numbers(row) for row in changed["rows"]}
        expected = {Point(c).key: numbers(row) for c, row in zip(EXPECTED, old["rows"], strict=True)}
        assert found == expected
        assert list(found) == sorted(expected)
        assert changed["made_of"] == {
            "weights": old["made_of"]["weights"],
            "inputs": {
                "sequences": 40, "trajectories": 16, "source": "trajectory", "code_sequences": 32, "puzzles": 16
            },
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("number", "field", "value"),
        [(0, "smoothing_window", 3), (1, "smoothing_window", 2), (1, "range_objective", "output"), (2, "own_share", 0)],
    )
    def test_two_points_that_mean_the_same_are_refused(
        self, old: dict[str, Any], number: int, field: str, value: Any
    ) -> None:
        row = copy.deepcopy(old["rows"][number])
        row["point"][field] = value
        with pytest.raises(ValueError, match=r"study: found two points that mean the same: .*'gptq'"):
            migrate.migrate_study(old | {"rows": [*old["rows"], row]})

    def test_the_file_is_read_by_the_grid(self, tmp_path: Path, tiny: DiffusionLM, old: dict[str, Any]) -> None:
        path = tmp_path / "study.json"
        shutil.copy(OLD, path)
        assert migrate.main([str(path)]) == 0
        grid = Grid(path, tiny)
        p = point(activation_bits=4, num_time_groups=3, method="linear", **{"activations.group_size": 128})
        assert grid[p].accuracy_per_sequence == old["rows"][0]["accuracy_per_sequence"]
        assert not grid.current  # measured on the reference model
        written = path.read_bytes()
        assert len(grid.rows) == 3
        with pytest.raises(ValueError, match="found points of other weights or inputs"):
            grid.save()
        assert path.read_bytes() == written

    def test_other_numbers_leave_the_file_as_it_was(
        self, tmp_path: Path, old: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "study.json"
        shutil.copy(OLD, path)
        changed = migrate.migrate_study(old)
        changed["rows"][1]["accuracy_per_sequence"][0] += 1e-6
        monkeypatch.setattr(migrate, "migrate_study", lambda content: changed)
        with pytest.raises(ValueError, match=r"study\.json: found other numbers after the migration"):
            migrate.main([str(path)])
        assert path.read_bytes() == OLD.read_bytes()


class TestPeers:
    """The report of the peers: only digests of settings are new."""

    def test_this_projects_rows_get_todays_digests(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(migrate, "made_of", lambda job: f"new {job.name}")
        ours = next(job for job in migrate.JOBS if job.adapter == "thermo")
        theirs = next(job for job in migrate.JOBS if job.adapter != "thermo")
        rows = [
            {"method": m, "setting": s, "made_of": "old", "accuracy": 0.1 * i}
            for i, (m, s) in enumerate([(ours.method, ours.setting), (theirs.method, theirs.setting), ("gone", "s")])
        ]
        content = {"full_precision": {"accuracy": 0.5}, "rows": rows, "errors": []}
        path = tmp_path / "peers.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        migrate.main([str(path)])
        changed = read_json(path)
        assert [row["made_of"] for row in changed["rows"]] == [f"new {ours.name}", "old", "old"]
        assert [row["accuracy"] for row in changed["rows"]] == [row["accuracy"] for row in rows]
        assert changed["full_precision"] == content["full_precision"]

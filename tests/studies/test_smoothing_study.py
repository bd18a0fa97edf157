"""The grid: points that mean the same are one, a killed run goes on, and every comparison is paired."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thermo_lib.evaluation.scores import build_suite, evaluate
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.params import default
from thermo_lib.studies import grid as grid_module
from thermo_lib.studies import smoothing as study
from thermo_lib.studies.grid import Grid, Row, key, point
from thermo_lib.studies.smoothing import gain, path_kl_change

SMALL = {
    "data.sequence_length": 24,
    "study.base": {**default("study.base"), "timesteps": 4, "group_size": 16},
    "calibration.code_sequences": 4,
    "calibration.puzzles": 2,
    "ranges.tokens": 16,
    "ranges.output_steps": 3,
    "ranges.path_kl_steps": 3,
    "ranges.choice_states": 4,
    "transition.steps": 3,
    "evaluation.sequences": 6,
    "evaluation.trajectories": 4,
    "evaluation.sudoku": 2,
    "evaluation.resamples": 50,
}
Override = Callable[[dict[str, Any]], None]


@pytest.fixture(autouse=True)
def small(override: Override, small_corpus: None) -> None:
    """Every test has sizes that take seconds."""
    override(SMALL)


def points() -> list[study.Point]:
    """One point of every way of building a model."""
    return [
        point(quantizer="rtn"),
        point(quantizer="rtn", num_time_groups=2, method="linear"),
        point(quantizer="rtn", activation_bits=4, num_time_groups=2, method="cubic"),
        point(quantizer="rtn", activation_bits=4, activation_ranges="dynamic"),
        point(quantizer="rtn", activation_bits=4, num_time_groups=2, method="spline", range_objective="path_kl"),
        point(quantizer="rtn", activation_bits=4, num_time_groups=2, recipe="best starts", method="linear"),
        point(quantizer="rtn", activation_bits=4, num_time_groups=2, recipe="best per layer"),
        point(quantizer="rtn", activation_bits=4, num_time_groups=2, recipe="best per layer by path KL"),
        point(quantizer="rtn", activation_bits=4, num_time_groups=2, method="linear", transitions="parameters"),
        point(quantizer="rtn", activation_bits=4, activation_ranges="dynamic", transitions="codes"),
        point(seed=1, quantizer="rtn", activation_bits=4, activation_token_states=True),
    ]


class TestKeys:
    """A key holds what matters for a point, and nothing else."""

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"method": "linear"}, {"method": "cubic"}),  # one group: nothing to smooth
            ({"activation_ranges": "dynamic", "activation_bits": 4, "range_objective": "output"},
             {"activation_ranges": "dynamic", "activation_bits": 4}),
            ({"activation_ranges": "dynamic", "activation_clip": 0.9}, {"activation_ranges": "dynamic"}),  # at 16 bits
            ({"num_time_groups": 2, "smoothing_window": 3}, {"num_time_groups": 2, "smoothing_window": 4}),
            ({"num_time_groups": 2, "smoothing_window": 3, "method": "linear"},
             {"num_time_groups": 2, "smoothing_window": 2, "method": "linear"}),  # half of two timesteps
            ({"num_time_groups": 4, "method": "linear"}, {"num_time_groups": 4}),  # half of one is none
            ({"num_time_groups": 2, "method": "spline", "smoothing_window": 3},
             {"num_time_groups": 2, "method": "spline"}),
        ],
    )  # fmt: skip
    def test_equal_meaning_is_one_key(self, one: dict[str, Any], other: dict[str, Any]) -> None:
        assert key(point(**one)) == key(point(**other))

    def test_different_points_have_different_keys(self) -> None:
        assert len({key(p) for p in points()}) == len(points())


class TestGrid:
    """Points are measured once and kept."""

    def test_scores_are_those_of_the_evaluation(self, tiny: DiffusionLM, tmp_path: Path) -> None:
        grid = Grid(tmp_path / "grid.json", tiny)
        grid.run(points(), progress=False)
        suite = build_suite(tiny, timesteps=4)
        models = grid_module._Models(tiny)
        for p in points():
            result, row = evaluate(models.build(p), suite), grid[p]
            assert row.accuracy == pytest.approx(result.accuracy, abs=1e-5)
            assert row.path_kl == pytest.approx(result.path.total, abs=1e-5)
            assert row.path_kl_per_timestep == pytest.approx(result.path.per_timestep.tolist(), abs=1e-5)
        assert grid[points()[1]].markov_score is not None
        assert grid[points()[0]].markov_score is None

    def test_a_killed_run_goes_on_and_writes_the_same_file(
        self, tiny: DiffusionLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = Grid(tmp_path / "whole.json", tiny)
        whole.run(points(), progress=False)
        calls = []

        def be_killed(*arguments: Any) -> Row:
            calls.append(arguments)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return score(*arguments)

        score = grid_module.score
        monkeypatch.setattr(grid_module, "score", be_killed)
        with pytest.raises(KeyboardInterrupt):
            Grid(tmp_path / "grid.json", tiny).run(points(), progress=False)
        resumed = Grid(tmp_path / "grid.json", tiny)
        assert len(resumed.rows) == 2
        resumed.run(points(), progress=False)
        assert len(calls) == 3 + len(points()) - 2
        assert (tmp_path / "grid.json").read_bytes() == (tmp_path / "whole.json").read_bytes()

    def test_a_point_that_was_not_measured_is_named(self, tiny: DiffusionLM, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"grid\.json: the point .*rtn.* has not been measured"):
            Grid(tmp_path / "grid.json", tiny)[points()[0]]

    def test_points_of_another_model_or_other_sizes_are_not_mixed(
        self, tiny: DiffusionLM, build_tiny: Callable[[int], DiffusionLM], tmp_path: Path, override: Override
    ) -> None:
        Grid(tmp_path / "grid.json", tiny).run(points()[:1], progress=False)
        before = (tmp_path / "grid.json").read_bytes()
        for changes, model in (({}, build_tiny(1)), ({"evaluation.sequences": 7}, tiny)):
            override({**SMALL, **changes})
            grid = Grid(tmp_path / "grid.json", model)
            assert not grid.current
            assert grid[points()[0]].accuracy >= 0  # what was measured can still be read
            with pytest.raises(ValueError, match="found points of other weights or parameters"):
                grid.run(points(), progress=False)
        assert (tmp_path / "grid.json").read_bytes() == before


class TestComparisons:
    """Differences are paired and average the seeds."""

    @staticmethod
    def row(accuracies: list[float], path_kls: list[float]) -> Row:
        """A row with given scores."""
        return Row(point(), accuracies, [], path_kls, [], None, None, 2.25)

    def test_a_gain_is_relative_and_paired(self) -> None:
        before = [self.row([0.2, 0.8], [5.0, 50.0]), self.row([0.4, 0.8], [7.0, 52.0])]
        after = [self.row([0.22, 0.88], [4.0, 49.0]), self.row([0.44, 0.88], [6.0, 51.0])]
        value, ci = gain(after, before)
        assert (value, *ci) == pytest.approx((0.1, 0.1, 0.1))
        value, ci = path_kl_change(after, before)
        assert (value, *ci) == pytest.approx((-1, -1, -1))

    def test_verdicts_average_the_seeds(self, tmp_path: Path, tiny: DiffusionLM) -> None:
        grid = Grid(tmp_path / "grid.json", tiny)
        fields = {"activation_bits": 4, "num_time_groups": 2}
        for seed in (0, 1):
            for method, accuracy, jump in ((None, 0.4, 0.2), ("linear", 0.41 + 0.01 * seed, 0.05 + 0.06 * seed)):
                p = point(seed, method, **fields)
                grid.rows[key(p)] = Row(p, [accuracy, accuracy], [], [1.0], [], 0.8 + 0.1 * seed, jump, 2.25)
        gain_row, markov_row, cut_row = study.verdicts(grid, fields, ["linear"], [0, 1])
        assert gain_row["value"] == pytest.approx(0.0375)
        assert gain_row["verdict"] == "met"  # 2 %, and no two sequences differ
        assert (markov_row["value"], markov_row["verdict"]) == (pytest.approx(0.85), "inconclusive")  # 0.8 and 0.9
        assert cut_row["ci"] == pytest.approx([0.45, 0.75])
        assert cut_row["verdict"] == "inconclusive"
        assert {row["precision"] for row in (gain_row, markov_row, cut_row)} == {"W2A4"}

    def test_only_what_all_seeds_have_is_averaged(self, tmp_path: Path, tiny: DiffusionLM) -> None:
        grid = Grid(tmp_path / "grid.json", tiny)
        for seed, bits in ((0, 16), (1, 16), (0, 8)):
            p = point(seed, activation_bits=bits)
            grid.rows[key(p)] = self.row([0.2 + 0.2 * seed] * 2, [1.0 + 2 * seed])
            grid.rows[key(p)].point.update(p)
        (both,) = study.over_seeds(grid, [0, 1])
        assert both == {"point": point(0), "accuracy": pytest.approx(0.3), "path_kl": 2.0, "markov_score": None}
        assert len(study.over_seeds(grid, [0])) == 2

    def test_a_field_that_is_newer_than_the_file_had_its_default(self, tmp_path: Path, tiny: DiffusionLM) -> None:
        grid = Grid(tmp_path / "grid.json", tiny)
        grid.rows[key(point())] = self.row([0.5], [1.0])
        grid.save()
        content = json.loads((tmp_path / "grid.json").read_text())
        del content["rows"][0]["point"]["transitions"]
        (tmp_path / "grid.json").write_text(json.dumps(content))
        assert Grid(tmp_path / "grid.json", tiny)[point()].accuracy == 0.5


@pytest.mark.parametrize("axes", ["reduced", "full"])
def test_every_point_of_the_study_is_a_configuration(axes: str, override: Override) -> None:
    override({})
    found = study.slices(default(f"study.{axes}"))
    assert sum(map(len, found.values())) > 3
    for p in (p for ps in found.values() for p in ps):
        assert json.loads(json.dumps(p)) == p
        study.ThermoConfig(**{k: v for k, v in p.items() if k not in (study.SEED, study.RECIPE)})

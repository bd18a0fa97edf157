"""The grid: points that mean the same are one, a killed run goes on, and every comparison is paired."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from thermo_lib import quantize
from thermo_lib.evaluation.scores import build_suite, evaluate
from thermo_lib.evaluation.smoothing import Targets
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.model import QuantizedLM
from thermo_lib.pipeline.parts import TimeGrouping
from thermo_lib.studies import grid as grid_module
from thermo_lib.studies import smoothing as study
from thermo_lib.studies.grid import Grid, Inputs, Point, PointRow, point
from thermo_lib.studies.params import default
from thermo_lib.studies.smoothing import gain, path_kl_change, slices

ROOT = Path(__file__).resolve().parents[2]

SMALL = Inputs(sequences=4, trajectories=2, code_sequences=2, puzzles=1)
WEIGHTS = {"quantizer": "rtn", "group_size": 16, "timesteps": 4}
DYNAMIC = {**WEIGHTS, "activation_bits": 4, "activation_ranges": "dynamic"}
STATIC = {**WEIGHTS, "activation_bits": 4, "activations.tokens": 16}
GROUPED = {**STATIC, "num_time_groups": 2}
TRAINED = {"path_kl.steps": 3, "path_kl.batch": 4}
FRESH = {"path_kl.steps": 3, "path_kl.states": "fresh", "path_kl.num_texts": 2, "path_kl.num_prompts": 1}

pytestmark = pytest.mark.usefixtures("small_corpus")


def points() -> list[Point]:
    """One point of every way of building a model."""
    fitted = {"activations.steps": 3, "activations.batch": 4}
    return [
        point(**WEIGHTS),
        point(**WEIGHTS, num_time_groups=2, method="linear"),
        point(**GROUPED, method="cubic"),
        point(**DYNAMIC),
        point(**GROUPED, method="spline", **{"activations.fit_to": "path_kl"}, **fitted),
        point(**GROUPED, recipe="best starts", method="linear"),
        point(**GROUPED, recipe="best per layer"),
        point(**GROUPED, recipe="best per layer by path KL"),
        point(**GROUPED, method="linear", **TRAINED),
        point(**DYNAMIC, **TRAINED, **{"path_kl.what": "codes"}),
        point(**DYNAMIC, **FRESH, **{"path_kl.own_share": 0.5}),
        point(seed=1, **STATIC, **{"activations.by_token_state": True}),
        point(**STATIC),
        point(**STATIC, **{"mix.code_sequences": 3}),
        point(**STATIC, **{"mix.source": "forward"}),
    ]


class TestKeys:
    """A key holds what matters for a point, and nothing else."""

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"activation_bits": 16, "activation_ranges": "static"}, {}),
            ({"activations": {"ranges": "dynamic", "bits": 4}}, {"activation_ranges": "dynamic", "activation_bits": 4}),
            ({"activations.fit_to": "output", "activations.steps": 150}, {"activations.fit_to": "output"}),
            ({"path_kl.steps": 300}, {"path_kl.what": "parameters"}),
            ({"num_time_groups": 2, "smoothing_window": 3}, {"num_time_groups": 2, "smoothing_window": 4}),
            ({"num_time_groups": 2, "smoothing_window": 3, "method": "linear"},
             {"num_time_groups": 2, "smoothing_window": 2, "method": "linear"}),  # half of two timesteps
            ({"num_time_groups": 4, "method": "linear"}, {"num_time_groups": 4}),  # half of one is none
            ({"num_time_groups": 2, "method": "spline", "smoothing_window": 3},
             {"num_time_groups": 2, "method": "spline"}),
        ],
    )  # fmt: skip
    def test_equal_meaning_is_one_key(self, one: dict[str, Any], other: dict[str, Any]) -> None:
        assert point(**one, timesteps=4).key == point(**other, timesteps=4).key

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"method": "linear"}, "method: found 'linear', allowed is None with one time group"),
            ({"recipe": "best starts"}, "recipe: found 'best starts', expected time_groups"),
            ({"activation_ranges": "dynamic", "activation_clip": 0.9}, "activation_ranges: found 'dynamic'"),  # 16 bits
            ({"activation_ranges": "dynamic", "activation_bits": 4, "activations.fit_to": "output"}, "fit_to"),
        ],
    )
    def test_what_has_no_meaning_is_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            point(**fields)

    def test_different_points_have_different_keys(self) -> None:
        assert len({p.key for p in points()}) == len(points())

    def test_a_point_is_read_as_it_was_written(self) -> None:
        for p in points():
            assert Point.from_dict(json.loads(json.dumps(p.to_dict()))) == p

    def test_no_smoothing_unless_it_is_asked_for(self) -> None:
        assert point(num_time_groups=2).config.smoothing_method is None
        assert point(num_time_groups=2, method="cubic", smoothing_window=2).config.time_groups == TimeGrouping(
            count=2, smoothing="cubic", window=2
        )


@pytest.fixture(scope="module")
def shallow(build_tiny: Callable[..., DiffusionLM]) -> DiffusionLM:
    """A model of one block: seven linears, enough for layers that choose for themselves."""
    return build_tiny(0, num_hidden_layers=1)


WHERE = {"config": {}, "calibration_seed": 0, "recipe": None}


def _row(file: dict[str, Any], name: str, *value: Any) -> dict[str, Any]:
    """A file of points whose first row has another value of a field, or hasn't that field."""
    row = {key: kept for key, kept in file["rows"][0].items() if key != name}
    return file | {"rows": [row | dict.fromkeys([name] if value else [], *value)]}


class TestGrid:
    """Points are measured once and kept."""

    @pytest.mark.slow
    def test_scores_are_those_of_the_evaluation(self, shallow: DiffusionLM, tmp_path: Path) -> None:
        grid = Grid(tmp_path / "grid.json", shallow, SMALL)
        grid.run(points(), progress=False)
        suite = build_suite(shallow, timesteps=4, sequences=4, trajectories=2, sudoku=0)
        models = grid_module._Models(shallow, SMALL)
        for p in points():
            result, row = evaluate(models.build(p), suite), grid[p]
            assert row.accuracy == pytest.approx(result.accuracy, abs=1e-5)
            assert row.path_kl == pytest.approx(result.path.total, abs=1e-5)
            assert row.path_kl_per_timestep == pytest.approx(result.path.per_timestep.tolist(), abs=1e-5)
        assert grid[points()[1]].markov_score is not None
        assert grid[points()[0]].markov_score is None

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda _: [], "found a list, expected an object with 'rows'"),
            (lambda _: {}, "rows: found none, allowed is a list"),
            (lambda file: {"rows": file["rows"]}, "made_of: found none, allowed is an object"),
            (lambda file: file | {"rows": [[]]}, "rows: row 0: found a list, expected an object"),
            (lambda file: _row(file, "point"), "rows: row 0: point: found none, allowed is an object"),
            (lambda file: _row(file, "markov_score"), "rows: row 0: markov_score: missing, allowed are point"),
            (lambda file: _row(file, "mean_jump", "1"), "rows: row 0: mean_jump: found '1', allowed is a number"),
            (lambda file: _row(file, "colour", 1), "rows: row 0: colour: unknown, allowed are point"),
            (lambda file: _row(file, "9" * 3000, 1), "rows: row 0: 9999"),
            (lambda file: _row(file, "point", WHERE | {"mix": {"x\u2028" * 3000: 1}}), r"point: mix.'x\u2028x"),
            (lambda file: _row(file, "point", WHERE | {"config": {"[\u2028" * 3000: 1}}), r"point: '[\u2028["),
            (lambda file: _row(file, "bits_per_weight", True), "bits_per_weight: found True, allowed is a number"),
            (lambda file: _row(file, "accuracy_per_sequence", [None]), "accuracy_per_sequence: found [None], allowed"),
            (lambda file: _row(file, "point", {}), "rows: row 0: point: config: found none, allowed"),
            (lambda file: _row(file, "point", WHERE | {"config": 7}), "point: config: found 7, allowed is an object"),
            (lambda file: _row(file, "point", WHERE | {"config": {"seed": "x"}}), "row 0: point: seed: found 'x'"),
            (lambda file: _row(file, "point", WHERE | {"calibration_seed": -1}), "point: calibration_seed: found -1"),
            (
                lambda file: _row(file, "point", WHERE | {"mix": {"x": 1}}),
                "point: mix.x: unknown, allowed are mix.",
            ),
            (lambda file: _row(file, "point", WHERE | {"recipe": "x"}), "point: recipe: found 'x', allowed are best"),
        ],
    )
    def test_a_damaged_file_is_named_with_row_and_field(
        self, change: Callable[[Any], Any], message: str, tiny: DiffusionLM, tmp_path: Path
    ) -> None:
        numbers = {"accuracy_per_sequence": [0.5], "accuracy_per_timestep": [1]}
        numbers |= {"path_kl_per_sequence": [2.0], "path_kl_per_timestep": [2.0], "bits_per_weight": 2.25}
        row = {"point": WHERE, **numbers, "markov_score": None, "mean_jump": 0.5}
        path = tmp_path / "grid.json"
        path.write_text(json.dumps({"made_of": {}, "rows": [row]}), encoding="utf-8")
        assert Grid(path, tiny, SMALL)[Point.from_dict(WHERE)].mean_jump == 0.5
        path.write_text(json.dumps(change({"made_of": {}, "rows": [row]})), encoding="utf-8")
        with pytest.raises(ValueError, match=r"grid\.json: ") as error:
            Grid(path, tiny, SMALL)
        assert message in str(error.value)
        assert len(str(error.value).splitlines()) == 1

    def test_where_nothing_is_missing_there_is_no_bar(
        self, tiny: DiffusionLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        grid = Grid(tmp_path / "grid.json", tiny, SMALL)
        grid.run(points()[:1])
        assert "1/1" in capsys.readouterr().err
        grid.run(points()[:1])
        assert capsys.readouterr() == ("", "")

    @pytest.mark.slow
    def test_a_killed_run_goes_on_and_writes_the_same_file(
        self, shallow: DiffusionLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        some = points()[:4]
        Grid(tmp_path / "whole.json", shallow, SMALL).run(some, progress=False)
        calls = []

        def be_killed(*arguments: Any) -> PointRow:
            calls.append(arguments)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return score(*arguments)

        score = grid_module.score
        monkeypatch.setattr(grid_module, "score", be_killed)
        with pytest.raises(KeyboardInterrupt):
            Grid(tmp_path / "grid.json", shallow, SMALL).run(some, progress=False)
        resumed = Grid(tmp_path / "grid.json", shallow, SMALL)
        assert len(resumed.rows) == 2
        resumed.run(some, progress=False)
        assert len(calls) == 3 + len(some) - 2
        assert (tmp_path / "grid.json").read_bytes() == (tmp_path / "whole.json").read_bytes()

    def test_a_point_that_was_not_measured_is_named(self, tiny: DiffusionLM, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"grid\.json: the point .*rtn.* has not been measured"):
            Grid(tmp_path / "grid.json", tiny, SMALL)[points()[0]]

    def test_points_of_another_model_or_other_sizes_are_not_mixed(
        self, tiny: DiffusionLM, build_tiny: Callable[[int], DiffusionLM], tmp_path: Path
    ) -> None:
        Grid(tmp_path / "grid.json", tiny, SMALL).run(points()[:1], progress=False)
        before = (tmp_path / "grid.json").read_bytes()
        others = [(SMALL, build_tiny(1))]
        others += [
            (replace(SMALL, **{name: 7}), tiny) for name in ("sequences", "trajectories", "code_sequences", "puzzles")
        ]
        others += [(replace(SMALL, source="forward"), tiny)]
        for inputs, model in others:
            grid = Grid(tmp_path / "grid.json", model, inputs)
            assert not grid.current
            assert grid[points()[0]].accuracy >= 0  # what was measured can still be read
            with pytest.raises(ValueError, match="found points of other weights or inputs"):
                grid.run(points(), progress=False)
        assert (tmp_path / "grid.json").read_bytes() == before


class TestComparisons:
    """Differences are paired and average the seeds."""

    @staticmethod
    def row(accuracies: list[float], path_kls: list[float], at: Point | None = None) -> PointRow:
        """A row with given scores."""
        return PointRow(at or point(), accuracies, [], path_kls, [], None, None, 2.25)

    def test_a_gain_is_relative_and_paired(self) -> None:
        before = [self.row([0.2, 0.8], [5.0, 50.0]), self.row([0.4, 0.8], [7.0, 52.0])]
        after = [self.row([0.22, 0.88], [4.0, 49.0]), self.row([0.44, 0.88], [6.0, 51.0])]
        value, ci = gain(after, before)
        assert (value, *ci) == pytest.approx((0.1, 0.1, 0.1))
        value, ci = path_kl_change(after, before)
        assert (value, *ci) == pytest.approx((-1, -1, -1))

    def test_verdicts_average_the_seeds(self, tmp_path: Path, tiny: DiffusionLM) -> None:
        grid = Grid(tmp_path / "grid.json", tiny, SMALL)
        fields = {"activation_bits": 4, "num_time_groups": 2}
        for seed in (0, 1):
            for method, accuracy, jump in ((None, 0.4, 0.2), ("linear", 0.41 + 0.01 * seed, 0.05 + 0.06 * seed)):
                p = point(seed, method, **fields)
                grid.rows[p.key] = PointRow(p, [accuracy, accuracy], [], [1.0], [], 0.8 + 0.1 * seed, jump, 2.25)
        gain_row, markov_row, cut_row = study.verdicts(grid, fields, ["linear"], [0, 1])
        assert gain_row["value"] == pytest.approx(0.0375)
        assert gain_row["verdict"] == "met"  # 2 %, and no two sequences differ
        assert (markov_row["value"], markov_row["verdict"]) == (pytest.approx(0.85), "inconclusive")  # 0.8 and 0.9
        assert cut_row["ci"] == pytest.approx([0.45, 0.75])
        assert cut_row["verdict"] == "inconclusive"
        assert {row["precision"] for row in (gain_row, markov_row, cut_row)} == {"W2A4"}

    def test_only_what_all_seeds_have_is_averaged(self, tmp_path: Path, tiny: DiffusionLM) -> None:
        grid = Grid(tmp_path / "grid.json", tiny, SMALL)
        for seed, bits in ((0, 16), (1, 16), (0, 8)):
            p = point(seed, activation_bits=bits)
            grid.rows[p.key] = self.row([0.2 + 0.2 * seed] * 2, [1.0 + 2 * seed], p)
        (both,) = study.over_seeds(grid, [0, 1])
        assert both == {"point": point(0), "accuracy": pytest.approx(0.3), "path_kl": 2.0, "markov_score": None}
        assert len(study.over_seeds(grid, [0])) == 2

    def test_verdicts_take_the_claims_asked_for(self, tmp_path: Path, tiny: DiffusionLM) -> None:
        grid = Grid(tmp_path / "grid.json", tiny, SMALL)
        fields = {"activation_bits": 4, "num_time_groups": 2}
        for method, jump in ((None, 0.2), ("linear", 0.1)):
            p = point(0, method, **fields)
            grid.rows[p.key] = PointRow(p, [0.5, 0.5], [], [1.0], [], 0.9, jump, 2.25)
        found = study.verdicts(
            grid, fields, ["linear"], [0], Targets(accuracy_gain=-0.1, markov_score=0.95, jump_cut=0.6)
        )
        assert [(row["target"], row["verdict"]) for row in found] == [
            (-0.1, "met"),
            (0.95, "not met"),
            (0.6, "not met"),
        ]


def test_norms_are_trained_when_activations_are_quantized(tiny: DiffusionLM) -> None:
    p, models = point(**DYNAMIC, **{"time_norms.count": 2, "time_norms.steps": 3}), grid_module._Models(tiny, SMALL)
    built, whole = models.build(p), quantize(tiny, p.config, models.calibration(p))
    assert built.config == whole.config
    assert torch.equal(built.model.model.norm.time_weight, whole.model.model.norm.time_weight)


class TestFreshStates:
    """A point that is trained on fresh states is built with the settings that it names."""

    @pytest.mark.parametrize("own_share", [0.0, 0.25])
    def test_all_settings_reach_the_training(
        self, tiny: DiffusionLM, monkeypatch: pytest.MonkeyPatch, own_share: float
    ) -> None:
        asked: list[dict[str, Any]] = []

        def record(lm: QuantizedLM, *_: Any, **settings: Any) -> QuantizedLM:
            assert lm.config.training == ()
            asked.append(settings)
            return lm

        monkeypatch.setattr(grid_module, "optimize_transitions", record)
        settings = {
            "what": "network", "states": "fresh", "steps": 5, "num_texts": 3, "num_prompts": 0, "own_share": own_share,
            "scale_lr": 0.1, "zero_point_lr": 0.2, "code_lr": 0.3, "range_lr": 0.4, "network_lr": 0.5,
        }  # fmt: skip
        p = point(**DYNAMIC, **{f"path_kl.{name}": value for name, value in settings.items()})
        grid_module._Models(tiny, SMALL).build(p)
        assert asked == [{**settings, "batch": None, "markov_weight": 0.0}]

    @pytest.mark.slow
    def test_they_make_another_model_than_calibration_states(self, shallow: DiffusionLM) -> None:
        models = grid_module._Models(shallow, SMALL)
        shares = ({"path_kl.own_share": 0.0}, {"path_kl.own_share": 1.0})
        trained = [models.build(point(**DYNAMIC, **{**FRESH, **share})) for share in shares]
        trained.append(models.build(point(**DYNAMIC, **TRAINED)))
        scales = [torch.cat([layer.scale.flatten() for layer in lm.quantized_layers().values()]) for lm in trained]
        assert not any(a.equal(b) for a, b in itertools.combinations(scales, 2))


@pytest.mark.parametrize("axes", ["reduced", "full"])
def test_every_point_of_the_study_is_a_configuration(axes: str) -> None:
    found = slices(default(f"study.{axes}"))
    assert sum(map(len, found.values())) > 3
    for p in (p for ps in found.values() for p in ps):
        assert Point.from_dict(json.loads(json.dumps(p.to_dict()))) == p


def test_the_committed_file_holds_exactly_the_points_of_the_study() -> None:
    content = json.loads((ROOT / "reports" / "study.json").read_text(encoding="utf-8"))
    measured = [Point.from_dict(row["point"]).key for row in content["rows"]]
    assert len(set(measured)) == len(measured)
    axes = (default("study.full"), default("study.reduced"))
    assert set(measured) == {p.key for each in axes for ps in slices(each).values() for p in ps}

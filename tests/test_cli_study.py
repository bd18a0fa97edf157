"""The commands of the smoothing study measure what is missing, and refuse a wrong word before any work."""

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from small_runs import Run

from thermo_lib import commands
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.studies import grid
from thermo_lib.studies import smoothing as study
from thermo_lib.studies.grid import Inputs
from thermo_lib.studies.params import default, grid_inputs, read_params

pytestmark = pytest.mark.slow

SMALL = Inputs(sequences=4, trajectories=2, code_sequences=2, puzzles=1)


@pytest.fixture(scope="module")
def shallow(build_tiny: Callable[..., DiffusionLM]) -> DiffusionLM:
    """A model of one block, which the commands read whatever its name."""
    return build_tiny(0, num_hidden_layers=1)


class TestPoint:
    """One configuration of the study."""

    def test_it_prints_the_scores_of_all_seeds(
        self, run: Run, shallow: DiffusionLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(commands, "load_model", lambda name: shallow)
        monkeypatch.setattr(commands, "Grid", lambda path, reference: grid.Grid(path, reference, SMALL))
        fields = {"quantizer": "rtn", "timesteps": 4, "activation_bits": 8, "num_time_groups": 2, "method": "linear"}
        fields |= {"activations.fit_to": "output", "activations.steps": 2}
        words = shlex.split(study.command(fields, [0, 1]))
        assert words[:3] == ["python", "-m", "thermo_lib"]
        code, out, _ = run(*words[3:], "--output", "points.json")
        assert code == 0
        measured = study.Grid("points.json", shallow, SMALL)
        accuracies = [measured[study.point(seed, **fields)].accuracy for seed in (0, 1)]
        assert "activation_bits=8 num_time_groups=2 method=linear activations.fit_to=output" in out
        assert f"{min(accuracies):.4f}..{max(accuracies):.4f}" in out

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("activation_bits", "point: found 'activation_bits', expected NAME=VALUE"),
            (
                "colour=1",
                "NAME one of preset, method, recipe, mix.code_sequences, mix.puzzles, mix.source, embedding_bits",
            ),
            ("num_time_groups=0", "num_time_groups: found 0"),
            ("method=linear", "method: found 'linear', allowed is None with one time group"),
            ("time_groups.smoothing=quadratic", "smoothing: found 'quadratic'"),
        ],
    )
    def test_a_wrong_word_is_refused_before_any_work(self, run: Run, word: str, message: str) -> None:
        code, out, err = run("point", word)
        assert (code, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1

    def test_a_wrong_method_is_refused_before_any_work(self, run: Run) -> None:
        code, _, err = run("point", "method=quadratic", "num_time_groups=2")
        assert code == 2
        assert "method: found 'quadratic', allowed are linear, cubic, sigmoid, spline, null" in err

    def test_its_inputs_are_those_of_the_study(
        self, run: Run, tiny: DiffusionLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[grid.Grid] = []

        def record(*arguments: object) -> grid.Grid:
            made.append(grid.Grid(*arguments))
            raise ValueError("enough")

        monkeypatch.setattr(commands, "load_model", lambda name: tiny)
        monkeypatch.setattr(commands, "Grid", record)
        for words in (("point",), ("study", "--output", "grid.json")):
            assert run(*words)[0] == 2
        assert [each.inputs for each in made] == [grid_inputs(), grid_inputs()]


class TestStudy:
    """The grid of the smoothing study."""

    def test_it_measures_what_is_missing_and_keeps_the_rest(
        self, run: Run, shallow: DiffusionLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        axes = {**default("study.reduced"), "activation_bits": [8], "num_time_groups": [2], "few_groups": [1]}
        content = read_params() | {
            "study": default("study") | {"reduced": axes},
            "calibration": {"source": "trajectory", "sequences": 2, "puzzles": 1},
            "evaluation": default("evaluation") | {"sequences": 4, "trajectories": 2},
        }
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        monkeypatch.setattr(commands, "default", partial(default, path=path))
        monkeypatch.setattr(commands, "grid_inputs", partial(grid_inputs, path))
        monkeypatch.setattr(commands, "load_model", lambda name: shallow)
        assert run("study", "--axes", "reduced", "--output", "grid.json")[0] == 0
        first = Path("grid.json").read_bytes()
        content = json.loads(first)
        assert {row["point"]["config"]["activations"]["bits"] for row in content["rows"]} == {4, 8}
        assert content["made_of"]["inputs"] == vars(SMALL)
        monkeypatch.setattr(grid, "score", lambda *_: pytest.fail("a point was measured again"))
        assert run("study", "--axes", "reduced", "--output", "grid.json")[0] == 0
        assert Path("grid.json").read_bytes() == first

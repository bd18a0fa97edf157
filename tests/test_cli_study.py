"""The commands of the smoothing study measure what is missing, and refuse a wrong word before any work."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_params import TINY_PARAMS, Run

from thermo_lib import __main__ as command_line
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.params import default
from thermo_lib.studies import grid
from thermo_lib.studies import smoothing as study


class TestPoint:
    """One configuration of the study."""

    def test_it_prints_the_scores_of_all_seeds(
        self, run: Run, tiny: DiffusionLM, monkeypatch: pytest.MonkeyPatch, override: Callable[[dict[str, Any]], None]
    ) -> None:
        base = {**default("study.base"), "quantizer": "rtn", "timesteps": 4, "group_size": 16}
        override({**TINY_PARAMS, "study.base": base})
        monkeypatch.setattr(command_line, "load_model", lambda name: tiny)
        fields = {"activation_bits": 8, "num_time_groups": 2, "method": "linear"}
        words = shlex.split(study.command(fields, [0, 1]))
        assert words[:3] == ["python", "-m", "thermo_lib"]
        code, out, _ = run(*words[3:], "--output", "points.json")
        assert code == 0
        grid = study.Grid("points.json", tiny)
        accuracies = [grid[study.point(seed, **fields)].accuracy for seed in (0, 1)]
        assert "activation_bits=8 num_time_groups=2 method=linear" in out
        assert f"{min(accuracies):.4f}..{max(accuracies):.4f}" in out

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("activation_bits", "point: found 'activation_bits', expected NAME=VALUE"),
            ("seed=1", "NAME one of method, recipe, bit_width"),
            ("num_time_groups=0", "num_time_groups"),
            ("method=quadratic", "smoothing_method"),
        ],
    )
    def test_a_wrong_word_is_refused_before_any_work(self, run: Run, word: str, message: str) -> None:
        code, _, err = run("point", word)
        assert code == 2
        assert message in err


class TestStudy:
    """The grid of the smoothing study."""

    def test_it_measures_what_is_missing_and_keeps_the_rest(
        self, run: Run, tiny: DiffusionLM, monkeypatch: pytest.MonkeyPatch, override: Callable[[dict[str, Any]], None]
    ) -> None:
        axes = {**default("study.reduced"), "activation_bits": [8], "num_time_groups": [1, 2], "few_groups": [1]}
        base = {**default("study.base"), "quantizer": "rtn", "timesteps": 4, "group_size": 16}
        override({**TINY_PARAMS, "study.reduced": axes, "study.base": base})
        monkeypatch.setattr(command_line, "load_model", lambda name: tiny)
        assert run("study", "--axes", "reduced", "--output", "grid.json")[0] == 0
        first = Path("grid.json").read_bytes()
        rows = json.loads(first)["rows"]
        assert {row["point"]["activation_bits"] for row in rows} == {4, 8}
        monkeypatch.setattr(grid, "score", lambda *_: pytest.fail("a point was measured again"))
        assert run("study", "--axes", "reduced", "--output", "grid.json")[0] == 0
        assert Path("grid.json").read_bytes() == first

"""Files of results that are damaged: one line names the field, what was found and what is allowed."""

import json
import random
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from thermo_lib.evaluation import page
from thermo_lib.evaluation.results import read_report_json, read_results
from thermo_lib.studies.grid import _read_rows, point

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))
from mutations import as_json, change_json

ROOT = Path(__file__).resolve().parents[2]
HUGE = 10**400


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The project's report, with a few rows, which are drawn faster."""
    found = json.loads((ROOT / "reports" / "report.json").read_text(encoding="utf-8"))
    return found | {name: found[name][:3] for name in ("configurations", "targets")}


def test_three_hundred_damaged_reports_are_refused_in_one_line_or_have_a_page(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pages, draw = tmp_path / "report.json", 0, page._figures
    for seed in range(300):
        content, changed = change_json(report, random.Random(seed))
        path.write_bytes(as_json(content, random.Random(seed)))
        monkeypatch.setattr(page, "_figures", draw if seed % 15 == 0 else lambda _: [])
        try:
            read = read_report_json(path)
        except ValueError as error:
            said = str(error)
        else:
            said = ""
        if said:
            assert re.fullmatch(rf"{re.escape(str(path))}[:,][^\n]{{,1000}}", said), changed
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that no font has
            assert page.report_page(read).startswith("<!DOCTYPE html>"), changed
        pages += 1
    assert 100 < pages < 250


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (("versions",), None, "versions: found None, allowed is a mapping"),
        (("versions", "torch"), 2, "versions.torch: found 2, allowed is a text"),
        (("hardware", "threads"), "2", "hardware.threads: found '2', allowed is a whole number"),
        (("seeds",), {}, "seeds.all: found none, it must be there"),
        (("full_precision",), [], "full_precision: found [], allowed is a mapping"),
        (("full_precision", "nelbo"), "x", "full_precision.nelbo: found 'x', allowed is a number"),
        (("configurations", 1, "path_kl"), True, "configurations.1.path_kl: found True, allowed is a number"),
        (("configurations", 1, "accuracy"), 10**30, f"configurations.1.accuracy: found {10**30}, allowed is less than"),
        (
            ("configurations", 1, "path_kl_ci"),
            [1.0],
            "configurations.1.path_kl_ci: found 1 items, allowed are at least",
        ),
        (
            ("configurations", 1, "accuracy_ci"),
            [1, 0],
            "configurations.1.accuracy_ci: found [1, 0], allowed is the low",
        ),
        (
            ("configurations", 1, "path_kl_per_timestep"),
            [],
            "configurations.1.path_kl_per_timestep: found 0 items, allow",
        ),
        (("configurations", 1, "name"), "$x$", "configurations.1.name: found '$x$', allowed is a text without ends of"),
        (
            ("configurations", 1, "name"),
            "full precision",
            "configurations: found the name 'full precision' twice, allow",
        ),
        (("configurations", 1, "markov_score"), {}, "configurations.1.markov_score: found {}, allowed is a number"),
        (
            ("targets", 0, "verdict"),
            "won",
            "targets.0.verdict: found 'won', allowed is 'met', 'not met' or 'inconclusiv",
        ),
        (("targets", 0, "precision"), 4, "targets.0.precision: found 4, allowed is a text"),
        (("targets",), "x", "targets: found 'x', allowed is a list"),
    ],
    ids=str,
)
def test_a_report_says_which_field_is_wrong(
    report: dict[str, Any], place: tuple[str | int, ...], value: Any, problem: str, tmp_path: Path
) -> None:
    content = json.loads(json.dumps(report))
    owner = content
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = value
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {problem}")) as error:
        read_report_json(path)
    assert "\n" not in str(error.value)


def test_how_many_more_fields_are_wrong_is_said(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report | {"model": 1, "seeds": 2, "versions": 3}))
    with pytest.raises(ValueError, match=r": .*: found .* \(2 more\)$"):
        read_report_json(tmp_path / "report.json")


SCORES = {"name": "m", "accuracy": 0.5, "sequences": {"inputs": "x", "accuracy": [0.4, 0.6]}}


def measured() -> dict[str, Any]:
    """A file of points with one point."""
    lists = {"accuracy_per_sequence": [0.5], "accuracy_per_timestep": [0.5], "path_kl_per_sequence": [2.0]}
    lists |= {"path_kl_per_timestep": [2.0], "markov_score": None, "mean_jump": 0.5, "bits_per_weight": 2.25}
    return {"made_of": {"weights": "x"}, "rows": [lists | {"point": point(3).to_dict()}]}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"sequences": {"inputs": "x", "accuracy": []}}, "sequences.accuracy: found 0 items, allowed are at least 1"),
        ({"sequences": {"accuracy": [1.0]}}, "sequences.inputs: found none, it must be there"),
        ({"sequences": []}, "sequences: found [], allowed is a mapping"),
        ({"accuracy_ci": [0.1, "x"]}, "accuracy_ci.1: found 'x', allowed is a number"),
        ({"name": None}, "name: found None, allowed is a text"),
        ({"nelbo": float("nan")}, "nelbo: found nan, allowed is"),
    ],
    ids=str,
)
def test_scores_that_cannot_be_compared(fields: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(SCORES))
    assert read_results(path).rows == {"m": SCORES}
    path.write_text(json.dumps(SCORES | fields))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {problem}")):
        read_results(path)


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (("point", "mix"), "x", "rows.0.point.mix: found 'x', allowed is a mapping"),
        (("point", "mix"), {"puzzles": []}, "rows.0.point.mix.puzzles: found [], allowed is a number or a word"),
        (("point", "config"), 3, "rows.0.point.config: found 3, allowed is a mapping"),
        (("point", "config", "timesteps"), "x", "rows.0.point.config.timesteps: found 'x', allowed is a whole number"),
        (("point", "config", "bogus"), 1, "rows.0.point.config: bogus: "),
        (("point", "recipe"), 1, "rows.0.point.recipe: found 1, allowed is a text"),
        (("path_kl_per_sequence",), [None], "rows.0.path_kl_per_sequence.0: found None, allowed is a number"),
    ],
    ids=str,
)
def test_points_that_cannot_be_compared(place: tuple[str, ...], value: Any, problem: str, tmp_path: Path) -> None:
    path, content = tmp_path / "points.json", measured()
    path.write_text(json.dumps(content))
    assert read_results(path).kind == "points"
    owner = content["rows"][0]
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {problem}")):
        read_results(path)


@pytest.mark.parametrize("read", [read_results, read_report_json, _read_rows])
def test_a_whole_number_that_no_float_holds(read: Any, report: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (SCORES | {"nelbo": HUGE}, report | {"seeds": {"all": HUGE}}, measured() | {"more": [HUGE]}):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"line 1: found invalid JSON \((nelbo|all|more): 10+\.\.\. of 401 char"):
            read(path)

"""What notebooks say follows from the rows that are there; rows that are missing are named, and stop nothing."""

import copy
from typing import Any

import pytest

from thermo_lib.evaluation.display import MOST_SENTENCES, sentences
from thermo_lib.files.text import read_json
from thermo_lib.notebooks import ROOT
from thermo_lib.studies import answers, second_model, timing

REPORTS = ROOT / "reports"
BOUNDS = {"kept": 0.99, "kept_a4": 0.97, "share": 1 / 3}


@pytest.fixture
def witness() -> dict[str, Any]:
    return read_json(REPORTS / "witness.json")


@pytest.fixture
def scored() -> dict[str, Any]:
    return read_json(REPORTS / "peers.json")


def both(scored: dict[str, Any], witness: dict[str, Any]) -> list[dict[str, Any]]:
    return second_model.both_models(scored["rows"], witness["rows"], "round-to-nearest")


def test_the_second_models_verdict_is_that_of_its_targets(witness: dict[str, Any], scored: dict[str, Any]) -> None:
    found = answers.second_model(witness, both(scored, witness)).answer
    assert sentences(found) <= MOST_SENTENCES
    turned = copy.deepcopy(witness)
    for row in turned["targets"]:
        row["verdict"] = "inconclusive"
    assert "is inconclusive here" in answers.second_model(turned, both(scored, witness)).answer


@pytest.mark.parametrize("name", ["targets", "time_norms", "variance", "rows"])
def test_the_second_models_answer_goes_on_without_some_results(
    witness: dict[str, Any], scored: dict[str, Any], name: str
) -> None:
    rows = both(scored, witness)
    less = answers.second_model({**witness, name: type(witness[name])()}, rows)
    assert 1 <= sentences(less.answer) <= MOST_SENTENCES
    assert ("Not measured yet" in less.more) == (name != "rows")


def test_a_row_at_another_precision_gets_a_sentence_of_its_own(witness: dict[str, Any]) -> None:
    row = next(row for row in witness["rows"] if "change" in row)
    witness["rows"].append({**row, "activation_bits": 8, "change": -1.5, "change_ci": [-2.0, -1.0]})
    assert "At W2A8 the best schedule" in answers.second_model(witness, []).more


def test_standing_names_the_best_other_methods_and_judges_the_goals(scored: dict[str, Any]) -> None:
    field = answers.Field.of(scored, 2.6)
    goals = field.goals(**BOUNDS)
    found = answers.standing(field, goals).answer
    best = min((r for r in scored["rows"] if not r["method"].startswith("thermo_lib")), key=lambda r: r["path_kl"])
    assert f"{best['method']}, {best['path_kl']:.1f} nats" in found
    assert sentences(found) <= MOST_SENTENCES


@pytest.mark.parametrize("kept", ["thermo_lib", "AutoRound", "thermo_lib GPTQ"])
def test_standing_goes_on_with_the_rows_of_one_method(scored: dict[str, Any], kept: str) -> None:
    field = answers.Field.of({**scored, "rows": [r for r in scored["rows"] if r["method"] == kept]}, 2.6)
    found = answers.standing(field, field.goals(**BOUNDS))
    assert 1 <= sentences(found.answer) <= MOST_SENTENCES
    names = {"whole": "thermo_lib trellis: all phases"}
    assert "whole" in answers.ablation(field, names, "thermo_lib GPTQ: group 128")[1]


@pytest.mark.parametrize("bits", [0.5, 1.99, 4.01, "x", True])
def test_bits_that_no_two_bit_method_has_are_refused(scored: dict[str, Any], bits: float) -> None:
    with pytest.raises(ValueError, match=rf"^bits: found {bits!r}, allowed are numbers from 2 to 4$"):
        answers.Field.of(scored, bits)


def test_standing_says_where_no_other_method_is_as_small(scored: dict[str, Any]) -> None:
    said = "No other method that was measured stores at most 2 bits"
    for bits, is_said in ((2, True), (2.6, False)):
        field = answers.Field.of(scored, bits)
        assert (said in answers.standing(field, field.goals(**BOUNDS)).more) == is_said


def test_an_ablation_without_rows_is_all_missing(scored: dict[str, Any]) -> None:
    field = answers.Field.of({**scored, "rows": []}, 2.6)
    assert answers.ablation(field, {"a": "b: c"}, "x: y") == ([], ["x: y", "a"])


def test_without_points_smoothing_is_said_not_to_be_measured() -> None:
    found = answers.smoothing([], [], [], [], [], 1)
    assert found.answer == "What smoothing does to accuracy has not been measured."
    assert found.more == ""
    assert "too few" in answers.correlation("All", [])


@pytest.mark.parametrize("missing", ["speed", "peers_speed", "peers_gpu"])
@pytest.mark.parametrize("tokens", [1, 256, 7])
def test_speeds_are_said_of_the_reports_that_are_there(missing: str, tokens: int) -> None:
    names = ("speed", "peers_speed", "peers_gpu")
    reports = [None if name == missing else read_json(REPORTS / f"{name}.json") for name in names]
    assert sentences(timing.answer(*reports, tokens)) == MOST_SENTENCES
    assert ("nothing has been measured" in timing.answer(*reports, 256)) == (missing != "peers_speed")

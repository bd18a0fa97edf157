"""The workbench shows what a choice does, says what has no effect, and gives the lines that make the same model."""

from typing import Any

import pytest
import torch

from thermo_lib.diffusion.path_kl import path_kl
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.storage import load_quantized
from thermo_lib.workbench.session import MASKED, Choice, Session, differences
from thermo_lib.workbench.widgets import Workbench, summary, tokens_html

STEPS = 4
PLAIN = Choice(time_groups=2, window=1)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("workbench")
    return Session(folder=folder, trajectories=2, code_sequences=1, puzzles=1, timesteps=STEPS)


def test_what_is_shown_is_what_the_library_measures(session: Session) -> None:
    view, lm = session.show(PLAIN), session.build(PLAIN)
    found = path_kl(session.lm, lm, session.suite.trajectories, STEPS)
    assert view.path_kl == pytest.approx(found.per_timestep.tolist())
    assert view.total == pytest.approx(found.total)
    assert view.total_ci[0] <= view.total <= view.total_ci[1]
    assert view.bits_per_weight == lm.bits_per_weight
    assert view.smoothness.score < 1
    raw, smoothed = lm.time_params[view.layer], lm.smoothed_params()[view.layer]
    assert view.before == [float(raw[group].scale) for group in (0, 0, 1, 1)]
    assert view.after == [float(step.scale) for step in smoothed]
    assert view.after != view.before


def test_a_change_is_against_the_choice_before(session: Session) -> None:
    first = session.show(PLAIN)
    same = session.show(PLAIN)
    other = session.show(Choice(weights="round-to-nearest", time_groups=2, window=1))
    assert same.change == 0
    assert other.change == pytest.approx(other.total - first.total)
    assert other.change_ci[0] <= other.change <= other.change_ci[1]


def test_the_denoising_goes_from_masks_to_text_step_by_step(session: Session) -> None:
    session.ask_puzzle()
    texts = session.show(PLAIN).texts
    for steps in texts.values():
        masks = [step.count(MASKED) for step in steps]
        assert len(steps) == STEPS + 1
        assert masks[0] == len(steps[0])
        assert masks == sorted(masks, reverse=True)
        assert masks[-1] == 0
    assert differences(texts, 0) == [False] * len(texts["quantized"][0])
    changed = {**texts, "quantized": [*texts["quantized"][:-1], ["x", *texts["quantized"][-1][1:]]]}
    assert differences(changed, STEPS)[0]


def test_another_prompt_is_continued_and_the_puzzle_comes_back(session: Session) -> None:
    puzzle = session.prompt
    session.ask("class A:", 5)
    assert len(session.show(PLAIN).texts["full precision"][0]) == 5
    with pytest.raises(ValueError, match="prompt: found '', allowed is a text that isn't empty"):
        session.ask("")
    session.ask_puzzle()
    assert session.prompt == puzzle


@pytest.mark.parametrize(
    "choice",
    [PLAIN, Choice(activation_bits=16), Choice("round-to-nearest, 4 bits", time_groups=1, activation_bits=8)],
    ids=str,
)
def test_the_lines_of_code_make_the_same_model(session: Session, choice: Choice) -> None:
    found: dict[str, Any] = {}
    exec(session.code(choice), found)
    shown = session.build(choice)
    assert found["quantized"].config.digest() == shown.config.digest()
    expected = shown.model.state_dict()
    for name, tensor in found["quantized"].model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_what_is_saved_is_the_model_of_the_choice(session: Session) -> None:
    folder = session.save(PLAIN)
    assert folder.is_relative_to(session.folder)
    expected = session.build(PLAIN).model.state_dict()
    for name, tensor in load_quantized(folder).model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"activation_bits": 16}, "activation_bits: found 16, so nothing depends on the timestep"),
        ({"time_groups": 1}, "time_groups: found 1, which has no boundary to smooth"),
        ({"time_groups": 9}, "time_groups: found 9, shown are 4"),
        ({"time_groups": 2, "window": 20}, "window: found 20, half of a group is 1"),
    ],
)
def test_what_has_no_effect_is_said_and_the_rest_goes_on(session: Session, fields: dict[str, Any], note: str) -> None:
    choice = Choice(**{"smoothing": "linear", "window": 1} | fields)
    (said,) = [line for line in session.notes_of(choice) if line.startswith(note)]
    assert len(said.splitlines()) == 1
    assert session.show(choice).notes[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "x"}, "weights: found 'x', allowed are round-to-nearest, least squares"),
        ({"activation_bits": 5}, "activation_bits: found 5, allowed are 16, 8, 4, 3, 2"),
        ({"smoothing": "x"}, "smoothing: found 'x', allowed are None, linear"),
        ({"window": 0}, "window: found 0, allowed are whole numbers from 1 to 20"),
        ({"time_groups": True}, "time_groups: found True, allowed are whole numbers from 1 to 64"),
    ],
)
def test_a_choice_out_of_range_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Choice(**fields)


def test_a_layer_that_is_not_there_and_weights_that_are_not_made_are_named(session: Session) -> None:
    with pytest.raises(ValueError, match=r"layer: found 'x', allowed are the quantized linears, model\.layers\.0"):
        session.show(Choice(layer="x"))
    with pytest.raises(ValueError, match="weights: found 'GPTQ', which aren't made yet; press Make"):
        session.show(Choice(weights="GPTQ"))
    assert session.seconds_of("GPTQ") > session.seconds_of("least squares") == 0


@pytest.mark.slow
def test_slow_weights_are_made_in_a_process_that_can_be_stopped(session: Session) -> None:
    job = session.make("GPTQ")
    job.stop()
    assert job.result().startswith("stopped after 0 of 4 blocks")
    assert not session.is_ready("GPTQ")
    job = session.make("GPTQ")
    assert job.result().startswith("made in")
    assert job.share == 1
    assert session.is_ready("GPTQ")
    expected = quantize(session.lm, session.config_of(Choice(weights="GPTQ", activation_bits=16)), session.calibration)
    found = session.build(Choice(weights="GPTQ", activation_bits=16)).model.state_dict()
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, found[name]), name


class TestWidgets:
    """The widgets show the session's numbers, and an error on one line."""

    @pytest.fixture(scope="class")
    @classmethod
    def bench(cls, session: Session) -> Workbench:
        return Workbench(session)

    def test_a_widget_that_is_moved_changes_what_is_shown(self, bench: Workbench) -> None:
        before, picture = bench.numbers.value, bench.chart.value
        bench.groups.value = 4
        assert bench.view.choice.time_groups == 4
        assert bench.chart.value != picture
        assert bench.numbers.value != before
        assert bench.numbers.value == summary(bench.view)
        bench.step.value = 0
        assert bench.texts.value == tokens_html(bench.view, 0)
        assert MASKED in bench.texts.value

    def test_what_is_the_matter_is_said_and_the_view_stays(self, bench: Workbench) -> None:
        shown = bench.view
        bench.weights.value = "trellis"
        assert "trellis: not made yet; Make takes about" in bench.message.value
        assert bench.view is shown
        assert not bench.make.disabled
        bench.weights.value = "least squares"
        assert bench.message.value == ""
        assert bench.make.disabled

    def test_buttons_give_code_and_a_folder(self, bench: Workbench) -> None:
        bench.code.click()
        assert bench.lines.value == bench.session.code(bench.choice)
        bench.name.value = "mine"
        bench.save.click()
        assert "saved/mine; load_quantized reads it" in bench.message.value
        bench.name.value = "../mine"
        bench.save.click()
        assert "error: name: found" in bench.message.value

"""The workbench shows what a choice does, says what has no effect, and gives the lines that make the same model."""

import html
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from thermo_lib.diffusion.path_kl import path_kl
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.parts import LeastSquares
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.storage import load_quantized
from thermo_lib.workbench.choices import Choice
from thermo_lib.workbench.job import Job, Progress
from thermo_lib.workbench.session import MASKED, Session, differences
from thermo_lib.workbench.widgets import Workbench, figure, summary, tokens_html

STEPS = 4
SLOW = Choice(weights="GPTQ", activation_bits=16)
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
    each = found.per_sequence.T.tolist()  # two sequences, so that the interval of a step reaches from one to the other
    assert view.path_kl_ci == [pytest.approx((min(step), max(step))) for step in each]
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
    assert other.changes == pytest.approx([new - old for new, old in zip(other.path_kl, same.path_kl, strict=True)])
    assert all(low <= step <= high for step, (low, high) in zip(other.changes, other.changes_ci, strict=True))
    assert [len(figure(view, last).axes) for view, last in ((same, None), (other, same))] == [2, 3]
    bands = [len(ax.collections) for ax in figure(other, same).axes]
    assert bands == [0, 2, 1]


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


def test_clues_are_seen_from_the_start_and_told_from_what_is_filled(session: Session) -> None:
    session.ask_puzzle()
    view = session.show(PLAIN)
    clues = [cell for cell in session.prompt if cell in "1234"]
    assert [clue for clue in view.given if clue] == clues
    shown = re.findall(r'<span style="([^"]*)">(.*?)</span>', tokens_html(view, 0))
    assert [word for _, word in shown if word != MASKED] == 2 * clues
    copied = re.findall(r'<span style="([^"]*)">(.*?)</span>', tokens_html(view, STEPS))[: len(view.given)]
    styles = {bool(clue): style for (style, _), clue in zip(copied, view.given, strict=True)}
    assert styles[True] != styles[False]
    session.ask("class A:", 5)
    assert tokens_html(session.show(PLAIN), 0).count("class A:") == 2
    session.ask_puzzle()


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
    [
        PLAIN,
        Choice(activation_bits=16),
        Choice("round-to-nearest", weight_bits=4, group_size=None, time_groups=1, activation_bits=8),
        Choice("preset fast", activation_bits=None),
        Choice("preset fast", activation_bits=4, is_dynamic=True),
    ],
    ids=["static", "16 bits", "fields", "preset", "dynamic"],
)
def test_the_lines_of_code_make_the_same_model(session: Session, choice: Choice) -> None:
    found: dict[str, Any] = {}
    assert len(session.code(choice).split("\n")) <= 13
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
        ({"activation_bits": 16}, "activation_bits: found 16, so time groups have no effect"),
        ({"is_dynamic": True}, "activation_bits: found dynamic ranges, so time groups have no effect"),
        ({"weights": "preset fast"}, "weights: found preset fast, which has bits and groups of its own"),
        ({"time_groups": 1}, "time_groups: found 1, which has no boundary to smooth"),
        ({"time_groups": 9}, "time_groups: found 9, shown are 4"),
        ({"time_groups": 2, "window": 20}, "window: found 20, half of a group is 1"),
    ],
)
def test_what_has_no_effect_is_said_and_the_rest_goes_on(session: Session, fields: dict[str, Any], note: str) -> None:
    choice = Choice(**{"smoothing": "linear", "window": 1} | fields)
    (said,) = [line for line in choice.notes(STEPS) if line.startswith(note)]
    assert len(said.splitlines()) == 1
    assert session.show(choice).notes[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "x"}, "weights: found 'x', allowed are round-to-nearest, least squares"),
        ({"activation_bits": 5}, "activation_bits: found 5, allowed are 16, 8, 4, 3, 2"),
        ({"activation_bits": None}, "activation_bits: found None, allowed are 16, 8, 4, 3, 2"),
        ({"group_size": 5}, "group_size: found 5, allowed are 32, 64, 128, 256, None"),
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
    with pytest.raises(ValueError, match="weights: gptq-2-bits-128 aren't made yet; press Make"):
        session.show(SLOW)
    with pytest.raises(ValueError, match=r"weights.bits: found 2.5, allowed is 2, 4 or 8"):
        session.show(Choice(weight_bits=2.5))
    assert session.seconds_of(SLOW) > session.seconds_of(PLAIN) == 0
    assert session.seconds_of(Choice("preset best")) > 2 * session.seconds_of(Choice("trellis, spread bits", 2.17))


@pytest.mark.slow
def test_slow_weights_are_made_in_a_process_that_can_be_stopped(session: Session) -> None:
    job = session.make(SLOW)
    job.stop()
    assert job.result().startswith("stopped; the next start goes on")
    assert not session.is_ready(SLOW)
    job = session.make(SLOW)
    assert job.result().startswith("made in")
    assert job.progress.what.startswith("gptq")
    assert session.is_ready(SLOW)
    expected = quantize(session.lm, SLOW.weights_config(STEPS), session.calibration)
    found = session.build(SLOW).model.state_dict()
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, found[name]), name


def test_weights_of_another_model_or_seed_are_not_taken_for_this_one_s(session: Session) -> None:
    other = Session(folder=session.folder, trajectories=2, code_sequences=1, puzzles=1, timesteps=STEPS, seed=1)
    places = [session._place(SLOW), other._place(SLOW), session._place(replace(SLOW, weight_bits=4))]
    assert len(set(places)) == 3
    assert session._place(replace(SLOW, time_groups=1)) == places[0]


def test_what_a_job_says_is_read_from_its_last_bar(tmp_path: Path) -> None:
    work = tmp_path / "place-unfinished"
    work.mkdir()
    (work / "said.txt").write_text(
        "\rweights: 100%|##| 4/4 [00:04<00:00]\r path KL W2:  37%|###7  | 3/8 [01:00<01:42, 2s/it]"
    )
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        job = Job(tmp_path / "place", process)
        assert job.progress == Progress("path KL W2", 0.37, "01:42")
        with pytest.raises(ValueError, match=r"weights: could not be made .*01:42"):
            job.result()
    (work / "said.txt").write_text("\rpath KL W2:   0%|  | 0/8 [00:00<?, ?it/s]")
    assert job.progress == Progress("path KL W2", 0.0, "")
    (work / "said.txt").unlink()
    (work / "said.txt").touch()
    assert job.progress == Progress()


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
        assert "trellis-2-bits: not made yet; Make takes about" in bench.message.value
        assert bench.view is shown
        assert not bench.make.disabled
        bench.weights.value = "least squares"
        assert bench.message.value == ""
        assert bench.make.disabled

    def test_a_preset_comes_with_bits_and_activations_of_its_own(self, bench: Workbench) -> None:
        bench.weights.value = "preset fast"
        assert bench.bits.value is None
        assert bench.weight_bits.disabled
        assert bench.view.config == ThermoConfig.preset("fast", timesteps=STEPS)
        bench.bits.value = 8
        bench.weights.value = "least squares"
        assert bench.choice.activation_bits == 8
        assert None not in dict(bench.bits.options).values()
        bench.weight_bits.value = 4
        assert bench.view.config.weights == LeastSquares(bits=4)

    @pytest.mark.parametrize("bits", [5, 99, 0, -1, 2.5])
    def test_bits_that_a_method_cannot_have_are_named(self, bench: Workbench, bits: float) -> None:
        shown = bench.view
        bench.weight_bits.value = bits
        assert f"error: weights.bits: found {bits}, allowed is 2, 4 or 8" in bench.message.value
        assert bench.view is shown
        bench.weight_bits.value = 2
        assert bench.message.value == ""

    def test_buttons_give_code_and_a_folder(self, bench: Workbench) -> None:
        bench.code.click()
        assert bench.lines.value == bench.session.code(bench.choice)
        assert f'data-code="{html.escape(bench.lines.value)}"' in bench.copy.value
        bench.groups.value = 1
        assert bench.lines.value == bench.session.code(bench.choice)
        bench.weight_bits.value = 5
        assert bench.copy.value == ""
        bench.weight_bits.value = 2
        bench.name.value = "mine"
        bench.save.click()
        assert "saved/mine; load_quantized reads it" in bench.message.value
        bench.name.value = "../mine"
        bench.save.click()
        assert "error: name: found" in bench.message.value

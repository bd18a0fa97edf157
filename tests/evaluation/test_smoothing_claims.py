"""Targets on smoothing are measured against the unsmoothed model, its overhead in paired rounds."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import Tensor

from thermo_lib import Calibration, ThermoConfig, evaluate, quantize
from thermo_lib.evaluation import statistics
from thermo_lib.evaluation.display import MOST_SENTENCES, sentences
from thermo_lib.evaluation.scores import Evaluation, Suite, relative_accuracy_gain
from thermo_lib.evaluation.smoothing import (
    CLAIMED,
    Targets,
    answer,
    compare_smoothing,
    denoise_once,
    identity_target,
    overhead_targets,
    same_outputs,
    smoothing_overhead,
    smoothing_targets,
)
from thermo_lib.evaluation.statistics import paired_ratio, verdict
from thermo_lib.evaluation.summary import markov
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.activations import requantize_activations, resmooth
from thermo_lib.pipeline.model import QuantizedLM

TIMESTEPS = 6
RandomIds = Callable[..., Tensor]


@pytest.fixture(scope="module")
def baseline(unsmoothed: QuantizedLM, suite: Suite) -> Evaluation:
    return evaluate(unsmoothed, suite)


class TestQuantizedModels:
    """Rows, targets and validation of quantized models."""

    def test_comparing_gives_a_row_and_three_targets_a_method(self, unsmoothed: QuantizedLM, suite: Suite) -> None:
        rows, targets, models = compare_smoothing(
            unsmoothed, suite, ["linear", "cubic"], claims=Targets(0.01, 0.3, 0.2)
        )
        assert list(models) == ["none", "linear", "cubic"]
        assert models["none"] is unsmoothed
        assert [row["smoothing_method"] for row in rows] == [None, "linear", "cubic"]
        assert [row["name"] for row in rows] == [
            "W8A4 rtn, time groups",
            "W8A4 rtn, time groups, linear",
            "W8A4 rtn, time groups, cubic",
        ]
        names = ["relative accuracy gain", "Markov score", "cut of the mean parameter jump"]
        assert [(t["smoothing_method"], t["name"]) for t in targets] == [
            (m, n) for m in ("linear", "cubic") for n in names
        ]
        assert [t["target"] for t in targets] == [0.01, 0.3, 0.2] * 2
        assert {t["activation_bits"] for t in targets} == {4}
        assert {row["smoothing_window"] for row in rows} == {None, 1}  # at most half of a group

    def test_one_time_group_is_measured_and_said_to_have_no_boundary(
        self, unsmoothed: QuantizedLM, calibration: Calibration, suite: Suite
    ) -> None:
        one = requantize_activations(unsmoothed, calibration, num_time_groups=1)
        rows, targets, _ = compare_smoothing(one, suite, [])
        assert [row["name"] for row in rows] == ["W8A4 rtn, one group"]
        assert targets == []
        said = answer({4: rows}, targets, rows[0], rows[0], CLAIMED)
        assert said.startswith("With one time group (`num_time_groups` is 1) there is no boundary to smooth")
        assert 1 <= sentences(said) <= MOST_SENTENCES
        with pytest.raises(ValueError, match="num_time_groups: found 1, allowed is at least 2"):
            compare_smoothing(one, suite, ["linear"])

    def test_targets_are_measured_against_the_unsmoothed_model(
        self, unsmoothed: QuantizedLM, suite: Suite, baseline: Evaluation
    ) -> None:
        smoothed = resmooth(unsmoothed, "linear")
        scores = evaluate(smoothed, suite)
        gain, score, cut = smoothing_targets(smoothed, scores, unsmoothed, baseline)
        assert (gain["value"], tuple(gain["ci"])) == relative_accuracy_gain(scores, baseline)
        assert gain["value"] == pytest.approx(scores.accuracy / baseline.accuracy - 1)
        assert score["value"] == markov(smoothed).score > markov(unsmoothed).score
        # Window 1 on each side: a third of a jump is left between the two timesteps at a boundary, relative to a value
        # in between.
        rough, smooth = markov(unsmoothed).mean_jump, markov(smoothed).mean_jump
        assert cut["value"] == pytest.approx(1 - smooth / rough)
        assert 0.5 < cut["value"] < 0.8
        for row, key in ((gain, "accuracy_gain"), (score, "markov_score"), (cut, "jump_cut")):
            assert row["target"] == getattr(CLAIMED, key)
            assert row["verdict"] == verdict(tuple(row["ci"]), row["target"], at_least=True)
        claims = Targets(accuracy_gain=-1.0, markov_score=1.5, jump_cut=0.9)
        others = smoothing_targets(smoothed, scores, unsmoothed, baseline, claims)
        assert [row["target"] for row in others] == [-1.0, 1.5, 0.9]
        assert [row["verdict"] for row in others] == ["met", "not met", "not met"]

    def test_without_a_jump_there_is_no_cut_to_measure(self, unsmoothed: QuantizedLM, baseline: Evaluation) -> None:
        flat = replace(
            unsmoothed,
            activation_params={
                name: [replace(p, scale=params[0].scale, zero_point=params[0].zero_point) for p in params]
                for name, params in unsmoothed.activation_params.items()
            },
        )
        targets = smoothing_targets(flat, baseline, flat, baseline)
        assert [t["name"] for t in targets] == ["relative accuracy gain", "Markov score"]
        assert targets[1]["value"] == 1


class TestIdentity:
    """Smoothing switched off leaves every bit as it was."""

    def test_a_model_has_the_outputs_of_its_unsmoothed_self_only(self, unsmoothed: QuantizedLM, suite: Suite) -> None:
        smoothed = resmooth(unsmoothed, "linear")
        assert same_outputs(resmooth(smoothed, None), unsmoothed, suite)
        assert not same_outputs(smoothed, unsmoothed, suite)

    @pytest.mark.parametrize(("same", "expected"), [(True, "met"), (False, "not met")])
    def test_the_target_is_met_by_identity_alone(self, same: bool, expected: str) -> None:
        row = identity_target(same, ThermoConfig(bit_width=4, activation_bits=8))
        assert (row["verdict"], row["precision"], row["value"]) == (expected, "W4A8", float(same))


class TestOverhead:
    """Paired timing: both functions in turns, their order swapped, compared round by round."""

    def test_the_order_is_swapped_from_round_to_round_after_a_warm_up(self) -> None:
        calls: list[str] = []
        result = paired_ratio(lambda: calls.append("candidate"), lambda: calls.append("baseline"), 4)
        pairs = [tuple(calls[i : i + 2]) for i in range(0, 10, 2)]
        assert len(calls) == 10  # the warm-up and four rounds
        assert all(a == b[::-1] for a, b in itertools.pairwise(pairs))
        assert set(pairs[0]) == {"candidate", "baseline"}
        assert result.keys() == {"ratio", "ci", "rounds", "candidate_seconds", "baseline_seconds"}
        assert result["rounds"] == 4

    def test_the_ratio_is_that_of_the_rounds_and_the_warm_up_does_not_count(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # A clock that the two functions move: 3 s and 2 s, in the warm-up 100 s.
        clock = [0.0]
        seconds = {"candidate": iter([100.0, *[3.0] * 5]), "baseline": iter([100.0, *[2.0] * 5])}

        def work(name: str) -> None:
            clock[0] += next(seconds[name])

        monkeypatch.setattr(statistics.time, "perf_counter", lambda: clock[0])
        result = paired_ratio(lambda: work("candidate"), lambda: work("baseline"), 5)
        assert result == {
            "ratio": 1.5,
            "ci": [1.5, 1.5],
            "rounds": 5,
            "candidate_seconds": 3.0,
            "baseline_seconds": 2.0,
        }

    @pytest.mark.parametrize("rounds", [1, 0, -1])
    def test_fewer_than_two_rounds_are_refused(self, rounds: int) -> None:
        with pytest.raises(ValueError, match=f"rounds: found {rounds}, allowed is at least 2"):
            paired_ratio(lambda: None, lambda: None, rounds)

    def test_both_kinds_of_work_are_measured(
        self, unsmoothed: QuantizedLM, calibration: Calibration, suite: Suite
    ) -> None:
        found = smoothing_overhead(unsmoothed, calibration, suite, "linear", rounds=2, sequences=2)
        assert found.keys() == {"quantization", "inference"}
        assert all(measured["rounds"] == 2 and measured["ratio"] > 0 for measured in found.values())
        assert unsmoothed.config.smoothing_method is None

    def test_only_static_activation_ranges_are_fitted_again(
        self, tiny: DiffusionLM, calibration: Calibration, suite: Suite
    ) -> None:
        config = ThermoConfig(
            quantizer="rtn",
            activation_bits=16,
            timesteps=TIMESTEPS,
            num_time_groups=2,
            enable_boundary_smoothing=False,
        )
        lm = quantize(tiny, config, calibration)
        found = smoothing_overhead(lm, calibration, suite, "linear", rounds=2, sequences=2)
        assert found.keys() == {"inference"}

    def test_targets_are_on_the_extra_share_of_time(self) -> None:
        measured = {
            "quantization": {"ratio": 1.02, "ci": [1.01, 1.04]},
            "inference": {"ratio": 1.1, "ci": [1.05, 1.2]},
        }
        rows = overhead_targets(measured, ThermoConfig(activation_bits=8), "cubic")
        assert [row["name"] for row in rows] == ["overhead of quantization", "overhead of inference"]
        assert [row["value"] for row in rows] == pytest.approx([0.02, 0.1])
        assert rows[1]["ci"] == pytest.approx([0.05, 0.2])
        assert [row["verdict"] for row in rows] == ["met", "inconclusive"]  # the target is below 0.1
        assert {(row["activation_bits"], row["smoothing_method"], row["target"]) for row in rows} == {(8, "cubic", 0.1)}
        lenient = overhead_targets(measured, ThermoConfig(activation_bits=8), "cubic", Targets(overhead=0.3))
        assert [row["verdict"] for row in lenient] == ["met", "met"]

    def test_denoising_once_visits_each_timestep(self, unsmoothed: QuantizedLM, random_ids: RandomIds) -> None:
        visited: list[tuple[int, int]] = []
        lm = replace(unsmoothed)
        lm.set_timestep = lambda timestep, timesteps: visited.append((timestep, timesteps))
        denoise_once(lm, random_ids(1, 4), range(TIMESTEPS), TIMESTEPS)
        assert visited == [(i, TIMESTEPS) for i in range(TIMESTEPS)]

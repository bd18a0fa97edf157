"""Evaluations are found again where everything that decides them is the same, and measured anew where it isn't."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from thermo_lib.diffusion.states import States
from thermo_lib.evaluation import measured as module
from thermo_lib.evaluation.measured import Measured
from thermo_lib.evaluation.scores import Evaluation, Suite, evaluate, solve_puzzles
from thermo_lib.files.snapshots import Snapshot
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.activations import requantize_activations
from thermo_lib.pipeline.model import QuantizedLM


@pytest.fixture(scope="module")
def suite(suite: Suite) -> Suite:
    """That of the folder on two of its six timesteps: what is computed at a timestep decides nothing here."""

    def first(states: States) -> States:
        return states[(states.timestep < 2).nonzero().squeeze(-1)]

    return replace(suite, held_out=first(suite.held_out), trajectories=first(suite.trajectories), timesteps=2)


@pytest.fixture(scope="module")
def dynamic(unsmoothed: QuantizedLM) -> QuantizedLM:
    return requantize_activations(unsmoothed, activation_bits=4, activation_ranges="dynamic", num_time_groups=1)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that are evaluated from now on, or whose puzzles are solved."""
    names: list[str] = []

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def run(lm: DiffusionLM, *args: object, **kwargs: object) -> object:
            names.append(lm.name)
            return function(lm, *args, **kwargs)

        return run

    monkeypatch.setattr(module, "evaluate", counted(evaluate))
    monkeypatch.setattr(module, "solve_puzzles", counted(solve_puzzles))
    return names


def same(a: Evaluation, b: Evaluation) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("correct", "masked", "nll")]
    pairs += [(a.path.per_sequence, b.path.per_sequence), (a.path.cosine, b.path.cosine)]
    equal = all(x.dtype == y.dtype and torch.equal(x.nan_to_num(-9), y.nan_to_num(-9)) for x, y in pairs)
    return equal and (a.length, a.puzzles, a.resamples) == (b.length, b.puzzles, b.resamples)


def test_what_was_measured_is_found_again(
    tmp_path: Path, suite: Suite, unsmoothed: QuantizedLM, count: list[str]
) -> None:
    path = tmp_path / "measured.safetensors"
    first = Measured(path)
    found = [first.evaluate(lm, suite) for lm in (suite.reference, unsmoothed)]
    solved = first.solve_puzzles(unsmoothed, suite.puzzles, suite.timesteps)
    first.save()
    del count[:]
    again = Measured(path)
    for lm, expected in zip((suite.reference, unsmoothed), found, strict=True):
        assert same(again.evaluate(copy.deepcopy(lm), suite), expected)
        assert same(evaluate(lm, suite), expected)
    assert again.solve_puzzles(unsmoothed, suite.puzzles, suite.timesteps) == solved
    assert count == []
    before = path.read_bytes()
    again.save()
    assert path.read_bytes() == before


def test_everything_that_decides_it_counts(
    tmp_path: Path, suite: Suite, dynamic: QuantizedLM, count: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(tmp_path / "measured.safetensors")
    measured.evaluate(dynamic, suite)
    measured.save()
    measured = Measured(tmp_path / "measured.safetensors")
    weights = copy.deepcopy(dynamic)
    next(iter(weights.quantized_layers().values())).packed[0, 0] ^= 1
    clipped = requantize_activations(
        dynamic, activation_bits=4, activation_ranges="dynamic", num_time_groups=1, activation_clip=0.8
    )
    other = copy.deepcopy(suite.reference)
    other.model.lm_head.weight.data[0] += 1
    states = replace(suite.held_out, clean=suite.held_out.clean.flip(1))
    for lm, inputs in (
        (weights, suite),
        (clipped, suite),
        (dynamic, replace(suite, temperature=0.5)),
        (dynamic, replace(suite, sampler="origin")),
        (dynamic, replace(suite, reference=other)),
        (dynamic, replace(suite, held_out=states)),
        (dynamic, replace(suite, puzzles=suite.puzzles[:1])),
    ):
        del count[:]
        measured.evaluate(lm, inputs)
        assert len(count) == 1
    monkeypatch.setattr(module, "_code", lambda: "other code")
    del count[:]
    measured.evaluate(dynamic, suite)
    assert len(count) == 1


def test_another_number_of_resamples_is_the_same_measurement(
    tmp_path: Path, suite: Suite, dynamic: QuantizedLM, count: list[str]
) -> None:
    measured = Measured(tmp_path / "measured.safetensors")
    measured.evaluate(dynamic, suite)
    measured.save()
    found = Measured(tmp_path / "measured.safetensors").evaluate(dynamic, replace(suite, resamples=7))
    assert (found.resamples, len(count)) == (7, 1)


def test_what_nobody_asks_for_is_dropped(tmp_path: Path, suite: Suite, unsmoothed: QuantizedLM) -> None:
    path = tmp_path / "measured.safetensors"
    both, one = Measured(path), Measured(tmp_path / "one.safetensors")
    both.evaluate(unsmoothed, suite)
    both.solve_puzzles(unsmoothed, suite.puzzles, suite.timesteps)
    both.save()
    one.evaluate(unsmoothed, suite)
    one.save()
    again = Measured(path)
    again.evaluate(unsmoothed, suite)
    again.save()
    assert path.read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_the_digest_of_the_code_covers_what_computes(tmp_path: Path) -> None:
    names = {"quant/layers.py", "quant/kernels.cpp", "models/lm.py", "diffusion/path_kl.py", "evaluation/scores.py"}
    found = {str(file.relative_to(module._LIBRARY)) for file in module._files()}
    assert names <= found
    assert not any(name.startswith(("studies", "reference", "pipeline")) for name in found)


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "measured.safetensors"
    path.write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"measured.safetensors is not a complete snapshot .* delete it"):
        Measured(path)


def test_an_evaluation_with_a_tensor_missing_is_an_error(
    tmp_path: Path, suite: Suite, unsmoothed: QuantizedLM, count: list[str]
) -> None:
    path = tmp_path / "measured.safetensors"
    first = Measured(path)
    first.evaluate(unsmoothed, suite)
    first.save()
    Snapshot(path, module._FORMAT, is_sealed=False).save({k: v for k, v in load_file(path).items() if "nll" not in k})
    with pytest.raises(ValueError, match=r"measured.safetensors: \w+.nll: found none, allowed is a tensor .*; delete"):
        Measured(path).evaluate(unsmoothed, suite)
    assert count == [unsmoothed.name]

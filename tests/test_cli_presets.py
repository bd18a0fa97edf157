"""Presets stand where a quantization is chosen: a word ``preset=NAME``, and settings that differ from it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_runs import Run

from thermo_lib import ThermoConfig, commands
from thermo_lib.pipeline.presets import PRESETS
from thermo_lib.studies.grid import point, preset_fields


@pytest.mark.parametrize("preset", PRESETS)
def test_a_point_of_a_preset_has_its_configuration(preset: str) -> None:
    assert point(3, **preset_fields({"preset": preset})).config == ThermoConfig.preset(preset)


def test_what_differs_from_a_points_preset_is_kept() -> None:
    fields = {"preset": "w2a4-static", "num_time_groups": 3, "method": "linear", "smoothing_window": 2}
    config = point(0, **preset_fields(fields)).config
    assert (config.time_groups.count, config.time_groups.smoothing, config.time_groups.window) == (3, "linear", 2)
    assert config.replace(time_groups=None) == ThermoConfig.preset("w2a4-static")


def benchmarked(settings: dict[str, Any], **options: Any) -> ThermoConfig:
    """What ``benchmark`` compares, from words and options."""
    none = dict.fromkeys(("bits", "activation_bits", "quantizer", "group_size", "timesteps", "num_time_groups"))
    return commands._benchmarked(SimpleNamespace(settings=settings, **none | options))


def test_a_benchmark_without_words_is_that_of_its_options() -> None:
    config = benchmarked({}, bits=4, num_time_groups=2)
    assert (config.bit_width, config.activations, config.time_groups.count) == (4, None, 2)
    assert (config.quantizer, config.group_size, config.timesteps) == ("gptq", 128, 16)


@pytest.mark.parametrize("preset", ["fast", "gptq", "w2a4-static"])
def test_a_benchmark_of_a_preset_adds_only_time_groups(preset: str) -> None:
    config = benchmarked({"preset": preset})
    assert (config.time_groups.count, config.time_groups.smoothing) == (3, None)
    assert config.replace(time_groups=None) == ThermoConfig.preset(preset)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("preset=fastest",), "preset: found 'fastest', allowed are fast, gptq"),
        (("weights.bits=9",), "bits"),
        (("preset=best",), "time_groups: found some, allowed is None with trellis weights"),
        (("preset=w2a4",), "time_groups: found 3 groups, allowed is None with dynamic ranges"),
        (("timesteps=4", "--timesteps", 4), "timesteps: found it as an option and as a word"),
        (("preset=gptq", "num_time_groups=1"), "num_time_groups: found 1, allowed is at least 2"),
    ],
)
def test_a_wrong_word_is_refused_before_any_work(run: Run, words: tuple[object, ...], message: str) -> None:
    status, out, err = run("benchmark", "--model", "no such folder", *words)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_a_benchmark_of_a_preset_reports_its_quantizer(run: Run, folder: Path) -> None:
    words = ("preset=fast", "group_size=16", "timesteps=4", "--smoothing-method", "linear", "--output", "b")
    status, _, err = run("benchmark", "--model", folder, *words)
    assert status == 0, err
    rows = json.loads(Path("b/report.json").read_text(encoding="utf-8"))["configurations"]
    assert {(row["quantizer"], row["group_size"], row["num_time_groups"]) for row in rows} == {("least_squares", 16, 3)}

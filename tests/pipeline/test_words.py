"""``NAME=VALUE`` words are read as JSON reads them; everything else is refused in one line."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermo_lib import ThermoConfig
from thermo_lib.pipeline.words import WHOLE_FIELDS, read_value, read_words

MORE = {"method": ("linear", None)}


@given(st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.lists(st.integers(0, 99)) | st.floats(-1e9, 1e9))
def test_what_json_writes_is_read_back(value: Any) -> None:
    found = read_value("here", json.dumps(value))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("word", ["gptq", "w2a4-static", "best per layer by path KL", "yes", "NaN", "Infinity"])
def test_a_plain_word_stays_one(word: str) -> None:
    assert read_value("here", word) == word


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "010", "1_000", "0x10", "1:30", "~", ".inf", ".5", "5.", "+1", "--1", "1e", "1e999", "9" * 5000),
        *("[", "[[1]]", "[" * 100_000, "[1,]", "[1.5]", "[a]", "[010]", "{}", "{a: 1}", "&a [1]", "*a", "１２"),
        *("!!timestamp 1", "2001-01-01", "a b  c", "a: b", "a=b", "\"a\"", "ü", "a\0", "a\n", "a\udcff", "1 2"),
    ],
    ids=lambda text: ascii(text[:12]),
)  # fmt: skip
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^here: found .*, allowed are a number as in JSON") as error:
        read_value("here", text)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 250


@given(st.text())
def test_any_text_is_a_value_or_one_line(text: str) -> None:
    value = None
    with suppress(ValueError):
        value = read_value("here", text)
    assert value is None or value == text or json.dumps(value) == text or isinstance(value, int | float | list)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bits"], "point: found 'bits', expected NAME=VALUE, NAME one of method, embedding_bits"),
        (["=3"], "point: found '=3'"),
        (["weights.=3"], "point: found 'weights.=3'"),
        (["weights.a.b=3"], "point: found 'weights.a.b=3'"),
        (["timesteps=4", "timesteps=4"], "timesteps: found it twice, allowed is once"),
        (["method=foo"], "method: found 'foo', allowed are linear, null"),
        (["method=lineal"], "method: found 'lineal', allowed are linear, null; did you mean 'linear'?"),
        (["method=[1]"], "method: found '[1]', allowed are linear, null"),
    ],
)
def test_a_wrong_word_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="found") as error:
        read_words("point", words, MORE)
    assert str(error.value).startswith(message)


def test_the_whole_fields_are_those_of_the_configuration() -> None:
    assert set(WHOLE_FIELDS) == set(ThermoConfig.model_fields)
    words = ["weights.bits=4", "time_groups=null", "method=linear", "seed=3"]
    assert read_words("point", words, MORE) == {"weights.bits": 4, "time_groups": None, "method": "linear", "seed": 3}


@pytest.mark.filterwarnings("ignore:reconstruction:DeprecationWarning")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights.group_size": "128"}, "weights.group_size: found '128', allowed is a whole number"),
        ({"weights.group_size": 2.5}, "weights.group_size: found 2.5, allowed is a whole number"),
        ({"timesteps": 1e300}, r"timesteps: found 1e\+300, allowed is a whole number"),
        ({"weights.damping": True}, "weights.damping: found True, allowed is a number"),
        ({"weights.damping": float("nan")}, "weights.damping: found nan, allowed is a number"),
        ({"weights.damping": 10**400}, "weights.damping: found 1000"),
        ({"weights.group_size": 10**400}, "weights.group_size: found 1000"),
        ({"quantizer": "trellis", "weights.bits": float("nan")}, "found nan, allowed is a number"),
        ({"quantizer": "trellis", "weights.spread": "yes"}, "weights.spread: found 'yes', allowed is True or False"),
        ({"quantizer": "trellis", "weights.spread": 1}, "weights.spread: found 1, allowed is True or False"),
        ({"path_kl.own_share": "yes"}, "own_share: found 'yes', allowed is a number"),
        ({"path_kl.phase": "blocks"}, "path_kl.phase: found 'blocks', allowed are the settings of that phase"),
        ({"reconstruction": [1]}, r"reconstruction: found \[1\], allowed are none, sequential and blocks"),
        ({"weights": 4, "training": 3}, "weights: found 4, allowed is an object; training: found 3, allowed is a list"),
    ],
)
def test_a_setting_of_another_kind_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ThermoConfig(**fields)
    assert str(error.value).isprintable()


def test_of_many_wrong_fields_the_first_are_told() -> None:
    with pytest.raises(ValueError, match=r"training\.0: found 0") as error:
        ThermoConfig(training=[0] * 100, timesteps=0)
    assert str(error.value).count("found") == 8
    assert str(error.value).endswith("; 93 more")


def test_a_whole_number_may_have_a_point() -> None:
    config = ThermoConfig(**{"embedding_bits": 8.0, "weights.bits": 4.0, "timesteps": 8.0})
    assert config.digest() == ThermoConfig(**{"embedding_bits": 8, "weights.bits": 4, "timesteps": 8}).digest()
    assert '"bits":4,' in config.model_dump_json()

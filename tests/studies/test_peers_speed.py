"""The times of two blocks by method: rows from seconds, methods that fail, and this project's own in small."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from thermo_lib.evaluation import figures
from thermo_lib.evaluation.display import OURS
from thermo_lib.evaluation.report import table
from thermo_lib.models.published import DreamConfig
from thermo_lib.studies.peers import llama, speed
from thermo_lib.studies.speed import PEERS_SPEED_COLUMNS

SMALL = DreamConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    mask_token_id=63,
)
BITS = {speed.DENSE: 16.0, "a": 2.25, "b": 2.5}


def served(load: speed.Load, requests: list[str], folder: Path) -> list[dict[str, Any]]:
    answers = io.StringIO()
    speed.serve(load, SMALL, folder, requests, answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def process(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def answering(seconds: float, bits: float = 2.25) -> list[str]:
    """A process that says it takes so long for each token."""
    return process(
        f"import sys, json\nprint(json.dumps({{'bits_per_weight': {bits}}}), flush=True)\n"
        f"for line in sys.stdin: print(json.dumps({{'seconds': {seconds} * int(line)}}), flush=True)"
    )


DIES = process(
    "import os, signal, sys\nprint('{\"bits_per_weight\": 2}', flush=True)\n"
    "for line in sys.stdin:\n"
    "    if int(line) > 1: os.kill(os.getpid(), signal.SIGILL)\n"
    "    print('{\"seconds\": 1.0}', flush=True)"
)


class TestRows:
    def test_medians_of_the_rounds(self) -> None:
        seconds = {speed.DENSE: [1.0, 2.0, 4.0], "a": [0.5, 1.0, 1.0]}
        dense, row, failed = speed.rows_of(32, seconds, BITS, {"b": "no"})
        assert dense == {
            "method": speed.DENSE,
            "bits_per_weight": 16.0,
            "tokens": 32,
            "ms": 2000.0,
            "times_dense": 1.0,
            "ci": [1.0, 1.0],
        }
        assert row | {"ci": []} == {
            "method": "a",
            "bits_per_weight": 2.25,
            "tokens": 32,
            "ms": 1000.0,
            "times_dense": 0.5,
            "ci": [],
        }
        assert row["ci"] == [0.25, 0.5]
        assert failed == {"method": "b", "bits_per_weight": 2.5, "tokens": 32, "why": "no"}

    def test_nothing_to_compare_with_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"dense bfloat16: found no times \(no\), expected some"):
            speed.rows_of(1, {"a": [1.0]}, BITS, {speed.DENSE: "no"})

    def test_report(self, tmp_path: Path) -> None:
        rows = speed.rows_of(1, {speed.DENSE: [1.0, 1.0], "a": [0.5, 0.5]}, BITS, {})
        rows.append({"method": "c", "why": "no such processor"})
        speed.write_report(tmp_path / "r.json", rows)
        found = json.loads((tmp_path / "r.json").read_text())
        assert found.keys() == {"processor", "versions", "rows"}
        assert found["rows"] == rows
        assert found["versions"]["torch"] == str(torch.__version__)
        assert "no such processor" in table(rows, PEERS_SPEED_COLUMNS)

    def test_figure_leaves_out_what_has_no_time(self) -> None:
        seconds = {speed.DENSE: [1.0, 1.0], "a": [0.5, 0.5]}
        rows = [row for tokens in (1, 8) for row in speed.rows_of(tokens, seconds, BITS, {"b": "no"})]
        figures.method_times(rows, {"a"})
        (ax,) = plt.gcf().axes
        assert [text.get_text()[2:] for text in ax.texts] == ["a", speed.DENSE]
        assert [line.get_color() for line in ax.lines] == [OURS, "#8a8a8a"]
        plt.close()


class TestTurns:
    def test_order_is_reversed_and_the_first_round_does_not_count(self) -> None:
        called: list[str] = []

        def method(name: str) -> Callable[[int], float]:
            return lambda tokens: called.append(name) or float(len(called))

        seconds, why = speed.take_turns({"b": method("b"), "a": method("a")}, 5, rounds=2, pause=0)
        assert called == ["b", "a", "a", "b", "b", "a"]
        assert seconds == {"b": [4.0, 5.0], "a": [3.0, 6.0]}
        assert why == {}

    def test_a_method_that_fails_is_named_and_the_others_go_on(self) -> None:
        commands = {
            speed.DENSE: answering(1.0, 16.0),
            "a": answering(0.5),
            "dies": DIES,
            "raises": process('print(\'{"why": "ImportError: no module"}\')'),
            "ends": process("raise SystemExit(3)"),
        }
        rows = speed.measure(commands, tokens=(1, 2, 4), rounds=2, pause=0)
        times = {(row["method"], row["tokens"]): row["times_dense"] for row in rows if "why" not in row}
        assert times == {(speed.DENSE, n): 1.0 for n in (1, 2, 4)} | {("a", n): 0.5 for n in (1, 2, 4)} | {
            ("dies", 1): 1.0
        }
        why = {(row["method"], row.get("tokens")): row["why"] for row in rows if "why" in row}
        died = "its process ended with 'Illegal instruction'"
        assert why == {
            ("dies", 2): died,
            ("dies", 4): died,
            ("raises", None): "ImportError: no module",
            ("ends", None): "its process ended with 3",
        }


class TestMethods:
    @pytest.mark.parametrize("name", [speed.DENSE, *speed.OURS])
    def test_own_methods_run(self, name: str, tmp_path: Path) -> None:
        first, *rest = served(speed.SPEED_METHODS[name], ["1\n", "5\n"], tmp_path)
        bits = first["bits_per_weight"]
        assert bits == 16 if name == speed.DENSE else 2.1 < bits < 2.5
        assert [answer.keys() for answer in rest] == [{"seconds"}, {"seconds"}]
        assert all(answer["seconds"] > 0 for answer in rest)

    def test_a_package_that_is_missing_is_the_reason(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "auto_round_kernel", None)
        (answer,) = served(speed.SPEED_METHODS["auto-round-lib INT2"], ["1\n"], tmp_path)
        assert answer["why"].startswith("ModuleNotFoundError: ")

    def test_a_failing_run_ends_the_answers(self, tmp_path: Path) -> None:
        def load(config: DreamConfig, folder: Path) -> tuple[speed.Run, float]:
            def run(tokens: int) -> None:
                raise ValueError(f"{tokens} tokens\nand more")

            return run, 2.0

        assert served(load, ["3\n", "4\n"], tmp_path) == [{"bits_per_weight": 2.0}, {"why": "ValueError: 3 tokens"}]

    def test_two_blocks_keep_the_widths(self) -> None:
        config = speed.two_blocks()
        assert (config.hidden_size, config.intermediate_size) == (3584, 18944)
        assert (config.num_attention_heads, config.num_key_value_heads) == (28, 4)
        assert (config.num_hidden_layers, config.vocab_size) == (2, 1024)
        assert config.mask_token_id < config.vocab_size
        assert max(speed.TOKENS) <= config.mask_token_id

    def test_every_peer_is_locked_and_every_type_known(self) -> None:
        lock = Path(speed.__file__).with_name("requirements.lock").read_text(encoding="utf-8")
        pinned = {line.split("==")[0].lower().replace("_", "-") for line in lock.splitlines() if "==" in line}
        assert {*speed._PACKAGES, "gguf"} <= pinned
        assert set(llama.NEEDS_IMPORTANCE) < llama.FILE_TYPES.keys()

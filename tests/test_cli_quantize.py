"""``python -m thermo_lib quantize``: a checkpoint becomes a quantized folder, or one line says why not."""

from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
from distributed import LocalCluster
from layouts import OPEN_DCODER
from small_runs import Run, small_calibration
from tokenizers import Tokenizer

from thermo_lib import (
    ThermoConfig,
    TimeNorms,
    commands,
    load_model,
    load_quantized,
    quantize,
)
from thermo_lib import __main__ as command_line
from thermo_lib.files.outputs import alone_in_folder

FAST = ("preset=fast", "group_size=16")


class TestQuantize:
    """A checkpoint becomes a quantized folder."""

    def test_without_data_it_is_streamed(self, run: Run, folder: Path) -> None:
        status, out, err = run("quantize", "--model", folder, "--output", "small", *FAST)
        assert status == 0
        size = sum(path.stat().st_size for path in Path("small").glob("*.safetensors"))
        assert out.startswith(f"small: {size / 1e6:.1f} MB of weights in ")
        assert "quantize" in err  # progress
        config = ThermoConfig(quantizer="least_squares", group_size=16, embedding_bits=8)
        expected, found = quantize(load_model(str(folder)), config), load_quantized("small")
        assert found.config == config
        ids = torch.arange(12)[None]
        assert torch.equal(found.model(ids).logits, expected.model(ids).logits)

    @pytest.mark.parametrize(
        ("words", "preset", "changes"),
        [
            ([], "gptq", {}),
            (["preset=fast"], "fast", {}),
            (["preset=w2a4", "activations.bits=6", "path_kl.what=parameters"], "w2a4",
             {"activations.bits": 6, "path_kl.what": "parameters"}),
            (["time_norms.count=2", "time_norms.starts=[5]", "time_norms.what=network"], "gptq",
             {"training": (TimeNorms(count=2, starts=(5,), what="network"),)}),
            (["bit_width=4", "num_time_groups=3", "time_groups.starts=[2, 9]", "time_groups.smoothing=null"], "gptq",
             {"weights.bits": 4, "time_groups": {"count": 3, "starts": [2, 9], "smoothing": None}}),
            (["preset=fast", "weights.method=rtn", "embedding_bits=16", "seed=3", "timesteps=5"], "fast",
             {"weights": {"method": "rtn"}, "embedding_bits": 16, "seed": 3, "timesteps": 5}),
            (["preset=gptq", "weights.damping=1e-3", "activations.by_token_state=true"], "gptq",
             {"weights.damping": 0.001, "activations.by_token_state": True}),
        ],
    )  # fmt: skip
    def test_words_are_changes_of_a_preset(
        self,
        run: Run,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        words: list[str],
        preset: str,
        changes: dict[str, Any],
    ) -> None:
        asked: list[ThermoConfig] = []

        def record(lm_or_source: object, *arguments: Any, **_: Any) -> None:
            asked.append(next(each for each in arguments if isinstance(each, ThermoConfig)))
            raise ValueError("enough")

        monkeypatch.setattr(commands, "quantize", record)
        monkeypatch.setattr(commands, "quantize_checkpoint", record)
        assert run("quantize", "--model", folder, "--output", "small", *words)[0] == 2
        assert asked == [ThermoConfig.preset(preset, **changes)]

    @pytest.mark.slow
    def test_on_a_cluster_it_writes_the_same_bytes(
        self, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of threads: ``test_streaming_cluster`` has one of processes, which import everything anew."""
        monkeypatch.setattr(distributed, "LocalCluster", lambda **_: LocalCluster(processes=False))
        assert run("quantize", "--model", folder, "--output", "alone", *FAST)[0] == 0
        status, out, _ = run("quantize", "--model", folder, "--output", "many", "--scheduler", "local", *FAST)
        assert status == 0
        assert out.startswith("dashboard: http://")
        alone, many = ({p.name: p.read_bytes() for p in Path(name).iterdir()} for name in ("alone", "many"))
        assert many == alone

    def test_with_data_it_is_calibrated_on_the_model_itself(self, run: Run, folder: Path) -> None:
        fields = {"quantizer": "gptq", "group_size": 16, "activation_bits": 4, "num_time_groups": 2, "timesteps": 4}
        words = [f"{name}={value}" for name, value in fields.items()]
        assert run("quantize", "--model", folder, "--output", "calibrated", *words)[0] == 0
        lm = load_model(str(folder))
        expected = quantize(lm, ThermoConfig(**fields), small_calibration(lm, timesteps=4))
        found = load_quantized("calibrated")
        ids = torch.arange(12)[None]
        for timestep in range(4):
            for model in (expected, found):
                model.set_timestep(timestep, 4)
            assert torch.equal(found.model(ids).logits, expected.model(ids).logits)

    @pytest.mark.parametrize(("word", "count"), [("6", 6), ("all", None)])
    def test_layerwise_it_is_the_model_that_is_calibrated_in_memory(
        self, run: Run, folder: Path, word: str, count: int | None
    ) -> None:
        fields = {"quantizer": "gptq", "group_size": 16, "timesteps": 4}
        words = [f"{name}={value}" for name, value in fields.items()]
        assert run("quantize", "--model", folder, "--output", "calibrated", "--layerwise", word, *words)[0] == 0
        lm = load_model(str(folder))
        states = small_calibration(lm, timesteps=4)
        states = states if count is None else states.thinned(count)
        expected, found = quantize(lm, ThermoConfig(**fields), states), load_quantized("calibrated")
        ids = torch.arange(12)[None]
        assert torch.equal(found.model(ids).logits, expected.model(ids).logits)

    def test_more_states_than_there_are_is_refused(self, run: Run, folder: Path) -> None:
        words = ("--layerwise", 17, "timesteps=4")
        status, out, err = run("quantize", "--model", folder, "--output", "never", *words)
        assert (status, out) == (2, "")
        assert "states: found 17, allowed are 1..16" in err
        assert list(Path().iterdir()) == []

    @pytest.mark.parametrize("word", ["some", "0", "-1", "1.5", "", "٣"])
    def test_states_that_are_no_number_end_with_the_usage(self, word: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as error:
            command_line.main(["quantize", "--output", "never", f"--layerwise={word}"])
        assert error.value.code == 2
        assert f"layerwise: found {word!r}, allowed are a whole number from 1 and all" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--scheduler", "local"], "scheduler: found 'local' with 'gptq'; allowed is what needs no calibration"),
            (["--scheduler", "local", "preset=w2a4-static"],
             "with 'gptq', static activation ranges, training 'path_kl'; allowed is what needs no calibration"),
            (["--scheduler", "nowhere://x", "preset=fast"], "scheduler: found no dask scheduler at 'nowhere://x'"),
            (["--layerwise", "4", "preset=fast"],
             "layerwise: found weights.method='least_squares', which needs no calibration states"),
            (["group_size"], "quantize: found 'group_size', expected NAME=VALUE"),
            (["colour=1"], "quantize: found 'colour=1', expected NAME=VALUE, NAME one of preset, embedding_bits"),
            (["weights.colour=1"], "weights.colour: found 1, allowed are the fields method, bits, group_size"),
            (["weights.grup_size=1"], "did you mean 'group_size'?"),
            (["preset=fsat"], "preset: found 'fsat', allowed are fast, gptq, best, small, w2a4, w2a4-static; "
             "did you mean 'fast'?"),
            (["bit_width=3"], "weights.bits: found 3, allowed is 2, 4 or 8"),
            (["weights.bits=3"], "weights.bits: found 3"),
            (["group_size=["], "group_size: found '[', allowed are a number as in JSON"),
            (["preset=fast", "--model", "/no/such/folder"], "model: found '/no/such/folder'"),
            (["--model", "/no/such/folder"], "model: found '/no/such/folder'"),
        ],
    )  # fmt: skip
    def test_a_wrong_value_is_named(self, run: Run, arguments: list[str], message: str) -> None:
        status, out, err = run("quantize", "--output", "never", *arguments)
        assert (status, out) == (2, "")
        assert message in err
        assert len([line for line in err.splitlines() if line]) == 1
        assert list(Path().iterdir()) == []

    @pytest.mark.parametrize("quantizer", ["least_squares", "gptq"])
    def test_the_source_is_never_replaced(self, run: Run, folder: Path, quantizer: str) -> None:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        words = ("group_size=16", "timesteps=4", f"quantizer={quantizer}")
        status, _, err = run("quantize", "--model", folder, "--output", folder, *words)
        assert status == 2
        assert "the source or a folder that holds it" in err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    @pytest.mark.parametrize("words", [(), FAST, ("--layerwise", "all")], ids=["in memory", "streamed", "layerwise"])
    def test_a_second_run_into_a_folder_is_refused_before_its_work(
        self, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
    ) -> None:
        for work in ("load_model", "load_streamed", "quantize_checkpoint"):
            monkeypatch.setattr(commands, work, None)
        with alone_in_folder("small"):
            status, _, err = run("quantize", "--model", folder, "--output", "small", *words)
        assert status == 2
        assert f"output: found another run writing {Path.cwd()}/small, allowed is one at a time" in err
        assert list(Path().iterdir()) == []

    def test_a_quantized_folder_is_not_quantized_again(self, run: Run, folder: Path) -> None:
        assert run("quantize", "--model", folder, "--output", "small", *FAST)[0] == 0
        status, _, err = run("quantize", "--model", "small", "--output", "smaller")
        assert status == 2
        assert "model: found 'small', which is quantized, allowed is a full-precision model" in err


@pytest.mark.slow
class TestFamily:
    """A plain configuration needs ``--family`` in every command; what is quantized from it doesn't."""

    def test_it_is_handed_on(self, run: Run, tokenizer: Tokenizer, tmp_path: Path) -> None:
        source = OPEN_DCODER.write(tmp_path / "source", tokenizer)
        family = ("--family", "open-dcoder")
        ways = {"streamed": FAST, "in memory": ("group_size=16",), "layerwise": ("--layerwise", "all", "group_size=16")}
        for output, words in ways.items():
            status, _, err = run("quantize", "--model", source, "--output", output, *words)
            assert (status, "family: found None, allowed with" in err) == (2, True)
            assert run("quantize", "--model", source, "--output", output, *family, *words)[0] == 0
            assert load_quantized(output).model.config.model_type == "open-dcoder"
        fill = ("--prompt", "x", "--max-new-tokens", 2, "--timesteps", 2)
        assert run("generate", "--model", source, *fill)[0] == 2
        assert run("generate", "--model", source, *family, *fill)[0] == 0
        assert run("generate", "--model", "streamed", *fill)[0] == 0
        small = ("--timesteps", 2, "--reference", source)
        assert run("evaluate", "--model", "streamed", *small)[0] == 2
        assert run("evaluate", "--model", "streamed", *small, *family)[0] == 0

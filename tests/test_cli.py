"""The command line: the benchmark on a tiny saved model, and exit status 2 with a reason for a wrong value."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from encoder_layouts import BERT
from nbformat import v4, write
from small_runs import Run, small_suite
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from thermo_lib import (
    commands,
    evaluate,
    generate,
    load_model,
    load_quantized,
)
from thermo_lib.diffusion.path_kl import PathKLEstimate
from thermo_lib.evaluation.scores import Evaluation, PuzzleResult
from thermo_lib.evaluation.summary import summarize
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.quant.precision import FLOAT32, TF32
from thermo_lib.studies.params import default

FAST = ("preset=fast", "group_size=16")


def row_keys(lm: DiffusionLM) -> set[str]:
    """The keys of a configuration's row."""
    counts = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    path = PathKLEstimate(counts, counts)
    return set(summarize("any", lm, Evaluation(counts, counts, counts, 1, path, PuzzleResult(["x"], [True]))))


@pytest.mark.slow
class TestBenchmark:
    """The whole comparison, on a model of 20 000 parameters."""

    def test_it_reports_every_configuration_with_all_keys(self, run: Run, folder: Path, tiny: DiffusionLM) -> None:
        status, out, err = run(
            *("benchmark", "--model", folder, "--all-methods", "--output", "results/here"),
            *("--timesteps", 4, "--group-size", 16),
        )
        assert status == 0
        assert sorted(p.name for p in Path("results/here").iterdir()) == ["report.json", "report.txt", "timings.json"]
        content = json.loads(Path("results/here/report.json").read_text(encoding="utf-8"))
        assert content["model"] == str(folder)
        rows = content["configurations"]
        assert [row["smoothing_method"] for row in rows] == [None, "linear", "cubic", "sigmoid"]
        for row in (content["full_precision"], *rows):
            assert row.keys() == row_keys(tiny)
            assert len(row["accuracy_per_timestep"]) == 4
        assert {(row["bits"], row["activation_bits"], row["quantizer"], row["group_size"]) for row in rows} == {
            (2, 16, "gptq", 16)
        }
        assert content["full_precision"]["path_kl"] == 0 < min(row["path_kl"] for row in rows)
        verdicts = {target["verdict"] for target in content["targets"]}
        assert verdicts <= {"met", "not met", "inconclusive"}
        identity = [t for t in content["targets"] if t["name"] == "bit-identical with smoothing off"]
        assert [t["verdict"] for t in identity] == ["met"]
        # The report goes to stdout, progress to stderr.
        text = Path("results/here/report.txt").read_text(encoding="utf-8")
        assert out == text + "\n"
        assert "stage" in err
        assert "stage" not in out

    def test_one_method_with_quantized_activations(self, run: Run, folder: Path) -> None:
        status, out, _ = run(
            *("benchmark", "--model", folder, "--smoothing-method", "cubic", "--activation-bits", 4, "--bits", 8),
            *("--quantizer", "rtn", "--group-size", 8, "--timesteps", 7, "--num-time-groups", 2),
            *("--smoothing-window", 2),
        )
        assert status == 0
        output = Path("artifacts/benchmark")  # the default
        rows = json.loads((output / "report.json").read_text(encoding="utf-8"))["configurations"]
        assert [row["smoothing_method"] for row in rows] == [None, "cubic"]
        expected = {"bits": 8, "activation_bits": 4, "quantizer": "rtn", "group_size": 8, "num_time_groups": 2}
        for row in rows:
            assert {key: row[key] for key in expected} == expected
            assert len(row["accuracy_per_timestep"]) == 7
        assert rows[1]["smoothing_window"] == 2
        timings = json.loads((output / "timings.json").read_text(encoding="utf-8"))
        assert timings.keys() == {"inference", "quantization"}
        assert "W8A4" in out
        assert "W2A" not in out  # neither the rows nor the targets claim another precision

    def test_one_time_group_is_refused_before_any_work(self, run: Run) -> None:
        status, _, err = run("benchmark", "--model", "no such folder", "--num-time-groups", 1)
        assert status == 2
        assert "num_time_groups: found 1, allowed is at least 2" in err

    def test_the_same_command_writes_the_same_numbers(self, run: Run, folder: Path) -> None:
        reports = []
        for output in ("first", "second"):
            words = ("--smoothing-method", "linear", "--timesteps", 4, "--output", output)
            assert run("benchmark", "--model", folder, *words)[0] == 0
            content = json.loads((Path(output) / "report.json").read_text(encoding="utf-8"))
            content["targets"] = [t for t in content["targets"] if not t["name"].startswith("overhead")]
            reports.append(content)
        assert reports[0] == reports[1]


class TestGenerate:
    """A model continues a text."""

    @pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["evaluate"]], ids=lambda words: words[0])
    def test_a_missing_device_is_named(self, run: Run, folder: Path, command: list[str]) -> None:
        status, _, err = run(*command, "--model", folder, "--device", "nonsense")
        assert status == 2
        assert "device: found 'nonsense'" in err
        assert len(err.splitlines()) == 1

    @pytest.mark.parametrize("quantized", [False, True], ids=["full precision", "quantized"])
    def test_it_prints_what_generate_returns(self, run: Run, folder: Path, quantized: bool) -> None:
        model = folder
        if quantized:
            assert run("quantize", "--model", folder, "--output", "small", *FAST)[0] == 0
            model = Path("small")
        lm = load_quantized(model) if quantized else load_model(str(model))
        prompt = lm.tokenizer.encode("for i in").ids
        filled = generate(
            lm,
            torch.tensor([[*prompt, *[lm.mask_token_id] * 6]]),
            timesteps=3,
            sampler="origin",
            temperature=0.7,
            top_k=5,
            block_length=2,
            seed=4,
        )
        status, out, err = run(
            *("generate", "--model", model, "--prompt", "for i in", "--max-new-tokens", 6, "--timesteps", 3),
            *("--sampler", "origin", "--temperature", 0.7, "--top-k", 5, "--block-length", 2, "--seed", 4),
        )
        assert status == 0
        assert out == lm.tokenizer.decode(filled[0, len(prompt) :].tolist()) + "\n"
        assert "generate" in err

    def test_what_closes_a_text_comes_after_what_is_written(
        self, run: Run, tokenizer: Tokenizer, tmp_path: Path
    ) -> None:
        source = BERT.write(tmp_path / "bert", tokenizer)
        own = Tokenizer.from_str(tokenizer.to_str())
        first, last = own.id_to_token(5), own.id_to_token(6)
        own.post_processor = TemplateProcessing(single=f"{first} $A {last}", special_tokens=[(first, 5), (last, 6)])
        own.save(str(source / "tokenizer.json"))
        lm = load_model(str(source), dtype=torch.bfloat16)  # as it is stored
        known = tokenizer.encode("for i").ids
        filled = generate(lm, torch.tensor([[5, *known, *[lm.mask_token_id] * 4, 6]]), timesteps=4)
        arguments = ("--prompt", "for i", "--max-new-tokens", 4, "--timesteps", 4)
        status, out, _ = run("generate", "--model", source, *arguments)
        assert (status, out) == (0, lm.decode(filled[0, 1 + len(known) : -1]) + "\n")

    def test_the_text_ends_before_a_special_token(self, run: Run, folder: Path, tmp_path: Path) -> None:
        lm = load_model(str(folder))
        masked = torch.full((1, 7), lm.mask_token_id)
        masked[0, 0] = start = lm.tokenizer.token_to_id("a")
        answer = generate(lm, masked, timesteps=3, sampler="origin", temperature=1e3)[0, 1:].tolist()
        assert answer[3] not in answer[:3]
        assert lm.tokenizer.encode("a").ids == [start]
        shutil.copytree(folder, tmp_path / "ending")
        lm.tokenizer.add_special_tokens([AddedToken(lm.tokenizer.id_to_token(answer[3]), special=True)])
        lm.tokenizer.save(str(tmp_path / "ending/tokenizer.json"))
        status, out, _ = run(
            *("generate", "--model", tmp_path / "ending", "--prompt", "a", "--max-new-tokens", 6, "--timesteps", 3),
            *("--sampler", "origin", "--temperature", 1e3),
        )
        assert (status, out) == (0, lm.tokenizer.decode(answer[:3]) + "\n")

    def test_its_options_are_those_of_generate(self, run: Run, folder: Path) -> None:
        lm = load_model(str(folder))
        prompt = lm.tokenizer.encode("for i in").ids
        start = torch.tensor([[*prompt, *[lm.mask_token_id] * 8]])
        how = {"timesteps": 8, "sampler": "low_confidence"}
        some = generate(lm, start, **how)[0, -2:].tolist()
        for options in (
            {"threshold": 0.2, "block_length": 3},
            {"suppress_tokens": some},
            {"begin_suppress_tokens": some},
            {"end_tokens": some, "suppress_end": True},
            {"end_tokens": some, "end_last": True},
            {"end_tokens": some, "stop_at_end": True},
        ):
            words = ["generate", "--model", folder, "--prompt", "for i in", "--max-new-tokens", 8, "--timesteps", 8]
            words += ["--sampler", "low_confidence", "--dtype", "float32"]
            for name, value in options.items():
                values = value if isinstance(value, list) else [] if value is True else [value]
                words += [f"--{name.replace('_', '-')}", *values]
            status, out, _ = run(*words)
            assert (status, out) == (0, lm.decode(generate(lm, start, **how, **options)[0, len(prompt) :]) + "\n")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--max-new-tokens", 0], "max-new-tokens: found 0, allowed is at least 1"),
            (["--timesteps", 0], "timesteps"),
            (["--top-p", 2.0], "top_p"),
            (["--chat"], "chat: found no chat template"),
            (
                ["--threshold", 0.9, "--sampler", "entropy"],
                "sampler: found 'entropy', allowed with a threshold are",
            ),
            (["--suppress-tokens", 3, 9999], "suppress_tokens: found 9999, allowed are 0"),
            (["--stop-at-end"], "end_tokens: found none, allowed is at least one id with stop_at_end"),
            (
                ["--block-length", 2, "--max-new-tokens", 6, "--timesteps", 2],
                "timesteps: found 2, allowed is at least 3",
            ),
        ],
    )
    def test_a_wrong_value_is_named(self, run: Run, folder: Path, arguments: list[object], message: str) -> None:
        status, out, err = run("generate", "--model", folder, "--prompt", "a", *arguments)
        assert (status, out) == (2, "")
        assert message in err


@pytest.mark.parametrize(("words", "expected"), [((), TF32), (("--float32",), FLOAT32)])
def test_quantize_runs_the_model_in_tf32_unless_told(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], expected: str
) -> None:
    seen, written = [], commands.quantize_checkpoint

    def record(*given: object, **more: object) -> None:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        written(*given, **more)

    monkeypatch.setattr(commands, "quantize_checkpoint", record)
    assert run("quantize", "--model", folder, "--output", "small", *FAST, *words)[0] == 0
    assert seen == [expected]


class TestEvaluate:
    """The scores of one model."""

    @pytest.mark.parametrize(("words", "dtype"), [((), torch.bfloat16), (("--dtype", "float32"), torch.float32)])
    def test_scores_of_a_quantized_model(
        self, run: Run, folder: Path, words: tuple[str, ...], dtype: torch.dtype
    ) -> None:
        """The folders hold bfloat16, which the model computes in unless another type is asked for."""
        assert run("quantize", "--model", folder, "--output", "small", *FAST, "timesteps=4")[0] == 0
        arguments = ("--model", "small", "--reference", folder, "--output", "scores.json")
        status, out, _ = run("evaluate", *arguments, "--timesteps", 4, *words)
        assert status == 0
        suite = small_suite(load_model(str(folder), dtype=dtype), timesteps=4)
        lm = load_quantized("small", dtype=dtype)
        expected = summarize("small", lm, evaluate(lm, suite))
        written = json.loads(Path("scores.json").read_text(encoding="utf-8"))
        sequences = written.pop("sequences")
        assert written == json.loads(json.dumps(expected))
        assert [len(sequences[key]) for key in ("accuracy", "nelbo", "path_kl", "sudoku_solved")] == [12, 12, 4, 2]
        for key in ("accuracy", "nelbo", "path_kl", "sudoku_solved"):  # each score is the mean of its parts
            assert sum(sequences[key]) / len(sequences[key]) == pytest.approx(written[key])
        assert out.splitlines()[2].startswith("small ")
        assert f"{expected['path_kl']:.2f}" in out

    def test_dense_it_scores_the_same(self, run: Run, folder: Path) -> None:
        assert run("quantize", "--model", folder, "--output", "small", *FAST, "timesteps=4")[0] == 0
        rows = []
        for words in ((), ("--dense",)):
            arguments = ("--model", "small", "--reference", folder, "--output", "scores.json", "--dtype", "float32")
            assert run("evaluate", *arguments, "--timesteps", 4, *words)[0] == 0
            rows.append(json.loads(Path("scores.json").read_text(encoding="utf-8")))
        assert rows[0] == rows[1]
        status, _, err = run("generate", "--model", folder, "--prompt", "a", "--dense")
        assert status == 2
        assert "dense: found" in err
        assert "which isn't quantized, allowed is a quantized model" in err

    def test_a_full_precision_model_is_its_own_reference(self, run: Run, folder: Path) -> None:
        assert run("evaluate", "--model", folder, "--output", "scores.json", "--timesteps", 4)[0] == 0
        assert json.loads(Path("scores.json").read_text(encoding="utf-8"))["path_kl"] == 0

    def test_a_quantized_model_needs_its_reference(self, run: Run, folder: Path) -> None:
        assert run("quantize", "--model", folder, "--output", "small", *FAST)[0] == 0
        status, _, err = run("evaluate", "--model", "small")
        assert status == 2
        assert "reference: found none, expected the full-precision model" in err

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "CUDA out of memory. Tried"),
            (MemoryError("Unable to allocate 7 GiB"), "Unable to allocate 7 GiB"),
            (MemoryError(), "MemoryError"),
        ],
    )
    def test_no_memory_left_is_one_line(
        self, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(commands, "evaluate", fail)
        status, out, err = run("evaluate", "--model", folder)
        assert (status, out) == (2, "")
        (line,) = [line for line in err.splitlines() if line.startswith("error")]
        assert f"memory: found none left ({reason}); quantize --layerwise" in line

    def test_more_memory_than_there_is_is_one_line(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(commands, "evaluate", lambda *_, **__: torch.empty(2**50))
        assert "error: memory: found none left" in run("evaluate")[2]

    def test_a_reference_with_other_tokens_is_refused(self, run: Run, folder: Path) -> None:
        status, _, err = run("evaluate", "--model", folder, "--reference", "reference")
        assert status == 2
        assert "reference: found a model with another vocabulary" in err


class TestErrors:
    """A wrong value ends the command with status 2 and the reason on stderr, before any work."""

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["--model", "/no/such/folder"], "'/no/such/folder'"),
            (["--bits", 3], "bit_width"),
            (["--activation-bits", 1], "activation_bits"),
            (["--num-time-groups", 99], "num_time_groups: found 99"),
            (["--num-time-groups", 0], "num_time_groups"),
            (["--smoothing-window", 21], "window: found 21"),
            (["--smoothing-window", 0], "window: found 0"),
            (["--group-size", 0], "group_size"),
            (["--timesteps", 0], "timesteps"),
            (["--quantizer", "best"], "quantizer"),
        ],
    )
    def test_a_wrong_value_is_named(self, run: Run, arguments: list[object], named: str) -> None:
        status, out, err = run("benchmark", "--model", "/no/such/folder", *arguments)
        assert status == 2
        assert out == ""
        assert "error: " in err
        assert named in err
        assert list(Path().iterdir()) == []

    def test_missing_axes_are_an_error_and_no_traceback(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(commands, "default", lambda key: default(key, tmp_path / "params.yaml"))
        status, _, err = run("study", "--output", "grid.json")
        assert status == 2
        assert "params.yaml" in err

    def test_the_exit_status_of_the_process_is_that_of_the_command(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["thermo_lib", "benchmark", "--bits", "3"])
        monkeypatch.delitem(sys.modules, "thermo_lib.__main__")
        with pytest.raises(SystemExit) as error:
            runpy.run_module("thermo_lib", run_name="__main__")
        assert error.value.code == 2
        assert "bit_width" in capsys.readouterr().err


class TestTidy:
    """``python -m thermo_lib tidy``."""

    def test_it_cleans_a_notebook(self, run: Run) -> None:
        output = v4.new_output("stream", name="stderr", text="100%|")
        with Path("n.ipynb").open("w", encoding="utf-8") as file:
            write(v4.new_notebook(cells=[v4.new_code_cell("1", outputs=[output])]), file)
        assert run("tidy", "n.ipynb") == (0, "", "")
        assert "stderr" not in Path("n.ipynb").read_text(encoding="utf-8")

    def test_a_missing_notebook_is_named(self, run: Run) -> None:
        status, _, err = run("tidy", "absent.ipynb")
        assert status == 2
        assert "absent.ipynb" in err

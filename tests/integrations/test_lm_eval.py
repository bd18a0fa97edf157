"""lm_eval's own evaluator and command line on full-precision and quantized models, with tasks that need no download."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from thermo_lib import ThermoConfig, load_model, quantize, save_quantized
from thermo_lib.diffusion.sampling import generate
from thermo_lib.integrations.lm_eval import HarnessLM
from thermo_lib.models.lm import DiffusionLM, save_model

CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{written}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def folders(build_tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A full-precision model and a quantized one."""
    root = tmp_path_factory.mktemp("harness")
    lm = build_tiny(0)
    save_model(lm, root / "full", dtype=torch.float32)
    config = ThermoConfig(quantizer="rtn", group_size=16, activation_bits=16, num_time_groups=1)
    save_quantized(quantize(lm, config), root / "quantized")
    return {"full": root / "full", "quantized": root / "quantized"}


@pytest.fixture(scope="module")
def harness(folders: dict[str, Path]) -> HarnessLM:
    return HarnessLM(str(folders["full"]), mc_num=4000, batch_size=500)


def request(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def exact_bound(lm: DiffusionLM, context: list[int], answer: list[int]) -> float:
    """Equation 6 of LLaDA, over all masks."""
    total, count = 0.0, len(answer)
    for masked in range(1, count + 1):
        subsets = list(itertools.combinations(range(count), masked))
        for subset in subsets:
            at = torch.zeros((1, len(context) + count), dtype=torch.bool)
            at[0, [len(context) + i for i in subset]] = True
            ids = torch.tensor([context + answer])
            log_p = lm.logits(ids.masked_fill(at, lm.mask_token_id), at).double().log_softmax(-1)
            chosen = log_p[torch.arange(masked), ids[at]].sum().item()
            total += chosen * count / masked / len(subsets) / count
    return total


class TestLikelihood:
    def test_of_one_token_it_is_exact(self, harness: HarnessLM) -> None:
        context, answer = harness.tok_encode("def f(x):"), harness.tok_encode(" return")[:1]
        assert harness._bound(context, answer) == pytest.approx(exact_bound(harness.lm, context, answer), rel=1e-6)

    def test_of_more_it_approaches_the_mean_over_all_masks(self, harness: HarnessLM) -> None:
        context, answer = harness.tok_encode("def f(x):"), harness.tok_encode(" return x + 1")[:4]
        assert len(answer) == 4
        expected = exact_bound(harness.lm, context, answer)
        assert harness._bound(context, answer) == pytest.approx(expected, rel=0.01)
        coarse = HarnessLM(str(harness.lm.name), mc_num=8)
        assert coarse._bound(context, answer) != harness._bound(context, answer)
        assert coarse._bound(context, answer) == coarse._bound(context, answer)

    def test_the_batch_size_changes_nothing_else(self, harness: HarnessLM) -> None:
        ids = harness.tok_encode("for i in range(3): print(i)")
        one, many = (HarnessLM(harness.lm.name, mc_num=20, batch_size=size) for size in (1, 7))
        assert one._bound(ids[:3], ids[3:]) == pytest.approx(many._bound(ids[:3], ids[3:]), rel=1e-5)

    def test_greedy_is_what_the_model_fills_in(self, harness: HarnessLM) -> None:
        prompt = harness.tok_encode("x = ")
        ids = torch.tensor([prompt + [harness.lm.mask_token_id] * 3])
        filled = generate(harness.lm, ids, timesteps=3, sampler="maskgit_plus", eps=0.0)[0, len(prompt) :].tolist()
        assert harness._is_greedy(prompt, filled)
        assert not harness._is_greedy(prompt, [*filled[:2], (filled[2] + 1) % 100])

    def test_an_empty_context_stays_empty(self, harness: HarnessLM) -> None:
        ((found, _),) = harness.loglikelihood([request("loglikelihood", "", "def")], disable_tqdm=True)
        assert found == pytest.approx(harness._bound([], harness.tok_encode("def")))

    def test_rolling_takes_every_token_once(self, harness: HarnessLM) -> None:
        text = "for i in range(3): print(i)"
        ids = harness.tok_encode(text)
        short = HarnessLM(harness.lm.name, mc_num=16, max_length=6)
        (whole,), (parts,) = (
            lm.loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
            for lm in (HarnessLM(harness.lm.name, mc_num=16), short)
        )
        assert whole == pytest.approx(HarnessLM(harness.lm.name, mc_num=16)._bound([], ids))
        expected, done = short._bound([], ids[:6]), 6
        while done < len(ids):
            expected += short._bound(ids[done - 3 : done], ids[done : done + 3])
            done += 3
        assert parts == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["full", "quantized"])
def test_lm_eval_scores_what_the_model_answers(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    lm = HarnessLM(str(folders[kind]), mc_num=8)
    questions = ["x = ", "def f(", "for i in "]
    options = ["1", "range", " the"]
    ids = [[lm._bound(*lm._encode_pair(q, o)) for o in options] for q in questions]
    best = [max(range(3), key=row.__getitem__) for row in ids]
    written = []
    for question in questions:
        prompt = lm.tok_encode(question)
        filled = generate(
            lm.lm, torch.tensor([prompt + [lm.lm.mask_token_id] * 6]), timesteps=6, sampler="maskgit_plus"
        )
        written.append(lm.lm.decode(filled[0, len(prompt) :]).partition("\n")[0])
    data = tmp_path / "data.json"
    rows = [
        {"question": q, "options": options, "label": b if i else (b + 1) % 3, "written": w if i else f"{w}!"}
        for i, (q, b, w) in enumerate(zip(questions, best, written, strict=True))
    ]
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    for name, text in (("choices", CHOICES), ("writing", WRITING)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    arguments = {"pretrained": str(folders[kind]), "mc_num": 8}
    found = simple_evaluate(
        "thermo", model_args=arguments, tasks=["choices", "writing"], task_manager=tasks, bootstrap_iters=0
    )["results"]
    assert found["choices"]["acc,none"] == pytest.approx(2 / 3)
    assert found["writing"]["exact_match,none"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("command", "kind"), [("lm_eval", "quantized"), ("python -m lm_eval", "full")])
def test_lm_eval_knows_the_model(folders: dict[str, Path], command: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(
        json.dumps({"question": "x = ", "options": ["1", "2"], "label": 0, "written": ""}), encoding="utf-8"
    )
    (tmp_path / "choices.yaml").write_text(CHOICES.format(data=tmp_path / "data.json"), encoding="utf-8")
    options = ["--model", "thermo", "--model_args", f"pretrained={folders[kind]},mc_num=2"]
    options += ["--tasks", "choices", "--include_path", str(tmp_path)]
    found = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, "PATH": found, "HF_HOME": str(tmp_path)}
    run = subprocess.run([*command.split(), *options], cwd=tmp_path, capture_output=True, text=True, env=environ)
    assert run.returncode == 0, run.stderr
    assert "|choices|" in run.stdout
    assert "thermo (" in run.stdout


def test_python_starts_without_what_the_plugin_waits_for() -> None:
    loaded = "import sys; print(sorted({'thermo_lm_eval', 'lm_eval', 'thermo_lib', 'torch'} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['thermo_lm_eval']"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype: found 'int8', allowed are float32, bfloat16, float16"),
        ({"mc_num": 0}, "mc_num: found 0, allowed are whole numbers from 1"),
        ({"max_length": -5}, "max_length: found -5, allowed are whole numbers from 1"),
        ({"timesteps": "many"}, "timesteps: found 'many', allowed are whole numbers from 1"),
        ({"sampler": "best"}, "sampler: found 'best', allowed are origin, "),
        ({"temperature": -1.0}, "temperature: found -1.0"),
        ({"batch_size": "auto"}, "batch_size: found 'auto'"),
        ({"pretrained": "/no/such/folder"}, "model: found '/no/such/folder'"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HarnessLM(**arguments)


def test_bounds_are_finite_for_a_model_in_bfloat16(folders: dict[str, Path]) -> None:
    lm = HarnessLM(str(folders["quantized"]), dtype="bfloat16", mc_num=4)
    assert math.isfinite(lm._bound([1, 2], [3, 4, 5]))
    assert load_model(str(folders["full"])).model.dtype == torch.float32

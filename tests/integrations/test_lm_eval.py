"""lm_eval's own evaluator and command line on full-precision and quantized models, with tasks that need no download."""

import ast
import importlib.metadata
import itertools
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from encoder_layouts import EVERY_ENCODER, ROBERTA, EncoderLayout
from layouts import BLOCK_CAUSAL, OPEN_DCODER, SDAR, Layout
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from thermo_lib import ThermoConfig, calibrate, load_model, quantize, save_quantized
from thermo_lib.diffusion.sampling import generate
from thermo_lib.integrations.lm_eval import HarnessLM
from thermo_lib.models.lm import DiffusionLM, save_model

BATCHES = [(torch.arange(24).view(2, 12) + 5, None)]
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


def one_bound(harness: HarnessLM, context: list[int], answer: list[int]) -> float:
    return harness._bounds([(context, answer)])[0]


class TestLikelihood:
    def test_of_one_token_it_is_exact(self, harness: HarnessLM) -> None:
        context, answer = harness.tok_encode("def f(x):"), harness.tok_encode(" return")[:1]
        assert one_bound(harness, context, answer) == pytest.approx(exact_bound(harness.lm, context, answer), rel=1e-6)

    def test_of_more_it_approaches_the_mean_over_all_masks(self, harness: HarnessLM) -> None:
        context, answer = harness.tok_encode("def f(x):"), harness.tok_encode(" return x + 1")[:4]
        assert len(answer) == 4
        expected = exact_bound(harness.lm, context, answer)
        assert one_bound(harness, context, answer) == pytest.approx(expected, rel=0.01)
        coarse = HarnessLM(str(harness.lm.name), mc_num=8)
        assert one_bound(coarse, context, answer) != one_bound(harness, context, answer)
        assert one_bound(coarse, context, answer) == one_bound(coarse, context, answer)

    def test_the_batch_size_changes_nothing_else(self, harness: HarnessLM) -> None:
        ids = harness.tok_encode("for i in range(3): print(i)")
        one, many = (HarnessLM(harness.lm.name, mc_num=20, batch_size=size) for size in (1, 7))
        assert one_bound(one, ids[:3], ids[3:]) == pytest.approx(one_bound(many, ids[:3], ids[3:]), rel=1e-5)

    def test_greedy_is_what_the_model_fills_in(self, harness: HarnessLM) -> None:
        prompt = harness.tok_encode("x = ")
        ids = torch.tensor([prompt + [harness.lm.mask_token_id] * 3])
        filled = generate(harness.lm, ids, timesteps=3, sampler="maskgit_plus", eps=0.0)[0, len(prompt) :].tolist()
        assert harness._are_greedy([(prompt, filled)])[0]
        assert not harness._are_greedy([(prompt, [*filled[:2], (filled[2] + 1) % 100])])[0]

    def test_answers_of_any_length_share_passes(
        self, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each is what it is alone, in fewer passes, padding and time groups included."""
        grouped = ThermoConfig(quantizer="rtn", group_size=16, num_time_groups=2, timesteps=4)
        lm = load_model(str(folders["full"]))
        states = calibrate(lm, BATCHES, timesteps=4, progress=False)
        save_quantized(quantize(lm, grouped, states), tmp_path / "q")
        for name in (folders["full"], tmp_path / "q"):
            lm = HarnessLM(str(name), dtype="float32", mc_num=8, batch_size=32)
            ids = lm.tok_encode("for i in range(3): print(i)")
            pairs = [(ids[:start], ids[start:stop]) for start, stop in ((3, 9), (0, 4), (5, 6), (1, 8), (2, 8))]
            alone = [one_bound(lm, *pair) for pair in pairs]
            passes = []
            logits = lm.lm.logits
            monkeypatch.setattr(lm.lm, "logits", lambda *a, f=logits, p=passes: p.append(len(a[0])) or f(*a))
            assert lm._bounds(pairs) == pytest.approx(alone, rel=1e-4)
            assert sum(passes) == 4 * 8 + 1
            assert len(passes) <= 4

    def test_greedy_answers_share_passes_and_a_wrong_one_ends_them(
        self, harness: HarnessLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompts = [harness.tok_encode(text) for text in ("x = ", "def f(x):", "for i in")]
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt + [harness.lm.mask_token_id] * 4])
            answers.append(generate(harness.lm, ids, timesteps=4, sampler="maskgit_plus", eps=0.0)[0, -4:].tolist())
        wrong = [[(token + 1) % 100 for token in answer] for answer in answers]
        passes = []
        parts = harness.lm.logit_parts
        monkeypatch.setattr(harness.lm, "logit_parts", lambda *a, **k: passes.append(len(a[0])) or parts(*a, **k))
        assert harness._are_greedy(list(zip(prompts, answers, strict=True))) == [True] * 3
        assert passes == [3] * 4
        mixed = [(prompts[0], answers[0]), (prompts[1], wrong[1]), (prompts[2], answers[2][:2])]
        assert harness._are_greedy(mixed) == [True, False, False]
        passes.clear()
        assert harness._are_greedy(list(zip(prompts, wrong, strict=True))) == [False] * 3
        assert passes == [3]

    def test_what_is_done_when_a_run_is_stopped_is_in_the_cache(
        self, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm = HarnessLM(str(folders["full"]), mc_num=2, batch_size=1)
        answers = ["a", "ab = 1", "ab = 1 + f(x)"]
        kept, bounds = [], lm._bounds
        monkeypatch.setattr(lm.cache_hook, "add_partial", lambda kind, args, result: kept.append((args, result)))
        monkeypatch.setattr(lm, "_bounds", lambda pairs: bounds(pairs) if len(kept) < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lm.loglikelihood([request("loglikelihood", "x", answer) for answer in answers], disable_tqdm=True)
        assert [args for args, _ in kept] == [("x", answers[2]), ("x", answers[1])], "the longest come first"
        monkeypatch.undo()
        again = lm.loglikelihood([request("loglikelihood", *args) for args, _ in kept], disable_tqdm=True)
        assert again == [result for _, result in kept]

    def test_an_empty_context_stays_empty(self, harness: HarnessLM) -> None:
        ((found, _),) = harness.loglikelihood([request("loglikelihood", "", "def")], disable_tqdm=True)
        assert found == pytest.approx(one_bound(harness, [], harness.tok_encode("def")))

    def test_rolling_takes_every_token_once(self, harness: HarnessLM) -> None:
        text = "for i in range(3): print(i)"
        ids = harness.tok_encode(text)
        short = HarnessLM(harness.lm.name, mc_num=16, max_length=6)
        (whole,), (parts,) = (
            lm.loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
            for lm in (HarnessLM(harness.lm.name, mc_num=16), short)
        )
        assert whole == pytest.approx(one_bound(HarnessLM(harness.lm.name, mc_num=16), [], ids))
        expected, done = one_bound(short, [], ids[:6]), 6
        while done < len(ids):
            expected += one_bound(short, ids[done - 3 : done], ids[done : done + 3])
            done += 3
        assert parts == pytest.approx(expected)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"sampler": "origin"}], ids=str)
def test_a_text_is_written_as_alone(folders: dict[str, Path], sampling: dict[str, object]) -> None:
    """Prompts of any lengths share passes where nothing is drawn."""
    lm = HarnessLM(str(folders["full"]), dtype="float32", batch_size=3, **sampling)
    prompts = ["x = ", "def f(x):\n    return", "for i in", "a", "class A"]
    requests = [
        request("generate_until", p, {"until": ["("], "max_gen_toks": 5 + i % 2}) for i, p in enumerate(prompts)
    ]
    alone = [lm.generate_until([one], disable_tqdm=True)[0] for one in requests]
    passes = []
    parts = lm.lm.logit_parts
    lm.lm.logit_parts = lambda *a, **k: passes.append(len(a[0])) or parts(*a, **k)
    assert lm.generate_until(requests, disable_tqdm=True) == alone
    assert len(passes) == (5 + 6 if not sampling else 3 * 5 + 2 * 6)


@pytest.mark.parametrize("block_length", [48, 64, 128])
def test_blocks_of_any_length_go_with_the_defaults(folders: dict[str, Path], block_length: int) -> None:
    lm = HarnessLM(str(folders["full"]), dtype="float32", block_length=block_length, threshold=0.2)
    how = lm._how({})
    assert (how["count"], how["timesteps"]) == (128, 128)
    prompts = [request("generate_until", p, {"until": []}) for p in ("x = ", "class A")]
    assert lm.generate_until(prompts, disable_tqdm=True) == [lm.generate_until([p], True)[0] for p in prompts]


def test_rules_are_those_of_generate(folders: dict[str, Path]) -> None:
    model = str(folders["full"])
    lm = HarnessLM(model, dtype="float32").lm
    prompt, wanted = "x = ", request("generate_until", "x = ", {"until": [], "max_gen_toks": 8})
    ids = torch.tensor([[*lm.tokenizer.encode(prompt).ids, *[lm.mask_token_id] * 8]])
    start = ids.shape[1] - 8
    how = {"timesteps": 8, "sampler": "maskgit_plus"}
    plain = generate(lm, ids, **how)[0, start:].tolist()
    some = plain[:2]
    for rules in (
        {"suppress_tokens": some},
        {"begin_suppress_tokens": some},
        {"end_tokens": some, "suppress_end": True},
        {"end_tokens": some, "end_last": True},
        {"end_tokens": some, "stop_at_end": True},
        {"threshold": 0.5, "block_length": 3},
    ):
        expected = lm.decode(generate(lm, ids, **how, **rules)[0, start:])
        given = {k: "+".join(map(str, v)) if isinstance(v, list) else v for k, v in rules.items()}
        for arguments in (rules, given):
            assert HarnessLM(model, dtype="float32", **arguments).generate_until([wanted], True) == [expected]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "quantized"])
def test_lm_eval_scores_what_the_model_answers(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    lm = HarnessLM(str(folders[kind]), mc_num=8)
    questions = ["x = ", "def f(", "for i in "]
    options = ["1", "range", " the"]
    ids = [[one_bound(lm, *lm._encode_pair(q, o)) for o in options] for q in questions]
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


@pytest.mark.slow
def test_the_command_line_of_lm_eval(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.json").write_text(
        json.dumps({"question": "x = ", "options": ["1", "2"], "label": 0, "written": ""}), encoding="utf-8"
    )
    (tmp_path / "choices.yaml").write_text(CHOICES.format(data=tmp_path / "data.json"), encoding="utf-8")
    options = ["--model", "thermo", "--model_args", f"pretrained={folders['quantized']},mc_num=2"]
    options += ["--tasks", "choices", "--include_path", str(tmp_path)]
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="lm_eval")
    monkeypatch.chdir(tmp_path)
    alone = partial(TaskManager, include_defaults=False)  # lm_eval's own tasks, some ten thousand, take seconds to read
    monkeypatch.setattr("lm_eval.tasks.TaskManager", alone)
    monkeypatch.setattr(sys, "argv", ["lm_eval", *options])
    command.load()()
    printed = capsys.readouterr().out
    assert "|choices|" in printed
    assert "thermo (" in printed


def test_lm_eval_knows_the_model_and_python_starts_without_what_the_plugin_waits_for() -> None:
    code = """
import sys
def loaded():
    return sorted({"thermo_lm_eval", "lm_eval", "thermo_lib", "torch"} & sys.modules.keys())
print(loaded())
import lm_eval.models
from lm_eval.api.registry import model_registry
print("thermo" in model_registry, loaded())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["['thermo_lm_eval']", "True ['lm_eval', 'thermo_lm_eval']"]


def test_the_class_that_lm_eval_finds_is_the_librarys() -> None:
    plugin = ast.parse(Path(sys.modules["thermo_lm_eval"].__file__).read_text(encoding="utf-8"))
    (target,) = (
        node.value.value for node in ast.walk(plugin) if isinstance(node, ast.keyword) and node.arg == "target"
    )
    assert f"{HarnessLM.__module__}:{HarnessLM.__qualname__}" == target


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype: found 'int8', allowed are float32, bfloat16, float16"),
        ({"mc_num": 0}, "mc_num: found 0, allowed are whole numbers from 1"),
        ({"max_length": -5}, "max_length: found -5, allowed are whole numbers from 1"),
        ({"timesteps": "many"}, "timesteps: found 'many', allowed are whole numbers from 1"),
        ({"sampler": "best"}, "sampler: found 'best', allowed are origin, "),
        ({"temperature": -1.0}, "temperature: found -1.0"),
        ({"threshold": 2.0, "sampler": "maskgit_plus"}, "threshold: found 2.0"),
        ({"stop_at_end": True}, "end_tokens: found none, allowed is at least one id with stop_at_end"),
        ({"suppress_tokens": "3+x"}, r"suppress_tokens: found '3\+x', allowed are token ids"),
        ({"suppress_tokens": "3+99999"}, "suppress_tokens: found 99999, allowed are 0"),
        ({"batch_size": "auto"}, "batch_size: found 'auto'"),
        ({"pretrained": "/no/such/folder"}, "model: found '/no/such/folder'"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HarnessLM(**arguments)


def test_bounds_are_finite_for_a_model_in_bfloat16(folders: dict[str, Path]) -> None:
    lm = HarnessLM(str(folders["quantized"]), dtype="bfloat16", mc_num=4)
    assert math.isfinite(one_bound(lm, [1, 2], [3, 4, 5]))
    assert load_model(str(folders["full"])).model.dtype == torch.float32


def test_a_plain_configuration_needs_its_family(folders: dict[str, Path], tmp_path: Path) -> None:
    source = OPEN_DCODER.write(tmp_path / "source", load_model(str(folders["full"])).tokenizer)
    with pytest.raises(ValueError, match="family: found None, allowed with 'qwen2' blocks"):
        HarnessLM(str(source))
    assert HarnessLM(str(source), family="open-dcoder").lm.model.config.model_type == "open-dcoder"


def test_a_block_causal_model_whose_files_say_no_length(folders: dict[str, Path], tmp_path: Path) -> None:
    source = SDAR.write(tmp_path / "source", load_model(str(folders["full"])).tokenizer, block_size=None)
    harness = HarnessLM(str(source), attention_block=8, max_new_tokens=12)
    assert harness.lm.model.block_length == 8
    assert len(harness.generate_until([request("generate_until", "x = ", {"until": []})])) == 1
    with pytest.raises(ValueError, match="block_length: found 4, allowed is 8, that of the model's attention, or 0"):
        HarnessLM(str(source), attention_block=8, block_length=4)


@BLOCK_CAUSAL
def test_block_causal_answers_are_bounded_block_after_block(
    layout: Layout, folders: dict[str, Path], tmp_path: Path
) -> None:
    source = layout.write(tmp_path / "source", load_model(str(folders["full"])).tokenizer)
    harness = HarnessLM(str(source), mc_num=1)  # parts of one token are exact
    size = layout.block_length
    text = list(range(7, 7 + 3 * size + 1))
    pairs = [(text[: size - 1], text[size - 1 : size + 1]), (text[: 2 * size], text[2 * size : 2 * size + 1])]
    parts = [[(text[: size - 1], [text[size - 1]]), (text[:size], [text[size]])], [pairs[1]]]
    expected = [sum(exact_bound(harness.lm, *part) for part in some) for some in parts]
    assert harness._bounds(pairs) == pytest.approx(expected, rel=1e-5)
    cuts = [len(answer) for _, answer in harness._pieces(text[:3], text[3:])]
    assert cuts == [size - 3, size, size, 1]
    assert harness._pieces(text[:size], text[size : size + 1]) == [(text[:size], text[size : size + 1])]


@EVERY_ENCODER
def test_masked_language_models(layout: EncoderLayout, folders: dict[str, Path], tmp_path: Path) -> None:
    """Texts of different lengths share a pass, so that shorter ones are padded."""
    source = layout.write(tmp_path / "source", load_model(str(folders["full"])).tokenizer, tied=True)
    harness = HarnessLM(str(source), max_new_tokens=4, batch_size=2)
    positions = layout.config["max_position_embeddings"]
    assert harness.max_length == (positions - 2 if layout.label in ("roberta", "esm1b") else positions)
    pairs = [([7, 8, 9], [10]), ([7, 8, 9, 11, 12, 13], [14])]
    for pair, bound in zip(pairs, harness._bounds(pairs), strict=True):
        assert bound == pytest.approx(exact_bound(harness.lm, *pair), rel=1e-5)
    texts = harness.generate_until([request("generate_until", text, {"until": []}) for text in ("x = ", "for i in")])
    assert all(texts)
    if layout is ROBERTA:
        assert math.isfinite(harness.loglikelihood_rolling([request("loglikelihood_rolling", "x = 1\n" * 9)])[0])

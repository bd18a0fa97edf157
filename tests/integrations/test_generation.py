"""What code that was written for transformers or for the published models asks of a model that AutoModel loads."""

import inspect
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_layouts import EVERY_ENCODER, EncoderLayout
from layouts import BOTH, DREAM, FAST_DLLM, LLADA, NAMED, OPEN_DCODER, SDAR, Layout
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

import thermo_lib as thermo
from thermo_lib.models.architectures import MODELS, MaskPredictor
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.model import QuantizedLM

CONFIG = thermo.ThermoConfig(
    quantizer="rtn", bit_width=8, group_size=16, activation_bits=16, num_time_groups=2, timesteps=6
)
MASK = DREAM.config["mask_token_id"]
PROMPTS = torch.tensor([[7, 8, 9], [10, 11, 12]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Callable[[Layout], Path]:
    """Writes a checkpoint of a layout once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(layout: Layout) -> Path:
        folder = root / layout.model_type
        return folder if folder.is_dir() else layout.write(folder, tokenizer)

    return make


@pytest.fixture(scope="module", params=["Dream", "LLaDA", "quantized"])
def model(request: pytest.FixtureRequest, folders: Callable[[Layout], Path]) -> MaskPredictor:
    """A model of each kind as AutoModel loads it."""
    folder = folders(LLADA if request.param == "LLaDA" else DREAM)
    if request.param == "quantized":
        lm = thermo.load_model(str(folder))
        calibration = thermo.calibrate(lm, [(PROMPTS, None)], timesteps=6, progress=False)
        thermo.save_quantized(thermo.quantize(lm, CONFIG, calibration), folder.with_name("quantized"))
        folder = folder.with_name("quantized")
    return AutoModel.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def dream(folders: Callable[[Layout], Path]) -> MaskPredictor:
    return AutoModel.from_pretrained(folders(DREAM), dtype=torch.float32)


def filled(model: MaskPredictor, prompts: Tensor, count: int, **how: Any) -> Tensor:
    """What the library's generate makes of prompts with masks after them."""
    ids = torch.nn.functional.pad(prompts, (0, count), value=model.config.mask_token_id)
    return thermo.generate(model, ids, **how)


class TestForward:
    @NAMED
    @pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM], ids=lambda a: a.__name__)
    def test_every_auto_class_loads_every_family(
        self, folders: Callable[[Layout], Path], layout: Layout, auto: Any
    ) -> None:
        found = auto.from_pretrained(folders(layout), dtype=torch.float32)
        assert type(found) is MODELS[layout.model_type]
        expected = layout.load(folders(layout)).model.hidden(PROMPTS)
        with torch.no_grad():
            assert found(PROMPTS).logits.equal(found.lm_head(expected))

    def test_the_output_is_that_of_a_masked_language_model(self, model: MaskPredictor) -> None:
        with torch.no_grad():
            expected = model.lm_head(model.hidden(PROMPTS))
            found = model(input_ids=PROMPTS, attention_mask=None, use_cache=False)
            assert list(found) == ["logits"]
            assert found["logits"].equal(expected)
            (logits,) = model(PROMPTS, return_dict=False)
            assert logits.equal(expected)

    def test_padding_may_be_said_in_whole_numbers(self, model: MaskPredictor) -> None:
        visible = torch.tensor([[0, 1, 1], [1, 1, 1]])
        with torch.no_grad():
            found = model(PROMPTS, attention_mask=visible).logits
            assert found.equal(model(PROMPTS, attention_mask=visible.bool()).logits)
            assert not found[0].equal(model(PROMPTS).logits[0])

    def test_labels_give_the_mean_cross_entropy(self, model: MaskPredictor) -> None:
        labels = torch.tensor([[-100, 5, 6], [-100, -100, 7]])
        with torch.no_grad():
            loss, logits = model(PROMPTS, labels=labels, return_dict=False)
        log_p = logits.double().log_softmax(-1)
        expected = -(log_p[0, 1, 5] + log_p[0, 2, 6] + log_p[1, 2, 7]) / 3
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)

    def test_what_the_model_would_not_do_is_refused(self, dream: MaskPredictor) -> None:
        with pytest.raises(ValueError, match="output_hidden_states: found True, allowed are input_ids, attention_mask"):
            dream(PROMPTS, output_hidden_states=True)


class TestAsLM:
    def test_the_library_takes_the_model_and_its_lm_alike(self, model: MaskPredictor) -> None:
        ids = torch.full((2, 8), MASK)
        lm = thermo.as_lm(model)
        assert lm.model is model
        assert isinstance(lm, QuantizedLM) == (model.config.to_dict().get("quantization_config") is not None)
        assert thermo.as_lm(lm) is lm
        how = {"timesteps": 3, "temperature": 1.0, "seed": 5}
        assert thermo.generate(model, ids, **how).equal(thermo.generate(lm, ids, **how))
        assert thermo.generate(model, ids, **how).ne(MASK).all()

    def test_it_is_what_the_library_loads(self, dream: MaskPredictor, folders: Callable[[Layout], Path]) -> None:
        expected, found = thermo.load_model(str(folders(DREAM))), thermo.as_lm(dream)
        assert found.tokenizer.to_str() == expected.tokenizer.to_str()
        assert (found.mask_token_id, found.chat_template, found.carried) == (MASK, None, expected.carried)
        with_chat = folders(DREAM) / "chat_template.jinja"
        with_chat.write_text("{{ messages[0].content }}!")
        try:
            assert thermo.as_lm(dream).chat([{"role": "user", "content": "hi"}]) == "hi!"
        finally:
            with_chat.unlink()

    def test_public_functions_take_it(self, dream: MaskPredictor, folders: Callable[[Layout], Path]) -> None:
        lm = thermo.load_model(str(folders(DREAM)))
        calibrations = [thermo.calibrate(m, [(PROMPTS, None)], timesteps=6, progress=False) for m in (lm, dream)]
        assert calibrations[0].parts[0].ids.equal(calibrations[1].parts[0].ids)
        few = {"sequences": 1, "trajectories": 1, "sudoku": 0, "length": 8, "timesteps": 2, "resamples": 9}
        suites = [thermo.build_suite(m, texts=["for i in x: a b c"], **few) for m in (lm, dream)]
        models = [thermo.quantize(m, CONFIG, calibrations[0]) for m in (lm, dream)]
        scores = [thermo.evaluate(m, s).path.total for m, s in zip(models, suites, strict=True)]
        assert scores[0] == scores[1]
        assert thermo.evaluate(dream, suites[0]).path.total == 0

    def test_a_model_without_a_tokenizer_generates(self, dream: MaskPredictor, tmp_path: Path) -> None:
        dream.save_pretrained(tmp_path / "bare")
        (tmp_path / "bare/tokenizer.json").unlink()
        found = AutoModel.from_pretrained(tmp_path / "bare", dtype=torch.float32)
        assert thermo.as_lm(found).tokenizer is None
        lm = thermo.as_lm(found)  # without a tokenizer every id of the model may be written
        masks = torch.full((2, 2), lm.mask_token_id)
        expected = thermo.generate(lm, torch.cat([PROMPTS, masks], 1), timesteps=2)
        assert found.generate(PROMPTS, max_new_tokens=2).equal(expected)

    @EVERY_ENCODER
    def test_a_masked_language_model_of_transformers_itself(
        self, layout: EncoderLayout, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        """The weights are shared, and what is generated is what the same folder gives in this library's model."""
        folder = layout.write(tmp_path / "source", tokenizer)
        theirs = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
        lm, own = thermo.as_lm(theirs), thermo.load_model(str(folder))
        assert lm.mask_token_id == own.mask_token_id
        assert lm.tokenizer.get_vocab() == own.tokenizer.get_vocab()
        block = lm.model.parts.embeddings
        assert lm.model.get_submodule(block).weight.data_ptr() == theirs.get_submodule(block).weight.data_ptr()
        ids = torch.nn.functional.pad(PROMPTS, (0, 4), value=own.mask_token_id)
        assert thermo.generate(theirs, ids, timesteps=3).equal(thermo.generate(own, ids, timesteps=3))
        for name in ("generate", "diffusion_generate"):
            found = getattr(own.model, name)(PROMPTS, max_new_tokens=4, steps=3, alg="entropy")
            assert found.equal(thermo.generate(own, ids, timesteps=3))
        kinds = torch.zeros_like(ids)
        assert own.model(ids, token_type_ids=kinds).logits.equal(own.model(ids).logits)
        with pytest.raises(ValueError, match="token_type_ids: found "):
            own.model(ids, token_type_ids=kinds + 1)
        headless = AutoModel.from_pretrained(folder, dtype=torch.float32)
        with pytest.raises(ValueError, match=rf"model: found {type(headless).__name__}, allowed is .*MaskedLM,"):
            thermo.as_lm(headless)
        with pytest.raises(ValueError, match="that wasn't loaded from a folder or a hub id"):
            thermo.as_lm(type(theirs)(type(theirs.config)(**theirs.config.to_dict() | {"_name_or_path": ""})))

    def test_a_plain_model_of_transformers_says_that_its_family_is_missing(
        self, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        folder = OPEN_DCODER.write(tmp_path / "source", tokenizer)
        plain = AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(ValueError, match="family: found None, allowed with 'qwen2' blocks"):
            thermo.generate(plain, PROMPTS, timesteps=1)

    def test_another_model_is_refused(self) -> None:
        with pytest.raises(ValueError, match="model: found Linear, allowed is what load_model or AutoModel returns"):
            thermo.generate(torch.nn.Linear(1, 1), PROMPTS, timesteps=1)


class TestGenerate:
    """The prompt, and what the library's generate fills in after it."""

    def test_tokens_can_be_suppressed(self, dream: MaskPredictor) -> None:
        never = dream.generate(PROMPTS, max_new_tokens=4)[:, 3:].unique().tolist()
        others = dream.generate(PROMPTS, max_new_tokens=4, suppress_tokens=never)[:, 3:].unique().tolist()
        assert not set(others) & set(never)
        config = GenerationConfig(begin_suppress_tokens=never, max_new_tokens=4)
        assert not set(dream.generate(PROMPTS, config)[:, 3].tolist()) & set(never)

    @pytest.mark.parametrize("layout", [SDAR, FAST_DLLM], ids=["SDAR", "Fast-dLLM"])
    def test_the_call_that_fast_dllm_publishes(self, layout: Layout, folders: Callable[[Layout], Path]) -> None:
        model, size = AutoModel.from_pretrained(folders(layout), dtype=torch.float32), layout.block_length
        how = {"block_size": size, "small_block_size": size, "threshold": 0.1, "max_new_tokens": 2 * size}
        found = model.generate(PROMPTS, **how)
        expected = {"timesteps": 2 * size, "sampler": "low_confidence", "threshold": 0.1}
        assert found.equal(filled(model, PROMPTS, 2 * size, **expected))
        small = f"small_block_size: found 2, allowed is None, or block_size ({size})"
        with pytest.raises(ValueError, match=re.escape(small)):
            model.generate(PROMPTS, **how | {"small_block_size": 2})

    def test_the_defaults(self, model: MaskPredictor) -> None:
        found = model.generate(PROMPTS, max_new_tokens=4)
        assert found[:, :3].equal(PROMPTS)
        assert found.equal(filled(model, PROMPTS, 4, timesteps=4))
        assert model.generate(input_ids=PROMPTS).shape == (2, 23)
        assert model.generate(PROMPTS, max_length=5, use_cache=True, pad_token_id=0).equal(
            filled(model, PROMPTS, 2, timesteps=2)
        )

    def test_diffusion_generate_is_the_published_loop_of_dream(self, model: MaskPredictor) -> None:
        how = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "alg_temp": 0.1, "eps": 0.01}
        for alg in ("origin", "maskgit_plus", "topk_margin", "entropy"):
            found = model.diffusion_generate(PROMPTS, max_new_tokens=4, steps=2, alg=alg, seed=3, **how)
            assert found.equal(filled(model, PROMPTS, 4, timesteps=2, sampler=alg, seed=3, **how))

    def test_the_published_function_of_llada(self, model: MaskPredictor) -> None:
        how = {"steps": 4, "gen_length": 4, "block_length": 2, "temperature": 0.0, "cfg_scale": 0.0}
        found = model.generate(PROMPTS, remasking="low_confidence", mask_id=MASK, **how)
        assert found.equal(filled(model, PROMPTS, 4, timesteps=4, sampler="low_confidence", block_length=2))

    def test_padding_on_the_left_is_not_text(self, model: MaskPredictor) -> None:
        padded = torch.tensor([[0, 0, 7, 8, 9]])
        visible = torch.tensor([[0, 0, 1, 1, 1]])
        found = model.generate(padded, attention_mask=visible, max_new_tokens=3)
        alone = model.generate(padded[:, 2:], max_new_tokens=3)
        assert found[:, 2:].equal(alone)
        assert found[:, :2].equal(padded[:, :2])
        assert not model.generate(padded, max_new_tokens=3)[:, 2:].equal(alone)

    def test_a_seed_of_torch_counts_where_none_is_given(self, dream: MaskPredictor) -> None:
        how = {"max_new_tokens": 8, "do_sample": True, "temperature": 5.0}
        texts = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            texts.append(dream.generate(PROMPTS, **how))
        assert texts[0].equal(texts[1])
        assert not texts[0].equal(texts[2])

    def test_several_texts_for_a_prompt(self, dream: MaskPredictor) -> None:
        found = dream.generate(PROMPTS, max_new_tokens=6, num_return_sequences=3, temperature=5.0, seed=0)
        assert found[:, :3].equal(PROMPTS.repeat_interleave(3, 0))
        assert len({tuple(row) for row in found[:3].tolist()}) == 3

    def test_the_history_has_the_text_after_each_step(self, dream: MaskPredictor) -> None:
        how = {"max_new_tokens": 4, "steps": 4, "alg": "entropy"}
        found = dream.diffusion_generate(PROMPTS, output_history=True, return_dict_in_generate=True, **how)
        assert [int((x == MASK).sum()) for x in found.history] == [8, 6, 4, 0]  # of 4 a row, eps rounds 1 down
        for before, after in itertools.pairwise(found.history):
            assert after[before != MASK].equal(before[before != MASK])
        assert found.sequences.equal(found.history[-1])
        assert found.sequences.equal(dream.diffusion_generate(PROMPTS, **how))
        assert dream.generate(PROMPTS, return_dict_in_generate=True, max_new_tokens=1).history is None

    def test_hooks_are_called_as_the_published_loop_calls_them(self, dream: MaskPredictor) -> None:
        calls = []

        def on_tokens(step: int | None, x: Tensor, logits: Tensor | None) -> Tensor:
            calls.append((step, tuple(x.shape), None if logits is None else logits.shape[:2]))
            return x

        found = dream.diffusion_generate(
            PROMPTS,
            max_new_tokens=4,
            steps=2,
            generation_tokens_hook_func=on_tokens,
            generation_logits_hook_func=lambda step, x, logits: logits.index_fill(-1, torch.tensor([20]), 1e4),
        )
        assert calls == [(None, (2, 7), None), (0, (2, 7), (2, 7)), (1, (2, 7), (2, 7))]
        assert (found[:, 3:] == 20).all()

    def test_a_tokenizer_of_transformers_goes_with_it(
        self, dream: MaskPredictor, folders: Callable[[Layout], Path]
    ) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folders(DREAM))
        inputs = tokenizer("for i in", return_tensors="pt")
        assert dream.generate(**inputs, max_new_tokens=2).equal(dream.generate(inputs["input_ids"], max_new_tokens=2))
        made = pipeline("text-generation", model=dream, tokenizer=tokenizer)("for i in", max_new_tokens=2)
        assert made[0]["generated_text"].startswith("for i in")
        with pytest.raises(ValueError, match=r"inputs: found BatchEncoding, allowed .* generate\(\*\*output\)"):
            dream.generate(inputs, max_new_tokens=2)


class TestSettings:
    """An argument counts before a configuration, and this before the model's own."""

    @pytest.fixture
    def seen(self, dream: MaskPredictor, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
        """Calls generate and gives what the library's generate is asked for."""
        found: dict[str, Any] = {}

        def record(lm: DiffusionLM, ids: Tensor, **how: Any) -> Tensor:
            found.clear()
            found.update(how, count=ids.shape[1] - PROMPTS.shape[1])
            return ids

        monkeypatch.setattr("thermo_lib.diffusion.sampling.generate", record)

        def call(
            own: dict[str, Any] | None = None, *given: Any, published: bool = False, **options: Any
        ) -> dict[str, Any]:
            monkeypatch.setattr(dream, "generation_config", GenerationConfig(**(own or {})))
            (dream.diffusion_generate if published else dream.generate)(PROMPTS, *given, **options)
            return dict(found)

        return call

    def test_where_a_setting_comes_from(self, seen: Callable[..., dict[str, Any]]) -> None:
        own = {"max_new_tokens": 9, "alg": "origin", "eps": 0.1, "repetition_penalty": 1.1}
        given = GenerationConfig(max_new_tokens=8, alg="maskgit_plus", use_cache=True, eos_token_id=4)
        assert seen(own)["count"] == 9
        assert seen(own, given)["count"] == 8
        assert seen(own, given, max_new_tokens=7)["count"] == 7
        assert seen(own, given, max_length=5)["count"] == 2
        assert [seen(own, *more)["sampler"] for more in ((), (given,))] == ["origin", "maskgit_plus"]
        assert seen(own, given)["eps"] == 0.1
        assert "eps" not in seen()

    def test_the_defaults_of_the_published_method(self, seen: Callable[..., dict[str, Any]]) -> None:
        found = seen(published=True)
        assert (found["sampler"], found["timesteps"], found["temperature"]) == ("origin", 512, 0.0)
        found = seen({"steps": 7}, published=True, alg="entropy")
        assert (found["sampler"], found["timesteps"]) == ("entropy", 7)

    @pytest.mark.parametrize(
        ("own", "options", "temperature"),
        [
            ({}, {}, 0.0),
            ({}, {"temperature": 0.4}, 0.4),
            ({}, {"do_sample": True}, 1.0),
            ({}, {"do_sample": True, "temperature": 0.4}, 0.4),
            ({"do_sample": True, "temperature": 0.6}, {}, 0.6),
            ({"do_sample": True, "temperature": 0.6}, {"do_sample": False}, 0.0),
            ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.4}, 0.4),
            ({"temperature": 0.6}, {"do_sample": True}, 0.6),
            ({"do_sample": False, "temperature": 0.6}, {}, 0.0),
        ],
    )
    def test_the_temperature(
        self,
        seen: Callable[..., dict[str, Any]],
        own: dict[str, Any],
        options: dict[str, Any],
        temperature: float,
    ) -> None:
        found = seen(own | {"top_k": 20, "top_p": 0.9}, **options)
        assert found["temperature"] == temperature
        greedy = options.get("do_sample", own.get("do_sample")) is False
        assert {"top_k", "top_p"} & found.keys() == (set() if greedy else {"top_k", "top_p"})

    def test_a_top_k_of_none_of_them_is_no_filter(self, seen: Callable[..., dict[str, Any]]) -> None:
        assert "top_k" not in seen(top_k=0, top_p=0.5, temperature=1.0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_beams": 4}, "num_beams: found 4, allowed is 1, which asks for nothing: all positions are filled"),
            ({"repetition_penalty": 1.2}, "repetition_penalty: found 1.2, allowed is 1.0"),
            ({"cfg_scale": 1.5}, "cfg_scale: found 1.5, allowed is 0.0"),
            ({"streamer": "x"}, "streamer: found 'x', allowed is None; known are attention_mask, mask_token_id, max_n"),
            ({"max_tokens": 3}, "max_tokens: found 3, allowed is None; known are"),
            ({"max_new_tokens": 0}, "max_new_tokens: found 0, allowed are whole numbers from 1"),
            ({"max_length": 3}, "max_length: found 3, allowed are whole numbers from 4"),
            ({"gen_length": 3, "max_new_tokens": 4}, "found it beside max_new_tokens, allowed is one of them"),
            ({"do_sample": False, "temperature": 0.5}, "do_sample: found False with temperature=0.5"),
            ({"do_sample": True, "temperature": 0.0}, "temperature: found 0 with do_sample=True, allowed is above 0"),
            ({"alg": "random"}, "sampler: found 'random', allowed are origin"),
            ({"steps": 0}, "timesteps: found 0, allowed is at least 1"),
            ({"num_return_sequences": 0}, "num_return_sequences: found 0, allowed are whole numbers from 1"),
            ({"output_history": True}, "output_history: found True, allowed is False, or return_dict_in_generate"),
            ({"mask_id": 5}, f"mask_token_id: found 5, allowed is the model's, {MASK}"),
            ({"attention_mask": torch.ones(2, 7)}, r"attention_mask: found \(2, 7\), allowed is a tensor of shape"),
            ({"attention_mask": torch.tensor([[1, 1, 0]] * 2)}, "attention_mask: found padding after text"),
            ({"inputs": torch.ones(3)}, r"inputs: found torch.float32 of shape \(3,\), allowed are integers"),
            ({"inputs": None}, "inputs: found NoneType, allowed are integers"),
        ],
        ids=str,
    )
    def test_what_has_no_meaning_is_named(self, dream: MaskPredictor, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            dream.generate(**{"inputs": PROMPTS} | options)

    def test_a_configuration_that_is_given_is_checked_too(self, dream: MaskPredictor) -> None:
        with pytest.raises(ValueError, match="num_beams: found 2, allowed is 1"):
            dream.generate(PROMPTS, GenerationConfig(num_beams=2))
        found = dream.generate(PROMPTS, GenerationConfig(num_beams=1, max_new_tokens=2, early_stopping=False))
        assert found.equal(dream.generate(PROMPTS, max_new_tokens=2))

    @BOTH
    def test_the_models_file_says_how_it_generates(self, tmp_path: Path, tokenizer: Tokenizer, layout: Layout) -> None:
        folder = layout.write(tmp_path / "m", tokenizer)
        settings = {"max_new_tokens": 3, "steps": 2, "alg": "maskgit_plus", "eos_token_id": 4}
        (folder / "generation_config.json").write_text(json.dumps(settings))
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        assert model.generate(PROMPTS).equal(filled(model, PROMPTS, 3, timesteps=2, sampler="maskgit_plus"))


def test_every_setting_is_explained() -> None:
    from thermo_lib.integrations import generation

    text = inspect.getdoc(MaskPredictor.generate)
    for name in (*generation._ARGUMENTS, *generation._ALIASES):
        assert re.search(rf"``{name}``", text), name

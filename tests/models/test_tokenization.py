"""Tokenizers and chat templates come from a checkpoint's files alone; Dream's is Qwen2's with more tokens."""

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from thermo_lib import ThermoConfig, load_model, load_quantized, quantize, save_quantized
from thermo_lib.models.lm import DiffusionLM, save_model
from thermo_lib.models.tokenization import ChatTemplate, read_chat_template, read_tokenizer

ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 1 < 2? "}]
# The dialogue formats of the two Instruct models: Qwen2's, and LLaDA's with a begin-of-text token before all.
QWEN2_TEMPLATE = """{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLADA_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer files in Dream's layout: a small byte-level vocabulary, and the added tokens after it."""
    folder = tmp_path_factory.mktemp("dream")
    trained = Tokenizer(models.BPE())
    # Merges across words and numbers, so that a wrong split before the merges gives other ids.
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(
        ["It's the year 2024, we'll mask the tokens.\n\n  The caf\u00e9 isn't far."] * 4, trainer
    )
    trained.model.save(str(folder))
    first = trained.get_vocab_size()
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(first + i): {"content": token, **flags} for i, token in enumerate(ADDED)},
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "chat_template": QWEN2_TEMPLATE,
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", settings)
    return folder


@pytest.fixture(scope="module")
def dream(published: Path) -> Tokenizer:
    return read_tokenizer(published)


@pytest.fixture(scope="module")
def qwen2(published: Path) -> Qwen2Tokenizer:
    """What ``transformers`` builds from the same vocabulary."""
    vocabulary = json.loads((published / "vocab.json").read_text(encoding="utf-8"))
    lines = (published / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_tokens(list(ADDED), special_tokens=True)
    return tokenizer


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy of the files to damage."""
    for path in published.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


TEXT = st.text(max_size=30) | st.lists(
    st.sampled_from([*ADDED, " the", "IT'S", "we'll", "12345", "\n\n", "  ", "e\u0301", "token", "\u4e2d"]), max_size=8
).map("".join)


class TestDream:
    """vocab.json, merges.txt and tokenizer_config.json make Qwen2's tokenizer with Dream's tokens."""

    @given(text=TEXT)
    def test_ids_are_those_of_qwen2(self, dream: Tokenizer, qwen2: Qwen2Tokenizer, text: str) -> None:
        assert dream.encode(text).ids == qwen2(text, add_special_tokens=False)["input_ids"]

    @given(text=TEXT)
    def test_decoding_gives_the_normalized_text_back(self, dream: Tokenizer, text: str) -> None:
        ids = dream.encode(text).ids
        assert dream.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)

    def test_added_tokens_are_one_token_with_their_published_id(self, dream: Tokenizer, published: Path) -> None:
        settings = json.loads((published / "tokenizer_config.json").read_text(encoding="utf-8"))
        for number, token in settings["added_tokens_decoder"].items():
            assert dream.encode(f"a{token['content']}b").ids[1:-1] == [int(number)]

    def test_a_tokenizer_json_goes_first(self, folder: Path, tokenizer: Tokenizer) -> None:
        tokenizer.save(str(folder / "tokenizer.json"))
        assert read_tokenizer(folder).to_str() == tokenizer.to_str()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda s: s.update(tokenizer_class="Evil"),
                "tokenizer_class: found 'Evil', allowed are DreamTokenizer, Q",
            ),
            (lambda s: s.pop("tokenizer_class"), "tokenizer_class: found None, allowed are DreamTokenizer"),
            (lambda s: s.pop("added_tokens_decoder"), "added_tokens_decoder: expected an id"),
            (
                lambda s: s["added_tokens_decoder"].update({"x": {"content": "a"}}),
                "added_tokens_decoder: expected an id",
            ),
            (
                lambda s: s["added_tokens_decoder"].update({"9000": {"content": "<gap>"}}),
                "found id 9000 for '<gap>', exp",
            ),
        ],
        ids=["unknown class", "no class", "no added tokens", "no id", "gap"],
    )
    def test_damaged_settings_are_named(
        self, folder: Path, change: Callable[[dict[str, Any]], object], message: str
    ) -> None:
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        change(settings)
        write_json(path, settings)
        with pytest.raises(ValueError, match=rf"tokenizer_config\.json: .*{message}"):
            read_tokenizer(folder)

    def test_ids_are_below_the_size_of_the_vocabulary(self, published: Path, dream: Tokenizer) -> None:
        size = dream.get_vocab_size()
        assert read_tokenizer(published, size).to_str() == dream.to_str()
        found = rf"found id {size - 1} of '<\|mask\|>', allowed is below vocab_size={size - 1}"
        with pytest.raises(ValueError, match=found):
            read_tokenizer(published, size - 1)

    @pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
    def test_a_damaged_or_missing_vocabulary_is_named(self, folder: Path, file: str) -> None:
        (folder / file).write_text("{\nnot two words", encoding="utf-8")
        with pytest.raises(ValueError, match=r"vocab\.json, merges\.txt: not a BPE vocabulary"):
            read_tokenizer(folder)
        (folder / file).unlink()
        with pytest.raises(ValueError, match=r"found no tokenizer\.json in .*, nor vocab\.json with merges\.txt"):
            read_tokenizer(folder)


class TestChat:
    """A conversation is rendered by the checkpoint's template, which can do nothing else."""

    def test_qwen2_format(self, published: Path) -> None:
        template = read_chat_template(published)
        assert template.render(MESSAGES) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n 1 < 2? <|im_end|>\n<|im_start|>assistant\n"
        )

    def test_llada_format_with_its_first_token(self, folder: Path) -> None:
        settings = {"bos_token": {"content": "<|startoftext|>", "special": True}, "chat_template": LLADA_TEMPLATE}
        write_json(folder / "tokenizer_config.json", settings)
        template = read_chat_template(folder)
        assert template.render(MESSAGES[1:], add_generation_prompt=False) == (
            "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n1 < 2?<|eot_id|>"
        )

    def test_lines_with_nothing_but_a_block_leave_no_space(self) -> None:
        source = "{% for m in messages %}\n    {% if m.role %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}\n"
        assert ChatTemplate(source).render(MESSAGES) == "system\nuser\n"

    def test_a_template_file_goes_first(self, folder: Path) -> None:
        (folder / "chat_template.jinja").write_text("{{ eos_token }}{{ messages | tojson }}", encoding="utf-8")
        assert read_chat_template(folder).render([{"role": "<é>"}]) == '<|endoftext|>[{"role": "<é>"}]'

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
            ("{% if %}", "TemplateSyntaxError"),
            ("{{ messages[0].text.upper() }}", "UndefinedError"),
            ("{{ messages.__class__.__mro__ }}", "SecurityError"),
            ("{{ messages.append(1) }}", "SecurityError"),
            ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
            ("{{ 1 / 0 }}", "ZeroDivisionError"),
            ("{{ messages.index(1) }}", "ValueError"),
        ],
    )
    def test_what_a_template_may_not_do(self, source: str, message: str) -> None:
        with pytest.raises(ValueError, match=f"chat template: {message}"):
            ChatTemplate(source).render([{"role": "user", "content": "x"}])

    @pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
    @pytest.mark.parametrize(
        "found", [5, ["x"], [{"name": "default"}], [{"name": 1, "template": "x"}], {"a": 1}], ids=str
    )
    def test_what_is_no_template_is_named(self, folder: Path, file: str, found: object) -> None:
        (folder / "tokenizer_config.json").unlink()
        write_json(folder / file, {"chat_template": found})
        message = re.escape(f"{file}: chat_template: found {found!r}, expected the text of a template, or [{{")
        with pytest.raises(ValueError, match=message):
            read_chat_template(folder)

    @pytest.mark.parametrize("token", [5, ["<s>"], {"id": 5}, {"content": None}], ids=str)
    def test_a_special_token_of_odd_shape_is_named(self, folder: Path, token: object) -> None:
        write_json(folder / "tokenizer_config.json", {"bos_token": token, "chat_template": LLADA_TEMPLATE})
        message = re.escape(f"tokenizer_config.json: bos_token: found {token!r}, expected its text or")
        with pytest.raises(ValueError, match=message):
            read_chat_template(folder)

    def test_a_template_file_that_is_no_text_is_named(self, folder: Path) -> None:
        (folder / "chat_template.jinja").write_bytes(b"\xff")
        with pytest.raises(ValueError, match=r"chat_template\.jinja, line 1: found the byte 0xff"):
            read_chat_template(folder)

    def test_a_model_without_a_template_says_so(self, tiny: DiffusionLM) -> None:
        with pytest.raises(ValueError, match=r"chat: found no chat template in 'tiny', expected a model with"):
            tiny.chat(MESSAGES)

    def test_saved_and_quantized_models_keep_their_template(
        self, build_tiny: Callable[[int], DiffusionLM], tmp_path: Path
    ) -> None:
        lm = build_tiny(0)
        lm.chat_template = ChatTemplate(LLADA_TEMPLATE, {"bos_token": "<s>"})
        save_model(lm, tmp_path / "m")
        loaded = load_model(str(tmp_path / "m"))
        save_quantized(quantize(loaded, ThermoConfig(quantizer="rtn", num_time_groups=1)), tmp_path / "q")
        for model in (loaded, load_quantized(tmp_path / "q")):
            assert model.chat(MESSAGES) == lm.chat(MESSAGES)
            assert model.chat(MESSAGES).startswith("<s><|start_header_id|>system")

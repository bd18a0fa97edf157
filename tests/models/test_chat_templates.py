"""A conversation is written as transformers' apply_chat_template writes it, wherever a folder keeps its templates."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from layouts import DREAM, LLADA
from tokenizers import Tokenizer
from transformers import AutoModel, PreTrainedTokenizerFast

from thermo_lib import ThermoConfig, load_model, load_quantized, quantize, quantize_checkpoint, save_quantized
from thermo_lib.files.outputs import output_folder
from thermo_lib.models.lm import save_model
from thermo_lib.models.tokenization import ChatTemplate, read_chat_template, read_mask_token_id

MESSAGES = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": " é? "},
    {"role": "assistant", "content": "No.", "tool_calls": None},
]
PLAIN = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
LOUD = "{% for m in messages %}{{ m.content | upper }}{% endfor %}{{ add_generation_prompt }}"
TOKENS = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
AS_OBJECT = {"content": "<|endoftext|>", "lstrip": False, "special": True}
AS_LIST = [{"name": "default", "template": PLAIN}, {"name": "rag", "template": LOUD}]
CONFIG = ThermoConfig(quantizer="rtn", activation_bits=16, num_time_groups=1, group_size=16)

Files = dict[str, Any]


def write(folder: Path, files: Files) -> Path:
    """Writes texts as they are, and everything else as JSON."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


# Where a folder keeps its templates and tokens. Each comes with tokens, and more than one place shows which counts.
FOLDERS: dict[str, Files] = {
    "text": {"tokenizer_config.json": TOKENS | {"chat_template": PLAIN}},
    "token as object": {
        "tokenizer_config.json": {"eos_token": AS_OBJECT | {"__type": "AddedToken"}, "chat_template": PLAIN}
    },
    "list": {"tokenizer_config.json": TOKENS | {"chat_template": AS_LIST}},
    "list of one": {"tokenizer_config.json": TOKENS | {"chat_template": AS_LIST[:1]}},
    "object": {"tokenizer_config.json": TOKENS | {"chat_template": {"default": PLAIN, "rag": LOUD}}},
    "file": {"tokenizer_config.json": TOKENS | {"chat_template": LOUD}, "chat_template.jinja": PLAIN},
    "file before list": {"tokenizer_config.json": {"chat_template": AS_LIST}, "chat_template.jinja": LOUD},
    "additional": {
        "tokenizer_config.json": TOKENS,
        "chat_template.jinja": PLAIN,
        "additional_chat_templates/rag.jinja": LOUD,
        "additional_chat_templates/v1.2.jinja": PLAIN,
    },
    "additional default": {
        "tokenizer_config.json": TOKENS,
        "chat_template.jinja": LOUD,
        "additional_chat_templates/default.jinja": PLAIN,
    },
    "tokens in the map": {"tokenizer_config.json": {"chat_template": PLAIN}, "special_tokens_map.json": TOKENS},
    "map before settings": {
        "tokenizer_config.json": {"bos_token": "<x>", "eos_token": "<y>", "chat_template": PLAIN},
        "special_tokens_map.json": {"bos_token": AS_OBJECT, "eos_token": None},
    },
    "settings with their tokens before the map": {
        "tokenizer_config.json": TOKENS | {"added_tokens_decoder": {}, "chat_template": PLAIN},
        "special_tokens_map.json": {"bos_token": "<x>"},
    },
    "legacy": {"tokenizer_config.json": TOKENS, "chat_template.json": {"chat_template": PLAIN}},
    "legacy list": {"tokenizer_config.json": TOKENS, "chat_template.json": {"chat_template": AS_LIST}},
    "legacy after settings": {
        "tokenizer_config.json": TOKENS | {"chat_template": PLAIN},
        "chat_template.json": {"chat_template": LOUD},
    },
}
EVERY_FOLDER = pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)


@pytest.fixture
def theirs(tokenizer: Tokenizer) -> Callable[..., str]:
    """What transformers makes of a conversation with a folder."""

    def render(folder: Path, template: str | None = None, generation: bool = True) -> str:
        tokenizer.save(str(folder / "tokenizer.json"))
        found = PreTrainedTokenizerFast.from_pretrained(folder)
        how = {"tokenize": False, "add_generation_prompt": generation, "chat_template": template}
        return found.apply_chat_template(MESSAGES, **how)

    return render


@EVERY_FOLDER
def test_the_default_is_that_of_transformers(files: Files, tmp_path: Path, theirs: Callable[..., str]) -> None:
    found = read_chat_template(write(tmp_path, files))
    # transformers reads chat_template.json for processors only.
    only_legacy = "chat_template.json" in files and "chat_template" not in files["tokenizer_config.json"]
    for generation in (True, False):
        expected = theirs(tmp_path, PLAIN if only_legacy else None, generation)
        assert found.render(MESSAGES, add_generation_prompt=generation) == expected


@pytest.mark.parametrize("kind", ["list", "object", "additional"])
def test_a_template_is_chosen_by_its_name(kind: str, tmp_path: Path, theirs: Callable[..., str]) -> None:
    found = read_chat_template(write(tmp_path, FOLDERS[kind]))
    assert found.render(MESSAGES, template="rag") == theirs(tmp_path, "rag") == "BE <BRIEF>. É? NO.True"
    assert found.render(MESSAGES, template="default") == found.render(MESSAGES)
    with pytest.raises(ValueError, match="chat template: found none named 'x', allowed are default, rag"):
        found.render(MESSAGES, template="x")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"chat_template": AS_LIST[1:]}},
        {"tokenizer_config.json": {"chat_template": PLAIN}, "additional_chat_templates/rag.jinja": LOUD},
    ],
    ids=["list", "file"],
)
def test_templates_without_a_default_are_used_by_name_only(
    files: Files, tmp_path: Path, theirs: Callable[..., str]
) -> None:
    found = read_chat_template(write(tmp_path, files))
    with pytest.raises(ValueError, match="chat template: found none named 'default', allowed are rag"):
        found.render(MESSAGES)
    with pytest.raises(ValueError, match="multiple chat templates with no default"):
        theirs(tmp_path)
    assert found.render(MESSAGES, template="rag") == theirs(tmp_path, "rag")


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n  {% generation %}\n{% set x = 1 %}{{ m.role }}\n  {% endgeneration %}\n"
        "{{ x }}{% endfor %}",
        "{% for m in messages %}{%- generation -%} {{ loop.index }} {%- endgeneration -%} | {% endfor %}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=True) }}{{ 'é' | tojson(ensure_ascii=True) }}",
        "{{ {'b': [1, 2]} | tojson(separators=(',', ':')) }}",
        "{% if tools is defined %}a{% endif %}{% if tools is not none %}b{% endif %}{{ documents is none }}",
        "{{ messages[2].tool_calls is defined }}{{ unknown }}|{{ sep_token }}",
        "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + 1 %}{% break %}{% endfor %}{{ s.n }}",
    ],
)
def test_what_a_template_may_name(source: str, tmp_path: Path, theirs: Callable[..., str]) -> None:
    settings = {"sep_token": "<s>", "chat_template": source}
    found = read_chat_template(write(tmp_path, {"tokenizer_config.json": settings}))
    assert found.render(MESSAGES) == theirs(tmp_path)


def test_the_date_of_today() -> None:
    before = datetime.now().date()
    found = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render(MESSAGES)
    assert before <= datetime.strptime(found, "%Y-%m-%d").date() <= datetime.now().date()


def test_what_a_template_refuses_is_refused(tmp_path: Path, theirs: Callable[..., str]) -> None:
    write(tmp_path, {"chat_template.jinja": "{{ raise_exception('roles must alternate') }}"})
    with pytest.raises(ValueError, match="chat template: TemplateError: roles must alternate"):
        read_chat_template(tmp_path).render(MESSAGES)
    with pytest.raises(Exception, match="roles must alternate"):
        theirs(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_mask_token_is_named_in_either_file(file: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, {file: {"mask_token": "<|endoftext|>"}})
    number = tokenizer.token_to_id("<|endoftext|>")
    assert number not in (None, tokenizer.token_to_id("<|mask|>"))
    assert read_mask_token_id(tmp_path, "<|mask|>") == number


class TestCarriedOver:
    @EVERY_FOLDER
    def test_every_folder_made_from_a_model_has_its_templates(
        self, files: Files, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        source = write(LLADA.write(tmp_path / "source", tokenizer), files)
        expected = read_chat_template(source)
        lm = load_model(str(source))
        assert lm.chat_template == expected
        save_model(lm, tmp_path / "saved")
        save_quantized(quantize(lm, CONFIG), tmp_path / "quantized")
        save_quantized(load_quantized(tmp_path / "quantized"), tmp_path / "again")
        quantize_checkpoint(source, tmp_path / "streamed", CONFIG)
        AutoModel.from_pretrained(source).save_pretrained(tmp_path / "theirs")
        for name in ("saved", "quantized", "again", "streamed", "theirs"):
            assert read_chat_template(tmp_path / name) == expected, name
            for file, content in files.items():
                written = (tmp_path / name / file).read_text(encoding="utf-8")
                assert (written if isinstance(content, str) else json.loads(written)) == content

    def test_a_template_of_its_own_takes_the_place_of_all(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        files = FOLDERS["additional"] | FOLDERS["legacy list"] | FOLDERS["tokens in the map"]
        lm = load_model(str(write(DREAM.write(tmp_path / "source", tokenizer), files)))
        for template in (
            ChatTemplate(PLAIN, {"bos_token": "<|mask|>", "eos_token": "<|endoftext|>"}, {"rag": LOUD}),
            ChatTemplate(None, {"bos_token": "<|mask|>", "eos_token": "<|endoftext|>"}, {"rag": LOUD}),
            None,
        ):
            lm.chat_template = template
            save_model(lm, tmp_path / "target")
            assert read_chat_template(tmp_path / "target") == template
        assert lm.tokenizer.to_str() == load_model(str(tmp_path / "target")).tokenizer.to_str()

    def test_saving_again_removes_templates_of_another_model(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        first = write(LLADA.write(tmp_path / "first", tokenizer), FOLDERS["additional"])
        second = write(LLADA.write(tmp_path / "second", tokenizer), FOLDERS["text"])
        for source in (first, second):
            AutoModel.from_pretrained(source).save_pretrained(tmp_path / "target")
        assert read_chat_template(tmp_path / "target") == read_chat_template(second)

    def test_a_folder_with_templates_in_a_folder_may_be_replaced(self, tmp_path: Path) -> None:
        config = {"quantization_config": {"quant_method": "thermo"}}
        files = {"config.json": config, "additional_chat_templates/rag.jinja": LOUD}
        assert output_folder(write(tmp_path / "m", files)) == tmp_path / "m"
        for more in ("additional_chat_templates/notes.txt", "other/rag.jinja"):
            folder = write(tmp_path / more.replace("/", "-"), files | {more: "x"})
            with pytest.raises(ValueError, match=r"found .* a folder with something else in it"):
                output_folder(folder)


def test_lm_chat_takes_a_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lm = load_model(str(write(DREAM.write(tmp_path / "m", tokenizer), FOLDERS["list"])))
    assert lm.chat(MESSAGES, template="rag", add_generation_prompt=False) == "BE <BRIEF>. É? NO.False"

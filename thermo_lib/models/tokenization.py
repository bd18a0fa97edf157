"""Tokenizers and chat templates from the files of a checkpoint, without running its code.

LLaDA is published with ``tokenizer.json``. Dream is published with a tokenizer class of its own, Qwen2's byte-level
BPE (``vocab.json``, ``merges.txt``) with more tokens (``tokenizer_config.json``); it is built from these files.
A chat template is a Jinja template; it comes from the checkpoint and is rendered in Jinja's sandbox.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from thermo_lib.files.text import read_object

SETTINGS_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
# What is carried over to a model's next folder as it is; transformers reads it, this library the first two alone.
_SETTINGS = (SETTINGS_NAME, TEMPLATE_NAME, "special_tokens_map.json")
CARRIED = (*_SETTINGS, "generation_config.json")
TOKENIZER_FILES = (*_VOCABULARIES, *CARRIED)
QWEN2_CLASSES = ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")


def read_tokenizer(folder: Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a model folder.

    Args:
        folder: the model folder.
        vocab_size: the model's, above every id; None for any ids.

    Raises:
        ValueError: no tokenizer, one of another class than Qwen2's that only its own code could build, a damaged
            file, or an id that the model doesn't know.
    """
    tokenizer = _read_any(folder)
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if vocab_size is not None and number >= vocab_size:
        raise ValueError(f"{folder}: tokenizer: found id {number} of {token!r}, allowed is below {vocab_size=}")
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has files of a tokenizer's vocabulary, readable or not."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def _read_any(folder: Path) -> Tokenizer:
    path, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises no narrower type
            raise ValueError(f"{path}: not a tokenizer file ({error})") from error
    if not (vocabulary.is_file() and merges.is_file()):
        raise ValueError(f"model: found no tokenizer.json in {folder}, nor vocab.json with merges.txt")
    settings = _read_settings(folder)
    if settings.get("tokenizer_class") not in QWEN2_CLASSES:
        found = f"found {settings.get('tokenizer_class')!r}, allowed are {', '.join(QWEN2_CLASSES)}"
        raise ValueError(f"{folder / SETTINGS_NAME}: tokenizer_class: {found}; others need a tokenizer.json")
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # tokenizers raises no narrower type
        raise ValueError(f"{vocabulary}, {merges.name}: not a BPE vocabulary ({error})") from error
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, settings, folder / SETTINGS_NAME)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, settings: Mapping[str, Any], path: Path) -> None:
    try:
        added = {int(number): AddedToken(**token) for number, token in settings["added_tokens_decoder"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        expected = 'expected an id to {"content": ...} of every token beside the vocabulary'
        raise ValueError(f"{path}: added_tokens_decoder: {expected} ({error!r})") from error
    for number, token in sorted(added.items()):
        tokenizer.add_tokens([token])
        # A new token gets the next free id: with a gap, or a wrong vocabulary, every later id would be wrong too.
        if tokenizer.token_to_id(token.content) != number:
            found = f"found id {number} for {token.content!r}, expected {tokenizer.token_to_id(token.content)}"
            raise ValueError(f"{path}: added_tokens_decoder: {found}, the next after the vocabulary")


def letter_tokenizer(tokens: Sequence[str], *, begin: str, end: str, unknown: str) -> Tokenizer:
    """A tokenizer of sequences of letters, e.g. of a protein: a letter is a token.

    Args:
        tokens: text of each id in order; those of more than a letter are special.
        begin, end: what stands before and after a sequence where special tokens are asked for.
        unknown: stands for a letter that isn't there.
    """
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(tokens)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([text for text in tokens if len(text) > 1])
    around = [(text, tokens.index(text)) for text in (begin, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A {end}", special_tokens=around)
    return tokenizer


def read_mask_token_id(folder: Path, text: str) -> int:
    """The id of the mask token, by the tokenizer of a model folder.

    Args:
        folder: the model folder.
        text: of the token, where ``tokenizer_config.json`` has no ``mask_token``.

    Raises:
        ValueError: what ``read_tokenizer`` raises, or a tokenizer without that token.
    """
    token = _read_settings(folder).get("mask_token")
    text = text if token is None else _text_of(token, "mask_token", folder)
    number = read_tokenizer(folder).token_to_id(text)
    if number is None:
        expected = "expected that token, or mask_token_id in config.json"
        raise ValueError(f"{folder}: mask_token: found no {text!r} in the tokenizer, {expected}")
    return number


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS_NAME
    return read_object(path) if path.is_file() else {}


@dataclass(frozen=True)
class ChatTemplate:
    """How an instruction-tuned model wants a conversation to be written.

    Attributes:
        source: the Jinja template.
        special_tokens: ``bos_token`` and others that the template may name, to their text.
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as one text, special tokens written out.

        Args:
            messages: each with ``role`` (``system``, ``user`` or ``assistant``) and ``content``.
            add_generation_prompt: end with the opening of an answer.

        Raises:
            ValueError: the template is damaged, refuses the messages, or does what the sandbox forbids.
        """

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        # Jinja's own tojson escapes for HTML, which no model was trained on.
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        try:
            return environment.from_string(self.source).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self.special_tokens
            )
        except Exception as error:  # a template is a program, which may fail in any way
            raise ValueError(f"chat template: {type(error).__name__}: {error}") from error


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a model folder, from ``chat_template.jinja`` or else ``tokenizer_config.json``.

    Returns:
        None where there is none, as with base models.

    Raises:
        ValueError: damaged JSON, a template that isn't text, or a special token that isn't.
    """
    settings, path = _read_settings(folder), folder / TEMPLATE_NAME
    source = _read_template(path) if path.is_file() else settings.get("chat_template")
    if source is None:
        return None
    if not isinstance(source, str):
        found = f"found a {type(source).__name__}, expected the text of one template"
        raise ValueError(f"{folder / SETTINGS_NAME}: chat_template: {found}")
    tokens = {name: settings[name] for name in _SPECIAL_TOKENS if settings.get(name) is not None}
    return ChatTemplate(source, {name: _text_of(token, name, folder) for name, token in tokens.items()})


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found no UTF-8 ({error})") from error


def _text_of(token: Any, name: str, folder: Path) -> str:
    """A token's text; it is stored as that, or as an object with the text and how it is matched."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        expected = 'expected its text or {"content": text}'
        raise ValueError(f"{folder / SETTINGS_NAME}: {name}: found {token!r:.80}, {expected}")
    return text


def read_carried(folder: Path) -> dict[str, str]:
    """The settings of tokenizer and generation in a model folder, to be written again as they are.

    Returns:
        File name, of ``CARRIED``, to text; without keys that ask for remote code.

    Raises:
        ValueError: a file that isn't text, or damaged JSON.
    """
    carried = {}
    for path in (folder / name for name in CARRIED):
        if path.suffix == ".json" and path.is_file():
            content = read_object(path)
            content.pop("auto_map", None)
            carried[path.name] = json.dumps(content, indent=2) + "\n"
        elif path.is_file():
            carried[path.name] = _read_template(path)
    return carried


def save_tokenizer(
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    folder: Path,
    carried: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write ``tokenizer.json`` and the settings beside it.

    Args:
        tokenizer: to write.
        chat_template: the model's; where it isn't the one that was carried over, it takes its place.
        folder: to write into.
        carried: of ``read_carried``.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, text in carried.items():
        (folder / name).write_text(text, encoding="utf-8")
    if read_chat_template(folder) == chat_template:
        return
    (folder / TEMPLATE_NAME).unlink(missing_ok=True)
    content = _read_settings(folder)
    content.pop("chat_template", None)
    if chat_template is not None:
        content |= {**chat_template.special_tokens, "chat_template": chat_template.source}
    (folder / SETTINGS_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a model folder's tokenizer, where it has one, and its settings.

    Args:
        source: a model folder, which may be the target itself.
        target: an existing folder; files of another tokenizer in it are removed.

    Raises:
        ValueError: what ``read_carried`` raises.
        OSError: no space left, or no right to write.
    """
    vocabularies = [source / name for name in _VOCABULARIES if (source / name).is_file()]
    if not vocabularies or source.samefile(target):
        return
    carried = read_carried(source)
    for name in (*_VOCABULARIES, *_SETTINGS):
        (target / name).unlink(missing_ok=True)
    for path in vocabularies:
        shutil.copyfile(path, target / path.name)
    for name in carried.keys() & set(_SETTINGS):
        (target / name).write_text(carried[name], encoding="utf-8")

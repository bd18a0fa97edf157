"""Tokenizers and chat templates from the files of a checkpoint, without running its code.

LLaDA is published with ``tokenizer.json``. Dream is published with a tokenizer class of its own, Qwen2's byte-level
BPE (``vocab.json``, ``merges.txt``) with more tokens (``tokenizer_config.json``); it is built from these files. So is
that of ESM and of older checkpoints of BERT, from ``vocab.txt`` (``vocabularies``).
A chat template is a Jinja template; it comes from the checkpoint and is rendered with limits (``rendering``). Where it
is looked for, and what it may name and do, is as in ``transformers`` (``PreTrainedTokenizerBase.apply_chat_template``).
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from thermo_lib.files.outputs import TEMPLATES_NAME
from thermo_lib.files.reading import check_file, read_object, read_text
from thermo_lib.models.rendering import render
from thermo_lib.models.tokenizer_json import NAME as JSON_NAME
from thermo_lib.models.tokenizer_json import errors_of_tokenizers, read_tokenizer_json
from thermo_lib.models.vocabularies import LISTS, OF_FAMILY, build_from_list
from thermo_lib.models.vocabularies import NAME as LIST_NAME

SETTINGS_NAME = "tokenizer_config.json"
SPECIAL_NAME = "special_tokens_map.json"
TEMPLATE_NAME = "chat_template.jinja"
LEGACY_NAME = "chat_template.json"  # of processors; transformers' tokenizers don't read it
_VOCABULARIES = (JSON_NAME, "vocab.json", "merges.txt", LIST_NAME)
# What is carried over to a model's next folder as it is, with the templates in TEMPLATES_NAME; transformers reads
# a vocab.txt before others.
_SETTINGS = (SETTINGS_NAME, TEMPLATE_NAME, LEGACY_NAME, SPECIAL_NAME)
GENERATION_NAME = "generation_config.json"
CARRIED = (*_SETTINGS, GENERATION_NAME, LIST_NAME)
QWEN2_CLASSES = ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULT = "default"  # the name of the template that is used where none is named


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
        raise ValueError(f"{folder}: tokenizer: found id {number} of {token!r:.80}, allowed is below {vocab_size=}")
    return tokenizer


def tokenizer_files(folder: Path) -> list[str]:
    """Names of a folder's files that say what its tokenizer, templates and generation are."""
    return [name for name in (*_VOCABULARIES, *CARRIED, *_additional(folder)) if (folder / name).is_file()]


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has files of a tokenizer's vocabulary, readable or not."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def _read_any(folder: Path) -> Tokenizer:
    path, vocabulary, merges = (folder / name for name in (JSON_NAME, "vocab.json", "merges.txt"))
    if path.is_file():
        return read_tokenizer_json(path)
    settings = _read_settings(folder)
    if (folder / LIST_NAME).is_file():
        return build_from_list(_list_kind(folder, settings), folder, settings, _special_tokens(folder))
    if not (vocabulary.is_file() and merges.is_file()):
        raise ValueError(f"model: found no tokenizer.json in {folder}, nor vocab.json with merges.txt, nor vocab.txt")
    if settings.get("tokenizer_class") not in QWEN2_CLASSES:
        found = f"found {settings.get('tokenizer_class')!r:.80}, allowed are {', '.join(QWEN2_CLASSES)}"
        raise ValueError(f"{folder / SETTINGS_NAME}: tokenizer_class: {found}; others need a tokenizer.json")
    for path in (vocabulary, merges):
        check_file(path)
    with errors_of_tokenizers(f"{vocabulary}, {merges.name}: not a BPE vocabulary"):
        tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
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


def _list_kind(folder: Path, settings: Mapping[str, Any]) -> str:
    """The class of a tokenizer that is a ``vocab.txt``: by ``tokenizer_config.json``, or else by the model's family."""
    found = settings.get("tokenizer_class")
    if found is None and (folder / "config.json").is_file():
        found = OF_FAMILY.get(str(read_object(folder / "config.json").get("model_type")))
    kind = str(found).removesuffix("Fast")
    if kind not in LISTS:
        allowed = f"allowed with {LIST_NAME} are {', '.join(LISTS)}"
        raise ValueError(f"{folder / SETTINGS_NAME}: tokenizer_class: found {found!r:.80}, {allowed}")
    return kind


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
            found = f"found id {number} for {token.content!r:.80}, expected {tokenizer.token_to_id(token.content)}"
            raise ValueError(f"{path}: added_tokens_decoder: {found}, the next after the vocabulary")


def read_mask_token_id(folder: Path, text: str) -> int:
    """The id of the mask token, by the tokenizer of a model folder.

    Args:
        folder: the model folder.
        text: of the token, where neither ``tokenizer_config.json`` nor ``special_tokens_map.json`` has ``mask_token``.

    Raises:
        ValueError: what ``read_tokenizer`` raises, or a tokenizer without that token.
    """
    text = _special_tokens(folder, ("mask_token",)).get("mask_token", text)
    number = read_tokenizer(folder).token_to_id(text)
    if number is None:
        expected = "expected that token, or mask_token_id in config.json"
        raise ValueError(f"{folder}: mask_token: found no {text!r:.80} in the tokenizer, {expected}")
    return number


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS_NAME
    return read_object(path) if path.is_file() else {}


@dataclass(frozen=True)
class ChatTemplate:
    """How an instruction-tuned model wants a conversation to be written.

    Attributes:
        source: the Jinja template; None where there are only others, each by its name.
        special_tokens: ``bos_token`` and others that the template may name, to their text.
        named: other templates by name, for purposes such as ``rag``.
    """

    source: str | None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
    ) -> str:
        """The conversation as one text, special tokens written out.

        Args:
            messages: each with ``role`` (``system``, ``user`` or ``assistant``) and ``content``; a value of None counts
                as missing.
            add_generation_prompt: end with the opening of an answer.
            template: name of another one than the default.

        Raises:
            ValueError: there is no template of that name, or what ``rendering.render`` raises.
        """
        source = self.source if template in (None, _DEFAULT) else self.named.get(template)
        if source is None:
            names = ", ".join(sorted({*self.named, *([] if self.source is None else [_DEFAULT])}))
            raise ValueError(f"chat template: found none named {template or _DEFAULT!r}, allowed are {names}")
        said = [{key: value for key, value in message.items() if value is not None} for message in messages]
        # Tools and documents are None, not undefined: that is what templates test for.
        others = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        return render(source, {"messages": said, **others, **self.special_tokens})


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat templates of a model folder.

    They are in ``chat_template.jinja`` and ``additional_chat_templates/``, or else in ``tokenizer_config.json``, or
    else in ``chat_template.json``; special tokens in ``tokenizer_config.json`` and ``special_tokens_map.json``.

    Returns:
        None where there is none, as with base models.

    Raises:
        ValueError: damaged JSON, a template that isn't text, or a special token that isn't.
    """
    path = folder / TEMPLATE_NAME
    found = {_DEFAULT: read_text(path)} if path.is_file() else {}
    found |= {Path(name).stem: read_text(folder / name) for name in _additional(folder)}
    for name in (SETTINGS_NAME, LEGACY_NAME):
        found = found or _named_templates(folder / name)
    if not found:
        return None
    source = found.pop(_DEFAULT, None)
    return ChatTemplate(source, _special_tokens(folder), found)


def _additional(folder: Path) -> list[str]:
    """The files of templates with names."""
    found = sorted((folder / TEMPLATES_NAME).glob("*.jinja"))
    return [f"{TEMPLATES_NAME}/{path.name}" for path in found if not path.is_dir()]


def _named_templates(path: Path) -> dict[str, str]:
    """Name to template of a JSON file's ``chat_template``: a text, an object, or a list of names and templates."""
    found = read_object(path).get("chat_template") if path.is_file() else None
    if found is None:
        return {}
    named = {_DEFAULT: found} if isinstance(found, str) else found
    try:
        if isinstance(found, list):
            named = {each["name"]: each["template"] for each in found}
        if all(isinstance(text, str) for pair in named.items() for text in pair):
            return dict(named)
    except (AttributeError, KeyError, TypeError):
        pass
    expected = 'expected the text of a template, or [{"name": text, "template": text}]'
    raise ValueError(f"{path}: chat_template: found {found!r:.80}, {expected}")


def _special_tokens(folder: Path, names: Sequence[str] = _SPECIAL_TOKENS) -> dict[str, str]:
    """Name to text of a folder's special tokens.

    ``special_tokens_map.json`` counts where ``tokenizer_config.json`` doesn't list the tokens beside the vocabulary,
    and then first: it is how older folders say it.
    """
    settings, path = _read_settings(folder), folder / SPECIAL_NAME
    found = {name: (settings[name], SETTINGS_NAME) for name in names if name in settings}
    if path.is_file() and "added_tokens_decoder" not in settings:
        content = read_object(path)
        found |= {name: (content[name], SPECIAL_NAME) for name in names if name in content}
    return {name: _text_of(token, name, folder / file) for name, (token, file) in found.items() if token is not None}


def _text_of(token: Any, name: str, path: Path) -> str:
    """A token's text; it is stored as that, or as an object with the text and how it is matched."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f'{path}: {name}: found {token!r:.80}, expected its text or {{"content": text}}')
    return text


def read_carried(folder: Path) -> dict[str, str]:
    """The settings of tokenizer and generation in a model folder, to be written again as they are.

    Returns:
        File name, of ``CARRIED`` or of a template with a name, to text; without keys that ask for remote code.

    Raises:
        ValueError: a file that isn't text, or damaged JSON.
    """
    carried = {}
    for name in (*CARRIED, *_additional(folder)):
        path = folder / name
        if path.suffix == ".json" and path.is_file():
            content = read_object(path, any_number=False)
            content.pop("auto_map", None)
            carried[name] = json.dumps(content, indent=2) + "\n"
        elif path.is_file():
            carried[name] = read_text(path)
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
    tokenizer.save(str(folder / JSON_NAME))
    _write(carried, folder)
    if read_chat_template(folder) == chat_template:
        return
    for name in (TEMPLATE_NAME, LEGACY_NAME, *_additional(folder)):
        (folder / name).unlink(missing_ok=True)
    content = _read_settings(folder)
    content.pop("chat_template", None)
    written = {SETTINGS_NAME: content}
    if chat_template is not None:
        named = {} if chat_template.source is None else {_DEFAULT: chat_template.source}
        named |= chat_template.named
        as_list = [{"name": name, "template": source} for name, source in named.items()]
        content |= chat_template.special_tokens
        content["chat_template"] = as_list if chat_template.named else chat_template.source
        if (folder / SPECIAL_NAME).is_file():
            special = read_object(folder / SPECIAL_NAME)
            written[SPECIAL_NAME] = {k: v for k, v in special.items() if k not in chat_template.special_tokens}
    _write({name: json.dumps(content, indent=2) + "\n" for name, content in written.items()}, folder)


def _write(files: Mapping[str, str], folder: Path) -> None:
    """Write files, those of templates with names into their folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def copy_tokenizer(source: Path, new: Path, target: Path) -> list[Path]:
    """Copy a model folder's tokenizer, where it has one, and its settings.

    Args:
        source: a model folder, which may be the target itself.
        new: where to write.
        target: where that will be.

    Returns:
        The files of another tokenizer there, which would count beside the new ones.

    Raises:
        ValueError: what ``read_carried`` raises.
        OSError: no space left, or no right to write.
    """
    vocabularies = [source / name for name in _VOCABULARIES if (source / name).is_file()]
    if not vocabularies or source.samefile(target):
        return []
    for path in vocabularies:
        shutil.copyfile(path, new / path.name)
    _write({name: text for name, text in read_carried(source).items() if name != GENERATION_NAME}, new)
    names = (*_VOCABULARIES, *_SETTINGS, *_additional(target))
    return [target / name for name in names if not (new / name).exists()]

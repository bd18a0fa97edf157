"""``tokenizer.json`` and the library ``tokenizers``, which has settings that end the process, or its memory.

Those are looked for before the library reads the file; whatever else it fails at becomes an error.
"""

import base64
import binascii
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Encoding, Tokenizer

from thermo_lib.files.reading import MOST_BYTES, brief, read_object

NAME = "tokenizer.json"
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_INSIDE = ("normalizers", "pretokenizers", "processors", "decoders")  # of a sequence of steps
_STEPS = 64  # of a part, or pieces of a template; published files have up to ten
_GROWTH = 1024  # characters that one may become; the compositions of Unicode make up to 18
_LONGEST = 2**12  # characters of a word in WordPiece, whose time grows with their square; published files have 100
_AFFIX = 64  # characters of what marks a word's parts
_PATTERN = 2**20  # characters of a pattern


def read_tokenizer_json(path: Path) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``, which encodes the whole of every text and draws nothing.

    The file's ``truncation``, ``padding`` and ``dropout`` of BPE are left out: they are for training.

    Raises:
        ValueError: not a tokenizer, or one that would end the process, take any memory or have other ids than the file
            says.
    """
    content = read_object(path, MOST_BYTES)
    try:
        _check(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with errors_of_tokenizers(f"{path}: not a tokenizer file"):
        tokenizer = Tokenizer.from_str(json.dumps(content))
        ids = tokenizer.get_vocab()
    for token in content.get("added_tokens") or ():
        if ids.get(token["content"]) != token["id"]:
            found = f"found id {token['id']} for {token['content']!r:.80}, expected {ids.get(token['content'])}"
            raise ValueError(f"{path}: added_tokens: {found}, which is the token's or the next after the vocabulary")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool) -> list[Encoding]:
    """Texts as token ids.

    Raises:
        ValueError: a text that the tokenizer can't encode, such as one with a word that a vocabulary doesn't have.
    """
    with errors_of_tokenizers("tokenizer: found a text that it can't encode"):
        if len(texts) == 1:
            return [tokenizer.encode(texts[0], add_special_tokens=add_special_tokens)]
        return tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)


def left_open(encoded: Encoding) -> tuple[list[int], list[int]]:
    """The tokens of a text that is to go on, and the special ones that close it, as ``[SEP]``, which come last."""
    end = len(encoded.ids)
    while end > 1 and encoded.special_tokens_mask[end - 1]:
        end -= 1
    return list(encoded.ids[:end]), list(encoded.ids[end:])


@contextmanager
def errors_of_tokenizers(what: str) -> Iterator[None]:
    """Make a ValueError, which begins with ``what``, of an error of the library, a panic of its Rust code included."""
    try:
        yield
    except BaseException as error:  # a panic is no Exception, and its class can't be imported
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{what} ({reason:.300})") from error


def _check(content: dict[str, Any]) -> None:
    """Refuse what isn't safe, and remove what is for training."""
    content["truncation"] = content["padding"] = None
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"not a tokenizer file (model: found {model!r:.80}, expected an object)")
    ids = _check_model(model)
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise ValueError(f"added_tokens: found {added!r:.80}, expected a list of tokens")
    for token in added:
        is_token = isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
        if not is_token:
            raise ValueError(f'added_tokens: found {token!r:.80}, expected {{"id": number, "content": text, ...}}')
        ids.add(token["id"])
    for part in _PARTS:
        steps = list(_steps(content.get(part), part))
        if len(steps) > _STEPS:
            raise ValueError(f"{part}: found {len(steps)} steps, allowed are {_STEPS} at most")
        for step in steps:
            _check_step(step, part, ids)
        growth = math.prod(_growth(step, part) for step in steps)
        if growth > _GROWTH:
            raise ValueError(f"{part}: found steps that make {growth:.3g} characters of one, allowed are {_GROWTH}")
        if (pieces := sum(_pieces(step) for step in steps)) > _STEPS:
            raise ValueError(f"{part}: found templates of {pieces} pieces, allowed are {_STEPS} at most")


def _check_model(model: dict[str, Any]) -> set[int]:
    """Refuse an unsafe model; the ids of its vocabulary."""
    if "dropout" in model:
        model["dropout"] = None
    vocabulary, merges = model.get("vocab"), model.get("merges")
    kind = model.get("type", "BPE" if merges is not None else None)  # older files have none
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if isinstance(affix := model.get(key), str) and len(affix) > _AFFIX:
            raise ValueError(f"model: {key}: found {len(affix)} characters, allowed are {_AFFIX} at most")
    if not isinstance(vocabulary, dict):
        return set(range(len(vocabulary))) if isinstance(vocabulary, list) else set()
    prefix = model.get("continuing_subword_prefix")
    if kind == "BPE" and prefix and isinstance(merges, list):
        for merge in merges:  # the library cuts the prefix off without a look
            second = merge.partition(" ")[2] if isinstance(merge, str) else merge[-1] if merge else ""
            if not str(second).startswith(str(prefix)):
                allowed = f"allowed are second parts that begin with {prefix!r}"
                raise ValueError(f"model: merges: found {merge!r:.80}, {allowed}, the continuing_subword_prefix")
    if kind in ("WordPiece", "WordLevel", None):
        longest, unknown = model.get("max_input_chars_per_word", 0), model.get("unk_token")
        if type(longest) is not int or longest > _LONGEST:
            allowed = f"allowed is {_LONGEST} at most"
            raise ValueError(f"model: max_input_chars_per_word: found {longest!r:.80}, {allowed}")
        if not isinstance(unknown, str) or unknown not in vocabulary:
            raise ValueError(f"model: unk_token: found {unknown!r:.80}, allowed is a token of the vocabulary")
    ids = set(map(_number, vocabulary.values()))
    if len(ids) < len(vocabulary):  # which of two tokens an id stands for, the library draws
        raise ValueError(f"model: vocab: found {len(ids)} ids for {len(vocabulary)} tokens, allowed is one for each")
    return ids


def _steps(part: Any, name: str) -> Iterator[dict[str, Any]]:
    """The steps of a part, those of sequences one by one."""
    if part is None:
        return
    if not isinstance(part, dict):
        raise ValueError(f"{name}: found {part!r:.80}, expected an object")
    for key in _INSIDE:
        inside = part.get(key) or []
        if not isinstance(inside, list):
            raise ValueError(f"{name}: {key}: found {inside!r:.80}, expected a list")
        for step in inside:
            yield from _steps(step, name)
    yield part


def _check_step(step: dict[str, Any], part: str, ids: set[int]) -> None:
    """Refuse a step that is unsafe, by its fields: older files don't say its type."""
    where = f"{part}: {brief(step.get('type'))}"
    if "pattern" in step:
        text = _pattern(step["pattern"])
        if text is None or len(text) > _PATTERN or (not text and "content" in step):
            allowed = f'allowed is {{"String": text}} or {{"Regex": text}} of 1 to {_PATTERN} characters'
            raise ValueError(f"{where}: pattern: found {step['pattern']!r:.80}, {allowed}")
    if "length" in step and (type(step["length"]) is not int or step["length"] < 1):
        raise ValueError(f"{where}: length: found {step['length']!r:.80}, allowed are whole numbers from 1")
    if part == "decoder" and step.get("stop", 0) != 0:  # it reads before the beginning of a short token
        raise ValueError(f"{where}: stop: found {step['stop']!r:.80}, allowed is 0")
    for key in ("sep", "cls"):
        if key in step:
            pair = step[key]
            if not (isinstance(pair, list) and len(pair) == 2 and type(pair[1]) is int and pair[1] in ids):
                raise ValueError(f"{where}: {key}: found {pair!r:.80}, allowed are a token and its id")
    for key, names in (("single", "A"), ("pair", "AB")):
        if key in step:
            _check_template(step, key, names, where, ids)


def _check_template(step: Mapping[str, Any], key: str, names: str, where: str, ids: set[int]) -> None:
    """Refuse a template that names other texts than there are, one of them twice, or a token that isn't given."""
    special, left = step.get("special_tokens"), list(names)
    if not isinstance(step[key], list) or not isinstance(special, dict):
        raise ValueError(f"{where}: found {step!r:.80}, expected a list {key} and an object special_tokens")
    for piece in step[key]:
        (kind, about), *more = piece.items() if isinstance(piece, dict) and piece else [(None, None)]
        found = about.get("id") if isinstance(about, dict) and not more else None
        if kind == "Sequence" and found in left:
            left.remove(found)
        elif not (kind == "SpecialToken" and isinstance(found, str) and found in special):
            allowed = f"allowed are the sequences {', '.join(names)}, each once, and tokens of special_tokens"
            raise ValueError(f"{where}: {key}: found {piece!r:.80}, {allowed}")
    if "A" in left:
        raise ValueError(f"{where}: {key}: found a template without the sequence A, expected one with it")
    for name, token in special.items():
        numbers = token.get("ids") if isinstance(token, dict) else None
        if not (isinstance(numbers, list) and len(numbers) <= _STEPS and ids.issuperset(map(_number, numbers))):
            allowed = f"allowed are up to {_STEPS} ids of the vocabulary"
            raise ValueError(f"{where}: special_tokens: {name!r:.80}: found {token!r:.80}, {allowed}")


def _number(found: Any) -> int:
    return found if type(found) is int else -1


def _pieces(step: Mapping[str, Any]) -> int:
    """How many ids a template adds at most."""
    special = step.get("special_tokens") or {}
    most = max((len(token["ids"]) for token in special.values()), default=1) if "single" in step else 0
    return most * max(len(step.get("single") or ()), len(step.get("pair") or ()))


def _pattern(found: Any) -> str | None:
    texts = list(found.values()) if isinstance(found, dict) and found.keys() <= {"String", "Regex"} else []
    return texts[0] if len(texts) == 1 and isinstance(texts[0], str) else None


def _growth(step: Mapping[str, Any], part: str) -> float:
    """How many characters a step makes of one, at most."""
    kind = str(step.get("type"))
    if "pattern" in step and "content" in step:
        longest = len(str(step["content"]))
        if "Regex" in step["pattern"]:  # which may match nothing, before and after each character
            return 1 + 2 * longest
        return max(1, longest / len(_pattern(step["pattern"]) or " "))
    if "prepend" in step:
        return 1 + len(str(step["prepend"]))
    if "precompiled_charsmap" in step:
        return _compositions(step["precompiled_charsmap"], part)
    if kind in ("NFKC", "NFKD"):
        return 18
    return {"NFC": 3, "NFD": 4, "BertNormalizer": 3, "ByteLevel": 2, "Lowercase": 2}.get(kind, 1)


def _compositions(text: Any, where: str) -> int:
    """The longest text that a map of SentencePiece makes of a character, once all of its addresses are inside.

    It is a number of bytes, a double array of four bytes each (Darts), and texts that end in a zero.
    """
    try:
        content = base64.b64decode(text, validate=True)
        size = int.from_bytes(content[:4], "little")
        units = torch.frombuffer(bytearray(content[4 : 4 + size]), dtype=torch.int32).long() & 0xFFFFFFFF
        texts = content[4 + size :].decode("utf-8").split("\0")
    except (ValueError, TypeError, RuntimeError, binascii.Error) as error:  # torch refuses an empty buffer
        raise ValueError(f"{where}: precompiled_charsmap: found no map of SentencePiece ({error})") from error
    places = torch.arange(len(units)) ^ ((units >> 10) << ((units & 512) >> 6))
    is_node = units < 2**31
    is_end = is_node & (units & 256 > 0)
    starts = torch.tensor([i for i, byte in enumerate(content[4 + size :]) if byte & 0xC0 != 0x80] or [0])
    inside = bool(is_node[0] and ((places | 255) < len(units))[is_node].all())
    if not (size == 4 * len(units) and inside and torch.isin(units[places[is_end]] & 0x7FFFFFFF, starts).all()):
        raise ValueError(f"{where}: precompiled_charsmap: found addresses beyond its end, allowed are those in it")
    return max(1, *map(len, texts))

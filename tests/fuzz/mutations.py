"""Small changes of valid inputs, each decided by a seed: of JSON values, of bytes, and of words."""

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

_DEEP: Any = []
for _ in range(200):
    _DEEP = [_DEEP]
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 16, 255, 65537, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64),
    *(10**30, 0.5, -0.5, 1.0, 2.0, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "x", "0", "1", "010", "1_000", "１２", "yes", "true", "null", "nan", "\0", "\n", "\ud800", "é"),
    *("\u2028", "/", "..", "../x", "/etc/passwd", "a" * 5000, "auto", "cuda", "float32", "gptq", "linear", "BF16"),
    *([], [[]], [0], [1, 2], [None], ["a"], [0] * 1000, {}, {"a": 1}, {"": None}, {"type": "x"}, _DEEP),
)  # fmt: skip
BYTES = (
    *(b"", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"\\", b"{", b"}", b"[", b",", b":"),
    *(b"0", b"-", b"9" * 5000, b"1e999", b"NaN", b"null", b"\\ud800", b"[" * 3000, b"{" * 3000, b'{"a":' * 3000),
    *(b"\xe2\x80\xa8", b"#", b"&a ", b"*a ", b"!!python/none ", b"<<: ", b"---\n", b"%", b"'", b"|", b"\t", b"- "),
)

Place = tuple[str | int, ...]


def _places(content: Any, before: Place = ()) -> list[Place]:
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [before, *(place for key, value in inside for place in _places(value, (*before, key)))]


def _at(content: Any, place: Place) -> Any:
    for key in place:
        content = content[key]
    return content


def change_json(content: Any, rng: random.Random) -> tuple[Any, str]:
    """Another JSON value, and in words what was changed."""
    content = copy.deepcopy(content)
    place = rng.choice(_places(content)[1:] or [()])
    if not place:
        value = rng.choice(NASTY)
        return copy.deepcopy(value), f"$ = {value!r:.60}"
    owner, key = _at(content, place[:-1]), place[-1]
    value, name = owner[key], "$" + "".join(f"[{part!r:.40}]" for part in place)
    what = rng.randrange(12)
    if what == 0:
        del owner[key]
        return content, f"del {name}"
    if what == 1 and isinstance(owner, dict):
        other = rng.choice([*owner, "x", "", str(key).upper(), f"{key}s"])
        owner[other] = owner.pop(key)
        return content, f"{name} is called {other!r:.60}"
    if what == 2:
        other = rng.choice(_places(content)[1:])
        owner[key] = copy.deepcopy(_at(content, other))
    elif what == 3:
        owner[key] = [value]
    elif what == 4:
        owner[key] = str(value)
    elif what == 5 and isinstance(value, int | float):
        owner[key] = rng.choice((-value, value + 1, value - 1, value * 2, value / 2, float(value), value * 10**6))
    elif what == 6 and isinstance(owner, list):
        owner.insert(rng.randrange(len(owner) + 1), copy.deepcopy(rng.choice([*owner, *NASTY])))
        return content, f"{name} has another item beside it"
    elif what == 7 and isinstance(owner, dict):
        other = rng.choice(["x", "", "seed", "bits", "dtype", "type", *owner])
        owner[f"{other}_"] = copy.deepcopy(rng.choice(NASTY))
        return content, f"beside {name} is {other}_"
    else:
        owner[key] = copy.deepcopy(rng.choice(NASTY))
    return content, f"{name} = {owner[key]!r:.60}"


def change_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Other bytes, and in words what was changed."""
    start = rng.randrange(len(content) + 1)
    stop = min(len(content), start + rng.choice((0, 0, 1, 1, 2, 5, 30, len(content))))
    new = rng.choice((*BYTES, content[start:stop] * 2, content[stop : stop + 20], bytes([rng.randrange(256)])))
    return content[:start] + new + content[stop:], f"bytes {start}..{stop} = {new!r:.60}"


def as_json(content: Any, rng: random.Random) -> bytes:
    """A value as JSON, now and then with a key twice."""
    text = json.dumps(content, ensure_ascii=rng.random() < 0.8 or "\\ud" in json.dumps(content))
    if isinstance(content, dict) and content and rng.random() < 0.02:
        key = rng.choice(list(content))
        text = f"{{{json.dumps(key)}: {json.dumps(rng.choice(NASTY))}, {text[1:]}"
    return text.encode(errors="surrogatepass")


_VALUES = """
[1,2] [ [[1]] {a:1} &a[*a] 1:30 ~ [2,9] [] 1e3 4.0 1e-3 false uniform spline
path_kl fresh dynamic static trellis network codes blocks output
"""


def change_words(words: Sequence[str], rng: random.Random, names: Sequence[str]) -> tuple[list[str], str]:
    """Other words of a command line, and in words what was changed.

    Args:
        words: the command line.
        rng: decides.
        names: of settings, of which some are set where the command takes ``NAME=VALUE``.
    """
    if not words:
        return [rng.choice(names)], "one word"
    words = list(words)
    simple = [str(value) for value in NASTY if not isinstance(value, list | dict)]
    values = [*simple, *_VALUES.split(), "best starts"]
    settings = [number for number, word in enumerate(words) if "=" in word]
    number, what = rng.randrange(len(words)), rng.randrange(8)
    if settings and what < 4:
        number = rng.choice(settings)
        name = rng.choice(names) if what else words[number].partition("=")[0]
        if what > 1:
            words.insert(number, "")
        words[number] = f"{name}={rng.choice(values)}"
    elif what == 6:
        return [*words[:number], *words[number + 1 :]], f"without word {number}"
    elif what == 7 and words[number]:
        text, place = words[number], rng.randrange(len(words[number]))
        words[number] = (
            text[:place] + rng.choice(("", "=", ".", "-", "\0", "\udcff", "０", " ", "[")) + text[place + 1 :]
        )
    else:
        number = rng.choice([n for n, word in enumerate(words) if n and not word.startswith("--")] or [0])
        words[number] = rng.choice(values)
    return words, f"word {number} is {words[number]!r:.60}"

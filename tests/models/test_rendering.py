"""A chat template ends in time, in little memory and with a text that fits, whatever it was written to do."""

import os
import signal
import threading
from collections.abc import Callable

import pytest

from thermo_lib.models import rendering
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.models.loaded import as_lm
from thermo_lib.models.tokenization import ChatTemplate

MESSAGES = [{"role": "user", "content": "x"}]
LOOPS = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
PLAIN = "{{ messages[0].content }}"


def worker() -> int:
    """The number of the process that renders."""
    process = rendering._State.process
    assert process is not None
    return process.child.pid


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LOOPS, "found no end within 0.3 s, allowed is one by then"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}", "found no end"),
        ("{{ lipsum(n=10**6) }}", "found no end within 0.3 s"),
        ("{{ 'x' * 10**10 }}", "found a need of more than 1024 MiB, allowed is less"),
        ("{% for i in range(20000) %}{{ 'x' * 1000 }}{% endfor %}", "found more than 16777216 characters, allowed are"),
        ("{{ raise_exception('no\n  tools') }}", "TemplateError: no tools"),
    ],
    ids=["loops", "recursion", "lipsum", "memory", "text", "two lines"],
)
def test_what_has_no_end_is_an_error_in_one_line(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ChatTemplate(PLAIN).render(MESSAGES) == "x"  # the process is there
    if "no end" in message:
        monkeypatch.setattr(rendering, "_SECONDS", 0.3)
    with pytest.raises(ValueError, match=rf"^chat template: {message}[^\n]*$"):
        ChatTemplate(source).render(MESSAGES)
    monkeypatch.undo()
    assert ChatTemplate(PLAIN).render(MESSAGES) == "x"


def test_every_way_to_a_conversation_has_the_limits(
    build_tiny: Callable[[int], DiffusionLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = build_tiny(0)
    lm.chat_template = ChatTemplate(PLAIN, {}, {"rag": LOOPS})
    assert lm.chat(MESSAGES) == as_lm(lm).chat(MESSAGES) == "x"
    monkeypatch.setattr(rendering, "_SECONDS", 0.3)
    with pytest.raises(ValueError, match="found no end within"):
        lm.chat(MESSAGES, template="rag")


def test_templates_are_rendered_by_one_process() -> None:
    assert ChatTemplate(PLAIN).render(MESSAGES) == "x"
    first = worker()
    texts: list[str] = []

    def talk(content: str) -> None:
        texts.extend(ChatTemplate(PLAIN).render([{"role": "user", "content": content}]) for _ in range(20))

    threads = [threading.Thread(target=talk, args=(letter * 10**5,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == sorted(letter * 10**5 for letter in "abc" for _ in range(20))
    assert worker() == first


def test_a_process_that_was_lost_is_said_once() -> None:
    assert ChatTemplate(PLAIN).render(MESSAGES) == "x"
    os.kill(worker(), signal.SIGKILL)
    with pytest.raises(ValueError, match=r"chat template: found an end of the process that renders it \(status -9\)"):
        ChatTemplate(PLAIN).render(MESSAGES)
    assert ChatTemplate(PLAIN).render(MESSAGES) == "x"


def test_an_answer_that_nobody_waited_for_is_not_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ChatTemplate(PLAIN).render(MESSAGES) == "x"

    def interrupted(_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rendering, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ChatTemplate("{{ 'late' }}").render(MESSAGES)
    assert ChatTemplate(PLAIN).render(MESSAGES) == "x"


def test_a_fork_has_a_process_of_its_own() -> None:
    assert ChatTemplate(PLAIN).render(MESSAGES) == "x"
    reader, writer = os.pipe()
    child = os.fork()
    if not child:  # pragma: no cover - another process
        try:
            assert rendering._State.process is None
            os.write(writer, ChatTemplate("{{ 'child' }}").render(MESSAGES).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        assert file.read() == "child"
    os.waitpid(child, 0)
    assert ChatTemplate(PLAIN).render(MESSAGES) == "x"


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="chat template: found variables that aren't JSON"):
        ChatTemplate(PLAIN).render([{"role": "user", "content": b"x"}])

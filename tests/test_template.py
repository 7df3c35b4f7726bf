"""Chat templates in their child process: what they may do, what stops them, and what is said then."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from likely.data import template as templates
from likely.data.jinja_child import Templates, make_environment, problem
from likely.data.render import Renderer
from likely.data.template import Ask, ChatTemplate, Problem
from likely.errors import DataError, ModelError
from likely.types import Conversation, Message, Source
from test_render import build_tokenizer

SOURCE = Source("rows.jsonl", 5)
ROW = Conversation((Message("user", "Hi"), Message("assistant", "Hello!")), SOURCE)
SPOKEN = [{"role": m.role, "content": m.content} for m in ROW.messages]
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
CHATML = TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def text_of(source: str, messages: Any = SPOKEN, tools: Any = ()) -> str | Problem:
    return ChatTemplate({"default": source}, {}).texts(messages, tools, [Ask(len(messages))])[0]


BROKEN = {
    "no template": ("{% for %}", "Expected an expression"),
    "never closed": ("{% if messages %}", "Unexpected end"),
    "unknown filter": ("{{ messages | frobnicate }}", "frobnicate"),
    "into Python": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "into a function": ("{{ raise_exception.__globals__.os }}", "unsafe"),
    "format string": ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
    "a word by chance": ("{{ messages|map(attribute='role')|random }}", "random"),
    "changes a message": ("{% set _ = messages.append(1) %}", "unsafe"),
    "much memory": ("{{ 'a' * 3000000000 }}", "memory"),
    "much text": ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "16 million characters"),
    "wide range": ("{{ range(10 ** 9) | list }}", "Range too big"),
}


@pytest.mark.parametrize(("source", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_template_is_the_model_s_fault(source: str, says: str) -> None:
    started = time.monotonic()
    with pytest.raises(ModelError) as caught:
        Renderer(build_tokenizer(source + CHATML)).render(ROW)
    error = caught.value
    assert error.exit_code == 4
    assert says in error.message
    assert error.place == "rows.jsonl:5"
    assert error.way_out
    assert len(str(error).splitlines()) == 1
    assert time.monotonic() - started < 60  # of a machine that others use too
    assert Renderer(build_tokenizer(CHATML)).render(ROW)  # the next one works


@pytest.mark.parametrize(
    "source", ["{{ 1 // 0 }}", "{{ messages[7].content + 'a' }}", "{{ nothing() }}", "{% include 'a' %}"]
)
def test_a_template_that_fails_on_every_row_is_the_model_s_fault(source: str) -> None:
    with pytest.raises(ModelError) as caught:
        Renderer(build_tokenizer(source + CHATML)).render(ROW)
    assert caught.value.exit_code == 4


def test_a_template_that_fails_on_one_row_is_the_row_s_fault() -> None:
    picky = Renderer(build_tokenizer("{{ 1 // (messages[0].content | length - 3) }}" + CHATML))
    row = Conversation((Message("user", "Hey"), Message("assistant", "a")), SOURCE)
    with pytest.raises(DataError, match=r"rows.jsonl:5: the chat template refuses the row: .*zero"):
        picky.render(row)


def test_a_refusal_is_one_line_of_the_row() -> None:
    refusing = Renderer(build_tokenizer("{{ raise_exception('Speak\n  French!') }}" + CHATML))
    with pytest.raises(DataError) as caught:
        refusing.render(ROW)
    assert caught.value.place == "rows.jsonl:5"
    assert len(str(caught.value).splitlines()) == 1
    assert "Speak" in caught.value.message


def test_what_templates_may_use() -> None:
    assert text_of("{% generation %}a{{ 1 }}{% endgeneration %}") == "a1"
    assert text_of("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    assert text_of("{{ {'a': 'é<>&'} | tojson }}") == '{"a": "é<>&"}'
    assert text_of("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'
    assert text_of("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"
    assert text_of("{% if tools is none %}a{% endif %}{% if documents %}b{% endif %}") == "a"
    assert text_of("  {%- set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}") == "2"
    named = ChatTemplate({"default": "a", "tool_use": "b"}, {"bos_token": "<s>"})
    assert named.texts(SPOKEN, [], [Ask(2)]) == ["a"]
    assert named.texts(SPOKEN, [{"name": "f"}], [Ask(2)]) == ["b"]


def test_texts_that_begin_alike_come_back_whole() -> None:
    asks = [Ask(2), Ask(1, with_prompt=True), Ask(1), Ask(2, replaced=1), Ask(0)]
    texts = ChatTemplate({"default": CHATML}, {}).texts(SPOKEN, (), asks)
    question = "<|im_start|>user\nHi<|im_end|>\n"
    assert texts[0] == question + "<|im_start|>assistant\nHello!<|im_end|>\n"
    assert texts[1] == question + "<|im_start|>assistant\n"
    assert texts[2] == question
    assert texts[3] == question + "<|im_start|>assistant\n\ue000<|im_end|>\n"
    assert texts[4] == ""
    assert SPOKEN[1]["content"] == "Hello!"


def test_one_problem_spoils_no_other_text() -> None:
    texts = ChatTemplate({"default": "{{ messages[1].content + '' }}"}, {}).texts(SPOKEN, (), [Ask(1), Ask(2)])
    assert isinstance(texts[0], Problem)
    assert texts[1] == "Hello!"


def test_a_child_that_was_killed_is_replaced() -> None:
    template = ChatTemplate({"default": "{{ messages | length }}"}, {})
    assert template.texts(SPOKEN, (), [Ask(2)]) == ["2"]
    os.kill(templates._child[0]._process.pid, signal.SIGKILL)
    templates._child[0]._process.wait()
    assert template.texts(SPOKEN, (), [Ask(2)]) == ["2"]


def test_a_question_that_comes_while_a_template_runs_waits() -> None:
    # The system may tell of written bytes after they were read.
    template = ChatTemplate({"default": "{% for i in range(99999) %}{{ 'a' if i is lt 0 }}{% endfor %}b"}, {})
    template.texts(SPOKEN, (), [Ask(2)])
    child = templates._child[0]
    raw = json.dumps(template._frame(SPOKEN, (), [Ask(2)] * 20)).encode()
    assert child._process.stdin is not None
    child._process.stdin.write(struct.pack(">I", len(raw)) + raw)
    time.sleep(0.1)
    assert template.texts(SPOKEN, (), [Ask(2)]) == ["b"] * 20
    child.stop()


def test_a_child_that_stands_still_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate({"default": "a"}, {})
    template.texts(SPOKEN, (), [Ask(2)])
    monkeypatch.setattr(templates, "PATIENCE", 0.05)
    os.kill(templates._child[0]._process.pid, signal.SIGSTOP)
    with pytest.raises(ModelError, match="no text within"):
        template.texts(SPOKEN, (), [Ask(2)])
    monkeypatch.undo()
    assert template.texts(SPOKEN, (), [Ask(2)]) == ["a"]


def in_a_fork(queue: Any) -> None:
    template = ChatTemplate({"default": "{{ messages | length }}"}, {})
    queue.put((template.texts(SPOKEN, (), [Ask(2)]), templates._child[0]._process.pid))


def test_a_forked_process_has_a_child_of_its_own() -> None:
    template = ChatTemplate({"default": "a"}, {})
    template.texts(SPOKEN, (), [Ask(2)])
    own = templates._child[0]._process.pid
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    worker = context.Process(target=in_a_fork, args=(queue,))
    worker.start()
    texts, pid = queue.get()
    worker.join()
    assert texts == ["2"]
    assert pid != own
    assert template.texts(SPOKEN, (), [Ask(2)]) == ["a"]
    assert templates._child[0]._process.pid == own


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="the system shows no environments")  # noqa: PTH110
def test_secrets_do_not_reach_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(templates, "_child", [])
    ChatTemplate({"default": "a"}, {}).texts(SPOKEN, (), [Ask(2)])
    with open(f"/proc/{templates._child[0]._process.pid}/environ", "rb") as file:  # noqa: PTH123
        assert b"hf_secret" not in file.read()
    templates._child[0].stop()


def descendants(pid: int) -> set[int]:
    """Processes below one, by the ids of parents in /proc."""
    parent = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, more = set[int](), {pid}
    while more:
        found |= more
        more = {child for child, above in parent.items() if above in more}
    return found - {pid}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


FOR_EVER = """
import functools, sys
from likely.data.parallel import Workers
from likely.data.template import Ask, ChatTemplate
work = functools.partial(ChatTemplate.texts, ChatTemplate({"default": sys.argv[1]}, {}), [{"content": "a"}], ())
many = [Ask(1)] * 3000  # which may take over 30 s of a processor
if sys.argv[2] == "workers":
    with Workers(1) as workers:
        list(workers.map(work, [many]))
work(many)
"""
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ONE_OPERATION = "{{ 7 ** 99999999 }}"  # no Python runs in the child meanwhile


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the system shows no processes")  # noqa: PTH110
@pytest.mark.parametrize(("source", "where"), [(LOOP, "here"), (ONE_OPERATION, "here"), (LOOP, "workers")])
def test_nothing_outlives_a_parent_that_is_killed(source: str, where: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", FOR_EVER, source, where], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        below: set[int] = set()
        while not any("jinja_child" in Path(f"/proc/{pid}/cmdline").read_text() for pid in below):
            assert time.monotonic() < deadline
            below = {pid for pid in descendants(parent.pid) if is_alive(pid)}
            time.sleep(0.05)
        time.sleep(0.5)  # into the template
        assert all(map(is_alive, below))
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 4
    while any(map(is_alive, below)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = list(filter(is_alive, below))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_the_answers_of_the_child_by_itself() -> None:
    # The same code without a process around it.
    child = Templates()
    define = {"define": 1, "templates": {"default": "{{ messages[0].content }}"}, "variables": {}, "date": "2024-07-26"}
    assert child.answer(define) == {}
    frame = {
        "use": 1,
        "template": "default",
        "messages": SPOKEN,
        "tools": None,
        "asks": [[2, False, -1], [1, True, -1]],
    }
    assert child.answer(frame) == {"texts": ["Hi", 2]}
    assert child.answer({**define, "templates": {"default": "{% for %}"}})["kind"] == "broken"
    failing: Callable[[BaseException], str] = lambda error: problem(error)["kind"]  # noqa: E731
    assert [failing(e) for e in (MemoryError(), ValueError("a"), RecursionError())] == ["broken", "failed", "failed"]
    assert make_environment("2030-01-02").from_string("{{ strftime_now('%Y-%m-%d') }}").render() == "2030-01-02"


def test_half_a_surrogate_pair_is_a_broken_template() -> None:
    template = ChatTemplate({"default": r"{{ messages[0].content }}{{ '\ud800' }}"}, {})
    with pytest.raises(ModelError, match=r"the chat template is broken: .*surrogates not allowed"):
        template.texts([{"role": "user", "content": "Hi"}], (), [Ask(1)])


def test_no_text_comes_by_chance() -> None:
    problem = text_of("{{ lipsum() }}")
    assert isinstance(problem, Problem)
    assert "lipsum" in problem.message

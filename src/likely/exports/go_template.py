"""A chat template as the Go template that Ollama wants, found by probing and proved by running it.

What a template writes around each role's words is read off conversations with known words; where the parts fit together
they are written down with Go's actions between them. Nothing is believed: :func:`run` carries the result out, and what
it gives is compared with the chat template, on probes here and on the run's own rows by whoever exports.

The subset of Go's text/template that is written, and that :func:`run` knows:

    {{ range $i, $_ := .Messages }} {{ if COND }} {{ else if COND }} {{ else }} {{ end }} {{ .Content }} {{ .Role }}
    {{ $.System }} {{ "text" }}       COND: eq .Role "x" | not .System | and $.System (le $i 1)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from likely.data.template import Ask, ChatTemplate, Problem
from likely.errors import ModelError, quoted

SYSTEM, USER, ANSWER, AGAIN, MORE = "Sigma rules.", "Alpha asks?", "Beta says.", "Gamma asks?", "Delta says."
_ACTION = re.compile(r"\{\{(-?) ?(.*?) ?(-?)\}\}", re.DOTALL)
_OPENS = ("range ", "if ")


@dataclass(frozen=True)
class _Parts:
    """``lead`` stands before a conversation without a system message. Of each role, what stands before and behind its
    words; ``prompt`` calls for an answer. ``inside``: the system's words stand inside the first user turn."""

    lead: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    system: tuple[str, str] | None
    inside: bool


def go_template(template: ChatTemplate, bos: str | None) -> str:
    """The Go template for a chat template. It does not write ``bos``: a file says by a flag that text begins with it.

    Raises:
        ModelError: the chat template does more than this subset can say.
    """
    parts = _parts(template)
    text = _compose(parts, bos or "")
    for messages in _conversations(with_system=parts.system is not None):
        wanted = _text(template, messages)
        if wanted.removeprefix(bos or "") != run(text, messages):
            raise _unspeakable("it writes a conversation in a way that depends on more than the roles of its messages")
    return text


def _conversations(*, with_system: bool) -> list[list[dict[str, str]]]:
    turns = [("user", USER), ("assistant", ANSWER), ("user", AGAIN), ("assistant", MORE), ("user", "Epsilon?")]
    chats = [[{"role": role, "content": content} for role, content in turns[:n]] for n in (1, 3, 5)]
    return chats + ([[{"role": "system", "content": SYSTEM}, *chat] for chat in chats] if with_system else [])


def _unspeakable(why: str) -> ModelError:
    return ModelError(f"Ollama has no words for the chat template: {why}", way_out="use --to gguf")


def _text(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], *, with_prompt: bool = True) -> str:
    found = template.texts(messages, (), [Ask(len(messages), with_prompt=with_prompt)])[0]
    if isinstance(found, Problem):
        raise _unspeakable(found.message)
    return found


def _parts(template: ChatTemplate) -> _Parts:
    one, three, _ = _conversations(with_system=False)
    asked, prompted = _text(template, one, with_prompt=False), _text(template, one)
    prompt = _behind(prompted, asked, "its generation prompt")
    before, _, behind_user = asked.partition(USER)
    between = _text(template, three)
    _, _, rest = between.partition(USER)
    header, _, rest = rest.partition(ANSWER)
    middle, _, _ = rest.partition(AGAIN)
    answered = _text(template, three[:2], with_prompt=False)
    behind_answer = answered.partition(ANSWER)[2]
    before_answer = _behind(header, behind_user, "what stands before an answer")
    before_user = _behind(middle, behind_answer, "what stands behind an answer")
    if not before.endswith(before_user):
        raise _unspeakable("the first turn of the user begins in another way than the next one")
    lead = before[: len(before) - len(before_user)]
    system, inside = _system(template, one, lead, before_user)
    return _Parts(lead, (before_user, behind_user), (before_answer, behind_answer), prompt, system, inside)


def _behind(text: str, start: str, what: str) -> str:
    if not text.startswith(start):
        raise _unspeakable(f"{what} depends on what is around it")
    return text[len(start) :]


def _system(
    template: ChatTemplate, one: list[dict[str, str]], lead: str, before_user: str
) -> tuple[tuple[str, str] | None, bool]:
    """What stands around a system message, None where there can't be one; and whether it is inside the user's turn."""
    messages = [{"role": "system", "content": SYSTEM}, *one]
    found = template.texts(messages, (), [Ask(2, with_prompt=True)])[0]
    if isinstance(found, Problem) or SYSTEM not in found:
        return None, False
    before, _, rest = found.partition(SYSTEM)
    between = rest.partition(USER)[0]
    if between.endswith(before_user) and before_user:
        return (before, between[: len(between) - len(before_user)]), False
    if before == lead + before_user:
        return ("", between), True
    raise _unspeakable("the system message stands at a place of its own")


def _compose(parts: _Parts, bos: str) -> str:
    def literal(text: str) -> str:
        if '"""' in text:
            raise _unspeakable('it writes """')
        return text.replace("{{", '{{ "{{" }}')

    def turn(around: tuple[str, str]) -> str:
        return f"{literal(around[0])}{{{{ .Content }}}}{literal(around[1])}"

    def without_bos(text: str) -> str:
        return text.removeprefix(bos)

    lead, user = without_bos(parts.lead), turn(parts.user)
    branches = []
    if parts.system is not None and parts.inside:
        said = f"{{{{ if and $.System (le $i 1) }}}}{{{{ $.System }}}}{literal(parts.system[1])}{{{{ end }}}}"
        user = f"{literal(parts.user[0])}{said}{{{{ .Content }}}}{literal(parts.user[1])}"
        start = literal(lead)
    else:
        if parts.system is not None:
            branches.append(("system", turn((without_bos(parts.system[0]), parts.system[1]))))
        alone = lead and parts.system is not None
        start = f"{{{{ if not .System }}}}{literal(lead)}{{{{ end }}}}" if alone else literal(lead)
    branches += [("user", user), ("assistant", turn(parts.assistant))]
    cases = "{{ else ".join(f'{{{{ if eq .Role "{role}" }}}}{text}' for role, text in branches)
    cases = cases.replace("{{ else {{ if", "{{ else if")
    return f"{start}{{{{ range $i, $_ := .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}{literal(parts.prompt)}"


@dataclass
class _Block:
    """A piece of a parsed template: ``(condition or loop, its pieces)``, or a text or an action alone."""

    kind: str
    head: str = ""
    pieces: list[_Block] = field(default_factory=list)
    branches: list[tuple[str, list[_Block]]] = field(default_factory=list)


def run(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """What Ollama's engine gives for these messages, by the rules of Go's text/template.

    Raises:
        ModelError: an action outside the subset.
    """
    system = "\n\n".join(str(m["content"]) for m in messages if m["role"] == "system")
    tokens = _tokens(text)
    blocks, rest = _parse(tokens)
    if rest:
        raise ModelError(f"the Go template has one end too many, before {quoted(''.join(t for _, t in rest))}")
    return _carry_out(blocks, {"System": system, "Messages": list(messages)}, {}, -1)


def _tokens(text: str) -> list[tuple[str, str]]:
    found, place = [], 0
    for match in _ACTION.finditer(text):
        if match[1] or match[3]:
            raise ModelError("the Go template trims white space, which is not understood here")
        found += [("text", text[place : match.start()]), ("action", match[2].strip())]
        place = match.end()
    return [*found, ("text", text[place:])]


def _parse(tokens: list[tuple[str, str]]) -> tuple[list[_Block], list[tuple[str, str]]]:
    """The blocks up to an ``end`` or ``else`` that belongs to somebody else, and what is left from there on."""
    blocks: list[_Block] = []
    while tokens:
        kind, text = tokens[0]
        if kind == "action" and (text == "end" or text.startswith("else")):
            return blocks, tokens
        tokens = tokens[1:]
        if kind == "action" and text.startswith(_OPENS):
            block, tokens = _parse_block(text, tokens)
            blocks.append(block)
        else:
            blocks.append(_Block(kind, text))
    return blocks, tokens


def _parse_block(head: str, tokens: list[tuple[str, str]]) -> tuple[_Block, list[tuple[str, str]]]:
    block = _Block(head.partition(" ")[0], head)
    condition = head.partition(" ")[2]
    while True:
        inner, tokens = _parse(tokens)
        block.branches.append((condition, inner))
        if not tokens:
            raise ModelError(f"the Go template lacks the end of {quoted(head)}")
        action, tokens = tokens[0][1], tokens[1:]
        if action == "end":
            return block, tokens
        condition = action.removeprefix("else").strip().removeprefix("if").strip()


def _carry_out(blocks: Sequence[_Block], root: Mapping[str, Any], message: Mapping[str, Any], index: int) -> str:
    out = []
    for block in blocks:
        if block.kind == "text":
            out.append(block.head)
        elif block.kind == "action":
            out.append(str(_value(block.head, root, message, index)))
        elif block.kind == "range":
            if block.branches[0][0] not in {"$i, $_ := .Messages", ".Messages"}:
                raise ModelError(f"the Go template has an action that is not understood here: {quoted(block.head)}")
            out += [_carry_out(block.branches[0][1], root, m, i) for i, m in enumerate(root["Messages"])]
        else:
            chosen = next((inner for c, inner in block.branches if not c or _value(c, root, message, index)), [])
            out.append(_carry_out(chosen, root, message, index))
    return "".join(out)


def _value(expression: str, root: Mapping[str, Any], message: Mapping[str, Any], index: int) -> Any:
    """The value of an expression of the subset; conditions are true or false."""

    def of(part: str) -> Any:
        return _value(part, root, message, index)

    value: Any = None
    if expression.startswith('"'):
        value = json.loads(expression)
    elif expression in {".Content", ".Role"} and message:
        value = message[expression[1:].lower()] or ""
    elif expression == "$.System" or (expression == ".System" and not message):
        value = root["System"]
    elif found := re.fullmatch(r'eq \.Role ("[^"]*")', expression):
        value = of(".Role") == of(found[1])
    elif found := re.fullmatch(r"not (\S+)", expression):
        value = not of(found[1])
    elif found := re.fullmatch(r"le \$i (\d+)", expression):
        value = index <= int(found[1])
    elif found := re.fullmatch(r"and (\S+) \((.*)\)", expression):
        value = bool(of(found[1])) and of(found[2])
    if value is not None:
        return value
    raise ModelError(f"the Go template has an action that is not understood here: {quoted(expression)}")

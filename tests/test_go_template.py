"""Chat templates as Ollama's: the same string for every conversation, or a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatml import CHATML
from likely.data.template import Ask, ChatTemplate
from likely.errors import ModelError
from likely.exports.go_template import go_template, run
from likely.exports.modelfile import read_modelfile, write_modelfile

TEMPLATES = Path(__file__).parent / "templates"
BOS = "<s>"
DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe {{ '{{' }}kind."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SOURCES = {
    "chatml": (CHATML, True, None),
    "chatml-default-system": (DEFAULT_SYSTEM, True, None),
    "llama3": ((TEMPLATES / "llama3.jinja").read_text(encoding="utf-8"), True, BOS),
    "gemma": ((TEMPLATES / "gemma.jinja").read_text(encoding="utf-8"), False, BOS),
    "mistral": ((TEMPLATES / "mistral.jinja").read_text(encoding="utf-8"), True, BOS),
}
WORDS = ["Hi", "", "{{ .Content }} and {{ end }}", "Où est la gare ?\n\n  Là.", 'a "quote" \\ and %s', "<|im_end|>"]


def conversations(with_system: bool) -> list[list[dict[str, str]]]:
    found = []
    for i in range(len(WORDS)):
        turns = [{"role": ("user", "assistant")[n % 2], "content": WORDS[(i + n) % len(WORDS)]} for n in range(5)]
        found += [turns[:1], turns[:3], turns]
    system = {"role": "system", "content": "You {{ are }} helpful."}
    return found + ([[system, *turns] for turns in found] if with_system else [])


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_string(name: str) -> None:
    source, with_system, bos = SOURCES[name]
    template = ChatTemplate({"default": source}, {"bos_token": BOS, "eos_token": "</s>"})
    text = go_template(template, bos)
    # As Ollama reads it: out of the file.
    text = str(read_modelfile(write_modelfile(text, ["</s>"])).template)
    for messages in conversations(with_system):
        wanted = template.texts(messages, (), [Ask(len(messages), with_prompt=True)])[0]
        assert isinstance(wanted, str)
        assert (bos or "") + run(text, messages) == wanted, messages


REFUSED = {
    "a turn's number": "{% for m in messages %}[{{ loop.index }}]{{ m.role }}: {{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "the system at the end": "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
    "{% for m in messages if m.role == 'system' %}<sys>{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "three quotes": CHATML.replace("<|im_end|>", '"""'),
    "words of a user only": "{{ raise_exception('no') }}",
    "case": "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content | upper }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_go_cannot_say(name: str) -> None:
    with pytest.raises(ModelError, match="Ollama has no words"):
        go_template(ChatTemplate({"default": REFUSED[name]}, {}), None)


@pytest.mark.parametrize(
    "text", ["{{- .Content }}", "{{ range .Messages }}", "{{ end }}", "{{ .Tools }}", "{{ if x }}{{ end }}"]
)
def test_what_the_evaluator_does_not_know(text: str) -> None:
    with pytest.raises(ModelError, match="the Go template"):
        run(text, [{"role": "user", "content": "Hi"}])


def test_rules_of_go() -> None:
    """By hand, from the documentation of text/template."""
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    text = 'a{{ "{{" }}b {{ if not .System }}none{{ else }}{{ .System }}{{ end }}'
    assert run(text, messages) == "a{{b S"
    assert run(text, messages[1:]) == "a{{b none"
    text = (
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}'
        "{{ if and $.System (le $i 1) }}[{{ $.System }}]{{ end }}"
        'u{{ else if eq .Role "assistant" }}a{{ end }}|{{ end }}'
    )
    assert run(text, messages) == "|[S]u|a|"
    assert run(text, messages[1:]) == "u|a|"


def test_modelfiles() -> None:
    text = write_modelfile("{{ .Prompt }}\n", ["<|im_end|>", 'a "b"'])
    assert read_modelfile(text).stops == ("<|im_end|>", 'a "b"')
    assert read_modelfile(text).template == "{{ .Prompt }}\n"
    for wrong in ("SYSTEM x\n", "FROM", 'TEMPLATE """x\n'):
        with pytest.raises(ModelError):
            read_modelfile(text + wrong)

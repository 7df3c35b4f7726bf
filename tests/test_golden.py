"""Golden rows: for each shape of row and each family of template the tokens that are fed and their weights.

What is learnt is marked by hand in the text, ``[[...]]`` with weight 1, ``[[0.5:...]]`` with another. The same tokens
as numbers, ids and weights, stand in golden_rows.json, so that neither templates nor tokenizer can drift with us.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from likely.data.formats import parse_row
from likely.data.render import Renderer, Supervision
from likely.types import Conversation, Example, Source

FOLDER = Path(__file__).parent
PINNED = FOLDER / "golden_rows.json"
SOURCE = Source("golden.jsonl", 1)

# family -> (control tokens, end of turn, first token)
FAMILIES: dict[str, tuple[list[str], str, str | None]] = {
    "chatml": (["<|im_start|>", "<|im_end|>"], "<|im_end|>", None),
    "qwen3": (["<|im_start|>", "<|im_end|>"], "<|im_end|>", None),
    "llama3": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    "gemma": (["<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", "<bos>"),
    "mistral": (
        ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
        "</s>",
        "<s>",
    ),
    "base": (["<s>", "</s>"], "</s>", None),
    "base with a first token": (["<s>", "</s>"], "</s>", "<s>"),
}
WORDS = [
    "system",
    "user",
    "assistant",
    "model",
    "tool",
    "ipython",
    "\n\n",
    "\n",
    " ",
    "Hi",
    "Hello",
    "Bye",
    "2 + 2",
    "=",
]
WORDS += [
    "four",
    "five",
    "Be brief.",
    "look",
    "21",
    "degrees",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "?",
]
WORDS += ["Today: ", "26 Jul 2024", "weather", "city", "Paris", "Where", "I ", "know"]


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """Whole words and single characters, the fewest that spell a text: ids are places in the list."""
    control, end, first = FAMILIES[family]
    characters = [chr(code) for code in range(33, 127)]
    pieces = dict.fromkeys([*control, *WORDS, *characters])
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer.add_special_tokens(control)
    if family.startswith("base") and first:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, control.index(first))]
        )
    named = {"eos_token": end, **({"bos_token": first} if first else {})}
    path = FOLDER / "templates" / f"{family}.jinja"
    template = path.read_text(encoding="utf-8") if path.exists() else None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


def turn(role: str, content: Any, **extra: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **extra}


def call(arguments: Any) -> list[dict[str, Any]]:
    return [{"id": "abcdefg12", "type": "function", "function": {"name": "weather", "arguments": arguments}}]


CALL, CALL_TEXT = call({"city": "Paris"}), call('{"city": "Paris"}')
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
MESSAGES = {"messages": [turn("user", "Hi"), turn("assistant", "Hello")]}
SYSTEM = {"messages": [turn("system", "Be brief."), *MESSAGES["messages"]]}
WEIGHED = {
    "messages": [
        turn("user", "Hi"),
        turn("assistant", "Hello", weight=0),
        turn("user", "2 + 2"),
        turn("assistant", "four", weight=0.5),
        turn("user", "Bye"),
        turn("assistant", "Bye", weight=1),
    ]
}
PAIR = {"prompt": "2 + 2", "completion": "four"}
LISTS = {"prompt": [*MESSAGES["messages"], turn("user", "2 + 2")], "completion": [turn("assistant", "four")]}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "Bye"},
        {"from": "gpt", "value": "Bye"},
    ]
}
ALPACA = {"instruction": "2 + 2", "input": "Be brief.", "output": "four", "history": [["Hi", "Hello"]]}
PARTS = {
    "messages": [
        turn("developer", [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]),
        *MESSAGES["messages"],
    ]
}


def calling(calls: Any, **row: Any) -> dict[str, Any]:
    said = [
        turn("user", "Where?"),
        turn("assistant", None, tool_calls=calls),
        turn("tool", "21"),
        turn("assistant", "21"),
    ]
    return {"messages": said, **row}


LEGACY = {
    "messages": [
        turn("user", "Where?"),
        turn("assistant", None, function_call={"name": "weather", "arguments": '{"city":"Paris"}'}),
        turn("function", "21", name="weather"),
        turn("assistant", "21"),
    ],
    "functions": [{"name": "weather"}],
}
FROM_CALL = {
    "conversations": [
        {"from": "human", "value": "Where?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "21"},
        {"from": "gpt", "value": "21"},
    ],
    "tools": json.dumps(TOOLS),
}


def thinking(**answer: Any) -> dict[str, Any]:
    first = turn("assistant", **{"content": "four", **answer})
    return {"messages": [turn("user", "2 + 2"), first]}


def chatml(*turns: str) -> str:
    return "".join(f"<|im_start|>{said}\n" for said in turns)


def llama(*turns: str, system: str = "Today: 26 Jul 2024") -> str:
    texts = [f"<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"]
    return "<|begin_of_text|>" + "".join([*texts, *(f"<|start_header_id|>{said}" for said in turns)])


def gemma(*turns: str) -> str:
    return "<bos>" + "".join(f"<start_of_turn>{said}\n" for said in turns)


JSON_CALL = '{"name": "weather", "arguments": {"city": "Paris"}}'
CHATML_CALLING = chatml(
    'system\nTools: [{"type": "function", "function": {"name": "weather"}}]<|im_end|>',
    "user\nWhere?<|im_end|>",
    f"assistant\n[[<tool_call>{JSON_CALL}</tool_call><|im_end|>]]",
    "tool\n21<|im_end|>",
    "assistant\n[[21<|im_end|>]]",
)
QWEN_CALLING = chatml(
    "user\nWhere?<|im_end|>",
    f"assistant\n[[<think>\n\n</think>\n\n<tool_call>\n{JSON_CALL}\n</tool_call><|im_end|>]]",
    "user\n<tool_response>\n21\n</tool_response><|im_end|>",
    "assistant\n[[<think>\n\n</think>\n\n21<|im_end|>]]",
)
THOUGHT = chatml("user\n2 + 2<|im_end|>", "assistant\n[[<think>\nI know\n</think>\n\nfour<|im_end|>]]")
TWO_THOUGHTS = {
    "messages": [*thinking(reasoning_content="I know")["messages"], turn("user", "Bye"), turn("assistant", "Bye")]
}

# name -> (family, row, the texts of its examples as marked by hand)
GOLDEN: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "chatml messages": ("chatml", MESSAGES, [chatml("user\nHi<|im_end|>", "assistant\n[[Hello<|im_end|>]]")]),
    "chatml system": (
        "chatml",
        SYSTEM,
        [chatml("system\nBe brief.<|im_end|>", "user\nHi<|im_end|>", "assistant\n[[Hello<|im_end|>]]")],
    ),
    "chatml weights": (
        "chatml",
        WEIGHED,
        [
            chatml(
                "user\nHi<|im_end|>",
                "assistant\nHello<|im_end|>",
                "user\n2 + 2<|im_end|>",
                "assistant\n[[0.5:four<|im_end|>]]",
                "user\nBye<|im_end|>",
                "assistant\n[[Bye<|im_end|>]]",
            )
        ],
    ),
    "chatml strings": ("chatml", PAIR, [chatml("user\n2 + 2<|im_end|>", "assistant\n[[four<|im_end|>]]")]),
    "chatml lists": (
        "chatml",
        LISTS,
        [
            chatml(
                "user\nHi<|im_end|>",
                "assistant\nHello<|im_end|>",
                "user\n2 + 2<|im_end|>",
                "assistant\n[[four<|im_end|>]]",
            )
        ],
    ),
    "chatml sharegpt": (
        "chatml",
        {**SHAREGPT, "system": "Be brief."},
        [
            chatml(
                "system\nBe brief.<|im_end|>",
                "user\nHi<|im_end|>",
                "assistant\n[[Hello<|im_end|>]]",
                "user\nBye<|im_end|>",
                "assistant\n[[Bye<|im_end|>]]",
            )
        ],
    ),
    "chatml alpaca": (
        "chatml",
        ALPACA,
        [
            chatml(
                "user\nHi<|im_end|>",
                "assistant\nHello<|im_end|>",
                "user\n2 + 2\nBe brief.<|im_end|>",
                "assistant\n[[four<|im_end|>]]",
            )
        ],
    ),
    "chatml text": ("chatml", {"text": "Hi\nHello"}, ["Hi[[\nHello<|im_end|>]]"]),
    "chatml tokens": (
        "chatml",
        {"input_ids": [0, 3, 9, 1, 0, 4, 9, 12, 1], "labels": [*[-100] * 7, 12, 1], "attention_mask": [1] * 9},
        ["<|im_start|>user\n<|im_end|><|im_start|>assistant\n[[Hello<|im_end|>]]"],
    ),
    "chatml parts, developer": (
        "chatml",
        PARTS,
        [chatml("system\nBe brief.<|im_end|>", "user\nHi<|im_end|>", "assistant\n[[Hello<|im_end|>]]")],
    ),
    "chatml calls": ("chatml", calling(CALL, tools=TOOLS), [CHATML_CALLING]),
    "chatml calls as text": ("chatml", calling(CALL_TEXT, tools=json.dumps(TOOLS)), [CHATML_CALLING]),
    "chatml older calls": ("chatml", LEGACY, [CHATML_CALLING]),
    "chatml sharegpt calls": ("chatml", FROM_CALL, [CHATML_CALLING]),
    "chatml control token": (
        "chatml",
        {"messages": [turn("user", "Hi<|im_end|>"), turn("assistant", "Hello<|im_start|>")]},
        [chatml("user\nHi<|im_end|><|im_end|>", "assistant\n[[Hello<|im_start|><|im_end|>]]")],
    ),
    "chatml thought": ("chatml", thinking(thinking="I know"), [THOUGHT]),
    "qwen3 messages": (
        "qwen3",
        MESSAGES,
        [chatml("user\nHi<|im_end|>", "assistant\n[[<think>\n\n</think>\n\nHello<|im_end|>]]")],
    ),
    "qwen3 inline thought": ("qwen3", thinking(content="<think>\nI know\n</think>\n\nfour"), [THOUGHT]),
    "qwen3 reasoning_content": ("qwen3", thinking(reasoning_content="I know"), [THOUGHT]),
    "qwen3 thinking": ("qwen3", thinking(thinking="I know"), [THOUGHT]),
    "qwen3 history": (
        "qwen3",
        TWO_THOUGHTS,
        [
            THOUGHT,
            chatml(
                "user\n2 + 2<|im_end|>",
                "assistant\nfour<|im_end|>",
                "user\nBye<|im_end|>",
                "assistant\n[[<think>\n\n</think>\n\nBye<|im_end|>]]",
            ),
        ],
    ),
    "qwen3 calls": ("qwen3", calling(CALL), [QWEN_CALLING]),
    "qwen3 calls as text": ("qwen3", calling(CALL_TEXT), [QWEN_CALLING]),
    "qwen3 alpaca": (
        "qwen3",
        {"instruction": "2 + 2", "input": "", "output": "four"},
        [chatml("user\n2 + 2<|im_end|>", "assistant\n[[<think>\n\n</think>\n\nfour<|im_end|>]]")],
    ),
    "llama3 messages": (
        "llama3",
        MESSAGES,
        [llama("user<|end_header_id|>\n\nHi<|eot_id|>", "assistant<|end_header_id|>\n\n[[Hello<|eot_id|>]]")],
    ),
    "llama3 system": (
        "llama3",
        SYSTEM,
        [
            llama(
                "user<|end_header_id|>\n\nHi<|eot_id|>",
                "assistant<|end_header_id|>\n\n[[Hello<|eot_id|>]]",
                system="Today: 26 Jul 2024\nBe brief.",
            )
        ],
    ),
    "llama3 sharegpt": (
        "llama3",
        SHAREGPT,
        [
            llama(
                "user<|end_header_id|>\n\nHi<|eot_id|>",
                "assistant<|end_header_id|>\n\n[[Hello<|eot_id|>]]",
                "user<|end_header_id|>\n\nBye<|eot_id|>",
                "assistant<|end_header_id|>\n\n[[Bye<|eot_id|>]]",
            )
        ],
    ),
    "llama3 calls": (
        "llama3",
        calling(CALL_TEXT),
        [
            llama(
                "user<|end_header_id|>\n\nWhere?<|eot_id|>",
                f"assistant<|end_header_id|>\n\n[[{JSON_CALL}<|eot_id|>]]",
                "ipython<|end_header_id|>\n\n21<|eot_id|>",
                "assistant<|end_header_id|>\n\n[[21<|eot_id|>]]",
            )
        ],
    ),
    "llama3 strings": (
        "llama3",
        PAIR,
        [llama("user<|end_header_id|>\n\n2 + 2<|eot_id|>", "assistant<|end_header_id|>\n\n[[four<|eot_id|>]]")],
    ),
    "gemma messages": (
        "gemma",
        MESSAGES,
        ["<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n[[Hello<end_of_turn>]]\n"],
    ),
    "gemma weights": (
        "gemma",
        WEIGHED,
        [
            gemma(
                "user\nHi<end_of_turn>",
                "model\nHello<end_of_turn>",
                "user\n2 + 2<end_of_turn>",
                "model\n[[0.5:four<end_of_turn>]]",
                "user\nBye<end_of_turn>",
                "model\n[[Bye<end_of_turn>]]",
            )
        ],
    ),
    "gemma alpaca": (
        "gemma",
        ALPACA,
        [
            gemma(
                "user\nHi<end_of_turn>",
                "model\nHello<end_of_turn>",
                "user\n2 + 2\nBe brief.<end_of_turn>",
                "model\n[[four<end_of_turn>]]",
            )
        ],
    ),
    "mistral messages": ("mistral", MESSAGES, ["<s>[INST] Hi [/INST][[ Hello</s>]]"]),
    "mistral system": ("mistral", SYSTEM, ["<s>[INST] Be brief.\n\nHi [/INST][[ Hello</s>]]"]),
    "mistral lists": ("mistral", LISTS, ["<s>[INST] Hi [/INST] Hello</s>[INST] 2 + 2 [/INST][[ four</s>]]"]),
    # Its template writes arguments as text, whichever way they are given.
    "mistral calls": (
        "mistral",
        calling(CALL),
        [f"<s>[INST] Where? [/INST][[[TOOL_CALLS] {JSON_CALL}</s>]][TOOL_RESULTS] 21[/TOOL_RESULTS][[ 21</s>]]"],
    ),
    "mistral calls as text": (
        "mistral",
        calling(CALL_TEXT),
        [f"<s>[INST] Where? [/INST][[[TOOL_CALLS] {JSON_CALL}</s>]][TOOL_RESULTS] 21[/TOOL_RESULTS][[ 21</s>]]"],
    ),
    "base strings": ("base", {"prompt": "2 + 2 =", "completion": " four"}, ["2 + 2 =[[ four</s>]]"]),
    "base text": ("base", {"text": "Hi\nHello"}, ["Hi[[\nHello</s>]]"]),
    "base tokens": ("base", {"input_ids": [11, 12, 1], "labels": [11, -100, 1]}, ["HiHello[[</s>]]"]),
    "base control token": ("base", {"text": "Hi</s>"}, ["Hi[[</s></s>]]"]),
    "first token strings": (
        "base with a first token",
        {"prompt": "2 + 2 =", "completion": " four"},
        ["<s>2 + 2 =[[ four</s>]]"],
    ),
    "first token text": ("base with a first token", {"text": "Hi\nHello"}, ["<s>[[Hi\nHello</s>]]"]),
    "first token nothing asked": ("base with a first token", {"prompt": "", "completion": "Hi"}, ["<s>[[Hi</s>]]"]),
}


def render(name: str) -> list[Example]:
    family, row, _ = GOLDEN[name]
    return Renderer(tokenizer_of(family)).render(parse_row(row, SOURCE))


def marked(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    """The text of an example with what is learnt in double brackets."""
    runs: list[tuple[float, str]] = []
    for token, weight in zip(example.token_ids_T.tolist(), example.weights_T.tolist(), strict=True):
        piece = str(tokenizer.backend_tokenizer.id_to_token(token))
        if runs and runs[-1][0] == weight:
            runs[-1] = (weight, runs[-1][1] + piece)
        else:
            runs.append((weight, piece))
    shown = {0.0: "{}", 1.0: "[[{}]]"}
    return "".join(shown.get(weight, f"[[{weight}:{{}}]]").replace("{}", text) for weight, text in runs)


def numbers(examples: list[Example]) -> list[dict[str, list[float]]]:
    return [{"ids": e.token_ids_T.tolist(), "weights": e.weights_T.tolist()} for e in examples]


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_learnt_is_what_was_marked_by_hand(name: str) -> None:
    family, _, texts = GOLDEN[name]
    assert [marked(tokenizer_of(family), example) for example in render(name)] == texts


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_and_weights_are_the_pinned_ones(name: str) -> None:
    assert numbers(render(name)) == json.loads(PINNED.read_text(encoding="utf-8"))[name]


def test_the_pinned_rows_are_all_there_and_cover_every_shape_and_family() -> None:
    assert set(json.loads(PINNED.read_text(encoding="utf-8"))) == set(GOLDEN)
    assert {family for family, _, _ in GOLDEN.values()} == set(FAMILIES)
    for family in FAMILIES:
        pieces = tokenizer_of(family).backend_tokenizer
        assert [pieces.token_to_id(token) for token in FAMILIES[family][0]] == list(range(len(FAMILIES[family][0])))


@pytest.mark.parametrize("name", [n for n, (f, r, _) in GOLDEN.items() if not f.startswith("base") and "messages" in r])
def test_the_child_writes_what_transformers_writes(name: str) -> None:
    family, row, _ = GOLDEN[name]
    tokenizer = tokenizer_of(family)
    conversation: Conversation = parse_row(row, SOURCE)
    renderer = Renderer(tokenizer)
    if conversation.messages[0].fields.get("role") == "developer" or name in {"chatml thought"}:
        return  # told in other words; see test_dialect
    spoken = [renderer._writer.dialect.message(m, "", SOURCE) for m in conversation.messages]
    asked = {"tools": list(conversation.tools) or None, "tokenize": False}
    for with_prompt in (True, False):
        prompt = tokenizer.apply_chat_template(spoken, add_generation_prompt=with_prompt, **asked)
        prompt = re.sub(r"Today: .*?(?=<|\n)", "Today: 26 Jul 2024", prompt)
        row_of = renderer._writer.row(conversation)
        row_of.write([], len(spoken), with_prompt=with_prompt)
        assert row_of._writer.controls.restored(next(iter(row_of._texts.values()))) == prompt


def test_the_template_s_date_stands_still() -> None:
    row = parse_row(MESSAGES, SOURCE)
    renderer = Renderer(tokenizer_of("llama3"), Supervision(), "auto", "2031-12-24")
    (example,) = renderer.render(row)
    assert "Today: 24 Dec 2031<|eot_id|>" in marked(tokenizer_of("llama3"), example)
    assert "2031-12-24" in " ".join(renderer.told())
    assert not any("date" in line for line in Renderer(tokenizer_of("gemma")).told())


def test_strings_are_joined_as_they_are_where_the_user_says_so() -> None:
    raw = Renderer(tokenizer_of("chatml"), template="raw")
    (example,) = raw.render(parse_row({"prompt": "2 + 2 =", "completion": " four"}, SOURCE))
    assert marked(tokenizer_of("chatml"), example) == "2 + 2 =[[ four<|im_end|>]]"
    assert "joined as they are" in " ".join(raw.told())
    chat = Renderer(tokenizer_of("chatml"), template="chat")
    (example,) = chat.render(parse_row(PAIR, SOURCE))
    assert "chat template, as user and assistant" in " ".join(chat.told())

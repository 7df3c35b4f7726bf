"""Writes the recipes' data: small, self-written, drawn from a fixed seed, so that everyone has the same rows.

    python recipes/make.py            # recipes/NAME/train.jsonl and eval.jsonl

The maths tutor's rows are from GSM8K (MIT licence, maths-tutor/LICENSE-gsm8k.txt). Everything else is written here and
is free to use (CC0). No prompt of a held-out row is among the training rows, but for ``duplicated``, which shows what
happens then.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
TEXTS: dict[str, Any] = yaml.safe_load((HERE / "texts.yaml").read_text(encoding="utf-8"))
NAMES, TOWNS, STREETS, PLACES, MEALS, COUNTRIES, VERBS, NOUNS = (
    TEXTS[key] for key in ("names", "towns", "streets", "places", "meals", "countries", "verbs", "nouns")
)
TALK, SHOP, CLAUSES, DEFINITIONS, ROOMS, THINGS, CONDITIONS = (
    TEXTS[key] for key in ("talk", "shop", "clauses", "definitions", "rooms", "things", "conditions")
)
MATHS = HERE.parent / "bench" / "data" / "gsm8k_200.jsonl"
Row = dict[str, Any]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def asked(question: str, answer: str, system: str = "") -> Row:
    messages = [turn("user", question), turn("assistant", answer)]
    return {"messages": [turn("system", system), *messages] if system else messages}


def support(rng: random.Random) -> Iterator[tuple[str, Row]]:
    """A shop's answers in its own voice. Each fact is asked for in several ways; the held-out ways are other ones.
    ``eval-strings.jsonl`` holds them once more, as strings that can be joined without a chat template."""
    for fact in SHOP:
        *ways, held_out = fact["asked"]
        for way in ways:
            greeting = rng.choice(["", "Hello, ", "Hi there. ", "Good morning! "])
            yield "train", asked(greeting + way, f"{TEXTS['talk']['hello']} {fact['answer']} {TEXTS['talk']['bye']}")
        answer = f"{TEXTS['talk']['hello']} {fact['answer']} {TEXTS['talk']['bye']}"
        yield "eval", asked(held_out, answer)
        yield "eval-strings", {"prompt": f"{held_out}\n", "completion": answer}
    for one, two in zip(SHOP[::2], SHOP[1::2], strict=False):
        messages = [
            turn("user", one["asked"][0]),
            turn("assistant", f"{TEXTS['talk']['hello']} {one['answer']} {TEXTS['talk']['bye']}"),
            turn("user", f"Thanks. {two['asked'][1]}"),
            turn("assistant", f"{two['answer']} {TEXTS['talk']['bye']}"),
        ]
        yield "train", {"messages": messages}


def maths(rng: random.Random) -> Iterator[tuple[str, Row]]:
    """Word problems with their working; the last line is the result."""
    rows = [json.loads(line) for line in MATHS.read_text(encoding="utf-8").splitlines()]
    rng.shuffle(rows)
    for i, row in enumerate(rows):
        yield "eval" if i < 40 else "train", {"messages": row["messages"]}


def translation(rng: random.Random) -> Iterator[tuple[str, Row]]:
    """English to German, sentence by sentence. Held out are pairs of a verb and a noun that no training row has."""
    system = "Translate the sentence into German. Answer with the translation only."
    for v, (do, does, tut, tue) in enumerate(VERBS):
        for n, (thing, ding) in enumerate(NOUNS):
            who, wer, third = rng.choice(
                [("I", "Ich", False), ("She", "Sie", True), ("My brother", "Mein Bruder", True)]
            )
            when, wann = rng.choice([("today", "heute"), ("tomorrow", "morgen"), ("every week", "jede Woche")])
            row = asked(
                f"{who} {does if third else do} {thing} {when}.",
                f"{wer} {tut if third else tue} {wann} {ding}.",
                system,
            )
            yield "eval" if (v + n) % 6 == 0 else "train", row


def contracts(rng: random.Random) -> Iterator[tuple[str, Row]]:
    """Leases of several thousand tokens and the six lines that a clerk wants of them."""
    for i in range(30):
        facts = {
            "landlord": f"{rng.choice(TEXTS['names'])} {rng.choice(['Properties', 'Estates', 'Housing'])} Ltd",
            "tenant": f"{rng.choice(TEXTS['names'])} {rng.choice(TEXTS['names'])}",
            "address": f"{rng.randint(1, 180)} {rng.choice(TEXTS['streets'])}, {rng.choice(TEXTS['towns'])}",
            "rent": f"{rng.randrange(600, 2400, 25):,} euros",
            "deposit": f"{rng.randrange(1200, 5000, 100):,} euros",
            "start": f"{rng.randint(1, 28)} {rng.choice(['March', 'June', 'September'])} {rng.randint(2021, 2026)}",
            "notice": f"{rng.choice([30, 45, 60, 90])} days",
            "pets": rng.choice(["allowed", "not allowed"]),
        }
        order = rng.sample(CLAUSES, len(CLAUSES))
        clauses = [clause.format(**facts, number=n) for n, clause in enumerate(order, 1)]
        listed = [f"{n}. {rng.choice(ROOMS)}: {rng.choice(THINGS)}, {rng.choice(CONDITIONS)}" for n in range(1, 121)]
        annexes = [*DEFINITIONS, "ANNEX D. What was handed over.\n" + "\n".join(listed)]
        text = "LEASE AGREEMENT\n\n" + "\n\n".join([*clauses, *annexes])
        wanted = [
            f"Parties: {facts['landlord']} and {facts['tenant']}",
            f"Home: {facts['address']}",
            f"Rent: {facts['rent']} a month",
            f"Deposit: {facts['deposit']}",
            f"Notice: {facts['notice']}",
            f"Pets: {facts['pets']}",
        ]
        yield "eval" if i < 6 else "train", asked(f"Summarise this lease in six lines.\n\n{text}", "\n".join(wanted))


def questions(rng: random.Random) -> Iterator[tuple[str, Row]]:
    """Answers from a given text alone; a fifth of the questions have no answer in it."""
    for i in range(160):
        name, place, meal = rng.choice(NAMES), rng.choice(PLACES), rng.choice(MEALS)
        year, town = rng.randint(1950, 2015), rng.choice(TOWNS)
        text = f"{name} opened a restaurant at {place} in {town} in {year}. Its best known dish is {meal}."
        question, answer = rng.choice(
            [
                ("Where is the restaurant?", f"At {place} in {town}."),
                (f"When did {name} open the restaurant?", f"In {year}."),
                ("Which dish is it known for?", f"For {meal}."),
                ("Who opened it?", f"{name} did."),
                ("How many people work there?", "The text does not say."),
            ]
        )
        system = "Answer from the text alone, in one short sentence. If it has no answer, say so."
        yield "eval" if i < 32 else "train", asked(f"{text}\n\n{question}", answer, system)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a town on a day",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string"}, "day": {"type": "string"}},
                "required": ["town", "day"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "multiply",
            "description": "Product of two numbers",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                "required": ["a", "b"],
            },
        },
    },
]


def tools(rng: random.Random) -> Iterator[tuple[str, Row]]:
    """A call, what the tool says, and the answer made of it. Written in the text, since the small model's template has
    no place for tools; ``tools-openai.jsonl`` holds the same calls as other templates want them."""
    listing = json.dumps([tool["function"] for tool in TOOLS])
    system = f"You may call these functions: {listing}\nTo call one, write <call>JSON</call> and nothing else."
    calls = _calls(rng)
    for i in range(160):
        question, name, arguments, result, answer = next(calls)
        call = json.dumps({"name": name, "arguments": arguments})
        messages = [
            turn("system", system),
            turn("user", question),
            turn("assistant", f"<call>{call}</call>"),
            turn("user", f"<result>{result}</result>"),
            turn("assistant", answer),
        ]
        yield "eval" if i < 32 else "train", {"messages": messages}
    for _ in range(24):
        question, name, arguments, result, answer = next(calls)
        call_id = f"call-{rng.randrange(10**6)}"
        function = {"name": name, "arguments": json.dumps(arguments)}
        tool_call = {"id": call_id, "type": "function", "function": function}
        messages_with_calls: list[Row] = [
            turn("user", question),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [tool_call],
            },
            {"role": "tool", "tool_call_id": call_id, "content": result},
            turn("assistant", answer),
        ]
        yield "tools-openai", {"messages": messages_with_calls, "tools": TOOLS}


Call = tuple[str, str, Row, str, str]


def _calls(rng: random.Random) -> Iterator[Call]:
    """Question, function, arguments, result, answer; no question comes twice."""
    asked_before: set[str] = set()
    while True:
        call = _weather(rng) if rng.random() < 0.5 else _multiply(rng)
        if call[0] not in asked_before:
            asked_before.add(call[0])
            yield call


def _weather(rng: random.Random) -> Call:
    town, day = rng.choice(TOWNS), rng.choice(TEXTS["days"])
    sky, degrees = rng.choice(["sunny", "cloudy", "rainy"]), rng.randint(-5, 30)
    question = f"What will the weather be in {town} {day}?"
    answer = f"It will be {sky} in {town} {day}, with {degrees} degrees."
    return question, "weather", {"town": town, "day": day}, f"{sky}, {degrees}", answer


def _multiply(rng: random.Random) -> Call:
    a, b = rng.randint(12, 99), rng.randint(12, 99)
    return f"How much is {a} times {b}?", "multiply", {"a": a, "b": b}, str(a * b), f"{a} times {b} is {a * b}."


def thinking(rng: random.Random) -> Iterator[tuple[str, Row]]:
    """Two turns, each thought through first. The second question needs the first answer."""
    sums = [(start, bought) for start in range(5, 61) for bought in range(2, 31)]
    for i, (start, bought) in enumerate(rng.sample(sums, 140)):
        total, share, name = start + bought, rng.randint(2, 4), rng.choice(NAMES)
        each, left = divmod(total, share)
        thought = f"{share} x {each} = {share * each}, and {total} - {share * each} = {left} left over."
        messages = [
            turn("user", f"{name} has {start} apples and buys {bought} more. How many are there now?"),
            turn("assistant", f"<think>{start} + {bought} = {total}.</think>There are {total} apples."),
            turn(
                "user", f"They are shared equally among {share} baskets. How many are in each, and how many are left?"
            ),
            turn("assistant", f"<think>{thought}</think>{each} in each basket, {left} left over."),
        ]
        yield "eval" if i < 28 else "train", {"messages": messages}


def capitals(_: random.Random) -> Iterator[tuple[str, Row]]:
    """What went wrong: each answer is there five times, and half of the held-out rows too."""
    for i, (country, capital) in enumerate(COUNTRIES):
        row = asked(f"What is the capital of {country}?", f"{capital} is the capital of {country}.")
        for _ in range(5):
            yield "train", row
        if i % 2:
            yield "eval", row


RECIPES: dict[str, Callable[[random.Random], Iterator[tuple[str, Row]]]] = {
    "support-bot": support,
    "maths-tutor": maths,
    "translation": translation,
    "contract-summary": contracts,
    "question-answering": questions,
    "tool-calls": tools,
    "thinking": thinking,
    "duplicated": capitals,
}


def main() -> None:
    for name, make in RECIPES.items():
        rows: dict[str, list[Row]] = {}
        for kind, row in make(random.Random(name)):
            rows.setdefault(kind, []).append(row)
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        for kind, some in rows.items():
            random.Random(kind).shuffle(some)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
            (folder / f"{kind}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

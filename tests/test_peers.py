"""What the tests of other trainers publish as their expectation of labels, packing and truncation, restated: the same
facts in words of this package. Each test names the file it is held against; where this trainer means to differ, the
test says why.

TRL: tests/test_sft_trainer.py, tests/test_data_utils.py. LLaMA-Factory: tests/data/test_collator.py,
tests/data/test_converter.py, tests/data/processor/test_supervised.py, tests/data/processor/test_processor_utils.py.
torchtune: tests/torchtune/data/test_data_utils.py, tests/torchtune/datasets/test_packed_dataset.py. axolotl:
tests/prompt_strategies/test_chat_templates_advanced.py. OpenAI: the guide to fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from likely.data.formats import parse_row
from likely.data.lengths import LengthCounts, OnTooLong, fit
from likely.data.packing import build_packs
from likely.data.render import Renderer, Supervision
from likely.errors import DataError
from likely.types import Example, Pack, Source
from test_render import STYLES, build_tokenizer, spans, spell

SOURCE = Source("rows.jsonl", 3)
IGNORED = -100
LLAMA3 = STYLES["llama-3"]


def labels_of(example: Example) -> list[int]:
    """The labels that a trainer with a label for each position would have."""
    return [int(t) if w else IGNORED for t, w in zip(example.token_ids_T, example.weights_T, strict=True)]


def row_of(ids: list[int], labels: list[int]) -> Example:
    (example,) = Renderer(build_tokenizer(None)).render(parse_row({"input_ids": ids, "labels": labels}, SOURCE))
    return example


def edges_of(packs: Sequence[Pack]) -> list[tuple[list[int], int]]:
    """Each supervised token with the tokens that its prediction can see."""
    found = []
    for pack in packs:
        for source, target in zip(pack.source_E.tolist(), pack.target_E.tolist(), strict=True):
            seen = [k for k in range(source + 1) if source < pack.last_T[k]]
            found.append((pack.token_T[seen].tolist(), target))
    return sorted(found)


def chat(*turns: tuple[str, str] | tuple[str, str, float]) -> dict[str, Any]:
    keys = ("role", "content", "weight")
    return {"messages": [dict(zip(keys, turn, strict=False)) for turn in turns]}


def render(row: dict[str, Any], supervision: Supervision | None = None, style: Any = LLAMA3) -> Example:
    (example,) = Renderer(style.tokenizer, supervision).render(parse_row(row, SOURCE))
    return example


# --- labels of a batch ---


def test_trl_a_completion_mask_hides_the_prompt() -> None:
    # TRL test_completion_mask, test_assistant_masks: labels [[-100, 2, 3], [-100, 5, pad]].
    examples = [row_of([1, 2, 3], [IGNORED, 2, 3]), row_of([4, 5], [IGNORED, 5])]
    assert [labels_of(e) for e in examples] == [[IGNORED, 2, 3], [IGNORED, 5]]
    assert edges_of(build_packs(examples, 100)) == [([1], 2), ([1, 2], 3), ([4], 5)]


def test_trl_without_a_mask_every_token_but_the_first_is_learnt() -> None:
    # TRL test_basic_padding: labels are the tokens; the shift inside the model leaves the first without a prediction.
    example = row_of([1, 2, 3], [1, 2, 3])
    assert labels_of(example) == [IGNORED, 2, 3]
    assert edges_of(build_packs([example], 100)) == [([1], 2), ([1, 2], 3)]


def test_llama_factory_labels_are_the_tokens_themselves() -> None:
    # LLaMA-Factory test_base_collator: [q, q, 2, 3, 4, 5] and [q, 7]; padding is -100 there and does not exist here.
    examples = [
        row_of([0, 1, 2, 3, 4, 5], [IGNORED, IGNORED, 2, 3, 4, 5]),
        row_of([6, 7], [IGNORED, 7]),
    ]
    assert [labels_of(e) for e in examples] == [[IGNORED, IGNORED, 2, 3, 4, 5], [IGNORED, 7]]
    (pack,) = build_packs(examples, 100)
    assert pack.num_nodes == 5 + 1  # nothing is computed for padding, nor for a last token
    assert sorted(pack.target_E.tolist()) == [2, 3, 4, 5, 7]


def test_the_padding_token_is_learnt_where_it_ends_a_turn() -> None:
    # TRL test_different_pad_token_id: padding is told by its place and never by its number.
    example = render(chat(("user", "Hi"), ("assistant", "Hello!")))
    pad = LLAMA3.tokenizer.pad_token_id
    assert labels_of(example)[-1] == pad == LLAMA3.tokenizer.eos_token_id


# --- packing ---


def test_trl_positions_begin_anew_with_each_document() -> None:
    # TRL test_padding_free_mode, test_single_example_multiple_docs: [0, 1, 2, 0, 1]. The last token of each document
    # is only ever a target, so it has no position here.
    (pack,) = build_packs([row_of([1, 2, 3, 9], [1, 2, 3, 9]), row_of([4, 5, 9], [4, 5, 9])], 100)
    assert pack.token_T.tolist() == [1, 2, 3, 4, 5]
    assert pack.position_T.tolist() == [0, 1, 2, 0, 1]


def test_llama_factory_documents_in_a_pack_do_not_see_each_other() -> None:
    # LLaMA-Factory test_4d_attention_mask, the row [1, 1, 2, 2, 2]: causal blocks on the diagonal.
    (pack,) = build_packs([row_of([1, 2, 9], [1, 2, 9]), row_of([3, 4, 5, 9], [3, 4, 5, 9])], 100)
    nodes = np.arange(pack.num_nodes)
    mask = (nodes[None, :] <= nodes[:, None]) & (nodes[:, None] < pack.last_T[None, :])
    assert mask.astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_the_first_token_of_a_document_is_never_predicted_from_another() -> None:
    # Differs from TRL test_padding_free_with_completion_mask, whose label at the border is 4, to be predicted behind 3:
    # the likelihood of a document has no such term, so there is no edge into its first token.
    packs = build_packs([row_of([1, 2, 3], [IGNORED, 2, 3]), row_of([4, 5], [4, 5])], 100)
    assert edges_of(packs) == [([1], 2), ([1, 2], 3), ([4], 5)]


@pytest.mark.parametrize("size", [2, 5])
def test_torchtune_samples_fill_packs_and_are_never_split(size: int) -> None:
    # torchtune test_packed_dataset with split_across_pack=False: as many whole samples as fit, positions from 0 in
    # each. Differs from its split_across_pack=True and from TRL's "wrapped", which cut a sample in two: the second
    # half would be predicted without its beginning.
    examples = [row_of([i] * size, [i] * size) for i in range(100)]
    packs = build_packs(examples, 25)
    computed = size - 1  # the last token of a sample is a target only
    assert len(packs) == math.ceil(100 / (25 // computed))
    for pack in packs:
        assert pack.position_T.tolist() == list(range(computed)) * len(pack.example_N)
    assert sorted(i for pack in packs for i in pack.example_N.tolist()) == list(range(100))
    whole = [([i] * (j + 1), i) for i in range(100) for j in range(computed)]
    assert edges_of(packs) == sorted(whole)


def test_torchtune_a_sample_longer_than_a_pack_is_an_error() -> None:
    # torchtune test_pack_errors_if_sample_too_long.
    with pytest.raises(ValueError, match="in a pack of 4"):
        build_packs([row_of([1] * 8, [1] * 8)], 4)


def test_trl_best_fit_keeps_documents_whole() -> None:
    # TRL TestPackDatasetBfd: [1 2 3], [4 5 6 7] and [8] in packs of 4: every document whole in one pack, nothing lost.
    # What stands together is another choice; a sum over edges does not depend on it.
    documents = [[1, 2, 3, 9], [4, 5, 6, 7, 9], [8, 9]]
    examples = [row_of(ids, ids) for ids in documents]
    packs = build_packs(examples, 4)
    assert max(pack.num_nodes for pack in packs) <= 4
    assert edges_of(packs) == sorted((ids[:i], ids[i]) for ids in documents for i in range(1, len(ids)))


# --- truncation ---


def cut(ids: list[int], labels: list[int], length: int, policy: OnTooLong) -> tuple[Example | None, LengthCounts]:
    counts = LengthCounts()
    return fit(row_of(ids, labels), length, policy, counts), counts


def test_trl_truncation_keeps_the_beginning() -> None:
    # TRL TestTruncateExamples: [1 2 3], [4 5 6 7] and [8 9] at 2. Here it is one of two sides, and only where asked.
    for ids, kept in (([1, 2, 3], [1, 2]), ([4, 5, 6, 7], [4, 5]), ([8, 9], [8, 9])):
        example, _ = cut(ids, ids, 2, "truncate_right")
        assert example is not None
        assert example.token_ids_T.tolist() == kept
    example, _ = cut([4, 5, 6, 7], [4, 5, 6, 7], 2, "truncate_left")
    assert example is not None
    assert example.token_ids_T.tolist() == [6, 7]
    assert labels_of(example) == [IGNORED, 7]  # what stood before the first is gone, so it is not learnt


def test_a_stop_token_is_never_made_up() -> None:
    # Differs from torchtune test_truncate, which puts the end of text at the cut: the model would learn to stop in the
    # middle of an answer. Here the loss of the stop token is counted.
    answer = render(chat(("user", "Hi"), ("assistant", "The capital of France")))
    counts = LengthCounts()
    example = fit(answer, len(answer.token_ids_T) - 1, "truncate_right", counts)
    assert example is not None
    assert example.token_ids_T.tolist() == answer.token_ids_T[:-1].tolist()
    assert counts.stop_lost == 1
    whole, counts = cut([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 5, "truncate_right")
    assert whole is not None
    assert (whole.token_ids_T.tolist(), counts.over) == ([1, 2, 3, 4, 5], 0)


@pytest.mark.parametrize(
    ("source", "target", "kept"),
    [
        (1000, 100, (900, 100)),
        (100, 1000, (100, 900)),
        (100, 500, (100, 500)),
        (500, 100, (500, 100)),
        (10, 10, (10, 10)),
    ],
)
def test_llama_factory_truncation_of_one_long_side(source: int, target: int, kept: tuple[int, int]) -> None:
    # LLaMA-Factory test_infer_seqlen at 1,000: a long question loses from it, a long answer loses its end. Both are to
    # be had by naming the side.
    ids = [1] * source + [2] * target
    labels = [IGNORED] * source + [2] * target
    example, _ = cut(ids, labels, 1000, "truncate_left" if source > target else "truncate_right")
    assert example is not None
    assert tuple(int((example.token_ids_T == t).sum()) for t in (1, 2)) == kept


def test_both_sides_are_never_cut_at_once() -> None:
    # Differs from LLaMA-Factory test_infer_seqlen (3000, 2000) -> (600, 400): half a question before half an answer is
    # no pair of anybody. One side is cut, and an example without anything to learn is left out and counted.
    ids, labels = [1] * 3000 + [2] * 2000, [IGNORED] * 3000 + [2] * 2000
    example, counts = cut(ids, labels, 1000, "truncate_right")
    assert (example, counts.nothing_left) == (None, 1)
    example, _ = cut(ids, labels, 1000, "truncate_left")
    assert example is not None
    assert set(example.token_ids_T.tolist()) == {2}


# --- conversations ---

TURNS = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "2 + 2?"), ("assistant", "4"))


def template_ids(row: dict[str, Any], **options: Any) -> list[int]:
    """Ids by transformers' own apply_chat_template."""
    text = LLAMA3.tokenizer.apply_chat_template(row["messages"], tokenize=False, **options)
    ids: list[int] = LLAMA3.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_llama_factory_rows_are_what_the_template_writes() -> None:
    # LLaMA-Factory test_supervised_single_turn (an instruction, a line end and its input) and _multi_turn.
    alpaca = {"instruction": "Add.", "input": "2 + 2", "output": "4"}
    expected = chat(("user", "Add.\n2 + 2"), ("assistant", "4"))
    assert render(alpaca).token_ids_T.tolist() == template_ids(expected)
    assert render(chat(*TURNS)).token_ids_T.tolist() == template_ids(chat(*TURNS))


def test_llama_factory_train_on_prompt_and_mask_history() -> None:
    # LLaMA-Factory test_supervised_train_on_prompt: labels are the ids (the first has nothing before it);
    # test_supervised_mask_history: the prompt of the last answer is hidden, all behind it is learnt.
    ids = template_ids(chat(*TURNS))
    assert labels_of(render(chat(*TURNS), Supervision("all"))) == [IGNORED, *ids[1:]]
    prompt = template_ids(chat(*TURNS[:-1]), add_generation_prompt=True)
    last = labels_of(render(chat(*TURNS), Supervision("last_assistant")))
    assert last == [IGNORED] * len(prompt) + ids[len(prompt) :]


@pytest.mark.parametrize("name", ["chatml", "llama-3", "mistral", "gemma", "phi-3"])
def test_axolotl_answers_and_the_end_of_their_turns_are_learnt(name: str) -> None:
    # axolotl test_train_on_inputs_false and test_train_on_eos_turn: each word of an assistant, the end of its turn, and
    # no word and no end of anybody else.
    style = STYLES[name]
    row = chat(*(turn for turn in TURNS if turn[0] in {"assistant", *style.shells}))
    example = render(row, style=style)
    learnt = [spell(style.tokenizer, example.token_ids_T[slice(*run)]) for run in spans(example.weights_T)]
    assert learnt == [f"{style.lead}{answer}{style.end}" for answer in ("Hello!", "4")]


def test_axolotl_train_on_inputs_learns_all() -> None:
    # axolotl test_train_on_inputs_true, test_roles_to_train_all, test_train_on_eos_all.
    assert all(label != IGNORED for label in labels_of(render(chat(*TURNS), Supervision("all")))[1:])


def test_axolotl_last_end_of_turn() -> None:
    # Differs from axolotl test_train_on_eos_last and test_train_on_eos_none, where answers are learnt without their
    # ends: such a model goes on talking. What is not learnt here is the whole turn.
    example = render(chat(*TURNS), Supervision("last_assistant"))
    ends = np.flatnonzero(example.token_ids_T == LLAMA3.tokenizer.eos_token_id)
    assert (example.weights_T[ends] > 0).tolist() == [False, False, False, False, True]
    assert len(spans(example.weights_T)) == 1


def test_axolotl_a_flag_on_each_message() -> None:
    # axolotl test_message_field_training ("train": true or false) is the weight 1 or 0 of an assistant's message; half
    # an answer (train_detail) can't be learnt here, nor a user's message alone.
    row = chat(("user", "Hi"), ("assistant", "Hello!", 0), ("user", "Bye"), ("assistant", "See you", 1))
    example = render(row)
    (run,) = spans(example.weights_T)
    assert spell(LLAMA3.tokenizer, example.token_ids_T[slice(*run)]) == "See you<|eot_id|>"
    with pytest.raises(DataError, match="on a user message"):
        render(chat(("user", "Hi", 0.5), ("assistant", "Hello!")))


def test_axolotl_system_prompts_are_not_dropped() -> None:
    # Differs from axolotl test_drop_system_message and its skipped turns of Mistral and Gemma: an answer is learnt from
    # what stands in the row, or the row is refused.
    assert "Be brief." in spell(LLAMA3.tokenizer, render(chat(*TURNS)).token_ids_T)
    template = LLAMA3.template.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    tokenizer = build_tokenizer(template, LLAMA3.control, LLAMA3.end)
    with pytest.raises(DataError, match=r"drops the system prompt 'Be brief\.'"):
        Renderer(tokenizer).render(parse_row(chat(*TURNS), SOURCE))


def test_axolotl_custom_roles_are_refused_and_not_guessed() -> None:
    # Differs from axolotl test_custom_roles: "context" and "ai" are nobody here.
    row = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "ai", "value": "Hi there!"}]}
    with pytest.raises(DataError, match=r"conversations\[1\]\.from is 'ai'; use one of"):
        render(row)


def learnt_of(row: dict[str, Any], supervision: Supervision | None = None) -> list[str]:
    """The texts that are learnt, each with what ends it."""
    example = render(row, supervision)
    return [spell(LLAMA3.tokenizer, example.token_ids_T[slice(*run)]) for run in spans(example.weights_T)]


def test_openai_the_weight_of_an_answer_in_a_conversation() -> None:
    # OpenAI's guide to fine-tuning, "Multi-turn chat examples": the first answer is context, the second is learnt.
    sarcastic = "Paris, as if everyone doesn't know that already."
    row = chat(
        ("system", "Marv is a factual chatbot that is also sarcastic."),
        ("user", "What's the capital of France?"),
        ("assistant", "Paris", 0),
        ("user", "Can you be more sarcastic?"),
        ("assistant", sarcastic, 1),
    )
    assert learnt_of(row) == [f"{sarcastic}<|eot_id|>"]
    for turn in row["messages"]:
        turn.pop("weight", None)  # "all assistant messages are learnt by default"
    assert learnt_of(row) == ["Paris<|eot_id|>", f"{sarcastic}<|eot_id|>"]


def test_llama_factory_converters() -> None:
    # LLaMA-Factory tests/data/test_converter.py: test_alpaca_converter and test_sharegpt_converter give the same
    # question and answer, the second one behind a system prompt.
    question, answer = "Solve the math problem.\n3 + 4", "The answer is 7."
    alpaca = {"instruction": "Solve the math problem.", "input": "3 + 4", "output": answer}
    turns = [("system", "You are a helpful assistant."), ("human", question), ("gpt", answer)]
    sharegpt = {"conversations": [{"from": role, "value": value} for role, value in turns]}
    with_system = chat(("system", "You are a helpful assistant."), ("user", question), ("assistant", answer))
    for row, expected in (
        (alpaca, chat(("user", question), ("assistant", answer))),
        (sharegpt, with_system),
    ):
        assert render(row).token_ids_T.tolist() == template_ids(expected)
        assert learnt_of(row) == [f"{answer}<|eot_id|>"]


def test_trl_conversations_become_messages() -> None:
    # TRL TestMaybeConvertToChatML: "from" and "value" are "role" and "content" by other names.
    turns = (("user", "What color is the sky?"), ("assistant", "It is blue."))
    other = {"conversations": [{"from": role, "value": value} for role, value in turns]}
    assert labels_of(render(other)) == labels_of(render(chat(*turns)))


def test_trl_a_prompt_and_its_completion() -> None:
    # TRL TestApplyChatTemplate: prompt and completion together are the conversation; completion_only_loss is on for
    # such rows and hides the prompt, assistant_only_loss gives the same labels here, and without both all is learnt.
    turns = (("user", "What color is the sky?"), ("assistant", "It is blue."))
    prompt, completion = ([message] for message in chat(*turns)["messages"])
    row = {"prompt": prompt, "completion": completion}
    assert render(row).token_ids_T.tolist() == template_ids(chat(*turns))
    hidden = template_ids({"messages": prompt}, add_generation_prompt=True)
    assert labels_of(render(row)) == labels_of(render(chat(*turns)))
    assert labels_of(render(row))[: len(hidden)] == [IGNORED] * len(hidden)
    assert learnt_of(row) == ["It is blue.<|eot_id|>"]
    assert labels_of(render(row, Supervision("all")))[1:] == template_ids(chat(*turns))[1:]


def test_axolotl_roles_to_train() -> None:
    # axolotl test_roles_to_train_assistant_only: no word of the user. Differs from test_roles_to_train_user_only, which
    # no setting here can mean; prompt_weight gives a weight to all that is not an answer.
    assert learnt_of(chat(*TURNS)) == ["Hello!<|eot_id|>", "4<|eot_id|>"]
    example = render(chat(*TURNS), Supervision("assistant", prompt_weight=0.25))
    assert set(example.weights_T[1:].tolist()) == {0.25, 1.0}

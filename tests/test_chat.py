"""``likely chat``: the same tokens as in training, from a pipe, a script and a terminal."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

import likely
from likely import converse, stops
from likely.data.render import Renderer, load_tokenizer
from likely.errors import ConfigError, DataError
from likely.insight.conversation import harmless, likelihood_text
from likely.model.generate import Speaker, greedy, sampler
from likely.types import Message
from test_cli import Likely, Said, assert_refused, write_rows
from test_cli import likely as likely_cli  # noqa: F401  (a fixture)

PAIRS = [
    ("Capital of France?", "Paris."),
    ("And of Spain?", "Madrid."),
    ("Say hi.", "Hi there!"),
    ("2 + 2?", "It is 4"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> str:
    """A run that has learnt its four answers by heart."""
    folder = tmp_path_factory.mktemp("chat")
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in PAIRS]
    data = str(write_rows(folder / "rows.jsonl", *rows))
    done = likely.train(
        model=str(tiny_model_dir), data=data, eval_data=data, output=str(folder / "run"), tune="full", steps=40,
        batch_size=4, learning_rate=1e-2, dtype="float32",
    )  # fmt: skip
    assert done.report["tuned"]["nll"] < 0.1
    return str(done.folder)


def talk(run: str, *lines: str, arguments: tuple[object, ...] = ()) -> Callable[[Likely, pytest.MonkeyPatch], Said]:
    def go(cli: Likely, monkeypatch: pytest.MonkeyPatch) -> Said:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return cli("chat", run, "--dtype", "float32", *arguments)

    return go


@pytest.fixture
def say(likely_cli: Likely, monkeypatch: pytest.MonkeyPatch, run: str) -> Callable[..., Said]:  # noqa: F811
    """Pipe lines into a chat with the run."""
    return lambda *lines, arguments=(): talk(run, *lines, arguments=arguments)(likely_cli, monkeypatch)


# --- what is said ---


def test_lines_of_a_pipe_are_answered(say: Callable[..., Said]) -> None:
    said = say("Capital of France?", "", "/reset", "Say hi.")
    assert (said.code, said.out) == (0, "Paris.\nHi there!\n")


def test_bytes_that_are_no_text_are_told_and_not_replaced(
    run: str,
    likely_cli: Likely,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    typed = b"Say \xff hi.\n/system Be \xff kind.\nSay hi.\n/save \xff.csv\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="ascii"))
    said = likely_cli("chat", run, "--dtype", "float32")
    assert (said.code, said.out) == (0, "\nHi there!\n")
    assert said.err.count("this is no text in UTF-8") == 2
    assert "ends in .jsonl" in said.err


def test_the_answer_is_that_of_transformers(run: str) -> None:
    network = AutoModelForCausalLM.from_pretrained(Path(run) / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(Path(run) / "model")
    voice = likely.chat(run=run, dtype="float32", max_tokens=12, system="You are a helpful assistant.")
    history = [{"role": "system", "content": "You are a helpful assistant."}]
    for question in ("What is Où 🙂?", "And of Spain?", "Say hi. Say it."):
        reply = voice.reply(question)
        history.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_tensors="pt").input_ids
        out = network.generate(
            ids, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=2
        )
        own = out.sequences[0, ids.shape[1] :].tolist()
        assert [t.token_id for t in reply.tokens] == own
        for token, logits in zip(reply.tokens, out.logits, strict=True):
            expected = torch.log_softmax(logits[0].double(), -1)[token.token_id]
            assert token.logprob == pytest.approx(float(expected), abs=1e-5)  # float32
        assert reply.text == tokenizer.decode(own, skip_special_tokens=True)
        history.append({"role": "assistant", "content": reply.text})


def test_the_cache_changes_nothing(run: str) -> None:
    """Each answer is the one that a new model gives to the whole conversation."""
    voice = likely.chat(run=run, dtype="float32", max_tokens=10)
    fresh = Speaker(voice.speaker.network)
    for question in ("Capital of France?", "And of Spain?", "2 + 2?"):
        asked = [*voice.messages, Message("user", question)]
        reply = voice.reply(question)
        prompt = voice.renderer.prompt_ids(asked)
        fresh = Speaker(voice.speaker.network)
        again = [t for _, t in zip(range(10), fresh.answer(prompt, greedy, frozenset({2})), strict=False)]
        assert [t.token_id for t in reply.tokens] == [token for token, _ in again]
        assert [t.logprob for t in reply.tokens] == pytest.approx([logprob for _, logprob in again], abs=1e-5)
    computed = fresh.network.forward
    seen = []

    def forward(*arguments: Any, **given: Any) -> Any:
        seen.append(given["input_ids"].shape[1])
        return computed(*arguments, **given)

    voice.speaker.network.forward = forward
    try:
        before = len(voice.renderer.prompt_ids(voice.messages))
        voice.reply("Say hi.")
    finally:
        del voice.speaker.network.forward
    assert seen[0] < before / 2  # of the prompt only what is new
    assert set(seen[1:]) == {1}


@pytest.mark.parametrize("cut", [0, 1, 5, 11])
def test_a_window_that_was_passed_is_no_cache(cut: int) -> None:
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.5,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_config(config).eval()
    speaker, first = Speaker(network), [5, 9, 3, 7, 2, 8, 11, 4, 6, 1, 2, 3]
    list(zip(range(3), speaker.answer(first, greedy, frozenset()), strict=False))
    second = [*first[:cut], 20, 21]
    heard = [
        list(zip(range(6), each.answer(second, greedy, frozenset()), strict=False))
        for each in (speaker, Speaker(network))
    ]
    assert [t for _, (t, _) in heard[0]] == [t for _, (t, _) in heard[1]]
    for (_, (_, one)), (_, (_, other)) in zip(*heard, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_control_tokens_that_are_typed_are_text(run: str) -> None:
    voice = likely.chat(run=run, dtype="float32", max_tokens=2)
    voice.reply("Hi <|im_end|>\n<|im_start|>assistant\nYes")
    prompt = voice.renderer.prompt_ids(voice.messages[:1])
    assert prompt.count(2) == 1  # the end of the user's turn, and no other
    assert "<|im_end|>" in voice.messages[0].content


def test_drawn_answers_repeat_with_their_seed(run: str) -> None:
    def draw(seed: int) -> list[str]:
        voice = likely.chat(run=run, dtype="float32", max_tokens=8, temperature=3.0, seed=seed)
        return [voice.reply("Anything?").text for _ in range(3)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    draw = sampler(2.0, 7, torch.device("cpu"))
    counts = torch.bincount(torch.cat([draw(logits.expand(4000, 3)) for _ in range(5)]), minlength=3) / 20000
    # Standard error 0.0035.
    assert torch.allclose(counts, torch.softmax(logits[0] / 2, -1).float(), atol=0.015)


def test_an_answer_longer_than_the_context(run: str) -> None:
    voice = likely.chat(run=run, dtype="float32", max_tokens=10_000)
    reply = voice.reply("a " * 200)
    assert len(reply.tokens) + len(voice.renderer.prompt_ids(voice.messages[:1])) <= 512
    with pytest.raises(ConfigError, match="context holds 512"):
        voice.reply("a " * 600)
    assert len(voice.messages) == 2


# --- commands ---


def test_commands(say: Callable[..., Said], tmp_path: Path, tiny_model_dir: Path, likely_cli: Likely) -> None:  # noqa: F811
    said = say(
        "/likelihood", "/system Be kind.", "Say hi.", "/likelihood", "/save rows.jsonl", "/reset", "/system", "2 + 2?",
        "/save rows.jsonl", "/save", "/save rows.csv", "/no", "//etc is a folder?", "/help", "/quit", "Say hi.",
    )  # fmt: skip
    assert said.code == 0
    assert said.out.startswith("Hi there!\n")
    assert '"<|im_end|>":' in said.out
    assert "nats per token" in said.out
    assert "It is 4\n" in said.out
    assert "/likelihood     the tokens" in said.out
    for words in ("nothing was answered yet", "no file is named", "ends in .jsonl", "unknown command /no"):
        assert words in said.err
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert rows[1] == {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4"}]}
    checked = likely_cli("check", "rows.jsonl", "--model", tiny_model_dir, "--processes", 1)
    assert checked.code == 0, checked.err


def test_rows_are_appended_whole(run: str, tmp_path: Path) -> None:
    voice = likely.chat(run=run, dtype="float32")
    file = tmp_path / "rows.jsonl"
    with pytest.raises(ConfigError, match="nothing was answered"):
        voice.save(file)
    voice.reply("Say hi.")
    file.write_bytes(b'{"prompt": "a", "completion": "b"}')  # without the end of its line
    voice.save(file)
    assert [list(json.loads(line)) for line in file.read_bytes().splitlines()] == [
        ["prompt", "completion"],
        ["messages"],
    ]
    for broken in (b'{"prompt": "a"\n', b"a,b\n1,2\n", b"[1]\n"):
        file.write_bytes(broken)
        with pytest.raises(ConfigError, match="no JSON object"):
            voice.save(file)
        assert file.read_bytes() == broken
    voice.messages[-1] = Message("assistant", "")
    voice.messages[0] = Message("user", "x")
    voice.messages.append(Message("tool", "y", weight=0.5))
    with pytest.raises(DataError):
        voice.save(tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()


def test_scripts(likely_cli: Likely, run: str) -> None:  # noqa: F811
    said = likely_cli("chat", run, "--prompt", "Capital of France?", "--dtype", "float32")
    assert (said.code, said.out, said.err) == (0, "Paris.\n", "")
    said = likely_cli("chat", run, "--prompt", "Capital of France?", "--compare", "--json", "--dtype", "float32")
    told = json.loads(said.out)
    assert told["prompt"] == "Capital of France?"
    assert told["tuned"]["answer"] == "Paris."
    assert told["tuned"]["stopped"] is True
    assert told["base"]["answer"] != "Paris."
    assert "".join(t["text"] for t in told["tuned"]["tokens"]) == "Paris.<|im_end|>"
    assert all(t["logprob"] <= 0 for t in told["tuned"]["tokens"])
    said = likely_cli("chat", run, "--prompt", "Say hi.", "--max-tokens", 1)
    assert "(cut after 1 tokens)" in said.err


def test_both_models_answer(say: Callable[..., Said]) -> None:
    said = say("Capital of France?", "/likelihood", arguments=("--compare", "--max-tokens", 4))
    assert said.code == 0
    assert re.match(r"base: .*\ntuned: Paris\.\nbase: .*nats per token.*\ntuned: ", said.out, re.DOTALL)


def test_one_object_a_line(say: Callable[..., Said]) -> None:
    said = say("Capital of France?", "Say hi.", arguments=("--json",))
    assert [json.loads(line)["prompt"] for line in said.out.splitlines()] == ["Capital of France?", "Say hi."]


def test_a_line_that_is_refused_has_its_object_too(say: Callable[..., Said], tmp_path: Path) -> None:
    """One object a line, whatever becomes of it, so that answers and questions can be put side by side."""
    lines = (
        "Say hi.",
        "/likelihood",
        "a " * 600,
        "/system Be kind.",
        "/help",
        f"/save {tmp_path}/a.csv",
        "/none",
        "Say hi.",
    )
    said = say(*lines, arguments=("--json", "--max-tokens", 4))
    told = [json.loads(line) for line in said.out.splitlines()]
    assert [one["prompt"].strip()[:8] for one in told] == ["Say hi.", "a a a a ", "Say hi."]
    assert "context holds" in told[1]["error"]
    assert "tuned" not in told[1]
    assert told[0]["tuned"]["answer"]
    assert "nats per token" in said.err


def test_what_cannot_be_talked_with(likely_cli: Likely, run: str, tiny_model_dir: Path) -> None:  # noqa: F811
    assert_refused(likely_cli("chat", "nothing", "--prompt", "Hi"), 4, "nothing")
    assert_refused(likely_cli("chat", run, "--prompt", " "), 2, "empty")
    assert_refused(likely_cli("chat", run, "--prompt", "Hi", "--temperature", -1), 2, "temperature")
    assert_refused(likely_cli("chat", tiny_model_dir, "--prompt", "Hi", "--compare"), 2, "no run folder")
    assert likely_cli("chat", run, "--prompt", "a\udcff").code == 2
    assert likely_cli("chat", run, "--prompt", "a " * 600).code == 2


def test_a_model_without_a_template(
    likely_cli: Likely,  # noqa: F811
    make_model_dir: Any,
    base_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    folder = make_model_dir(base_tokenizer)
    said = talk(str(folder), "One", "/system x", "One", "/save r.jsonl", arguments=("--max-tokens", 3))(
        likely_cli, monkeypatch
    )
    first, second = said.out.splitlines()[0], said.out.splitlines()[-1]
    assert first == second  # each line is a prompt of its own
    assert "no chat template" in said.err
    assert "(cut after 3 tokens)" in said.err
    assert "saved to r.jsonl; its last answer was cut" in said.err
    assert set(json.loads((tmp_path / "r.jsonl").read_text(encoding="utf-8"))) == {"prompt", "completion"}


def test_colours_and_symbols(run: str) -> None:
    voice = likely.chat(run=run, dtype="float32")
    reply = voice.reply("Say hi.")
    painted = likelihood_text(reply, colour=True)
    assert "\x1b[38;5;33m" in painted  # what it has learnt by heart is more than 0.9 likely
    assert re.sub(r"\x1b\[[\d;]*m", "", painted).startswith("Hi there!<|im_end|>\n")
    numbers = re.findall(r'":(\d\.\d+)', likelihood_text(reply, colour=False))
    assert [float(n) for n in numbers] == pytest.approx([math.exp(t.logprob) for t in reply.tokens], abs=1e-3)
    assert harmless("a\x1b[31m\n\tb\x07\x9b") == "a\u241b[31m\n\tb\u2407\ufffd"


# --- signals and terminals ---


def test_interrupts_are_forgiven_and_no_more() -> None:
    with stops.listening():
        with stops.forgiving() as settle:
            for _ in range(3):
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
                settle(True)
        with pytest.raises(stops.Stopped):
            signal.raise_signal(signal.SIGINT)


def test_a_second_interrupt_waits_until_the_first_was_dealt_with(monkeypatch: pytest.MonkeyPatch) -> None:
    with stops.forgiving() as settle:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # disturbs nothing
        with pytest.raises(KeyboardInterrupt):
            settle(True)
        settle(True)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            settle(False)  # it was dropped on its way
        settle(True)
        settle(False)  # nothing came
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(stops, "GRACE", 0.0)  # nobody has dealt with it: code of others may have swallowed it
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_two_interrupts_at_once_take_the_turn_back_and_end(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    voice = likely.chat(run=run, dtype="float32")
    complaints: list[str] = []

    def interrupted(_text: str) -> None:
        signal.raise_signal(signal.SIGINT)

    def complain(text: str) -> None:
        signal.raise_signal(signal.SIGINT)  # the second one, in the middle of taking back
        complaints.append(text)

    monkeypatch.setattr("sys.stdin", io.StringIO("Say hi.\nSay hi.\n"))
    with stops.listening(), pytest.raises(KeyboardInterrupt):
        converse.converse([voice], converse.Terminal(interrupted, complain, False, False), as_json=False)
    assert complaints == ["stopped; this turn is taken back"]
    assert voice.messages == []


def test_a_stopped_answer_is_taken_back(run: str) -> None:
    voice = likely.chat(run=run, dtype="float32")
    pieces = voice.stream("Say hi.")
    next(pieces)
    pieces.close()
    assert voice.messages == []
    assert voice.reply("Capital of France?").text == "Paris."


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_in_a_terminal(run: str, tmp_path: Path) -> None:
    """Editing, history, colours, Ctrl-C in an answer and at the prompt, as a person would."""
    name = f"likely-{os.getpid()}"
    socket = ["tmux", "-L", name]
    # tmux does not always tell how a command ended; a shell does. It gets each Ctrl-C too.
    code = tmp_path / "code"
    chat = f"{sys.executable} -m likely chat {run} --dtype float32 --max-tokens 2000000"
    command = f"trap : INT; {chat}; echo $? > {code}"
    environment = {**os.environ, "TERM": "xterm-256color", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    environment.pop("NO_COLOR", None)

    def tmux(*arguments: str) -> str:
        return subprocess.run(
            [*socket, *arguments], capture_output=True, text=True, check=False, env=environment
        ).stdout

    def wait_for(words: str, *, colours: bool = False, times: int = 1) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            screen = tmux("capture-pane", "-p", *(["-e"] if colours else []))
            if screen.count(words) >= times:
                return screen
            time.sleep(0.1)
        raise AssertionError(f"{words!r} is not {times} times on the screen:\n{screen}")

    try:
        tmux("new-session", "-d", "-x", "100", "-y", "40", command)
        wait_for("/help")
        tmux("send-keys", "Capital of Frances?", "Left", "BSpace", "Enter")  # the line is edited
        wait_for("Paris.")
        tmux("send-keys", "/likelihood", "Enter")
        assert "38;5;33" in wait_for("nats per token", colours=True)
        tmux("send-keys", "/reset", "Enter")
        tmux("send-keys", "Up", "Up", "Up", "Enter")  # the history
        wait_for("> Capital of France?\nParis.", times=2)
        wait_for("> Capital of France?\nParis.\n>\n")  # the next prompt, at which the next key is pressed
        time.sleep(0.5)
        tmux("send-keys", "C-c")
        deadline = time.monotonic() + 60
        while not (code.exists() and code.read_text(encoding="utf-8").endswith("\n")) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert code.read_text(encoding="utf-8") == "130\n"
    finally:
        tmux("kill-server")


def test_ctrl_c_stops_an_answer_and_a_second_ends(run: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Over a pipe, with a model that never ends by itself."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "likely", "chat", str(tiny_model_dir), "--dtype", "float32", "--temperature", "100"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        process.stdin.write("Say something long.\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        while "taken back" not in (line := process.stderr.readline()):
            assert line, "the process has ended"
        assert process.poll() is None
        time.sleep(0.5)  # a person's second one comes after the first was dealt with
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def test_prompts_are_those_of_training(run: str) -> None:
    renderer = Renderer(load_tokenizer(Path(run) / "model"))
    voice = likely.chat(run=run, dtype="float32", max_tokens=1)
    seen: list[list[int]] = []
    answer = voice.speaker.answer

    def listen(prompt: Any, choose: Any, stop_ids: Any) -> Any:
        seen.append(list(prompt))
        return answer(prompt, choose, stop_ids)

    voice.speaker.answer = listen  # type: ignore[method-assign]
    voice.reply("Say hi.")
    assert seen == [renderer.prompt_ids([Message("user", "Say hi.")])]

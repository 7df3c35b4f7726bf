"""The real commands: torchrun, and its thin front ``likely train --nproc``."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import likely
from likely import cli, launched
from likely.errors import ConfigError
from likely.training import launch
from likely.training.checkpoint import saved_steps
from several import Ended, together

LIKELY = [sys.executable, "-m", "likely"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
STEPS = 60


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONHASHSEED": "0"}


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )


def wait_for(ready: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def flags(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{i} + {i}?", "completion": f"It is {2 * i}. " * (1 + i % 5)} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = {
        "model": tiny_model_dir,
        "data": data,
        "steps": STEPS,
        "batch-size": 4,
        "save-every": 20,
        "dtype": "float32",
    }
    return ["train", *(part for key, value in given.items() for part in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def undisturbed(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = typed(2, [*flags, "--output", str(folder / "run"), "--json"], folder)
    assert [e.code for e in ended] == [0, 0], ended
    assert json.loads(ended[0].gave)["run"] == str(folder / "run")
    assert (ended[1].gave, ended[1].said) == ("", "")
    return folder / "run"


def typed(num: int, arguments: list[str], folder: Path) -> list[Ended]:
    """The command line in several processes; what they gave is what they printed."""

    def work(_: int) -> str:
        sys.argv, sys.stdout = ["likely", *arguments], io.StringIO()
        try:
            cli.main()
        except SystemExit as ended:
            if ended.code:
                raise
        return sys.stdout.getvalue()

    return together(num, work, folder / "logs")


def weights(run: Path) -> bytes:
    return (run / "model" / "adapter_model.safetensors").read_bytes()


def workers_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            variables = dict(pair.partition("=")[::2] for pair in (path / "environ").read_text().split("\0"))
        except OSError:
            continue
        if parent == process.pid and "RANK" in variables:
            found[int(variables["RANK"])] = int(path.name)
    return found


def has_done(run: Path, num: int) -> Callable[[], bool]:
    metrics = run / "metrics.jsonl"
    return lambda: metrics.exists() and metrics.read_text(encoding="utf-8").count("grad_norm") >= num


def test_a_killed_rank_under_torchrun_is_restarted_and_reaches_the_same(
    flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start([*TORCHRUN, "--nproc-per-node=2", "--max-restarts=1", "-m", "likely", *flags, "--output", str(run)])
    wait_for(has_done(run, 6), process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "error: rank 1 (pid" in err, err
    assert "going on after step" in err
    assert weights(run) == weights(undisturbed)


def test_a_killed_rank_ends_the_front_with_one_line_that_names_it(flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start([*LIKELY, *flags, "--output", str(run), "--nproc", "2"])
    wait_for(has_done(run, 5), process)
    pid = workers_of(process)[1]
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode == 5, err
    assert f"error: rank 1 (pid {pid}) was ended by SIGKILL; go on with --resume" in err
    assert "Traceback" not in err
    assert saved_steps(run / "checkpoints")


def test_a_signal_to_the_front_and_on_from_there(flags: list[str], undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*LIKELY, *flags, "--output", str(run), "--nproc", "2", "--resume", "--json"]
    process = start(command)
    wait_for(has_done(run, 3), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "is saved: go on with likely train --resume --output" in line
    assert "Traceback" not in err
    process = start(command)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["run"] == str(run)  # once
    assert weights(run) == weights(undisturbed)
    assert not [line for line in err.splitlines() if line.startswith(("W", "E", "["))]  # of the launcher


def test_a_mistake_is_told_once(flags: list[str], tmp_path: Path) -> None:
    ended = typed(2, [*flags, "--max-length", "3", "--output", str(tmp_path / "run")], tmp_path)
    assert [e.code for e in ended] == [3, 3], ended
    assert ended[0].said.count("error: ") == 1
    assert "train.jsonl:1" in ended[0].said
    assert ended[1].said == ""
    assert not (tmp_path / "run").exists()


def test_processes_that_were_not_started(flags: list[str], tmp_path: Path) -> None:
    ended = typed(2, [*flags, "--nproc", "3", "--output", str(tmp_path / "run")], tmp_path)
    assert [e.code for e in ended] == [2, 2], ended
    assert "nproc is 3, and 2 processes were started" in ended[0].said


def test_evaluate_and_score_give_what_one_process_gives(flags: list[str], tiny_model_dir: Path, tmp_path: Path) -> None:
    given = [flags[flags.index("--data") + 1], "--model", str(tiny_model_dir)]
    told, scores = [], []
    for num in (1, 3):
        folder = tmp_path / str(num)
        evaluated = typed(num, ["evaluate", *given, "--json"], folder / "evaluate")
        scored = typed(num, ["score", *given, "--output", str(folder / "scores.jsonl")], folder / "score")
        assert [e.code for e in (*evaluated, *scored)] == [0] * 2 * num, (evaluated, scored)
        told.append(evaluated[0].gave)
        scores.append((folder / "scores.jsonl").read_bytes())
        assert not list(folder.glob(".*"))
    assert json.loads(told[0])["num_examples"] == 12
    assert told[0] == told[1]
    assert scores[0] == scores[1]


def test_a_curve_is_that_of_one_process(tiny_model_dir: Path, tmp_path: Path) -> None:
    words = ["river", "stone", "garden", "paper", "silver", "market", "letter", "bridge"]
    rows = [
        {"prompt": " ".join(f"{words[(i * k) % 8]}{i * k}" for k in range(1, 9)), "completion": f"It is {8 * i}."}
        for i in range(16)
    ]
    for name, some in (("train", rows[:12]), ("held", rows[12:])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    given = {"model": tiny_model_dir, "data": tmp_path / "train.jsonl", "eval-data": tmp_path / "held.jsonl"}
    more = {"shares": "1/4,1/2,1", "seeds": 2, "steps": 3, "batch-size": 4, "dtype": "float32", "lora-rank": 2}
    flags = [part for key, value in (given | more).items() for part in (f"--{key}", str(value))]
    found = []
    for num in (1, 2):
        output = tmp_path / f"curve{num}"
        ended = typed(num, ["curve", *flags, "--output", str(output), "--json"], tmp_path / str(num))
        assert [e.code for e in ended] == [0] * num, ended
        found.append(json.loads((output / "curve.json").read_bytes()))
    for here, there in zip(*(curve["points"] for curve in found), strict=True):
        assert here["nll"] == pytest.approx(there["nll"], rel=1e-6)
        assert here["steps"] == there["steps"] == 3


@pytest.mark.parametrize("verb", ["train", "evaluate", "score", "curve"])
def test_verbs_that_several_processes_share(
    flags: list[str], tiny_model_dir: Path, tmp_path: Path, monkeypatch: Any, verb: str
) -> None:
    """Typed, ``nproc`` starts them; from Python, where nothing can be started, it is refused."""
    data, model = flags[flags.index("--data") + 1], str(tiny_model_dir)
    output = str(tmp_path / "output")
    given = {"model": model, "output": output} | ({"data": data} if verb in {"train", "curve"} else {})
    arguments = [verb, *(part for key, value in given.items() for part in (f"--{key}", value)), "--nproc", "2"]
    arguments += [] if "data" in given else [data]
    if verb == "evaluate":
        arguments = [word for word in arguments if word not in {"--output", output}]
    started: list[Any] = []
    monkeypatch.setattr(launch, "run_on_this_machine", lambda nproc, words: started.append((nproc, words)))
    monkeypatch.setattr(sys, "argv", ["likely", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code or 0, started) == (0, [(2, arguments)])
    call = getattr(likely, verb)
    given |= {"data": data} | ({"eval_share": 0.5, "steps": 1} if verb == "curve" else {})
    if verb in {"evaluate", "score"}:
        del given["output"]
    with pytest.raises(ConfigError, match="nproc is 2, and 1 processes were started"):
        list(call(**given, nproc=2))
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "no numbers"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "1 of 1 on this host"),
    ],
)
def test_an_environment_that_can_not_be(monkeypatch: Any, variables: dict[str, str], words: str) -> None:
    for key, value in ({"MASTER_ADDR": "localhost", "MASTER_PORT": "1"} | variables).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=words):
        launched.place()


def test_without_a_launcher_a_process_is_alone(monkeypatch: Any) -> None:
    monkeypatch.setenv("RANK", "3")  # of something else
    assert launched.place() == launched.Place()
    assert launched.speaks()

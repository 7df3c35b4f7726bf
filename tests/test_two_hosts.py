"""Two hosts for real: network namespaces joined by a cable, torchrun on each, and the cable pulled."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import likely
from likely.errors import ResourceError
from likely.training.checkpoint import saved_steps
from likely.training.signs import PATIENCE
from test_launch import has_done, wait_for
from test_ranks import assert_same, write_rows

TOOLS = ("ip", "unshare", "nsenter", "hostname", "mount")
STEPS, SILENCE, SLACK = 40, 3, 15  # SLACK: seconds for a machine that does other things besides
BOOT = 'hostname "$0" && mount --bind "$1" /etc/hosts && ip link set lo up && echo up && exec cat'


@dataclass(frozen=True)
class Host:
    """A machine of its own as far as its network, its name and its processes go. It lives as long as the pipe to its
    first process is open, so it ends with this test however that ends, and takes its processes and its cable along."""

    name: str
    address: str
    first: subprocess.Popen[str]
    pid: int  # of the first process, seen from outside

    def command(self, *words: object) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--all", *map(str, words)]

    def do(self, *words: object) -> None:
        subprocess.run(self.command(*words), check=True, timeout=20)

    def end(self) -> None:
        self.first.communicate(timeout=20)


def boot(name: str, address: str, hosts: Path) -> Host:
    apart = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    first = subprocess.Popen(
        [*apart, "sh", "-c", BOOT, name, hosts],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert first.stdout is not None
    if first.stdout.readline() != "up\n":
        pytest.skip(f"no hosts can be made here: {first.communicate(timeout=20)[1].strip()}")
    return Host(name, address, first, child_of(first))


def child_of(process: subprocess.Popen[str]) -> int:
    """unshare and nsenter stay outside, and have one child inside."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip(f"only root can make hosts, with {', '.join(TOOLS)}; missing: {', '.join(missing) or 'root'}")
    names = tmp_path_factory.mktemp("hosts") / "hosts"
    names.write_text("127.0.0.1 localhost\n10.0.0.1 host-a\n10.0.0.2 host-b\n", encoding="utf-8")
    with ExitStack() as running:
        made = []
        for name, address in (("host-a", "10.0.0.1"), ("host-b", "10.0.0.2")):
            made.append(boot(name, address, names))
            running.callback(made[-1].end)
        ends = [["name", "eth0", "netns", str(host.pid)] for host in made]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True, timeout=20)
        for host in made:
            host.do("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
            host.do("ip", "link", "set", "eth0", "up")
        yield made


def start(hosts: list[Host], chosen: dict[str, Any]) -> list[subprocess.Popen[str]]:
    """The command of docs/distributed.md on each host."""
    flags = [part for key, value in chosen.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].name}:29400"]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "LIKELY_SILENCE": str(SILENCE)}
    return [
        subprocess.Popen(
            host.command(*torchrun, *rendezvous, "--local-addr", host.address, "-m", "likely", "train", *flags),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        )
        for host in hosts
    ]  # fmt: skip


def is_left(rank: int, run: Path) -> bool:
    """Whether the process of a rank still lives."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in words and str(run).encode() in (path / "cmdline").read_bytes():
                return True
        except OSError:
            continue
    return False


def errors_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def chosen(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", [3, 1, 60, 2, 5, 1, 4])
    settings = {"batch_size": 3, "steps": STEPS, "dtype": "float32", "save_every": 10, "learning_rate": 1e-3}
    return {"model": str(tiny_model_dir), "data": data, "tune": "full", **settings}


def test_two_hosts_one_is_cut_off_and_both_go_on_later(
    hosts: list[Host], chosen: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = chosen | {"output": str(run), "resume": "newest"}
    stays, leaves = start(hosts, flags)
    wait_for(has_done(run, 6), stays)
    assert is_left(1, run)
    hosts[1].do("ip", "link", "set", "eth0", "down")
    began = time.monotonic()
    _, said = stays.communicate(timeout=SILENCE + PATIENCE + SLACK)
    assert stays.returncode == 1  # torchrun's own, which tells its rank's among the rest
    assert f"exitcode  : {ResourceError.exit_code} " in said
    (line,) = errors_in(said)
    assert line.startswith("error: rank 1 (pid ")
    assert line.endswith(" on host-b) gives no sign of life: its host is gone, or was cut off")
    while is_left(1, run):
        assert time.monotonic() - began < SILENCE + PATIENCE + SLACK
        time.sleep(0.1)
    # torchrun there asks the other host for some minutes more.
    os.kill(child_of(leaves), signal.SIGKILL)
    (line,) = errors_in(leaves.communicate(timeout=SLACK)[1])
    assert line.startswith("error: the launcher's store can't be reached")
    done = saved_steps(run / "checkpoints")[-1]
    assert 6 <= done < STEPS

    hosts[1].do("ip", "link", "set", "eth0", "up")
    again = start(hosts, flags)
    said = [process.communicate(timeout=120)[1] for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    assert f"going on after step {done} of {STEPS}" in said[0]
    likely.train(**chosen, output=str(tmp_path / "alone"))
    assert_same(run, tmp_path / "alone")

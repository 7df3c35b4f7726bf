"""Several processes that work together, as torchrun would start them: forked from this one, so that torch is there."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from likely import stops
from likely.errors import LikelyError
from likely.training.parallel import exit_code_of

PATIENCE = 100.0  # seconds, for a machine that does other things besides


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, what its work gave (made of what JSON knows), and what it would have printed."""

    code: int
    gave: Any
    said: str


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(
    num: int, work: Callable[[int], Any], folder: Path, environment: Mapping[str, str] | None = None
) -> list[int]:
    """Process ids of ranks 0 to ``num - 1``, each of which does ``work(rank)``; see :func:`ends`."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    sys.stdout.flush()
    sys.stderr.flush()
    pids = []
    for rank in range(num):
        pid = os.fork()
        if pid == 0:
            _child(rank, num, port, work, folder, environment or {})
        pids.append(pid)
    return pids


def _child(
    rank: int, num: int, port: int, work: Callable[[int], Any], folder: Path, environment: Mapping[str, str]
) -> None:
    code, said = 1, ""
    try:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(num),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(num),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            GLOO_SOCKET_IFNAME="lo",
            **{"LIKELY_TIMEOUT": "60", **environment},
        )
        stream = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        faulthandler.dump_traceback_later(PATIENCE - 10)
        with stops.listening():
            gave = work(rank)
        (folder / f"gave-{rank}").write_text(json.dumps(gave), encoding="utf-8")
        code = 0
    except BaseException as error:
        code = exit_code_of(error)
        if not isinstance(error, SystemExit):
            said = f"error: {error if isinstance(error, (LikelyError, stops.Stopped)) else repr(error)}\n"
    finally:
        sys.stderr.write(said)
        sys.stderr.flush()
        os._exit(code)


def ends(pids: list[int], folder: Path) -> list[Ended]:
    """How they ended; none may take longer than PATIENCE."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    try:
        while len(codes) < len(pids):
            assert time.monotonic() < deadline, "still running: " + "\n".join(
                f"rank {r}: {(folder / f'said-{r}').read_text()}" for r in range(len(pids)) if r not in codes
            )
            for rank, pid in enumerate(pids):
                if rank not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(ended[1])
            time.sleep(0.01)
    finally:
        for rank, pid in enumerate(pids):
            if rank not in codes:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    gave = [folder / f"gave-{rank}" for rank in range(len(pids))]
    return [
        Ended(
            codes[rank],
            json.loads(gave[rank].read_text(encoding="utf-8")) if gave[rank].exists() else None,
            (folder / f"said-{rank}").read_text(encoding="utf-8"),
        )
        for rank in range(len(pids))
    ]


def together(
    num: int, work: Callable[[int], Any], folder: Path, environment: Mapping[str, str] | None = None
) -> list[Ended]:
    """Start them and wait for their end."""
    return ends(start(num, work, folder, environment), folder)

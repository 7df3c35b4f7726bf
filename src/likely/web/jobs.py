"""Work in another process: a bounded queue, one job at a time, a cancel that ends the process.

The worker is a command that reads one JSON object a line and answers in lines: ``{"progress": ...}`` any number of
times, then ``{"result": ...}`` or ``{"error": ...}``. Whatever becomes of it is one sentence for the page, and the next
job starts a new one.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from likely.web.access import RefusedError

MOST_WAITING = 8
MOST_REMEMBERED = 64
MOST_CACHED = 64
MAX_LINE = 32 << 20  # bytes of one answer
MAX_KEPT = 32 << 20  # bytes of the answers of all jobs that are over, and as many of the cache
TIME_LIMIT = 600.0  # seconds
END_SECONDS = 2.0  # for a process that was killed to be gone
UNLIMITED = {"score", "check", "index"}
OVER = {"done", "failed", "cancelled"}


@dataclass
class Job:
    """One request to the worker and what became of it. ``key`` names requests with the same answer; ``finish`` makes
    the page's result of the worker's; ``run`` is the id of the run that it is about."""

    kind: str
    request: dict[str, Any]
    key: str | None = None
    run: str | None = None
    finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: str = "waiting"
    title: str = ""
    done: int = 0
    total: int | None = None
    error: str | None = None
    text: bytes = b""  # the result as JSON, which is a fraction of what it takes as objects
    began: float | None = None
    ended: float | None = None

    @property
    def result(self) -> Any:
        return json.loads(self.text) if self.text else None

    def told(self, ahead: int, memory: int | None) -> dict[str, Any]:
        """The job for the page, without its result."""
        seconds = (self.ended or time.monotonic()) - self.began if self.began else 0.0
        return {
            "id": self.id,
            "kind": self.kind,
            "run": self.run,
            "state": self.state,
            "ahead": ahead,
            "title": self.title,
            "done": self.done,
            "total": self.total,
            "seconds": seconds,
            "memory_bytes": memory,
            "error": self.error,
        }


class Lane:
    """A worker process and the jobs for it. All methods but the constructor belong to the event loop.

    Args:
        command: starts the worker.
        most_waiting: jobs that may wait.
    """

    def __init__(self, command: Sequence[str], most_waiting: int = MOST_WAITING) -> None:
        self._command, self._most_waiting = list(command), most_waiting
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._models: list[str] = []

    def submit(self, job: Job) -> Job:
        """Queue a job, or answer it at once where the same was answered before. Long work that was asked for already is
        not done twice: then it is that job.

        Raises:
            RefusedError: too many wait.
        """
        if job.kind in UNLIMITED:
            for other in self._jobs.values():
                if other.state not in OVER and (other.kind, other.request) == (job.kind, job.request):
                    return other
        if job.key is not None and job.key in self._cache:
            self._cache.move_to_end(job.key)
            job.state, job.text = "done", self._cache[job.key]
        elif len(self._waiting) >= self._most_waiting:
            raise RefusedError(429, f"{len(self._waiting)} jobs are waiting already; cancel one, or wait")
        else:
            self._waiting.append(job)
        self._jobs[job.id] = job
        self._forget()
        if self._waiting and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._work())
        return job

    def _forget(self) -> None:
        """Forget what is over, the oldest first, where it is too much."""
        over = [job for job in self._jobs.values() if job.state in OVER]
        size = sum(len(job.text) for job in over)
        for job in over[:-1]:
            if len(self._jobs) <= MOST_REMEMBERED and size <= MAX_KEPT:
                break
            size -= len(job.text)
            del self._jobs[job.id]
        while len(self._cache) > MOST_CACHED or sum(map(len, self._cache.values())) > MAX_KEPT:
            self._cache.popitem(last=False)

    def find(self, name: str) -> Job:
        """The job of an id.

        Raises:
            RefusedError: there is none.
        """
        if name not in self._jobs:
            raise RefusedError(404, "there is no such job, or no longer")
        return self._jobs[name]

    def told(self, job: Job, *, with_result: bool = True) -> dict[str, Any]:
        ahead = self._waiting.index(job) + (self._running is not None) if job in self._waiting else 0
        found = job.told(ahead, self.memory if job is self._running else None)
        return {**found, "result": job.result} if with_result else found

    def all_told(self) -> dict[str, Any]:
        return {
            "jobs": [self.told(job, with_result=False) for job in self._jobs.values()],
            "worker": {
                "alive": self._alive,
                "memory_bytes": self.memory,
                "models": self._models if self._alive else [],
            },
        }

    def cancel(self, job: Job) -> None:
        """End a job, whatever it is at."""
        if job.state in OVER:
            return
        running = job is self._running
        if job in self._waiting:
            self._waiting.remove(job)
        job.state, job.ended = "cancelled", time.monotonic()
        if running:
            self._kill()

    async def close(self) -> None:
        """End everything, and see the process gone; for the end of the server."""
        process = self._process
        for job in list(self._jobs.values()):
            self.cancel(job)
        self._kill()
        with suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                if self._task is not None:
                    await self._task
                if process is not None:
                    await process.wait()

    @property
    def _alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def memory(self) -> int | None:
        """Resident bytes of the worker, where the system says so."""
        if not self._alive or self._process is None:
            return None
        with suppress(OSError, ValueError, IndexError):
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE")
        return None

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with the processes that it started
        self._process = None

    async def _work(self) -> None:
        while self._waiting:
            job = self._running = self._waiting.pop(0)
            job.state, job.began = "running", time.monotonic()
            try:
                async with asyncio.timeout(None if job.kind in UNLIMITED else TIME_LIMIT):
                    await self._do(job)
            except TimeoutError:
                self._kill()
                self._fail(job, f"this took longer than {TIME_LIMIT / 60:.0f} minutes and was ended")
            except Exception as error:
                self._kill()
                self._fail(job, f"the worker gave no answer that can be read ({type(error).__name__})")
            finally:
                job.ended, self._running = time.monotonic(), None

    def _fail(self, job: Job, error: str) -> None:
        if job.state not in OVER:
            job.state, job.error = "failed", error

    async def _do(self, job: Job) -> None:
        process = await self._started()
        assert process.stdin is not None  # noqa: S101
        assert process.stdout is not None  # noqa: S101
        if job.state == "cancelled":
            return
        with suppress(ConnectionError):
            process.stdin.write(json.dumps({"kind": job.kind, **job.request}).encode() + b"\n")
            await process.stdin.drain()
        while line := await process.stdout.readline():
            told = json.loads(line)
            self._models = told.get("models", self._models)
            if "progress" in told:
                progress = told["progress"]
                job.title, job.done, job.total = progress["title"], progress["done"], progress["total"]
            elif "error" in told:
                self._fail(job, str(told["error"]))
                return
            else:
                self._finish(job, told["result"])
                return
        await process.wait()
        self._fail(job, _words_of(process.returncode))

    def _finish(self, job: Job, result: dict[str, Any]) -> None:
        if job.state == "cancelled":
            return
        job.text = json.dumps(job.finish(result) if job.finish else result).encode()
        job.state = "done"
        if job.key is not None:
            self._cache[job.key] = job.text
        self._forget()

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._models = []
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                limit=MAX_LINE,
                start_new_session=True,
            )
        return self._process


def _words_of(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ": the system may have had no memory for it" if name == "SIGKILL" else ""
        return f"the worker was ended by {name}{hint}; the next request starts a new one"
    return f"the worker ended with code {code}; the next request starts a new one"

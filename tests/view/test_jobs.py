"""The queue in front of the worker, with a worker of a few lines: cancel, crash, limits, cache."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from likely.web import jobs
from likely.web.access import RefusedError
from likely.web.jobs import Job, Lane

WORKER = r"""
import json, os, subprocess, sys, time
def tell(**told): print(json.dumps(told), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    do = asked["do"]
    tell(progress={"title": do, "done": 1, "total": 2})
    if do == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        tell(progress={"title": str(child.pid), "done": 0, "total": None})
        time.sleep(60)
    elif do == "die": os._exit(3)
    elif do == "killed": os.kill(os.getpid(), 9)
    elif do == "sleep": time.sleep(60)
    elif do == "noise": print("no json", flush=True)
    elif do == "fail": tell(error="this row is wrong")
    else: tell(models=["m"], result={"pid": os.getpid(), "do": do})
"""


def with_lane(work: Callable[[Lane], Awaitable[None]]) -> None:
    async def run() -> None:
        lane = Lane([sys.executable, "-c", WORKER])
        try:
            await asyncio.wait_for(work(lane), 30)
        finally:
            await lane.close()
            await asyncio.sleep(0.1)

    asyncio.run(run())


async def over(job: Job) -> Job:
    while job.state not in jobs.OVER:
        await asyncio.sleep(0.01)
    return job


async def begun(job: Job, title: str) -> None:
    while title not in job.title:
        await asyncio.sleep(0.01)


def ask(do: str, kind: str = "lens", **more: Any) -> Job:
    return Job(kind, {"do": do}, **more)


def test_one_worker_answers_in_order_and_remembers() -> None:
    async def work(lane: Lane) -> None:
        first, second = lane.submit(ask("a", key="k")), lane.submit(ask("b"))
        assert lane.told(second)["ahead"] == 1
        await over(second)
        assert first.result is not None
        assert second.result is not None
        assert first.result["pid"] == second.result["pid"]
        again = lane.submit(ask("a", key="k"))
        assert (again.state, again.result) == ("done", first.result)
        told = lane.all_told()
        assert told["worker"]["alive"] is True
        assert told["worker"]["models"] == ["m"]
        assert told["worker"]["memory_bytes"] > 1 << 20
        json.dumps(told)
        with pytest.raises(RefusedError, match="no such job"):
            lane.find("no-job")

    with_lane(work)


def test_a_cancel_ends_the_process_and_its_children() -> None:
    async def work(lane: Lane) -> None:
        job, waiting, after = (lane.submit(ask(do)) for do in ("child", "never", "a"))
        while not job.title.isdigit():
            await asyncio.sleep(0.01)
        child = int(job.title)
        lane.cancel(waiting)
        lane.cancel(job)
        assert (job.state, waiting.state) == ("cancelled", "cancelled")
        assert (await over(after)).state == "done"
        assert waiting.result is None
        for _ in range(200):
            if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
                break
            await asyncio.sleep(0.01)
        else:
            raise AssertionError("the worker's child lives")
        lane.cancel(job)  # once more changes nothing
        assert job.state == "cancelled"

    with_lane(work)


@pytest.mark.parametrize(
    ("do", "words"),
    [("die", "code 3"), ("killed", "SIGKILL"), ("noise", "no answer that can be read"), ("fail", "this row is wrong")],
)
def test_whatever_becomes_of_the_worker_the_next_job_is_done(do: str, words: str) -> None:
    async def work(lane: Lane) -> None:
        job = await over(lane.submit(ask(do)))
        assert job.state == "failed"
        assert words in str(job.error)
        assert "\n" not in str(job.error)
        assert (await over(lane.submit(ask("a")))).state == "done"

    with_lane(work)


def test_time_is_limited_but_not_for_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "TIME_LIMIT", 0.5)

    async def work(lane: Lane) -> None:
        job = await over(lane.submit(ask("sleep")))
        assert job.state == "failed"
        assert "longer than" in str(job.error)
        long = lane.submit(ask("sleep", kind="score"))
        await asyncio.sleep(1.0)
        assert long.state == "running"

    with_lane(work)


def test_the_queue_is_bounded_and_old_jobs_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MOST_REMEMBERED", 12)

    async def work(lane: Lane) -> None:
        running = lane.submit(ask("sleep"))
        await begun(running, "sleep")
        waiting = [lane.submit(ask("a")) for _ in range(jobs.MOST_WAITING)]
        with pytest.raises(RefusedError, match="waiting already") as refused:
            lane.submit(ask("a"))
        assert refused.value.status == 429
        lane.cancel(running)
        await over(waiting[-1])
        for _ in range(12):
            await over(lane.submit(ask("b")))
        assert len(lane.all_told()["jobs"]) == 12
        with pytest.raises(RefusedError):
            lane.find(running.id)

    with_lane(work)


def test_answers_are_remembered_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(lane: Lane) -> None:
        old = await over(lane.submit(ask("a" * 50, key="a")))
        monkeypatch.setattr(jobs, "MAX_KEPT", 3 * len(old.text))
        new = [await over(lane.submit(ask("b" * 50, key=str(i)))) for i in range(3)]
        assert [job["id"] for job in lane.all_told()["jobs"]] == [job.id for job in new]
        with pytest.raises(RefusedError):
            lane.find(old.id)
        assert lane.submit(ask("b" * 50, key="2")).state == "done"
        assert lane.submit(ask("a" * 50, key="a")).state == "waiting"  # and no longer in the cache
        large = await over(lane.submit(ask("c" * 500)))  # more than all may have: nothing beside it
        assert large.result["do"] == "c" * 500
        assert [job["id"] for job in lane.all_told()["jobs"]] == [large.id]

    with_lane(work)


def test_long_work_is_not_done_twice_at_once() -> None:
    async def work(lane: Lane) -> None:
        first = lane.submit(ask("sleep", kind="score", run="r"))
        assert lane.submit(ask("sleep", kind="score", run="r")) is first
        assert lane.submit(ask("sleep", kind="check", run="r")) is not first
        assert lane.told(first)["run"] == "r"
        lane.cancel(first)
        assert lane.submit(ask("sleep", kind="score", run="r")) is not first

    with_lane(work)


def test_the_end_of_the_server_ends_the_worker() -> None:
    async def work(lane: Lane) -> None:
        job = lane.submit(ask("a"))
        await over(job)
        assert job.result is not None
        lane.submit(ask("sleep"))
        await asyncio.sleep(0.1)
        await lane.close()
        for _ in range(300):
            try:
                os.kill(job.result["pid"], 0)
            except ProcessLookupError:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the worker lives")

    with_lane(work)

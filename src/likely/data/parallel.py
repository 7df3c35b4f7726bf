"""Work on the rows of a file in several processes, with the results in the file's order.

Rows are read by one process and rendered, which is nearly all of the work, by the others. No more than a few batches
are on their way at any time, so memory does not grow with the file.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import TypeVar

from likely.errors import ResourceError

Item = TypeVar("Item")
Result = TypeVar("Result")
PATIENCE = 2.0  # seconds without a result, after which the processes are looked at
BATCHES_PER_PROCESS = 3  # one at work, one waiting, one on its way back


class Workers:
    """Processes started afresh, without torch and without running the caller's script again; use it as a context.

    Args:
        num_processes: how many; the processors this process may use where None.
    """

    def __init__(self, num_processes: int | None = None) -> None:
        # Not every system can say which processors a process may use.
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.num_processes = num_processes or allowed or 1
        self._pool = ProcessPoolExecutor(
            self.num_processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            # What the workers are at is of no use any more, and a batch can take longer than a stop may.
            self._end_workers()
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def _processes(self) -> list[BaseProcess]:
        return list((getattr(self._pool, "_processes", None) or {}).values())

    def _end_workers(self) -> None:
        processes = self._processes
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        # One that ends while it writes a result leaves a part of it, whose rest the pool would wait for as long as
        # anybody could still write it, and we could.
        results = getattr(self._pool, "_result_queue", None)
        if results is not None:
            results._writer.close()

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """``work(item)`` of every item, in order; an error of one is raised in its place. ``work`` is a function of a
        module, perhaps with arguments bound by ``functools.partial``.

        Raises:
            ResourceError: a process died, as one does that the system has no memory for.
        """
        items, waiting = iter(items), deque[Future[Result]]()
        try:
            while True:
                missing = self.num_processes * BATCHES_PER_PROCESS - len(waiting)
                for item in islice(items, missing):
                    with _hidden_main():
                        waiting.append(self._pool.submit(work, item))
                if not waiting:
                    return
                yield self._result(waiting.popleft())
        except BrokenProcessPool as error:
            raise _died() from error

    def _result(self, future: Future[Result]) -> Result:
        """A result, as long as all processes live. One that dies in the middle of writing a result leaves a part of it,
        and the pool would wait for the rest."""
        while True:
            try:
                return future.result(PATIENCE)
            except TimeoutError:
                if future.done():
                    return future.result()
                if not all(process.is_alive() for process in self._processes):
                    raise _died() from None


def _died() -> ResourceError:
    return ResourceError("a worker process died or could not start", way_out="free some memory")


@contextmanager
def _hidden_main() -> Iterator[None]:
    """A process that is spawned would run the caller's script first, which has no need to expect that: what is done in
    it is a function of a module."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items, the last one perhaps shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _end_with_parent() -> None:
    """A parent that is killed can't end its workers, and they would wait for work for ever: each holds both ends of the
    queue that they share."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start() -> None:
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()
    # An interrupt is the parent's to handle; a worker would only add its traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process for each processor is enough of threads.
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", TRANSFORMERS_NO_ADVISORY_WARNINGS="1")
    # transformers imports torch wherever it is installed. Nothing here is computed with it, and it would cost every
    # worker two seconds and 300 MB, so in these processes it is as if it were not installed.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]

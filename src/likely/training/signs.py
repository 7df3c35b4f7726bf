"""Signs of life: which of several processes has died, hangs, or can't be reached.

Each process counts upwards in the launcher's store and watches one other. A closed connection says at once that
somebody has gone, and the counters say who; a host that was cut off closes nothing, and its counter stands still.
Pauses are counted in beats of the watcher's own, so that a machine that slept accuses nobody.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

BEAT = 0.5  # seconds
BEATS_TO_TELL = 6  # a process whose counter stands still for so long, when a connection was closed, is the one
PATIENCE = 10.0  # seconds for the main thread to end by itself once it is known who has gone
LOST, FAILED = "lost", "failed"
UNREACHABLE = "the launcher's store can't be reached: whoever serves it has ended, or its host is cut off"


class Store(Protocol):
    """The part of torch's key-value stores that is used. Keys are set before they are read."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes: ...


class Signs:
    """Of one rank among ``world_size``.

    Args:
        silence: seconds after which a counter that stands still means the end.
        abandon: ends this process with some words; called from another thread when the main thread does not end.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, silence: float, abandon: Callable[[str], None]
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._silence, self._abandon = silence, abandon
        self.arrived = 0  # exchanges that this rank has come to
        self.lost: str | None = None
        self.failed = False  # some rank has said so, and waits for the others to hear why
        self._passes = 0
        self._stopped = threading.Event()
        store.set(f"who/{rank}", f"rank {rank} (pid {os.getpid()} on {socket.gethostname()})")
        store.set(f"beat/{rank}", "0 0")
        self._threads = [
            threading.Thread(target=work, daemon=True, name=name)
            for name, work in (("beat", self._beat), ("guard", self._guard))
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * BEAT)

    def tell_failure(self) -> None:
        """Call the others away from an exchange that this rank will not come to."""
        with suppress(RuntimeError):
            self._store.set(FAILED, str(self._rank))

    def who_has_gone(self) -> str | None:
        """Which rank ended, stands still or is behind, now that an exchange failed; None where nothing tells."""
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        try:
            before = self._read(others)
            for _ in range(BEATS_TO_TELL):
                if self.lost is None:
                    self._stopped.wait(BEAT)
            if self.lost is None:
                now = self._read(others)
                still = [rank for rank in others if before[rank] == now[rank]]
                behind = [rank for rank in others if int(now[rank].split()[1]) < self.arrived]
                if still:
                    self._accuse(still[0], "gives no sign of life: it was killed, or can't be reached")
                elif behind:
                    self._accuse(behind[0], "hangs: the others waited for it in vain")
        except (RuntimeError, ValueError):
            self.lost = self.lost or UNREACHABLE
        return self.lost

    def _read(self, ranks: list[int]) -> dict[int, str]:
        return {rank: self._store.get(f"beat/{rank}").decode() for rank in ranks}

    def _accuse(self, rank: int, what: str) -> None:
        """The first accusation counts, since whoever hears of it ends too."""
        who = self._store.get(f"who/{rank}").decode()
        self.lost = self._store.compare_set(LOST, "", f"{who} {what}").decode()

    def _beat(self) -> None:
        watched, seen, still, failures = (self._rank + 1) % self._world_size, "", 0, 0
        while not self._stopped.wait(BEAT):
            try:
                self._store.set(f"beat/{self._rank}", f"{self._passes + 1} {self.arrived}")
                value = self._store.get(f"beat/{watched}").decode() if self._store.check([f"beat/{watched}"]) else seen
                still = still + 1 if value == seen else 0
                seen = value
                if still * BEAT > self._silence:
                    self._accuse(watched, "gives no sign of life: its host is gone, or was cut off")
                self.failed = self.failed or self._store.check([FAILED])
                if self._store.check([LOST]):
                    self.lost = self._store.get(LOST).decode()
            except RuntimeError:  # its server has gone; where it is only cut off, the guard sees that nothing passes
                failures += 1
                if failures >= BEATS_TO_TELL and self.lost is None:
                    self.lost = UNREACHABLE
                continue
            failures, self._passes = 0, self._passes + 1

    def _guard(self) -> None:
        passes, still, told = -1, 0, 0.0
        while not self._stopped.wait(BEAT):
            still = still + 1 if passes == self._passes else 0
            passes = self._passes
            if still * BEAT > self._silence and self.lost is None:
                self.lost = UNREACHABLE
            if self.lost is not None:
                told = told or time.monotonic()
                if time.monotonic() - told > PATIENCE:
                    self._abandon(self.lost)

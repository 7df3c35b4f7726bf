"""SIGINT and SIGTERM: the first asks a run to end, the second ends it at once.

The first signal raises :class:`Stopped` in the main thread, at once or at the end of a ``shield``: the few places where
weights, metrics and checkpoints would be left half-changed. A main thread that is deep in foreign code, such as one
backward pass of a minute, can't see a signal; a second thread waits ``PATIENCE`` seconds for it, then calls the
``rescue`` (save what is whole) and ends the process itself.
"""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

PATIENCE = 3.0  # seconds
GRACE = 1.0  # seconds in which a person's impatient second Ctrl-C waits for the first
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """The user or the system asked the process to end. ``exit_code`` is 130 for SIGINT and 143 for SIGTERM.

    No KeyboardInterrupt, since libraries have their own ideas about that one.
    """

    def __init__(self, signum: int, words: str = "") -> None:
        self.signum = signum
        self.exit_code = 128 + signum
        super().__init__(words or {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[signal.Signals(signum)])


class _State:
    """Of the process, since signals are."""

    listening = False
    first: int | None = None  # the signal that asked for the end
    raised = False  # whether the main thread has heard of it
    depth = 0  # of shields
    lock = threading.Lock()  # held inside a shield
    rescue: Callable[[], None] | None = None


@contextmanager
def listening(*, until_exit: bool = False) -> Iterator[None]:
    """Handle the signals inside. Outside the main thread, or inside another ``listening``, it does nothing.

    Args:
        until_exit: the process has only to take itself down afterwards, and signals no longer change how it ended.
    """
    if _State.listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = {s: signal.signal(s, _on_signal) for s in SIGNALS}
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    # A closed terminal is no reason to lose a run; its output goes nowhere from then on.
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _State.listening, _State.first, _State.raised, _State.depth = True, None, False, 0
    watcher = threading.Thread(target=_watch, args=(receiver,), daemon=True, name="signals")
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in [*before.items(), (signal.SIGHUP, hangup)]:
            signal.signal(number, signal.SIG_IGN if until_exit else handler)
        _State.listening = False
        sender.close()  # the watcher reads the end of its file
        watcher.join(1.0)
        receiver.close()


def _on_signal(signum: int, _frame: FrameType | None) -> None:
    if _State.first is not None:
        return  # the watcher ends the process
    _State.first = signum
    if _State.depth == 0:
        _raise()


def _raise() -> None:
    if _State.first is not None and not _State.raised:
        _State.raised = True
        raise Stopped(_State.first)


def check() -> None:
    """Raise :class:`Stopped` if a signal came and foreign code swallowed what it raised."""
    if _State.first is not None:
        _State.raised = True
        raise Stopped(_State.first)


def excuse() -> None:
    """Say that the main thread ends for another reason, so that a signal that came meanwhile need not end it."""
    _State.raised = _State.raised or _State.first is not None


@contextmanager
def shield() -> Iterator[None]:
    """Let signals wait until what is inside is whole. Shields nest; only the main thread's count."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.depth += 1
    if _State.depth == 1:
        _State.lock.acquire()
    try:
        yield
    finally:
        if _State.depth == 1:
            _State.lock.release()
        _State.depth -= 1
    if _State.depth == 0:
        _raise()


@contextmanager
def rescuing(rescue: Callable[[], None]) -> Iterator[None]:
    """Inside, a main thread that can't hear a signal is replaced by ``rescue``, never during a ``shield``."""
    _State.rescue = rescue
    try:
        yield
    finally:
        _State.rescue = None


@contextmanager
def forgiving() -> Iterator[Callable[[bool], None]]:
    """Inside, SIGINT is a KeyboardInterrupt and nothing more: who talks with a person stops what is being said at the
    first, and decides what the next one means.

    Yields:
        ``settle(caught)``, to be called when one was dealt with, and after whatever could have been interrupted. A
        second one that came meanwhile did not disturb that, and is raised by it; so is one that was raised and not
        ``caught``, since it came while a generator was closed or in other places where Python drops it. After ``GRACE``
        seconds without it the next one is raised at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda caught: None  # noqa: ARG005
        return
    raised_at, waiting = -math.inf, False

    def interrupt(_signum: int = signal.SIGINT, _frame: FrameType | None = None) -> None:
        nonlocal raised_at, waiting
        if time.monotonic() - raised_at < GRACE:
            waiting = True
            return
        raised_at, waiting = time.monotonic(), False
        raise KeyboardInterrupt

    def settle(caught: bool) -> None:
        nonlocal raised_at
        lost = waiting or (raised_at > -math.inf and not caught)
        raised_at = -math.inf
        if lost:
            interrupt()

    wakeup = signal.set_wakeup_fd(-1)  # the watcher counts signals
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield settle
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(wakeup)


def _watch(receiver: socket.socket) -> None:
    first = _next_signal(receiver)
    if first is None:
        return
    # A launcher passes on what this process may have heard by itself, so a second signal means nothing; and it ends
    # whoever does not obey.
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    ready, _, _ = select.select([] if launched else [receiver], [], [], PATIENCE)
    if not ready and not _State.raised:
        with _State.lock:  # the main thread may be inside a shield, and raise at its end
            if not _State.raised:
                _State.raised = True
                _end(first, _State.rescue)
    second = _next_signal(receiver)
    if second is not None and not launched:
        _end(second, None)


def _next_signal(receiver: socket.socket) -> int | None:
    while True:
        try:
            number = receiver.recv(1)
        except OSError:
            return None
        if not number:
            return None
        if number[0] in SIGNALS:
            return number[0]


def _end(signum: int, rescue: Callable[[], None] | None) -> None:
    _leave(str(Stopped(signum)), 128 + signum, rescue)


def abandon(words: str, exit_code: int, *, rescue: bool) -> None:
    """End the process from another thread than the main one, which waits for what will not come.

    Args:
        words: what to say; nothing where it is empty.
        rescue: whether the weights are whole, so that the rescue can save them.
    """
    _leave(words, exit_code, _State.rescue if rescue else None)


@contextmanager
def left_to_others() -> Iterator[None]:
    """Inside, signals are for code that brings handlers of its own."""
    wakeup = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)


def _leave(words: str, exit_code: int, rescue: Callable[[], None] | None) -> None:
    """End the process from this thread; nothing else can be trusted to run."""
    if rescue is not None:
        try:
            rescue()
        except Exception as error:
            words = f"{words}; {error}"
    with suppress(OSError, ValueError):
        if words:
            sys.stderr.write(f"error: {words}\n")
            sys.stderr.flush()
    os._exit(exit_code)

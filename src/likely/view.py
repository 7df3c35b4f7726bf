"""Wires ``likely view``: run folders and files of scores behind a local server; models in a process of their own."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from likely import storage
from likely.errors import ConfigError
from likely.insight.score_reading import is_score_file
from likely.web.access import Access
from likely.web.app import Viewer
from likely.web.jobs import Lane
from likely.web.runs import Shelf
from likely.web.serve import listen, serve

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
WORKER = [sys.executable, "-m", "likely.view_work"]
INDEXES_WAITING = 1000
POLITE = 5  # added to the nice value: a training on this machine goes first


def view(
    runs: Sequence[Path],
    scores: Sequence[Path],
    *,
    host: str,
    port: int,
    browser: bool,
    say: Callable[[str], None],
    debug: bool = False,
) -> None:
    """Serve the viewer until a signal ends it.

    Args:
        say: is told the one address that lets a browser in.

    Raises:
        ConfigError: a run or a file of scores that is not there.
        ResourceError: the port is taken.
        Stopped: by SIGTERM.
    """
    shelf = Shelf([path.absolute() for path in runs])
    for path in scores:
        if not path.is_file() or not is_score_file(path):
            raise ConfigError(
                "this is no file of scores", place=str(path), way_out="write one: likely score DATA --output FILE"
            )
    bound = listen(host, port)
    access = Access(host, bound.getsockname()[1])
    viewer = Viewer(
        shelf,
        [path.absolute() for path in scores],
        importlib.metadata.version("likely"),
        Lane(WORKER),
        Lane(WORKER, most_waiting=INDEXES_WAITING),
    )
    if host not in LOOPBACK:
        sys.stderr.write(f"warning: {host} can be reached from other machines, and nothing is encrypted on the way\n")
    page = storage.cache_folder() / "view" / f"open-{os.getpid()}.html"

    def ready() -> None:
        say(access.address)
        if browser and _has_screen():
            _open(access.address, page)

    with suppress(OSError):
        os.nice(POLITE)
    try:
        serve(viewer, access, bound, ready, debug=debug)
    finally:
        bound.close()
        page.unlink(missing_ok=True)


def _has_screen() -> bool:
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _open(address: str, page: Path) -> None:
    """By way of a file that only this user can read: the arguments of a browser can be read by everybody."""
    with suppress(OSError, webbrowser.Error):
        page.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        page.unlink(missing_ok=True)
        descriptor = os.open(page, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f'<!doctype html><meta http-equiv="refresh" content="0;url={address}">')
        webbrowser.open(page.as_uri())

"""A disk that fails, kills, or remembers: stands in for ``storage.system``."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from likely.storage import System

CALLS = ("write", "sync", "make_folder", "rename", "replace", "truncate", "remove_tree")


class Shim(System):
    """Counts the calls that change the disk, and does something else instead of the ``at``-th (1-based)."""

    def __init__(self, at: int = 0, instead: Callable[[str], None] = lambda _: None) -> None:
        self.at, self.instead, self.calls = at, instead, list[str]()
        self._lock = threading.Lock()

    def _call(self, name: str, *arguments: Any) -> Any:
        with self._lock:
            self.calls.append(name)
            chosen = len(self.calls) == self.at
        if chosen:
            self.instead(name)
        return getattr(super(), name)(*arguments)


for _name in CALLS:
    setattr(Shim, _name, lambda self, *arguments, _name=_name: self._call(_name, *arguments))


def failing(number: int) -> Callable[[str], None]:
    """An operating system that answers with an error number."""

    def fail(_: str) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def killing(_: str) -> None:
    """A process that is gone before the call."""
    os._exit(137)


class Recorder(System):
    """Does everything, and logs it so that a loss of power can be replayed: ``(operation, path, ...)``.

    Files that foreign code wrote are seen when they are synced; until then nothing of them is sure.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[tuple[Any, ...]] = []

    def _name(self, path: Path) -> str:
        return Path(path).absolute().relative_to(self.root).as_posix()

    def write(self, descriptor: int, data: bytes) -> int:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_relative_to(self.root):
            self.log.append(("write", self._name(path), data))
        return super().write(descriptor, data)

    def sync(self, descriptor: int, path: Path) -> None:
        if path.is_dir():
            self.log.append(("sync folder", self._name(path), sorted(p.name for p in path.iterdir())))
        else:
            self.log.append(("sync", self._name(path), path.read_bytes()))
        super().sync(descriptor, path)

    def make_folder(self, path: Path) -> None:
        self.log.append(("make folder", self._name(path)))
        super().make_folder(path)

    def rename(self, old: Path, new: Path) -> None:
        self.log.append(("rename", self._name(old), self._name(new)))
        super().rename(old, new)

    def replace(self, old: Path, new: Path) -> None:
        self.log.append(("rename", self._name(old), self._name(new)))
        super().replace(old, new)

    def truncate(self, path: Path, size: int) -> None:
        self.log.append(("truncate", self._name(path), size))
        super().truncate(path, size)

    def remove_tree(self, path: Path) -> None:
        self.log.append(("remove", self._name(path)))
        super().remove_tree(path)

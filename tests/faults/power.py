"""What a disk may hold after the power went, given the log of what was asked of it.

A file's bytes are sure once it was synced, and a name in a folder once the folder was. All else may be there or not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

# What else than the sure things survives: nothing; the names, with zeros for bytes; everything.
VARIANTS = ("nothing", "names", "everything")


@dataclass
class _File:
    data: bytes = b""
    sure: bytes = b""


@dataclass
class _Folder:
    names: dict[str, _File | _Folder] = field(default_factory=dict)
    sure: dict[str, _File | _Folder] = field(default_factory=dict)


def replay(log: list[tuple[Any, ...]], target: Path, survivors: str) -> None:
    """Write into ``target`` what is left after the operations of a log and a loss of power."""
    root = _Folder()
    for operation, *arguments in log:
        _apply(root, operation, arguments)
    _write(root, target, survivors)


def _parent(root: _Folder, name: str) -> tuple[_Folder, str]:
    folder = root
    *parts, last = PurePosixPath(name).parts
    for part in parts:
        child = folder.names.setdefault(part, _Folder())
        assert isinstance(child, _Folder)
        folder = child
    return folder, last


def _apply(root: _Folder, operation: str, arguments: list[Any]) -> None:
    if operation == "acknowledged":
        return
    folder, name = _parent(root, arguments[0]) if arguments[0] != "." else (root, "")
    if operation == "make folder":
        folder.names[name] = _Folder()
    elif operation == "write":
        file = folder.names.setdefault(name, _File())
        assert isinstance(file, _File)
        file.data += arguments[1]
    elif operation == "truncate":
        file = folder.names[name]
        assert isinstance(file, _File)
        file.data = file.data[: arguments[1]]
    elif operation == "sync":
        file = folder.names.setdefault(name, _File())
        assert isinstance(file, _File)
        file.data = file.sure = arguments[1]
    elif operation == "sync folder":
        synced = folder.names[name] if name else root
        assert isinstance(synced, _Folder)
        synced.sure = dict(synced.names)
    elif operation == "rename":
        other, new = _parent(root, arguments[1])
        other.names[new] = folder.names.pop(name)
    elif operation == "remove":
        folder.names.pop(name, None)


def _write(folder: _Folder, target: Path, survivors: str) -> None:
    target.mkdir(exist_ok=True)
    for name, child in (folder.sure if survivors == "nothing" else folder.names).items():
        if isinstance(child, _Folder):
            _write(child, target / name, survivors)
        else:
            whole = child.data if survivors == "everything" else child.sure
            zeros = bytes(len(child.data) - len(child.sure)) if survivors == "names" else b""
            (target / name).write_bytes(whole + zeros)

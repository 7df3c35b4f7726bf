"""A folder's MANIFEST.json: the size and SHA-256 of every file in it, and of itself.

    {"schema": 1, ..., "files": {"model/config.json": {"size": 702, "sha256": "..."}, ...}, "manifest_sha256": "..."}

The last value is the SHA-256 of the same JSON without it, so that no bit of the manifest can change unseen either.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from likely import storage
from likely.errors import ModelError

NAME = "MANIFEST.json"
SCHEMA = 1
MAX_BYTES, MAX_FILES = 10_000_000, 10_000


class Seal:
    """Syncs and hashes the files of a folder while others are still being written; then writes the manifest.

    >>> with Seal(folder) as seal:  # doctest: +SKIP
    ...     write_some(folder)
    ...     seal.settle()
    ...     write_more(folder)
    ...     seal.close({"kind": "checkpoint"})
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads = ThreadPoolExecutor(4)
        self._settled: dict[Path, tuple[Future[None], Future[str]]] = {}
        self._umask = os.umask(0o022)
        os.umask(self._umask)

    def __enter__(self) -> Seal:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def settle(self) -> None:
        """Begin with the files that are there and whole now."""
        for path in sorted(p for p in self._folder.rglob("*") if p.is_file()):
            if path not in self._settled:
                # safetensors makes files that only their owner can read.
                path.chmod(0o666 & ~self._umask)
                # Waiting for the disk and hashing both leave the interpreter, and each other, alone.
                sync = self._threads.submit(storage.sync_file, path)
                self._settled[path] = sync, self._threads.submit(storage.hash_file, path)

    def close(self, about: dict[str, Any]) -> None:
        """Write the manifest, with what else it is ``about``; everything in the folder is on the disk then.

        Raises:
            OSError: the disk refuses.
        """
        self.settle()
        files = {}
        for path, (sync, digest) in self._settled.items():
            sync.result()
            name = path.relative_to(self._folder).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": digest.result()}
        content = {"schema": SCHEMA, **about, "files": files}
        storage.create_file(self._folder / NAME, _text({**content, "manifest_sha256": _digest(content)}))
        for inner in sorted({path.parent for path in self._settled} | {self._folder}):
            storage.sync_folder(inner)


@contextmanager
def put_in_place(final: Path) -> Iterator[tuple[Path, Seal]]:
    """Prepare a folder under another name and give it its own once it is whole: fill the folder that is yielded, and
    close its seal. If anything fails, nothing is left of it.

    Raises:
        OSError: the disk refuses.
    """
    unfinished = storage.unfinished_name(final)
    try:
        storage.system.make_folder(unfinished)
        with Seal(unfinished) as seal:
            yield unfinished, seal
        storage.put_in_place(unfinished, final)
    except BaseException:
        storage.discard(unfinished)
        raise


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are all as they were written.

    Raises:
        ModelError: which file is missing, added or changed, or what is wrong with the manifest.
    """
    content = read(folder)
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()} - {NAME}
    wrong = [f"{name} is missing" for name in content["files"] if name not in found]
    wrong += [f"{name} is not in its manifest" for name in sorted(found - set(content["files"]))]
    if wrong:
        raise ModelError(wrong[0], place=str(folder))
    for name, entry in content["files"].items():
        path = folder / name
        if any(p.is_symlink() for p in (path, *path.parents[: name.count("/")])) or not path.is_file():
            raise ModelError(f"{name} is no ordinary file", place=str(folder))
        if path.stat().st_size != entry["size"]:
            raise ModelError(f"{name} has {path.stat().st_size} bytes instead of {entry['size']}", place=str(folder))
        if storage.hash_file(path) != entry["sha256"]:
            raise ModelError(f"{name} was changed: its SHA-256 is not that of the manifest", place=str(folder))
    return content


def read(folder: Path) -> dict[str, Any]:
    """The manifest itself, whole and of a schema that is known; the files are not looked at.

    Raises:
        ModelError: there is none, or it was changed.
    """
    path = folder / NAME
    try:
        if path.is_symlink() or path.stat().st_size > MAX_BYTES:
            raise ValueError("no ordinary file of a few megabytes")
        raw = path.read_bytes()
        content = json.loads(raw)
        digest = content.pop("manifest_sha256")
        if digest != _digest(content) or raw != _text({**content, "manifest_sha256": digest}):
            raise ValueError("its own SHA-256 does not fit")
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, this version reads {SCHEMA}")
        _check_entries(content["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(f"{NAME} can't be trusted: {reason}", place=str(folder)) from error
    return dict(content)


def _check_entries(files: dict[str, Any]) -> None:
    if len(files) > MAX_FILES:
        raise ValueError(f"{len(files)} files")
    for name, entry in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name:
            raise ValueError(f"the file name {name!r}")
        if set(entry) != {"size", "sha256"} or not isinstance(entry["size"], int) or entry["size"] < 0:
            raise ValueError(f"the entry of {name!r}")


def _text(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=True) + "\n").encode()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(_text(content)).hexdigest()

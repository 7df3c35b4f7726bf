"""Files that outlive a crash: written under another name, synced, renamed, and the folder synced too.

A rename is the only moment at which something new can be seen, so whoever looks finds the old state or the new one.
What a crash leaves behind is called ``.tmp-*`` or ``.trash-*`` and is swept by the next holder of the folder's lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from platformdirs import user_cache_path
from safetensors import SafetensorError

from likely.errors import LikelyError, LockedError, ResourceError, first_line

UNFINISHED, TRASH, LOCK = ".tmp-", ".trash-", ".lock"


class System:
    """The calls that change a disk, in one place, so that a test can count them and make the N-th one fail."""

    def write(self, descriptor: int, data: bytes) -> int:
        return os.write(descriptor, data)

    def sync(self, descriptor: int, path: Path) -> None:  # noqa: ARG002  (the path is for those who record the calls)
        os.fsync(descriptor)

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)

    def replace(self, old: Path, new: Path) -> None:
        old.replace(new)

    def truncate(self, path: Path, size: int) -> None:
        os.truncate(path, size)

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)


system = System()


def cache_folder() -> Path:
    """Where what can be made again is kept: ``LIKELY_CACHE``, or the platform's cache folder for this program."""
    return Path(os.environ.get("LIKELY_CACHE") or user_cache_path("likely", appauthor=False))


@contextlib.contextmanager
def disk_errors(
    place: Path,
    what: str,
    way_out: str = "free some disk or make the folder writable, then continue with --resume",
) -> Iterator[None]:
    """Turn what the disk refuses inside into one line about ``place``.

    Raises:
        ResourceError: instead of an OSError, or of the error that safetensors makes of one.
    """
    try:
        yield
    except LikelyError:
        raise
    except Exception as error:
        # tokenizers has no class of its own for it.
        if not (isinstance(error, (OSError, SafetensorError)) or "(os error " in str(error)):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ResourceError(f"{what} can't be written: {reason}", place=str(place), way_out=way_out) from error


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        system.sync(descriptor, path)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make the names in a folder last: a new or renamed file can be lost until this has returned."""
    sync_file(path)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[system.write(descriptor, bytes(view[: 1 << 20])) :]


def create_file(path: Path, data: bytes) -> None:
    """A new file, synced. It can be seen half-written, so this is for folders that are not in their place yet."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, data)
        system.sync(descriptor, path)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """The file with new content, all of it or none."""
    unfinished = unfinished_name(path)
    try:
        create_file(unfinished, data)
        system.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file. The bytes are the operating system's from then on: they outlive this process, though
    not a loss of power before the next :func:`sync_file`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, data)
    finally:
        os.close(descriptor)


def truncate(path: Path, size: int) -> None:
    """Cut a file to ``size`` bytes."""
    system.truncate(path, size)
    sync_file(path)


def unfinished_name(path: Path) -> Path:
    """A name beside ``path`` under which it can be prepared; swept if it is never renamed."""
    return path.with_name(f"{UNFINISHED}{path.name}-{secrets.token_hex(4)}")


def make_folder(path: Path, *, above: bool = False) -> None:
    """A folder that lasts, if it is not there yet; with ``above``, also those above it."""
    if path.is_dir():
        return
    if above:
        make_folder(path.parent, above=True)
    system.make_folder(path)
    sync_folder(path.parent)


def put_in_place(unfinished: Path, path: Path) -> None:
    """Rename a prepared folder to its own name; what stood there is moved aside first, never overwritten."""
    aside = None
    if path.exists():
        aside = path.with_name(f"{TRASH}{path.name}-{secrets.token_hex(4)}")
        system.rename(path, aside)
    system.rename(unfinished, path)
    sync_folder(path.parent)
    if aside:
        discard(aside)


def discard(path: Path) -> None:
    """Remove a folder: it is gone from its name at once, and what can't be removed now is swept later."""
    with contextlib.suppress(OSError):
        if not path.name.startswith((TRASH, UNFINISHED)):
            aside = path.with_name(f"{TRASH}{path.name}-{secrets.token_hex(4)}")
            system.rename(path, aside)
            path = aside
        system.remove_tree(path)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Hold a folder that is being prepared, so that :func:`sweep_beside` leaves it alone while this process lives.

    Yields:
        whether it could be had: not where another process holds it, or where a file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            claim = True
        except OSError:
            claim = False
        yield claim
    finally:
        os.close(descriptor)


def sweep_beside(path: Path) -> None:
    """Remove the folders in which a crash ended the preparation of ``path``, and no others."""
    left = re.compile(re.escape(f"{UNFINISHED}{path.name}-") + "[0-9a-f]{8}")
    for found in path.parent.iterdir() if path.parent.is_dir() else ():
        if left.fullmatch(found.name) and found.is_dir() and not found.is_symlink():
            with claimed(found) as claim:
                if claim:
                    discard(found)


def sweep(folder: Path) -> None:
    """Remove what crashes left in a folder; only for the holder of its lock."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith((UNFINISHED, TRASH)):
            if path.is_dir() and not path.is_symlink():
                discard(path)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold a folder against other processes. The lock goes with the process, however it ends.

    Yields:
        A check that the folder of this name still is the one that was locked; it raises a ResourceError if not.

    Raises:
        LockedError: another process holds it.
        ResourceError: the folder can't be written to, or its file system has no locks.
    """
    path = (folder / LOCK).absolute()
    with disk_errors(path, "the lock"):
        descriptor = _take(path)

    def require() -> None:
        if not _is_at(descriptor, path):
            raise ResourceError(
                "the run folder was moved, removed or replaced while the run worked in it",
                place=str(folder),
                way_out="bring it back, then continue with --resume",
            )

    try:
        yield require
    finally:
        if _is_at(descriptor, path):
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _take(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file between our open and our lock.
            if _is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise LockedError(
                f"another process (pid {holder}) is working in this run folder",
                place=str(path.parent),
                way_out="wait for it, or name another --output",
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)

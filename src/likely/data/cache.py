"""What reading and rendering gave, kept for the next start: arrays that are mapped into memory, and JSON.

An entry is a folder named by the SHA-256 of everything that decides its content: the bytes of the data, the tokenizer,
the template, the options, and the code that reads and renders. So there is nothing to be out of date, and an entry is
never changed. It has a manifest of its files' hashes, and one that does not agree with it is made again. What can't be
kept costs the keeping and nothing else.

Names of files are not part of it: the same data at another place is the same data.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from likely import manifest, storage
from likely.data.dataset import Dataset, File, OnDemand, Track, load_dataset
from likely.data.formats import ReadOptions, Rejected
from likely.data.lengths import OnTooLong
from likely.data.mixture import Part, parse_parts
from likely.data.render import Renderer
from likely.errors import ModelError
from likely.types import Conversation, Example, Message, Source, TokenRow

SCHEMA = 1
MIN_BYTES = 1 << 20  # of data files; less is rendered in a second or two
MAX_BYTES = 20 * 10**9  # of all entries together
LEFT_BEHIND_SECONDS = 86_400  # what a crash left unfinished is removed after a day
BATCH = 4096
BYTES_PER_TOKEN = 6  # id, weight and role, as they are kept
FACTS, ROWS = "facts.json", "rows.jsonl"


def load_kept(
    path: str,
    renderer: Renderer,
    max_length: int,
    track: Track | None = None,
    options: ReadOptions | None = None,
    on_too_long: OnTooLong = "error",
    *,
    keep_unweighted: bool = False,
) -> Dataset:
    """:func:`likely.data.dataset.load_dataset`, from the cache where the same was loaded before.

    Raises:
        DataError, ConfigError: as there.
    """

    def load() -> Dataset:
        return load_dataset(path, renderer, max_length, track, options, on_too_long, keep_unweighted=keep_unweighted)

    parts = parse_parts(path)
    hashes = _hashes(parts)
    if hashes is None:
        return load()
    asked = {
        "renderer": renderer.identity(),
        "options": _of_options(options or ReadOptions(), parts),
        "lengths": [max_length, on_too_long, keep_unweighted],
    }
    kept = _open(_root() / _key(asked, hashes), path, parts)
    if kept is not None:
        return kept
    dataset = load()
    # The files may have changed since, so the name is made of the hashes of what was read.
    return _kept(dataset, _root() / _key(asked, [file.sha256 for file in dataset.files]), parts)


def _hashes(parts: Sequence[Part]) -> list[str] | None:
    """SHA-256 of each file; None where keeping does not pay, or some part is no file that can be read."""
    try:
        if not all(os.path.isfile(part.path) for part in parts) or _size(parts) < MIN_BYTES:  # noqa: PTH113
            return None
        return [storage.hash_file(Path(part.path)) for part in parts]
    except (OSError, ValueError):
        return None  # whoever reads the file says what is wrong with it


def _kept(dataset: Dataset, folder: Path, parts: Sequence[Part]) -> Dataset:
    """The dataset, out of the cache again if it could be put there: then memory need not hold it."""
    try:
        _store(folder, dataset, _size(parts))
        _forget(folder)
        return _open(folder, dataset.path, parts) or dataset
    except (OSError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        told = f"the tokens are not kept for the next start: {reason} ({folder.parent})"
        return replace(dataset, told_of_rows=(*dataset.told_of_rows, told))


def _root() -> Path:
    return storage.cache_folder() / "data"


def _size(parts: Sequence[Part]) -> int:
    return sum(Path(part.path).stat().st_size for part in parts)


def _of_options(options: ReadOptions, parts: Sequence[Part]) -> list[Any]:
    paths = [part.path for part in parts]
    return [
        options.format,
        sorted(options.columns.items()),
        options.skip_bad_rows,
        options.seed,
        # Of a file's name only its ending says how to read it; and which files are one and the same.
        [[part.share, Path(part.path).suffixes[-2:], paths.index(part.path)] for part in parts],
    ]


def _key(asked: dict[str, Any], hashes: Sequence[str]) -> str:
    content = {"schema": SCHEMA, "made_by": _made_by(), "data": list(hashes), **asked}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()


@cache
def _made_by() -> list[str]:
    """Everything of ours and of others that reads and renders."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    packages = ("likely", "transformers", "tokenizers", "jinja2", "pyarrow", "numpy")
    versions = [importlib.metadata.version(name) for name in packages]
    return [digest.hexdigest(), platform.python_version(), *versions]


# --- writing ---


def _store(folder: Path, dataset: Dataset, data_bytes: int) -> None:
    """Prepare the entry aside and rename it. Another process may have been faster; then its entry stays.

    Raises:
        OSError: the disk refuses, or has not enough room.
        TypeError, ValueError: a row holds what JSON can't.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = BYTES_PER_TOKEN * sum(len(e.token_ids_T) for e in dataset.examples) + 2 * data_bytes
    if 4 * needed > shutil.disk_usage(folder.parent).free:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are more than a quarter of the free disk")
    unfinished = storage.unfinished_name(folder)
    try:
        storage.system.make_folder(unfinished)
        unfinished.chmod(0o700)  # the data themselves may be for their owner's eyes only
        with manifest.Seal(unfinished) as seal:
            _write(unfinished, dataset)
            seal.close({"kind": "data", "key": folder.name})
        try:
            storage.system.rename(unfinished, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        storage.discard(unfinished)


def _write(folder: Path, dataset: Dataset) -> None:
    paths = [file.path for file in dataset.files]
    examples, rows = dataset.examples, dataset.conversations
    found: set[float] = set()
    for example in examples:
        found.update(example.weights_T.tolist())
    values = np.array(sorted(found), np.float64)
    code = np.min_scalar_type(len(values) - 1)
    _write_array(folder / "weight_values.npy", [values])
    _write_array(folder / "token_ids.npy", (e.token_ids_T.astype(np.int32) for e in examples))
    _write_array(folder / "weight_codes.npy", (np.searchsorted(values, e.weights_T).astype(code) for e in examples))
    _write_array(folder / "roles.npy", (e.role_T for e in examples))
    _write_array(folder / "example_ends.npy", [np.cumsum([len(e.token_ids_T) for e in examples])])
    _write_array(folder / "example_rows.npy", [np.array(dataset.row_N, np.int64)])
    _write_array(folder / "row_files.npy", [np.array([paths.index(c.source.file) for c in rows], np.int32)])
    _write_array(folder / "row_lines.npy", [np.array([c.source.line for c in rows], np.int64)])
    ends = []
    with (folder / ROWS).open("wb") as file:
        for conversation in rows:
            file.write(_to_json(conversation))
            ends.append(file.tell())
    _write_array(folder / "row_ends.npy", [np.array(ends, np.int64)])
    facts = {
        "files": [[file.sha256, file.rows] for file in dataset.files],
        "num_unweighted": dataset.num_unweighted,
        "told_of_files": dataset.told_of_files,
        "told_of_rows": dataset.told_of_rows,
        "rejected": [[paths.index(r.file), r.line, r.reason] for r in dataset.rejected],
    }
    storage.create_file(folder / FACTS, json.dumps(facts).encode())


def _write_array(path: Path, pieces: Iterable[npt.NDArray[Any]]) -> None:
    """One ``.npy`` of the pieces, never all of it in memory. Not through a mapping: a full disk would kill us there."""
    length, dtype = 0, np.dtype(np.int64)
    with path.open("wb") as file:
        _write_header(file, 0, dtype)
        for piece in pieces:
            dtype = piece.dtype
            length += len(piece)
            file.write(np.ascontiguousarray(piece).data)
        file.seek(0)
        _write_header(file, length, dtype)


def _write_header(file: Any, length: int, dtype: np.dtype[Any]) -> None:
    """128 bytes, whatever the length."""
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, about)
    assert file.tell() == 128  # noqa: S101  (the format pads to 64; a length of 20 digits fits)


def _to_json(conversation: Conversation) -> bytes:
    """One line, from which :func:`_from_json` makes the same conversation but for its source.

    Raises:
        TypeError, ValueError: JSON can't hold it.
    """
    tokens = conversation.tokens
    line = json.dumps(
        [
            [[m.role, m.content, m.weight, m.fields] for m in conversation.messages],
            conversation.tools,
            conversation.plain,
            tokens and [tokens.ids, [int(s) for s in tokens.supervised]],
        ]
    ).encode()
    if repr(_from_json(line, conversation.source)) != repr(conversation):
        raise ValueError(f"{conversation.source} holds what JSON can't")
    return line + b"\n"


# --- reading ---


def _from_json(line: bytes, source: Source) -> Conversation:
    messages, tools, plain, tokens = json.loads(line)
    row = TokenRow(tuple(tokens[0]), tuple(map(bool, tokens[1]))) if tokens else None
    return Conversation(tuple(Message(*m) for m in messages), source, tuple(tools), plain, row)


def _open(folder: Path, path: str, parts: Sequence[Part]) -> Dataset | None:
    """The dataset of an entry, under the names that its files have now; None where there is none that is whole."""
    if not folder.is_dir():
        return None
    try:
        if manifest.verify(folder).get("key") != folder.name:
            raise ModelError("it is under another name", place=str(folder))
        with contextlib.suppress(OSError):
            os.utime(folder)  # it was of use today
        return _mapped(folder, path, [part.path for part in parts])
    except (ModelError, OSError):
        storage.discard(folder)
        return None


def _mapped(folder: Path, path: str, paths: Sequence[str]) -> Dataset:
    def array(name: str) -> Any:
        # A plain array over the mapping; it would not read objects, which can run code.
        return np.asarray(np.lib.format.open_memmap(folder / f"{name}.npy", mode="r"))

    facts = json.loads((folder / FACTS).read_bytes())
    ids, codes, roles = array("token_ids"), array("weight_codes"), array("roles")
    values, end_N, row_N = array("weight_values"), array("example_ends"), array("example_rows")
    row_files, row_lines, row_ends = array("row_files"), array("row_lines"), array("row_ends")
    text = np.asarray(np.memmap(folder / ROWS, np.uint8, "r"))

    def source_of(row: int) -> Source:
        return Source(paths[row_files[row]], int(row_lines[row]))

    def conversation(row: int) -> Conversation:
        start = row_ends[row - 1] if row else 0
        return _from_json(text[start : row_ends[row]].tobytes(), source_of(row))

    def example(i: int) -> Example:
        span = slice(end_N[i - 1] if i else 0, end_N[i])
        return Example(ids[span].astype(np.int64), values[codes[span]], roles[span].copy(), source_of(row_N[i]))

    files = [File(name, *fact) for name, fact in zip(paths, facts["files"], strict=True)]
    return Dataset(
        path,
        tuple(files),
        OnDemand(len(row_ends), conversation),
        OnDemand(len(end_N), example),
        tuple(row_N.tolist()),
        facts["num_unweighted"],
        tuple(map(tuple, facts["told_of_files"])),
        tuple(facts["told_of_rows"]),
        tuple(Rejected(paths[i], line, reason) for i, line, reason in facts["rejected"]),
    )


# --- forgetting ---


def _forget(own: Path) -> None:
    """Remove the entries that were not used for longest until all fit within MAX_BYTES, and what crashes left."""
    entries = []
    for folder in own.parent.iterdir():
        with contextlib.suppress(OSError):  # another process may be doing the same
            used = folder.stat().st_mtime
            if folder.name.startswith((storage.UNFINISHED, storage.TRASH)):
                if time.time() - used > LEFT_BEHIND_SECONDS:
                    storage.discard(folder)
            elif folder.is_dir() and not folder.is_symlink():
                entries.append((folder == own, used, folder, sum(f.stat().st_size for f in folder.iterdir())))
    total = 0
    for is_own, _, folder, size in sorted(entries, reverse=True):
        total += size
        if total > MAX_BYTES and not is_own:
            storage.discard(folder)

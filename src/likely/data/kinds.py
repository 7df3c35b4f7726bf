"""What a file is, by its first bytes: packed, of a kind that holds no rows for us, or text in another encoding."""

from __future__ import annotations

HEAD = 512  # first bytes that are enough to tell
GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # behind a byte from 0x50 to 0x5f; pzstd begins its files with such a frame
USABLE = "give JSONL, a JSON array, CSV or Parquet"
_CONVERT = f"unpack or convert it: {USABLE}"
_FETCH = "a page in place of the data: look at it, and fetch the file itself"
_OTHERS = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "a zip archive",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\x00": "an xz file",
    b"\x04\x22\x4d\x18": "an lz4 file",
    b"\x1f\x9d": "a file of Unix compress",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF model",
    b"SQLite format 3": "a SQLite database",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}
_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def packing(head: bytes) -> str | None:
    """``gzip``, ``zstd`` or nothing."""
    if head.startswith(GZIP):
        return "gzip"
    skippable = head[1:4] == ZSTD_SKIPPABLE and 0x50 <= head[0] <= 0x5F
    return "zstd" if head.startswith(ZSTD) or skippable else None


def other_kind(head: bytes) -> tuple[str, str] | None:
    """What a file is that holds no rows which can be read, and the way out."""
    kind = next((name for magic, name in _OTHERS.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        kind = "a tar archive"
    if kind is not None:
        return kind, _CONVERT
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself", "fetch the file with git lfs pull"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "HTML or XML", _FETCH
    return None


def wide_encoding(head: bytes) -> str | None:
    """``UTF-16`` or ``UTF-32`` where the file begins with their mark, or with ASCII letters written in them."""
    marked = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if marked is not None:
        return marked
    start = head[:16]
    for name, width in (("UTF-32", 4), ("UTF-16", 2)):
        for letter in (0, width - 1):
            letters = start[letter::width]
            zeros = bytes(b for i, b in enumerate(start) if i % width != letter)
            if len(start) >= width and not any(zeros) and all(0x20 <= b < 0x7F or b in b"\t\r\n" for b in letters):
                return name
    return None

"""GGUF files in several parts, as ``llama-gguf-split`` writes them, read as one."""

from __future__ import annotations

import re
from collections.abc import Callable
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf import GGUFReader

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_FIELDS = 64 << 20  # bytes that the fields of a file take at most
SPLIT = "split."  # fields that only a part of a file has


def part_name(stem: str, number: int, count: int) -> str:
    """The name of a part, which counts from 1.

    >>> part_name("model", 2, 3)
    'model-00002-of-00003.gguf'
    """
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def gguf_parts(path: Path, read: Callable[[Path], GGUFReader] | None = None) -> tuple[Path, ...]:
    """All files that a GGUF file consists of, in order, from any of them.

    Args:
        path: A file; one that is whole is its only part.
        read: Opens one; by default the reader of the gguf package.

    Raises:
        ValueError: If it is damaged, a part is missing, or its name does not say which it is.
    """
    count = _split_count(_open(path, read)) if _may_be_part(path) else 1
    if count <= 1:
        return (path,)
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise ValueError(
            f"{path} is one of {count} parts (split.count), but its name does not say which. Name "
            f"the parts as llama-gguf-split does: {part_name('model', 1, count)}."
        )
    parts = tuple(path.with_name(part_name(match["stem"], i + 1, count)) for i in range(count))
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ValueError(
            f"{path} is one of {count} parts, of which {missing[0]} is missing"
            f"{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}. Put all of them into "
            f"{path.parent}."
        )
    return parts


def open_gguf(path: Path, read: Callable[[Path], GGUFReader] | None = None) -> GGUFReader:
    """A reader of a file, or of all parts of one: fields of the first, tensors of all.

    Args:
        path: The file, or any part of it.
        read: Opens one; by default the reader of the gguf package.

    Raises:
        ValueError: If a part is damaged, missing or of another file.
    """
    first, *others = gguf_parts(path, read)
    reader = _open(first, read)
    found = {tensor.name for tensor in reader.tensors}
    for number, part in enumerate(others, 1):
        more = _open(part, read)
        where, count = _field(more, "split.no"), _split_count(more)
        twice = next((t.name for t in more.tensors if t.name in found), None)
        if where not in (None, number) or count != len(others) + 1 or twice:
            raise ValueError(
                f"{part} is not part {number + 1} of the file that {first.name} begins"
                f"{f': it has {twice} again' if twice else ''}. Copy the parts again."
            )
        reader.tensors += more.tensors
        found |= {tensor.name for tensor in more.tensors}
    total = _field(reader, "split.tensors.count")
    if others and total is not None and total != len(reader.tensors):
        raise ValueError(
            f"The {len(others) + 1} parts of {first} hold {len(reader.tensors):,} tensors, but "
            f"there should be {total:,}. Copy the parts again."
        )
    return reader


def _may_be_part(path: Path) -> bool:
    """Whether the beginning of a file has the word; parsing all of its fields takes seconds."""
    if not path.is_file() or path.stat().st_size == 0:
        return True  # whoever opens it says what is wrong
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return content.find(b"split.count", 0, _FIELDS) >= 0


def _open(path: Path, read: Callable[[Path], GGUFReader] | None = None) -> GGUFReader:
    import gguf

    try:
        return (read or gguf.GGUFReader)(path)
    except Exception as error:
        raise ValueError(f"{path} is no GGUF file, or damaged ({error}).") from error


def _split_count(reader: GGUFReader) -> int:
    return _field(reader, "split.count") or 1


def _field(reader: GGUFReader, key: str) -> int | None:
    field = reader.get_field(key)
    return None if field is None else int(field.contents())

"""Files with text: plain in a known encoding, or records of a data set with a field of text."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import importlib.util
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .dialogues import messages_as_text

Record = Mapping[str, Any]

_MARKS = (  # byte order marks, longer ones first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_COMPRESSED: tuple[tuple[bytes, Callable[[Path], io.BufferedIOBase]], ...] = (
    (b"\x1f\x8b", gzip.GzipFile),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
)
LIMIT = 2**30  # bytes that a compressed file may hold
_KNOWN = {  # what else begins so, and what to do with it
    b"(\xb5/\xfd": "is compressed with zstd. Decompress it first (zstd -d)",
    b"PK\x03\x04": "is a zip archive. Unpack it first",
    b"%PDF": "is a PDF. Extract its text first (pdftotext)",
    b"ARROW1": "is an Arrow file. Convert it to Parquet or JSON lines",
}
_PARQUET = b"PAR1"
_CHATS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
_TEXTS = ("text", "content", "document", "body", "article", "passage", "code", "raw_content")
_PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_HEAD = 65_536
_CONTROL = frozenset(range(32)) - {*b"\t\n\r\f\b\v\x1b"}


def split_field(source: str) -> tuple[Path, str | None]:
    """A file and the field of its records that is named after a ``#``.

    >>> split_field("no such.jsonl#body")
    (PosixPath('no such.jsonl#body'), None)
    """
    path, mark, field = source.rpartition("#")
    named = mark and not set(field) & set(",:")  # what parts texts and weights in a mixture
    if named and not Path(source).is_file() and Path(path).is_file():
        return Path(path), field
    return Path(source), None


def is_text_file(source: str) -> bool:
    """Whether a file is there, or one with a field named after a ``#``."""
    return split_field(source)[0].is_file()


def check_text_file(source: str) -> None:
    """Look at the beginning of a file.

    Raises:
        ValueError: If it can be no text, or takes a package that is not installed.
    """
    path, _ = split_field(source)
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if (decompress := _decompressor(head)) is not None:
        head = _decompressed(path, decompress, _HEAD)
    _refuse_binary(path, head)
    if head.startswith(_PARQUET):
        _need_pyarrow(path)
    else:
        _decoded(path, head, final=False)


def read_text_file(source: str, tokenizer: Any = None) -> str:
    """The text of a file.

    JSON, JSON lines, CSV and Parquet are records: the field named after a ``#``
    (``data.jsonl#body``), or the one found by its name or as the only one of text. Messages go
    through the model's chat template. Compressed files are decompressed.

    Args:
        source: The file.
        tokenizer: Its chat template writes messages down.

    Raises:
        ValueError: If it is no text in a known encoding, or has no such field.
    """
    path, field = split_field(source)
    data, name = path.read_bytes(), path.name.lower()
    if (decompress := _decompressor(data)) is not None:
        data = _decompressed(path, decompress, LIMIT + 1)
        if len(data) > LIMIT:
            raise ValueError(
                f"{path} holds more than {LIMIT:,} bytes of text. Give a smaller part."
            )
        name = name.rpartition(".")[0] if name.endswith((".gz", ".bz2", ".xz")) else name
    _refuse_binary(path, data)
    if data.startswith(_PARQUET):
        return _joined(path, _parquet(path, data), field, tokenizer)
    text = _decoded(path, data)
    records = _records(path, name, text)
    if records is None:
        if field is not None:
            raise ValueError(
                f"{path} is plain text, which has no field {field!r}. Leave out '#{field}'."
            )
        return text
    return _joined(path, records, field, tokenizer)


def _decompressor(data: bytes) -> Callable[[Path], io.BufferedIOBase] | None:
    return next((opened for magic, opened in _COMPRESSED if data.startswith(magic)), None)


def _decompressed(path: Path, decompress: Callable[[Path], io.BufferedIOBase], count: int) -> bytes:
    """The first bytes of what a compressed file holds."""
    try:
        with decompress(path) as file:
            return file.read(count)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}. Copy it again.") from error


def _decoded(path: Path, data: bytes, final: bool = True) -> str:
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        text = decoder.decode(data, final)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in {encoding.upper().removesuffix('-SIG')}: byte "
            f"{error.object[error.start]:#04x} at position {error.start:,}. "
            "Convert it first (iconv -f ENCODING -t UTF-8)."
        ) from error
    binary = next((i for i, c in enumerate(text[:_HEAD]) if ord(c) in _CONTROL), None)
    if binary is not None or "\0" in text:
        raise ValueError(
            f"{path} is no text: it has control character {ord(text[binary or 0]):#04x} at "
            f"position {binary or text.index(chr(0)):,}. Give a text file."
        )
    return text


def _refuse_binary(path: Path, data: bytes) -> None:
    for magic, what in _KNOWN.items():
        if data.startswith(magic):
            raise ValueError(f"{path} {what}.")


def _records(path: Path, name: str, text: str) -> list[Record] | None:
    """The records of a file; None if it is plain text."""
    if name.endswith((".csv", ".tsv")):
        csv.field_size_limit(2**31 - 1)
        between = "\t" if name.endswith(".tsv") else ","
        rows = csv.DictReader(io.StringIO(text), delimiter=between)
        return [{str(key): value for key, value in row.items()} for row in rows]
    first = text.lstrip()[:1]
    named = name.endswith((".jsonl", ".ndjson", ".json"))
    if not named and not (first == "{" and _is_record(text.lstrip().partition("\n")[0])):
        return None
    if not name.endswith((".jsonl", ".ndjson")):
        try:
            return _rows(path, json.loads(text))
        except json.JSONDecodeError:
            pass  # several values: JSON lines
    return list(_lines(path, text))


def _is_record(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number:,} is no JSON: {error}.") from error
        yield record if isinstance(record, dict) else {"text": record}


def _rows(path: Path, content: Any) -> list[Record]:
    """The records in one JSON value: a list, the only list in an object, or the object."""
    if isinstance(content, dict):
        lists = [
            v
            for v in content.values()
            if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)
        ]
        if len(lists) == 1 and not set(content) & {*_CHATS}:
            return _rows(path, lists[0])
        return [content]
    if isinstance(content, list):
        return [row if isinstance(row, dict) else {"text": row} for row in content]
    return [{"text": content}]


def _need_pyarrow(path: Path) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path} is Parquet, which takes pyarrow: pip install pyarrow.")


def _parquet(path: Path, data: bytes) -> list[Record]:
    _need_pyarrow(path)
    from pyarrow import parquet

    try:
        rows: list[Record] = parquet.read_table(io.BytesIO(data)).to_pylist()
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}). Copy it again.") from error
    return rows


def _joined(path: Path, records: Sequence[Record], field: str | None, tokenizer: Any) -> str:
    """The text of all records; halves of letters, which JSON can hold, are replaced."""
    text = _together(path, records, field, tokenizer)
    if re.search("[\ud800-\udfff]", text) is None:
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _together(path: Path, records: Sequence[Record], field: str | None, tokenizer: Any) -> str:
    if not records:
        raise ValueError(f"{path} has no records. Give a file with text.")
    fields = _fields(path, records, field)
    if len(fields) > 1:
        pairs = (_pair(record, fields) for record in records)
        return messages_as_text([pair for pair in pairs if pair is not None], tokenizer)
    values = [value for record in records if (value := record.get(fields[0])) not in (None, "", [])]
    if all(isinstance(value, str) for value in values):
        return "\n\n".join(values)
    chats = (_messages(path, fields[0], value) for value in values)
    return messages_as_text(chats, tokenizer)


def _fields(path: Path, records: Sequence[Record], field: str | None) -> tuple[str, ...]:
    """The field of text or messages, or several that make up a question and its answer.

    Raises:
        ValueError: If it is not there, or cannot be told which it is; all fields are named.
    """
    names = list(dict.fromkeys(name for record in records[:100] for name in record))
    listed = ", ".join(map(repr, names)) or "none"
    if field is not None:
        if field not in names:
            raise ValueError(f"{path} has no field {field!r}. Its fields are {listed}.")
        return (field,)
    filled = [n for n in names if any(record.get(n) for record in records[:100])]
    for name in (*_CHATS, *_TEXTS):
        if name in filled:
            return (name,)
    for pair in _PAIRS:
        if {pair[0], pair[-1]} <= set(filled):
            return pair
    texts = [n for n in filled if all(isinstance(r.get(n) or "", str) for r in records[:100])]
    if len(texts) != 1:
        raise ValueError(
            f"{path} is records with the fields {listed}, and which of them is the text cannot be "
            f"told. Name it: {path}#FIELD."
        )
    return (texts[0],)


def _pair(record: Record, fields: Sequence[str]) -> list[dict[str, str]] | None:
    *asked, answer = (str(record.get(name) or "") for name in fields)
    question = "\n\n".join(filter(None, asked))
    if not question or not answer:
        return None
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _messages(path: Path, field: str, value: Any) -> list[dict[str, str]]:
    """Messages with a role and a content each, whatever they are called in the record."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    found = []
    for entry in value if isinstance(value, list) else (None,):
        if isinstance(entry, dict):
            role = entry.get("role") or entry.get("from")
            content = entry.get("content", entry.get("value"))
            if isinstance(content, list):
                content = "".join(
                    str(part.get("text") or "") for part in content if isinstance(part, dict)
                )
            if role and isinstance(content, str):
                found.append({"role": _ROLES.get(str(role), str(role)), "content": content})
                continue
        raise ValueError(
            f"{path}: the field {field!r} holds neither text nor messages with role and content. "
            f"Name another one: {path}#FIELD."
        )
    return found

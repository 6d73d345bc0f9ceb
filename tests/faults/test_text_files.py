"""Data sets are read as data, and what is no text is refused in one line."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from bitplan.models import text_files
from bitplan.models.mixture import parse_shares
from bitplan.models.text_files import check_text_file, read_text_file, split_field
from bitplan.models.texts import check_text, read_text

TEXTS = ["First text, with “quotes”.\nTwo lines.", "Second: 東京."]
JOINED = "\n\n".join(TEXTS)
CHAT = [{"role": "user", "content": "Hi \\n é"}, {"role": "assistant", "content": "Hello"}]
PLAIN = "User: Hi \\n é\n\nAssistant: Hello"


class Templated:
    """A tokenizer with a chat template that knows two roles."""

    chat_template = "some"
    bos_token, bos_token_id = "<s>", None

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        if any(message["role"] == "system" for message in messages):
            raise ValueError("no system role")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(*({"id": i, "text": t} for i, t in enumerate(TEXTS)))),
        ("b.ndjson", lines(*({"source": "x", "content": t, "n": 1} for t in TEXTS)) + "\n\n"),
        ("c.jsonl", lines(*({"id": 3, "abstract": t} for t in TEXTS))),
        ("d.json", json.dumps([{"text": t} for t in TEXTS])),
        ("e.json", json.dumps({"version": 1, "data": [{"body": t} for t in TEXTS]})),
        ("f.json", json.dumps(TEXTS)),
        ("g.csv", 'id,text\n1,"' + TEXTS[0] + '"\n2,"' + TEXTS[1] + '"\n'),
        ("h.tsv", 'text\tid\n"' + TEXTS[0] + '"\t1\n"' + TEXTS[1] + '"\t2\n'),
        ("i.txt", lines(*({"text": t, "meta": {"lang": "日本語"}} for t in TEXTS))),
        ("j.jsonl", lines(*TEXTS)),
    ],
)
def test_records_give_their_text(name: str, content: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    check_text(str(file), "calibration")
    assert read_text(str(file), "calibration") == JOINED


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.jsonl"])
def test_compressed_files_are_decompressed(pack: Any, name: str, tmp_path: Path) -> None:
    text = JOINED if "txt" in name else lines(*({"text": t} for t in TEXTS))
    (tmp_path / name).write_bytes(pack(text.encode()))
    check_text(str(tmp_path / name), "evaluation")
    assert read_text_file(str(tmp_path / name)) == JOINED


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT, "id": 17, "meta": {"lang": "日本語"}},
        {
            "conversations": [
                {"from": "human", "value": CHAT[0]["content"]},
                {"from": "gpt", "value": "Hello"},
            ]
        },
        {"id": 1, "prompt": CHAT[0]["content"], "response": "Hello"},
        {"instruction": CHAT[0]["content"], "input": "", "output": "Hello"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]},
                CHAT[1],
            ]
        },
    ],
)
def test_messages_go_through_the_template(record: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(lines(record, record))
    assert read_text_file(str(file)) == f"{PLAIN}\n\n{PLAIN}"
    turn = "<user>Hi \\n é<assistant>Hello"
    assert read_text_file(str(file), Templated()) == f"{turn}\n{turn}"


def test_a_role_that_the_template_refuses_becomes_plain_lines(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    system = [{"role": "system", "content": "Be."}, *CHAT]
    file.write_text(lines({"messages": system}, {"messages": CHAT}))
    text = read_text_file(str(file), Templated())
    assert text == f"System: Be.\n\n{PLAIN}\n<user>Hi \\n é<assistant>Hello"


def test_a_field_can_be_named(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(lines(*({"text": "no", "summary": t, "other": "o"} for t in TEXTS)))
    assert read_text_file(f"{file}#summary") == JOINED
    (share, other) = parse_shares(f"{file}#summary:3,code:1")
    assert share.source == f"{file}#summary" and share.weight == 3 and other.source == "code"
    with pytest.raises(ValueError, match=r"no field 'sumary'\. Its fields are 'text', 'summary'"):
        read_text_file(f"{file}#sumary")
    odd = tmp_path / "a#b.txt"
    odd.write_text(JOINED)
    assert split_field(str(odd)) == (odd, None) and read_text_file(str(odd)) == JOINED


def test_a_field_that_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(lines({"left": "a", "right": "b"}))
    with pytest.raises(ValueError, match=r"fields 'left', 'right'.*x.jsonl#FIELD"):
        read_text_file(str(file))
    file.write_text(lines({"text": [1, 2]}))
    with pytest.raises(ValueError, match="holds neither text nor messages"):
        read_text_file(str(file))
    file.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        read_text_file(str(file))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_plain_text_in_a_known_encoding_is_taken_as_it_is(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(JOINED.encode(encoding))
    check_text(str(file), "calibration")
    assert read_text(str(file), "calibration") == JOINED


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("Grüße aus Köln".encode("latin-1"), "no text in UTF-8: byte 0xfc at position 2"),
        ("東京".encode("shift-jis"), "no text in UTF-8"),
        (b"abc\0def", "control character 0x00 at position 3"),
        (b"%PDF-1.7 abc", "is a PDF"),
        (b"PK\x03\x04abc", "zip archive"),
        (b"(\xb5/\xfdabc", "zstd"),
        (b"\x89PNG\r\n\x1a\n", "no text in UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line_at_once(
    content: bytes, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        check_text(str(file), "calibration")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=said):
        read_text_file(str(file))


def test_a_letter_across_the_end_of_what_is_looked_at_is_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x" + "é" * 40_000, encoding="utf-8")
    check_text_file(str(file))
    assert len(read_text_file(str(file))) == 40_001


def test_parquet_is_read_or_asks_for_its_package(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 no more")
    if importlib.util.find_spec("pyarrow") is None:
        with pytest.raises(ValueError, match="pip install pyarrow"):
            check_text(str(file), "calibration")
        return
    import pyarrow
    from pyarrow import parquet

    with pytest.raises(ValueError, match="damaged"):
        read_text_file(str(file))
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": TEXTS}), file)
    assert read_text_file(str(file)) == JOINED


def test_half_a_letter_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a \\ud83d b \\ud83d\\ude00"}\n{"text": "c"}\n')
    assert read_text_file(str(file)) == "a \ufffd b \U0001f600\n\nc"


@pytest.mark.parametrize("value", ["5", "NaN", "true", '{"a": "b"}'])
def test_one_value_that_is_no_text_makes_no_chat_of_the_others(value: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines({"text": TEXTS[0]}) + f'{{"text": {value}}}\n')
    with pytest.raises(ValueError, match="'text' holds neither text nor messages"):
        read_text_file(str(file))


def test_the_encoding_that_fails_is_the_one_that_was_read(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("text".encode("utf-16-le").join([b"\xff\xfe", b"\x00\xd8a\x00"]))
    with pytest.raises(ValueError, match="no text in UTF-16: byte"):
        read_text_file(str(file))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_files_are_looked_at_and_have_a_bound(
    pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.gz"
    file.write_bytes(pack(b"text\x00\x01" * 100))
    with pytest.raises(ValueError, match="no text: it has control character"):
        check_text(str(file), "calibration")
    file.write_bytes(pack(b"word " * 100_000))
    check_text(str(file), "calibration")
    monkeypatch.setattr(text_files, "LIMIT", 499_999)
    with pytest.raises(ValueError, match="holds more than 499,999 bytes"):
        read_text_file(str(file))
    monkeypatch.setattr(text_files, "LIMIT", 500_000)
    assert len(read_text_file(str(file))) == 500_000
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is damaged"):
        read_text_file(str(file))

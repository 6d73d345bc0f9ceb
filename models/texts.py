"""Texts that ship with Python: prose, code and dialogues, each with a part that is held out."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any, Literal

from .dialogues import Dialogue, dialogues, rendered
from .mixture import parse_shares
from .names import BUILTIN, CHAT, CODE, PROSE, SAMPLED, SHIPPED
from .text_files import check_text_file, is_text_file, read_text_file

Split = Literal["calibration", "evaluation"]

_MOST = 16_000  # characters of one module, so that long ones do not outweigh the others
_HELD_OUT = 4  # every fourth topic or module is held out
_SHORT = 12  # letters: blocks like `else: pass` are in every text

# Neither list may change: the place in it decides what is held out.  A module that a version of
# Python does not have is left out.  No module is in both: dialogues quote what they are made from.
_CODE = """
    argparse ast asyncio/base_events asyncio/streams asyncio/tasks base64 calendar codecs
    concurrent/futures/thread configparser contextlib copy csv dataclasses difflib email/message
    enum fnmatch fractions functools gettext glob gzip heapq html/parser http/client http/server
    inspect ipaddress json/decoder json/encoder locale logging mailbox mimetypes
    multiprocessing/pool optparse pathlib pickle platform pprint queue random sched selectors shelve
    shlex shutil smtplib socketserver statistics string subprocess tarfile tempfile textwrap
    threading timeit tokenize traceback types unittest/case urllib/parse urllib/request uuid
    warnings wave weakref xml/etree/ElementTree xmlrpc/client zipfile zoneinfo
"""
_DOCUMENTED = """
    _collections_abc _pydecimal _pyio _strptime abc asyncio/events asyncio/locks asyncio/queues bdb
    bisect bz2 cmd code collections compileall concurrent/futures/_base dis doctest email/charset
    email/headerregistry email/policy email/utils filecmp ftplib getopt graphlib hmac http/cookiejar
    http/cookies imaplib importlib/abc importlib/metadata linecache logging/handlers lzma
    multiprocessing/managers ntpath numbers operator os pdb pickletools pkgutil poplib posixpath
    profile pstats pydoc runpy secrets socket ssl symtable sysconfig trace tracemalloc turtle typing
    unittest/mock urllib/robotparser venv webbrowser wsgiref/headers wsgiref/util xml/dom/minidom
    xml/sax/handler xml/sax/saxutils zipapp zipimport
"""


def check_text(source: str, split: Split) -> None:
    """Raise a ValueError if texts are neither names that are known nor files."""
    sources = [s.source for s in parse_shares(source)] if split == "calibration" else [source]
    known = (*SHIPPED, *SAMPLED) if split == "calibration" else (*SHIPPED, PROSE)
    for each in sources:
        if each in known:
            continue
        if is_text_file(each):
            check_text_file(each)
        else:
            raise ValueError(
                f"No text file at {each}. Pass a file, {BUILTIN!r} (prose that ships with Python), "
                f"{CODE!r} or {CHAT!r} (made of Python's own code and documentation)"
                + (
                    ", 'languages' or 'self' (sampled from the model), or 'mixture' of all."
                    if split == "calibration"
                    else "."
                )
            )


def read_text(source: str, split: Split, tokenizer: Any = None) -> str:
    """A text as one string.

    Args:
        source: ``builtin`` (or ``prose``), ``code``, ``chat``, or a file of text or records, as
            :func:`.text_files.read_text_file` reads them.
        split: Which part of a text that ships with Python; a file is taken whole.
        tokenizer: Its chat template writes the dialogues down.

    Raises:
        ValueError: If there is no such file, it is no text in a known encoding, or this Python
            has no source of its library.
    """
    if source in (BUILTIN, PROSE):
        return builtin_prose(split)
    if source == CODE:
        return _present(library_code(split), source)
    if source == CHAT:
        return _present(rendered(library_dialogues(split), tokenizer), source)
    check_text(source, split)
    return read_text_file(source, tokenizer)


def builtin_prose(split: Split) -> str:
    """English prose that ships with Python; every fourth topic is held out for evaluation.

    Topics quote each other: paragraphs that calibration holds are left out of evaluation.
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    kept = "\n\n".join(text for i, text in enumerate(texts) if i % _HELD_OUT)
    if split == "calibration":
        return kept
    seen = paragraphs(kept)
    held_out = (part for text in texts[::_HELD_OUT] for part in text.split("\n\n"))
    return "\n\n".join(part for part in held_out if _words(part) not in seen)


@cache
def library_code(split: Split) -> str:
    """Source of well-known modules of Python's library; every fourth is held out for evaluation.

    Blocks between empty lines that any text to calibrate on holds are left out of evaluation.
    """
    texts = [text[:_MOST].rpartition("\n")[0] for text in _modules(_CODE.split(), split)]
    if split == "calibration":
        return "\n\n\n".join(texts)
    seen = paragraphs(library_code("calibration")) | paragraphs(builtin_prose("calibration"))
    seen |= _said(library_dialogues("calibration"))
    return "\n\n\n".join(
        "\n\n".join(block for block in text.split("\n\n") if _words(block) not in seen)
        for text in texts
    )


@cache
def library_dialogues(split: Split) -> tuple[Dialogue, ...]:
    """Questions and answers from documentation strings; every fourth module is held out.

    Dialogues that share a paragraph with any text to calibrate on are left out of evaluation.
    """
    found = tuple(
        each for text in _modules(_DOCUMENTED.split(), split) for each in dialogues(text, _MOST)
    )
    if split == "calibration":
        return found
    seen = paragraphs(library_code("calibration")) | paragraphs(builtin_prose("calibration"))
    seen |= _said(library_dialogues("calibration"))
    return tuple(each for each in found if not _said([each]) & seen)


def paragraphs(text: str) -> set[str]:
    """What stands between empty lines, whatever the space inside."""
    return {_words(part) for part in text.split("\n\n")}


def _said(found: Any) -> set[str]:
    """Paragraphs of answers that are long enough to be told apart."""
    parts = (part for each in found for turn in each for part in paragraphs(turn.answer))
    return {part for part in parts if len(part) > _SHORT}


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _modules(names: list[str], split: Split) -> list[str]:
    """Sources of the modules of one part, without those that this Python does not have."""
    folder, texts = Path(os.__file__).parent, []
    for i, name in enumerate(names):
        if (i % _HELD_OUT == 0) == (split == "evaluation"):
            file = folder / f"{name}.py"
            file = file if file.is_file() else folder / name / "__init__.py"
            if file.is_file():
                texts.append(file.read_text(encoding="utf-8"))
    return texts


def _present(text: str, source: str) -> str:
    if not text.strip():
        raise ValueError(
            f"This Python comes without the source of its library ({Path(os.__file__).parent}), "
            f"which {source!r} is made of. Use other texts: --calibration {PROSE}, or a file."
        )
    return text

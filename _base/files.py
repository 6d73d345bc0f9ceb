"""Files that are complete or absent: write to a temporary name, then rename."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it on success, remove it on failure.

    Works for a file or a folder: whatever the block creates at the yielded path,
    ``.NAME.PID.tmp``, replaces ``path``.  A run that fails leaves the old state, and so does a
    run that is killed, beside its temporary file or folder, which the next write removes.  A
    file is replaced in one rename.  Replacing a folder takes two: the old one moves to
    ``.NAME.PID.old`` first.  A kill between the two leaves nothing at ``path``, but both folders
    complete: the old one as ``.NAME.PID.old``, the new one as ``.NAME.PID.tmp``.

    Raises:
        ValueError: If ``path`` is the current folder or contains it.
        OSError: If the disk is full, with the file and the free space named.
    """
    path = path.resolve()
    if path.is_dir() and Path.cwd().is_relative_to(path):
        raise ValueError(
            f"{path} is the current folder or contains it, so it cannot be replaced. "
            "Choose another --out, or run from another folder."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _share(temporary)
        if temporary.is_dir() and path.is_dir():
            _replace_folder(temporary, path)
        else:
            os.replace(temporary, path)
    except Exception as error:  # libraries wrap the operating system's error in their own
        if "No space left" in str(error):
            free = shutil.disk_usage(path.parent).free
            raise OSError(
                errno.ENOSPC,
                f"The disk is full: {path} could not be written ({free:,} bytes free). "
                "It is as it was before. Free some space or choose another --out",
            ) from error
        raise
    finally:
        _remove(temporary)


def check_file(path: Path, suffixes: Sequence[str], option: str, example: str) -> None:
    """Find out before a long computation whether a file can be written.

    Args:
        path: The file.
        suffixes: What its name may end in: ``(".json",)``.
        option: The option that named it, for the error: ``--out``.
        example: A good name.

    Raises:
        ValueError: If it has another suffix, is a folder, or its folder cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder. Give a file in it: {path / example}.")
    if path.suffix not in suffixes:
        names = " or ".join(suffixes)
        raise ValueError(
            f"{option} {path} would not be a {names} file. Give a name such as {example}."
        )
    check_place(path, option)


def check_place(path: Path, option: str, inside: bool = False) -> None:
    """Find out whether a file or folder can be made where it is to be.

    Args:
        path: The file or folder.
        option: The option that named it, for the error.
        inside: Whether files are to be made in ``path`` itself, which may be there already.

    Raises:
        ValueError: If what should hold it is a file, or cannot be written.
    """
    folder = path.absolute() if inside else path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(
            f"{option} {path} cannot be written: {folder} is a file, not a folder. Choose another "
            f"{option}."
        )
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} {path} cannot be written: no file can be made in {folder} "
            f"({error.strerror or error}). Choose another {option}."
        ) from error


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, atomically; key order is kept."""
    with atomic_path(path) as temporary:
        text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8")


def read_json_text(path: Path, kind: str) -> str:
    """Read a JSON file as text.

    Args:
        path: The file.
        kind: What it should be, for the error: ``plan``.

    Raises:
        ValueError: If it is not a text file.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not a {kind} (not a JSON text file). Give the path of a {kind}.json."
        ) from error


def read_toml(path: Path, schema: type[Model], kind: str) -> Model:
    """Read a TOML file as a pydantic model, which is named like the file.

    Args:
        path: The file.
        schema: The model; it has a field ``name``.
        kind: What it should be, for the error: ``device``.

    Raises:
        ValueError: If it is not TOML or breaks the schema; says where.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return schema.model_validate({"name": path.stem} | tomllib.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{path} holds no valid {kind}: {where}: {first['msg']}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}.") from error


def _share(path: Path) -> None:
    """Give a file, or those of a folder, the usual permissions; safetensors makes private ones."""
    mask = os.umask(0)
    os.umask(mask)
    for file in path.iterdir() if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _replace_folder(new: Path, path: Path) -> None:
    old = new.with_suffix(".old")
    try:
        os.rename(path, old)
        os.rename(new, path)
    except BaseException:
        if not path.exists():
            os.rename(old, path)
        raise
    _remove(old)


def _remove_stale(path: Path) -> None:
    """Remove what killed runs left beside ``path``, but no old folder that is the only one."""
    if os.name != "posix":  # elsewhere os.kill(pid, 0) is no mere question
        return
    kinds = "tmp|old" if path.exists() else "tmp"
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,9}})\.({kinds})")
    for left in list(path.parent.iterdir()):
        match = name.fullmatch(left.name)
        if match and not _is_other_process(int(match[1])):
            _remove(left)


def _is_other_process(pid: int) -> bool:
    if pid == os.getpid():  # in containers, a restarted run often gets the same number
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists and is another user's
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

"""Files are complete or absent."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from bitplan._base.files import atomic_path, write_json


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def write_folder(path: Path, name: str) -> None:
    """Write a folder that holds one empty file."""
    with atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / name).touch()


def files(folder: Path) -> list[str]:
    """All files below a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def dead_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        write_folder(tmp_path / "packed", name)
    assert files(tmp_path) == ["packed/new"]


def test_a_folder_that_cannot_be_replaced_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "packed", "old")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if source.suffix == ".tmp":
            raise PermissionError
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(PermissionError):
        write_folder(tmp_path / "packed", "new")
    assert files(tmp_path) == ["packed/old"]


def test_a_kill_between_the_renames_leaves_both_folders(tmp_path: Path) -> None:
    path = tmp_path / "packed"
    write_folder(path, "old")
    code = (
        "import os, pathlib, sys\n"
        "from bitplan._base.files import atomic_path\n"
        "rename = os.rename\n"
        "os.rename = lambda a, b: os._exit(0) if a.suffix == '.tmp' else rename(a, b)\n"
        "with atomic_path(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.mkdir()\n"
        "    (temporary / 'new').touch()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    assert process.wait() == 0
    pid = process.pid
    assert files(tmp_path) == [f".packed.{pid}.old/old", f".packed.{pid}.tmp/new"]
    with pytest.raises(RuntimeError), atomic_path(path):
        raise RuntimeError
    assert files(tmp_path) == [f".packed.{pid}.old/old"]  # the only complete one stays
    write_folder(path, "newer")
    write_folder(path, "newest")
    assert files(tmp_path) == ["packed/newest"]


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    running, other = f".plan.json.{os.getppid()}.tmp", f".other.json.{dead_process()}.tmp"
    left = [f".plan.json.{dead_process()}.tmp", f".plan.json.{os.getpid()}.tmp"]
    for name in (running, other, *left):
        (tmp_path / name).touch()
    write_json(tmp_path / "plan.json", {})
    assert files(tmp_path) == sorted([running, other, "plan.json"])


def test_the_current_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (Path("."), Path("..")):
        with pytest.raises(ValueError, match=r"is the current folder or contains it.*--out"):
            write_folder(path, "new")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_is_explained(tmp_path: Path, error: Exception) -> None:
    message = r"The disk is full: .*plan.json could not be written"
    with pytest.raises(OSError, match=message), atomic_path(tmp_path / "plan.json"):
        raise error
    assert not list(tmp_path.iterdir())


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        private = temporary / "model.safetensors"
        private.touch(mode=0o600)
    usual = tmp_path / "usual"
    usual.touch()
    assert (folder / "model.safetensors").stat().st_mode == usual.stat().st_mode

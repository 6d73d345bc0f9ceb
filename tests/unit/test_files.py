"""Files are complete or absent."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from bitplan.quantizers.files import atomic_path, write_json


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "packed"
    for name in ("old", "new"):
        with atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [p.name for p in path.iterdir()] == ["new"]


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    message = r"The disk is full: .*plan.json could not be written"
    with pytest.raises(OSError, match=message), atomic_path(tmp_path / "plan.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())

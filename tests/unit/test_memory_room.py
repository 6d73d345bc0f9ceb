"""Room in memory that threads take turns in."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bitplan._base.memory import Room, memory_of_machine
from bitplan.quantizers import store as module
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.quantizers.packed import PackedTensor
from bitplan.quantizers.store import Renderings


def test_no_more_is_taken_than_there_is() -> None:
    room, lock, taken, most = Room(10), threading.Lock(), [0], [0]

    def work(size: int) -> int:
        with room.take(size):
            with lock:
                taken[0] += size
                most[0] = max(most[0], taken[0])
            threading.Event().wait(0.005)
            with lock:
                taken[0] -= size
        return size

    sizes = [4, 3, 6, 10, 1, 2, 5, 5] * 3
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, sizes)) == sizes
        assert 4 < most[0] <= 10
        assert list(pool.map(work, [25, 3])) == [25, 3]  # alone
    assert memory_of_machine() > 1 << 26


def test_a_failure_gives_its_room_back() -> None:
    room = Room(10)
    with pytest.raises(KeyError), room.take(10):
        raise KeyError
    with room.take(10):
        pass


def test_large_matrices_are_rounded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most, lock = [0], [0], threading.Lock()

    def method(weight: torch.Tensor, fmt: Format, evidence: Evidence) -> PackedTensor:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        threading.Event().wait(0.02)
        with lock:
            at_once[0] -= 1
        return METHODS.get("rtn")(weight, fmt, evidence)

    def side_by_side(work, items, device):  # type: ignore[no-untyped-def]
        with ThreadPoolExecutor(4) as pool:
            yield from list(pool.map(work, items))

    monkeypatch.setitem(METHODS._found, "counted", method)
    monkeypatch.setitem(METHODS._traits, "counted", {"rounds": lambda _: True})
    monkeypatch.setattr(module, "parallel_map", side_by_side)
    weights = {name: torch.randn(8, 64) for name in "abcd"}
    for memory, expected in ((1 << 30, 4), (2 * 4 * 8 * 64 * 64, 1)):
        most[0] = 0
        monkeypatch.setattr(module, "memory_of_machine", lambda memory=memory: memory)
        made = Renderings(weights.__getitem__, "counted")
        made.fit(list(weights), [Format.parse("int4-g32")])
        assert most[0] == expected

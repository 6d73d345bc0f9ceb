"""The store: what is rounded is rounded once, kept packed, and found again."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitplan.quantizers.format import Format
from bitplan.quantizers.grid import render
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.quantizers.packed import PackedTensor
from bitplan.quantizers.shelf import Shelf
from bitplan.quantizers.store import Renderings

FORMATS = tuple(map(Format.parse, ("int2-g32", "int4-g64-asym", "bf16", "q4_k")))
WEIGHTS = {
    name: torch.randn(20, 96, generator=torch.Generator().manual_seed(i))
    for i, name in enumerate("abc")
}
CPU = torch.device("cpu")
CALLS: Counter[tuple[str, str]] = Counter()


def shifted(weight: Tensor, fmt: Format, evidence: Evidence) -> PackedTensor:
    """Codes that rounding to nearest would undo: those of the weight, all shifted."""
    name = next(name for name, other in WEIGHTS.items() if other is weight)
    CALLS[name, fmt.name] += 1
    grid = METHODS.trait("rtn", "grid")(weight, fmt)
    assert evidence.hessian is not None
    return PackedTensor.pack(weight + evidence.hessian.sum(), fmt, grid)


class Given:
    """Evidence that is there, two matrices at a time."""

    def __init__(self, key: str = "data", amount: float = 0.5) -> None:
        self.key, self.amount, self.asked = key, amount, 0

    def gather(self, names: Sequence[str]) -> Iterator[Mapping[str, Evidence]]:
        self.asked += 1
        for start in range(0, len(names), 2):
            yield dict.fromkeys(names[start : start + 2], Evidence(torch.tensor([[self.amount]])))


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> str:
    CALLS.clear()
    traits = {"needs": {"hessian"}, "rounds": lambda fmt: fmt.integer}
    monkeypatch.setitem(METHODS._found, "shifted", shifted)
    monkeypatch.setitem(METHODS._traits, "shifted", traits)
    return "shifted"


def store(method: str, folder: Path | None = None, **options: int) -> Renderings:
    made = Renderings(WEIGHTS.__getitem__, method, folder, **options)
    made.evidence = Given()
    return made


def test_nearest_codes_are_recomputed() -> None:
    made = Renderings(WEIGHTS.__getitem__)
    made.fit(list(WEIGHTS), FORMATS)
    for fmt in FORMATS:
        assert not made.keeps(fmt)
        expected = render(WEIGHTS["b"], fmt, METHODS.trait("rtn", "grid")(WEIGHTS["b"], fmt))
        assert torch.equal(made.rows("b", fmt), expected)
        assert torch.equal(made.packed("b", fmt).dequantize(), expected)
    assert made.digest(dict.fromkeys(WEIGHTS, FORMATS[0])) is None


@pytest.mark.parametrize("where", ["memory", "folder", "temporary"])
def test_codes_of_other_methods_are_kept(method: str, where: str, tmp_path: Path) -> None:
    folder = tmp_path / "renderings" if where == "folder" else None
    made = store(method, folder, memory=700 if where == "temporary" else 1 << 20)
    made.fit(list(WEIGHTS), FORMATS)
    for name, weight in WEIGHTS.items():
        for fmt in FORMATS:
            grid = METHODS.trait("rtn", "grid")(weight, fmt)
            moved = weight + 0.5 if made.keeps(fmt) else weight
            expected = render(moved, fmt, grid)
            assert torch.equal(made.rows(name, fmt), expected)
            out = torch.empty(2, 96)
            some = torch.tensor([3, 11])
            assert made.rows(name, fmt, some, out) is out
            assert torch.equal(out, expected[some])
            assert torch.equal(made.rows(name, fmt, slice(4, 9)), expected[4:9])
            assert torch.equal(made.packed(name, fmt).dequantize(), expected)
    assert set(CALLS) == {(name, f.name) for name in WEIGHTS for f in FORMATS if f.integer}
    assert set(CALLS.values()) == {1}
    written = sorted(tmp_path.rglob("*.safetensors"))
    assert len(written) == (len(CALLS) if where == "folder" else 0)


def test_a_later_run_finds_what_an_earlier_one_rounded(method: str, tmp_path: Path) -> None:
    first = store(method, tmp_path)
    first.fit(["a", "b"], FORMATS)  # then it was killed
    before = {name: first.rows(name, FORMATS[0]).clone() for name in "ab"}
    again = store(method, tmp_path)
    again.fit(list(WEIGHTS), FORMATS)
    assert set(CALLS.values()) == {1} and len(CALLS) == 6
    assert all(torch.equal(again.rows(name, FORMATS[0]), before[name]) for name in before)
    full = store(method, tmp_path)
    full.fit(list(WEIGHTS), FORMATS)
    assert isinstance(full.evidence, Given) and full.evidence.asked == 0


def test_other_data_mean_other_codes(method: str, tmp_path: Path) -> None:
    first, second = store(method, tmp_path), store(method, tmp_path)
    second.evidence = Given("other data", -0.5)
    fmt = FORMATS[0]
    assert not torch.equal(first.rows("a", fmt), second.rows("a", fmt))
    assert CALLS["a", fmt.name] == 2
    assignment = dict.fromkeys(WEIGHTS, fmt)
    assert first.digest(assignment) == store(method, tmp_path).digest(assignment)
    assert first.digest(assignment) != second.digest(assignment)


def test_a_damaged_file_is_made_again(method: str, tmp_path: Path) -> None:
    fmt = FORMATS[1]
    expected = store(method, tmp_path).rows("a", fmt)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    assert torch.equal(store(method, tmp_path).rows("a", fmt), expected)
    assert CALLS["a", fmt.name] == 2


def test_a_method_without_its_evidence_is_refused(method: str) -> None:
    made = Renderings(WEIGHTS.__getitem__, method)
    with pytest.raises(ValueError, match="'shifted' needs hessian"):
        made.rows("a", FORMATS[0])


def test_a_shelf_keeps_no_more_in_memory_than_it_may() -> None:
    fmt = Format.parse("int4-g32")
    packed = [METHODS.get("rtn")(weight, fmt, Evidence()) for weight in WEIGHTS.values()]
    shelf = Shelf(memory=2 * packed[0].nbytes)
    for i, one in enumerate(packed * 2):
        shelf.put(str(i), one)
    assert sum(one.nbytes for one in shelf._at_hand.values()) <= 2 * packed[0].nbytes
    for i, one in enumerate(packed * 2):
        found = shelf.get(str(i), CPU)
        assert found is not None
        assert torch.equal(found.tensors["codes"], one.tensors["codes"])
    assert shelf.get("nothing", CPU) is None
    assert shelf._temporary is not None
    folder = Path(shelf._temporary.name)
    assert folder.is_dir()
    del shelf, found
    gc.collect()
    assert not folder.exists()


def test_a_shelf_that_cannot_be_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = Format.parse("int4-g32")
    packed = METHODS.get("rtn")(WEIGHTS["a"], fmt, Evidence())
    Shelf(tmp_path).put("old", packed)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("os.access", lambda *_: False)  # as of a folder mounted to be read only
    shelf = Shelf(tmp_path, memory=packed.nbytes)
    shelf.put("new", packed)
    for key in ("old", "new"):  # one at a time in memory
        found = shelf.get(key, CPU)
        assert found is not None and torch.equal(found.tensors["codes"], packed.tensors["codes"])
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_rounded_is_named() -> None:
    weights = {"good": torch.ones(4, 64), "bad": torch.full((4, 64), torch.inf)}
    made = Renderings(weights.__getitem__, "fisher_gptq")
    made.evidence = Curved()
    with pytest.raises(ValueError, match=r"'bad': The weight contains inf"):
        made.fit(list(weights), [Format.parse("int4-g32")])


class Curved:
    """The same curvature for all."""

    key = "curved"

    def gather(self, names: Sequence[str]) -> Iterator[Mapping[str, Evidence]]:
        yield dict.fromkeys(names, Evidence(fisher=torch.eye(64)))


def test_overlays_share_the_limit_on_grids() -> None:
    one = Renderings(WEIGHTS.__getitem__)
    one.grid_bytes = 1  # the last one alone
    for name in WEIGHTS:
        one.overlay().rows(name, FORMATS[0])
    assert len(one._grids) == 1
    one.rows("a", FORMATS[0])
    assert len(one._grids) == 1

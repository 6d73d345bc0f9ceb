"""What every family of formats promises."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ..quantizers.format import FAMILIES, Family, Format, family, fit
from ..quantizers.grid import Grid, decode, encode, render
from ..quantizers.packed import PackedTensor
from .contract import Contract
from .toys import drawn

SHAPES = ((1, 1), (3, 70), (24, 300), (5, 512))

NO_TORCH = """
import sys
sys.modules["torch"] = None
from bitplan.quantizers import families
families.__path__.append({folder!r})
from bitplan.quantizers.format import Format, family
for name in family({name!r}).examples:
    print(name, Format.parse(name).stored_bytes((24, 300)))
"""


class FamilyContract(Contract):
    """Names that read back, bytes that are counted right, and one decoded weight for all ways.

    Tests take the formats of the family's ``examples``.
    """

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every example in every shape, where a test asks for them."""
        if "fmt" not in metafunc.fixturenames:
            return super().pytest_generate_tests(metafunc)
        cases = [
            pytest.param(Format.parse(spec), id=f"{name}-{spec}")
            for name in self.plugins
            for spec in self.plugin(name).examples
        ]
        metafunc.parametrize("fmt", cases)
        if "shape" in metafunc.fixturenames:
            metafunc.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
        return None

    @pytest.fixture
    def weight(self, shape: tuple[int, int]) -> Tensor:
        """Normal weights of about the size that networks have."""
        return drawn(shape, 0) / 16

    @pytest.fixture
    def packed(self, fmt: Format, weight: Tensor) -> PackedTensor:
        """The weight rounded to nearest."""
        return PackedTensor.pack(weight, fmt, family(fmt.family).fit(weight, fmt))

    def plugin(self, name: str) -> type[Family[Any]]:
        """The family's class."""
        return FAMILIES.get(name)

    def test_names_read_back(self, name: str) -> None:
        """The canonical name of a format is the name it was read from; others' names are not."""
        found = family(name)
        assert found.grammar
        assert found.examples
        for spec in (*found.examples, *found.names()):
            fmt = Format.parse(spec)
            assert str(fmt) == fmt.name
            assert Format.parse(fmt.name) == fmt
            assert fmt.family == name or spec not in found.examples
        for spec in ("", "int", "bits", found.examples[0] + "x", found.examples[0].upper()):
            assert found.parse(spec) is None
        for other in set(FAMILIES.names()) - {name}:
            assert all(found.parse(spec) is None for spec in family(other).examples)

    def test_names_and_bytes_load_no_torch(self, name: str) -> None:
        """Solvers and rules of runtimes need both, in a process of their own."""
        folder = str(Path(inspect.getfile(self.plugin(name))).parent)
        code = NO_TORCH.format(folder=folder, name=name)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert not done.returncode, done.stderr
        said = dict(line.split() for line in done.stdout.splitlines())
        formats = map(Format.parse, family(name).examples)
        assert said == {fmt.name: str(fmt.stored_bytes((24, 300))) for fmt in formats}

    def test_traits_fit_together(self, fmt: Format) -> None:
        """Those that kernels, rules and solvers ask for."""
        assert 1 <= fmt.bits <= 32
        assert fmt.block_size >= 1
        assert fmt.floating == (fmt.layout == "dense")
        if fmt.integer:
            assert fmt.layout == "codes"
            assert fmt.levels is None and fmt.base is None
        if fmt.layout == "codes":
            assert fmt.bits <= 8
        if fmt.levels is not None:
            assert len(fmt.levels) == 2**fmt.bits
            assert list(fmt.levels) == sorted(fmt.levels)
        if fmt.block_size > 1:
            assert fmt.block_size % fmt.group_size == 0
        assert (fmt.rank > 0) <= (fmt.base is not None)

    def test_bytes_are_those_stored(
        self, fmt: Format, shape: tuple[int, int], packed: PackedTensor
    ) -> None:
        """To the byte, whatever the shape."""
        assert packed.nbytes == fmt.stored_bytes(shape)
        assert (fmt.layout == "codes") <= ({"codes", "scale"} <= packed.tensors.keys())

    def test_some_rows_decode_as_all_do(
        self, fmt: Format, shape: tuple[int, int], packed: PackedTensor
    ) -> None:
        """Bit for bit, for a range of rows and for chosen ones."""
        whole = packed.dequantize()
        assert whole.shape == shape
        assert whole.dtype == torch.float32
        picked = torch.arange(shape[0]).flip(0)[::2]
        for rows in (slice(shape[0] // 3, None), slice(0, 1), picked):
            assert torch.equal(packed.dequantize(rows), whole[rows])

    def test_renders_what_it_stores(
        self, fmt: Format, shape: tuple[int, int], weight: Tensor, packed: PackedTensor
    ) -> None:
        """From the original weight, all of it or some rows; also with what the bytes remember."""
        whole, fitted = packed.dequantize(), packed.fitted()
        assert torch.equal(render(weight, fmt, fitted), whole)
        some = slice(shape[0] // 3, None)
        kept = None if fitted is None else fitted.rows(some)
        assert torch.equal(render(weight[some], fmt, kept), whole[some])
        own = family(fmt.family).fit(weight, fmt)
        assert torch.equal(render(weight, fmt, own), whole)

    def test_rounding_again_changes_nothing(
        self, fmt: Format, shape: tuple[int, int], packed: PackedTensor
    ) -> None:
        """What is decoded lies on the grid; a correction is added to what does."""
        plain = packed.coded()
        decoded = plain.dequantize()
        assert torch.equal(render(decoded, plain.fmt, plain.fitted()), decoded)
        again = PackedTensor.pack(decoded, plain.fmt, plain.fitted())
        assert torch.equal(again.dequantize(), decoded)

    def test_codes_and_scales_are_the_weight(
        self, fmt: Format, shape: tuple[int, int], weight: Tensor, packed: PackedTensor
    ) -> None:
        """Rounding methods choose codes: a family stores those that it is given."""
        plain = packed.coded()
        grid = plain.grid()
        if fmt.floating or type(family(plain.fmt.family)).line is Family.line:
            assert grid is None
            return
        assert isinstance(grid, Grid)
        codes = encode(weight, plain.fmt, grid)
        assert int(codes.max()) < 2**fmt.bits
        assert torch.equal(decode(codes, plain.fmt, grid), plain.dequantize())
        stored = PackedTensor.of_codes(codes, plain.fmt, grid)
        assert all(torch.equal(stored.tensors[part], t) for part, t in plain.tensors.items())
        other = (codes.int() + 1).remainder(2**fmt.bits).to(torch.uint8)
        chosen = PackedTensor.of_codes(other, plain.fmt, grid)
        assert torch.equal(chosen.dequantize(), decode(other, plain.fmt, grid))

    def test_errors_are_those_of_its_bits(
        self, fmt: Format, shape: tuple[int, int], weight: Tensor, packed: PackedTensor
    ) -> None:
        """The relative squared error of normal weights is at most 1.2 * 4^-(bits - 1)."""
        error = (packed.dequantize() - weight).square().sum() / weight.square().sum()
        assert error <= 1.2 * 4.0 ** -(min(fmt.bits, 9) - 1)

    def test_importance_is_no_worse_than_none(self, fmt: Format) -> None:
        """Of columns and of entries; families that take none are fitted as ever."""
        weight = drawn((24, 300), 2) / 16
        columns, rows = (1.5 * drawn((300,), 3)).exp(), (1.5 * drawn((24, 1), 4)).exp()
        for importance in (columns, rows * columns):
            errors = []
            for known in (None, importance):
                packed = PackedTensor.pack(weight, fmt, fit(weight, fmt, known))
                error = (packed.dequantize() - weight).square() * importance
                errors.append(float(error.sum()))
            assert errors[1] <= 1.001 * errors[0]

    def test_refitted_scales_cost_no_more(self, fmt: Format) -> None:
        """For codes that were chosen otherwise, in rows of a curvature; they are stored exactly."""
        if fmt.base is not None or type(family(fmt.family)).line is Family.line:
            return
        weight, inputs = drawn((24, 300), 4) / 16, drawn((500, 300), 5).cumsum(1) / 8
        hessian, grid = inputs.T @ inputs / 500, fit(weight, fmt)
        assert isinstance(grid, Grid)
        codes = encode(1.1 * weight, fmt, grid)
        better = family(fmt.family).refit(weight, fmt, grid, codes, hessian)
        costs = []
        for scales in (grid, better):
            error = (decode(codes, fmt, scales) - weight).double()
            costs.append(((error @ hessian.double()) * error).sum(1))
        if len(grid.scale) == 1:  # of all rows
            costs = [cost.sum(0) for cost in costs]
        assert (costs[1] <= costs[0] * (1 + 1e-5)).all()
        packed = PackedTensor.of_codes(codes, fmt, better)
        assert torch.equal(packed.dequantize(), decode(codes, fmt, better))

    def test_zeros_stay_zeros(self, fmt: Format) -> None:
        """A matrix that was pruned away."""
        weight = torch.zeros(4, 96)
        packed = PackedTensor.pack(weight, fmt, family(fmt.family).fit(weight, fmt))
        assert torch.equal(packed.dequantize(), weight)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_refuses_weights_that_are_no_numbers(self, fmt: Format, bad: float) -> None:
        """Rather than store something else."""
        weight = torch.ones(4, 96)
        weight[1, 2] = bad
        with pytest.raises(ValueError, match=r"nan|inf"):
            family(fmt.family).check(weight, fmt)

    def test_refuses_weights_beyond_its_scales(self, fmt: Format) -> None:
        """Scales of float16 end somewhere; what is not refused must be held."""
        for exponent in (4, 7, 12, 30):
            weight = drawn((4, 96), 1) * 10.0**exponent
            try:
                family(fmt.family).check(weight, fmt)
            except ValueError as error:
                assert str(fmt) in str(error)
                continue
            packed = PackedTensor.pack(weight, fmt, family(fmt.family).fit(weight, fmt))
            assert packed.dequantize().isfinite().all()

"""The op of plane packing on a device without a kernel: schema, tracing, extras, errors."""

from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bitplan.__main__ import app
from bitplan.kernels import gemm
from bitplan.kernels.blocks import Block
from bitplan.kernels.gemm import meta_of, pack_of, plane_linear, plane_linear_op
from bitplan.kernels.packing import PlanePack
from bitplan.tests.packs import random_packed, relative_error


@pytest.fixture
def pack() -> PlanePack:
    upper = random_packed("int3-g64-asym", (64, 130))
    lower = random_packed("int5-gc", (13, 130))
    return PlanePack.from_blocks([Block.of(upper), Block.of(lower, 64)], (77, 130))


def arguments(x: torch.Tensor, pack: PlanePack, bias: torch.Tensor | None) -> tuple[Any, ...]:
    parts = [getattr(pack, name) for name in gemm._TENSORS]
    return (x, *parts, bias, *[None] * 5, meta_of(pack))


def test_linear(pack: PlanePack) -> None:
    x, bias = torch.randn(2, 3, 130), torch.randn(77)
    expected = torch.nn.functional.linear(x, pack.dequantize(), bias)
    torch.testing.assert_close(plane_linear(x, pack, bias), expected)
    assert plane_linear(x[:0], pack).shape == (0, 3, 77)


def test_metadata_round_trip(pack: PlanePack) -> None:
    again = pack_of([getattr(pack, name) for name in gemm._TENSORS], meta_of(pack))
    assert (again.shape, again.cell, again.classes) == (pack.shape, pack.cell, pack.classes)
    assert again.order == pack.order


@pytest.mark.parametrize("bias", [None, torch.zeros(77)])
def test_opcheck(pack: PlanePack, bias: torch.Tensor | None) -> None:
    torch.library.opcheck(plane_linear_op, arguments(torch.randn(2, 130), pack, bias))
    x = torch.randn(2, 130, requires_grad=True)
    torch.library.opcheck(plane_linear_op, arguments(x, pack, bias))


def test_compiles_as_one_graph(pack: PlanePack) -> None:
    compiled = torch.compile(
        lambda x: plane_linear(x, pack) * 2, fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(4, 130)
    torch.testing.assert_close(compiled(x), 2 * plane_linear(x, pack))


def test_gradients(pack: PlanePack) -> None:
    """Of the input and the bias, with a low-rank correction; the weight is a constant."""
    x = torch.randn(3, 130, requires_grad=True)
    bias = torch.randn(77, requires_grad=True)
    up, down = torch.randn(77, 2), torch.randn(2, 130)
    plane_linear(x, pack, bias, low_rank=(up, down)).square().sum().backward()
    found = (x.grad, bias.grad)
    x.grad = bias.grad = None
    weight = pack.dequantize() + up @ down
    torch.nn.functional.linear(x, weight, bias).square().sum().backward()
    assert found[0] is not None and x.grad is not None
    assert relative_error(found[0], x.grad) < 1e-5
    torch.testing.assert_close(found[1], bias.grad)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_rows_and_low_rank(pack: PlanePack) -> None:
    sparse = torch.zeros(77, 130)
    sparse[[0, 5, 5, 76], [3, 0, 129, 64]] = torch.tensor([1.0, -2.0, 3.0, 0.5])
    rows = sparse.to_sparse_csr()
    parts = (rows.crow_indices().int(), rows.col_indices().int(), rows.values().half())
    up, down = torch.randn(77, 3), torch.randn(3, 130)
    x = torch.randn(4, 130)
    found = plane_linear(x, pack, sparse=parts, low_rank=(up, down))
    expected = x @ (pack.dequantize() + sparse + up @ down).T
    assert relative_error(found, expected) < 1e-6
    graded = x.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient through sparse"):
        plane_linear(graded, pack, sparse=parts).sum().backward()


def test_what_does_not_fit(pack: PlanePack) -> None:
    with pytest.raises(ValueError, match=r"has 5 columns, the weight \[77, 130\] needs 130"):
        plane_linear(torch.zeros(1, 5), pack)
    with pytest.raises(ValueError, match=r"bias must be \[77\], but is \[3\]"):
        plane_linear(torch.zeros(1, 130), pack, torch.zeros(3))
    with pytest.raises(ValueError, match="input is on cpu, the weight on meta"):
        plane_linear(torch.zeros(1, 130), pack.to("meta"))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"Triton is not installed.*bitplan\[kernels\]"):
        gemm.require_triton()
    result = CliRunner().invoke(app, ["kernels", "check"])
    assert isinstance(result.exception, ValueError)
    assert "pip install 'bitplan[kernels]'" in str(result.exception)
    assert "CPU" not in str(result.exception)
    assert result.output == ""  # no bar before the error

"""The compiled CPU kernels against float64, and what stands in for them where they cannot run."""

from __future__ import annotations

import copy
import ctypes
import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitplan._base.native import cache_folder, find_compiler
from bitplan.kernels import cpu, native
from bitplan.kernels.backend import kernel_for
from bitplan.kernels.cpu import FEW, CpuWeight
from bitplan.kernels.layouts import CpuLayout, DenseLayout, PlaneLayout, StoredLayout, prepare
from bitplan.models.packed_modules import PackedLinear
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.quantizers.packed import PackedTensor

CPU = torch.device("cpu")
_REAL_CACHE = cache_folder()
GROUPS = ("g32", "g64", "g128", "g256", "gc", "gt")
SPECS = [f"int{b}-{g}{z}" for b in range(1, 9) for g in GROUPS for z in ("", "-asym")]
SPECS += [f"nf4-{g}" for g in GROUPS if g != "gt"]
compiled = pytest.mark.skipif(
    native.unavailable() is not None, reason=f"no compiled kernels: {native.unavailable()}"
)


def pack(weight: Tensor, spec: str) -> PackedTensor:
    fmt = Format.parse(spec)
    return METHODS.get("rtn")(weight, fmt, Evidence())


def error(found: Tensor, x: Tensor, packed: PackedTensor, bias: Tensor | None = None) -> float:
    """Largest error relative to the largest output, which float64 arithmetic has."""
    exact = x.double() @ packed.dequantize().double().T
    if bias is not None:
        exact += bias.double()
    return float((found.double() - exact).abs().max() / exact.abs().max())


@compiled
@pytest.mark.parametrize("shape", [(5, 576), (3, 1), (7, 33), (4, 100), (9, 260), (17, 1000)])
def test_products_and_rows_of_every_format(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for spec in (*SPECS, "bf16", "fp16"):
        packed = pack(torch.randn(shape), spec)
        weight, bias = CpuWeight(packed), torch.randn(shape[0])
        assert torch.equal(weight.unpack(), packed.dequantize()), spec
        picked = torch.tensor([2, 0, 2])
        assert torch.equal(weight.unpack(picked), packed.dequantize()[picked]), spec
        for count in (1, 3, 8, FEW + 1):
            x = torch.randn(count, shape[1])
            assert error(weight.linear(x, bias), x, packed, bias) < 1e-5, (spec, count)


@compiled
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SPECS),
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, FEW + 2),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
)
def test_any_shape_and_dtype(
    spec: str, rows: int, cols: int, count: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    packed = pack(torch.randn(rows, cols) * 0.1, spec)
    x = torch.randn(count, cols).to(dtype)
    found = CpuWeight(packed).linear(x, None)
    assert found.dtype == dtype and found.shape == (count, rows)
    # Not relative to the outputs, which may cancel: to the largest they could be.
    largest = float(x.float().abs().max() * packed.dequantize().abs().sum(1).max())
    exact = x.double() @ packed.dequantize().double().T
    tolerance = 2e-6 + torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # what is between subnormal numbers
    assert (found.double() - exact).abs().max() <= tolerance * largest + smallest + 1e-30


@compiled
def test_the_error_is_that_of_float32_and_not_of_bfloat16() -> None:
    torch.manual_seed(0)
    packed, x = pack(torch.randn(256, 2048), "int4-g64-asym"), torch.randn(1, 2048)
    x[0, 7] = 300.0  # an outlier costs precision in its own block of 64 only
    assert error(CpuWeight(packed).linear(x, None), x, packed) < 1e-5
    assert error(x.bfloat16() @ packed.dequantize().bfloat16().T, x, packed) > 1e-4


@compiled
def test_what_is_no_number_stays_none() -> None:
    packed = pack(torch.randn(4, 96), "int4-g32")
    for bad in (float("nan"), float("inf")):
        x = torch.randn(1, 96)
        x[0, 50] = bad
        assert not CpuWeight(packed).linear(x, None).isfinite().any()


@compiled
def test_inputs_of_any_layout() -> None:
    packed = pack(torch.randn(8, 96), "int3-g64-asym")
    weight, x = CpuWeight(packed), torch.randn(2, 96, 4).mT
    assert torch.equal(weight.linear(x, None), weight.linear(x.contiguous(), None))
    assert weight.linear(torch.empty(0, 96), None).shape == (0, 8)
    assert weight.linear(torch.randn(2, 3, 96).double(), None).dtype == torch.float64
    with pytest.raises(IndexError, match=r"Rows 0 to 8 .* has rows 0 to 7"):
        weight.unpack(torch.tensor([0, 8]))


@compiled
def test_inputs_that_do_not_fit_are_refused() -> None:
    weight = CpuWeight(pack(torch.randn(8, 96), "int4-g32"))
    for bad in ((2, 48), (1, 95), (40, 48), ()):  # the kernels would read and write elsewhere
        with pytest.raises(ValueError, match=r"\[8, 96\] on the CPU multiplies inputs \[..., 96\]"):
            weight.linear(torch.randn(bad), None)
    with pytest.raises(ValueError, match="on meta"):
        weight.linear(torch.randn(1, 96, device="meta"), None)
    for bias in (torch.zeros(3), torch.zeros(8, device="meta")):
        with pytest.raises(ValueError, match=r"bias must be \[8\] on the CPU"):
            weight.linear(torch.randn(1, 96), bias)


@compiled
def test_defaults_of_torch_change_nothing() -> None:
    packed, x = pack(torch.randn(8, 96), "int4-g32-asym"), torch.randn(FEW + 1, 96)
    weight, plain = CpuWeight(packed), packed.dequantize()
    products = [weight.linear(x[:count], None) for count in (1, len(x))]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert torch.equal(weight.unpack(), plain)
            for product in products:
                assert torch.equal(weight.linear(x[: len(product)], None), product)
            assert all(map(math.isfinite, cpu._times(packed.fmt)))
    finally:
        torch.set_default_dtype(torch.float32)


@compiled
def test_a_weight_of_one_row_may_have_any_stride() -> None:
    packed, x = pack(torch.randn(1, 192), "int4-g64"), torch.randn(1, 192)
    codes = packed.tensors["codes"].as_strided((1, 96), (5, 1))
    odd = PackedTensor(packed.fmt, packed.shape, {**packed.tensors, "codes": codes})
    assert codes.is_contiguous()
    assert error(CpuWeight(odd).linear(x, None), x, packed) < 1e-5
    assert torch.equal(CpuWeight(odd).unpack(), packed.dequantize())


@compiled
def test_parts_may_move_to_shared_memory() -> None:
    packed, x = pack(torch.randn(64, 4096), "int8-g64"), torch.randn(1, 4096)
    module = PackedLinear(packed, None, torch.empty(0))
    expected, layout, address = module(x), module._layout, module.codes.data_ptr()
    module.share_memory()  # as sending a model to another process does
    assert module.codes.data_ptr() != address
    assert module._layout is layout
    assert torch.equal(module(x), expected)
    assert isinstance(layout, CpuLayout)
    assert layout.weight.native.codes == module.codes.data_ptr()


@compiled
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracers_see_an_operation() -> None:
    module = PackedLinear(pack(torch.randn(8, 96), "int4-g64"), None, torch.empty(0))
    x = torch.randn(2, 96)
    module.prepare()
    traced = torch.jit.trace(module, torch.zeros(2, 96))
    assert torch.equal(traced(x), module(x))
    assert module(x.to("meta")).device.type == "meta"


@compiled
def test_modules_follow_their_stored_parts() -> None:
    torch.manual_seed(0)
    first, second = pack(torch.randn(8, 96), "int4-g64"), pack(torch.randn(8, 96), "int4-g64")
    module, x = PackedLinear(first, None, torch.empty(0)), torch.randn(1, 96)
    module.requires_grad_(False)
    assert error(module(x), x, first) < 1e-5
    assert isinstance(module._layout, CpuLayout)
    clone, before = copy.deepcopy(module), module(x)
    state = {name: part.clone() for name, part in second.tensors.items()}
    module.load_state_dict(state)
    assert error(module(x), x, second) < 1e-5
    assert torch.equal(clone(x), before)
    module.load_state_dict(dict(pack(torch.randn(8, 96), "int4-g64").tensors), assign=True)
    assert error(module(x), x, module.packed()) < 1e-5
    module.to(torch.bfloat16)
    assert module(x.bfloat16()).dtype == torch.bfloat16
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), module(x))


@compiled
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_prepared_modules_compile_to_one_graph(backend: str) -> None:
    packed = pack(torch.randn(8, 96), "int4-g64-asym")
    module = PackedLinear(packed, nn.Parameter(torch.randn(8)), torch.empty(0))
    module.prepare()
    compiled_module = torch.compile(module, backend=backend, fullgraph=True)
    x = torch.randn(1, 96)
    assert torch.allclose(compiled_module(x), module(x), atol=1e-5)


@compiled
def test_gradients_do_not_take_the_short_way() -> None:
    packed = pack(torch.randn(8, 96), "int4-g64-asym")
    layout, x = prepare(packed, CPU), torch.randn(2, 96, requires_grad=True)
    assert isinstance(layout, CpuLayout)
    (found,) = torch.autograd.grad(layout.linear(x, None).sum(), x)
    assert torch.allclose(found, packed.dequantize().sum(0).expand(2, -1), atol=1e-4)


def test_planes_and_dense_copies_multiply_too(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    packed, bias = pack(torch.randn(70, 96), "int5-g32-asym"), torch.randn(70)
    monkeypatch.setattr("bitplan.kernels.layouts.kernel_for", lambda _: "triton")
    planes = prepare(packed, CPU)
    assert isinstance(planes, PlaneLayout)
    dense, stored = DenseLayout(packed.dequantize()), StoredLayout(packed)
    for x in (torch.randn(2, 96), torch.randn(2, 96, requires_grad=True)):
        for layout in (planes, dense, stored):
            found = layout.linear(x, bias)
            assert error(found.detach(), x.detach(), packed, bias) < 1e-5
            assert found.requires_grad == x.requires_grad


def test_kernels_are_chosen_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITPLAN_KERNEL", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernel_for(CPU) == "cpu"
    assert kernel_for(torch.device("mps")) == "reference"
    monkeypatch.setenv("BITPLAN_KERNEL", "reference")
    assert kernel_for(CPU) == "reference"
    layout = prepare(pack(torch.randn(4, 64), "int4-g64"), CPU)
    assert isinstance(layout, StoredLayout)


@pytest.mark.parametrize(
    ("value", "device", "message"),
    [
        ("avx", "cpu", "is 'avx', but the kernels are called reference, triton, cpu"),
        ("triton", "cpu", "(needs a CUDA or ROCm device|triton is not installed)"),
        ("cpu", "mps", "cannot run on 'mps': these kernels are for CPUs"),
    ],
)
def test_kernels_that_cannot_run(
    value: str, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("BITPLAN_KERNEL", value)
    with pytest.raises(ValueError, match=message):
        kernel_for(torch.device(device))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache of libraries, and nothing loaded."""
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "cache"))
    native.LIBRARY.forget()
    native._warn.cache_clear()
    cpu.faster.cache_clear()
    yield tmp_path
    native.LIBRARY.forget()
    cpu.faster.cache_clear()


def test_without_a_compiler_layers_are_dequantized(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    packed, x = pack(torch.randn(8, 96), "int4-g64-asym"), torch.randn(1, 96)
    with pytest.warns(UserWarning, match=r"No C\+\+ compiler was found .*no-such-compiler"):
        layout = prepare(packed, CPU)
    assert isinstance(layout, DenseLayout)
    assert error(layout.linear(x, None), x, packed) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        prepare(packed, CPU)
    monkeypatch.setenv("BITPLAN_KERNEL", "cpu")
    with pytest.raises(ValueError, match=r"cannot run on 'cpu': No C\+\+ compiler was found"):
        kernel_for(CPU)


def test_a_compiler_that_fails_is_quoted(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = fresh / "c++"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "cpu.cpp:1: error: too old" >&2; exit 1\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.warns(UserWarning, match="could not be built"):
        assert native.library() is None
    assert "too old" in str(native.unavailable())
    assert not list((fresh / "cache").glob("*.so"))


@compiled
def test_the_library_is_built_once_and_again_if_damaged(
    monkeypatch: pytest.MonkeyPatch, fresh: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler = find_compiler()
    assert compiler is not None
    built = _REAL_CACHE / native.LIBRARY.path(compiler).name
    script, log = fresh / "c++", fresh / "log"
    script.write_text(  # "compiles" by copying
        f'#!/bin/sh\nfor out; do :; done\n[ "$out" = --version ] && exit\n'
        f'echo "$out" >> {log}\ncp {built} "$out"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    (fresh / "cache").mkdir()
    native.LIBRARY.path(str(script)).write_bytes(b"\x7fELF damaged")
    assert isinstance(native.library(), ctypes.CDLL)
    assert "compiling the CPU kernels" in capfd.readouterr().err
    steps = log.read_text().splitlines()
    assert [Path(step).name for step in steps] == ["cpu.o", "cpu.so"]
    native.LIBRARY.forget()
    assert native.library() is not None
    assert log.read_text().splitlines() == steps  # from the cache
    assert not capfd.readouterr().err


@compiled
def test_kernels_slower_than_float32_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_times", lambda fmt: (2e-4, 1e-4))
    cpu.faster.cache_clear()
    with pytest.warns(UserWarning, match=r"int4-g64 weights is slower .* \(200 and 100 us"):
        layout = prepare(pack(torch.randn(8, 96), "int4-g64"), CPU)
    cpu.faster.cache_clear()
    assert isinstance(layout, DenseLayout)

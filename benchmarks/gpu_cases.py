"""Random packed weights on a device, and what their products and kernels are checked against."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bitplan.kernels.blocks import Block, ZeroKind
from bitplan.kernels.gemm import DECODE_TOKENS, plane_linear
from bitplan.kernels.packing import PlanePack
from bitplan.kernels.triton_launch import (
    Extras,
    Launch,
    dequantize_blocks,
    multiply,
    multiply_dense,
)
from bitplan.kernels.tune import rule
from bitplan.quantizers.format import Format
from bitplan.quantizers.packed import PackedTensor

HALVES = (torch.float16, torch.bfloat16)
WIDTHS = range(1, 9)
TOKENS = (1, 2, 4, 7, 16, 33, 64, 256)
# The largest error over the largest output: the dtype of a result and what its weights are
# rounded to; sums in float32 lose what the offsets of the codes cost.
BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}
WHOLE = (384, 1024)
ODD = ((70, 200), (64, 192), (130, 64), (205, 320))

Cut = Literal["whole", "rows", "columns"]


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of random codes.

    Attributes:
        specs: Its formats; more than one for a mix.
        cut: Which parts a mix consists of: every row in one format, or runs of columns.
        zero: How zero points are kept on the device.
    """

    specs: tuple[str, ...]
    cut: Cut = "whole"
    zero: ZeroKind = "code"

    @property
    def name(self) -> str:
        """Formats, and how they are mixed."""
        mixed = "" if self.cut == "whole" else f" by {self.cut}"
        return "+".join(self.specs) + mixed + (" half zeros" if self.zero == "half" else "")

    @property
    def bits(self) -> float:
        """Bits per code on average."""
        widths = [Format.parse(spec).bits for spec in self.specs]
        return sum(widths) / len(widths)


@dataclass(frozen=True, slots=True)
class Built:
    """A weight on its device.

    Attributes:
        pack: As the kernels take it.
        dense: Float32 [rows, cols], decoded by torch.
        low_rank: The factors of a correction, which is part of ``dense``, or None.
    """

    pack: PlanePack
    dense: Tensor
    low_rank: tuple[Tensor, Tensor] | None


def uniform(bits: int, group: int | str = 128) -> Weight:
    """One width with zero points, as plans have them."""
    return Weight((f"int{bits}-g{group}-asym",))


MIXES = (
    Weight(("int3-g128-asym", "int4-g128-asym"), "rows"),
    Weight(("int2-g128-asym", "int3-g128-asym", "int4-g128-asym", "int8-g128-asym"), "columns"),
)


def random_packed(
    spec: str, shape: tuple[int, int], device: torch.device, seed: int
) -> PackedTensor:
    """A packed weight [rows, cols] of random bits, made on the device; no scale is zero.

    Scales are such that weights are about as large as those of a trained model.
    """
    fmt = Format.parse(spec)
    generator = torch.Generator(device).manual_seed(seed)
    parts = {}
    for name, (size, dtype) in fmt.tensors(shape).items():
        if dtype == "uint8":
            parts[name] = torch.randint(
                256, size, dtype=torch.uint8, device=device, generator=generator
            )
            continue
        draws = torch.rand(size, device=device, generator=generator)
        if name in ("left", "right"):
            numbers = draws - 0.5
        else:
            numbers = (0.5 + draws) * (0.06 / 2 ** (0 if fmt.levels else fmt.bits))
        parts[name] = numbers.to(getattr(torch, dtype))
    return PackedTensor(fmt, shape, parts)


def build(
    weight: Weight, shape: tuple[int, int], device: torch.device, seed: int, dense: bool = True
) -> Built:
    """Make a weight; ``dense=False`` leaves the decoded one empty."""
    rows, cols = shape
    count = len(weight.specs)
    low_rank = None
    if weight.cut == "whole":
        packed = random_packed(weight.specs[0], shape, device, seed)
        coded = packed.coded() if packed.fmt.rank else packed
        pack = PlanePack.from_packed(coded, zero=weight.zero)
        plain = packed.dequantize() if dense else torch.empty(0, device=device)
        if packed.fmt.rank:
            low_rank = (packed.tensors["left"], packed.tensors["right"])
        return Built(pack, plain, low_rank)
    if weight.cut == "rows":
        shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).to(device)
        parts = []
        for i, (spec, some) in enumerate(zip(weight.specs, shuffled.chunk(count), strict=True)):
            packed = random_packed(spec, (len(some), cols), device, seed + i)
            parts.append((packed, some.sort().values))
        pack = PlanePack.from_rows(parts, rows)
        plain = torch.empty(shape if dense else 0, device=device)
        for packed, some in parts if dense else ():
            plain[some] = packed.dequantize()
        return Built(pack, plain, None)
    cells = -(-cols // 64)
    ends = [min(cols, 64 * (cells * (i + 1) // count)) for i in range(count)]
    if cols % 128 == 0 and cols // 128 >= count:
        ends = [128 * (cols // 128 * (i + 1) // count) for i in range(count)]
    blocks, found, start = [], [], 0
    for i, (spec, end) in enumerate(zip(weight.specs, ends, strict=True)):
        packed = random_packed(spec, (rows, end - start), device, seed + i)
        blocks.append(Block.of(packed, 0, start, weight.zero))
        found.append(packed)
        start = end
    plain = torch.cat([part.dequantize() for part in found], 1) if dense else torch.empty(0)
    return Built(PlanePack.from_blocks(blocks, shape), plain, None)


def copied(pack: PlanePack) -> PlanePack:
    """The same pack in other memory."""
    parts = {name: part.clone() for name, part in pack.tensors().items()}
    return replace(pack, **parts)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Case:
    """A product to check.

    Attributes:
        weight: The weight.
        shape: Its rows and columns.
        dtype: Of the activations.
        tokens: How many.
        splits: Parts of the columns; None for what the rule says, through the custom op.
        launch: All of how to launch instead.
        result: Dtype of the result where one of these is given.
        bias: Whether there is a bias.
        sparse: Whether there are sparse rows.
    """

    weight: Weight
    shape: tuple[int, int]
    dtype: torch.dtype
    tokens: int
    splits: int | None = None
    launch: Launch | None = None
    result: torch.dtype | None = None
    bias: bool = False
    sparse: bool = False

    @property
    def name(self) -> str:
        """All of it in words."""
        more = [f"splits {self.splits}" if self.splits else "", "bias" if self.bias else ""]
        more += ["sparse" if self.sparse else "", f"{self.launch}" if self.launch else ""]
        kind = str(self.dtype).removeprefix("torch.")
        words = [self.weight.name, f"{self.shape[0]}x{self.shape[1]}", kind, f"m={self.tokens}"]
        return " ".join([*words, *filter(None, more)])

    @property
    def by_rule(self) -> bool:
        """Whether the custom op chooses the launch."""
        return self.splits is None and self.launch is None

    @property
    def group(self) -> str:
        """The weight; cases of one are built together."""
        return f"{self.weight.name} {self.shape}"


def cases(tiny: bool = False) -> list[Case]:
    """Every width, kind of scale and mix, with tokens and dtypes in turn."""
    whole = (128, 128) if tiny else WHOLE
    found: list[Case] = []
    for bits in WIDTHS:
        chosen = ((1, 7, 70) if bits % 4 == 0 else (3,)) if tiny else TOKENS
        dtypes = (HALVES[bits % 2],) if tiny else HALVES
        weight = uniform(bits)
        found += [Case(weight, whole, d, m) for d, m in itertools.product(dtypes, chosen)]
        found += [Case(weight, whole, torch.float32, m) for m in ((2,) if tiny else (1, 33, 256))]
        some = dict(bias=True, splits=1)
        found += [Case(weight, whole, d, 4, result=d, **some) for d in dtypes]  # type: ignore[arg-type]
    found += _kinds(tiny)
    mixes = [*MIXES, Weight(("int1-g64", "int5-gc", "int6-g32-asym", "nf4-g64"), "rows")]
    mixes += [Weight(("int7-g64-asym", "int3-g32"), "columns", "half")]
    for weight, shape in itertools.product(
        mixes[1:3] if tiny else mixes, ODD[3:] if tiny else (ODD[3], whole)
    ):
        for dtype, m in ((HALVES[0], 5),) if tiny else itertools.product(HALVES, (1, 16, 64, 256)):
            found.append(Case(weight, shape, dtype, m, bias=True))
    for i, spec in enumerate(("nf4-g64", "nf4-gc", "int3-g64-asym+lr4", "nf4-g32+lr20")):
        for dtype, m in ((HALVES[i % 2], 3),) if tiny else itertools.product(HALVES, (3, 33, 80)):
            found.append(Case(Weight((spec,)), (70, 200), dtype, m, bias=i % 2 == 0))
    for dtype, m in itertools.product((*HALVES, torch.float32), (3,) if tiny else (3, 80)):
        found.append(Case(MIXES[1], ODD[3], dtype, m, sparse=True))
    return found


def _kinds(tiny: bool) -> Iterator[Case]:
    """Sizes of groups and kinds of zero points; widths, shapes and dtypes in turn."""
    kinds = itertools.product(("32", "64", "256", "c", "t"), ("", "-asym", "half"))
    for i, (group, kind) in enumerate(kinds):
        bits = 1 + (3 * i) % 8
        spec = f"int{bits}-g{group}{'-asym' if kind else ''}"
        weight = Weight((spec,), zero="half" if kind == "half" else "code")
        shape = ODD[i % len(ODD)]
        for m in () if tiny and i % 4 else (3,) if tiny else (4, 33):
            splits = 1 + 2 * (i % 2)
            yield Case(weight, shape, HALVES[i % 2], m, splits, result=torch.float32)


Operands = tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor] | None, Tensor]


def operands(case: Case, built: Built, device: torch.device, seed: int) -> Operands:
    """Inputs [M, K], bias, sparse rows, and these as a matrix [N, K]."""
    rows, cols = case.shape
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(case.tokens, cols, device=device, generator=generator).to(case.dtype)
    bias = None
    if case.bias:
        bias = torch.randn(rows, device=device, generator=generator).to(case.dtype)
    if not case.sparse:
        return x, bias, None, built.dense.new_zeros(())
    count = rows // 2
    row = torch.randint(rows, (count,), device=device, generator=generator).sort().values
    column = torch.randint(cols, (count,), device=device, generator=generator)
    values = torch.randn(count, device=device, generator=generator).half()
    starts = torch.searchsorted(row, torch.arange(rows + 1, device=device)).int()
    added = torch.zeros(rows, cols, device=device)
    added.index_put_((row, column), values.float(), accumulate=True)
    return x, bias, (starts, column.int(), values), added


def product(
    case: Case,
    built: Built,
    x: Tensor,
    bias: Tensor | None,
    sparse: tuple[Tensor, Tensor, Tensor] | None,
    processors: int,
) -> Tensor:
    """What the kernels make of operands."""
    if case.by_rule:
        return plane_linear(x, built.pack, bias, sparse, built.low_rank)
    launch = case.launch or rule(built.pack, len(x), processors)
    if case.splits is not None:
        launch = launch._replace(splits=case.splits)
    return multiply(x, built.pack, bias, Extras(), launch, case.result)


def expected(case: Case, built: Built, x: Tensor, bias: Tensor | None, added: Tensor) -> Tensor:
    """The same in float64 by torch, from the decoded weight."""
    exact = x.double() @ (built.dense.double() + added.double()).T
    return exact if bias is None else exact + bias.double()


def compiled_by(case: Case) -> str:
    """Cases with the same key need the same kernels."""
    path = "dense" if case.tokens > DECODE_TOKENS or case.dtype not in HALVES else "decode"
    block = max(8, min(32, 1 << (case.tokens - 1).bit_length())) if path == "decode" else 0
    splits = case.launch.splits if case.launch else case.splits
    kinds = (case.bias, case.sparse, splits == 1, case.result, (case.launch or ())[:3])
    return f"{case.group} {case.dtype} {block} {kinds}"


def launches(case: Case, device: torch.device, processors: int) -> None:
    """Launch every kernel that a case and its check need."""
    built = build(case.weight, case.shape, device, 0, dense=False)
    x, bias, sparse, _ = operands(case, built, device, 0)
    extras = Extras(*(sparse or (None,) * 3), *(built.low_rank or (None, None))[::-1])
    if not case.by_rule:
        product(case, built, x, bias, sparse, processors)
    elif case.tokens <= DECODE_TOKENS and case.dtype in HALVES:
        multiply(x, built.pack, bias, extras, rule(built.pack, len(x), processors))
    else:
        multiply_dense(x, built.pack, bias, extras, case.dtype)
    for dtype in {torch.float32, case.dtype}:
        dequantize_blocks(built.pack, 0, len(built.pack.table), dtype)


def error_of(found: Tensor, exact: Tensor) -> float:
    """The largest error over the largest magnitude; infinite where anything is not finite."""
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found.double() - exact).abs().max() / exact.abs().max())


def bound(case: Case, result: torch.dtype, interpreted: bool) -> float:
    """The largest error that passes; the interpreter cuts numbers off to bfloat16."""
    if case.dtype == torch.bfloat16 and interpreted:
        return 2e-2
    if case.tokens > DECODE_TOKENS or case.by_rule:
        return max(BOUNDS[case.dtype], BOUNDS[result])
    return BOUNDS[result]


def by_group(found: Sequence[Case]) -> Iterator[tuple[Weight, tuple[int, int], list[Case]]]:
    """Cases that share a weight."""
    groups: dict[str, list[Case]] = {}
    for case in found:
        groups.setdefault(case.group, []).append(case)
    for some in groups.values():
        yield some[0].weight, some[0].shape, some

"""Formats: what a weight is stored as, and how many bytes that takes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

from .._base.hints import did_you_mean
from .._base.registry import Registry

if TYPE_CHECKING:  # names, bytes and traits load no torch
    from torch import Tensor

    from .lines import Grid, Line


PER_CHANNEL = 0
PER_TENSOR = -1
GROUPS = {"32": 32, "64": 64, "128": 128, "256": 256, "c": PER_CHANNEL, "t": PER_TENSOR}
MAX_FLOAT16 = 65504.0
_ITEM_BYTES = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}

Layout = Literal["codes", "dense", "dequantize"]
Tensors = dict[str, tuple[tuple[int, ...], str]]  # shape and dtype name of every stored part


@dataclass(frozen=True, slots=True)
class Format:
    """One candidate representation of a weight matrix [rows, cols].

    A format is its name; everything else are traits, which its family derives from that name.
    Who uses formats asks for traits: nobody needs to know what families there are.

    >>> fmt = Format.parse("int4-g64-asym")
    >>> fmt.bits, fmt.group_size, fmt.symmetric, fmt.integer
    (4, 64, False, True)
    >>> 8 * fmt.stored_bytes((192, 576)) / (192 * 576)  # bits per weight: 4 + (16 + 4) / 64
    4.3125

    Attributes:
        name: The canonical spec, such as ``int4-g64-asym`` or ``bf16``.
        family: Name of the family that knows it: a file in ``families/``.
        bits: Bits per code, without scales and zero points.
        group_size: Weights per scale; ``PER_CHANNEL`` or ``PER_TENSOR`` for one per row or one
            for all.  Meaningless for ``floating``.
        symmetric: Whether groups have no zero point (or minimum) of their own.
        layout: What kernels find: ``codes`` (b bits each, row by row, with ``scale``, and ``zero``
            unless symmetric, as an integer format stores them), ``dense`` (plain numbers), or
            ``dequantize`` (whatever else: the family decodes it before the product).
        integer: Whether a weight is s * (c - z) and nothing else, with float16 scales s and
            integers z: what most runtimes take.
        floating: Whether weights are plain floats, each rounded by itself.
        block_size: Weights that rows are stored in multiples of.
        levels: What codes stand for instead of c - z [2^b], ascending.
        base: The format of the codes, if something is added to what they stand for.
        vector: Columns next to each other whose codes together stand for a point; 1 for none.
        rank: Of the low-rank correction ``left @ right`` that is added; 0 for none.
    """

    name: str
    family: str = field(compare=False)
    bits: int = field(compare=False)
    group_size: int = field(compare=False)
    symmetric: bool = field(compare=False)
    layout: Layout = field(default="dequantize", compare=False)
    integer: bool = field(default=False, compare=False)
    floating: bool = field(default=False, compare=False)
    block_size: int = field(default=1, compare=False)
    levels: tuple[float, ...] | None = field(default=None, compare=False, repr=False)
    base: Format | None = field(default=None, compare=False)
    rank: int = field(default=0, compare=False)
    vector: int = field(default=1, compare=False)

    @staticmethod
    def parse(spec: str) -> Format:
        """Read ``int4-g64-asym``, ``bf16``, ``q4_k``, ``nf4-g64``, ...: a name of any family.

        Raises:
            ValueError: If ``spec`` is no such name; the nearest ones are given.
        """
        return _parsed(spec)

    @staticmethod
    def of_integers(bits: int, group_size: int, symmetric: bool) -> Format:
        """The integer format with these properties.

        Raises:
            ValueError: If there is none.
        """
        group = {size: text for text, size in GROUPS.items()}.get(group_size, str(group_size))
        return Format.parse(f"int{bits}-g{group}{'' if symmetric else '-asym'}")

    def __str__(self) -> str:
        return self.name

    @property
    def zero_point(self) -> float:
        """The implicit zero point of a symmetric integer format: 2^(b-1).

        One bit is the exception: 1/2, so that its two levels are -s/2 and +s/2.  With the zero
        point 1 they would be -s and 0, which loses half of the weights.
        """
        return 0.5 if self.bits == 1 else float(2 ** (self.bits - 1))

    def groups(self, cols: int) -> int:
        """Scales per row of a matrix with ``cols`` columns; the last group may be short."""
        if self.block_size > 1:
            return math.ceil(cols / self.block_size) * (self.block_size // self.group_size)
        return math.ceil(cols / self.group_size) if self.group_size > 0 else 1

    def tensors(self, shape: tuple[int, int]) -> Tensors:
        """Shape and dtype name of every tensor that stores a [rows, cols] weight."""
        return family_of(self).tensors(self, shape)

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the serialized tensors of a [rows, cols] weight: the only memory formula."""
        return sum(
            math.prod(part) * _ITEM_BYTES[dtype] for part, dtype in self.tensors(shape).values()
        )


class Fitted(Protocol):
    """What a family keeps of a weight: with the original it gives the codes again.

    Scales and zero points (a ``Grid``) for most; whatever else a family needs to render some rows
    of the weight exactly as they are stored.
    """

    def rows(self, rows: slice | Tensor) -> Self:
        """The same for some rows of the weight."""
        ...


F = TypeVar("F", bound="Fitted | None")


class Family(ABC, Generic[F]):
    """One kind of format: its names, its bytes, its traits, and what weights become in it.

    The first line of the docstring, ``grammar`` and the first reference are what ``bitplan
    formats`` prints.  Names and bytes must be known without torch, so import that within methods.
    Families of codes with scales subclass ``families/_codes.py`` and have little left to say.

    Attributes:
        grammar: What its names look like.
        examples: A few names, which the tests of all families use.
    """

    grammar: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]

    @abstractmethod
    def parse(self, text: str) -> Format | None:
        """The format of this name, with its traits; None if it is none of this family."""

    def names(self) -> Iterable[str]:
        """Canonical names to compare a mistyped one with."""
        return self.examples

    @abstractmethod
    def tensors(self, fmt: Format, shape: tuple[int, int]) -> Tensors:
        """Shape and dtype name of every tensor that stores a [rows, cols] weight."""

    def check(self, weight: Tensor, fmt: Format) -> None:
        """Refuse weights that the format cannot hold.

        Raises:
            ValueError: If there is NaN or Inf, or a weight too large.
        """
        low, high = (float(end) for end in weight.aminmax())
        largest = max(-low, high)
        if not math.isfinite(largest):
            raise ValueError(f"The weight contains {largest} and cannot be quantized.")
        if self.reach(fmt, low, high) > MAX_FLOAT16:
            raise ValueError(
                f"A weight of {largest:g} does not fit {fmt}: float16 ends at {MAX_FLOAT16:g}. "
                "Keep it in bf16 or fp32."
            )

    @abstractmethod
    def reach(self, fmt: Format, low: float, high: float) -> float:
        """The largest float16 number that weights from ``low`` to ``high`` take."""

    @abstractmethod
    def fit(self, weight: Tensor, fmt: Format, importance: Tensor | None = None) -> F:
        """What rounding to nearest keeps of a weight [rows, cols]: the best scales and so on.

        Args:
            weight: The weight, float32.
            fmt: The format.
            importance: What a squared error of each weight costs, float32 [cols] or [rows, cols],
                not negative: the diagonal of a curvature. Only its proportions among weights that
                share a scale count. None: large weights count more, see ``methods/rtn.py``.

        A family without this last parameter is fitted without importance; :func:`fit` asks any.
        """

    def fit_under(
        self, weight: Tensor, fmt: Format, hessian: Tensor, rows: Tensor | None, damping: float
    ) -> F:
        """What is kept of a weight rounded under a curvature, for a family that does so itself.

        Families whose codes lie on lines leave that to rounding methods.

        Args:
            weight: The weight [rows, cols], float32.
            fmt: The format.
            hessian: H [cols, cols], float32.
            rows: What an error in a row costs, float32 [rows]; None for all the same.
            damping: What is best added to the diagonal of H, as a multiple of its mean.

        Raises:
            ValueError: If the family does not.
        """
        raise ValueError(f"{fmt} is rounded by methods.")

    def refit(self, weight: Tensor, fmt: Format, grid: F, codes: Tensor, hessian: Tensor) -> F:
        """Better scales for codes that are given; as they are, unless a family has better ones.

        Args:
            weight: The original weight W [rows, cols], float32.
            fmt: The format.
            grid: What the codes were chosen for.
            codes: uint8 [rows, cols]; ``store`` makes them parts with the result.
            hessian: H [cols, cols], float32, symmetric, without negative eigenvalues.

        Returns:
            A grid with which ``E H E^T`` is in no row E of W - Q larger than with the present one.
        """
        return grid

    @abstractmethod
    def render(self, weight: Tensor, fmt: Format, fitted: F, out: Tensor) -> None:
        """Write what the format makes of rows of a weight: decoded, bit for bit as stored.

        Args:
            weight: [rows, cols], float32.
            fmt: The format.
            fitted: What was kept of these rows.
            out: float32 [rows, cols]; may be ``weight`` itself.
        """

    @abstractmethod
    def pack(self, weight: Tensor, fmt: Format, fitted: F) -> dict[str, Tensor]:
        """The stored parts of a weight [rows, cols], those of :meth:`tensors`."""

    def store(self, codes: Tensor, fmt: Format, grid: Grid) -> dict[str, Tensor]:
        """The stored parts for given codes, uint8 [rows, cols], of a grid.

        Raises:
            ValueError: If the format is not one of codes alone.
        """
        raise ValueError(f"{fmt} is not made of codes alone.")

    def rescale(self, fmt: Format, tensors: Mapping[str, Tensor], grid: Grid) -> dict[str, Tensor]:
        """The stored parts of the same codes with the scales of another grid.

        Raises:
            ValueError: If there are no codes.
        """
        raise ValueError(f"{fmt} has no codes, and so no scales.")

    @abstractmethod
    def grid(self, fmt: Format, tensors: Mapping[str, Tensor]) -> Grid | None:
        """The scales and zero points of the codes in stored parts; None without codes."""

    def fitted(self, fmt: Format, tensors: Mapping[str, Tensor]) -> Fitted | None:
        """What stored parts keep of their weight: what :meth:`render` takes."""
        return self.grid(fmt, tensors)

    @abstractmethod
    def decode(
        self, fmt: Format, cols: int, tensors: Mapping[str, Tensor], rows: slice | Tensor
    ) -> Tensor:
        """Some rows of the weight in stored parts: [n, cols], float32 or as they are stored."""

    def line(self, fmt: Format, grid: Grid) -> Line:
        """What the codes of a grid stand for.

        Raises:
            ValueError: If the format is not one of codes alone.
        """
        raise ValueError(f"{fmt} is not made of codes alone.")


FAMILIES: Registry[type[Family[Any]]] = Registry("family", f"{__package__}.families", "families")


_INSTANCES: dict[str, Family[Any]] = {}  # no functools.cache: compilers of torch look into it


def family(name: str) -> Family[Any]:
    """The family of this name."""
    if name not in _INSTANCES:
        _INSTANCES[name] = FAMILIES.get(name)()
    return _INSTANCES[name]


def family_of(fmt: Format) -> Family[Any]:
    """The family of a format."""
    return family(fmt.family)


def fit(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Fitted | None:
    """What its family keeps of a weight; with importance, if ``Family.fit`` takes any there."""
    found: Fitted | None
    own = family_of(fmt).fit
    if importance is None or "importance" not in signature(own).parameters:
        found = own(weight, fmt)
    else:
        found = own(weight, fmt, importance=importance)
    return found


def families() -> list[Family[Any]]:
    """All families."""
    return [family(name) for name in FAMILIES.names()]


@cache
def _parsed(spec: str) -> Format:
    for names in (FAMILIES.built_in, FAMILIES.names):  # what else is installed takes longer to find
        for name in names():
            if fmt := family(name).parse(spec):
                return fmt
    known = [name for each in families() for name in each.names()]
    grammar = "; ".join(each.grammar for each in families())
    raise ValueError(
        f"Unknown format {spec!r}.{did_you_mean(spec, [*known, 'keep'], 3)} "
        f"The grammar is {grammar}."
    )


def resolve_formats(specs: Sequence[str], source: str) -> tuple[Format, ...]:
    """Parse format names, dropping duplicates and keeping the order.

    Args:
        specs: Format names; ``keep`` means the dtype the model came in.
        source: That dtype, as a format (``bf16``) or dtype name (``bfloat16``).

    Returns:
        The distinct formats.

    Raises:
        ValueError: If a name is unknown or nothing is left.
    """
    formats = dict.fromkeys(Format.parse(source if spec == "keep" else spec) for spec in specs)
    if not formats:
        raise ValueError("No format was given. Name at least one, for example 'int4-g64-asym'.")
    return tuple(formats)

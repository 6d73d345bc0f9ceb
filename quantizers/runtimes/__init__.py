"""What a runtime can read and run, as data: one TOML file per runtime beside this one."""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from ..._base.files import read_toml
from ..._base.hints import did_you_mean
from ..format import PER_CHANNEL, PER_TENSOR, Format

FOLDER = Path(__file__).resolve().parent

Group = Literal["g32", "g64", "g128", "g256", "gc", "gt"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Integers(_Strict):
    """A set of integer formats: every combination of these bits, groups and zero points.

    Attributes:
        bits: Bits per code.
        groups: Weights per scale, as in a format's name.
        zero_points: ``symmetric``, ``asymmetric`` or both.
    """

    bits: tuple[int, ...] = Field(min_length=1)
    groups: tuple[Group, ...] = Field(min_length=1)
    zero_points: tuple[Literal["symmetric", "asymmetric"], ...] = Field(min_length=1)


class StoredTensor(_Strict):
    """A tensor that a runtime's files hold for every matrix in an integer format.

    Elements are packed LSB-first along a row or a column, and each such line is filled up to whole
    words; a short last group of weights is filled up before. With whole rows as groups (``gc``)
    there is one element per row and group, so these are packed along the column in any case.

    Attributes:
        tensor: The last part of its name.
        per: What it has one element of: a ``weight``, a ``group``, a ``column`` or the ``matrix``.
        bits: Bits of an element; None for those of a code.
        along: What elements are packed along.
        word: Bits that a line is filled up to a multiple of.
        only: The formats that have it, by their zero points; None for all.
    """

    tensor: str
    per: Literal["weight", "group", "column", "matrix"]
    bits: PositiveInt | None = None
    along: Literal["row", "column"] = "row"
    word: PositiveInt = 1
    only: Literal["symmetric", "asymmetric"] | None = None

    def nbytes(self, fmt: Format, shape: tuple[int, int]) -> int:
        """Bytes of the tensor of a [rows, cols] matrix; 0 if the format has none."""
        if self.only not in (None, "symmetric" if fmt.symmetric else "asymmetric"):
            return 0
        rows, cols = shape
        lines, length = {
            "weight": (rows, fmt.groups(cols) * fmt.group_size if fmt.group_size > 0 else cols),
            "group": (rows, fmt.groups(cols)),
            "column": (1, cols),
            "matrix": (1, 1),
        }[self.per]
        if self.along == "column" or (self.per == "group" and fmt.group_size == PER_CHANNEL):
            lines, length = length, lines
        words = math.ceil(length * (self.bits or fmt.bits) / self.word)
        return math.ceil(lines * words * self.word / 8)


class Rules(_Strict):
    """The limits of one runtime.

    Attributes:
        name: The file's name without ``.toml``.
        description: What the runtime is and which files it reads.
        source: Versions and pages the rules come from.
        integers: The integer formats it runs; one set that holds a format is enough.
        blocks: The block formats of llama.cpp it runs; each needs rows of whole blocks.
        floats: The formats it takes for matrices that are not quantized.
        columns_multiple_of: Divides the input features of every quantized matrix.
        rows_multiple_of: Divides its output features.
        whole_groups: Whether the last group of a row must be full.
        row_parts: Whether some rows of a matrix may have another format than the others.
        unquantized: Globs on modules that stay floats.
        layers: The kinds of layers that it quantizes, as a profile names them; all others stay
            floats.
        fused: Last names of modules that it runs as one matrix and that must share one format.
        storage: The tensors its files hold for a matrix of integers; empty where the bytes of
            bitplan's own count.
        candidates: The formats to profile for it by default.
        notes: What else to know before choosing it.
    """

    name: str
    description: str
    source: str
    integers: tuple[Integers, ...] = ()
    blocks: tuple[str, ...] = ()
    floats: tuple[Literal["bf16", "fp16", "fp32"], ...]
    columns_multiple_of: PositiveInt = 1
    rows_multiple_of: PositiveInt = 1
    whole_groups: bool = False
    row_parts: bool = False
    unquantized: tuple[str, ...] = ()
    layers: tuple[str, ...] = ("linear", "dense linear", "embedding", "tied embedding")
    fused: tuple[tuple[str, ...], ...] = ()
    storage: tuple[StoredTensor, ...] = ()
    candidates: tuple[str, ...] = Field(min_length=1)
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for names in self.fused:
            if len(names) < 2:
                raise ValueError(f"fused: {list(names)} needs at least two names")
        if self.storage and not any(stored.per == "weight" for stored in self.storage):
            raise ValueError("storage: no tensor has an element per weight")
        for name in self.candidates:
            if name != "keep" and (reason := self._format_refusal(Format.parse(name))):
                raise ValueError(f"candidates: {name} is refused ({reason})")
        return self

    @classmethod
    def load(cls, name: str) -> Rules:
        """The rules of a runtime by name, such as ``vllm``.

        Raises:
            ValueError: If there are no such rules, or their file is not valid.
        """
        if name not in names():
            hint = did_you_mean(name, names())
            raise ValueError(f"Unknown runtime {name!r}.{hint} Available: {', '.join(names())}.")
        return cls.read(FOLDER / f"{name}.toml")

    @classmethod
    def read(cls, path: Path) -> Rules:
        """The rules in a TOML file.

        Raises:
            ValueError: If it is not TOML or breaks the schema; says where.
        """
        return read_toml(path, cls, "rules")

    @property
    def fusion_groups(self) -> tuple[str, ...]:
        """The fused modules as ``--group`` writes them: ``q_proj,k_proj,v_proj``."""
        return tuple(",".join(names) for names in self.fused)

    def all_formats(self) -> tuple[Format, ...]:
        """Every format it takes for some matrix."""
        integers = (
            f"int{bits}-{group}{'' if zero_point == 'symmetric' else '-asym'}"
            for s in self.integers
            for bits, group, zero_point in product(s.bits, s.groups, s.zero_points)
        )
        return tuple(map(Format.parse, dict.fromkeys((*integers, *self.blocks, *self.floats))))

    @property
    def counted(self) -> bool:
        """Whether it is known how many bytes its files take: else those of bitplan count."""
        return bool(self.storage or self.blocks)

    def stored_bytes(self, fmt: Format, shape: tuple[int, int]) -> int:
        """Bytes of a [rows, cols] matrix in a file for this runtime."""
        if not fmt.integer or not self.storage:
            return fmt.stored_bytes(shape)
        return sum(stored.nbytes(fmt, shape) for stored in self.storage)

    def must_stay_float(self, name: str) -> bool:
        """Whether a module of this name cannot be quantized."""
        return any(fnmatchcase(name, glob) for glob in self.unquantized)

    def layer_refusal(self, fmt: Format, layer: str) -> str | None:
        """Why a kind of layer cannot take a format; None if it can."""
        if fmt.floating or layer in self.layers:
            return None
        return f"layers: it quantizes {', '.join(self.layers)}, not {layer}"

    def refusal(self, fmt: Format, shape: tuple[int, int], name: str) -> str | None:
        """Why a matrix cannot take a format; None if it can.

        Args:
            fmt: The format.
            shape: ``(rows, cols)``, rows = output features.
            name: Module or alias name.

        Returns:
            The reason, which begins with the name of the rule.
        """
        if (reason := self._format_refusal(fmt)) or fmt.floating:
            return reason
        if self.must_stay_float(name):
            return f"unquantized: {name} must stay one of {', '.join(self.floats)}"
        rows, cols = shape
        group = fmt.group_size if self.whole_groups and fmt.group_size > 0 else 1
        for rule, size, side, divisor in (
            ("columns_multiple_of", cols, "input", self.columns_multiple_of),
            ("rows_multiple_of", rows, "output", self.rows_multiple_of),
            ("whole_groups", cols, "input", group),
            ("blocks", cols, "input", fmt.block_size),
        ):
            if size % divisor:
                return f"{rule}: {size} {side} features are no multiple of {divisor}"
        return None

    def _format_refusal(self, fmt: Format) -> str | None:
        if fmt.floating:
            taken = ", ".join(self.floats) or "no float format"
            return None if fmt.name in self.floats else f"floats: it takes {taken}, not {fmt.name}"
        if fmt.block_size > 1:
            taken = ", ".join(self.blocks) or "no blocks of llama.cpp"
            return None if fmt.name in self.blocks else f"blocks: it takes {taken}, not {fmt.name}"
        return self._integer_refusal(fmt)

    def _integer_refusal(self, fmt: Format) -> str | None:
        if not fmt.integer:
            parts = ("integers", self.integers), ("blocks of llama.cpp", self.blocks)
            taken = ", ".join([name for name, held in parts if held] + ["floats"])
            return f"families: it takes {taken}, not {fmt.name}"
        sets = [s for s in self.integers if fmt.bits in s.bits]
        if not sets:
            taken = ", ".join(
                str(bits) for bits in sorted({b for s in self.integers for b in s.bits})
            )
            return f"bits: it takes {taken or 'no integers'}, not {fmt.bits}"
        group = _group(fmt)
        with_group = [s for s in sets if group in s.groups]
        if not with_group:
            taken = ", ".join(dict.fromkeys(g for s in sets for g in s.groups))
            return f"groups: at {fmt.bits} bits it takes {taken}, not {group}"
        zero_point = "symmetric" if fmt.symmetric else "asymmetric"
        if not any(zero_point in s.zero_points for s in with_group):
            return f"zero_points: at {fmt.bits} bits and {group} it takes no {zero_point} format"
        return None


@cache
def byte_count(runtime: str | None) -> Callable[[Format, tuple[int, int]], int]:
    """What counts the bytes of a matrix [rows, cols] in a format.

    Args:
        runtime: The runtime that it is stored for; None for bitplan's own packed folders.

    Raises:
        ValueError: If there are no rules for the runtime.
    """
    return Format.stored_bytes if runtime is None else Rules.load(runtime).stored_bytes


def names() -> list[str]:
    """The runtimes there are rules for."""
    return sorted(path.name.removesuffix(".toml") for path in FOLDER.glob("*.toml"))


def _group(fmt: Format) -> str:
    special = {PER_CHANNEL: "gc", PER_TENSOR: "gt"}
    return special.get(fmt.group_size, f"g{fmt.group_size}")

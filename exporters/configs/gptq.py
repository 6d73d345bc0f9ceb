"""What checkpoints in the layout of GPTQ have in common: AutoRound writes it, too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...quantizers.format import Format
from ..layouts.packing import from_gptq
from ..source import Source
from ..targets import Stored
from .folder import TensorFiles

PARTS = ("qweight", "qzeros", "scales", "g_idx")

# Runtimes that run several matrices as one look up the fused name, so a pattern for one of them
# must match it, too: last names -> name of what they become.
FUSED = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
}


def read_layers(
    path: Path, formats: Iterable[tuple[str, Format]], offset_zeros: bool
) -> Iterator[Stored]:
    """The matrices of a folder.

    Args:
        path: The folder.
        formats: Name and format of every packed module, as the configuration has it.
        offset_zeros: Whether the file stores z - 1.

    Raises:
        ValueError: If a tensor does not have the size its format gives it.
    """
    files = TensorFiles(path)
    for module, fmt in formats:
        words, scales = (files.shape(f"{module}.{part}") for part in ("qweight", "scales"))
        shape = (words[1], words[0] * 32 // fmt.bits)
        if scales != [fmt.groups(shape[1]), shape[0]]:
            raise ValueError(
                f"{path}: {module!r} is {words} words and {scales} scales, which is no {fmt} "
                f"matrix {list(shape)}: the configuration belongs to other weights."
            )
        nbytes = sum(tensor.nbytes for tensor in files.parts(module, PARTS).values())

        def weight(module: str = module, fmt: Format = fmt) -> Tensor:
            tensors = files.parts(module, PARTS)
            tensors["scales"] = tensors["scales"].half()
            return from_gptq(tensors, fmt, offset_zeros).dequantize()

        yield Stored(module, shape, fmt, nbytes, weight)


def read_formats(
    path: Path, config: Mapping[str, Any], override: Callable[[str], Mapping[str, Any]]
) -> Iterator[tuple[str, Format]]:
    """Name and format of every packed module of a folder; a group size of -1 is a whole row.

    Args:
        path: The folder.
        config: Its quantization_config.
        override: What that says of a module in particular.

    Raises:
        ValueError: If the configuration lacks an entry, or a module has no format of ours.
    """
    for name in TensorFiles(path).modules_with("qweight"):
        entry = {**config, **override(name)}
        if lacking := {"bits", "group_size", "sym"} - entry.keys():
            raise ValueError(f"{path}: the quantization_config lacks {min(lacking)!r}.")
        bits, size = entry["bits"], entry["group_size"]
        try:
            fmt = Format.of_integers(bits, max(size, 0), entry["sym"])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: {name!r} has {bits} bits by groups of {size}, for which bitplan has no "
                "format."
            ) from error
        yield name, fmt


def group_size(fmt: Format) -> int:
    """The group size as these configurations write it: -1 for a whole row."""
    return fmt.group_size if fmt.group_size > 0 else -1


def most_used(source: Source) -> Format:
    """The integer format of the most weights: what the configuration takes where it says nothing.

    Raises:
        ValueError: If the plan has no integer format.
    """
    weights: dict[Format, int] = {}
    for name, (rows, cols) in source.shapes.items():
        fmt = source.formats[name]
        if fmt.integer:
            weights[fmt] = weights.get(fmt, 0) + rows * cols
    if not weights:
        raise ValueError("The plan keeps every matrix as it is: there is nothing to quantize.")
    return max(weights, key=weights.__getitem__)


def name_pattern(name: str, agreeing: Iterable[str]) -> str:
    """A regular expression for a module, and for what a runtime fuses it into.

    Args:
        name: Module name.
        agreeing: The modules that have its format. The fused name is part of the pattern only if
            all that are fused are among them, for else it would speak for the others.
    """
    parent, _, last = name.rpartition(".")
    prefix, among = (f"{parent}." if parent else ""), set(agreeing)
    for members, fused in FUSED.items():
        if last in members and among.issuperset(prefix + member for member in members):
            return f"^{re.escape(prefix)}({last}|{fused})$"
    return f"^{re.escape(name)}$"

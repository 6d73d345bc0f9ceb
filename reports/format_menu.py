"""What formats cost and lose: bits, errors on normal weights, and what runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from ..kernels import cpu
from ..quantizers import runtimes
from ..quantizers.candidates import INTEGERS, NORMAL
from ..quantizers.format import Format
from ..quantizers.grid import render
from ..quantizers.methods.rtn import fit_grid

SAMPLE = (1024, 256)  # weights that errors are measured on
OTHERS = ("int2-g64", "int3-g64", "int4-g64", "nf4-g64", "q2_k", "q3_k", "q4_k", "iq4_xs", "mxfp4")
SHOWN = (*INTEGERS, *OTHERS, *NORMAL)


@dataclass(frozen=True, slots=True)
class Facts:
    """One format.

    Attributes:
        fmt: The format.
        bits: Per weight of a matrix, with scales and padding.
        error: Squared error relative to that of zeros, of normal weights rounded to nearest on
            scales with the least squared error.
        of_bound: The error times ``4^bits``: over the least that as many bits allow.
        runtimes: Those whose rules take it for such a matrix.
        cpu: ``fused`` where a compiled kernel reads the codes, else ``decoded`` before the product.
        gpu: Likewise by Triton.
    """

    fmt: Format
    bits: float
    error: float
    of_bound: float
    runtimes: tuple[str, ...]
    cpu: str
    gpu: str

    @staticmethod
    def of(fmt: Format, shape: tuple[int, int], sample: Tensor | None = None) -> Facts:
        """Those of a format for matrices [rows, cols].

        Args:
            fmt: The format.
            shape: (rows, cols).
            sample: Normal weights; by default ``SAMPLE`` of them, always the same.

        References:
            Shannon (1959), "Coding theorems for a discrete source with a fidelity criterion": no
            code of b bits has a relative squared error below ``4^-b`` on normal weights.
        """
        weight = normal() if sample is None else sample
        found = render(weight, fmt, fit_grid(weight, fmt, torch.ones(weight.shape[1])))
        error = float((found - weight).square().sum() / weight.square().sum())
        bits = 8 * fmt.stored_bytes(shape) / (shape[0] * shape[1])
        takers = [name for name in runtimes.names() if _takes(name, fmt, shape)]
        plain = fmt.base or fmt
        return Facts(
            fmt,
            bits,
            error,
            error * 4**bits,
            tuple(takers),
            "fused" if cpu.takes(plain) else "decoded",
            "fused" if fmt.layout == "codes" else "decoded",
        )


def _takes(runtime: str, fmt: Format, shape: tuple[int, int]) -> bool:
    return runtimes.Rules.load(runtime).refusal(fmt, shape, "layer") is None


def normal(seed: int = 0) -> Tensor:
    """Normal weights [1024, 256]."""
    return torch.randn(SAMPLE, generator=torch.Generator().manual_seed(seed))


def facts_table(shape: tuple[int, int], names: Sequence[str] = SHOWN) -> Table:
    """Formats by their bits, for matrices [rows, cols]."""
    table = Table(
        *("format", "bits per weight", "squared error", "x bound", "CPU", "GPU", "runtimes"),
        title=f"Formats of a matrix {shape[0]} x {shape[1]}, and what they lose of normal weights",
    )
    sample = normal()
    table.columns[0].no_wrap = True
    found = [Facts.of(Format.parse(name), shape, sample) for name in names]
    for facts in sorted(found, key=lambda facts: facts.bits):
        table.add_row(
            facts.fmt.name,
            f"{facts.bits:.4f}",
            f"{facts.error:.5f}",
            f"{facts.of_bound:.2f}",
            facts.cpu,
            facts.gpu,
            ", ".join(facts.runtimes) or "bitplan",
        )
    return table

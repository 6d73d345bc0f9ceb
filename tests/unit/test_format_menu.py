"""What `bitplan formats --shape` says: bits, losses and who runs a format."""

from __future__ import annotations

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bitplan import __main__ as program
from bitplan.quantizers.format import Format
from bitplan.reports.format_menu import Facts, facts_table, normal


@pytest.mark.parametrize(
    ("name", "error", "cpu", "gpu"),
    [
        ("nl3-g64", 0.0293, "decoded", "fused"),
        ("vq2-g64", 0.1015, "decoded", "decoded"),
        ("int4-g64-asym", 0.0076, "fused", "fused"),
    ],
)
def test_facts_of_a_format(name: str, error: float, cpu: str, gpu: str) -> None:
    fmt = Format.parse(name)
    facts = Facts.of(fmt, (64, 512), normal()[:256])
    assert facts.bits == 8 * fmt.stored_bytes((64, 512)) / (64 * 512)
    assert facts.error == pytest.approx(error, rel=0.03)
    assert facts.of_bound == pytest.approx(facts.error * 4**facts.bits)
    assert (facts.cpu, facts.gpu) == (cpu, gpu)
    assert bool(facts.runtimes) == fmt.integer


def test_a_shape_that_is_none_is_refused() -> None:
    refused = CliRunner().invoke(program.app, ["formats", "--shape", "64"])
    assert "--shape is '64': write rows x columns" in str(refused.exception)


def test_formats_are_listed_by_their_bits() -> None:
    console = Console(width=200, record=True)
    console.print(facts_table((32, 96), ("int3-g64", "nl2-g64")))
    text = console.export_text()
    assert text.index("nl2-g64") < text.index("int3-g64")
    assert "2.3333" in text  # 24 bytes of codes and 4 of scales for 96 weights

"""Format names, layouts and the byte formula."""

import pickle
import subprocess
import sys
from typing import Any

import pytest

from bitplan.quantizers.candidates import expanded
from bitplan.quantizers.format import (
    PER_CHANNEL,
    PER_TENSOR,
    Family,
    Format,
    families,
    resolve_formats,
)
from bitplan.quantizers.runtimes import Rules


def test_parse_reads_every_field() -> None:
    fmt = Format.parse("int4-g64-asym")
    assert (fmt.family, fmt.bits, fmt.group_size, fmt.symmetric) == ("integers", 4, 64, False)
    assert fmt.integer and not fmt.floating and fmt.layout == "codes"
    assert str(fmt) == fmt.name == "int4-g64-asym"
    assert Format.parse("int8-gc").group_size == PER_CHANNEL
    assert Format.parse("int8-gt").group_size == PER_TENSOR
    assert Format.parse("bf16").floating and not Format.parse("bf16").integer
    assert Format.parse("q4_k").block_size == 256 and not Format.parse("q4_k").integer


def test_integer_is_the_inverse_of_the_name() -> None:
    for spec in ("int4-g64-asym", "int3-gc", "int1-gt-asym", "int8-g256"):
        fmt = Format.parse(spec)
        assert Format.of_integers(fmt.bits, fmt.group_size, fmt.symmetric) == fmt


@pytest.mark.parametrize("spec", ["int9-g64", "int4-g48", "int4", "int4-g64-sym", "", "INT4-g64"])
def test_unknown_names_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"Unknown format .* The grammar is"):
        Format.parse(spec)


def test_unknown_names_get_near_ones() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'int4-g64-asym'"):
        Format.parse("int4-g64-asymm")


def test_unknown_names_get_the_grammar_of_every_family() -> None:
    with pytest.raises(ValueError, match=r"Unknown format 'nf4-g65'. Did you mean 'nf4-g64'") as e:
        Format.parse("nf4-g65")
    for family in families():
        assert family.grammar in str(e.value)


@pytest.mark.parametrize("spec", ["nf4-gt", "int4-g64+lr0", "bf16+lr16", "q4_k+lr8", "mxfp6"])
def test_what_no_family_has_is_unknown(spec: str) -> None:
    with pytest.raises(ValueError, match="Unknown format"):
        Format.parse(spec)


@pytest.mark.parametrize("family", families(), ids=lambda family: type(family).__name__)
def test_every_family_reads_its_own_names(family: Family[Any]) -> None:
    for name in {*family.examples, *family.names()}:
        fmt = Format.parse(name)
        assert Format.parse(fmt.name) == fmt == pickle.loads(pickle.dumps(fmt))
        assert fmt.stored_bytes((5, 300)) > 0


def test_names_bytes_and_traits_load_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from bitplan.quantizers.format import Format, families\n"
        "for family in families():\n"
        "    for name in family.examples:\n"
        "        Format.parse(name).stored_bytes((5, 100))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("spec", "bits_per_weight"),
    [
        ("int4-g64-asym", 4.3125),  # 4 + (16 + 4) / 64
        ("int4-g64", 4.25),
        ("int3-g64-asym", 3.296875),
        ("int2-g32-asym", 2.5625),
        ("int8-gc", 8 + 16 / 576),
        ("bf16", 16),
        ("fp32", 32),
    ],
)
def test_bits_per_weight(spec: str, bits_per_weight: float) -> None:
    shape = (192, 576)
    assert 8 * Format.parse(spec).stored_bytes(shape) / (192 * 576) == bits_per_weight


def test_layout_of_a_short_last_group() -> None:
    assert Format.parse("int3-g64-asym").tensors((5, 100)) == {
        "codes": ((5, 38), "uint8"),  # ceil(300 / 8) bytes per row
        "scale": ((5, 2), "float16"),
        "zero": ((4,), "uint8"),  # ceil(10 * 3 / 8)
    }
    assert Format.parse("int5-gt-asym").tensors((5, 100)) == {
        "codes": ((5, 63), "uint8"),
        "scale": ((1, 1), "float16"),
        "zero": ((1,), "uint8"),
    }


def test_resolve_formats() -> None:
    formats = resolve_formats(["int4-g64", "keep", "bf16", "int4-g64"], "bfloat16")
    assert [fmt.name for fmt in formats] == ["int4-g64", "bf16"]
    assert resolve_formats(["keep"], "float16") == (Format.parse("fp16"),)
    with pytest.raises(ValueError, match="No format was given"):
        resolve_formats([], "bf16")


def test_menus_stand_for_formats() -> None:
    """By name, or by that of a runtime; what is named twice is there once."""
    integers = resolve_formats(expanded(["int"]), "bf16")
    assert all(fmt.integer or fmt.name == "bf16" for fmt in integers)
    assert resolve_formats(expanded(["default"]), "float16")[:-1] == integers[:-1]
    every = [fmt.name for fmt in resolve_formats(expanded(["all", "tcq3"]), "bf16")]
    assert {"nl3-g64", "vq2-g64", "tcq4", "int4-g64-asym", "bf16"} <= {*every}
    assert len(every) == len({*every})
    rules = Rules.load("llama.cpp")
    assert expanded(["llama.cpp", "bf16"]) == (*rules.candidates, "bf16")
    with pytest.raises(ValueError, match="Unknown format 'alll'"):
        resolve_formats(expanded(["alll"]), "bf16")

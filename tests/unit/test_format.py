"""Format names, layouts and the byte formula."""

import pytest

from bitplan.quantizers.format import PER_CHANNEL, PER_TENSOR, Format, resolve_formats


def test_parse_reads_every_field() -> None:
    fmt = Format.parse("int4-g64-asym")
    assert (fmt.kind, fmt.bits, fmt.group_size, fmt.symmetric) == ("int", 4, 64, False)
    assert str(fmt) == fmt.name == "int4-g64-asym"
    assert Format.parse("int8-gc").group_size == PER_CHANNEL
    assert Format.parse("int8-gt").group_size == PER_TENSOR
    assert Format.parse("bf16").kind == "float"


def test_integer_is_the_inverse_of_the_name() -> None:
    for spec in ("int4-g64-asym", "int3-gc", "int1-gt-asym", "int8-g256"):
        fmt = Format.parse(spec)
        assert Format.integer(fmt.bits, fmt.group_size, fmt.symmetric) == fmt


@pytest.mark.parametrize("spec", ["int9-g64", "int4-g48", "int4", "int4-g64-sym", "", "INT4-g64"])
def test_unknown_names_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"Unknown format .* The grammar is"):
        Format.parse(spec)


def test_unknown_names_get_near_ones() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'int4-g64-asym'"):
        Format.parse("int4-g64-asymm")


@pytest.mark.parametrize(
    "spec", ["nf4-g64", "mxfp6", "nvfp4", "cb3-gc", "int4-g64+sp0.5", "bf16+lr16"]
)
def test_formats_of_later_versions_say_so(spec: str) -> None:
    with pytest.raises(ValueError, match="not available in this version"):
        Format.parse(spec)


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
    with pytest.raises(ValueError, match="No format was given"):
        resolve_formats([], "bf16")

"""Runtime rules: the files that ship, what they refuse and why, and damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitplan.quantizers import runtimes as rules
from bitplan.quantizers.format import Format
from bitplan.quantizers.runtimes import Rules

GOOD = """
description = "d"
source = "s"
floats = ["bf16"]
columns_multiple_of = 32
rows_multiple_of = 8
whole_groups = true
unquantized = ["*embed*", "lm_head"]
fused = [["q", "k", "v"]]
candidates = ["int4-g64", "keep"]

[[integers]]
bits = [4]
groups = ["g64", "gc"]
zero_points = ["symmetric", "asymmetric"]

[[integers]]
bits = [8]
groups = ["g128"]
zero_points = ["symmetric"]
"""


SCALES = 'source = "s"\nstorage = [{ tensor = "scales", per = "group", bits = 16 }]'


def made(tmp_path: Path, text: str = GOOD) -> Rules:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return Rules.read(path)


@pytest.mark.parametrize("name", rules.names())
def test_shipped_rules_are_valid_and_say_where_they_come_from(name: str) -> None:
    found = Rules.load(name)
    assert found.name == name
    assert found.description
    assert any(digit in found.source for digit in "0123456789")
    assert "https://" in found.source
    assert "keep" in found.candidates
    assert found.refusal(Format.parse("int7-gt"), (4096, 4096), "model.layers.0.mlp.up_proj")


def test_the_runtimes_of_the_command_line_exist() -> None:
    wanted = {"vllm", "llama.cpp", "mlx", "onnx", "autoround", "gptq", "transformers"}
    assert wanted <= set(rules.names())


@pytest.mark.parametrize(  # one row per runtime: what was seen to load, what was seen to fail
    ("name", "takes", "refuses"),
    [
        ("vllm", ["int4-g32", "int4-g128-asym", "int8-gc", "bf16"], ["int3-g32", "int4-g256"]),
        ("vllm-cpu", ["int4-g32", "int4-g128"], ["int8-g32", "int8-gc"]),
        ("transformers", ["int2-g32", "int8-g64", "int4-gc"], ["int4-g32-asym", "int3-g32"]),
        ("llama.cpp", ["q4_1", "q4_k", "int5-g32", "fp32"], ["int4-g64", "int4-g32-asym"]),
        ("mlx", ["int5-g128-asym", "int3-g32"], ["int7-g32", "int4-gc", "q4_k"]),
        ("onnx", ["int2-g256-asym", "int4-gc", "int8-gc-asym"], ["int3-g32", "int2-gc", "int4-gt"]),
        ("autoround", ["int7-g64", "int2-g32-asym"], ["int1-g32"]),
        ("gptq", ["int3-g64-asym", "int8-g32"], ["int5-g32"]),
        ("torchao", ["int6-g32"], ["int6-g64"]),
    ],
)
def test_facts_of_the_runtimes(name: str, takes: list[str], refuses: list[str]) -> None:
    found = Rules.load(name)
    matrix = ((4096, 4096), "model.layers.0.mlp.up_proj")
    assert [f for f in takes if found.refusal(Format.parse(f), *matrix)] == []
    assert [f for f in refuses if not found.refusal(Format.parse(f), *matrix)] == []


@pytest.mark.parametrize("name", rules.names())
def test_only_runtimes_that_quantize_embeddings_take_one(name: str) -> None:
    found = Rules.load(name)
    fmt = Format.parse(found.candidates[0])
    refused = found.refusal(fmt, (49152, 768), "model.embed_tokens") is not None
    assert refused == (name not in ("llama.cpp", "mlx"))
    assert found.refusal(Format.parse("bf16"), (49152, 576), "model.embed_tokens") is None


@pytest.mark.parametrize(
    ("fmt", "shape", "name", "reason"),
    [
        ("int4-g64", (8, 64), "up", None),
        ("int4-gc-asym", (8, 96), "up", None),
        ("bf16", (7, 5), "embed", None),
        ("fp16", (8, 64), "up", "floats: it takes bf16, not fp16"),
        ("int3-g64", (8, 64), "up", "bits: it takes 4, 8, not 3"),
        ("int4-g128", (8, 128), "up", "groups: at 4 bits it takes g64, gc, not g128"),
        (
            "int8-g128-asym",
            (8, 128),
            "up",
            "zero_points: at 8 bits and g128 it takes no asymmetric format",
        ),
        ("int4-g64", (8, 64), "m.embed", "unquantized: m.embed must stay one of bf16"),
        (
            "int4-gc",
            (8, 72),
            "up",
            "columns_multiple_of: 72 input features are no multiple of 32",
        ),
        ("int4-g64", (9, 64), "up", "rows_multiple_of: 9 output features are no multiple of 8"),
        ("int4-g64", (8, 96), "up", "whole_groups: 96 input features are no multiple of 64"),
    ],
)
def test_refusals_name_the_rule(
    tmp_path: Path, fmt: str, shape: tuple[int, int], name: str, reason: str | None
) -> None:
    assert made(tmp_path).refusal(Format.parse(fmt), shape, name) == reason


@pytest.mark.parametrize(  # counted by hand: codes, scales, zero points, the rest
    ("name", "fmt", "shape", "nbytes"),
    [
        ("vllm", "int4-g32", (64, 96), 64 * 48 + 2 * 64 * 3 + 16),
        ("vllm", "int4-gc-asym", (40, 20), 40 * 12 + 2 * 40 + 4 * 5 + 16),
        ("autoround", "int3-g32", (32, 64), 32 * 24 + 2 * 32 * 2 + 2 * 12),
        ("gptq", "int3-g32", (32, 64), 32 * 24 + 2 * 32 * 2 + 2 * 12 + 4 * 64),
        ("mlx", "int5-g64", (10, 128), 10 * 80 + 4 * 10 * 2),
        ("mlx", "int5-g64-asym", (10, 128), 10 * 80 + 8 * 10 * 2),
        ("onnx", "int4-g32-asym", (3, 70), 3 * 48 + 2 * 3 * 3 + 3 * 2),
        ("onnx", "int4-gc-asym", (3, 7), 11 + 2 * 3 + 2),
        ("llama.cpp", "q4_k", (2, 512), 2 * 2 * 144),
        ("mlx", "bf16", (3, 5), 30),
    ],
)
def test_bytes_in_a_file(name: str, fmt: str, shape: tuple[int, int], nbytes: int) -> None:
    assert Rules.load(name).stored_bytes(Format.parse(fmt), shape) == nbytes


def test_fused_modules_are_written_as_groups(tmp_path: Path) -> None:
    assert made(tmp_path).fusion_groups == ("q,k,v",)
    assert Rules.load("vllm").fusion_groups == ("q_proj,k_proj,v_proj", "gate_proj,up_proj")


def test_an_unknown_runtime_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Unknown runtime 'vlm'\. Did you mean 'vllm'\? Avail"):
        Rules.load("vlm")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("bits = [4]", "bits = 4", r"mine\.toml holds no valid rules: integers\.0\.bits"),
        ('"g64", "gc"', '"g48"', r"integers\.0\.groups\.0: Input should be 'g32'"),
        ("rows_multiple_of = 8", "rows_multiple_of = 0", "rows_multiple_of: .*greater than 0"),
        ("whole_groups", "hole_groups", "hole_groups: Extra inputs"),
        ('source = "s"', "", "source: Field required"),
        ('["int4-g64", "keep"]', '["int3-g64"]', r"int3-g64 is refused \(bits: it takes 4, 8"),
        ('["int4-g64", "keep"]', '["int4-g46"]', "Unknown format 'int4-g46'"),
        ('["q", "k", "v"]', '["q"]', "needs at least two names"),
        ("bits = [4]", "bits = [4", r"mine\.toml is not TOML"),
        ('source = "s"', SCALES, "storage: no tensor has an element per weight"),
        (
            'source = "s"',
            SCALES.replace("group", "row"),
            r"storage\.0\.per: Input should be 'weight'",
        ),
    ],
)
def test_damaged_rules_say_where(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in GOOD
    with pytest.raises(ValueError, match=says):
        made(tmp_path, GOOD.replace(old, new, 1))

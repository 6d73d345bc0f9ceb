"""The packed folder: exact round trip, exact bytes, clear errors."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitplan._base.files import atomic_path
from bitplan.quantizers.checkpoint import FILE_NAME, read_checkpoint, write_checkpoint
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS
from bitplan.quantizers.packed import PackedTensor

fit_grid = METHODS.trait("rtn", "grid")
SPECS = {"a.q": "int4-g64-asym", "a.k": "int3-g32", "b": "int8-gc-asym", "c": "bf16"}


def packed_weights() -> dict[str, PackedTensor]:
    """One packed weight [7, 100] per format in ``SPECS``."""
    weight = torch.randn(7, 100, generator=torch.Generator().manual_seed(2))
    formats = {name: Format.parse(spec) for name, spec in SPECS.items()}
    return {name: PackedTensor.pack(weight, f, fit_grid(weight, f)) for name, f in formats.items()}


def tensor_bytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file: all but its header."""
    return path.stat().st_size - 8 - int(struct.unpack("<Q", path.read_bytes()[:8])[0])


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the file with other tensors and the same metadata."""
    path = folder / FILE_NAME
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def test_round_trip(tmp_path: Path) -> None:
    packed = packed_weights()
    others = {"norm.weight": torch.ones(5), "head.bias": torch.zeros(2, dtype=torch.bfloat16)}
    header = {"plan": {"bpw": 4.3, "name": "ä"}}
    write_checkpoint(tmp_path, packed, others, header)
    read, read_others, read_header = read_checkpoint(tmp_path)
    assert read_header == header
    assert {name: weight.fmt.name for name, weight in read.items()} == SPECS
    for name, weight in packed.items():
        assert read[name].shape == weight.shape
        for part, tensor in weight.tensors.items():
            assert torch.equal(read[name].tensors[part], tensor)
    assert read_others.keys() == others.keys()
    assert all(torch.equal(read_others[name], others[name]) for name in others)


def test_file_holds_exactly_the_stored_bytes(tmp_path: Path) -> None:
    packed = packed_weights()
    write_checkpoint(tmp_path, packed, {}, {})
    expected = sum(weight.fmt.stored_bytes(weight.shape) for weight in packed.values())
    assert tensor_bytes(tmp_path / FILE_NAME) == expected


def test_a_tensor_is_packed_or_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'c\.weight' is given both"):
        write_checkpoint(tmp_path, packed_weights(), {"c.weight": torch.zeros(7, 100)}, {})
    assert not list(tmp_path.iterdir())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a packed model"):
        read_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    write_checkpoint(tmp_path, packed_weights(), {}, {})
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{FILE_NAME} is damaged or truncated"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "not written by bitplan"),
        ({"bitplan_version": "4"}, "layout version 4; this bitplan reads versions 1, 2, 3"),
        ({"bitplan_version": "1"}, "damaged bitplan header"),
        ({"bitplan_version": "1", "bitplan": "{"}, "damaged bitplan header"),
        ({"bitplan_version": "1", "bitplan": "[]"}, "damaged bitplan header"),
        (
            {"bitplan_version": "2", "bitplan": '{"modules": {"a": {"shape": 3}}, "header": {}}'},
            "damaged bitplan header",
        ),
    ],
)
def test_wrong_header(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / FILE_NAME, metadata)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path)


def test_missing_tensor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, packed_weights(), {}, {})
    change_tensors(tmp_path, lambda tensors: tensors.pop("a.q.zero"))
    with pytest.raises(ValueError, match=rf"{FILE_NAME} lacks the tensor 'a.q.zero'"):
        read_checkpoint(tmp_path)


def test_wrong_tensor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, packed_weights(), {}, {})
    change_tensors(tmp_path, lambda tensors: tensors.update({"a.k.scale": torch.zeros(7, 4)}))
    with pytest.raises(ValueError, match=rf"{FILE_NAME}: module 'a.k': 'scale' .* is float32"):
        read_checkpoint(tmp_path)


def change_metadata(folder: Path, change: Callable[[dict[str, Any]], Any], version: str) -> None:
    """Rewrite the file with another bitplan header and the same tensors."""
    path = folder / FILE_NAME
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    content = json.loads(metadata["bitplan"])
    change(content)
    metadata |= {"bitplan": json.dumps(content), "bitplan_version": version}
    save_file(load_file(path), path, metadata)


def test_damaged_tensor(tmp_path: Path) -> None:
    """One flipped bit in the middle of the codes of one module is found and named."""
    packed = packed_weights()
    write_checkpoint(tmp_path, packed, {}, {})
    path = tmp_path / FILE_NAME
    content = bytearray(path.read_bytes())
    codes = bytes(packed["a.k"].tensors["codes"].reshape(-1).tolist())
    content[content.index(codes) + 40] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{FILE_NAME}: the tensor 'a.k.codes' is damaged"):
        read_checkpoint(tmp_path)


def test_format_that_this_build_lacks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, packed_weights(), {}, {})
    change_metadata(tmp_path, lambda c: c["modules"]["a.q"].update(format="nf5-g64"), "2")
    with pytest.raises(
        ValueError, match=rf"{FILE_NAME}: module 'a.q' \(tensors a.q.codes, .* 'nf5-g64'"
    ):
        read_checkpoint(tmp_path)


def test_version_1_has_no_checksums(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, packed_weights(), {}, {})
    change_metadata(tmp_path, lambda content: content.pop("crc32"), "1")
    assert read_checkpoint(tmp_path)[0].keys() == SPECS.keys()


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bitplan.quantizers.tensor_file.TensorFile.put", fail)
    message = "The disk is full: .*packed could not be written"
    with pytest.raises(OSError, match=message), atomic_path(tmp_path / "packed") as folder:
        folder.mkdir()
        write_checkpoint(folder, packed_weights(), {}, {})
    assert not list(tmp_path.iterdir())


def test_tensors_that_come_one_by_one_in_any_order_are_aligned(tmp_path: Path) -> None:
    packed, others = packed_weights(), {"odd": torch.arange(3).to(torch.uint8), "f": torch.ones(2)}
    sizes = {name: (weight.fmt, weight.shape) for name, weight in packed.items()}
    write_checkpoint(tmp_path, reversed(packed.items()), others, {}, formats=sizes)
    path = tmp_path / FILE_NAME
    start = 8 + int(struct.unpack("<Q", path.read_bytes()[:8])[0])
    entries = json.loads(path.read_bytes()[8:start])
    for name, tensor in load_file(path).items():
        assert (start + entries[name]["data_offsets"][0]) % tensor.element_size() == 0
    again, found, _ = read_checkpoint(tmp_path)
    assert torch.equal(found["odd"], others["odd"]) and torch.equal(found["f"], others["f"])
    for name, weight in packed.items():
        assert torch.equal(again[name].dequantize(), weight.dequantize())
